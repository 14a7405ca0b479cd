"""Tables and figures of the experiments from finished runs: Markdown, CSV and LaTeX from one place.

    python tables.py results/demo-tiny                       # every table and figure that its runs allow
    python tables.py results/demo-tiny --only main cost      # some of them; refuses when a run is missing
    python tables.py results/demo-tiny --readme README.md    # also write the README's results block

Runs are found under `<results>/runs`, wherever they lie: what a run is, its own `metrics.json` says. A table
is a list of rows and columns, each of which names the runs and the metric it wants. `cells.csv` traces every
number to them: table, row, column, metric, one value per run, and the runs' folders.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from retune import (
    Config,
    DualEncoder,
    InputError,
    RETune,
    atomic,
    build_model,
    embed,
    embed_prompts,
    heatmap,
    load_radiographs,
    load_tensors,
    load_weights,
    markdown_table,
    pick_device,
    read_json,
    read_rows,
    stages,
    write_json,
    write_text,
)

# ---------------------------------------------------------------------------------------------------- 1. Runs

# What a table can vary. Where a row does not name one, it wants RE-tune as the paper has it.
REFERENCE = {
    "method": "retune", "adaptor": "mlp", "adapt": "both", "pool": "mean", "negatives": True, "score": "diff",
    "wording": "specific", "logit_scale": 1.0, "random_order": False,
}  # fmt: skip
METHODS = ("retune", "linear", "mlp", "ewc", "lwf", "replay", "joint")
NAMES = {
    "retune": "RE-tune", "linear": "linear head", "mlp": "MLP head", "ewc": "MLP head, EWC",
    "lwf": "MLP head, LwF", "replay": "MLP head, replay", "joint": "MLP head, all data kept",
}  # fmt: skip
SCENARIOS = {
    "joint": "joint",
    "class": "class-incremental",
    "label": "label-incremental",
    "data": "data-incremental",
}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the content of metrics.json, and the settings that tables choose by."""

    folder: Path
    metrics: dict
    settings: dict

    def value(self, path: str) -> float | None:
        """The metric at a path such as `after_task.-1.test.auroc_macro`, or the ratio `a / b` of two.

        None where metrics.json has null.
        """
        if " / " in path:
            top, bottom = map(self.value, path.split(" / "))
            return None if top is None or not bottom else top / bottom
        place = calibration(self) if path.startswith("calibration.") else self.metrics
        for key in path.removeprefix("calibration.").split("."):
            place = place[int(key)] if isinstance(place, list) else place[key]
        return place


def find_runs(folder: Path) -> list[Run]:
    """All finished runs under a folder, in order of their names; of two with the same settings the first."""
    runs: dict[tuple, Run] = {}
    for path in sorted(folder.rglob("metrics.json")):
        metrics = read_json(path)
        config = metrics["config"]
        settings = {key: config[key] for key in (*REFERENCE, "scenario", "seed", "lr") if key in config}
        settings |= {"parts": len(metrics["tasks"]), "random_order": config["class_order"] is not None}
        runs.setdefault(tuple(settings.items()), Run(path.parent, metrics, settings))
    if not runs:
        raise InputError(f"{folder}: no finished run (no metrics.json); start them with run_experiments.sh")
    kinds = {
        (r.metrics["config"]["data_fingerprint"], r.metrics["config"]["encoder_fingerprint"])
        for r in runs.values()
    }
    if len(kinds) > 1:
        raise InputError(f"{folder}: runs on {len(kinds)} different data sets or encoders; keep one a folder")
    return list(runs.values())


def choose(runs: Sequence[Run], **wanted) -> list[Run]:
    """The runs with the wanted settings; others are as in REFERENCE, the learning rate as in its runs."""
    wanted = REFERENCE | wanted
    if "lr" not in wanted:
        wanted["lr"] = next((r.settings["lr"] for r in runs if REFERENCE.items() <= r.settings.items()), None)
    return [run for run in runs if wanted.items() <= run.settings.items()]


# ---------------------------------------------------------------------------------------- 2. Cells and tables


@dataclass(frozen=True)
class Column:
    """A metric's path, which end of it is better (max, min or none), its format, and which runs it wants."""

    name: str
    path: str
    best: str | None = "max"
    digits: str = ".3f"
    where: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Labels, which runs it wants, the group in which the best is sought. `zero`: the zero-shot values."""

    labels: tuple[str, ...]
    where: dict
    group: str = ""
    zero: bool = False


@dataclass(frozen=True)
class Cell:
    """One value per run; text is "mean ± deviation", or the value alone where all runs agree."""

    path: str
    values: tuple[float, ...]
    runs: tuple[Run, ...]
    digits: str

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over runs, with n - 1; nan for fewer than two."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    @property
    def text(self) -> str:
        if not self.values:
            return "-"
        mean = format(self.mean, self.digits)
        return f"{mean} ± {format(self.deviation, self.digits)}" if len(set(self.values)) > 1 else mean


@dataclass(frozen=True)
class Table:
    """A table of cells with what its caption must say; `notes` follow below it."""

    name: str
    title: str
    labels: tuple[str, ...]
    columns: Sequence[Column]
    rows: Sequence[Row]
    cells: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    def best(self, i: int, j: int) -> bool:
        """Is cell (i, j), as printed, the best of its column and group? Where all are equal, none is."""
        column, group = self.columns[j], [k for k, r in enumerate(self.rows) if r.group == self.rows[i].group]

        def shown(k: int) -> float:
            return float(format(self.cells[k][j].mean, column.digits).replace(",", "").rstrip("%"))

        others = [value for value in map(shown, group) if not math.isnan(value)]
        if column.best is None or len(set(others)) < 2:
            return False
        return shown(i) == (max if column.best == "max" else min)(others)

    def caption(self) -> str:
        runs = [run for row in self.cells for cell in row for run in cell.runs]
        seeds = sorted({run.settings["seed"] for run in runs})
        text = f"{self.title} {describe(runs[0])} Seeds: {', '.join(map(str, seeds))}."
        many = "Mean ± standard deviation over seeds; " if len(seeds) > 1 else ""
        return f"{text} {many}{'best' if many else 'Best'} in bold."

    def grid(self, bold: str) -> list[list[str]]:
        """Labels and cells as text; `bold` is a template such as **{}**."""
        return [
            [
                *row.labels,
                *(bold.format(c.text) if self.best(i, j) else c.text for j, c in enumerate(self.cells[i])),
            ]
            for i, row in enumerate(self.rows)
        ]


def describe(run: Run) -> str:
    """Data, encoder and classes of a run, as captions say them."""
    config, m = run.metrics["config"], run.metrics["zero_shot"]
    demo = "; synthetic phantoms, not clinical numbers" if config["data"] == "demo" else ""
    patients, images = training_set(run.folder)
    return (
        f"Data: {config['data']} ({images:,} training images of {patients:,} patients,"
        f" {m['val']['n']:,} validation"
        f" and {m['test']['n']:,} test images{demo}). Encoder: {Path(config['encoder']).name}, frozen."
        f" Classes: {', '.join(run.metrics['classes'])}."
    )


@functools.lru_cache(maxsize=1024)
def training_set(folder: Path) -> tuple[int, int]:
    """(patients, images) of the training split of a run's folder."""
    with open(folder / "splits.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    return len({row["patient"] for row in rows}), len(rows)


def build(
    runs: Sequence[Run], name: str, title: str, labels: tuple[str, ...], columns: Sequence[Column],
    rows: Sequence[Row],
) -> Table:  # fmt: skip
    """Fill a table; InputError when a cell has no run, or not the seeds that the first row has."""
    cells, seeds = [], None
    for row in rows:
        line = []
        for column in columns:
            wanted = row.where | column.where
            chosen = choose(runs, **wanted)
            found = sorted({run.settings["seed"] for run in chosen})
            seeds = seeds or found
            if not chosen or (found != seeds and "random_order" not in wanted):
                text = ", ".join(f"{key} {value}" for key, value in wanted.items())
                raise InputError(
                    f"table {name}: there are runs of seeds {found or 'none'} for {text}, not of {seeds};"
                    f" run it with ONLY={name} bash run_experiments.sh"
                )
            path = column.path
            if row.zero:
                path = path.replace("after_task.-1.", "zero_shot.").replace(
                    "calibration.model.", "calibration.zero_shot."
                )
            known = [(run, run.value(path)) for run in chosen]
            known = [(run, value) for run, value in known if value is not None]
            line.append(Cell(path, tuple(v for _, v in known), tuple(r for r, _ in known), column.digits))
        cells.append(line)
    return Table(name, title, labels, columns, rows, cells)


LAST = "after_task.-1.test."
QUALITY = [
    Column("AUROC macro", LAST + "auroc_macro"), Column("AUROC weighted", LAST + "auroc_weighted"),
    Column("F1 macro", LAST + "f1_macro"), Column("F1 weighted", LAST + "f1_weighted"),
    Column("precision", LAST + "precision_weighted"), Column("recall", LAST + "recall_weighted"),
    Column("exact match", LAST + "accuracy"), Column("average precision", LAST + "ap_macro"),
]  # fmt: skip
CONTINUAL = [
    Column("average AUROC", "continual.average_auroc"), Column("forgetting", "continual.forgetting", "min"),
    Column("backward transfer", "continual.backward_transfer"),
    Column("forward transfer", "continual.forward_transfer"),
]  # fmt: skip


def in_scenario(scenario: str) -> dict:
    """The runs of a scenario; data-incremental has 5 parts where nothing else is said."""
    return {"scenario": scenario} | ({"parts": 5} if scenario == "data" else {})


def main_table(runs: Sequence[Run]) -> Table:
    rows = [Row(("zero-shot",), in_scenario("joint"), zero=True)]
    rows += [Row((SCENARIOS[s],), in_scenario(s)) for s in ("joint", "class", "label")]
    rows += [Row((f"data-incremental, {n} parts",), {"scenario": "data", "parts": n}) for n in (5, 10, 20)]
    title = "RE-tune after the last task, test split; precision and recall are weighted by positives."
    return build(runs, "main", title, ("scenario",), QUALITY, rows)


def forgetting_table(runs: Sequence[Run]) -> Table:
    rows = [
        Row((SCENARIOS[s], NAMES[m]), in_scenario(s) | {"method": m}, group=s + " bound" * (m == "joint"))
        for s, m in itertools.product(("class", "label", "data"), METHODS)
    ]
    title = (
        "What is left of earlier tasks after the last one, test split. Forward transfer is against the"
        " encoder's"
        " zero-shot AUROC for every method. The MLP head that keeps all data is a bound and not in the"
        " running."
    )
    table = build(runs, "forgetting", title, ("scenario", "method"), CONTINUAL, rows)
    return dataclasses.replace(table, notes=[forgetting_note(table)])


def forgetting_note(table: Table) -> str:
    """The claim about class-incremental forgetting and its numbers, whichever way they fall."""
    means = {
        row.labels[1]: [c.mean for c in cells]
        for row, cells in zip(table.rows, table.cells)
        if row.group == "class"
    }
    (ours, mlp, linear) = (means[NAMES[method]] for method in ("retune", "mlp", "linear"))
    holds = "holds" if linear[1] - ours[1] >= 0.05 else "does not hold"
    return (
        f"Class-incremental, RE-tune forgets {ours[1]:.3f}, the MLP head {mlp[1]:.3f}, the linear head"
        f" {linear[1]:.3f}. That RE-tune"
        f" forgets at least 0.05 less than a linear head trained in sequence {holds} here. Labels that"
        f" a part does not bring"
        " are masked for every method, and a linear head shares no weights between findings: it has"
        " next to nothing to"
        " forget (Adam's momentum moves a finding's weights for some steps after its part). The"
        " adaptors, as the MLP, are"
        f" shared by all findings. Forward transfer, a finding's AUROC before its own part against"
        f" zero-shot, is {ours[3]:+.3f} with"
        f" RE-tune, {mlp[3]:+.3f} with the MLP head and {linear[3]:+.3f} with the linear head, both of"
        f" which know no text. Table"
        " `adaptors` asks what starting at zero-shot changes."
    )


def adaptors_table(runs: Sequence[Run]) -> Table:
    order = ("joint", "data", "label", "class")
    columns = [Column(f"AUROC {s}", LAST + "auroc_macro", where=in_scenario(s)) for s in order]
    columns += [
        Column(f"forgetting {s}", "continual.forgetting", "min", where=in_scenario(s)) for s in order[1:]
    ]
    rows = [
        Row((kind, place), {"adaptor": kind, "adapt": place})
        for kind, place in itertools.product(("mlp", "linear"), ("both", "shared", "image", "text"))
    ]
    rows += [
        Row(
            (f"residual (ours), logit scale {scale:g}, lr {lr:g}", "both"),
            {"adaptor": "residual", "logit_scale": scale, "lr": lr},
        )
        for scale, lr in itertools.product((1.0, 10.0), (1e-3, 1e-4))
    ]  # fmt: skip
    title = "Which adaptor, on which tower; macro AUROC after the last task, and forgetting; test split."
    return build(runs, "adaptors", title, ("adaptor", "towers"), columns, rows)


def prompts_table(runs: Sequence[Run]) -> Table:
    columns = [
        Column("zero-shot AUROC", "zero_shot.test.auroc_macro", where=in_scenario("joint")),
        Column("zero-shot F1", "zero_shot.test.f1_macro", where=in_scenario("joint")),
        Column("joint AUROC", LAST + "auroc_macro", where=in_scenario("joint")),
        Column("joint F1", LAST + "f1_macro", where=in_scenario("joint")),
        Column("class-incremental AUROC", LAST + "auroc_macro", where=in_scenario("class")),
        Column("class-incremental forgetting", "continual.forgetting", "min", where=in_scenario("class")),
    ]  # fmt: skip
    rows = [
        Row(("reference: mean of the prompts, both polarities, finding-specific, score diff",), {}),
        Row(("one prompt a polarity",), {"pool": "single"}),
        Row(("highest cosine over the prompts",), {"pool": "max"}),
        Row(("positive prompts alone",), {"negatives": False}),
        Row(("generic wording",), {"wording": "generic"}),
        Row(("score pos: the positive cosine alone, training as in the reference",), {"score": "pos"}),
    ]
    return build(runs, "prompts", "How the prompts are used, test split.", ("prompts",), columns, rows)


def order_table(runs: Sequence[Run]) -> Table:
    wanted = {"scenario": "class", "random_order": True}
    rows = []
    for run in sorted(choose(runs, **wanted), key=lambda run: run.settings["seed"]):
        names = " > ".join(run.metrics["config"]["class_order"])
        rows.append(Row((f"{names} (seed {run.settings['seed']})",), wanted | {"seed": run.settings["seed"]}))
    rows.append(Row((f"mean of {len(rows)} orders",), wanted, group="mean"))
    title = "RE-tune, class-incremental, in random class orders; the seed draws order, parts and weights."
    return build(runs, "order", title, ("order",), CONTINUAL, rows)


def cost_table(runs: Sequence[Run]) -> Table:
    columns = [
        Column("trainable parameters", "cost.trainable_parameters", "min", ",.0f"),
        Column("of the encoder's", "cost.trainable_parameters / cost.encoder_parameters", "min", ".2%"),
        Column("training, s", "cost.train_seconds", "min", ".2f"),
        Column("embedding, s", "cost.embed_seconds", None, ".1f"),
        Column("peak memory, MB", "cost.peak_memory_mb", None, ",.0f"),
        Column("stored bytes", "cost.stored_bytes", "min", ",.0f"),
        Column("stored bytes a patient", "cost.stored_bytes / cost.train_patients", "min", ",.0f"),
    ]
    rows = [Row((NAMES[m],), in_scenario("class") | {"method": m}) for m in METHODS]
    title = (
        "What a method costs, class-incremental, all tasks together. Embedding is done once for all."
        " Memory is the"
        " highest of the process, libraries and earlier runs included. Stored: patients' data (embeddings and"
        " labels) that must be kept for the next task, in all and per training patient."
    )
    return build(runs, "cost", title, ("method",), columns, rows)


def calibration_table(runs: Sequence[Run]) -> Table:
    columns = [
        Column("ECE", "calibration.model.ece_before", "min"),
        Column("ECE, with temperature", "calibration.model.ece_after", "min"),
        Column("Brier", "calibration.model.brier_before", "min"),
        Column("Brier, with temperature", "calibration.model.brier_after", "min"),
        Column("temperature", "calibration.model.temperature", None),
    ]
    rows = [Row(("zero-shot",), in_scenario("joint"), zero=True)]
    rows += [Row((f"RE-tune, {SCENARIOS[s]}",), in_scenario(s)) for s in SCENARIOS]
    rows += [Row(("MLP head, class-incremental",), in_scenario("class") | {"method": "mlp"})]
    title = (
        "Calibration (ours) of sigmoid(logit / temperature), test split, mean over classes: expected"
        " calibration error"
        " (15 bins of equal width) and Brier score, before and after one temperature fitted on validation."
    )
    return build(runs, "calibration", title, ("method",), columns, rows)


TABLES: dict[str, Callable[[Sequence[Run]], Table]] = {
    "main": main_table, "forgetting": forgetting_table, "adaptors": adaptors_table, "prompts": prompts_table,
    "order": order_table, "cost": cost_table, "calibration": calibration_table,
}  # fmt: skip


def to_markdown(table: Table) -> str:
    header = [*table.labels, *(column.name for column in table.columns)]
    notes = "".join(f"\n{note}\n" for note in table.notes)
    body = markdown_table(header, table.grid("**{}**"))
    return f"**{table.name.capitalize()}.** {table.caption()}\n\n{body}\n{notes}"


def to_csv(table: Table) -> str:
    """Mean and deviation of every column, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for c in table.columns for name in (c.name, f"{c.name}, standard deviation")]
    writer.writerow([*table.labels, *names, "runs"])
    for row, cells in zip(table.rows, table.cells):
        numbers = [("" if math.isnan(v) else repr(v)) for cell in cells for v in (cell.mean, cell.deviation)]
        writer.writerow([*row.labels, *numbers, max(len(cell.runs) for cell in cells)])
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    escapes = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", ">": "$>$", "`": ""}

    def tex(text: str) -> str:
        return "".join(escapes.get(character, character) for character in text)

    header = [*table.labels, *(column.name for column in table.columns)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(table.caption())}}}",
        rf"\label{{tab:{table.name}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.labels)}{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join(map(tex, header)) + r" \\", r"\midrule"]
    for i, row in enumerate(table.grid(r"\textbf{{{}}}")):
        if i and table.rows[i].group != table.rows[i - 1].group:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(tex, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def trace(tables: Iterable[Table], root: Path) -> str:
    """cells.csv: where every number comes from; values and runs in the same order, separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "column", "metric", "values", "runs"])
    for table in tables:
        for row, cells in zip(table.rows, table.cells):
            for column, cell in zip(table.columns, cells):
                folders = [run.folder.relative_to(root).as_posix() for run in cell.runs]
                values = " ".join(f"{value:.9g}" for value in cell.values)
                writer.writerow(
                    [table.name, ", ".join(row.labels), column.name, cell.path, values, " ".join(folders)]
                )
    return text.getvalue()


def seeds_table(runs: Sequence[dict]) -> str:
    """Mean and standard deviation over seeds of runs alike in all else: test split, last task."""
    many = [item.name for item in dataclasses.fields(Config) if item.metadata.get("many")]
    changes = [key for key in many if len({str(m["config"][key]) for m in runs}) > 1]
    differ = [key for key in changes if key != "seed"] or ["scenario"]
    groups: dict[tuple, list[dict]] = {}
    for m in runs:
        groups.setdefault(tuple(str(m["config"][key]) for key in differ), []).append(m)
    continual = ["forgetting", "backward_transfer", "forward_transfer"]
    rows = []
    for names, group in groups.items():
        columns = [[m["zero_shot"]["test"]["auroc_macro"] for m in group]]
        columns += [[stages(m)[-1][1][key] for m in group] for key in ("auroc_macro", "f1_macro", "accuracy")]
        columns += [[m["continual"][key] for m in group] for key in continual]
        spread = [np.array(column, dtype=float) for column in columns]
        deviation = [f" ± {v.std(ddof=1):.3f}" if len(v) > 1 else "" for v in spread]
        text = ["-" if np.isnan(v).any() else f"{v.mean():.3f}{d}" for v, d in zip(spread, deviation)]
        rows.append([*names, len(group), *text])
    header = [*differ, "seeds", "zero-shot AUROC", "macro AUROC", "macro F1", "exact match", *continual]
    return markdown_table([name.replace("_", " ") for name in header], rows)


# --------------------------------------------------------------------------------------------- 3. Calibration


@functools.lru_cache(maxsize=1)
def _inputs(config: Config) -> tuple:
    encoder = DualEncoder.load(config.encoder, config.encoder_dir, crop=config.crop)
    data = load_radiographs(config)
    embeddings = embed(
        encoder, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
        precision=config.precision, store=config.store, device=pick_device(config.device),
        skip_bad_images=config.skip_bad_images,
    )  # fmt: skip
    return data, encoder, embeddings


def open_run(run: Run) -> tuple:
    """(config, data, embeddings [N, D] from the cache, prompt bank, model) of a finished run."""
    known = {item.name for item in dataclasses.fields(Config)}
    values = {key: value for key, value in run.metrics["config"].items() if key in known}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    config = Config(**values)
    names = [item.name for item in dataclasses.fields(Config)]
    shared = {name: values[name] for name in names[: names.index("scenario")]}
    data, encoder, embeddings = _inputs(Config(**shared))
    bank = embed_prompts(encoder, run.metrics["config"]["prompt_texts"])
    model = build_model(config, embeddings.shape[1], len(data.class_names)).eval()
    path = run.folder / "adaptors.safetensors"
    load_weights(model, load_tensors(path)[0], path)
    return config, data, embeddings, bank, model


def reliability(
    logits: np.ndarray, labels: np.ndarray, temperature: float, bins: int = 15
) -> dict[str, float]:
    """Expected calibration error and Brier score of sigmoid(logits / temperature), mean over classes.

    logits, labels: [N, C]. ECE: over bins of equal width, the share of images times
    |mean probability - share of positives| (Guo et al. 2017, for the finding's probability). nan labels are left
    out; so is a class without a known label.
    """
    ece, brier = [], []
    for c in range(labels.shape[1]):
        known = ~np.isnan(labels[:, c])
        y, p = (
            labels[known, c].astype(np.float64),
            1 / (1 + np.exp(-logits[known, c].astype(np.float64) / temperature)),
        )
        if not len(y):
            continue
        index = np.minimum((p * bins).astype(int), bins - 1)
        gaps = np.bincount(index, p, bins) - np.bincount(index, y, bins)
        ece.append(np.abs(gaps).sum() / len(y))
        brier.append(np.mean((p - y) ** 2))
    return {"ece": float(np.mean(ece)), "brier": float(np.mean(brier))}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [1e-3, 1e3] with the lowest cross-entropy; found to 1e-3 of its logarithm."""
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(labels)
    x, y = torch.from_numpy(logits[known]).double(), torch.from_numpy(labels[known]).double()

    def loss(log_temperature: float) -> float:
        return F.binary_cross_entropy_with_logits(x / math.exp(log_temperature), y).item()

    return math.exp(minimize_scalar(loss, bounds=(-6.9, 6.9), method="bounded", options={"xatol": 1e-3}).x)


@torch.inference_mode()
def calibration(run: Run) -> dict:
    """{"model", "zero_shot"} -> temperature, ECE and Brier score before and after; kept in the run's"
    " folder."""
    path = run.folder / "calibration.json"
    if path.exists() and path.stat().st_mtime >= (run.folder / "metrics.json").stat().st_mtime:
        return read_json(path)
    config, data, embeddings, bank, model = open_run(run)
    zero = RETune(embeddings.shape[1], adapt="none", pool=config.pool, negatives=config.negatives)
    result = {}
    for name, scorer in (("model", model), ("zero_shot", zero)):
        logits, labels = {}, {}
        for split in ("val", "test"):
            rows = data.where(split)
            logits[split] = scorer.logits(read_rows(embeddings, torch.from_numpy(rows)), bank).numpy()
            labels[split] = data.labels[rows]
        temperature = fit_temperature(logits["val"], labels["val"])
        before, after = (reliability(logits["test"], labels["test"], t) for t in (1.0, temperature))
        result[name] = {"temperature": temperature} | {f"{k}_before": v for k, v in before.items()}
        result[name] |= {f"{k}_after": v for k, v in after.items()}
    write_json(path, result)
    return result


# ------------------------------------------------------------------------------------------------- 4. Figures


def new_figure(columns: int, rows: int, width: float, height: float):
    """(figure, list of axes) without pyplot, which would keep every figure in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def save_figure(path: Path, figure) -> None:
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})


def average(values: Sequence):
    """Mean of equally built metrics: dictionaries and lists by element; None where a value is None."""
    first = values[0]
    if isinstance(first, dict):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [average(list(items)) for items in zip(*values)]
    if isinstance(first, int | float) and not isinstance(first, bool):
        return None if None in values else float(np.mean(values))
    return first


def task_heatmaps(runs: Sequence[Run], folder: Path) -> None:
    """Task x class AUROC and F1 of RE-tune, mean over seeds, for each scenario with several tasks."""
    for scenario in ("class", "label", "data"):
        chosen = choose(runs, **in_scenario(scenario))
        metrics = chosen[0].metrics | {
            key: average([run.metrics[key] for run in chosen]) for key in ("zero_shot", "after_task")
        }
        for key, title in (("auroc", "test AUROC"), ("f1", "test F1")):
            seeds = f", mean of {len(chosen)} seeds" if len(chosen) > 1 else ""
            heatmap(folder / f"{key}-{scenario}.png", metrics, key, f"{title}{seeds}")


# Line style, marker, place from dark to light: told apart in black and white, RE-tune the heaviest.
STYLES = {
    "retune": ("-", "o", None), "linear": ("--", "s", 0.15), "mlp": ("-.", "^", 0.4), "ewc": (":", "v", 0.55),
    "lwf": ((0, (5, 1, 1, 1, 1, 1)), "D", 0.7), "replay": ((0, (3, 3)), "P", 0.0), "joint": ("-", "x", 0.85),
}  # fmt: skip


def auroc_over_tasks(runs: Sequence[Run], folder: Path) -> None:
    """Macro AUROC after every task, a line per method with a band of one standard deviation over seeds."""
    import matplotlib

    figure, axes = new_figure(3, 1, 4.2, 4.0)
    for ax, scenario in zip(axes, ("class", "label", "data")):
        for method in METHODS:
            chosen = choose(runs, **in_scenario(scenario), method=method)
            measured = [[r.metrics["zero_shot"], *r.metrics["after_task"]] for r in chosen]
            auroc = np.array(
                [[m["test"]["auroc_macro"] for m in run] for run in measured], float
            )  # [seeds, T + 1]
            start = 0 if method == "retune" else 1  # the others have no zero-shot of their own
            x, mean = np.arange(start, auroc.shape[1]), auroc.mean(0)[start:]
            spread = auroc.std(0, ddof=1)[start:] if len(auroc) > 1 else np.zeros(len(mean))
            line, marker, place = STYLES[method]
            color = "black" if place is None else matplotlib.colormaps["viridis"](place)
            width = 2.4 if method == "retune" else 1.3
            ax.plot(
                x,
                mean,
                linestyle=line,
                marker=marker,
                color=color,
                linewidth=width,
                markersize=5,
                label=NAMES[method],
            )
            ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
        ax.set_title(SCENARIOS[scenario])
        ax.set_xlabel("tasks trained (0: zero-shot)")
        ax.set_xticks(range(auroc.shape[1]))
        ax.grid(color="0.9")
    axes[0].set_ylabel("macro AUROC, test")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(METHODS),
        handlelength=4,
        fontsize=8,
    )
    save_figure(folder / "auroc-over-tasks.png", figure)


@torch.inference_mode()
def tsne(runs: Sequence[Run], folder: Path, images: int = 600) -> None:
    """t-SNE of test images with at most one finding, before and after the image adaptor (joint, first"
    " seed)."""
    from sklearn.manifold import TSNE

    run = choose(runs, **in_scenario("joint"))[0]
    _, data, embeddings, _, model = open_run(run)
    rows = data.where("test")
    rows = rows[np.nansum(data.labels[rows], axis=1) <= 1]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:images])
    before = read_rows(embeddings, torch.from_numpy(rows))
    figure, axes = new_figure(2, 1, 5.2, 5.0)
    for ax, title, x in zip(
        axes, ("before: frozen encoder", "after: image adaptor"), (before, model.image_adaptor(before))
    ):
        perplexity = min(30, (len(rows) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(
            x.numpy()
        )
        scatter_classes(ax, points, data.labels[rows], data.class_names)
        ax.set(title=title, xticks=[], yticks=[])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    save_figure(folder / "tsne.png", figure)


def scatter_classes(ax, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """One marker and grey per finding; images without a finding as small light dots behind."""
    none = np.nansum(labels, axis=1) == 0
    ax.scatter(*points[none].T, s=8, color="0.8", label="no finding", zorder=1)
    for c, name in enumerate(class_names):
        chosen = labels[:, c] == 1
        style = {"marker": "osD^vP*Xp<>hd8"[c % 14], "s": 26, "linewidths": 0.7, "edgecolors": "black"}
        ax.scatter(*points[chosen].T, color=str(round(0.9 * (c % 5) / 4, 2)), label=name, zorder=2, **style)


@torch.inference_mode()
def prompt_cosines(runs: Sequence[Run], folder: Path) -> None:
    """Cosine of every prompt with every other before and after the text adaptor (joint, first seed)."""
    run = choose(runs, **in_scenario("joint"))[0]
    _, data, _, bank, model = open_run(run)
    size = min(7.5, max(4.5, 0.13 * len(bank.group) + 1.5))
    figure, axes = new_figure(2, 1, size, 0.85 * size)
    edges = np.flatnonzero(np.diff(bank.group.numpy() // 2)) + 0.5
    middles = [
        float(np.flatnonzero(bank.group.numpy() // 2 == c).mean()) for c in range(len(data.class_names))
    ]
    for ax, title, t in zip(
        axes,
        ("before: frozen encoder", "after: text adaptor"),
        (bank.embeddings, model.text_adaptor(bank.embeddings)),
    ):
        t = F.normalize(t, dim=-1)
        picture = ax.imshow((t @ t.T).numpy(), cmap="Greys", vmin=-1, vmax=1)
        for edge in edges:
            ax.axhline(edge, color="white", linewidth=1.5)
            ax.axvline(edge, color="white", linewidth=1.5)
        ax.set(title=title, xticks=[])
        ax.set_yticks(middles, data.class_names if ax is axes[0] else [""] * len(middles))
    axes[0].set_xlabel("within each class: positive prompts, then negative ones")
    figure.colorbar(picture, ax=axes, label="cosine similarity")
    save_figure(folder / "prompts.png", figure)


def draw_figures(runs: Sequence[Run], folder: Path) -> None:
    for draw in (task_heatmaps, auroc_over_tasks, tsne, prompt_cosines):
        draw(runs, folder)


# ------------------------------------------------------------------------------------ 5. README, command line

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OPEN = ("main", "forgetting")  # the README shows these at once; the others unfold


def readme_block(folder: Path) -> str:
    """The README's results between its markers, from the Markdown tables and a figure in `folder`."""
    parts = []
    for name in TABLES:
        text = (folder / f"{name}.md").read_text(encoding="utf-8").strip()
        parts.append(text if name in OPEN else f"<details><summary>{name}</summary>\n\n{text}\n\n</details>")
    parts.insert(
        1,
        f"![Test AUROC of every class after every task]({folder.as_posix()}/auroc-class.png)",
    )
    return "\n\n".join([BEGIN, *parts, END])


def write_readme(readme: Path, folder: Path) -> None:
    """Replace the block between the markers; InputError when the README has no markers."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{readme}: needs one line {BEGIN} and one line {END}, to write the results between")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_text(readme, head + readme_block(folder) + tail)


def write_table(table: Table, folder: Path) -> None:
    for suffix, render in ((".md", to_markdown), (".csv", to_csv), (".tex", to_latex)):
        write_text(folder / f"{table.name}{suffix}", render(table))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of the results; its runs are in <results>/runs")
    parser.add_argument("--only", nargs="+", choices=(*TABLES, "figures"), default=(*TABLES, "figures"))
    parser.add_argument("--readme", type=Path, help="README to write the results block of")
    arguments = parser.parse_args(argv)
    folder = arguments.results
    try:
        runs = find_runs(folder / "runs")
        tables = [TABLES[name](runs) for name in arguments.only if name in TABLES]
        for table in tables:
            write_table(table, folder)
            print(f"{to_markdown(table)}\nwritten to {folder / table.name}.md, .csv and .tex\n")
        if len(tables) == len(TABLES):
            write_text(folder / "cells.csv", trace(tables, folder))
            print(f"where every number comes from: {folder / 'cells.csv'}")
        if "figures" in arguments.only:
            draw_figures(runs, folder)
            print(f"figures written to {folder}")
        if arguments.readme:
            write_readme(arguments.readme, folder)
            print(f"results block of {arguments.readme} written")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
