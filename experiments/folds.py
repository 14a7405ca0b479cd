"""Every method on a small set of real X-rays: five folds by patient, and two checks of confounding (ours).

    python -m experiments.folds --data-dir NIH --folds /tmp/folds --results experiments/results/nih-tiny
    python -m experiments.folds --data-dir NIH --folds /tmp/pair --results /tmp/pair/tables \
        --scenarios class joint --grids "method=retune,lwf whiten=no,yes" -- --encoder pair

NIH is a folder in the layout of ChestX-ray14. Every image is tested once, by a model that saw no image of its patient. The
five tables of images and labels, fold_0.csv to fold_4.csv, differ in the column `split` alone, so that each image is
embedded once. Fold k has the seed 27 + k; `experiments.sweep` runs it, finished runs are skipped, and
`experiments.tables` makes the tables. A result is the mean of the folds' macro AUROCs, since scores of different models
cannot be ranked together. All methods share 1,000 resamples of the patients of all folds: differences are paired.

A score may follow the view instead of the finding, since bedside X-rays (AP) are of sicker patients. So the view alone is
scored as if it were a model, and the main methods are scored within each view.
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
from experiments.runs import OPPONENTS, REFERENCE, full_name, pick, run_row, scenarios, write_runs
from experiments.scores import STEP, load_run, resampled_auroc
from experiments.sweep import sweep
from experiments.tables import make_tables

GRIDS = (
    "method=retune,linear,mlp,ewc,lwf,replay,joint,ncm,slda,ranpac,l3a whiten=no,yes",
    "method=ranpac whiten=no,yes set=zero_shot=1",
    "method=distil,analytic",
    *(f"method=analytic set={option}" for option in ("related=1", "features=1000", "features=0")),
)
ARRIVALS = {"class": "scenario=class", "label": "scenario=label", "joint": "scenario=joint"}
ARRIVALS |= {f"data-{parts}": f"scenario=data parts={parts}" for parts in (5, 10, 20)}
RETUNE = {key: REFERENCE[key] for key in ("method", "set", "whiten")}
CLOSED_FORM = [RETUNE | {"method": "analytic", "set": option} for option in ("", "related=1")]


def write_folds(data_dir: str, folder: Path, findings: int = 5) -> list[Path]:
    """Write fold_<k>.csv with the findings that have the most positives; return the paths.

    A fold tests a fifth of the patients and validates on half of those that the next fold tests.
    """
    data = retune.load_radiographs(retune.Config(data="nih", data_dir=data_dir))
    chosen = np.sort(np.argsort(-data.labels.sum(0), kind="stable")[:findings])
    columns = {"path": [os.path.relpath(image, data_dir) for image in data.images], "patient": data.patients}
    columns |= {"view": data.view, "sex": data.sex, "age": data.age}
    columns |= {data.class_names[c]: data.labels[:, c].astype(int) for c in chosen}
    ids, patient = np.unique(data.patients, return_inverse=True)
    tenth = np.random.default_rng(0).permutation(len(ids))[patient] % 10
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"fold_{k}.csv" for k in range(5)]
    for k, path in enumerate(paths):
        split = np.where(tenth // 2 == k, "test", np.where(tenth == (2 * k + 2) % 10, "val", "train"))
        retune.write_text(path, pd.DataFrame(columns | {"split": split}).to_csv(index=False))
    return paths


def fold_auroc(run: Path, view: str = "all", zero_shot: bool = False) -> np.ndarray:
    """[1 + R]: macro AUROC on a run's test images (of one view), then on resamples of the patients of all folds."""
    _, data, embeddings, bank, model = load_run(run)
    model = retune.RETune(embeddings.shape[1], adapt="none") if zero_shot else model
    scores, decisions = retune.score_rows(model, bank, embeddings, np.arange(len(data.labels)), "diff")
    tested = (data.split == "test") & ((np.array(data.view) == view) | (view == "all"))
    labels = np.where(tested[:, None], data.labels, np.nan)
    point = retune.evaluate(scores, decisions, labels)["auroc_macro"]
    return np.array([point, *resampled_auroc(scores, labels, data.patients)])


def collect_folds(folder: Path) -> pd.DataFrame:
    """`runs.run_row` of every run below a folder, with the resamples that all folds share; fold by fold."""
    rows = []
    paths = sorted(folder.rglob("metrics.json"), key=lambda path: (path.parent.name[-2:], path))
    for path in retune.progress(paths, desc="runs"):
        resampled = np.round(fold_auroc(path.parent)[1:] / STEP).astype(np.uint16)
        rows.append(run_row(path, folder) | {"resampled": resampled})
    return pd.DataFrame(rows)


def cell(values: np.ndarray) -> str:
    """A value and its 95% interval, of the value and its resamples [1 + R]."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(values[0], *np.nanpercentile(values[1:], [2.5, 97.5]))


def view_alone(data: retune.Radiographs) -> list[list[str]]:
    """Rows (finding, AUROC) of the view as a score: 1 for AP, else 0; below 0.5 a finding is rarer in AP."""
    scores = np.repeat((np.array(data.view) == "AP")[:, None], len(data.class_names), axis=1).astype(float)
    rows = []
    for name, c in [*zip(data.class_names, np.eye(len(data.class_names), dtype=bool)), ("mean", slice(None))]:
        point = retune.evaluate(scores[:, c], scores[:, c], data.labels[:, c])["auroc_macro"]
        rows.append(
            [name, cell(np.array([point, *resampled_auroc(scores[:, c], data.labels[:, c], data.patients)]))]
        )
    return rows


def within_views(runs: pd.DataFrame, folder: Path) -> list[list[str]]:
    """Rows (method, scenario, AUROC in all images, in AP, in PA) of zero-shot and the main methods."""
    found = scenarios(runs)
    models = [("zero-shot", next(iter(found)), RETUNE)]
    models += [(full_name(v), name, v) for v in (RETUNE, *OPPONENTS, *CLOSED_FORM) for name in found]
    rows = []
    for name, scenario, variant in models:
        chosen = [folder / run for run in pick(runs, **variant | found[scenario])["run"]]
        auroc = {
            view: [fold_auroc(run, view, name == "zero-shot") for run in chosen]
            for view in ("all", "AP", "PA")
        }
        cells = [cell(np.nanmean(values, axis=0)) for values in auroc.values() if values]
        rows.append([name, "-" if name == "zero-shot" else scenario, *cells])
    return [row for row in rows if len(row) == 5]


def folds(argv: Sequence[str]) -> None:
    """Make the folds, run what is missing, write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True, help="folder in the layout of ChestX-ray14")
    parser.add_argument(
        "--folds", type=Path, required=True, help="folder of patients' labels, and of runs: keep it private"
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of the tables, which hold nothing of a patient"
    )
    parser.add_argument("--grids", nargs="+", default=GRIDS, help="methods, as experiments.sweep takes them")
    parser.add_argument("--scenarios", nargs="+", choices=ARRIVALS, default=tuple(ARRIVALS))
    parser.add_argument("shared", nargs="*", help="options of retune.py for all runs, after --")
    arguments = parser.parse_args(argv)
    paths = write_folds(arguments.data_dir, arguments.folds)
    shared = ["--data", "csv", "--data-dir", arguments.data_dir, "--no-figures"]
    shared += ["--cache-dir", str(arguments.folds / "cache"), *arguments.shared]
    folder = arguments.folds / "runs"
    for k, path in enumerate(paths):
        for grid in arguments.grids:
            place = folder / grid.partition("set=")[2] / "{method}-{whiten}/{scenario}-{parts}-seed{seed}"
            options = [*shared, "--labels-csv", str(path), "--seed", str(27 + k), "--output", str(place)]
            for name in arguments.scenarios:
                sweep(["--grid", *ARRIVALS[name].split(), *grid.split(), "--", *options])
    runs = collect_folds(folder).assign(data=f"five folds of {Path(arguments.data_dir).name}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_runs(runs, arguments.results)
    make_tables([str(arguments.results), "--only", "intervals", "methods", "rivals", "differences"])
    data = retune.load_radiographs(
        retune.Config(data="csv", data_dir=arguments.data_dir, labels_csv=str(paths[0]))
    )
    tables = {
        "view": (["finding", "AUROC of the view (AP 1, PA 0)"], view_alone(data)),
        "within-view": (["method", "scenario", "all images", "AP", "PA"], within_views(runs, folder)),
    }
    for name, (header, rows) in tables.items():
        retune.write_text(arguments.results / f"{name}.md", retune.markdown_table(header, rows) + "\n")
        retune.write_text(
            arguments.results / f"{name}.csv", pd.DataFrame(rows, columns=header).to_csv(index=False)
        )
        print(retune.markdown_table(header, rows))


if __name__ == "__main__":
    sys.exit(retune.main(action=folds))
