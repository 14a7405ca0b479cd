"""README and docs: programs take the options shown, cheap commands run, the example prints its output."""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import retune
from tests.conftest import ROOT, read_metrics, run_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, *DOCS = (page.read_text(encoding="utf-8") for page in PAGES)
PROGRAM = r"(?:^|\s)(?:\S*\b(retune)\.py|-m ((?:adaptor|cleft|demo|experiments)[.\w]*))(?=\s|$)"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The calls in a page's bash blocks, indented lines and inline code, with shell variables filled in."""
    text = text.replace("\\\n", " ")
    lines = "\n".join(blocks("bash", text)).splitlines()
    lines += re.findall(r"^    (python .+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    variables = re.findall(r'\b(\w+)="([^"\n]+)"', text) + re.findall(r"for (\w+) in (\S+)", text)
    for name, value in variables:
        lines = [re.sub(rf"\${name}\b", value, line) for line in lines]
    return [call for line in lines for call in re.split("&&|;", line)]


def program_calls(*texts: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every call of a program of ours; "..." stays as an option's value alone."""
    calls = {}
    for call in (call for text in texts for call in commands(text)):
        call = re.sub(r"--method (NAME|\w+:\w+)", "--method lwf", call)  # a method of the reader's own
        if match := re.search(PROGRAM, call):
            words = shlex.split(call[match.end() :], comments=True)
            pairs = zip(words, ["", *words])
            words = [word for word, before in pairs if word != "..." or before.startswith("--")]
            calls[" ".join([match[1] or match[2], *words])] = (match[1] or match[2], words)
    return [(name, words) for name, words in calls.values() if words]  # without: the text names a program


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy's, of modules that are imported already
@pytest.mark.parametrize(
    "program, arguments", program_calls(README, *DOCS), ids=lambda value: str(value)[:60]
)
def test_programs_take_the_options_that_are_shown(program, arguments, monkeypatch):
    parse, check = argparse.ArgumentParser.parse_args, argparse.ArgumentParser._check_value

    def stop(self, *positional, **options):
        parse(self, *positional, **options)
        raise SystemExit("understood")

    def check_unless_left_open(self, action, value):
        if value != "...":
            check(self, action, value)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "_check_value", check_unless_left_open)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(program, run_name="__main__")
    assert stopped.value.code == "understood" or "--help" in arguments and not stopped.value.code


@pytest.mark.slow
def test_the_demo_command_gives_the_number_to_expect(tmp_path, monkeypatch):
    """The demo calls of retune.py as they stand; the text beside the first says what to expect."""
    monkeypatch.chdir(tmp_path)
    needs = {"--data", "--predict", "--convert", "--encoder"}
    calls = program_calls("\n".join(f"```bash\n{block}```" for block in blocks("bash")))
    cheap = [words for program, words in calls if program == "retune" and not needs & set(words)]
    expected = re.search(r"AUROC of (0\.\d+) \(zero-shot: (0\.\d+)\)", README).groups()
    for words in cheap:
        assert retune.main([*words, "--output", "run"]) == 0
        metrics = read_metrics(Path("run"))
        stages = (metrics["zero_shot"], metrics["after_task"][-1])
        zero, last = (stage["test"]["auroc_macro"] for stage in stages)
        assert last > zero
        assert words != cheap[0] or [last, zero] == pytest.approx(list(map(float, expected)), abs=0.01)
        shutil.rmtree("run")


def test_programs_compile_and_commands_and_links_name_files_that_are_there():
    for page, text in zip(PAGES, (README, *DOCS)):
        for program in blocks("python", text):
            compile(program, page, "exec")
        for name in re.findall(r"(?<![\w/.-])(\w+\.(?:sh|txt))\b", "\n".join(blocks("bash", text))):
            assert (ROOT / name).is_file(), (page, name)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), (page, target)


@pytest.mark.slow
def test_the_python_example_prints_what_the_readme_shows(tmp_path):
    """What it prints stands in the block after it."""
    both = re.findall(r"^```python\n(.*?)^```\s*^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    ((program, shown),) = both
    assert len([line for line in program.splitlines() if line.strip()]) <= 12
    done = run_python(tmp_path, "-c", program, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown
