"""AUROC, sensitivity and specificity of a run by sex, age, view and part, with intervals over patients (ours).

    python -m experiments.subgroups RUN [--by sex age view]

Writes subgroups.md, subgroups.csv and subgroups.png into the run's folder. All on test images, with the run's saved
adaptors and the thresholds that it chose on validation. Every group has the same 1,000 resamples of patients, so that
the interval of a gap, the best group minus the worst, is paired.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from experiments.decisions import logits_of, sigmoid
from experiments.scores import load_run, resampled_auroc

MEASURES = ("AUROC", "sensitivity", "specificity")
AGES = ("under 40", "40 to 59", "60 to 79", "80 and over")


def group_names(data, rows: np.ndarray, column: str) -> np.ndarray:
    """The group [n] of each row, "" where it is unknown; ages fall into four bands."""
    values = pd.Series(np.asarray(getattr(data, column), str)[rows]).str.strip()
    if column != "age":
        return values.to_numpy(str)
    years = pd.to_numeric(values.str.extract(r"(\d+)")[0])  # NIH's older table has 058Y
    return pd.cut(years, [-1, 39, 59, 79, 999], labels=AGES).astype(str).replace("nan", "").to_numpy(str)


def resample(labels, scores, present, patients) -> np.ndarray:
    """[3, C, 1 + R]: each of MEASURES and finding on the images [N, C], then on R resamples of the patients."""
    points = [[], [], []]
    for c in range(labels.shape[1]):
        y = labels[:, [c]]
        known = (y == 1).any() and (y == 0).any()
        whole = retune.evaluate(scores[:, [c]], present[:, [c]], y)["auroc_macro"] if known else np.nan
        points[0].append(
            [whole, *(resampled_auroc(scores[:, [c]], y, patients) if known else [np.nan] * 1000)]
        )
        for measure, value in ((1, 1), (2, 0)):
            points[measure].append(resampled_rate(present[:, c] == value, y[:, 0] == value, patients))
    return np.array(points)


def resampled_rate(
    hit: np.ndarray, of: np.ndarray, patients: np.ndarray, resamples: int = 1000
) -> np.ndarray:
    """The share of images `of` [N] that are hit [N], then on each resample [1 + R]; nan where there is none."""
    ids, patient = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), resamples)
    weight = np.vstack([np.ones(len(ids)), drawn])  # the seed of resampled_auroc: the same patients
    hits, total = (weight @ np.bincount(patient, mask, len(ids)) for mask in (hit & of, of))
    return np.where(total > 0, hits / np.maximum(total, 1), np.nan)


def compare_groups(data, rows: np.ndarray, columns: Sequence[str], scores, present) -> pd.DataFrame:
    """A row per column, group, measure and finding: value, low, high; group "gap" is the best minus the worst."""
    labels = data.labels[rows]
    patients = data.patients[rows]
    names = [*data.class_names, "macro"]
    table = []
    for column in columns:
        group = group_names(data, rows, column)
        found = {}
        for name in sorted(
            {*group.tolist()} - {""},
            key=lambda name: (name not in AGES, AGES.index(name) if name in AGES else name),
        ):
            mine = np.where((group == name)[:, None], labels, np.nan)  # all patients stay: the same resamples
            points = resample(mine, scores, present, patients)
            found[name] = np.concatenate([points, np.nanmean(points, axis=1, keepdims=True)], axis=1)
        for m, measure in enumerate(MEASURES):
            for c, finding in enumerate(names):
                values = {name: points[m, c] for name, points in found.items()}
                ranked = sorted((v[0], name) for name, v in values.items() if not np.isnan(v[0]))
                values["gap"] = (
                    values[ranked[-1][1]] - values[ranked[0][1]] if len(ranked) > 1 else np.full(1001, np.nan)
                )
                for name, v in values.items():
                    low, high = (
                        np.nanpercentile(v[1:], [2.5, 97.5]) if not np.isnan(v[0]) else (np.nan, np.nan)
                    )
                    mine = group == name if name != "gap" else group != ""
                    table.append([column, name, measure, finding, mine.sum(), v[0], low, high])
    return pd.DataFrame(
        table, columns=["by", "group", "measure", "finding", "images", "value", "low", "high"]
    )


def markdown(table: pd.DataFrame) -> str:
    """The macro measures of every group, with intervals."""
    table = table[table["finding"] == "macro"]
    lines = []
    for (by, group), part in table.groupby(["by", "group"], sort=False):
        cells = [f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in part.itertuples()]
        lines.append([f"{by}: {group}", part["images"].iloc[0], *cells])
    return retune.markdown_table(["test images, mean over findings", "images", *MEASURES], lines)


def draw(path: Path, table: pd.DataFrame) -> None:
    """A panel per measure, a line per group: the value and its interval."""
    from matplotlib.figure import Figure

    table = table[(table["finding"] == "macro") & (table["group"] != "gap")]
    names = [f"{by}: {group}" for by, group in dict.fromkeys(zip(table["by"], table["group"]))]
    figure = Figure(figsize=(11, 1.2 + 0.35 * len(names)), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 3, sharey=True), MEASURES):
        part = table[table["measure"] == measure]
        y = np.arange(len(part))
        axes.hlines(y, part["low"], part["high"], color="0.5", linewidth=2)
        axes.plot(part["value"], y, "o", color="black")
        axes.set_yticks(y, names)
        axes.set_title(f"test {measure}, mean over findings", fontsize=10)
        axes.grid(axis="x", color="0.9")
    axes.invert_yaxis()
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})


def execute(argv: Sequence[str]) -> None:
    """Compare the groups of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--by", nargs="+", choices=retune.GROUPS, help="columns (default: those that are known)"
    )
    arguments = parser.parse_args(argv)
    settings, data, embeddings, bank, model = load_run(arguments.run)
    columns = arguments.by or [name for name in retune.GROUPS if getattr(data, name) is not None]
    if not columns or any(getattr(data, name) is None for name in columns):
        raise retune.InputError(
            f"{arguments.run}: its data have no column {' or '.join(arguments.by or retune.GROUPS)}"
        )
    rows = data.where("test")
    chosen = retune.read_json(arguments.run / "metrics.json")["decisions"]
    scores = logits_of(model, bank, embeddings, rows)
    temperature, threshold = (
        np.array([chosen[key][name] or default for name in data.class_names])
        for key, default in (("temperature", 1.0), ("threshold", 0.5))
    )
    present = sigmoid(scores / temperature) >= threshold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means over nothing are nan and shown as such
        table = compare_groups(data, rows, columns, scores, present)
    text = markdown(table)
    retune.write_text(arguments.run / "subgroups.md", text + "\n")
    retune.write_text(arguments.run / "subgroups.csv", table.to_csv(index=False, float_format="%.6f"))
    draw(arguments.run / "subgroups.png", table)
    print(text)


if __name__ == "__main__":
    sys.exit(retune.main(None, execute))
