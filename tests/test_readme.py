"""The README is true: its programs take its options, the cheap commands run, its example prints what it shows."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
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
        for k, word in enumerate(words):
            name = word.removesuffix(".py")
            if name == "retune" or name.split(".")[0] in ("adaptor", "cleft", "experiments"):
                calls.append((name, words[k + 1 :]))
                break
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
def test_the_demo_command_gives_the_number_to_expect(tmp_path, monkeypatch):
    """The calls of retune.py on the demo as they stand; what the text after one says it gives, if it does."""
    monkeypatch.chdir(tmp_path)
    needs = {"--data", "--predict", "--convert", "--encoder"}
    cheap = [words for program, words in python_calls() if program == "retune" and not needs & set(words)]
    assert cheap
    for words in cheap:
        assert retune.main([*words, "--output", "run"]) == 0
        metrics = read_metrics(Path("run"))
        stages = (metrics["zero_shot"], metrics["after_task"][-1])
        zero, last = (stage["test"]["auroc_macro"] for stage in stages)
        assert last > zero
        after = README.split(" ".join(words))[1][:300]
        if expected := re.search(r"AUROC of (0\.\d+) \(zero-shot: (0\.\d+)\)", after):
            assert [last, zero] == pytest.approx([float(number) for number in expected.groups()], abs=0.01)
        Path("run").rename("done")


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
