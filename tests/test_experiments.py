"""Tables against plain arithmetic and raw scores, the sweep, the script with a fake python, the benchmark."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import retune
from experiments import decisions, figures, runs, sweep, tables
from retune import InputError
from tests.conftest import ROOT

COMMITTED = ROOT / "experiments" / "results" / "demo-tiny"
SMALL = ["--demo-images", "240", "--epochs", "2", "--no-figures", "--workers", "0"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with small runs of two methods, whitened and not, in every scenario: {m}-{w}/{s}-{seed}."""
    root = tmp_path_factory.mktemp("results")
    shared = [*SMALL, "--cache-dir", str(root / "cache"), "--seed", "27", "28"]
    output = ["--output", f"{root}/runs/{{method}}-{{whiten}}/{{scenario}}-{{seed}}"]
    grid = ["scenario=joint,class,label,data", "method=retune,linear", "whiten=no,yes"]
    assert retune.main(["--grid", *grid, "--", *shared, *output], sweep.sweep) == 0
    runs.write_runs(runs.collect(root / "runs"), root)
    return root


def read_markdown(text: str) -> pd.DataFrame:
    """The cells of the first Markdown table in a text, without bold."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip(" *") for cell in line] for line in lines]
    return pd.DataFrame(body, columns=header)


def read_table(name: str) -> pd.DataFrame:
    return read_markdown((COMMITTED / f"{name}.md").read_text(encoding="utf-8"))


def mean_and_deviation(values: pd.Series) -> str:
    if values.isna().all():
        return "-"
    return f"{values.mean():.3f} ± {values.std():.3f}" if values.nunique() > 1 else f"{values.mean():.3f}"


# -------------------------------------------------------------------------------------------- from the scores
@pytest.mark.slow
def test_sweep_runs_every_combination_and_skips_finished(results, capsys):
    assert len(list((results / "runs").rglob("metrics.json"))) == 32
    path = results / "runs" / "retune-False" / "class-27" / "metrics.json"
    before = path.stat().st_mtime_ns
    output = ["--output", f"{results}/runs/{{method}}-False/{{scenario}}-{{seed}}"]
    shared = [*SMALL, "--cache-dir", str(results / "cache"), "--seed", "27", *output]
    assert retune.main(["--grid", "scenario=class", "method=retune", "--", *shared], sweep.sweep) == 0
    assert path.stat().st_mtime_ns == before and "finished before" in capsys.readouterr().out


def test_grid_options():
    found = list(sweep.combinations(["whiten=no,yes", "set=a=1 b=2", "lr=0.1"]))
    rest = ["--set", "a=1", "b=2", "--lr", "0.1"]
    assert found == [rest, ["--whiten", *rest]]


def auroc_after(folder: Path, task: int) -> np.ndarray:
    """Test AUROC of every class after a task, from its saved adaptors."""
    settings, data, embeddings, bank, model = runs.load_run(folder)
    model.load_state_dict(retune.load_tensors(folder / f"task_{task}.safetensors")[0])
    rows = data.where("test")
    with torch.inference_mode():
        images = model.whitening(torch.from_numpy(np.array(embeddings[rows])))
        score = model.scores(images, bank, settings["score"])[0].numpy()
    return np.array([roc_auc_score(data.labels[rows, c], score[:, c]) for c in range(score.shape[1])])


@pytest.mark.slow
@pytest.mark.parametrize("method, whiten", [("retune", False), ("retune", True), ("linear", True)])
def test_row_from_the_raw_scores(results, method, whiten):
    found = runs.read_runs(results)
    for seed in (27, 28):
        row = runs.pick(found, scenario="class", method=method, whiten=whiten, seed=seed).iloc[0]
        grid = np.array([auroc_after(results / "runs" / row["run"], t) for t in range(1, 6)])
        assert row["last.auroc_macro"] == pytest.approx(grid[-1].mean(), abs=1e-9)
        forgotten = [grid[c:-1, c].max() - grid[-1, c] for c in range(4)]  # class c is learned in task c
        assert row["continual.forgetting"] == pytest.approx(np.mean(forgotten), abs=1e-9)


def test_resampled_rate_is_the_share_among_the_drawn():
    generator = np.random.default_rng(0)
    of = generator.random((50, 2)) < 0.5
    hit = generator.random((50, 2)) < 0.7
    patients = generator.integers(0, 20, 50).astype(str)
    found = decisions.resampled_rate(hit, of, patients)
    ids, patient = np.unique(patients, return_inverse=True)
    weight = retune.draw_patients(len(ids))[7][patient]
    expected = [np.average(hit[of[:, c], c], weights=weight[of[:, c]]) for c in (0, 1)]
    assert found[0] == pytest.approx([hit[of[:, c], c].mean() for c in (0, 1)])
    assert found[8] == pytest.approx(expected) and found.shape == (1001, 2)


@pytest.mark.slow
def test_paired_interval_is_that_of_the_differences(results):
    found = runs.read_runs(results)
    first, second = (runs.pick(found, scenario="joint", method=m) for m in ("retune", "linear"))
    difference, low, high = runs.lead(first, second)
    assert difference == pytest.approx(first[runs.LAST].mean() - second[runs.LAST].mean())
    samples = (np.stack(first["resampled"]).astype(float) - np.stack(second["resampled"])).mean(0)
    assert (low, high) == pytest.approx(np.percentile(samples, [2.5, 97.5]) * runs.STEP)
    assert low < difference < high
    assert runs.lead(second, first) == pytest.approx((-difference, -high, -low))


@pytest.mark.slow
def test_calibration_against_a_plain_loop(results):
    folder = results / "runs" / "retune-False" / "joint-27"
    _, data, embeddings, bank, model = runs.load_run(folder)
    rows = data.where("test")
    with torch.inference_mode():
        p = model.logits(torch.from_numpy(np.array(embeddings[rows])), bank).double().sigmoid().numpy()
    gaps = []
    for c, b in np.ndindex(p.shape[1], 15):
        inside = (p[:, c] >= b / 15) & (p[:, c] < (b + 1) / 15)
        if inside.any():
            gaps.append(inside.mean() * abs(p[inside, c].mean() - data.labels[rows][inside, c].mean()))
    measured = runs.score_facts(folder)["calibration"]["model"]
    assert measured["ece_before"] == pytest.approx(sum(gaps) / p.shape[1], abs=1e-6)
    assert measured["brier_before"] == pytest.approx(np.mean((p - data.labels[rows]) ** 2), abs=1e-6)


def test_temperature_finds_the_factor_that_was_taken_away():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 2)) * 2
    labels = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    labels[::7] = np.nan
    assert decisions.fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.05)
    assert decisions.reliability(logits * 3, labels, 3.0)["ece"] < 0.02
    assert decisions.reliability(logits * 3, labels, 1.0)["ece"] > 0.02


def test_zero_shot_is_its_own_last_stage(demo_arguments, tmp_path):
    assert retune.main([*demo_arguments, "--scenario", "zero", "--output", str(tmp_path / "run")]) == 0
    row = runs.collect(tmp_path).iloc[0]
    assert row["last.auroc_macro"] == row["zero.auroc_macro"] > 0


# ----------------------------------------------------------------------------------------------------- tables
@pytest.fixture
def small_tables(monkeypatch):
    """Tables without the scenarios of 10 and 20 parts, which the small runs lack."""
    few = {name: where for name, where in runs.SCENARIOS.items() if "0 parts" not in name}
    monkeypatch.setattr(tables, "SCENARIOS", few)


@pytest.mark.slow
def test_differences_and_their_verdict(results, small_tables):
    found = runs.read_runs(results)
    table = tables.differences_table(found)
    assert list(table.text["method"]) == ["best rival", "RE-tune", "RE-tune"]
    for scenario, where in tables.SCENARIOS.items():
        rivals = [runs.pick(found, **where, method="linear", whiten=w) for w in (False, True)]
        best = max(rivals, key=lambda r: r[runs.LAST].mean())
        assert table.text[scenario][0].endswith(f"{best[runs.LAST].mean():.3f}")
        for _, row in table.text.iloc[1:].iterrows():
            ours = runs.pick(found, **where, whiten=row["whitened"] == "yes")
            values = runs.lead(ours, best)
            text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)
            excludes = values[1] > 0 or values[2] < 0
            assert row[scenario] == (f"**{text}**" if excludes else text)
            place = "ahead of" if values[1] > 0 else "behind" if values[2] < 0 else "level with"
            name = "RE-tune, whitened:" if row["whitened"] == "yes" else "RE-tune:"
            note = next(note for note in table.notes if note.startswith(name))
            assert scenario in next(part for part in note.split("; ") if place in part)


def test_bold_only_where_the_lead_excludes_zero():
    def made(level: float, width: float = 0.0003) -> pd.DataFrame:
        resampled = np.array([level - width, level + width]) / runs.STEP
        return pd.DataFrame({runs.LAST: [level], "resampled": [resampled]})

    wanted = [{"scenario": "a"}] * 2 + [{"scenario": "b"}] * 2 + [{"scenario": "b", "method": runs.BOUND}]
    high, low = made(0.9), made(0.8)
    assert tables.leaders([low, high, made(0.81, 0.1), low, high], wanted) == {1}


@pytest.mark.slow
def test_formats_agree(results, small_tables):
    found = runs.read_runs(results)
    for name in ("main", "methods", "cost", "differences"):
        texts = tables.render(name, found)
        shown = read_markdown(texts[".md"])
        pd.testing.assert_frame_equal(shown, pd.read_csv(io.StringIO(texts[".csv"]), dtype=str).fillna(""))
        body = texts[".tex"].split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
        plain = re.sub(r"\\textbf\{(.+?)\}", r"\1", body.replace(r"$\pm$", "±").replace(r"\%", "%"))
        latex = [line.removesuffix(r"\\").split("&") for line in plain.strip().splitlines()]
        assert [[cell.strip() for cell in line] for line in latex] == shown.values.tolist()
        for word in ("Data: demo", "Encoder: tiny", "Classes: Atelectasis", "Seeds: 27, 28"):
            assert word in texts[".md"] and word in texts[".tex"]


@pytest.mark.slow
def test_a_missing_run_is_named(results, tmp_path, capsys):
    shutil.copytree(results / "runs", tmp_path / "runs")
    assert retune.main([str(tmp_path), "--only", "main"], tables.make_tables) == 2
    assert "scenario data, parts 10: runs of seeds []" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs" / "linear-True" / "label-28")
    assert retune.main([str(tmp_path), "--only", "methods"], tables.make_tables) == 2
    assert "scenario label: runs of seeds [27]" in capsys.readouterr().err
    assert retune.main([str(tmp_path / "nothing")], tables.make_tables) == 2


@pytest.mark.slow
def test_runs_of_two_data_sets_are_refused(results, tmp_path):
    for name in ("joint-27", "class-27"):
        shutil.copytree(results / "runs" / "retune-False" / name, tmp_path / name)
    metrics = json.loads((tmp_path / "joint-27" / "metrics.json").read_text())
    metrics["config"]["data_fingerprint"] = "other"
    (tmp_path / "joint-27" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="differ in data_fingerprint"):
        runs.collect(tmp_path)


@pytest.mark.slow
def test_figures_are_not_blank(results, tmp_path):
    (tmp_path / "runs").symlink_to(results / "runs")
    figures.draw_figures(runs.read_runs(results), tmp_path)
    names = [f"{kind}-{s}.png" for kind in ("auroc", "f1") for s in ("class", "label", "data")]
    for name in [*names, "auroc-over-tasks.png", "tsne.png", "prompts.png"]:
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert pixels.std() > 10 and min(pixels.shape) > 200, name


# ------------------------------------------------------------------------------------------ committed results
@pytest.mark.parametrize("folder", sorted(COMMITTED.parent.iterdir()), ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_the_committed_runs(folder):
    found = runs.read_runs(folder)
    names = [name for name in tables.TABLES if (folder / f"{name}.md").exists()]
    assert len(names) == (len(tables.TABLES) if folder == COMMITTED else 4)
    for name in names:
        for suffix, text in tables.render(name, found).items():
            assert (folder / f"{name}{suffix}").read_text(encoding="utf-8") == text


def committed_runs(scenario: str) -> pd.DataFrame:
    """The committed runs in a scenario, of models as the paper has them."""
    found = pd.read_csv(COMMITTED / "runs.csv", keep_default_na=False, na_values={"continual.forgetting": ""})
    published = {"adaptor": "mlp", "adapt": "both", "pool": "mean", "negatives": True, "score": "diff",
                 "wording": "specific", "logit_scale": 1, "order": ""}  # fmt: skip
    published |= runs.SCENARIOS[scenario]
    return found[(found[list(published)] == pd.Series(published)).all(axis=1)]


def test_committed_cells_of_main_by_plain_arithmetic():
    keys = ("auroc_macro", "auroc_weighted", "f1_macro", "f1_weighted", "precision_weighted",
            "recall_weighted", "accuracy", "ap_macro")  # fmt: skip
    for scenario, *cells in read_table("main").values:
        found = committed_runs("joint" if scenario == "zero-shot" else scenario)
        found = found[(found["method"] == "retune") & ~found["whiten"]]
        stage = "zero" if scenario == "zero-shot" else "last"
        assert cells == [mean_and_deviation(found[f"{stage}.{key}"]) for key in keys]


def test_committed_cells_of_methods_by_plain_arithmetic():
    metrics = {"AUROC": "last.auroc_macro", "forgetting": "continual.forgetting",
               "forward transfer": "continual.forward_transfer"}  # fmt: skip
    table = read_table("methods").set_index(["method", "whitened"])
    variants = runs.variants(runs.read_runs(COMMITTED))
    assert sorted(table.index) == sorted(map(runs.labels_of, variants))
    for column in table.columns[:-2]:
        kind = next(kind for kind in metrics if column.startswith(f"{kind} "))
        found = committed_runs(column.removeprefix(f"{kind} ")).groupby(["method", "set", "whiten"])
        for variant in variants:
            values = found.get_group(tuple(variant.values()))[metrics[kind]]
            cell = table.loc[runs.labels_of(variant), column]
            assert cell == mean_and_deviation(pd.to_numeric(values)), (variant, column)


def test_orders_has_the_six_best_methods():
    both = (read_table(name)[["method", "whitened"]] for name in ("summary", "orders"))
    summary, orders = (table.agg(tuple, axis=1) for table in both)
    assert set(summary[:6]) <= set(orders) and ("RE-tune", "no") in set(orders)


def test_commands_name_commit_and_seeds():
    lines = (COMMITTED / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\S+Z commit [0-9a-f]{40}.*: python -m ", line) for line in lines)
    assert sum("--seed 27 28 29" in line for line in lines) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "analytic", "set": ("features=1000",)}])
def test_a_run_of_today_gives_the_committed_value(options, tmp_path):
    """From the images on; processors round differently, hence the tolerance."""
    folders = {"cache_dir": str(tmp_path / "cache"), "output": str(tmp_path / "runs" / "one")}
    retune.run(retune.Config(scenario="class", figures=False, **options, **folders))
    today = runs.collect(tmp_path / "runs").iloc[0]
    same = {"method": today["method"], "set": today["set"], "scenario": "class", "seed": 27}
    committed = runs.pick(runs.read_runs(COMMITTED), **same).iloc[0]
    for metric in ("zero.auroc_macro", "last.auroc_macro", "last.ap_macro", "continual.forgetting"):
        assert today[metric] == pytest.approx(committed[metric], abs=0.03), metric


# --------------------------------------------------------------------------------------- script and benchmark
@pytest.fixture
def script(tmp_path):
    """Run the script with a stand-in for python that notes its arguments and fails if FAIL is among them."""
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
        command = ["bash", str(ROOT / "run_experiments.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_script_runs_everything_once_and_then_nothing(script, tmp_path):
    settings = {"SEEDS": "1 2", "DATA": "chexpert", "DATA_DIR": "/x y", "ENCODER": "biovil"}
    done, calls = script(**settings)
    assert done.returncode == 0, done.stderr
    sweeps = [call for call in calls if call.startswith("-m experiments.sweep")]
    assert all("--data chexpert --data-dir /x y --encoder biovil" in c and "--seed 1 2" in c for c in sweeps)
    assert calls[-1].startswith("-m experiments.tables") and "chexpert-biovil" in calls[-1]
    assert [call.split()[1:3] for call in calls[-3:-1]] == [["adaptor", "grid"], ["cleft", "tables"]]
    for option in ("parts=10,20", "l3a whiten=no,yes", "adapt=both,shared", "pool=single,max",
                   "negatives=yes", "wording=generic", "score=pos", "class-order=random",
                   "set=features=1000", "whiten=yes"):  # fmt: skip
        assert any(option in call for call in sweeps), option
    record = (tmp_path / "out" / "chexpert-biovil" / "commands.txt").read_text()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"commit {head.stdout.strip()}" in record and "--seed 1 2" in record
    done, calls = script(**settings)
    assert done.returncode == 0 and calls == [] and "nothing to do" in done.stdout


def test_every_sweep_of_the_script_parses(script):
    _, calls = script()
    for call in (call for call in calls if call.startswith("-m experiments.sweep")):
        grid, _, rest = call.removeprefix("-m experiments.sweep --grid ").partition(" -- ")
        grid = re.split(r" (?=[a-z-]+=)(?!shared=)", grid)  # the values of set stay together
        assert sweep.make_configs(grid, rest.split())


def test_script_stops_at_the_first_error_and_resumes(script, tmp_path):
    done, calls = script(FAIL="wording=generic")
    assert done.returncode != 0 and "failed: python -m experiments.sweep" in done.stderr
    assert "wording=generic" in calls[-1]
    done, calls = script()
    assert done.returncode == 0 and "wording=generic" in calls[0]
    done, calls = script(FAIL="experiments.tables", ONLY="forgetting", OUT=str(tmp_path / "other"))
    assert done.returncode != 0 and "failed: python -m experiments.tables" in done.stderr
    assert len(calls) == 4 and calls[-1].endswith("--only forgetting")


@pytest.mark.slow
def test_benchmark_prints_a_row():
    command = [sys.executable, "-m", "experiments.benchmark", "--only", "training", "--repeats", "1"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = read_markdown(table)
    assert rows["what"].str.startswith("training").sum() == 2 and (rows["ratio"].astype(float) > 0).all()
