"""Baselines against plain versions, tables against raw scores, the script against a stand-in for python."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import baselines
import numpy as np
import pytest
import tables
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.nn.utils import parameters_to_vector

import retune
from retune import Config, InputError, Task

HERE = Path(__file__).resolve().parent
DIM, CLASSES, N = 6, 3, 40
TASKS = [Task(f"class {c}", np.arange(10 * c, 10 * c + 10), (c,)) for c in range(CLASSES)]


@pytest.fixture
def embeddings():
    return np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)


@pytest.fixture
def labels():
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (N, CLASSES)).astype(np.float32))
    labels[3, 1] = labels[12, 1] = torch.nan
    return labels


def make(method, **settings):
    torch.manual_seed(0)
    return baselines.build(Config(method=method, **settings), DIM, CLASSES)


def train(model, embeddings, labels, task, optimizer=None, epochs=3):
    rows, known = model.rehearse(task, labels) if hasattr(model, "rehearse") else (task, labels)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    retune.fit(
        model, None, embeddings, known, rows, optimizer, epochs=epochs, batch_size=4,
        generator=torch.Generator().manual_seed(0), penalty=getattr(model, "penalty", None),
    )  # fmt: skip
    if hasattr(model, "consolidate"):
        model.consolidate(embeddings, labels, task, None)


# -------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("method", ["linear", "mlp", "ewc", "lwf", "replay", "joint"])
def test_every_baseline_learns_and_scores_are_probabilities(method, embeddings, labels):
    model = make(method)
    before = [p.clone() for p in model.parameters()]
    for task in TASKS:
        train(model, embeddings, labels, task)
    assert any((p != q).any() for p, q in zip(model.parameters(), before))
    scores, decisions = model.scores(torch.from_numpy(embeddings), None, "diff")
    assert scores.shape == decisions.shape == (N, CLASSES)
    assert ((scores >= 0) & (scores <= 1)).all() and torch.equal(decisions, (scores > 0.5).float())
    copy = make(method)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.logits(torch.from_numpy(embeddings)), model.logits(torch.from_numpy(embeddings)))


def test_a_linear_head_has_nothing_to_forget(embeddings, labels):
    model = make("linear")
    train(model, embeddings, labels, TASKS[0])
    first = model.network[1].weight[0].clone()
    train(model, embeddings, labels, TASKS[1])
    assert torch.equal(model.network[1].weight[0], first)


def test_fisher_is_the_expected_squared_gradient(embeddings, labels):
    model = make("mlp")
    task = Task("two", np.arange(0, 15), (0, 1))
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for row in task.rows:
        for c in task.classes:
            if labels[row, c].isnan():
                continue
            for y in (0.0, 1.0):  # the expectation over labels, written out
                logit = model.logits(torch.from_numpy(embeddings[row]))[c]
                weight = torch.sigmoid(logit if y else -logit).item()
                loss = F.binary_cross_entropy_with_logits(logit, torch.tensor(y))
                gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                expected += weight * parameters_to_vector(gradients).square() / len(task.rows)
    fisher = baselines.fisher_diagonal(model.network, embeddings, labels, task)
    torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-9)


def test_ewc_penalty_is_a_parabola_around_the_last_task(embeddings, labels):
    model = make("ewc")
    train(model, embeddings, labels, TASKS[0])
    assert model.penalty(None, None) == 0 and model.fisher.sum() > 0
    with torch.no_grad():
        model.network[1].bias[0] += 0.5
    position = DIM * 2 * DIM * 2 + 3 * DIM + CLASSES * DIM  # of that bias among all parameters
    assert parameters_to_vector(model.parameters())[position] == model.network[1].bias[0]
    expected = baselines.EWC_LAMBDA / 2 * model.fisher[position] * 0.25
    torch.testing.assert_close(model.penalty(None, None), expected)


def test_lwf_pulls_towards_the_old_model_on_old_findings_alone(embeddings, labels):
    model, x = make("lwf"), torch.from_numpy(embeddings)
    assert model.penalty(x, model.logits(x)) == 0.0
    train(model, embeddings, labels, TASKS[0])
    old = model.logits(x).detach()
    logits = old.clone().requires_grad_()
    model.penalty(x, logits).backward()
    torch.testing.assert_close(
        logits.grad, torch.zeros_like(old), atol=1e-7, rtol=0
    )  # lowest at the old model
    with torch.no_grad():
        model.network[1].bias += 1.0
    p = torch.sigmoid(old[:, 0] / 2)
    q = torch.sigmoid((old[:, 0] + 1) / 2)
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(model.penalty(x, model.logits(x)), expected)


@pytest.mark.parametrize("method", ["replay", "joint"])
def test_remembered_images_keep_the_labels_they_came_with(method, embeddings, labels):
    model = make(method, memory=7)
    for task in TASKS[:2]:
        model.consolidate(embeddings, labels, task)
    rows, known = model.rehearse(TASKS[2], labels)
    kept = rows.rows[rows.rows < 20]
    assert len(kept) == (7 if method == "replay" else 20) and set(TASKS[2].rows) < set(rows.rows)
    for row in range(N):
        brought = row // 10 if row in rows.rows else None
        for c in range(CLASSES):
            expected = labels[row, c] if c == brought else torch.tensor(torch.nan)
            torch.testing.assert_close(known[row, c], expected, equal_nan=True)
    assert model.stored_bytes() == len(kept) * 4 * (DIM + CLASSES)


def test_replay_keeps_a_uniform_sample_whatever_the_number_of_tasks(embeddings, labels):
    stepwise, at_once = make("replay", memory=9), make("replay", memory=9)
    for task in TASKS:
        stepwise.consolidate(embeddings, labels, task)
    at_once.consolidate(embeddings, labels, Task("all", np.arange(30), (0,)))
    assert torch.equal(stepwise.memory[:, 0], at_once.memory[:, 0])


def test_a_saved_memory_holds_rows_and_no_patient_data(embeddings, labels, tmp_path):
    model = make("replay", memory=9)
    model.consolidate(embeddings, labels, TASKS[0])
    retune.save_tensors(tmp_path / "m.safetensors", model.state_dict(), {})
    saved = retune.load_tensors(tmp_path / "m.safetensors")[0]["_extra_state"]
    assert (
        saved.dtype == torch.int64
        and saved[:, 0].max() < 10
        and torch.equal(saved[:, 1:].unique(), torch.tensor([0, 1]))
    )


def test_unknown_methods_and_empty_memories_are_refused():
    with pytest.raises(InputError, match="known: linear, mlp"):
        baselines.build(dataclasses.replace(Config(), method="svm"), DIM, CLASSES)
    with pytest.raises(InputError, match="memory"):
        Config(method="replay", memory=0)


SMALL = {"demo_images": 240, "epochs": 2, "figures": False, "workers": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("method", ["ewc", "lwf", "replay"])
def test_an_interrupted_baseline_ends_with_the_same_metrics(method, cache, tmp_path, monkeypatch):
    config = Config(
        **SMALL, method=method, memory=20, scenario="class", cache_dir=cache, output=str(tmp_path / "whole")
    )
    whole = retune.run(config).metrics
    keep = retune.keep

    def killed(folder, model, optimizer, task, seconds):
        keep(folder, model, optimizer, task, seconds)
        if task == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(retune, "keep", killed)
    config = dataclasses.replace(config, output=str(tmp_path / "twice"))
    with pytest.raises(KeyboardInterrupt):
        retune.run(config)
    monkeypatch.setattr(retune, "keep", keep)
    again = retune.run(config).metrics
    for key in ("zero_shot", "after_task", "continual"):
        assert again[key] == whole[key]


# ----------------------------------------------------------------------------------------------------- tables


def copy_run(source: Path, target: Path, **settings) -> None:
    """A run that differs from a real one in its settings, so that tables can be filled without training."""
    shutil.copytree(source, target)
    metrics = json.loads((target / "metrics.json").read_text())
    metrics["tasks"] = (metrics["tasks"] * 20)[: settings.pop("parts", len(metrics["tasks"]))]
    metrics["config"] |= settings
    (target / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def results(tmp_path_factory, cache):
    """A folder with every run that the tables need; real ones: `mlp-both`, `mlp` and `order`."""
    root = tmp_path_factory.mktemp("results")
    runs = root / "runs"
    for seed in (27, 28):
        shared = Config(**SMALL, cache_dir=cache, seed=seed)
        for scenario in ("joint", "data", "label", "class"):
            real = runs / "mlp-both" / f"{scenario}-seed{seed}"
            retune.run(dataclasses.replace(shared, scenario=scenario, output=str(real)))
            for adaptor, adapt in [("mlp", "shared"), ("mlp", "image"), ("mlp", "text")] + [
                ("linear", t) for t in ("both", "shared", "image", "text")
            ]:
                copy_run(real, runs / f"{adaptor}-{adapt}" / real.name, adaptor=adaptor, adapt=adapt)
            for scale in (1.0, 10.0):
                for lr in (1e-3, 1e-4):
                    copy_run(
                        real,
                        runs / f"residual-{scale}-{lr}" / real.name,
                        adaptor="residual",
                        logit_scale=scale,
                        lr=lr,
                    )
            if scenario != "joint":
                for method in ("linear", "ewc", "lwf", "replay", "joint"):
                    copy_run(real, runs / method / real.name, method=method)
                real_mlp = dataclasses.replace(
                    shared, scenario=scenario, method="mlp", output=str(runs / "mlp" / real.name)
                )
                retune.run(real_mlp)
            if scenario in ("joint", "class"):
                for k, change in enumerate(
                    [
                        {"pool": "single"},
                        {"pool": "max"},
                        {"negatives": False},
                        {"wording": "generic"},
                        {"score": "pos"},
                    ]
                ):
                    copy_run(real, runs / f"prompts-{k}" / real.name, **change)
        for parts in (10, 20):
            copy_run(
                runs / "mlp-both" / f"data-seed{seed}",
                runs / f"data-{parts}" / f"data-seed{seed}",
                parts=parts,
            )
        order = dataclasses.replace(shared, scenario="class", class_order=("random",), seed=seed - 26)
        retune.run(dataclasses.replace(order, output=str(runs / "order" / f"class-seed{seed - 26}")))
    assert tables.main([str(root)]) == 0
    return root


def auroc_after(run: Path, task: int) -> np.ndarray:
    """Test AUROC of every class from the saved adaptors of a task, by way of raw scores."""
    metrics = json.loads((run / "metrics.json").read_text())
    config, data, embeddings, bank, model = tables.open_run(tables.Run(run, metrics, {}))
    weights = retune.load_tensors(run / f"task_{task}.safetensors")[0]
    model.load_state_dict(weights)
    rows = data.where("test")
    with torch.inference_mode():
        scores = model.scores(torch.from_numpy(np.asarray(embeddings[rows])), bank, config.score)[0].numpy()
    return np.array([roc_auc_score(data.labels[rows, c], scores[:, c]) for c in range(scores.shape[1])])


def csv_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_cell_of_each_table_from_the_raw_scores(results):
    def grids(folder, scenario, tasks, seeds=(27, 28)):
        return [
            np.array([auroc_after(results / "runs" / folder / f"{scenario}-seed{s}", t) for t in tasks])
            for s in seeds
        ]

    every = {name: csv_rows(results / f"{name}.csv") for name in tables.TABLES}
    joint = [g[0].mean() for g in grids("mlp-both", "joint", [1])]
    assert float(every["main"][1]["AUROC macro"]) == pytest.approx(np.mean(joint), abs=1e-9)
    assert float(every["main"][1]["AUROC macro, standard deviation"]) == pytest.approx(
        abs(joint[0] - joint[1]) / math.sqrt(2), abs=1e-9
    )

    def forgetting(grid):  # class-incremental: class c is learned in task c, the last one cannot be forgotten
        return np.mean([grid[c:-1, c].max() - grid[-1, c] for c in range(4)])

    for folder, row in (("mlp-both", 0), ("mlp", 2)):
        expected = np.mean([forgetting(g) for g in grids(folder, "class", range(1, 6))])
        assert float(every["forgetting"][row]["forgetting"]) == pytest.approx(expected, abs=1e-9)
        if row == 0:
            assert float(every["adaptors"][0]["forgetting class"]) == pytest.approx(expected, abs=1e-9)
    assert float(every["prompts"][0]["joint AUROC"]) == pytest.approx(np.mean(joint), abs=1e-9)
    average = [g[0].mean() for g in grids("order", "class", [5], seeds=(1, 2))]
    assert float(every["order"][0]["average AUROC"]) == pytest.approx(average[0], abs=1e-9)
    assert float(every["order"][2]["average AUROC"]) == pytest.approx(np.mean(average), abs=1e-9)
    weights = retune.load_tensors(results / "runs/mlp-both/class-seed27/adaptors.safetensors")[0]
    assert float(every["cost"][0]["trainable parameters"]) == sum(w.numel() for w in weights.values())


def test_calibration_against_a_plain_loop(results):
    expected = []
    for seed in (27, 28):
        run = results / "runs" / "mlp-both" / f"joint-seed{seed}"
        metrics = json.loads((run / "metrics.json").read_text())
        _, data, embeddings, bank, model = tables.open_run(tables.Run(run, metrics, {}))
        rows, gaps = data.where("test"), []
        with torch.inference_mode():
            p = model.logits(torch.from_numpy(np.asarray(embeddings[rows])), bank).double().sigmoid().numpy()
        for c in range(p.shape[1]):
            for b in range(15):
                inside = (p[:, c] >= b / 15) & (p[:, c] < (b + 1) / 15)
                if inside.any():
                    gaps.append(
                        inside.mean() * abs(p[inside, c].mean() - data.labels[rows][inside, c].mean())
                    )
        expected.append(sum(gaps) / p.shape[1])
    row = csv_rows(results / "calibration.csv")[1]
    assert row["method"] == "RE-tune, joint"
    assert float(row["ECE"]) == pytest.approx(np.mean(expected), abs=1e-7)  # float32 logits


def test_temperature_finds_the_factor_that_was_taken_away():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 2)) * 2
    labels = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    labels[::7] = np.nan
    assert tables.fit_temperature((logits * 3).astype(np.float32), labels) == pytest.approx(3, rel=0.05)
    assert (
        tables.reliability(logits * 3, labels, 3.0)["ece"]
        < 0.02
        < tables.reliability(logits * 3, labels, 1.0)["ece"]
    )


def test_every_number_is_traced_to_its_runs(results):
    cells = csv_rows(results / "cells.csv")
    assert {cell["table"] for cell in cells} == set(tables.TABLES)
    for cell in cells:
        for folder, value in zip(cell["runs"].split(), cell["values"].split()):
            name = "calibration.json" if cell["metric"].startswith("calibration.") else "metrics.json"
            content = json.loads((results / folder / name).read_text())
            parts = []
            for path in cell["metric"].removeprefix("calibration.").split(" / "):
                place = content
                for key in path.split("."):
                    place = place[int(key)] if isinstance(place, list) else place[key]
                parts.append(place)
            expected = parts[0] / parts[1] if len(parts) == 2 else parts[0]
            assert float(value) == pytest.approx(expected, rel=1e-8), cell


def test_the_three_formats_say_the_same(results):
    for name in tables.TABLES:
        markdown, latex = ((results / f"{name}{s}").read_text(encoding="utf-8") for s in (".md", ".tex"))
        lines = [line for line in markdown.splitlines() if line.startswith("| ")][2:]
        body = latex.split(r"\midrule", 1)[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
        body = [line for line in body.strip().splitlines() if line.strip()]
        numbers = csv_rows(results / f"{name}.csv")
        assert len(lines) == len(body) == len(numbers)
        for line, tex, row in zip(lines, body, numbers):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            plain = tex.replace(r"$\pm$", "±").replace(r"\%", "%").replace("$>$", ">").replace(r" \\", "")
            plain = plain.replace(r"\textbf{", "**").replace("}", "**")
            assert [c.strip() for c in plain.split(" & ")] == cells
            text = cells[-1].replace("*", "").replace(",", "").split(" ± ")[0]
            column = list(row)[-3]
            if text not in ("-",) and "%" not in text:
                assert float(text) == pytest.approx(
                    float(row[column]), abs=0.51 if "." not in text else 0.00051
                )
        assert latex.count("{") == latex.count("}") and r"\toprule" in latex
        for word in ("Data: demo", "Encoder: tiny", "Classes: Atelectasis", "Seeds: "):
            assert word in markdown and word in latex


def test_best_is_bold_within_its_group_and_direction():
    def cell(value):
        return tables.Cell("x", (value,), (), ".3f")

    columns = [
        tables.Column("up", "x"),
        tables.Column("down", "x", "min"),
        tables.Column("neither", "x", None),
    ]
    rows = [
        tables.Row((name,), {}, group) for name, group in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "2"))
    ]
    values = [0.5, 0.50001, 0.1, 0.2]
    table = tables.Table("t", "", ("",), columns, rows, [[cell(v)] * 3 for v in values])
    assert [[table.best(i, j) for j in range(3)] for i in range(4)] == [
        [False] * 3, [False] * 3, [False, True, False], [True, False, False],
    ]  # fmt: skip


def test_a_missing_run_is_named(results, tmp_path, capsys):
    shutil.copytree(results / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "ewc" / "label-seed28")
    assert tables.main([str(tmp_path), "--only", "forgetting"]) == 2
    message = capsys.readouterr().err
    assert "method ewc" in message and "seeds [27]" in message and "ONLY=forgetting" in message
    assert tables.main([str(tmp_path / "runs" / "nothing")]) == 2


def test_figures_are_there_and_not_blank(results):
    from PIL import Image

    names = [f"{kind}-{s}.png" for kind in ("auroc", "f1") for s in ("class", "label", "data")]
    for name in [*names, "auroc-over-tasks.png", "tsne.png", "prompts.png"]:
        pixels = np.asarray(Image.open(results / name).convert("L"))
        assert pixels.std() > 10 and min(pixels.shape) > 200, name


# ---------------------------------------------------------------------------------- committed results, README

COMMITTED = HERE / "results" / "demo-tiny"


def test_the_readme_shows_what_the_script_wrote():
    assert tables.readme_block(COMMITTED.relative_to(HERE)) in (HERE / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_committed_tables_follow_from_the_committed_values():
    shown = {name: (COMMITTED / f"{name}.md").read_text(encoding="utf-8") for name in tables.TABLES}
    for cell in csv_rows(COMMITTED / "cells.csv"):
        values = tuple(map(float, cell["values"].split()))
        digits = [".3f", ".2f", ".1f", ",.0f", ".2%"]
        texts = [tables.Cell("", values, (), d).text for d in digits]
        assert any(text in shown[cell["table"]] for text in texts), cell


def test_a_run_of_today_gives_the_committed_value(tmp_path):
    """One run of the script's from the images on; processors round differently, hence the tolerance."""
    config = Config(
        scenario="class", figures=False, cache_dir=str(tmp_path / "cache"), output=str(tmp_path / "run")
    )
    metrics = retune.run(config).metrics
    checked = 0
    for cell in csv_rows(COMMITTED / "cells.csv"):
        found = dict(zip(cell["runs"].split(), cell["values"].split())).get("runs/mlp-both/class-seed27")
        ranking = any(key in cell["metric"] for key in ("auroc", "ap_macro", "continual"))
        if found and ranking and cell["table"] in ("main", "forgetting"):
            value = tables.Run(tmp_path / "run", metrics, {}).value(cell["metric"])
            assert value == pytest.approx(float(found), abs=0.03), cell
            checked += 1
    assert checked == 7


# ------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(tmp_path):
    """Run the script with a stand-in for python that notes its arguments and fails where FAIL is among"
    " them."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/usr/bin/env bash\necho "$*" >>"{tmp_path}/calls"\n'
        '[[ -n "$FAIL" && "$*" == *"$FAIL"* ]] && exit 3\nexit 0\n'
    )
    stand_in.chmod(0o755)

    def run(**variables):
        (tmp_path / "calls").write_text("")
        path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "OUT": str(tmp_path / "out"), "FAIL": ""} | variables
        done = subprocess.run(
            ["bash", str(HERE / "run_experiments.sh")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_script_runs_everything_once_and_then_nothing(script):
    done, calls = script(SEEDS="1 2", DATA="chexpert", DATA_DIR="/x y", ENCODER="biovil")
    assert done.returncode == 0, done.stderr
    assert all(
        "--data chexpert --data-dir /x y --encoder biovil" in c and "--seed 1 2" in c for c in calls[:-1]
    )
    assert calls[-1].startswith("tables.py") and "chexpert-biovil" in calls[-1]
    for option in (
        "--parts 10 20", "--method linear mlp ewc lwf replay joint", "--adapt both shared image text",
        "--pool single max", "--no-negatives", "--wording generic", "--score pos", "--class-order random",
    ):  # fmt: skip
        assert sum(option in call for call in calls) == 1, option
    done, calls = script(SEEDS="1 2", DATA="chexpert", DATA_DIR="/x y", ENCODER="biovil")
    assert done.returncode == 0 and calls == [] and "nothing to do" in done.stdout


def test_script_stops_at_the_first_error_with_its_command_and_resumes(script):
    done, calls = script(FAIL="--wording generic")
    assert (
        done.returncode != 0
        and "failed: python retune.py" in done.stderr
        and "--wording generic" in done.stderr
    )
    assert "--wording generic" in calls[-1]
    done, calls = script()
    assert done.returncode == 0 and "--wording generic" in calls[0] and calls[-1].startswith("tables.py")
    done, calls = script(FAIL="tables.py", ONLY="main")
    assert done.returncode != 0 and "failed: python tables.py" in done.stderr


def test_script_runs_what_a_table_needs_and_records_the_commit(script, tmp_path):
    done, calls = script(ONLY="forgetting")
    assert done.returncode == 0 and len(calls) == 3 and calls[-1].endswith("--only forgetting")
    record = (tmp_path / "out" / "demo-tiny" / "commands.txt").read_text()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert f"commit {commit}" in record and "--seed 27 28 29" in record
