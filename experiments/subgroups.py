"""AUROC, sensitivity and specificity of a run by sex, age, view, part, with intervals over patients (ours).

    python -m experiments.subgroups RUN

Writes subgroups.md, .csv and .png into the run's folder, from test images, the run's adaptors and thresholds.
All groups share 1,000 resamples of the patients, so that the interval of a gap is a paired one.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from experiments.decisions import decide, logits_of, resampled_rate
from experiments.figures import new_figure
from experiments.runs import load_run

MEASURES = ("AUROC", "sensitivity", "specificity")


def group_names(values: Sequence[str], column: str) -> pd.Series:
    """The group of every image, "" where it is unknown; ages (58, 058Y, 030M) fall into four bands."""
    values = pd.Series(values).str.strip()
    if column != "age":
        return values
    bands = ["under 40", "40 to 59", "60 to 79", "80 and over"]
    parts = values.str.extract(r"(\d+)\s*([DWM]?)")  # DICOM's units
    years = pd.to_numeric(parts[0]) // parts[1].map({"D": 365, "W": 52, "M": 12}).fillna(1)
    return pd.cut(years, [-1, 39, 59, 79, 999], labels=bands).cat.add_categories("").fillna("")


def measure_group(findings, labels: np.ndarray, scores, present: np.ndarray, patients) -> np.ndarray:
    """[1 + R, C, 3]: MEASURES of each finding as they are, then on each resample; nan where there are none.

    Labels [N, C] are nan outside the group, so that its patients are drawn with those of all groups.
    """
    auroc = np.full((1001, labels.shape[1]), np.nan)
    for c, value in enumerate(retune.evaluate(scores, present, labels, findings)["auroc"].values()):
        if not np.isnan(value):
            auroc[:, c] = [value, *retune.bootstrap_auroc(scores[:, [c]], labels[:, [c]], patients)]
    shares = [resampled_rate(present == value, labels == value, patients) for value in (1, 0)]
    return np.stack([auroc, *shares], axis=-1)


def compare_groups(group: pd.Series, findings, labels, scores, present, patients) -> pd.DataFrame:
    """Rows (group, images, finding, measure, value, low, high); the gap is the best group minus the worst.

    The mean is over the findings that every group can be scored on.
    """
    images = group.value_counts().drop("", errors="ignore").sort_index()
    images = images[images > 0]
    inside = [np.where((group == name).to_numpy()[:, None], labels, np.nan) for name in images.index]
    points = np.stack([measure_group(findings, known, scores, present, patients) for known in inside])
    shared = ~np.isnan(points[:, 0]).any(0)  # [C, 3] of points [G, 1 + R, C, 3]
    mean = np.ma.masked_invalid(np.where(shared, points, np.nan)).mean(axis=2, keepdims=True)
    points = np.concatenate([points, mean.filled(np.nan)], axis=2)
    rows = []
    for m, measure in enumerate(MEASURES):
        for c, finding in enumerate([*findings, "mean"]):
            values = {name: point[:, c, m] for name, point in zip(images.index, points)}
            scored = sorted((v[0], name) for name, v in values.items() if not np.isnan(v[0]))
            if len(scored) > 1:
                values["gap"] = values[scored[-1][1]] - values[scored[0][1]]
            for name, v in values.items():
                low, high = (np.nan, np.nan) if np.isnan(v[0]) else np.nanpercentile(v[1:], [2.5, 97.5])
                rows.append([name, images.get(name, len(group)), finding, measure, v[0], low, high])
    return pd.DataFrame(rows, columns=["group", "images", "finding", "measure", "value", "low", "high"])


def draw(path: Path, table: pd.DataFrame) -> None:
    """A panel per measure, a line per group: the mean over findings and its interval."""
    table = table[table["group"] != "gap"]
    with new_figure(path, 3, 1, 3.7, 1.2 + 0.12 * len(table), sharey=True) as (_, axes):
        for axis, measure in zip(axes, MEASURES):
            part = table[table["measure"] == measure]
            names = part["by"] + ": " + part["group"]
            axis.hlines(names, part["low"], part["high"], color="0.5", linewidth=2)
            axis.plot(part["value"], names, "o", color="black")
            axis.set_title(f"test {measure}, mean over findings", fontsize=10)
            axis.grid(axis="x", color="0.9")
        axes[0].invert_yaxis()


def execute(argv: Sequence[str]) -> None:
    """Compare the groups of a run, in all columns that its data have."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    run = parser.parse_args(argv).run
    _, data, embeddings, bank, model = load_run(run)
    test = data.where("test")
    scores = logits_of(model, bank, embeddings, test)
    present = decide(scores, retune.read_json(run / "metrics.json")["decisions"])
    measured = (data.class_names, data.labels[test], scores, present, data.patients[test])
    columns = {name: getattr(data, name) for name in retune.GROUPS if getattr(data, name) is not None}
    if not columns:
        raise retune.InputError(f"{run}: its data have no column {', '.join(retune.GROUPS)}")
    groups = {name: group_names(np.asarray(values)[test], name) for name, values in columns.items()}
    tables = {name: compare_groups(group, *measured) for name, group in groups.items()}
    table = pd.concat(tables, names=["by", None]).reset_index("by")
    means = table[table["finding"] == "mean"]
    rows = []
    for (by, name, images), part in means.groupby(["by", "group", "images"], sort=False):
        scored = part.dropna().itertuples()  # one group alone has no gap
        cells = {r.measure: f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in scored}
        rows.append([f"{by}: {name}", images, *map(cells.get, MEASURES)])
    text = retune.markdown_table(["test images, mean over findings", "images", *MEASURES], rows)
    retune.write_text(run / "subgroups.csv", table.to_csv(index=False, float_format="%.6f"))
    retune.write_text(run / "subgroups.md", text + "\n")
    draw(run / "subgroups.png", means)
    print(text)


if __name__ == "__main__":
    sys.exit(retune.main(None, execute))
