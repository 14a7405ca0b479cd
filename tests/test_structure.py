"""The house: what lies where, how long it is, and that imports point one way."""

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

TOP = {
    "retune.py", "prompts.json", "run_experiments.sh", "test_retune.py", "requirements.txt", "README.md",
    "LICENSE", ".gitignore", ".ruff.toml", ".ci", "adaptor", "cleft", "experiments", "demo", "tests", "docs",
}  # fmt: skip
BOUNDS = {  # lines in all; of experiments/ lines of code
    "retune.py": 2226, "test_retune.py": 1200, "README.md": 150, "adaptor/**/*.py": 1900,
    "cleft/**/*.py": 1400, "experiments/**/*.py": 1900, "tests/**/*.py": 4600}  # fmt: skip


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


CODE = sources("retune.py", "adaptor/**/*.py", "cleft/**/*.py", "experiments/**/*.py", "demo/**/*.py")


def test_imports_point_one_way():
    """Imports inside functions count, too; a package is its __init__."""
    modules, graph = {}, {}
    for path in CODE:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    for name, tree in modules.items():
        named = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: from {node.module or '.'}: name the whole module"
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
                named |= inside or {node.module}
        graph[name] = named & set(modules) - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert "demo.phantoms" in graph["retune"] <= {"demo.phantoms", "experiments"}  # only when asked for
    for name, targets in graph.items():
        others = {target.split(".")[0] for target in targets} & {"adaptor", "cleft", "experiments"}
        assert not others - {name.split(".")[0]} or name == "retune", (name, targets)


def test_importing_retune_loads_no_other_file_and_changes_nothing_global(tmp_path):
    program = f"""
import logging, os, random, signal, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, tqdm, pandas

def state():
    values = [random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), warnings.filters[:],
              torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
              torch.are_deterministic_algorithms_enabled(), logging.root.level, len(logging.root.handlers),
              np.geterr(), np.get_printoptions(), os.getcwd(), signal.getsignal(signal.SIGINT),
              torch.backends.cudnn.benchmark, sys.excepthook, sys.stdout, warnings.formatwarning]
    return [repr(value) for value in values]

before = state()
import retune
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
ours = [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith({str(ROOT)!r})]
assert ours == [retune], ours
heavy = {{"transformers", "sklearn", "matplotlib", "torchvision", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = run_python(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr


def test_nothing_else_lies_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP


def lines_of_code(text: str) -> int:
    """Lines that are not blank, a comment or part of a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and number not in docstrings for number, line in lines)


@pytest.mark.parametrize("pattern", BOUNDS)
def test_files_keep_their_bounds(pattern):
    count = lines_of_code if pattern.startswith("experiments") else lambda text: len(text.splitlines())
    lines = {path: count(path.read_text(encoding="utf-8")) for path in sources(pattern)}
    print(f"{pattern}: {sum(lines.values())} of {BOUNDS[pattern]} lines")
    assert lines and sum(lines.values()) <= BOUNDS[pattern], lines


def test_no_function_is_long_and_no_assignment_packs_several_values():
    lengths, packed = {}, []
    for path in [*CODE, *sources("test_retune.py", "tests/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_pair = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{path.relative_to(ROOT)} {node.name}"] = node.end_lineno - node.lineno + 1
            elif is_pair and isinstance(node.targets[0], ast.Tuple) and path in CODE:
                packed.append(f"{path.relative_to(ROOT)} line {node.lineno}")
    longest = max(lengths, key=lengths.get)
    print(f"longest function: {longest}, {lengths[longest]} lines")
    assert lengths[longest] <= 60, longest
    assert not packed
