"""Tables of finished runs as Markdown, LaTeX and CSV, and their figures.

    python -m experiments.tables experiments/results/demo-tiny                     # every table and figure
    python -m experiments.tables experiments/results/demo-tiny --only main cost    # some of them

The runs are read from `<results>/runs`, and kept as `runs.csv` (settings and metrics) and `bootstrap.npz` (their
AUROC on resampled patients); without that folder, from those two files. A table is a list of rows and columns,
each of which names the runs and the metric that it wants.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.figures import draw_figures
from experiments.runs import (
    BASIC,
    BOUND,
    LAST,
    NAMES,
    OPPONENTS,
    OURS,
    QUALITY,
    SCENARIOS,
    VALIDATION,
    collect,
    full_name,
    labels_of,
    lead,
    pick,
    read_runs,
    scenarios,
    variants,
    write_runs,
)  # fmt: skip
from experiments.scores import STEP
from retune import InputError, main, markdown_table, write_text

# --------------------------------------------------------------------------------------------------- 1. Cells


@dataclass(frozen=True)
class Column:
    """A metric, its format, which runs it wants; `contest`: the leader is bold if its lead excludes zero."""

    name: str
    metric: str
    digits: str = ".3f"
    where: dict = field(default_factory=dict)
    contest: bool = False


@dataclass(frozen=True)
class Row:
    """Labels, which runs it wants, whom it competes with (None: nobody). `zero`: the zero-shot values."""

    labels: Sequence[str]
    where: dict
    group: str | None = ""
    zero: bool = False


@dataclass(frozen=True)
class Table:
    """A title, the cells as text, the seeds, and what is said below."""

    title: str
    text: pd.DataFrame
    seeds: Sequence[int]
    notes: Sequence[str] = ()


def fill(
    title: str, labels: Sequence[str], rows: Sequence[Row], columns: Sequence[Column], runs: pd.DataFrame,
    notes: Sequence[str] = (),
) -> Table:  # fmt: skip
    """Mean and standard deviation (n - 1) over seeds in every cell; InputError when a run is missing."""
    text = pd.DataFrame([row.labels for row in rows], columns=labels)
    for column in columns:
        chosen = [pick(runs, **row.where | column.where) for row in rows]
        seeds = sorted(chosen[0]["seed"])
        for row, found in zip(rows, chosen):
            if found.empty or sorted(found["seed"]) != seeds or found["seed"].duplicated().any():
                wanted = ", ".join(f"{key} {value}" for key, value in (row.where | column.where).items())
                have = f"runs of seeds {sorted(found['seed'])}, in the first row {seeds}"
                raise InputError(f"{wanted}: {have}; run_experiments.sh makes what is missing")
        zero = column.metric.replace("last", "zero").replace("model", "zero_shot")
        values = [
            found[zero if row.zero else column.metric].astype(float) for row, found in zip(rows, chosen)
        ]
        winners = leaders(chosen, rows) if column.contest else ()
        cells = [cell_text(value, column.digits) for value in values]
        text[column.name] = [f"**{cell}**" if i in winners else cell for i, cell in enumerate(cells)]
    return Table(title, text, seeds, notes)


def cell_text(values: pd.Series, digits: str) -> str:
    """Mean ± standard deviation, or the value alone where all runs agree; a dash where there is none."""
    if values.isna().all():
        return "-"
    mean = format(values.mean(), digits)
    return f"{mean} ± {format(values.std(), digits)}" if values.nunique() > 1 else mean


def leaders(chosen: Sequence[pd.DataFrame], rows: Sequence[Row]) -> set[int]:
    """In every group the row with the highest AUROC, if the interval of its lead over the next excludes zero."""
    winners = set()
    for group in {row.group for row in rows} - {None}:
        members = [i for i, row in enumerate(rows) if row.group == group]
        first, *others = sorted(members, key=lambda i: -chosen[i][LAST].mean())
        if others and lead(chosen[first], chosen[others[0]])[1] > 0:
            winners.add(first)
    return winners


# -------------------------------------------------------------------------------------------------- 2. Tables

CONTINUAL = [
    Column("AUROC", LAST, contest=True), Column("forgetting", "continual.forgetting"),
    Column("backward transfer", "continual.backward_transfer"),
    Column("forward transfer", "continual.forward_transfer"),
]  # fmt: skip


def main_table(runs: pd.DataFrame) -> Table:
    rows = [Row(["zero-shot"], SCENARIOS["joint"], zero=True)]
    rows += [Row([name], where) for name, where in SCENARIOS.items()]
    columns = [Column(name, f"last.{metric}") for metric, name in QUALITY.items()]
    title = "RE-tune after the last task, test split; precision and recall are weighted by positives."
    return fill(title, ["scenario"], rows, columns, runs)


def forgetting_table(runs: pd.DataFrame) -> Table:
    rows = [
        Row([scenario, NAMES[m]], SCENARIOS[scenario] | {"method": m}, None if m == BOUND else scenario)
        for scenario in BASIC[1:]
        for m in ("retune", "linear", "mlp", "ewc", "lwf", "replay", BOUND)
    ]
    title = (
        "What is left of earlier tasks after the last one, test split. Forward transfer is a finding's AUROC "
        "before its own part, against zero-shot. Keeping all data is a bound and not in the running."
    )
    return fill(title, ["scenario", "method"], rows, CONTINUAL, runs)


def adaptors_table(runs: pd.DataFrame) -> Table:
    columns = [Column(f"AUROC {s}", LAST, where=SCENARIOS[s], contest=True) for s in BASIC]
    columns += [Column(f"forgetting {s}", "continual.forgetting", where=SCENARIOS[s]) for s in BASIC[1:]]
    kinds = [
        (adaptor, towers) for adaptor in ("mlp", "linear") for towers in ("both", "shared", "image", "text")
    ]
    rows = [Row(kind, dict(zip(("adaptor", "adapt"), kind))) for kind in kinds]
    for scale, lr in ((1, 1e-3), (1, 1e-4), (10, 1e-3), (10, 1e-4)):
        name = f"residual (ours), logit scale {scale}, lr {lr:g}"
        rows.append(Row([name, "both"], {"adaptor": "residual", "logit_scale": scale, "lr": lr}))
    title = "Which adaptor, on which tower; macro AUROC after the last task, and forgetting; test split."
    return fill(title, ["adaptor", "towers"], rows, columns, runs)


def prompts_table(runs: pd.DataFrame) -> Table:
    columns = [
        Column("zero-shot AUROC", "zero.auroc_macro", where=SCENARIOS["joint"]),
        Column("zero-shot F1", "zero.f1_macro", where=SCENARIOS["joint"]),
        Column("joint AUROC", LAST, where=SCENARIOS["joint"], contest=True),
        Column("joint F1", "last.f1_macro", where=SCENARIOS["joint"]),
        Column("class-incremental AUROC", LAST, where=SCENARIOS["class-incremental"], contest=True),
        Column("class-incremental forgetting", "continual.forgetting", where=SCENARIOS["class-incremental"]),
    ]
    changes = {
        "reference: mean of the prompts, both polarities, finding-specific, score diff": {},
        "one prompt a polarity": {"pool": "single"},
        "highest cosine over the prompts": {"pool": "max"},
        "positive prompts alone": {"negatives": False},
        "generic wording": {"wording": "generic"},
        "score pos: the positive cosine alone, training as in the reference": {"score": "pos"},
    }
    rows = [Row([name], change) for name, change in changes.items()]
    return fill("How the prompts are used, test split.", ["prompts"], rows, columns, runs)


def cost_table(runs: pd.DataFrame) -> Table:
    columns = [
        Column("trainable parameters", "cost.trainable_parameters", ",.0f"),
        Column("of the encoder's", "cost.share_of_encoder", ".2%"),
        Column("training, s", "cost.train_seconds", ".2f"),
        Column("embedding, s", "cost.embed_seconds", ".1f"),
        Column("stored bytes", "cost.stored_bytes", ",.0f"),
        Column("stored bytes a patient", "cost.stored_a_patient", ",.0f"),
    ]
    title = (
        "What a method costs, class-incremental, all tasks together. Embedding is done once for all. Stored: "
        "what must be kept beside the model for the next task, in all and per training patient."
    )
    rows = [row for row in method_rows(runs, scenario="class") if not row.where["whiten"]]
    return fill(title, ["method", "whitened"], rows, columns, runs)


def calibration_table(runs: pd.DataFrame) -> Table:
    columns = [
        Column("ECE", "model.ece_before"),
        Column("ECE, with temperature", "model.ece_after"),
        Column("Brier", "model.brier_before"),
        Column("Brier, with temperature", "model.brier_after"),
        Column("temperature", "model.temperature"),
    ]
    rows = [Row(["zero-shot"], SCENARIOS["joint"], zero=True)]
    rows += [Row([f"RE-tune, {name}"], SCENARIOS[name]) for name in BASIC]
    rows.append(Row(["MLP head, class-incremental"], SCENARIOS["class-incremental"] | {"method": "mlp"}))
    title = (
        "Calibration (ours) of sigmoid(logit / temperature), test split, mean over classes: expected calibration "
        "error (15 bins of equal width) and Brier score, before and after one temperature fitted on validation."
    )
    return fill(title, ["method"], rows, columns, runs)


def seeds_of(runs: pd.DataFrame) -> list[int]:
    """The seeds of the tables that compare methods."""
    return sorted(pick(runs, **next(iter(scenarios(runs).values())))["seed"])


def method_rows(runs: pd.DataFrame, **where) -> list[Row]:
    """A row for every method that was run there; the bound competes with nobody."""
    found = [v for v in variants(runs) if len(pick(runs, **where, **v))]
    return [Row(labels_of(v), where | v, None if v["method"] == BOUND else "all") for v in found]


def summary_table(runs: pd.DataFrame) -> Table:
    columns = [Column(s, LAST, where=SCENARIOS[s], contest=True) for s in (*BASIC[1:], "joint")]
    columns.append(Column("forgetting", "continual.forgetting", where=SCENARIOS["class-incremental"]))
    found = [
        (pick(runs, **SCENARIOS["class-incremental"], **v)[VALIDATION].mean(), v) for v in variants(runs)
    ]
    best = {v["method"]: v for _, v in sorted(found, key=lambda pair: pair[0])}  # the last one stays
    plain = {"method": "retune", "set": "", "whiten": False}
    rows = [row for row in method_rows(runs) if row.where in (best[row.where["method"]], plain)]
    zero = pick(runs, **SCENARIOS["joint"])["zero.auroc_macro"].mean()
    title = (
        "Macro AUROC on test after the last task: RE-tune as published, and every method with the options and the "
        "whitening that are best on validation, class-incremental; forgetting is of that scenario. Zero-shot: "
        f"{zero:.3f}. Keeping all data is a bound and not in the running."
    )
    return fill(title, ["method", "whitened"], rows, columns, runs)


def methods_table(runs: pd.DataFrame) -> Table:
    found = scenarios(runs)
    steps = [s for s in found if s != "joint"]
    columns = [Column(f"AUROC {s}", LAST, where=where, contest=True) for s, where in found.items()]
    columns += [Column(f"forgetting {s}", "continual.forgetting", where=found[s]) for s in steps]
    early = [s for s in steps if not s.startswith("data")]
    columns += [Column(f"forward transfer {s}", "continual.forward_transfer", where=found[s]) for s in early]
    columns.append(Column("training, s", "cost.train_seconds", ".2f", SCENARIOS["class-incremental"]))
    columns.append(Column("stored bytes", "cost.stored_bytes", ",.0f", SCENARIOS["class-incremental"]))
    title = (
        "Every method after the last task, test split, by class-incremental AUROC. Seconds and stored bytes are of "
        "that scenario, all tasks. Keeping all data is a bound and not in the running."
    )
    return fill(title, ["method", "whitened"], method_rows(runs), columns, runs)


def intervals_table(runs: pd.DataFrame) -> Table:
    rows = method_rows(runs)
    text = pd.DataFrame([row.labels for row in rows], columns=["method", "whitened"])
    for scenario, where in scenarios(runs).items():
        chosen = [pick(runs, **row.where | where) for row in rows]
        resampled = [np.stack(part["resampled"]).mean(0) * STEP for part in chosen]
        ends = [np.percentile(values, [2.5, 97.5]) for values in resampled]
        text[scenario] = [
            f"{part[LAST].mean():.3f} [{low:.3f}, {high:.3f}]" for part, (low, high) in zip(chosen, ends)
        ]
    title = (
        "Macro AUROC on test after the last task, mean over seeds, with 95% intervals over 1,000 resamples of the "
        f"patients. Zero-shot: {runs['zero.auroc_macro'].mean():.3f}."
    )
    return Table(title, text, seeds_of(runs))


def orders_table(runs: pd.DataFrame) -> Table:
    rows = method_rows(runs, scenario="class", order=None)
    listed = pick(runs, **rows[0].where).sort_values("seed")
    columns = [Column(f"AUROC, order {seed}", LAST, where={"seed": seed}) for seed in listed["seed"]]
    title = (
        "Class-incremental in random class orders; the order's seed draws parts and weights too. Test split."
    )
    notes = ["Orders: " + "; ".join(listed["seed"].astype(str) + ": " + listed["order"]) + "."]
    return fill(title, ["method", "whitened"], rows, [*columns, *CONTINUAL], runs, notes)


def differences_table(runs: pd.DataFrame) -> Table:
    """RE-tune and ours against the best rival of each scenario; choosing it on test is in the rival's favour."""
    rivals = [v for v in variants(runs) if v["method"] not in (*OURS, BOUND)]
    title = (
        "Macro AUROC minus that of the best rival in the same scenario (neither RE-tune nor ours, nor the bound), "
        "mean over seeds, test split, with 95% intervals over 1,000 resamples of the patients, the same for both."
    )
    rows, notes = compare_with(runs, rivals, "the best rival")
    return Table(title, pd.DataFrame(rows), seeds_of(runs), [*notes, whitening_note(runs)])


def rivals_table(runs: pd.DataFrame) -> Table:
    """The same against two rivals that no result has chosen, those of them that were run."""
    title = (
        "Macro AUROC minus that of whitened LwF and of whitened EWC, mean over seeds, test split, with 95% intervals "
        "over 1,000 resamples of the patients, the same for both."
    )
    rows, notes = [], []
    for rival in (v for v in OPPONENTS if v in variants(runs)):
        more, said = compare_with(runs, [rival], full_name(rival))
        rows += more
        notes += said
    return Table(title, pd.DataFrame(rows), seeds_of(runs), notes)


def compare_with(runs: pd.DataFrame, rivals: Sequence[dict], name: str) -> tuple[list[dict], list[str]]:
    """Rows of RE-tune and ours against the best of some rivals in each scenario, and what the intervals say."""
    ours = [v for v in variants(runs) if v["method"] in OURS]
    rows = [
        dict(zip(("method", "whitened"), labels))
        for labels in ((name.removeprefix("the "), ""), *map(labels_of, ours))
    ]
    outcomes: list[dict] = [{"ahead of": [], "level with": [], "behind": []} for _ in ours]
    for scenario, where in scenarios(runs).items():
        rival = max(rivals, key=lambda v: pick(runs, **where, **v)[LAST].mean())
        other = pick(runs, **where, **rival)
        rows[0][scenario] = f"{full_name(rival)}, {other[LAST].mean():.3f}"
        for variant, row, outcome in zip(ours, rows[1:], outcomes):
            difference, low, high = lead(pick(runs, **where, **variant), other)
            cell = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
            row[scenario] = f"**{cell}**" if low > 0 or high < 0 else cell
            outcome["ahead of" if low > 0 else "behind" if high < 0 else "level with"].append(scenario)
    notes = []
    for variant, outcome in zip(ours, outcomes):
        parts = [f"{place} {name} in {', '.join(names)}" for place, names in outcome.items() if names]
        notes.append(f"{full_name(variant)}: {'; '.join(parts)}.")
    return rows, notes


def whitening_note(runs: pd.DataFrame) -> str:
    """What whitening changes in the methods that were run with and without it."""
    whitened = [v for v in variants(runs) if v["whiten"]]
    parts = []
    for scenario, where in scenarios(runs).items():
        pairs = [[pick(runs, **where, **v | {"whiten": on}) for on in (True, False)] for v in whitened]
        leads = [lead(*pair) for pair in pairs]
        better = sum(low > 0 for _, low, _ in leads)
        worse = sum(high < 0 for _, _, high in leads)
        parts.append(f"{scenario} {np.mean(leads, 0)[0]:+.3f} (better {better}, worse {worse})")
    counted = "better and worse where the interval excludes zero"
    return f"Whitening, mean change over {len(whitened)} methods ({counted}): {', '.join(parts)}."


TABLES: dict[str, Callable[[pd.DataFrame], Table]] = {
    "summary": summary_table, "main": main_table, "forgetting": forgetting_table, "adaptors": adaptors_table, "prompts": prompts_table,
    "cost": cost_table, "calibration": calibration_table, "methods": methods_table, "intervals": intervals_table,
    "differences": differences_table, "rivals": rivals_table, "orders": orders_table,
}  # fmt: skip


# ------------------------------------------------------------------------------------- 3. Files, command line


def render(name: str, runs: pd.DataFrame) -> dict[str, str]:
    """The table `name` as {".md", ".tex", ".csv"}; runs.csv has the unrounded numbers."""
    table = TABLES[name](runs)
    run = runs.iloc[0]
    demo = "; synthetic phantoms, not clinical numbers" if run["data"] == "demo" else ""
    bold = "lead over the next best" if name not in ("differences", "rivals") else "difference"
    bold = (
        f" Bold: the paired 95% interval of the {bold} excludes zero."
        if "**" in str(table.text.values)
        else ""
    )
    caption = (
        f"{table.title} Data: {run['data']} ({runs['train_n'].max():,} training images of "
        f"{run['cost.train_patients']:,} patients, {run['val_n']:,} validation and {run['test_n']:,} test images"
        f"{demo}). Encoder: {run['encoder']}, frozen. Classes: {run['classes']}. Seeds: "
        f"{', '.join(map(str, table.seeds))}; mean ± standard deviation.{bold}"
    )
    body = markdown_table(list(table.text.columns), table.text.values.tolist())
    latex = table.text.map(to_latex).rename(columns=to_latex)
    columns = "l" + "r" * (latex.shape[1] - 1)
    options = {"caption": to_latex(caption), "label": f"tab:{name}", "column_format": columns}
    return {
        ".md": "\n\n".join([f"**{name.capitalize()}.** {caption}", body, *table.notes]) + "\n",
        ".tex": latex.to_latex(index=False, escape=False, **options),
        ".csv": table.text.map(lambda cell: cell.strip("*")).to_csv(index=False),
    }


def to_latex(text: str) -> str:
    """Escape what LaTeX reads otherwise, and Markdown's bold."""
    for character, escaped in {"&": r"\&", "%": r"\%", "_": r"\_", "±": r"$\pm$", ">": "$>$"}.items():
        text = text.replace(character, escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def make_tables(argv: Sequence[str]) -> None:
    """Write the tables and figures that a command line asks for."""
    describe = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**describe)
    parser.add_argument("results", type=Path, help="folder of the results; its runs are in <results>/runs")
    parser.add_argument("--only", nargs="+", choices=(*TABLES, "figures"), default=(*TABLES, "figures"))
    arguments = parser.parse_args(argv)
    folder = arguments.results
    if (folder / "runs").is_dir():
        write_runs(collect(folder / "runs"), folder)
    runs = read_runs(folder)
    for name in (name for name in arguments.only if name in TABLES):
        texts = render(name, runs)
        for suffix, text in texts.items():
            write_text(folder / f"{name}{suffix}", text)
        print(f"{texts['.md']}\nwritten to {folder / name}.md, .tex and .csv\n")
    if "figures" in arguments.only:
        draw_figures(runs, folder)
        print(f"figures written to {folder}")


if __name__ == "__main__":
    sys.exit(main(action=make_tables))
