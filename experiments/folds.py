"""Every method on a small set of real X-rays: five folds by patient, and two checks of confounding (ours).

    python -m experiments.folds --data-dir NIH --folds private --results experiments/results/nih-tiny
    python -m experiments.folds --data-dir NIH --folds private-pair --results tables \
        --scenarios class joint --grids "method=retune,lwf whiten=no,yes" -- --encoder pair

NIH is a folder in the layout of ChestX-ray14. Every image is tested once, by a model that saw no image of
its patient. The five tables of images and labels, fold_0.csv to fold_4.csv, differ in the column `split`
alone, so that an image is embedded once. Fold k has the seed 27 + k; `experiments.sweep` runs it, finished
runs are skipped, and `experiments.tables` makes the tables. A result is the mean of the folds' macro AUROCs,
since scores of different models cannot be ranked together. All methods share 1,000 resamples of all
patients.

A score may follow the view instead of the finding, since bedside X-rays (AP) are of sicker patients. So the
view alone is scored as if it were a model, and the main methods are scored within each view.
"""

import os
import shlex
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from experiments.runs import OPPONENTS, STEP, full_name, load_run, pick, run_row, scenarios, write_runs
from experiments.sweep import sweep
from experiments.tables import make_tables

GRIDS = (  # random features: 1,000 are more than a fold's images, and 2,000 take eight times as long
    "method=retune,linear,mlp,ewc,lwf,replay,joint,ncm,slda whiten=no,yes",
    "method=l3a whiten=no,yes set=features=1000",
    "method=ranpac whiten=no,yes 'set=features=1000 zero_shot=1'",
    "method=distil,analytic",
    *(f"method=analytic set={option}" for option in ("related=1", "features=1000", "features=0")),
)
ARRIVALS = {"class": "scenario=class", "label": "scenario=label", "joint": "scenario=joint"}
ARRIVALS |= {f"data-{parts}": f"scenario=data parts={parts}" for parts in (5, 10, 20)}
RETUNE = {"method": "retune", "set": "", "whiten": False}
CLOSED_FORM = [RETUNE | {"method": "analytic", "set": option} for option in ("", "related=1")]


def write_folds(data_dir: str, folder: Path) -> list[Path]:
    """Write fold_<k>.csv with the five findings that have the most positives; return the paths.

    A fold tests a fifth of the patients and validates on half of those that the next fold tests. The division
    is the first random one in which every finding is tested in every fold.
    """
    data = retune.load_radiographs(retune.Config(data="nih", data_dir=data_dir))
    chosen = np.sort(np.argsort(-data.labels.sum(0), kind="stable")[:5])
    positive = data.labels[:, chosen] == 1
    columns = {"path": [os.path.relpath(image, data_dir) for image in data.images], "patient": data.patients}
    columns |= {"view": data.view, "sex": data.sex, "age": data.age}
    columns |= {data.class_names[c]: labels.astype(int) for c, labels in zip(chosen, positive.T)}
    ids, patient = np.unique(data.patients, return_inverse=True)
    divisions = (np.random.default_rng(seed).permutation(len(ids))[patient] % 10 for seed in range(1000))
    tested = (tenth for tenth in divisions if all(positive[tenth // 2 == k].any(0).all() for k in range(5)))
    tenth = next(tested, None)
    if tenth is None:
        raise retune.InputError(f"{data_dir}: a finding of its 5 commonest has too few patients for 5 folds")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"fold_{k}.csv" for k in range(5)]
    for k, path in enumerate(paths):
        split = np.where(tenth // 2 == k, "test", np.where(tenth == (2 * k + 2) % 10, "val", "train"))
        retune.write_text(path, pd.DataFrame(columns | {"split": split}).to_csv(index=False))
    return paths


def tested_auroc(scores: np.ndarray, data: retune.Radiographs, view: str = "all", columns=slice(None)):
    """[1 + R]: macro AUROC of scores [N, C] on the test images (of a view); then on resamples."""
    tested = (data.split == "test") & ((np.array(data.view) == view) | (view == "all"))
    labels = np.where(tested[:, None], data.labels, np.nan)[:, columns]
    point = retune.evaluate(scores[:, columns], labels > 0, labels)["auroc_macro"]
    return np.array([point, *retune.bootstrap_auroc(scores[:, columns], labels, data.patients)])


def run_auroc(run: Path, zero_shot: bool = False) -> dict[str, np.ndarray]:
    """`tested_auroc` in all images and within each view, of a run's model or of the zero-shot model."""
    settings, data, embeddings, bank, model = load_run(run)
    model = retune.RETune(embeddings.shape[1], adapt="none") if zero_shot else model
    scores, _ = retune.score_rows(model, bank, embeddings, np.arange(len(data.labels)), settings["score"])
    return {view: tested_auroc(scores, data, view) for view in ("all", "AP", "PA")}


def cell(folds: Sequence[np.ndarray]) -> str:
    """The mean over folds [1 + R] each, with its 95% interval."""
    mean = np.nanmean(folds, axis=0)
    return "{:.3f} [{:.3f}, {:.3f}]".format(mean[0], *np.nanpercentile(mean[1:], [2.5, 97.5]))


def view_table(folds: Sequence[retune.Radiographs]) -> pd.DataFrame:
    """AUROC of the view alone: AP before PA (below 0.5: rarer in AP), and a finding's share in training."""
    columns = {name: [c] for c, name in enumerate(folds[0].class_names)} | {"mean": slice(None)}
    auroc = {"AP before PA": [], "share in training": []}  # by fold and finding
    for data in folds:
        ap = np.tile((np.array(data.view) == "AP")[:, None], len(data.class_names))  # [N, C]
        train = data.split == "train"
        shares = [data.labels[train & (ap[:, 0] == value)].mean(0) for value in (True, False)]
        for found, scores in zip(auroc.values(), (ap.astype(float), np.where(ap, *shares))):
            found.append([tested_auroc(scores, data, columns=chosen) for chosen in columns.values()])
    cells = {way: [cell(of_folds) for of_folds in zip(*found)] for way, found in auroc.items()}
    return pd.DataFrame({"finding": list(columns)} | cells)


def within_view_table(runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """AUROC in all test images, in those of view AP and of view PA, of zero-shot and the main methods."""
    found = scenarios(runs)
    first = pick(runs, **next(iter(found.values())))["run"]
    parts = {("zero-shot", "-"): [run_auroc(folder / run, zero_shot=True) for run in first]}
    for variant in (RETUNE, *OPPONENTS, *CLOSED_FORM):
        for scenario, where in found.items():
            parts[full_name(variant), scenario] = pick(runs, **variant | where)["auroc"]
    rows = []
    for (method, scenario), part in parts.items():
        cells = {view: cell([auroc[view] for auroc in part]) for view in ("all", "AP", "PA") if len(part)}
        rows.append({"method": method, "scenario": scenario} | cells)
    return pd.DataFrame(rows).dropna()


def folds(argv: Sequence[str]) -> None:
    """Make the folds, run what is missing, write the tables."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder in the layout of ChestX-ray14")
    parser.add_argument("--folds", type=Path, required=True, help="private: patients' labels, runs, cache")
    parser.add_argument("--results", type=Path, required=True, help="tables; nothing of a patient")
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
            items = shlex.split(grid)
            option = "".join(item[4:] for item in items if item.startswith("set="))
            place = folder / option / "{method}-{whiten}/{scenario}-{parts}-seed{seed}"
            options = [*shared, "--labels-csv", str(path), "--seed", str(27 + k), "--output", str(place)]
            for name in arguments.scenarios:
                sweep(["--grid", *ARRIVALS[name].split(), *items, "--", *options])
    rows = []
    finished = sorted(folder.rglob("metrics.json"), key=lambda path: (path.parent.name[-2:], path))  # by fold
    for path in retune.progress(finished, desc="runs"):
        auroc = run_auroc(path.parent)
        resampled = np.round(auroc["all"][1:] / STEP).astype(np.uint16)  # the same resamples for all runs
        rows.append(run_row(path, folder) | {"resampled": resampled, "auroc": auroc})
    runs = pd.DataFrame(rows).assign(data=f"five folds of {Path(arguments.data_dir).name}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    write_runs(runs.drop(columns="auroc"), arguments.results)
    make_tables([str(arguments.results), "--only", "intervals", "methods", "rivals", "differences"])
    settings = {"data": "csv", "data_dir": arguments.data_dir}
    data = [retune.load_radiographs(retune.Config(labels_csv=str(path), **settings)) for path in paths]
    for name, table in (("view", view_table(data)), ("within-view", within_view_table(runs, folder))):
        text = retune.markdown_table(list(table), table.values.tolist())
        retune.write_text(arguments.results / f"{name}.md", f"{text}\n")
        retune.write_text(arguments.results / f"{name}.csv", table.to_csv(index=False))
        print(text)


if __name__ == "__main__":
    sys.exit(retune.main(action=folds))
