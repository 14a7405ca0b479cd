"""The README is true: its programs take its options, the cheap commands run, its example prints what it shows."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import retune
from tests.fixtures import ROOT, read_metrics, run_python, slow

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The calls in the README's bash blocks as lists of words; comments and line ends inside a call removed."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(call, comments=True) for line in lines for call in line.split("&&")]


def python_calls() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every call of a program of ours."""
    calls = []
    for words in commands():
        names = [word.removesuffix(".py") for word in words if not word.startswith("-")]
        for k, word in enumerate(words):
            name = word.removesuffix(".py")
            if name == "retune" or name.split(".")[0] in ("adaptor", "cleft", "experiments"):
                calls.append((name, words[k + 1 :]))
                break
        assert names or not words
    return calls


class Parsed(Exception):
    """The arguments were understood."""


@pytest.mark.parametrize(
    "program, arguments", python_calls(), ids=lambda value: " ".join(value)[:60] if value else ""
)
def test_programs_take_the_readmes_options(program, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *positional, **options):
        parse(self, *positional, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    name = f"{program}.__main__" if (ROOT / program.replace(".", "/")).is_dir() else program
    with pytest.raises(Parsed):
        importlib.import_module(name).main(arguments)


@slow
def test_the_demo_commands_run_and_learn(tmp_path, monkeypatch):
    """The calls of retune.py on the demo, with fewer phantoms: above zero-shot at the end."""
    monkeypatch.chdir(tmp_path)
    needs = {"--data", "--predict", "--convert", "--encoder"}
    cheap = [words for program, words in python_calls() if program == "retune" and not needs & set(words)]
    assert cheap
    for words in cheap[:2]:
        assert retune.main([*words, "--demo-images", "1500"]) == 0
    for file in Path("runs").glob("*/metrics.json"):
        metrics = read_metrics(file.parent)
        stages = [metrics["zero_shot"], *metrics["after_task"]]
        first, last = stages[0]["test"]["auroc_macro"], stages[-1]["test"]["auroc_macro"]
        assert len(stages) == 1 or last > first


def test_shell_commands_name_files_that_are_there():
    for words in commands():
        for word in words:
            if word.endswith((".sh", ".txt")) and "/" not in word:
                assert (ROOT / word).is_file(), words


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("k", range(len(blocks("python"))))
def test_the_python_example_prints_what_the_readme_shows(k, tmp_path):
    """What it prints stands behind `#` in its last lines, or in the block after it."""
    program = blocks("python")[k]
    assert len([line for line in program.splitlines() if line.strip()]) <= 12
    after = README.split(f"```python\n{program}```")[1]
    shown = re.match(r"\s*```(?:text)?\n(.*?)```", after, re.DOTALL)
    shown = shown[1] if shown else "\n".join(re.findall(r"# (.+)$", program, re.MULTILINE))
    done = run_python(tmp_path, "-c", program, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and re.findall(r"[\d.]+", done.stdout) == re.findall(r"[\d.]+", shown)


def test_the_scripts_help_or_plan_needs_no_data():
    done = subprocess.run(
        ["bash", "-n", "run_experiments.sh"], cwd=ROOT, capture_output=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
