"""Every method on a small set of real X-rays: five folds by patient, paired intervals, two checks of confounding (ours).

    python -m experiments.folds NIH_DIR folds --results experiments/results/nih-tiny
    python -m experiments.folds NIH_DIR folds --grids "method=retune,lwf whiten=no,yes" --scenarios class joint

NIH_DIR is in the layout of ChestX-ray14. Each image is tested once, by a model that saw no image of its patient; the
five tables of paths and labels (`folds/fold_<k>.csv`) differ in the column `split` alone, so that the images are embedded
once. Fold k runs with seed 27 + k, through `experiments.sweep`; finished runs are skipped.

Scores of different models must not be ranked together, so a result is the mean of the folds' macro AUROCs. Its
interval comes from 1,000 resamples of the patients of all folds. Every method shares them, so differences are paired.
A score may follow the view instead of the finding: X-rays at the bedside (AP) are of sicker patients. So the view is
also scored as if it were a model, and the methods within each view.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from experiments.runs import (
    BOUND,
    LAST,
    OURS,
    SCENARIOS,
    full_name,
    labels_of,
    pick,
    run_row,
    variants,
    write_runs,
)
from experiments.scores import STEP, load_run, resampled_auroc
from experiments.sweep import sweep

GRIDS = (
    "method=retune,linear,mlp,ewc,lwf,replay,joint,ncm,slda,ranpac,l3a whiten=no,yes",
    "method=ranpac whiten=no,yes set=zero_shot=1",
    "method=distil,analytic",
    *(f"method=analytic set={option}" for option in ("related=1", "features=1000", "features=0")),
)
ARRIVALS = {"class": "scenario=class", "label": "scenario=label", "data": "scenario=data", "joint": "scenario=joint",
            "more": "scenario=data parts=10,20"}  # fmt: skip
CLOSED = [{"method": "analytic", "set": option, "whiten": False} for option in ("related=1", "")]
RIVALS = [{"method": method, "set": "", "whiten": True} for method in ("lwf", "ewc")]
RETUNE = {"method": "retune", "set": "", "whiten": False}


def write_folds(data_dir: str, output: Path, findings: int = 5) -> list[Path]:
    """Write the five tables, with the findings that have the most positives; return their paths.

    A fold tests a fifth of the patients and validates on a tenth, which the next fold tests.
    """
    data = retune.load_radiographs(retune.Config(data="nih", data_dir=data_dir))
    chosen = np.sort(np.argsort(-data.labels.sum(0), kind="stable")[:findings])
    columns = {"path": [os.path.relpath(image, data_dir) for image in data.images], "patient": data.patients}
    columns |= {"view": data.view, "sex": data.sex, "age": data.age}
    columns |= {data.class_names[c]: data.labels[:, c].astype(int) for c in chosen}
    ids, patient = np.unique(data.patients, return_inverse=True)
    tenth = np.random.default_rng(0).permutation(len(ids))[patient] % 10
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"fold_{k}.csv" for k in range(5)]
    for k, path in enumerate(paths):
        split = np.where(tenth // 2 == k, "test", np.where(tenth == (2 * k + 2) % 10, "val", "train"))
        retune.write_text(path, pd.DataFrame(columns | {"split": split}).to_csv(index=False))
    return paths


def run_folds(paths: Sequence[Path], folder: Path, grids, scenarios, shared: Sequence[str]) -> None:
    """Run the grids of methods in the scenarios on every fold, into folder/runs."""
    for k, path in enumerate(paths):
        for grid in grids:
            place = folder / "runs" / grid.partition("set=")[2] / "{method}-{whiten}/{scenario}-{parts}-seed{seed}"
            options = ["--labels-csv", str(path), "--seed", str(27 + k), "--output", str(place), *shared]
            for arrival in scenarios:
                sweep(["--grid", *ARRIVALS[arrival].split(), *grid.split(), "--", *options])


def fold_auroc(run: Path, view: str = "all", zero_shot: bool = False) -> np.ndarray:
    """[1 + R]: macro AUROC on a run's test images, all or those of a view; then on resamples of all folds' patients."""
    _, data, embeddings, bank, model = load_run(run)
    model = retune.RETune(embeddings.shape[1], adapt="none") if zero_shot else model
    scores, decisions = retune.score_rows(model, bank, embeddings, np.arange(len(data.labels)), "diff")
    tested = (data.split == "test") & ((np.array(data.view) == view) | (view == "all"))
    labels = np.where(tested[:, None], data.labels, np.nan)
    point = retune.evaluate(scores, decisions, labels)["auroc_macro"]
    return np.array([point, *resampled_auroc(scores, labels, data.patients)])


def collect_folds(folder: Path) -> pd.DataFrame:
    """`runs.run_row` of every run below a folder, with the resamples that all folds share; sorted by fold."""
    paths = sorted(folder.rglob("metrics.json"), key=lambda path: (path.parent.name.rpartition("seed")[2], path))
    rows = []
    for path in retune.progress(paths, desc="runs"):
        resampled = np.round(fold_auroc(path.parent)[1:] / STEP).astype(np.uint16)
        rows.append(run_row(path, folder) | {"resampled": resampled})
    return pd.DataFrame(rows)


def scenarios(runs: pd.DataFrame) -> dict[str, dict]:
    """Those of `runs.SCENARIOS` that were run."""
    return {name: where for name, where in SCENARIOS.items() if len(pick(runs, **where))}


def cell(values: np.ndarray, sign: str = "") -> str:
    """A value and its 95% interval, of the value [1 + R] itself and on resamples; bold: a difference that excludes zero."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    text = f"{values[0]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
    return f"**{text}**" if sign and (low > 0 or high < 0) else text


def mean_auroc(runs: pd.DataFrame) -> np.ndarray:
    """[1 + R]: mean over the runs, one a fold."""
    return np.array([runs[LAST].mean(), *np.stack(runs["resampled"]).mean(0) * STEP])


def auroc_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per method, by class-incremental AUROC; forgetting and forward transfer are means over the folds."""
    found = scenarios(runs)
    zero = format(pick(runs, **next(iter(found.values())))["zero.auroc_macro"].mean(), ".3f")
    rows = [{"method": "zero-shot", "whitened": "no"} | dict.fromkeys(found, zero)]
    for variant in variants(runs):
        row = dict(zip(("method", "whitened"), labels_of(variant)))
        chosen = {name: pick(runs, **variant | where) for name, where in found.items()}
        row |= {name: cell(mean_auroc(part)) for name, part in chosen.items()}
        for measure, names in (("forgetting", list(SCENARIOS)[:3]), ("forward_transfer", list(SCENARIOS)[:2])):
            for name in (name for name in names if name in found):
                row[f"{measure.replace('_', ' ')}, {name}"] = f"{chosen[name][f'continual.{measure}'].mean():.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def difference_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The closed form minus whitened LwF, whitened EWC and the best rival of the scenario; then whitened minus not."""
    opponents = [v for v in variants(runs) if v["method"] not in (*OURS, BOUND)]
    pairs = [(ours, rival) for ours in CLOSED for rival in (*RIVALS, None)]
    pairs += [(v, v | {"whiten": False}) for v in variants(runs) if v["whiten"]]
    rows = []
    for first, second in pairs:
        row = {"method": full_name(first), "minus": full_name(second) if second else "best rival, chosen on test"}
        for name, where in scenarios(runs).items():
            best = max(opponents, key=lambda v: pick(runs, **v | where)[LAST].mean())
            other = mean_auroc(pick(runs, **(second or best) | where))
            row[name] = cell(mean_auroc(pick(runs, **first | where)) - other, "+")
            row[name] += "" if second else f" {full_name(best)}"
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(differences: pd.DataFrame) -> list[str]:
    """What the intervals of the differences say, a sentence a row."""
    notes = []
    for row in differences.to_dict("records"):
        place: dict[str, list] = {"ahead": [], "level": [], "behind": []}
        for name in list(row)[2:]:
            place["ahead" if row[name][:3] == "**+" else "behind" if row[name][:3] == "**-" else "level"].append(name)
        parts = [f"{word} in {', '.join(names)}" for word, names in place.items() if names]
        notes.append(f"{row['method']}, against {row['minus']}: {'; '.join(parts)}.")
    return notes


def view_alone(data: retune.Radiographs) -> pd.DataFrame:
    """Per finding the AUROC of the view as a score: 1 for AP, 0 for PA; below 0.5 the finding is commoner in PA."""
    scores = np.repeat((np.array(data.view) == "AP")[:, None], len(data.class_names), 1).astype(float)
    rows = []
    for name, chosen in [*((name, [c]) for c, name in enumerate(data.class_names)), ("mean", slice(None))]:
        point = retune.evaluate(scores[:, chosen], scores[:, chosen], data.labels[:, chosen])["auroc_macro"]
        resampled = resampled_auroc(scores[:, chosen], data.labels[:, chosen], data.patients)
        positives = int(data.labels[:, chosen].sum())
        rows.append({"finding": name, "positives": positives, "AUROC of the view": cell(np.array([point, *resampled]))})
    return pd.DataFrame(rows)


def within_views(runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """AUROC in all images, and in those of one view alone, of zero-shot and the main methods; mean over the folds."""
    models = [("zero-shot", scenario, RETUNE) for scenario in list(scenarios(runs))[:1]]
    models += [(full_name(v), scenario, v) for v in (RETUNE, *RIVALS, *CLOSED) for scenario in scenarios(runs)]
    rows = []
    for name, scenario, variant in models:
        chosen = [folder / run for run in pick(runs, **variant | SCENARIOS[scenario])["run"]]
        row = {"method": name, "scenario": "any" if name == "zero-shot" else scenario}
        for view in ("all", "AP", "PA"):
            values = [fold_auroc(run, view, name == "zero-shot") for run in chosen]
            row[view] = cell(np.nanmean(values, axis=0))
        rows.append(row)
    return pd.DataFrame(rows)


def folds(argv: Sequence[str]) -> None:
    """Make the folds, run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="folder in the layout of ChestX-ray14")
    parser.add_argument("output", type=Path, help="folder of tables, runs and cache; holds patients' labels")
    parser.add_argument("--results", type=Path, required=True, help="folder of the tables; nothing of a patient")
    parser.add_argument("--grids", nargs="+", default=GRIDS, help="methods, as experiments.sweep takes them")
    parser.add_argument("--scenarios", nargs="+", choices=ARRIVALS, default=tuple(ARRIVALS))
    parser.add_argument("shared", nargs="*", help="options of retune.py for all runs, after --")
    arguments = parser.parse_args(argv)
    paths = write_folds(arguments.data_dir, arguments.output)
    shared = ["--data", "csv", "--data-dir", arguments.data_dir, "--no-figures", *arguments.shared]
    run_folds(paths, arguments.output, arguments.grids, arguments.scenarios, shared)
    runs = collect_folds(arguments.output / "runs")
    write_runs(runs, arguments.results)
    data = retune.load_radiographs(retune.Config(data="csv", data_dir=arguments.data_dir, labels_csv=str(paths[0])))
    differences = difference_table(runs)
    tables = {
        "methods": ("Macro AUROC after the last task, mean of five folds by patient, 95% interval over patients; "
                    "forgetting and forward transfer are means over the folds.", auroc_table(runs), []),
        "differences": ("Differences of macro AUROC with paired 95% intervals over patients; bold where they exclude 0.",
                        differences, verdicts(differences)),
        "view": ("AUROC of the view alone as a score (AP 1, PA 0), 95% interval over patients; below 0.5 a finding "
                 "is commoner in PA.", view_alone(data), []),
        "within-view": ("Macro AUROC in all images, and in those of one view.",
                        within_views(runs, arguments.output / "runs"), []),
    }  # fmt: skip
    facts = f"{len(data.labels)} images of {len(set(data.patients))} patients, encoder {runs['encoder'][0]}"
    for name, (title, table, notes) in tables.items():
        body = retune.markdown_table(list(table), table.fillna("").values.tolist())
        text = "\n\n".join([f"**{title}** Real X-rays ({facts}); no benchmark, nothing clinical.", body, *notes])
        retune.write_text(arguments.results / f"{name}.md", f"{text}\n")
        retune.write_text(arguments.results / f"{name}.csv", table.map(lambda t: str(t).strip("*")).to_csv(index=False))
        print(f"{text}\n")


if __name__ == "__main__":
    sys.exit(retune.main(action=folds))
