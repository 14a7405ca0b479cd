"""What people copy: retune.py with its prompts alone, and its classes and functions pasted one by one."""

import ast
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

import retune
from tests.conftest import ROOT, run_python

PLUMBING = {  # what nothing that users copy may need
    "Config", "Radiographs", "DualEncoder", "Tower", "embed", "fit", "run", "predict", "atomic", "log",
    "ranks"}  # fmt: skip


@pytest.mark.slow
def test_retune_and_prompts_alone_run_a_csv_of_images(csv_set, encoder_folder):
    root, rows, _ = csv_set
    for name in ("retune.py", "prompts.json"):
        shutil.copy(ROOT / name, root.parent)
    arguments = ("--data", "csv", "--data-dir", root, "--encoder", encoder_folder, "--epochs", "1")
    done = run_python(root.parent, "retune.py", *arguments, "--output", "run")
    assert done.returncode == 0, done.stderr
    done = run_python(root.parent, "retune.py", "--predict", root / rows[0]["path"], "--run", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)[0]["findings"]) == ["Edema", "Mass"]


def pasted(*names: str) -> dict:
    """The namespace of a fresh module into which `names`, and what they are made of, were pasted.

    It imports only the standard library, torch, numpy and scikit-learn.
    """
    tree = ast.parse((ROOT / "retune.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # `from __future__ import annotations` never evaluates annotations
        for field in {"annotation", "returns"} & {*node._fields}:
            setattr(node, field, ast.Constant(None))
    defined, imports = {}, []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if module.split(".")[0] in {*sys.stdlib_module_names, "torch", "numpy", "sklearn"}:
                imports.append(node)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    assert set(names) <= set(defined)
    wanted, found = list(names), []
    while wanted:
        name = wanted.pop()
        if name in defined and name not in found:
            found.append(name)
            wanted += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    assert not PLUMBING & set(found), f"{names} need {sorted(PLUMBING & set(found))}"
    body = [*imports, *(node for name, node in defined.items() if name in found)]
    module = types.ModuleType("pasted")
    sys.modules["pasted"] = module  # dataclasses look their module up
    code = ast.fix_missing_locations(ast.Module(body, []))
    exec(compile(code, "pasted", "exec"), vars(module))  # noqa: S102
    return vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pasted_model_trains_as_the_one_of_the_module(dtype):
    generator = torch.Generator().manual_seed(0)
    images, prompts = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 8))
    labels = torch.randint(0, 2, (9, 2), generator=generator).double()
    labels[0, 1] = torch.nan
    images[1] = 0  # no direction

    def step(names: dict) -> tuple:
        with retune.seeded(0):
            model = names["RETune"](6).to(dtype)
        bank = names["PromptBank"](prompts.to(dtype), torch.tensor([0, 0, 1, 2, 2, 2, 3, 3]))
        loss = names["prompt_contrastive_loss"](model.logits(images.to(dtype), bank), labels.to(dtype))
        loss.backward()
        return loss.detach(), *model.scores(images.to(dtype), bank), [p.grad for p in model.parameters()]

    found = step(pasted("Adaptor", "RETune", "PromptBank", "prompt_contrastive_loss"))
    assert found[0].dtype == found[1].dtype == dtype and all(g.isfinite().all() for g in found[3])
    torch.testing.assert_close(found, step(vars(retune)), atol=0, rtol=0)


def test_pasted_scenarios_and_metrics_give_those_of_the_module():
    names, generator = pasted("make_tasks", "evaluate", "continual_metrics"), np.random.default_rng(0)
    labels, decisions = (generator.integers(0, 2, (60, 3)).astype(float) for _ in range(2))
    scores, grid = generator.random((60, 3)), generator.random((3, 3))
    for scenario in ("data", "class", "label", "joint", "zero"):
        arguments = (scenario, labels, "abc", None, 0)
        assert repr(names["make_tasks"](*arguments)) == repr(retune.make_tasks(*arguments))
    assert names["evaluate"](scores, decisions, labels) == retune.evaluate(scores, decisions, labels)
    tasks = retune.make_tasks("class", labels, list("abc"), None, 0)
    assert names["continual_metrics"](grid, tasks, grid[0]) == retune.continual_metrics(grid, tasks, grid[0])
