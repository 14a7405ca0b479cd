"""Tables of finished runs as Markdown, LaTeX and CSV, and their figures.

    python -m experiments.tables experiments/results/demo-tiny                     # every table and figure
    python -m experiments.tables experiments/results/demo-tiny --only main cost    # some of them

The runs are read from `<results>/runs` and kept as `runs.csv` (settings and metrics) and `bootstrap.npz`
(AUROC on resampled patients); without that folder, they come from these two files. A table has rows {labels:
settings of the runs it wants} and columns, each a metric and more such settings. Its function's docstring is
its caption, with the zero-shot AUROC for {zero}.
"""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.figures import draw_figures
from experiments.runs import (
    BASIC,
    BOUND,
    LAST,
    NAMES,
    OPPONENTS,
    QUALITY,
    SCENARIOS,
    collect,
    full_name,
    labels_of,
    lead,
    pick,
    read_runs,
    scenarios,
    variants,
    write_runs,
)
from retune import InputError, main, markdown_table, write_text

OURS = ("retune", "distil", "analytic")
METHOD_LABELS = ("method", "whitened")


class Column(NamedTuple):
    """A metric, which runs it wants beside the row's, its format."""

    name: str
    metric: str
    where: dict | None = None
    digits: str = ".3f"


class Table(NamedTuple):
    """The cells as text, the notes below, and the seeds, if not those of RE-tune as published."""

    text: pd.DataFrame
    notes: Sequence[str] = ()
    seeds: Sequence[int] = ()


def fill(runs: pd.DataFrame, rows: dict, columns: Sequence[Column], labels=METHOD_LABELS, bold=True) -> Table:
    """Mean and standard deviation (n - 1) over seeds in every cell; InputError when a run is missing."""
    text = pd.DataFrame(list(rows), columns=labels)
    for column in columns:
        wanted = [where | (column.where or {}) for where in rows.values()]
        found = [pick(runs, **where) for where in wanted]
        seeds = sorted(set(found[0]["seed"]))
        for where, chosen in zip(wanted, found):
            if not seeds or sorted(chosen["seed"]) != seeds:
                settings = ", ".join(f"{key} {value}" for key, value in where.items())
                have = f"runs of seeds {sorted(chosen['seed'])}, in the first row {seeds}"
                raise InputError(f"{settings}: {have}; run_experiments.sh makes what is missing")
        zero = column.metric.replace("last", "zero").replace("model", "zero_shot")
        metrics = [zero if name[0] == "zero-shot" else column.metric for name in rows]
        cells = [cell_text(chosen[metric], column.digits) for metric, chosen in zip(metrics, found)]
        for i in leaders(found, wanted) if bold and column.metric == LAST else ():
            cells[i] = f"**{cells[i]}**"
        text[column.name] = cells
    return Table(text, seeds=seeds)


def cell_text(values: pd.Series, digits: str) -> str:
    """Mean ± standard deviation, or the value alone where all runs agree; a dash where there is none."""
    values = values.astype(float)
    deviation = f" ± {values.std():{digits}}" if values.nunique() > 1 else ""
    return "-" if values.isna().all() else f"{values.mean():{digits}}{deviation}"


def leaders(found: Sequence[pd.DataFrame], wanted: Sequence[dict]) -> set[int]:
    """In each scenario the row of highest AUROC, if the interval of its lead over the next excludes zero."""
    running = [i for i, where in enumerate(wanted) if where.get("method") != BOUND]
    ranked = sorted(running, key=lambda i: -found[i][LAST].mean())
    groups = pd.Series(ranked, dtype=int).groupby([str(wanted[i].get("scenario")) for i in ranked])
    pairs = [group.tolist()[:2] for _, group in groups if len(group) > 1]
    return {first for first, second in pairs if lead(found[first], found[second])[1] > 0}


CONTINUAL = {
    "AUROC": LAST, "forgetting": "continual.forgetting", "backward transfer": "continual.backward_transfer",
    "forward transfer": "continual.forward_transfer"}  # fmt: skip


def per_scenario(measure: str, scenarios: Sequence[str]) -> list[Column]:
    return [Column(f"{measure} {name}", CONTINUAL[measure], SCENARIOS[name]) for name in scenarios]


def method_rows(runs: pd.DataFrame, **where) -> dict:
    """A row for every method that was run there."""
    return {labels_of(v): where | v for v in variants(runs) if len(pick(runs, **where, **v))}


def main_table(runs: pd.DataFrame) -> Table:
    """RE-tune after the last task, test split; precision and recall are weighted by positives."""
    rows = {("zero-shot",): SCENARIOS["joint"]} | {(name,): where for name, where in SCENARIOS.items()}
    columns = [Column(name, f"last.{metric}") for metric, name in QUALITY.items()]
    return fill(runs, rows, columns, ["scenario"], bold=False)


def forgetting_table(runs: pd.DataFrame) -> Table:
    """What is left of earlier tasks after the last one, test split. Forward transfer is a finding's AUROC
    before its own part, against zero-shot. Keeping all data is a bound and not in the running."""
    methods = ("retune", "linear", "mlp", "ewc", "lwf", "replay", BOUND)
    rows = {(s, NAMES[m]): SCENARIOS[s] | {"method": m} for s in BASIC[1:] for m in methods}
    return fill(runs, rows, [Column(*item) for item in CONTINUAL.items()], ["scenario", "method"])


def adaptors_table(runs: pd.DataFrame) -> Table:
    """Which adaptor, on which tower; macro AUROC after the last task, and forgetting; test split."""
    kinds = [(kind, towers) for kind in ("mlp", "linear") for towers in ("both", "shared", "image", "text")]
    rows = {kind: dict(zip(("adaptor", "adapt"), kind)) for kind in kinds}
    for scale, lr in ((1, 1e-3), (1, 1e-4), (10, 1e-3), (10, 1e-4)):
        name = f"residual (ours), logit scale {scale}, lr {lr:g}"
        rows[name, "both"] = {"adaptor": "residual", "logit_scale": scale, "lr": lr}
    columns = per_scenario("AUROC", BASIC) + per_scenario("forgetting", BASIC[1:])
    return fill(runs, rows, columns, ["adaptor", "towers"])


def prompts_table(runs: pd.DataFrame) -> Table:
    """How the prompts are used, test split."""
    joint = SCENARIOS["joint"]
    classes = SCENARIOS["class-incremental"]
    columns = [
        Column("zero-shot AUROC", "zero.auroc_macro", joint),
        Column("zero-shot F1", "zero.f1_macro", joint),
        Column("joint AUROC", LAST, joint),
        Column("joint F1", "last.f1_macro", joint),
        Column("class-incremental AUROC", LAST, classes),
        Column("class-incremental forgetting", "continual.forgetting", classes),
    ]
    rows = {
        ("reference: mean of the prompts, both polarities, finding-specific, score diff",): {},
        ("one prompt a polarity",): {"pool": "single"},
        ("highest cosine over the prompts",): {"pool": "max"},
        ("positive prompts alone",): {"negatives": False},
        ("generic wording",): {"wording": "generic"},
        ("score pos: the positive cosine alone, training as in the reference",): {"score": "pos"},
    }
    return fill(runs, rows, columns, ["prompts"])


def cost_table(runs: pd.DataFrame) -> Table:
    """What a method costs, class-incremental, all tasks together. Embedding is done once for all. Stored:
    what must be kept beside the model for the next task, in all and per training patient."""
    columns = [
        Column("trainable parameters", "cost.trainable_parameters", digits=",.0f"),
        Column("of the encoder's", "cost.share_of_encoder", digits=".2%"),
        Column("training, s", "cost.train_seconds", digits=".2f"),
        Column("embedding, s", "cost.embed_seconds", digits=".1f"),
        Column("stored bytes", "cost.stored_bytes", digits=",.0f"),
        Column("stored bytes a patient", "cost.stored_a_patient", digits=",.0f"),
    ]
    rows = method_rows(runs, scenario="class")
    return fill(runs, {labels: where for labels, where in rows.items() if not where["whiten"]}, columns)


def calibration_table(runs: pd.DataFrame) -> Table:
    """Calibration (ours) of sigmoid(logit / temperature), test split, mean over classes: expected calibration
    error (15 bins of equal width) and Brier score, before and after one temperature fitted on validation."""
    names = {"ece_before": "ECE", "ece_after": "ECE, with temperature", "brier_before": "Brier",
             "brier_after": "Brier, with temperature", "temperature": "temperature"}  # fmt: skip
    rows = {("zero-shot",): SCENARIOS["joint"]} | {(f"RE-tune, {name}",): SCENARIOS[name] for name in BASIC}
    rows["MLP head, class-incremental",] = SCENARIOS["class-incremental"] | {"method": "mlp"}
    return fill(runs, rows, [Column(name, f"model.{key}") for key, name in names.items()], ["method"])


def summary_table(runs: pd.DataFrame) -> Table:
    """Macro AUROC on test after the last task: RE-tune as published, and every method with the options and
    the whitening that are best on validation, class-incremental; forgetting is of that scenario. Zero-shot:
    {zero:.3f}. Keeping all data is a bound and not in the running."""
    classes = SCENARIOS["class-incremental"]
    columns = [Column(s, LAST, SCENARIOS[s]) for s in (*BASIC[1:], "joint")]
    columns.append(Column("forgetting", CONTINUAL["forgetting"], classes))
    ranked = sorted(variants(runs), key=lambda v: pick(runs, **classes, **v)["last.val_auroc_macro"].mean())
    best = {v["method"]: v for v in ranked}  # the last one stays
    plain = {"method": "retune", "set": "", "whiten": False}
    kept = {labels: v for labels, v in method_rows(runs).items() if v in (best[v["method"]], plain)}
    return fill(runs, kept, columns)


def methods_table(runs: pd.DataFrame) -> Table:
    """Every method after the last task, test split, by class-incremental AUROC. Seconds and stored bytes are
    of that scenario, all tasks. Keeping all data is a bound and not in the running."""
    found = list(scenarios(runs))
    steps = [name for name in found if name != "joint"]
    columns = per_scenario("AUROC", found) + per_scenario("forgetting", steps)
    columns += per_scenario("forward transfer", [name for name in steps if not name.startswith("data")])
    columns.append(Column("training, s", "cost.train_seconds", SCENARIOS["class-incremental"], ".2f"))
    columns.append(Column("stored bytes", "cost.stored_bytes", SCENARIOS["class-incremental"], ",.0f"))
    return fill(runs, method_rows(runs), columns)


def intervals_table(runs: pd.DataFrame) -> Table:
    """Macro AUROC on test after the last task, mean over seeds, with 95% intervals over 1,000 resamples of
    the patients. Zero-shot: {zero:.3f}."""
    rows = method_rows(runs)
    text = pd.DataFrame(list(rows), columns=METHOD_LABELS)
    for scenario, where in scenarios(runs).items():
        leads = [lead(pick(runs, **row | where)) for row in rows.values()]
        text[scenario] = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval) for interval in leads]
    return Table(text)


def orders_table(runs: pd.DataFrame) -> Table:
    """Class-incremental in random class orders; the order's seed draws parts and weights too. Test split."""
    rows = method_rows(runs, scenario="class", order=None)
    listed = pick(runs, **next(iter(rows.values()))).sort_values("seed")
    columns = [Column(f"AUROC, order {seed}", LAST, {"seed": seed}) for seed in listed["seed"]]
    columns += [Column(*item) for item in CONTINUAL.items()]
    orders = "; ".join(listed["seed"].astype(str) + ": " + listed["order"])
    return fill(runs, rows, columns)._replace(notes=[f"Orders: {orders}."])


def differences_table(runs: pd.DataFrame) -> Table:
    """Macro AUROC minus that of the best rival in the same scenario (neither RE-tune nor ours, nor the
    bound), mean over seeds, test split, with 95% intervals over 1,000 resamples of the patients, the same for
    both."""
    rivals = [v for v in variants(runs) if v["method"] not in (*OURS, BOUND)]
    text, notes = compare_with(runs, rivals, "the best rival")
    return Table(text, notes + whitening_notes(runs))


def rivals_table(runs: pd.DataFrame) -> Table:
    """Macro AUROC minus that of whitened LwF and of whitened EWC, mean over seeds, test split, with 95%
    intervals over 1,000 resamples of the patients, the same for both."""
    found = [compare_with(runs, [rival], full_name(rival)) for rival in OPPONENTS if rival in variants(runs)]
    text = pd.concat([text for text, _ in found], ignore_index=True)
    return Table(text, [note for _, notes in found for note in notes])


def compare_with(runs: pd.DataFrame, rivals: Sequence[dict], against: str) -> tuple[pd.DataFrame, list[str]]:
    """RE-tune and ours against the best of some rivals in each scenario, and what the intervals say.

    Choosing the best on test is in the rival's favour.
    """
    ours = [v for v in variants(runs) if v["method"] in OURS]
    labels = [(against.removeprefix("the "), ""), *map(labels_of, ours)]
    text = pd.DataFrame(labels, columns=METHOD_LABELS)
    places = pd.DataFrame(index=map(full_name, ours))
    for scenario, where in scenarios(runs).items():
        rival = max(rivals, key=lambda v: pick(runs, **where, **v)[LAST].mean())
        other = pick(runs, **where, **rival)
        leads = [lead(pick(runs, **where, **v), other) for v in ours]
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval) for interval in leads]
        places[scenario] = [int(low > 0) - int(high < 0) for _, low, high in leads]
        cells = [f"**{cell}**" if sign else cell for cell, sign in zip(cells, places[scenario])]
        text[scenario] = [f"{full_name(rival)}, {other[LAST].mean():.3f}", *cells]
    notes = []
    for name, signs in places.iterrows():
        named = {"ahead of": 1, "level with": 0, "behind": -1}
        parts = {place: ", ".join(signs.index[signs == sign]) for place, sign in named.items()}
        parts = [f"{place} {against} in {where}" for place, where in parts.items() if where]
        notes.append(f"{name}: {'; '.join(parts)}.")
    return text, notes


def whitening_notes(runs: pd.DataFrame) -> list[str]:
    """What whitening changes in methods that were run with and without it; nothing without such methods."""
    whitened = [v for v in variants(runs) if v["whiten"] and v | {"whiten": False} in variants(runs)]
    if not whitened:
        return []
    parts = []
    for scenario, where in scenarios(runs).items():
        pairs = [[pick(runs, **where, **v | {"whiten": on}) for on in (True, False)] for v in whitened]
        change, low, high = np.transpose([lead(*pair) for pair in pairs])
        parts.append(f"{scenario} {change.mean():+.3f} (better {sum(low > 0)}, worse {sum(high < 0)})")
    counted = "better and worse where the interval excludes zero"
    return [f"Whitening, mean change over {len(whitened)} methods ({counted}): {', '.join(parts)}."]


TABLES = {
    "summary": summary_table, "main": main_table, "forgetting": forgetting_table, "adaptors": adaptors_table,
    "prompts": prompts_table, "cost": cost_table, "calibration": calibration_table,
    "methods": methods_table, "intervals": intervals_table, "differences": differences_table,
    "rivals": rivals_table, "orders": orders_table}  # fmt: skip


def render(name: str, runs: pd.DataFrame) -> dict[str, str]:
    """The table `name` as {".md", ".tex", ".csv"}; runs.csv has the unrounded numbers."""
    text, notes, seeds = TABLES[name](runs)
    run = runs.iloc[0]
    published = pick(runs, **next(iter(scenarios(runs).values())))  # RE-tune, in the first scenario that ran
    seeds = seeds or sorted(published["seed"])
    zero = published["zero.auroc_macro"].mean()
    demo = "; synthetic phantoms, not clinical numbers" if run["data"] == "demo" else ""
    lead_or_difference = "difference" if name in ("differences", "rivals") else "lead over the next best"
    bold = f" Bold: the paired 95% interval of the {lead_or_difference} excludes zero."
    caption = (
        f"{' '.join(TABLES[name].__doc__.split()).format(zero=zero)} Data: {run['data']} "
        f"({runs['train_n'].max():,} training images of {run['cost.train_patients']:,} patients, "
        f"{run['val_n']:,} validation and {run['test_n']:,} test images{demo}). Encoder: {run['encoder']}, "
        f"frozen. Classes: {run['classes']}. Seeds: {', '.join(map(str, seeds))}; mean ± standard deviation."
    )
    caption += bold if "**" in str(text.values) else ""
    latex = text.map(to_latex).rename(columns=to_latex)
    options = {"label": f"tab:{name}", "column_format": "l" + "r" * (latex.shape[1] - 1)}
    body = markdown_table(list(text), text.values.tolist())
    return {
        ".md": "\n\n".join([f"**{name.capitalize()}.** {caption}", body, *notes]) + "\n",
        ".tex": latex.to_latex(index=False, escape=False, caption=to_latex(caption), **options),
        ".csv": text.map(lambda cell: cell.strip("*")).to_csv(index=False),
    }


def to_latex(text: str) -> str:
    """Escape what LaTeX reads otherwise, and Markdown's bold."""
    for character, escaped in {"&": r"\&", "%": r"\%", "_": r"\_", "±": r"$\pm$", ">": "$>$"}.items():
        text = text.replace(character, escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)


def make_tables(argv: Sequence[str]) -> None:
    """Write the tables and figures that a command line asks for."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
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
