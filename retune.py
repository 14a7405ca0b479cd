"""RE-tune: incremental fine-tuning of biomedical vision-language models for multi-label chest X-rays.

The whole method, as data flow: files -> embeddings -> adaptors -> scores -> report. With `prompts.json`
beside it, this file runs on a CSV of images and an encoder folder; its classes and functions can be copied.

    python retune.py --scenario data --epochs 5                       # embedded demo, nothing to download
    python retune.py --data csv --data-dir my_xrays --encoder biomedclip --scenario class  # your own images
    python retune.py --predict a.png b.png --run runs/NAME            # score images with a run's adaptors

Reference: Mistretta & Bagdanov, "RE-tune: Incremental Fine Tuning of Biomedical Vision-Language Models for
Multi-label Chest X-ray Classification", arXiv 2410.17827. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------ 1. Settings


def setting(default, help: str, **metadata):
    """A dataclass field that becomes a command-line option; metadata: choices, type, nargs, flag, group."""
    return field(default=default, metadata={"help": help, **metadata})


def number_or_column(text: str) -> int | str:
    """What --parts takes."""
    return text if text == "column" else int(text)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The command line is made from it; what is None here is decided by the data."""

    # fmt: off
    data: str = setting("demo", "data set", group="data",
                        choices=("demo", "csv", "nih", "chexpert", "mimic", "chestmnist"))
    data_dir: str | None = setting(None, "folder of the data set; chestmnist is downloaded to it")
    labels_csv: str | None = setting(None, "label file instead of the data set's own")
    classes: tuple[str, ...] | None = setting(None, "findings, in order (see docs/data.md)", nargs="+")
    view: str = setting("all", "views to use", choices=("all", "frontal", "lateral", "pa", "ap"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(None, "what a blank label becomes (csv: ignore)", choices=("zero", "ignore"))
    size: int = setting(224, "image side, for chestmnist", choices=(28, 64, 128, 224))
    demo_images: int = setting(6000, "number of phantoms in the demo")
    skip_bad_images: bool = setting(False, "leave out unreadable images, and count them, instead of stopping")

    encoder: str = setting("tiny", "tiny, biomedclip, biovil[-t], a folder, a hub id", group="encoder")
    encoder_dir: str | None = setting(None, "folder of the encoder's files as published: no network")
    crop: int | None = setting(None, "centre crop of BioViL (RE-tune: 512; its own: 480)", type=int)
    precision: str = setting("fp32", "arithmetic of the encoder", choices=("fp32", "bf16", "fp16"))
    encode_batch: int = setting(32, "images per batch of the encoder")
    workers: int = setting(min(8, max(0, (os.cpu_count() or 1) - 2)), "processes that decode images")
    cache_dir: str = setting("runs/cache", "folder of the embedding cache")

    scenario: str = setting("data", "how training data arrive", group="scenario",
                            choices=("data", "class", "label", "joint", "zero"))
    parts: int | str | None = setting(None, "parts (5, or one per class), or `column`", type=number_or_column)
    part_order: tuple[str, ...] | None = setting(None, "order of --parts column (the file's)", nargs="+")
    class_order: tuple[str, ...] | None = setting(None, "order of arrival, or `random` by seed", nargs="+")
    contiguous: bool = setting(False, "cut parts in file order, as the authors do, instead of by patient")
    positives_only: bool = setting(False, "class, label: train on all positives of the new class only")

    method: str = setting("retune", "retune, a method of experiments/, or MODULE:CLASS", group="method")
    set: tuple[str, ...] = setting((), "as --method NAME --help lists", nargs="+", metavar="NAME=VALUE")
    whiten: bool = setting(False, "centre and half-whiten the image embeddings (ours)")
    adaptor: str = setting("mlp", "the paper's is mlp, ours residual", choices=("mlp", "linear", "residual"))
    adapt: str = setting("both", "towers that get an adaptor", choices=("both", "shared", "image", "text"))
    pool: str = setting("mean", "how a class's prompts join", choices=("mean", "single", "max"))
    negatives: bool = setting(True, "train and score with positive prompts alone", flag="--no-negatives")
    score: str = setting("diff", "score for AUROC; diff is the loss's", choices=("diff", "pos"))
    logit_scale: float = setting(1.0, "factor on the logits (authors: none)")
    prompts: str = setting(str(HERE / "prompts.json"), "file of positive and negative prompts")
    wording: str = setting("specific", "generic: templates for all", choices=("specific", "generic"))

    epochs: int = setting(10, "epochs per task (authors: 10)", group="training")
    lr: float | None = setting(None, "learning rate (authors: 1e-4; small sets: 1e-3)", type=float)
    batch_size: int | None = setting(None, "batch size (authors: 6144; small sets: 64)", type=int)
    optimizer: str = setting("adam", "optimiser, one for all tasks", choices=("adam", "sgd"))
    threshold: str = setting("youden", "thresholds, from validation: youden, f1 or sensitivity=0.95 (ours)")
    seed: int = setting(27, "seed; several give mean and standard deviation", nargs="+")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    output: str = setting("runs/{data}-{encoder}-{scenario}-seed{seed}", "folder; {any setting} works")
    figures: bool = setting(True, "draw no figures", flag="--no-figures")
    # fmt: on

    def __post_init__(self):
        positive = "demo_images encode_batch parts epochs batch_size lr logit_scale"
        check_values(self, positive, lambda value: value == "column" or 0 < value < math.inf, "be positive")
        rule = re.compile(r"youden|f1|sensitivity=(0?\.\d+|1(\.0*)?)")
        check_values(self, "threshold", rule.fullmatch, "be youden, f1 or sensitivity=0.95")
        check_values(self, "seed workers", lambda value: 0 <= value < 2**32, "be from 0 to 4294967295")
        if self.data == "demo" and (files := self.data_dir or self.labels_csv):
            raise InputError(f"{files}: the demo has no --data-dir, --labels-csv; say which --data it is")
        if self.part_order and self.parts != "column":
            raise InputError(f"--part-order {' '.join(self.part_order)} goes with --parts column")

    @property
    def root(self) -> Path:
        """The data set's folder, which must exist."""
        if not os.path.isdir(self.data_dir or ""):
            raise InputError(f"--data {self.data}: --data-dir {self.data_dir} is not a folder")
        return Path(self.data_dir)


SMALL_SET = 20_000  # the authors' settings apply from this many training images on
MAY_DIFFER = (  # when a run is resumed; of --prompts and --set the contents are compared
    "data_dir", "output", "cache_dir", "device", "workers", "encode_batch", "encoder_dir", "prompts",
    "figures", "skip_bad_images", "set",
)  # fmt: skip


def resolve_defaults(config: Config, data: Radiographs) -> Config:
    """Fill in what the data decide: learning rate and batch size by size, a random class order by seed."""
    order = config.class_order
    if order == ("random",):
        shuffled = np.random.default_rng(config.seed).permutation(len(data.class_names))
        order = tuple(data.class_names[c] for c in shuffled)
    small = len(data.where("train")) < SMALL_SET
    # (ours) a small set needs a larger rate and more steps
    lr = config.lr or (1e-3 if small else 1e-4)
    batch_size = config.batch_size or (64 if small else 6144)
    return dataclasses.replace(config, class_order=order, lr=lr, batch_size=batch_size)


# ------------------------------------------------------------------------------------------------- 2. Prompts


def load_prompts(path: Path, class_names: Sequence[str], wording: str = "specific") -> dict[str, dict]:
    """Positive and negative prompts of every class, {class: {"positive": [...], "negative": [...]}}.

    The JSON file maps a finding to such a pair or a synonym; "default" holds templates with `{finding}` for
    all others, or for all (`wording="generic"`, ours). Case, `_` and `-` do not matter. The texts are ours.
    """

    def plain(name: str) -> str:
        return re.sub("[_-]", " ", name).lower().strip()

    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object of findings")
    entries = {plain(name): entry for name, entry in content.items()}
    prompts = {}
    for name in class_names:
        entry = entries.get("default" if wording == "generic" else plain(name), entries.get("default"))
        entry = entries.get(plain(entry)) if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise InputError(f"{path}: finding {name!r} has no prompts, 'default' no templates; add either")
        prompts[name] = {}
        for polarity in ("positive", "negative"):
            texts = entry.get(polarity)
            good = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
            if not good or not texts:
                raise InputError(f"{path}: {polarity!r} of {name!r} must be a list of texts, at least one")
            prompts[name][polarity] = [text.replace("{finding}", plain(name)) for text in texts]
    return prompts


# --------------------------------------------------------------------------------------------- 3. Radiographs

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the patients where a data set has no splits
GROUPS = ("view", "sex", "age", "part")  # what a data set may know about its images; never a finding


@dataclass
class Radiographs:
    """A data set: N images with the labels of C findings.

    images: paths, or uint8 [N, H, W] (an array, or a sequence that draws each [H, W] on demand).
    labels: float32 [N, C], 1 / 0 / nan; nan is unknown: never trained on, never scored.
    patients, split: [N] texts; split is "train", "val" or "test". names: [N], what reports call an image.
    rows: [N], where the labels stand ("labels.csv row 7"). reports, view, sex, age, part: [N] if known.
    note: what the loader decided, for the user to read. key: identifies images that are not files.
    """

    images: Sequence
    labels: np.ndarray
    class_names: Sequence[str]
    patients: Sequence[str]
    split: Sequence[str]
    names: Sequence[str] = ()
    rows: Sequence[str] = ()
    reports: Sequence[str] | None = None
    note: str = ""
    key: str | None = None
    view: Sequence[str] | None = None
    sex: Sequence[str] | None = None
    age: Sequence[str] | None = None
    part: Sequence[str] | None = None

    def __post_init__(self):
        n = len(self.images)
        self.labels = np.asarray(self.labels, np.float32)
        self.patients = np.asarray(self.patients, str)
        self.split = np.asarray(self.split, "<U10")
        self.names = list(self.names) or [f"image-{i:06d}" for i in range(n)]
        self.rows = list(self.rows) or [f"row {i + 2}" for i in range(n)]
        lengths = {len(values) for values in (self.patients, self.split, self.names, self.rows)}
        if lengths != {n} or self.labels.shape != (n, len(self.class_names)):
            raise InputError(f"labels {self.labels.shape}, columns of {lengths} rows do not fit {n} images")
        if not (np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)).all():
            raise InputError("labels must be 1, 0 or nan")

    def where(self, split: str) -> np.ndarray:
        """Rows of one split, int64, in file order."""
        return np.flatnonzero(self.split == split)


def patient_split(patients: Sequence[str], shares: dict[str, float]) -> np.ndarray:
    """The split of every image [N] by a hash of its patient id, so that new patients never move old ones."""
    edges = np.cumsum(list(shares.values()))[:-1]
    patients = list(map(str, patients))
    ids = list(dict.fromkeys(patients))
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in ids)
    position = np.frombuffer(digests, ">u8") / 2**64
    split = np.array(list(shares))[np.searchsorted(edges, position, side="right")]
    home = dict(zip(ids, split.tolist()))
    return np.array([home[patient] for patient in patients])


def read_table(path: str | Path, required: Sequence[str] = (), optional: Sequence[str] | None = None):
    """A CSV (or .gz) as a pandas frame of texts whose index says where a row stands: "labels.csv row 7".

    With `optional` no columns are read but the required ones and those.
    """
    import pandas

    with input_errors(path, "not a readable CSV"):
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rb") as file:
            content = file.read().rstrip()
        first = content.partition(b"\n")[0].decode("utf-8-sig")
        header = [name.strip() for name in next(csv.reader([first]), [])]
        n = content.count(b"\n")
        if b'"' in content or content.count(b",") != (n + 1) * (len(header) - 1):  # row by row, which is slow
            widths = [len(fields) for fields in csv.reader(io.StringIO(content.decode("utf-8-sig")))]
            n = len(widths) - 1
            if wrong := [i for i, width in enumerate(widths) if width != len(header)]:
                fields = f"{widths[wrong[0]]} fields where the header has {len(header)}"
                raise ValueError(f"row {wrong[0] + 1}: {fields}")
        if len(header) == 1 and (mark := re.search("[;\t|]", header[0])):
            raise ValueError(f"fields are separated by {mark[0]!r}; save it with commas")
        if n < 1:
            raise ValueError("the table has a header and no rows" if header else "the file is empty")
        if duplicated := [name for name in header if header.count(name) > 1]:
            raise ValueError(f"column {duplicated[0]!r} is duplicated")
        # index_col: a row that is too long is an error, not an index
        options = {"header": 0, "skip_blank_lines": False, "keep_default_na": False, "index_col": False}
        options["usecols"] = [name for name in header if optional is None or name in (*required, *optional)]
        table = pandas.read_csv(io.BytesIO(content), names=header, dtype=str, **options)
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {missing[0]!r}; the columns are {', '.join(header)}")
    table.index = [f"{path} row {i + 2}" for i in range(len(table))]
    return table


def refuse_row(table, bad: np.ndarray, reason: str, column: str = "") -> None:
    """InputError for the first row [N] of a frame that is bad, with its value of a column."""
    if np.any(bad):
        i = int(np.argmax(bad))
        value = f"{column} {table[column].iloc[i]!r} " if column else ""
        raise InputError(f"{table.index[i]}: {value}{reason}")


def label_values(column) -> np.ndarray:
    """A column of texts as [N] numbers: 1, 0, -1 (uncertain), nan (blank), infinity (not a label)."""
    words = {"true": "1", "yes": "1", "false": "0", "no": "0", "": "nan"}
    codes, texts = column.factorize()
    plain = [words.get(text.strip().lower(), text.strip().lower()) for text in texts]
    values = [float(text) if re.fullmatch(r"nan|-?[01](\.0*)?", text) else math.inf for text in plain]
    return np.array(values, np.float32)[codes]


def parse_labels(table, classes: Sequence[str], uncertain: str, blank: str) -> tuple[np.ndarray, str]:
    """Label columns as float32 [N, C], and a note that counts what -1 and blank labels became.

    uncertain: ones | zeros | ignore (CheXpert's U-Ones, U-Zeros, U-Ignore); blank: zero | ignore.
    """
    labels = np.stack([label_values(table[name]) for name in classes], axis=1)
    for name, values in zip(classes, labels.T):
        reason = "is not 1, 0, -1, blank; --classes says which columns are findings"
        refuse_row(table, np.isinf(values), reason, name)
    is_blank = np.isnan(labels)
    is_uncertain = labels == -1
    policy = {"ones": 1, "zeros": 0, "zero": 0, "ignore": math.nan}
    labels[is_blank] = policy[blank]
    labels[is_uncertain] = policy[uncertain]
    counts = f"{is_uncertain.sum():,} uncertain (-1) -> {uncertain}, {is_blank.sum():,} blank -> {blank}"
    return labels, f"labels: {counts}"


def check_classes(config: Config, known: Sequence[str]) -> list[str]:
    """--classes, each of which must be known; empty without it."""
    chosen = list(config.classes or ())
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"--classes {unknown[0]!r}: {suggest(unknown[0], known)}")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--classes {' '.join(chosen)}: a name is duplicated")
    return chosen


def from_table(table, labels: np.ndarray, classes: Sequence[str], config: Config, note: str) -> Radiographs:
    """The data set of a frame with `path`, `name`, `patient`, `split` and, if known, GROUPS and `report`."""
    if config.view != "all" and "view" in table:
        views = {"frontal": ["frontal", "pa", "ap"], "lateral": ["lateral", "ll"]}
        wanted = table["view"].str.lower().isin(views.get(config.view, [config.view])).to_numpy()
        if not wanted.any():
            raise InputError(f"--view {config.view}: the views are {', '.join(sorted(set(table['view'])))}")
        note += f"; left out {(~wanted).sum():,} images of other views"
        table = table[wanted]
        labels = labels[wanted]
    root = os.path.abspath(config.root)
    paths = table["path"].tolist()
    images = [path if path[0] == os.sep else os.path.join(root, path) for path in paths]
    columns = (table[name].tolist() for name in ("patient", "split", "name"))
    known = {name: table[name].tolist() for name in GROUPS if name in table}
    reports = table["report"].tolist() if "report" in table else None
    return Radiographs(images, labels, classes, *columns, table.index.tolist(), reports, note, **known)


def load_demo(config: Config) -> Radiographs:
    """Synthetic radiographs of `demo/phantoms.py`, drawn when needed. Numbers on them are not clinical."""
    with input_errors("demo/phantoms.py", "needed for --data demo"):
        from demo import phantoms
    demo = phantoms.make_phantoms(config.demo_images, seed=0, domain="demo")
    names = [f"phantom-{i:06d}" for i in range(len(demo))]
    key = f"{config.demo_images} phantoms of {file_checksum(phantoms.__file__)}"
    note = "DEMO: synthetic phantoms, not patients; these numbers say nothing about clinical performance."
    columns = (demo.class_names, demo.patients, patient_split(demo.patients, SHARES), names)
    return Radiographs(demo.images, demo.labels, *columns, reports=demo.reports, note=note, key=key)


def load_csv(config: Config) -> Radiographs:
    """A CSV: `path`, a column per finding (1/0/-1/blank), optional `patient`, `split`, `report`, GROUPS.

    Paths are absolute or relative to --data-dir, whose only CSV is read unless --labels-csv is given. Without
    `split`: 70/10/20% of the patients by hash. Without `patient` each image counts as a patient of its own.
    """
    path = config.labels_csv or only_file(config.root, "*.csv")
    table = read_table(path, ["path"])
    known = ("path", "patient", "split", "report", *GROUPS)
    table = table.rename(columns={name: name.lower() for name in table if name.lower() in known})
    if table.columns.has_duplicates:
        raise InputError(f"{path}: a column of {', '.join(known)} is duplicated, in upper and lower case")
    values = {name: label_values(table[name]) for name in table if name not in known}
    # a column mostly of labels is a finding, so that its misspelt label is refused below
    findings = [name for name, v in values.items() if np.isinf(v).sum() <= np.isfinite(v).sum() > 0]
    classes = check_classes(config, list(table)) or findings
    if not classes:
        raise InputError(f"{path}: no column holds labels ({', '.join(values)}); --classes names findings")
    labels, note = parse_labels(table, classes, config.uncertain, config.blank or "ignore")
    if len(findings) < len(values) and not config.classes:
        left_out = [repr(name) for name in values if name not in findings]
        note += f"; left out columns that hold no labels: {', '.join(left_out)}"
    for name in table.columns.intersection(known):
        table[name] = table[name].str.strip()
    if "patient" not in table:
        if alike := [name for name in values if re.search("patient|subject", name.lower())]:
            raise InputError(f"{path}: if {alike[0]!r} says whose image it is, name the column `patient`")
        table["patient"] = table["path"]
        note += "; no `patient` column: each image counts as a patient of its own"
    if "split" not in table:
        table["split"] = patient_split(table["patient"], SHARES)
    for name in ("path", "patient", "split"):
        refuse_row(table, table[name] == "", "is blank", name)
    refuse_row(table, ~table["split"].isin(list(SHARES)), "is not train, val or test", "split")
    return from_table(table.assign(name=table["path"]), labels, classes, config, note)


def only_file(root: Path, pattern: str) -> Path:
    """The only file of `root` that matches the pattern."""
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise InputError(f"{root}: {len(found)} files match {pattern}; name the label file with --labels-csv")
    return found[0]


NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices",
)  # fmt: skip
COMPETITION_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def load_nih(config: Config) -> Radiographs:
    """NIH ChestX-ray14: 112,120 frontal images of 30,805 patients, 14 findings, each present (1) or not (0).

    Official lists; an eighth of the train_val patients, by hash, is for validation: ChestMNIST's 7:1:2.
    Wang et al., "ChestX-ray8", CVPR 2017. Free to use; cite the paper and link to the NIH's download page.
    """
    root = config.root
    path = config.labels_csv or only_file(root, "Data_Entry_2017*.csv")
    table = read_table(path, ["Image Index", "Finding Labels", "Patient ID"])
    table = table.rename(columns={"Image Index": "name", "Patient ID": "patient", "View Position": "view",
                                  "Patient Gender": "sex", "Patient Age": "age"})  # fmt: skip
    findings = table["Finding Labels"].str.get_dummies("|")
    unknown = findings.drop(columns=[*NIH_FINDINGS, "No Finding"], errors="ignore").any(axis=1)
    refuse_row(table, unknown, f"is not made of {', '.join(NIH_FINDINGS)}", "Finding Labels")
    labels = findings.reindex(columns=NIH_FINDINGS, fill_value=0).to_numpy()
    train, test = ((root / f"{name}_list.txt").read_text().split() for name in ("train_val", "test"))
    listed = table["name"].map(dict.fromkeys(train, "train") | dict.fromkeys(test, "test"))
    refuse_row(table, listed.isna(), "is in neither train_val_list.txt nor test_list.txt", "name")
    held_out = patient_split(table["patient"], {"train": 7 / 8, "val": 1 / 8})
    table["split"] = np.where(listed == "train", held_out, "test")
    folders = [folder for folder in (root / "images", *root.glob("images_*/images")) if folder.is_dir()]
    home = {name: str(folder.relative_to(root)) for folder in folders for name in os.listdir(folder)}
    table["path"] = [f"{home.get(name, 'images')}/{name}" for name in table["name"].tolist()]
    note = "nih: labels mined from reports; every finding that is not named counts as absent"
    return from_table(table, labels, NIH_FINDINGS, config, note)


def load_chexpert(config: Config) -> Radiographs:
    """CheXpert: 223,414 training images of 64,540 patients (191,027 frontal), 14 findings; -1 is uncertain.

    `train.csv` (or --labels-csv: VisualCheXbert, CheXbert), `valid.csv`, and `test_labels.csv` or, by study,
    `groundtruth.csv`; without either, `valid.csv` is the test set and 1/20 of the training patients validate.
    Irvin et al., AAAI 2019. Stanford's research use agreement; neither images nor labels may be passed on.
    """
    import pandas

    # an archive is CheXpert-v1.0[-small] or a batch of it; some batches hold patients without `train`
    root = config.root.absolute()
    folders = [*sorted(root.glob("CheXpert-v1.0*")), root / "test", root]
    home = dict.fromkeys(("train", "valid", "test"), str(root))
    home |= {name: str(folder) for folder in folders if folder.is_dir() for name in os.listdir(folder)}
    owners = [folder.name for folder in folders if (folder / "train.csv").is_file()]
    if len(owners) > 1 and root.name not in owners:
        raise InputError(f"{root}: train.csv is in {' and '.join(owners)}; give one as --data-dir")
    files = {"train": config.labels_csv or f"{home.get('train.csv', root)}/train.csv"}
    files["val"] = f"{home.get('valid.csv', root)}/valid.csv"
    test = [f"{home[name]}/{name}" for name in ("test_labels.csv", "groundtruth.csv") if name in home]
    files["test"] = test[0] if test else files.pop("val")
    classes = config.classes or COMPETITION_FINDINGS
    tables = [chexpert_table(path, classes, home).assign(split=split) for split, path in files.items()]
    cut = ""
    if not test:
        cut = "; no test labels, so valid.csv is the test set and val is cut from train by patient"
        tables[0]["split"] = patient_split(tables[0]["patient"].tolist(), {"train": 0.95, "val": 0.05})
    table = pandas.concat(tables)
    labels, note = parse_labels(table, classes, config.uncertain, config.blank or "zero")
    return from_table(table, labels, classes, config, note + cut)


def chexpert_table(path: str, classes: Sequence[str], home: dict[str, str]):
    """A CheXpert table, a row per image; `home` says which folder holds a split, or a batch's patient."""
    column = "Study" if Path(path).name == "groundtruth.csv" else "Path"
    groups = ["Sex", "Age", "Frontal/Lateral", "AP/PA"]
    table = read_table(path, [column, *classes], groups)
    places = table[column].tolist()
    split = next((name for name in ("train", "valid", "test") if f"{name}/" in places[0]), "train")
    archive = places[0].partition(f"{split}/")[0]  # whatever name it has
    names = [place[len(archive) :] for place in places]
    cut = len(split)
    ends = [name.find("/", cut + 1) for name in names]  # of the patient's name
    bad = np.array([end < 0 or not name.startswith(split) for name, end in zip(names, ends)])
    refuse_row(table, bad, f"is not {archive}{split}/<patient>/<study>/<image>", column)
    patients = [name[cut + 1 : end] for name, end in zip(names, ends)]
    folder = f"{home[split]}/{split}"
    paths = [home.get(patient, folder) + name[cut:] for patient, name in zip(patients, names)]
    table = table.reindex(columns=[*classes, *groups], fill_value="")
    table.columns = [*classes, "sex", "age", "view", "fine"]
    table = table.assign(name=names, patient=patients, path=paths)
    if column == "Study":  # a row stands for each image in the study's folder
        images = [[image.name for image in sorted(Path(path).glob("*.jpg"))] for path in paths]
        refuse_row(table, np.array([not names for names in images]), "holds no .jpg of this study", "path")
        table = table.assign(image=images).explode("image")
        for name in ("name", "path"):
            table[name] += "/" + table["image"]
    if (table["view"] == "").all():  # VisualCheXbert has the view only in the file name: view1_frontal.jpg
        table["view"] = table["name"].str.extract(r"_(\w+)\.\w+$", expand=False).fillna("")
    fine = table.pop("fine")
    table["view"] = table["view"].mask(fine.isin(["AP", "PA"]), fine)
    return table


def load_mimic(config: Config) -> Radiographs:
    """MIMIC-CXR-JPG: 377,110 images of 227,835 studies of 65,379 patients, CheXpert's 14 findings per study.

    `mimic-cxr-2.0.0-chexpert.csv` (or --labels-csv: `-negbio`), `-split.csv`, `-metadata.csv`, also as .gz.
    Johnson et al., arXiv 1901.07042. PhysioNet's credentialed licence: no image or label may be passed on.
    """

    def release(kind: str) -> Path:
        path = config.root / f"mimic-cxr-2.0.0-{kind}.csv"
        return path if path.is_file() else path.with_suffix(".csv.gz")

    classes = config.classes or COMPETITION_FINDINGS
    studies = read_table(config.labels_csv or release("chexpert"), ["study_id", *classes])
    refuse_row(studies, studies["study_id"].duplicated(), "is duplicated", "study_id")
    labels, note = parse_labels(studies, classes, config.uncertain, config.blank or "zero")
    table = read_table(release("split"), ["dicom_id", "study_id", "subject_id", "split"])
    split = table["split"].map({"train": "train", "validate": "val", "test": "test"})
    refuse_row(table, split.isna(), "is not train, validate or test", "split")
    folder = "files/p" + table["subject_id"].str[:2] + "/p" + table["subject_id"] + "/s" + table["study_id"]
    table["path"] = folder + "/" + table["dicom_id"] + ".jpg"
    table = table.assign(split=split, name=table["path"], patient=table["subject_id"])
    if config.view != "all" or release("metadata").is_file():
        metadata = read_table(release("metadata"), ["dicom_id", "ViewPosition"])
        views = dict(zip(metadata["dicom_id"], metadata["ViewPosition"]))
        table["view"] = table["dicom_id"].map(views).fillna("")
    study = studies.set_index("study_id").index.get_indexer(table["study_id"])  # [N], -1 without labels
    note += f"; left out {table['study_id'][study < 0].nunique():,} studies without labels"
    return from_table(table[study >= 0], labels[study[study >= 0]], classes, config, note)


CHESTMNIST = "https://zenodo.org/records/10519652/files/{}?download=1"
CHESTMNIST_MD5 = {
    28: "02c8a6516a18b556561a56cbdd36c4a8", 64: "9de6cd0b934ebb5b7426cfba5efbae16",
    128: "db107e5590b27930b62dbaf558aebee3", 224: "45bd33e6f06c3e8cdb481c74a89152aa",
}  # fmt: skip


def load_chestmnist(config: Config) -> Radiographs:
    """ChestMNIST: ChestX-ray14 at 28 to 224 pixels: 78,468 train, 11,219 val, 22,433 test; 14 findings.

    Read from --data-dir or downloaded to --cache-dir, and unpacked there: memory does not grow with --size.
    Yang et al., "MedMNIST v2", Scientific Data 2023. CC BY 4.0.
    """
    from torchvision.datasets.utils import download_url

    folder = config.root if config.data_dir else Path(config.cache_dir)
    path = folder / ("chestmnist.npz" if config.size == 28 else f"chestmnist_{config.size}.npz")
    with input_errors(path, f"not ChestMNIST at {config.size} pixels; put the published file there"):
        if not path.exists():
            download_url(CHESTMNIST.format(path.name), folder, path.name, CHESTMNIST_MD5[config.size])
        key = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        unpacked = Path(config.cache_dir) / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with locked(unpacked.parent, wait=True):
            if not unpacked.exists():
                with atomic(unpacked) as partial:
                    shutil.unpack_archive(path, partial, "zip")
        images = [np.load(unpacked / f"{part}_images.npy", "r", allow_pickle=False) for part in SHARES]
        labels = [np.load(unpacked / f"{part}_labels.npy", allow_pickle=False) for part in SHARES]
        if any(x.dtype != np.uint8 or x.shape[1:] != (config.size, config.size) for x in images):
            raise ValueError(f"images are {[(x.dtype, x.shape) for x in images]}")
        split = np.repeat(list(SHARES), [len(y) for y in labels])
        names = [f"{part}-{i:06d}" for i, part in enumerate(split)]
        note = "chestmnist: official split; no patient ids, so each image counts as a patient of its own"
        columns = (np.concatenate(labels), NIH_FINDINGS, names, split, names)
        return Radiographs(torch.utils.data.ConcatDataset(images), *columns, note=note, key=key)


DATASETS: dict[str, Callable[[Config], Radiographs]] = {
    "demo": load_demo, "csv": load_csv, "nih": load_nih, "chexpert": load_chexpert, "mimic": load_mimic,
    "chestmnist": load_chestmnist,
}  # fmt: skip


def load_radiographs(config: Config) -> Radiographs:
    """The data set that `config` names, with its chosen classes; refuses what would falsify a result."""
    data = DATASETS[config.data](config)
    if config.view != "all" and data.view is None:
        raise InputError(f"--view {config.view}: {config.data} does not name the views of its images")
    wanted = tuple(check_classes(config, data.class_names) or data.class_names)
    columns = [list(data.class_names).index(name) for name in wanted]
    data = dataclasses.replace(data, labels=data.labels[:, columns], class_names=wanted)
    paths = data.images if isinstance(data.images, list) else data.names
    written = "\n".join(data.names)
    if "//" in written or "./" in written:  # else there is nothing to normalise, which is slow
        paths = list(map(os.path.normpath, paths))
    if len(set(paths)) < len(paths):
        last = dict(zip(paths, range(len(paths))))
        i = next(i for i, path in enumerate(paths) if last[path] != i)
        raise InputError(f"{data.rows[last[paths[i]]]}: image {data.names[i]!r} is also in {data.rows[i]}")
    split = data.split.tolist()
    patients = data.patients.tolist()
    home = dict(zip(reversed(patients), reversed(split)))  # of a patient's first image
    first = list(map(home.get, patients))
    if first != split:
        i = next(i for i, known in enumerate(first) if known != split[i])
        raise InputError(f"{data.rows[i]}: patient {patients[i]!r} is in {first[i]} and in {split[i]}")
    check_splits(data)
    return data


def check_splits(data: Radiographs) -> None:
    """InputError that names a split without images, or training images without any label."""
    if empty := [split for split in SHARES if not (data.split == split).any()]:
        count = f"patients: {len(np.unique(data.patients)):,}"
        raise InputError(f"the {empty[0]} split has no readable images; {count}; add some, or a split")
    if np.isnan(data.labels[data.where("train")]).all():
        raise InputError(f"no training image has a known label of {', '.join(data.class_names)}")


IMAGE_FILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")


def list_images(paths: Sequence[str]) -> list[str]:
    """Paths of images: as given, anywhere in a folder, or in a CSV's column `path`, relative to the CSV."""
    found = []
    for path in paths:
        if path.lower().endswith(".csv"):
            table = read_table(path, ["path"])
            names = table["path"].str.strip()
            refuse_row(table, names == "", "is blank", "path")
            found += [os.path.join(os.path.dirname(path), name) for name in names.tolist()]
        elif os.path.isdir(path):
            files = (f"{at}/{name}" for at, _, names in os.walk(path, followlinks=True) for name in names)
            found += sorted(file for file in files if file.lower().endswith(IMAGE_FILES))
        else:
            found.append(path)
    if not found:
        raise InputError(f"{', '.join(paths)}: no images ({', '.join(IMAGE_FILES)})")
    return found


def read_image(path: str | Path) -> torch.Tensor:
    """Decode a PNG, JPEG, TIFF or DICOM file to uint8 [1 or 3, H, W]; InputError when it is not one.

    More than 8 bits are scaled by the image's own range: 12-bit images come in 16-bit files. No alpha.
    """
    from PIL import Image, ImageOps

    is_dicom = Path(path).suffix.lower() in (".dcm", ".dicom")
    if is_dicom and importlib.util.find_spec("pydicom") is None:
        # no InputError, since --skip-bad-images must not leave out what only lacks a package
        raise OSError(f"{path}: DICOM is read with pydicom: pip install pydicom")
    with input_errors(path, "not a readable PNG, JPEG, TIFF or DICOM image"):
        if is_dicom:
            return read_dicom(path)
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            if image.format == "TIFF" and image.n_frames > 1:
                raise ValueError(f"it holds {image.n_frames} pages")
            deep = image.mode[0] in "IF"
            if not deep and ";16" in str(image.tile):  # Pillow would keep the upper 8 bits alone
                raise ValueError("its 16 bits are of colour or with alpha; save it as 16-bit grey")
            white_is_zero = deep and image.format == "TIFF" and image.tag_v2.get(262) == 0
            ImageOps.exif_transpose(image, in_place=True)
            if deep:
                return stretch(np.array(image, np.float32) * (-1 if white_is_zero else 1))
            pixels = np.array(image.convert("L" if image.mode in ("L", "LA", "1") else "RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def stretch(pixels: np.ndarray) -> torch.Tensor:
    """Scale an image [H, W] by its own range to uint8 [1, H, W], 0..255; a constant image becomes 0."""
    if not np.isfinite(pixels).all():
        raise ValueError("its pixels are not all numbers")
    pixels = torch.from_numpy(pixels)[None]
    low, high = pixels.aminmax()
    return ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)


def read_dicom(path: str | Path) -> torch.Tensor:
    """One grey DICOM frame as uint8 [1, H, W]: modality LUT, window or VOI LUT; MONOCHROME1 is inverted."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    image = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(image.pixel_array, image), image, index=0).astype(np.float32)
    if values.ndim != 2:
        raise ValueError(f"pixels of shape {values.shape}; one grey frame is read")
    return stretch(-values if image.get("PhotometricInterpretation") == "MONOCHROME1" else values)


# ----------------------------------------------------------------------------------------- 4. Frozen encoders


def transform_image(image: torch.Tensor, resize, crop, interpolation, mean, std) -> torch.Tensor:
    """uint8 image [1 or 3,H,W] -> normalised float pixels [3,h,w]; a single channel is repeated to three.

    resize: shorter side or [height, width], antialiased and rounded to uint8 as PIL does; crop: side or None.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    size = [resize] if isinstance(resize, int) else list(resize)
    image = functional.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    image = image if crop is None else functional.center_crop(image, [crop, crop])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (image / 255 - mean) / std  # [1 or 3,h,w] - [3,1,1] -> [3,h,w]


class Normalize(nn.Module):
    """Scale the last dimension to unit length."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=-1)


POOLS = ("cls", "mean", "last", "pooler", "pre_norm_mean", "none")
LAYERS = {layer.__name__: layer for layer in (
    nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, nn.GELU, nn.AdaptiveAvgPool2d, nn.Flatten,
    nn.Unflatten, nn.TransformerEncoderLayer, Normalize)}  # fmt: skip


class Tower(nn.Module):
    """Pixels [B,3,H,W], or tokens and their mask [M,T], -> embeddings [B or M,D]: a tower, a pool and a head.

    `config`: config.json's "image" or "text". Pools: the CLS token, the mean of the tokens or of the map, the
    last token, the model's own, CLEFT's mean before the last norm, or none: the head sees it all.
    """

    def __init__(self, config: dict):
        super().__init__()
        model = config["model"]
        self.pool = config["pool"]
        if unknown := {name for name, _ in config["head"]} - set(LAYERS) | {self.pool} - set(POOLS):
            raise InputError(f"encoder config: unknown {unknown}; pools: {POOLS}, head layers: {[*LAYERS]}")
        self.head = nn.Sequential(*(LAYERS[name](**options) for name, options in config["head"]))
        if config.get("library") == "torchvision":
            from torchvision.models import get_model
            from torchvision.models.feature_extraction import create_feature_extractor

            nodes = {model["node"]: "last_hidden_state"}
            self.tower = create_feature_extractor(get_model(model["name"]), nodes)
            return
        import transformers

        settings = transformers.AutoConfig.for_model(**model)
        self.tower = getattr(transformers, type(settings).__name__.removesuffix("Config") + "Model")(settings)
        if self.pool != "pooler" and "pooler.dense.weight" in self.tower.state_dict():
            self.tower.pooler = None  # BERT's and ViT's: not used, and the published checkpoints lack it

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self.pool == "pre_norm_mean":
            options["output_hidden_states"] = True
        output = self.tower(inputs, **options)
        if self.pool == "pooler":
            return self.head(output["pooler_output"])
        # tokens [B,T,H], or the map [B,H,h,w] of a convolutional tower
        x = output["hidden_states"][-1] if self.pool == "pre_norm_mean" else output["last_hidden_state"]
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "last":
            x = x[torch.arange(len(x), device=x.device), attention_mask.sum(1) - 1]
        elif self.pool == "mean" and attention_mask is not None:
            x = (x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        elif self.pool != "none":
            x = x.mean(1) if x.ndim == 3 else x.mean((2, 3))
        return self.head(x)


class DualEncoder(nn.Module):
    """A frozen image tower and text tower of one dimension, with their tokenizer and image transform."""

    def __init__(self, config: dict, tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.dim = config["dim"]
        self.image = Tower(config["image"])
        self.text = Tower(config["text"])
        self.transform = functools.partial(transform_image, **config["transform"])
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor, precision: str = "fp32") -> torch.Tensor:
        """Transformed pixels [B,3,H,W], on its device, -> float32 embeddings [B,D], not normalised."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        with torch.autocast(pixels.device.type, low, enabled=low is not None):
            return self.image(pixels).float()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], truncate: bool = False, batch: int = 64) -> torch.Tensor:
        """M texts -> float32 embeddings [M,D], not normalised; a text beyond the context is an InputError."""
        device = next(self.parameters()).device
        batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        tokens = (self.tokenize(batch, truncate).values() for batch in batches)
        return torch.cat([self.text(*(tensor.to(device) for tensor in pair)).float() for pair in tokens])

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> dict[str, torch.Tensor]:
        """M texts -> {"input_ids": [M,T], "attention_mask": [M,T]}, padded on the right."""
        config = self.config["text"]
        length = config["context_length"]
        padding = config.get("padding", "longest")
        texts = [text.rstrip(config.get("strip", "")) for text in texts]
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > length and not truncate:
                raise InputError(f"{len(ids)} tokens, the encoder reads {length}; shorten the text {text!r}")
        options = {"padding": padding, "padding_side": "right", "truncation": True, "max_length": length}
        tokens = self.tokenizer(texts, return_tensors="pt", return_attention_mask=True, **options)
        mask = tokens["attention_mask"]
        mask = mask if padding == "longest" else torch.ones_like(mask)  # SigLIP attends to its padding
        return {"input_ids": tokens["input_ids"], "attention_mask": mask}

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the config without its name and of every tensor as float32."""
        config = {key: value for key, value in self.config.items() if key != "name"}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for key, tensor in sorted(self.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
        return digest.hexdigest()

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors (as `dtype`) and the tokenizer into a new or empty folder."""
        with atomic(check_new_folder(directory)) as partial:
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            state = self.state_dict()
            state |= {key: value.to(dtype) for key, value in state.items() if value.is_floating_point()}
            save_tensors(partial / "model.safetensors", state, {})
            self.tokenizer.save_pretrained(partial)

    @classmethod
    def load(cls, name: str, directory: str | Path | None = None, crop: int | None = None) -> DualEncoder:
        """The encoder `name`: tiny, biomedclip, biovil, a folder, or a hub id of a transformers CLIP/SigLIP.

        Or, after `open_clip:`, a folder or hub id that open_clip reads (docs/encoders.md). `directory` holds
        its files as published or saved, and rules out the network; without it they come from the hub's cache
        or are downloaded. `crop` replaces a convolutional tower's (BioViL).
        """
        place = name.removeprefix("open_clip:")
        folder = Path(directory or (HERE / "demo" / "tiny" if name == "tiny" else place))
        if directory is None and (name in HUB or not folder.is_dir()):
            folder = download(name)
        with input_errors(folder, f"does not hold the encoder {name}"):
            found = experiment("encoders").read(folder) if place != name else read_encoder(folder)
            if isinstance(found, DualEncoder):  # open_clip's own towers
                if crop is not None:
                    raise InputError("the image size of open_clip's towers is fixed, leave --crop out")
                return found
            config, state, tokenizer = found
            config = {"name": folder.name if Path(place).is_dir() else name} | config
            if name in HUB and config["name"] != name:
                raise InputError(f"it is the encoder {config['name']}, not {name}")
            if crop is not None:
                if config["image"].get("library") != "torchvision":
                    raise InputError(f"the image size of {config['name']} is fixed, leave --crop out")
                config = config | {"transform": config["transform"] | {"crop": crop}}
            with torch.random.fork_rng(devices=[]):
                encoder = cls(config, tokenizer)
            own = encoder.state_dict()
            state = {k: value for k, value in state.items() if k in own or not re.search(UNUSED_KEYS, k)}
            counters = {k: value for k, value in own.items() if k.endswith("num_batches_tracked")}
            load_weights(encoder, counters | state, folder)
            # A tokenizer or transform that does not fit the towers fails here, not in the middle of a run.
            encoder.encode_texts(["", "no finding"])
            encoder.encode_images(encoder.transform(torch.zeros(1, 40, 60, dtype=torch.uint8))[None])
            return encoder


def linear(inputs: int, outputs: int, bias: bool = True) -> list:
    """A linear layer of a head in config.json."""
    return ["Linear", {"in_features": inputs, "out_features": outputs, "bias": bias}]


# The published encoders in our format, their tensors' names (regular expressions) and their files.
# fmt: off
BIOMEDCLIP = {
    "name": "biomedclip", "dim": 512,
    "image": {"model": {"model_type": "vit", "layer_norm_eps": 1e-6}, "pool": "cls",
              "head": [linear(768, 512, False)]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 256,
             "head": [linear(768, 640, False), ["GELU", {}], linear(640, 512, False)]},
    "transform": {"resize": 224, "crop": 224, "interpolation": "bicubic",
                  "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}
BIOVIL = {  # its projection comes before the spatial mean; "strip" is what its own inference does to a prompt
    "name": "biovil", "dim": 128,
    "image": {"library": "torchvision", "model": {"name": "resnet50", "node": "layer4"},
              "pool": "none", "head": [
        ["Conv2d", {"in_channels": 2048, "out_channels": 128, "kernel_size": 1, "bias": False}],
        ["BatchNorm2d", {"num_features": 128}], ["ReLU", {}],
        ["Conv2d", {"in_channels": 128, "out_channels": 128, "kernel_size": 1, "bias": True}],
        ["AdaptiveAvgPool2d", {"output_size": 1}], ["Flatten", {}]]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 512, "strip": "!?.",
             "head": [linear(768, 128), ["GELU", {}], ["LayerNorm", {"normalized_shape": 128, "eps": 1e-12}],
                      linear(128, 128)]},
    "transform": {"resize": 512, "crop": 512, "interpolation": "bilinear",
                  "mean": [0.0] * 3, "std": [1.0] * 3},
}
KEYS = {  # BiomedCLIP; BioViL; CLIP and SigLIP
    "visual.trunk.(cls_token)": r"image.tower.embeddings.\1", "visual.trunk.norm": "image.tower.layernorm",
    "visual.trunk.pos_embed": "image.tower.embeddings.position_embeddings",
    "visual.trunk.patch_embed.proj": "image.tower.embeddings.patch_embeddings.projection",
    r"visual.trunk.blocks.(\d+).norm1": r"image.tower.layers.\1.layernorm_before",
    r"visual.trunk.blocks.(\d+).norm2": r"image.tower.layers.\1.layernorm_after",
    r"visual.trunk.blocks.(\d+).attn.proj": r"image.tower.layers.\1.attention.o_proj",
    r"visual.trunk.blocks.(\d+).attn.qkv": r"image.tower.layers.\1.attention.qkv",
    r"visual.trunk.blocks.(\d+).mlp": r"image.tower.layers.\1.mlp", "visual.head.proj": "image.head.0",
    "text.transformer": "text.tower", "text.proj": "text.head",
    "encoder.encoder": "image.tower", "projector.model": "image.head", "bert": "text.tower",
    "cls_projection_head.dense_to_hidden": "text.head.0", "cls_projection_head.LayerNorm": "text.head.2",
    "cls_projection_head.dense_to_output": "text.head.3",
    "vision_model": "image.tower", "text_model": "text.tower",
    "visual_projection": "image.head.0", "text_projection": "text.head.0",
}
# in some published files, but part of neither embedding
UNUSED_KEYS = r"^logit_|position_ids$|num_batches_tracked$|^cls\.|^image\.tower\.fc\."
BIOVIL_IMAGE = "biovil_image_resnet50_proj_size_128.pt"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARIES = ("vocab.txt", "tokenizer.json", "vocab.json", "spiece.model")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB = {  # name: repository, revision, alternatives for the weights, the best first
    "biomedclip": ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", None, OPEN_CLIP_WEIGHTS),
    "biovil": ("microsoft/BiomedVLP-CXR-BERT-specialized", "v1.1", WEIGHTS),
    "biovil-t": ("microsoft/BiomedVLP-BioViL-T", "v1.0", WEIGHTS),
}
# fmt: on


def download(name: str) -> Path:
    """The folder in the hub's cache with the published files of the encoder `name`, downloaded if need be."""
    from huggingface_hub import snapshot_download

    if name not in HUB and "/" not in name:
        raise InputError(f"unknown encoder {name!r}: use tiny, {', '.join(HUB)}, a folder, or OWNER/NAME")
    place = name.removeprefix("open_clip:")
    default = (place, None, WEIGHTS if place == name else OPEN_CLIP_WEIGHTS)
    repository, revision, weights = HUB.get(name, default)
    remedy = f"get its files at https://huggingface.co/{repository} (accept any terms); --encoder-dir FOLDER"
    with input_errors(f"encoder {name!r}", f"cannot be downloaded; {remedy}"):
        for pattern in weights:
            patterns = ["*.json", "*.txt", "*.model", "biovil*.pt", pattern]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
            if any(folder.glob(pattern)):
                break
        return folder


def read_encoder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, tensors, tokenizer) of a folder in our format or as published."""
    names = ("config.json", "open_clip_config.json")
    config, open_clip = (read_json(folder / name) if (folder / name).is_file() else {} for name in names)
    if {"dim", "image", "text", "transform"} <= set(config):
        return config, read_weights(folder, "model.safetensors"), read_tokenizer(folder)
    if config.get("model_type") in ("clip", "siglip"):
        return read_transformers(folder), read_weights(folder, *WEIGHTS), read_tokenizer(folder)
    if re.search(r"vit_base_patch16_224.*Biomed(NLP|BERT)", str(open_clip)):
        normalise = {key: open_clip["preprocess_cfg"][key] for key in ("mean", "std")}
        config = BIOMEDCLIP | {"transform": BIOMEDCLIP["transform"] | normalise}
        return config, read_weights(folder, *OPEN_CLIP_WEIGHTS), read_tokenizer(folder, bert=True)
    if (folder / BIOVIL_IMAGE).is_file():
        state = read_weights(folder, BIOVIL_IMAGE) | read_weights(folder, *WEIGHTS)
        return BIOVIL, state, read_tokenizer(folder, bert=True)
    return experiment("encoders").read(folder)


def read_weights(folder: Path, *patterns: str) -> dict[str, torch.Tensor]:
    """The tensors in the files of the first pattern that fits any, under our names; runs no pickled code."""
    from safetensors.torch import load_file

    files = next((found for found in (sorted(folder.glob(pattern)) for pattern in patterns) if found), [])
    if not files:
        raise InputError(f"no weights: {' or '.join(patterns)} is missing")
    state = {}
    for file in files:
        with input_errors(file, "not readable weights"):
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        for key, tensor in found.items():
            for pattern, replacement in KEYS.items():
                key = re.sub(rf"^{pattern}(?=\.|$)", replacement, key)
            thirds = zip("qkv", tensor.chunk(3)) if ".attention.qkv." in key else ()  # timm's are one tensor
            split = {key.replace("qkv", f"{part}_proj"): third.detach() for part, third in thirds}
            state |= split or {key: tensor.detach()}
    return state


def read_tokenizer(folder: Path, bert: bool = False):
    """The tokenizer of a folder, without network; BERT's by hand, as BioViL's config asks for hub code."""
    from transformers import AutoTokenizer, BertTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(f"no tokenizer: one of {', '.join(VOCABULARIES)} is missing")
    if not bert:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if (folder / "vocab.txt").is_file():
        return BertTokenizer(str(folder / "vocab.txt"))
    return BertTokenizer(read_json(folder / "tokenizer.json")["model"]["vocab"])


def read_transformers(folder: Path) -> dict:
    """Our config for a transformers CLIP or SigLIP; its image processor's settings become the transform."""
    from transformers import AutoConfig, AutoImageProcessor

    published = AutoConfig.from_pretrained(folder, local_files_only=True)
    shaping = "model_type|hidden_act|layer_norm_eps|num_.*|.*_size|.*_token_id|max_position_embeddings"
    towers = []
    for part in (published.vision_config, published.text_config):
        model = {key: value for key, value in part.to_dict().items() if re.fullmatch(shaping, key)}
        towers.append({"model": model, "pool": "pooler", "head": []})
        if published.model_type == "clip":
            towers[-1]["head"] = [linear(part.hidden_size, published.projection_dim, bias=False)]
    vision, text = towers
    text["context_length"] = published.text_config.max_position_embeddings
    dim = published.projection_dim if vision["head"] else published.vision_config.hidden_size
    if published.model_type == "siglip":
        text["padding"] = "max_length"
        # the text tower uses neither, and transformers' defaults for them lie outside its vocabulary
        text["model"] |= {"bos_token_id": None, "eos_token_id": None}
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    transform = {
        "resize": processor.size.shortest_edge or [processor.size.height, processor.size.width],
        "crop": processor.crop_size.height if processor.do_center_crop else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}[processor.resample],
        "mean": list(processor.image_mean), "std": list(processor.image_std),
    }  # fmt: skip
    return {"dim": dim, "image": vision, "text": text, "transform": transform}


# ----------------------------------------------------------------------------------------- 5. Embedding cache

CHUNK = 4096  # images per chunk: the most that a killed process loses; batches never straddle chunks


def read_batch(rows: Sequence[int], images: Sequence, transform: Callable) -> list[tuple]:
    """(row, transformed pixels [3, h, w], "") of each image; (row, None, reason) of an unreadable one."""
    batch = []
    for row in rows:
        try:
            image = images[row]  # asked for once: the demo draws it
            is_file = isinstance(image, (str, Path))
            pixels = read_image(image) if is_file else torch.from_numpy(np.array(image))[None]
            batch.append((row, transform(pixels), ""))
        except InputError as error:
            batch.append((row, None, str(error)))
    return batch


def embedding_key(encoder: DualEncoder, data: Radiographs, precision: str) -> str:
    """Hash of encoder, transform, precision and every image: a file's real path, size, modification time."""
    digest = hashlib.sha256(f"{encoder.fingerprint()} {precision} {len(data.images)} {data.key}".encode())
    if data.key is None and isinstance(data.images, np.ndarray):
        digest.update(np.ascontiguousarray(data.images).data)
    elif data.key is None:
        for path in data.images:
            status = os.stat(path) if os.path.isfile(path) else None
            facts = status and (status.st_size, status.st_mtime_ns)
            digest.update(f"{os.path.realpath(path)}\0{facts}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:20]


def embed(
    encoder: DualEncoder, data: Radiographs, cache_dir: Path, *, batch_size: int = 32, workers: int = 0,
    precision: str = "fp32", device: str = "cpu", skip_bad_images: bool = False,
) -> np.memmap:  # fmt: skip
    """Embed every image once: a read-only memory map [N, D], float32, not normalised.

    Ranks take chunks of rows in turn and fill one array; a restarted process skips finished chunks. An
    unreadable image raises InputError or, with `skip_bad_images`, becomes nan; `embedding_facts` lists it.
    """
    folder = Path(cache_dir) / embedding_key(encoder, data, precision)
    folder.mkdir(parents=True, exist_ok=True)
    array = folder / "embeddings.npy"
    rank, world = ranks()
    n = len(data.images)
    chunks = {folder / f"chunk-{i:09d}-{CHUNK}.json": range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)}
    encoder.to(device)
    with locked(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and not array.exists():
            for stale in folder.glob("*.json"):
                stale.unlink()
            with atomic(array) as partial:
                np.lib.format.open_memmap(partial, "w+", np.float32, (n, encoder.dim)).flush()
        barrier()  # the other ranks start when the first one holds the folder
        todo = [file for file in list(chunks)[rank::world] if not file.exists()]
        with progress(total=sum(len(chunks[file]) for file in todo), desc="embedding", unit="image") as bar:
            for file in todo:
                start = time.perf_counter()
                options = (batch_size, workers, precision, device, skip_bad_images)
                block, bad = embed_rows(encoder, data, chunks[file], bar, *options)
                with open(array, "r+b") as output:  # not through a map: a full disk is an error here
                    output.seek((chunks[file].start - n) * block.strides[0], os.SEEK_END)
                    output.write(block.data)
                write_json(file, {"seconds": time.perf_counter() - start, "unreadable": bad})
        barrier()
        if rank == 0 and not (folder / "facts.json").exists():
            parts = [read_json(file) for file in chunks]
            facts = {"sha256": file_checksum(array), "seconds": sum(part["seconds"] for part in parts)}
            facts["unreadable"] = {row: why for part in parts for row, why in part["unreadable"].items()}
            write_json(folder / "facts.json", facts)
        barrier()
    with input_errors(folder, "damaged cache; delete this folder to embed again"):
        embeddings = np.load(array, mmap_mode="r", allow_pickle=False)
        facts = embedding_facts(embeddings)
        if file_checksum(array) != facts["sha256"]:
            raise ValueError("its checksum differs")
    if facts["unreadable"] and not skip_bad_images:
        raise InputError(f"{next(iter(facts['unreadable'].values()))}; --skip-bad-images leaves such out")
    return embeddings


def embed_rows(
    encoder, data, rows: range, bar, batch_size, workers, precision, device, skip_bad_images
) -> tuple[np.ndarray, dict[int, str]]:
    """Embeddings [n, D] of some rows, nan where an image is unreadable, and those rows with their reasons."""
    block = np.full((len(rows), encoder.dim), np.nan, np.float32)
    bad: dict[int, str] = {}
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    options = {"num_workers": min(workers, len(batches)), "generator": torch.Generator()}
    read = functools.partial(read_batch, images=data.images, transform=encoder.transform)
    every_row = range(len(data.images))
    for batch in torch.utils.data.DataLoader(every_row, batch_sampler=batches, collate_fn=read, **options):
        bad |= {row: f"{data.rows[row]}: {reason}" for row, pixels, reason in batch if pixels is None}
        if bad and not skip_bad_images:
            raise InputError(f"{next(iter(bad.values()))}; --skip-bad-images leaves such out")
        good = {row - rows.start: pixels for row, pixels, _ in batch if pixels is not None}
        if good:
            pixels = torch.stack(list(good.values())).to(device)
            block[list(good)] = encoder.encode_images(pixels, precision).cpu().numpy()
            norms = np.linalg.norm(block[list(good)], axis=1)
            if not np.isfinite(norms).all():  # the square of a value above 1e19 overflows float32
                first = data.rows[batch[0][0]]
                raise InputError(f"{first}: its batch embeds to nan or huge numbers; use --precision fp32")
        bar.update(len(batch))
    return block, bad


def embedding_facts(embeddings: np.memmap) -> dict:
    """{"sha256" of the file, "seconds" spent, "unreadable": {row: reason}} of what `embed` returned."""
    facts = read_json(Path(embeddings.filename).with_name("facts.json"))
    return facts | {"unreadable": {int(row): reason for row, reason in facts["unreadable"].items()}}


# ------------------------------------------------------------------------------------------ 6. Model and loss


class Adaptor(nn.Module):
    """A small network [.., D] -> [.., D] on frozen embeddings.

    mlp: Linear(D, 2D), ReLU, Linear(2D, D), the paper's. linear: Linear(D, D), its ablation. residual (ours):
    x + mlp(x) on L2-normalised x with the last layer zero, so that training starts at zero-shot.
    """

    def __init__(self, dim: int, kind: str = "mlp"):
        super().__init__()
        if kind not in ("mlp", "linear", "residual"):
            raise ValueError(f"adaptor {kind!r} is not mlp, linear or residual")
        self.residual = kind == "residual"
        self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(inplace=True), nn.Linear(2 * dim, dim))
        if kind == "linear":
            self.layers = nn.Linear(dim, dim)
        if self.residual:
            nn.init.zeros_(self.layers[2].weight)
            nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x, dim=-1) if self.residual else x
        return x + self.layers(x) if self.residual else self.layers(x)


@dataclass
class PromptBank:
    """All prompts' embeddings [M, D], not normalised, and the group of each [M], int64.

    Group 2c holds the positive prompts of class c and 2c + 1 its negative ones; groups may differ in size.
    """

    embeddings: torch.Tensor
    group: torch.Tensor

    def __post_init__(self):
        self.group = self.group.long()
        found = self.group.unique().tolist()
        self.groups = len(found)
        if self.groups % 2 or found != list(range(self.groups)) or len(self.group) != len(self.embeddings):
            raise ValueError(f"prompts' groups {found} must be 0 to 2C - 1, all used, one for each prompt")

    def to(self, target: str | torch.device | torch.dtype) -> PromptBank:
        """The bank on another device, or its embeddings in another dtype."""
        embeddings = self.embeddings.to(target)
        return PromptBank(embeddings, self.group.to(embeddings.device))

    def pooling(self, pool: str) -> torch.Tensor:
        """[2C, M]: row g averages group g (mean) or picks its first prompt (single)."""
        member = self.group == torch.arange(self.groups, device=self.group.device)[:, None]
        member = member & (member.cumsum(1) == 1) if pool == "single" else member
        return F.normalize(member.to(self.embeddings.dtype), p=1, dim=1)


def embed_prompts(encoder: DualEncoder, prompts: dict[str, dict[str, list[str]]]) -> PromptBank:
    """Encode the prompts of all classes once, in the order of the classes."""
    sets = [texts for pair in prompts.values() for texts in (pair["positive"], pair["negative"])]
    group = [g for g, texts in enumerate(sets) for _ in texts]
    embeddings = encoder.encode_texts([text for texts in sets for text in texts])
    return PromptBank(embeddings.clone(), torch.tensor(group))  # a plain tensor: adaptors train through it


class Method(nn.Module):
    """Base of what `--method` names (docs/methods.md): a model of image embeddings that learns by task."""

    whitens = False  # True: works on whitened embeddings, with or without --whiten

    def __init__(self):
        super().__init__()
        self.whitening: nn.Module = nn.Identity()

    @classmethod
    def build(cls, config: Config, dim: int, n_classes: int, **options) -> Method:
        """The untrained method for embeddings [.., D] and C classes."""
        return cls(dim, n_classes, **options)

    def logits(self, images: torch.Tensor, bank: PromptBank) -> torch.Tensor:
        """Log odds [B, C] of image embeddings [B, D] that went through `whitening`."""
        raise NotImplementedError

    def scores(self, images: torch.Tensor, bank: PromptBank, rule: str = "diff") -> tuple:
        """Scores in [0, 1] and decisions 0/1, both [B, C]; `rule` concerns methods with prompts."""
        logits = self.logits(images, bank)
        return logits.sigmoid(), (logits > 0).to(logits.dtype)

    def before_task(self, task: Task, labels: torch.Tensor, bank: PromptBank) -> tuple[Task, torch.Tensor]:
        """What to train on: the task and the labels [N, C], or more (replay)."""
        return task, labels

    def penalty(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | float:
        """What is added to a batch's loss."""
        return 0.0

    def after_task(self, embeddings: np.ndarray, labels: torch.Tensor, task: Task, bank: PromptBank) -> None:
        """Learn from, or remember, a task; embeddings [N, D] as the encoder gave them, labels [N, C]."""

    def memory(self) -> dict[str, torch.Tensor]:
        """What further learning needs and prediction does not; saved apart from the weights."""
        return {}

    def load_memory(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `memory` returned."""

    def stored_bytes(self) -> int:
        """Bytes to keep from task to task besides the weights."""
        return sum(tensor.nbytes for tensor in self.memory().values())


class RETune(Method):
    """Two adaptors on a frozen pair of encoders; each class compares its positive and negative prompts.

    adapt: both (default), shared (one module for both towers), image, text; none is zero-shot.
    pool: mean of a group's adapted prompts; max of their cosines per image; single, only the first prompt.
    """

    def __init__(
        self, dim: int, adaptor: str = "mlp", adapt: str = "both", pool: str = "mean", negatives: bool = True,
        logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if adapt not in ("both", "shared", "image", "text", "none") or pool not in ("mean", "max", "single"):
            raise ValueError(f"adapt {adapt!r} or pool {pool!r} is unknown")
        self.pool = pool
        self.negatives = negatives
        self.logit_scale = logit_scale
        self.image_adaptor = nn.Identity() if adapt in ("none", "text") else Adaptor(dim, adaptor)
        self.text_adaptor = Adaptor(dim, adaptor) if adapt in ("both", "text") else nn.Identity()
        if adapt == "shared":
            self.text_adaptor = self.image_adaptor

    @classmethod
    def build(cls, config: Config, dim: int, n_classes: int) -> RETune:
        return cls(dim, config.adaptor, config.adapt, config.pool, config.negatives, config.logit_scale)

    def forward(self, images: torch.Tensor, bank: PromptBank) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines (positive [B, C], negative [B, C]) of image embeddings [B, D], not normalised."""
        dtypes = {images.dtype, bank.embeddings.dtype, *(p.dtype for p in self.parameters())}
        if len(dtypes) > 1:
            raise ValueError(f"images, prompts and adaptors differ in dtype: {sorted(map(str, dtypes))}")
        v = self.image_adaptor(images)  # [B, D]
        t = self.text_adaptor(bank.embeddings)  # [M, D]
        if self.pool != "max":
            t = bank.pooling(self.pool) @ t  # [2C, D]
        # Dividing the small product spares a normalised copy of v, in forward and backward.
        cosine = v @ F.normalize(t, dim=-1).T / v.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # [B, 2C or M]
        if self.pool == "max":
            cosine = cosine[:, None].masked_fill(bank.pooling("mean") == 0, -torch.inf).amax(-1)  # [B, 2C]
        return cosine[:, 0::2], cosine[:, 1::2]

    def logits(self, images: torch.Tensor, bank: PromptBank) -> torch.Tensor:
        """cos(v, t+) - cos(v, t-) [B, C] in [-2, 2], times the scale; cos(v, t+) alone without negatives."""
        positive, negative = self(images, bank)
        return self.logit_scale * (positive - negative if self.negatives else positive)

    def scores(self, images: torch.Tensor, bank: PromptBank, rule: str = "diff") -> tuple:
        """Scores in [0, 1] and decisions 0/1, [B, C]. diff: (cos+ - cos- + 2) / 4; pos: (cos+ + 1) / 2."""
        positive, negative = self(images, bank)
        decisions = positive > (negative if self.negatives else 0)
        diff = rule == "diff" and self.negatives
        return (positive - negative + 2) / 4 if diff else (positive + 1) / 2, decisions.to(positive.dtype)


def prompt_contrastive_loss(logits: torch.Tensor, labels) -> torch.Tensor:
    """Mean binary cross-entropy with logits over known labels, both [B, C]; nan is unknown; 0 if all are."""
    labels = torch.as_tensor(labels).to(logits)
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / known.sum().clamp_min(1)


# ----------------------------------------------------------------------------------------------- 7. Scenarios


@dataclass(frozen=True)
class Task:
    """One step of a scenario: the rows [n] it trains on, in file order, and the label columns it trains."""

    name: str
    rows: np.ndarray
    classes: tuple[int, ...]


def data_incremental(part: np.ndarray, groups: Sequence, class_names: Sequence[str]) -> list[Task]:
    """Every part of the images trains all classes; part [N] is the part of each row."""
    everything = tuple(range(len(class_names)))
    return [Task(f"part {t + 1}", np.flatnonzero(part == t), everything) for t in range(len(groups))]


def class_incremental(part: np.ndarray, groups: Sequence, class_names: Sequence[str]) -> list[Task]:
    """Part t of the images trains only the t-th group of classes."""
    names = [" + ".join(class_names[c] for c in group) for group in groups]
    parts = enumerate(zip(names, groups))
    return [Task(name, np.flatnonzero(part == t), tuple(group.tolist())) for t, (name, group) in parts]


def label_incremental(part: np.ndarray, groups: Sequence, class_names: Sequence[str]) -> list[Task]:
    """Part t of the images trains the groups of classes 0 to t."""
    tasks = class_incremental(part, groups, class_names)
    seen = [sum((task.classes for task in tasks[: t + 1]), ()) for t in range(len(tasks))]
    return [dataclasses.replace(task, classes=classes) for task, classes in zip(tasks, seen)]


def make_tasks(
    scenario: str, labels: np.ndarray, class_names: Sequence[str], parts: int | None, seed: int,
    patients: Sequence[str] | None = None, order: Sequence[str] | None = None, contiguous: bool = False,
    positives_only: bool = False,
) -> list[Task]:  # fmt: skip
    """Cut training rows 0..N-1 with labels [N, C] into a scenario's tasks; ValueError for what cannot be.

    data, class, label: the three protocols above, in `parts` (data: 5, else one per class; fewer group them);
    joint: one task; zero: none. Parts share no patient; `contiguous`, the authors' cut, instead takes
    ceil(N / parts) rows in file order. `order`: the classes as they arrive. `positives_only`: a task has all
    positives of its new classes instead, so an image with two comes twice.
    """
    names = list(class_names)
    n = len(labels)
    protocols = {"data": data_incremental, "class": class_incremental, "label": label_incremental}
    if scenario not in (*protocols, "joint", "zero"):
        raise ValueError(f"scenario {scenario!r} is not data, class, label, joint or zero")
    for option, given in (("--positives-only", positives_only), ("--class-order", order)):
        if given and scenario not in ("class", "label"):
            raise ValueError(f"{option} is for the scenarios class and label, not for {scenario}")

    if order and sorted(order) != sorted(names):
        raise ValueError(f"--class-order {' '.join(order)} must name each class once: {', '.join(names)}")
    if scenario == "zero":
        return []
    if scenario == "joint":
        return [Task("joint", np.arange(n), tuple(range(len(names))))]
    ids, patient = np.unique(np.arange(n) if patients is None else np.asarray(patients), return_inverse=True)
    parts = (5 if scenario == "data" else len(names)) if parts is None else parts
    most = len(ids) if scenario == "data" else len(names)
    if not 1 <= parts <= most:
        raise ValueError(f"--parts {parts}: the scenario {scenario} can have 1 to {most} parts here")
    part = np.arange(n) // math.ceil(n / parts)  # [N], the part of each row
    if not contiguous:
        part = np.empty(len(ids), np.int64)
        part[np.random.default_rng(seed).permutation(len(ids))] = np.sort(np.arange(len(ids)) % parts)
        part = part[patient]
    groups = np.array_split([names.index(name) for name in order or names], parts)
    tasks = protocols[scenario](part, groups, names)
    if positives_only:
        positives = [np.flatnonzero((labels[:, group] == 1).any(1)) for group in groups]
        tasks = [dataclasses.replace(task, rows=rows) for task, rows in zip(tasks, positives)]
    if empty := [task.name for task in tasks if not len(task.rows)]:
        raise ValueError(f"--parts {parts}: task {empty[0]!r} has no images; use fewer parts")
    return tasks


# ------------------------------------------------------------------------------------------------- 8. Metrics


def to_numpy(values) -> np.ndarray:
    """An array or tensor of any dtype and device as numpy; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32)).numpy()
    return np.asarray(values)


def evaluate(scores, predictions, labels, class_names=None) -> dict:
    """Multi-label metrics of scores, 0/1 predictions and labels, each [N, C]; nan labels are not scored.

    A class whose known labels are all alike is nan, named in a warning and left out of the means. Weighted
    means weigh by positives; accuracy is the exact match of fully labelled images; n counts labelled images.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    scores, predictions, labels = map(to_numpy, (scores, predictions, labels))
    labels = labels.astype(float)
    names = list(class_names or map(str, range(labels.shape[1])))
    values = np.full((5, len(names)), np.nan)  # AUROC, average precision, precision, recall, F1
    positives = np.zeros(len(names))
    for c, name in enumerate(names):
        known = ~np.isnan(labels[:, c])
        y, score, decision = (array[known, c] for array in (labels, scores, predictions))
        if len(np.unique(y)) < 2:
            warnings.warn(f"{name}: known labels in a split are all alike, so it is not scored", stacklevel=2)
            continue
        measured = precision_recall_fscore_support(y, decision, average="binary", zero_division=0)
        values[:, c] = roc_auc_score(y, score), average_precision_score(y, score), *measured[:3]
        positives[c] = y.sum()
    scored = positives > 0 if positives.any() else slice(None)  # means of nothing are nan, without 0 / 0
    macro = values[:, scored].mean(1).tolist()
    weighted = np.average(values[:, scored], axis=1, weights=positives[scored].clip(1)).tolist()
    complete = ~np.isnan(labels).any(1)
    auroc, ap, _, _, f1 = (dict(zip(names, row)) for row in values.tolist())
    return {
        "auroc_macro": macro[0], "auroc_weighted": weighted[0], "f1_macro": macro[4],
        "f1_weighted": weighted[4], "precision_weighted": weighted[2], "recall_weighted": weighted[3],
        "accuracy": float((predictions == labels)[complete].all(1).mean()) if complete.any() else math.nan,
        "ap_macro": macro[1], "auroc": auroc, "f1": f1, "ap": ap,
        "n": int((~np.isnan(labels)).any(1).sum()),
    }  # fmt: skip


@functools.lru_cache(maxsize=2)
def draw_patients(count: int, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each of `count` patients is drawn, [R, count]: the same resamples for every measure."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)


def bootstrap_auroc(scores, labels, patients, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Macro AUROC [R] when patients [N] are drawn with replacement; nan where no class can be scored.

    Patients become weights, so one sort a class serves all resamples; ties count half, as in scikit-learn.
    """
    scores, labels = map(to_numpy, (scores, labels))
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    total = np.zeros(resamples)
    scored = np.zeros(resamples)
    for c in range(labels.shape[1]):
        positive, negative = (np.flatnonzero(labels[:, c] == value) for value in (1, 0))
        negative = negative[np.argsort(scores[negative, c], kind="stable")]
        ranked = scores[negative, c]
        below, upto = (np.searchsorted(ranked, scores[positive, c], side) for side in ("left", "right"))
        won = np.zeros(len(negative) + 1)  # negatives' weight up to a rank
        for r, drawn in enumerate(draw_patients(len(ids), resamples, seed)):
            np.cumsum(drawn[patient[negative]], out=won[1:])
            weight = drawn[patient[positive]]
            pairs = weight.sum() * won[-1]
            total[r] += weight @ (won[below] + won[upto]) / 2 / max(pairs, 1)
            scored[r] += pairs > 0
    return np.where(scored > 0, total / np.maximum(scored, 1), np.nan)


def bootstrap_ci(scores, labels, patients, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% interval of macro AUROC, resampling patients [N]; nan when no class can be scored."""
    auroc = bootstrap_auroc(scores, labels, patients, resamples, seed)
    auroc = auroc[~np.isnan(auroc)]
    return tuple(np.percentile(auroc, [2.5, 97.5]).tolist()) if len(auroc) else (math.nan, math.nan)


def continual_metrics(auroc: np.ndarray, tasks: Sequence[Task], zero: np.ndarray) -> dict[str, float]:
    """Average AUROC, forgetting, backward and forward transfer (docs/results.md); nan without a class.

    auroc [T, C]: test AUROC of class c after task t; zero [C]: zero-shot. Unscored classes are left out.
    """
    grid = np.vstack([zero, *auroc])  # [T + 1, C]; row 0 is zero-shot
    last = len(grid) - 1
    first = {c: t for t, task in reversed(list(enumerate(tasks, 1))) for c in task.classes}  # k(c)
    scored = [c for c in range(len(zero)) if not np.isnan(grid[:, c]).any()]
    earlier = [(c, first[c]) for c in scored if first.get(c, last) < last]
    later = [(c, first[c]) for c in scored if first.get(c, 1) > 1]
    measures = {
        "average_auroc": [grid[last, c] for c in scored],
        "forgetting": [grid[k:last, c].max() - grid[last, c] for c, k in earlier],
        "backward_transfer": [grid[last, c] - grid[k, c] for c, k in earlier],
        "forward_transfer": [grid[k - 1, c] - grid[0, c] for c, k in later],
    }
    return {name: float(np.mean(values or [math.nan])) for name, values in measures.items()}


# ------------------------------------------------------------------------------------------------ 9. Training


def gather(embeddings: np.ndarray, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows [B] of a memory map [N, D] as a tensor [B, D] of the dtype and on the device of `like`."""
    if rows.dtype == torch.bool:
        raise ValueError("rows must be row numbers, as np.flatnonzero(mask) gives, not a mask")
    return torch.from_numpy(np.take(embeddings, rows.numpy(), axis=0)).to(like)


def fit(
    model: Method, bank: PromptBank, embeddings: np.ndarray, labels, task: Task,
    optimizer: torch.optim.Optimizer, *, epochs: int, batch_size: int, generator: torch.Generator,
) -> None:  # fmt: skip
    """Train on one task: its rows of embeddings [N, D] and labels [N, C], the loss on its classes only.

    Every epoch is a fresh permutation of all rows, read straight from the memory map. Works in the dtype and
    on the device of the prompts. InputError for a loss that is not finite.
    """
    rows = torch.from_numpy(task.rows)
    # all columns as a view; a tuple of them would copy in every step
    columns = slice(None) if task.classes == tuple(range(bank.groups // 2)) else task.classes
    targets = gather(to_numpy(labels), rows, bank.embeddings)[:, columns]  # [n, classes]
    model.train()
    for epoch in progress(range(epochs), desc=f"training {task.name}", unit="epoch"):
        batches = torch.randperm(len(rows), generator=generator).split(batch_size)
        for step, batch in enumerate(batches, 1 + epoch * len(batches)):
            wanted = targets[batch]  # [B, classes]
            if wanted.isnan().all():
                continue  # momentum alone would move the weights
            images = model.whitening(gather(embeddings, rows[batch], bank.embeddings))
            logits = model.logits(images, bank)
            loss = prompt_contrastive_loss(logits[:, columns], wanted) + model.penalty(images, logits)
            if not math.isfinite(loss.item()):
                raise InputError(f"task {task.name!r}, step {step}: the loss is {loss.item()}; lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def score_rows(model: Method, bank: PromptBank, embeddings: np.ndarray, rows: np.ndarray, rule: str) -> tuple:
    """(scores, decisions), [n, C] each, of rows [n] of the embeddings [N, D]."""
    model.eval()
    parts = []
    for piece in torch.from_numpy(rows).split(8192):
        images = model.whitening(gather(embeddings, piece, bank.embeddings))
        parts.append([to_numpy(values) for values in model.scores(images, bank, rule)])
    scores, decisions = (np.concatenate(part) for part in zip(*parts))
    if not np.isfinite(scores).all():
        raise InputError("scores are not finite: the embeddings hold huge numbers, or the weights diverged")
    return scores, decisions


def load_method(name: str, given: Sequence[str] = ()) -> tuple[type[Method], dict]:
    """The class that `--method` names, and its options by `--set`: RE-tune, or what `experiments` finds."""
    if name != "retune":
        return experiment().find_method(name, given)
    if given:
        raise InputError(f"--set {given[0]}: RETune takes no --set")
    return RETune, {}


def build_model(config: Config, dim: int, n_classes: int, options: dict | None = None) -> Method:
    """The model of `config.method` for embeddings [.., D], seeded without touching the global generator."""
    method, _ = load_method(config.method)
    with seeded(config.seed):
        model = method.build(config, dim, n_classes, **(options or {}))
    if config.whiten or method.whitens:
        model.whitening = experiment("whitening").Whitening(dim)
    return model


MODEL_KEYS = (  # what builds a run's model again, saved with its weights
    "method", "whiten", "adaptor", "adapt", "pool", "negatives", "logit_scale", "score", "crop", "precision",
    "seed",
)  # fmt: skip


def load_model(path: Path, config: Config) -> tuple[Method, dict]:
    """The model that a run saved, on the CPU, and what is known of it; `config` sets nothing of the model."""
    tensors, known = load_tensors(path)
    with input_errors(path, "is not a run's model"):
        settings = dataclasses.replace(config, **{key: known[key] for key in MODEL_KEYS})
        form = (known["dim"], len(known["classes"]), known["method_options"])
    if ":" in settings.method and config.method != settings.method:  # a file alone must not run code
        raise InputError(f"{path}: its method is your own code; name it again: --method {settings.method}")
    model = build_model(settings, *form)
    load_weights(model, tensors, path)
    return model.eval(), known


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into a model; InputError when names or shapes differ."""
    with input_errors(path, "does not fit this model"):
        model.load_state_dict(tensors)


def check_same_config(folder: Path, identity: dict) -> None:
    """Write config.json, or refuse a folder that holds another configuration, saying what differs."""
    path = folder / "config.json"
    if not path.exists():
        return write_json(path, identity)
    old = read_json(path)
    changes = []
    for key, value in to_json(identity).items():
        before = str(old.get(key))
        now = str(value)
        if before != now and key not in MAY_DIFFER:
            start = max(0, len(os.path.commonprefix([before, now])) - 30)
            change = f"{key} {before[start:][:60]}, now {now[start:][:60]}"
            reasons = {"data_fingerprint": "labels changed (or names, patients, split or parts)"}
            changes.append(reasons.get(key, change))
    if changes:
        raise InputError(f"{folder}: holds another run ({'; '.join(changes)}); use another --output")


def data_fingerprint(data: Radiographs) -> str:
    """SHA-256 (hex) of what makes data the same: names, patients, split, labels and, if known, parts."""
    columns = [data.names, data.patients.tolist(), data.split.tolist()]
    columns += [] if data.part is None else [list(data.part)]
    return hashlib.sha256(repr(tuple(columns)).encode() + data.labels.tobytes()).hexdigest()


def scenario_tasks(config: Config, data: Radiographs) -> list[Task]:
    """The tasks of the scenario, with rows counted in the whole data set."""
    if config.parts == "column":
        return experiment("hospitals").column_tasks(config, data)
    train = data.where("train")
    order = (config.parts, config.seed, data.patients[train], config.class_order)
    options = (*order, config.contiguous, config.positives_only)
    with input_errors(f"--scenario {config.scenario}", "is not possible"):
        tasks = make_tasks(config.scenario, data.labels[train], data.class_names, *options)
    tasks = [dataclasses.replace(task, rows=train[task.rows]) for task in tasks]
    for task in tasks:
        for c in task.classes:
            known = np.isfinite(np.unique(data.labels[task.rows, c]))
            if known.sum() < 2 and not config.positives_only:
                trouble = "labels that are all alike" if known.any() else "no known label"
                warnings.warn(f"task {task.name!r}: {data.class_names[c]} has {trouble}", stacklevel=2)
    return tasks


def run(config: Config, load_data: Callable | None = None, load_encoder: Callable | None = None) -> dict:
    """A whole scenario: embed, zero-shot, each task, metrics after each; returns metrics.json.

    An interrupted run continues, to the same metrics bit for bit. All ranks embed images; one trains.
    """
    data = (load_data or load_radiographs)(config)
    data = dataclasses.replace(data, split=data.split.copy())
    config = resolve_defaults(config, data)
    prompts = load_prompts(Path(config.prompts), data.class_names, config.wording)
    tasks = scenario_tasks(config, data)
    device = pick_device(config.device)
    encoder = (load_encoder or DualEncoder.load)(config.encoder, config.encoder_dir, config.crop)
    print_summary(config, data, tasks, device)
    identity = dataclasses.asdict(config) | {
        "method_options": load_method(config.method, config.set)[1], "prompt_texts": prompts,
        "encoder_fingerprint": encoder.fingerprint(), "data_fingerprint": data_fingerprint(data),
    }  # fmt: skip
    folder = output_folder(config)
    with input_errors(f"--output {folder}", "cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False) if ranks()[0] == 0 else contextlib.nullcontext():
        if ranks()[0] == 0:
            check_same_config(folder, identity)
        if (folder / "metrics.json").exists():
            log(f"{folder}: finished before; delete it to run again")
            return read_json(folder / "metrics.json")
        embeddings = embed(
            encoder, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
            precision=config.precision, device=device, skip_bad_images=config.skip_bad_images,
        )  # fmt: skip
        if ranks()[0] != 0:
            return {}
        facts = embedding_facts(embeddings)
        began = read_json(folder / "config.json").get("embeddings_sha256", facts["sha256"])
        if began != facts["sha256"]:
            raise InputError(f"{folder}: the images or their embeddings changed since; use another --output")
        identity["embeddings_sha256"] = facts["sha256"]
        write_json(folder / "config.json", identity)
        if bad := facts["unreadable"]:
            log(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
            data.split[list(bad)] = "unreadable"
            check_splits(data)
            tasks = scenario_tasks(config, data)
        bank = embed_prompts(encoder, prompts).to(device)
        metrics = train_and_measure(config, folder, identity, data, tasks, embeddings, bank)
        metrics["cost"] |= {
            "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
            "embed_seconds": facts["seconds"], "images_per_second": len(embeddings) / facts["seconds"],
        }  # fmt: skip
        report(folder, metrics, data, tasks)
    return metrics


def train_and_measure(config, folder: Path, identity, data, tasks, embeddings, bank) -> dict:
    """Zero-shot, then every task: train it or load what an earlier process saved, and measure."""
    dim = embeddings.shape[1]

    def measure(model: Method) -> dict:
        metrics = {}
        for split in ("val", "test"):
            rows = data.where(split)
            scores, decisions = score_rows(model, bank, embeddings, rows, config.score)
            metrics[split] = evaluate(scores, decisions, data.labels[rows], data.class_names)
            metrics[split]["auroc_macro_ci"] = bootstrap_ci(scores, data.labels[rows], data.patients[rows])
        return metrics

    zero_shot = measure(RETune(dim, adapt="none", pool=config.pool, negatives=config.negatives))
    options = identity["method_options"]
    if not tasks:  # the encoder alone; saved, so that --predict scores with it
        config = dataclasses.replace(config, method="retune", adapt="none", whiten=False)
        options = {}
    known = {"classes": data.class_names, "prompts": identity["prompt_texts"], "dim": dim}
    known |= {key: identity[key] for key in ("encoder", "encoder_fingerprint")}
    known |= {"method_options": options} | {key: getattr(config, key) for key in MODEL_KEYS}
    model = build_model(config, dim, len(data.class_names), options).to(bank.embeddings.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = kind(parameters, lr=config.lr, fused=True) if parameters else None
    done, finished = load_checkpoint(folder, model, optimizer)
    seconds, after_task = finished or (0.0, [])
    labels = torch.from_numpy(data.labels)
    training = {"epochs": config.epochs, "batch_size": config.batch_size}
    for k, task in list(enumerate(tasks, 1))[done:]:
        start = time.perf_counter()
        if k == 1 and not isinstance(model.whitening, nn.Identity):
            model.whitening.estimate(embeddings, task.rows)
        trained, targets = model.before_task(task, labels, bank)
        if optimizer:  # what has nothing to train by gradient learns only in after_task
            training["generator"] = torch.Generator().manual_seed(10_007 * config.seed + k)
            fit(model, bank, embeddings, targets, trained, optimizer, **training)
        model.after_task(embeddings, labels, task, bank)
        seconds += time.perf_counter() - start
        after_task.append(measure(model))
        save_tensors(folder / f"task_{k}.safetensors", model.state_dict(), known)
        save_checkpoint(folder, model, optimizer, k, (seconds, after_task))
    measured = (config, folder, data, tasks, embeddings, bank, model)
    extras = experiment().measure(*measured) if (HERE / "experiments").is_dir() else {}  # (ours)
    known["decisions"] = extras.get("decisions", {})
    save_tensors(folder / "adaptors.safetensors", model.state_dict(), known)
    if memory := model.memory():
        save_tensors(folder / "statistics.safetensors", memory, {})
    auroc = np.array([list(m["test"]["auroc"].values()) for m in (zero_shot, *after_task)])  # [T + 1, C]
    return to_json({
        "config": identity, "classes": data.class_names,
        "tasks": [{"name": task.name, "classes": [data.class_names[c] for c in task.classes],
                   "n_train": len(task.rows)} for task in tasks],
        "zero_shot": zero_shot, "after_task": after_task,
        "continual": continual_metrics(auroc[1:], tasks, auroc[0]),
        "cost": {"trainable_parameters": sum(p.numel() for p in parameters), "train_seconds": seconds,
                 "peak_memory_mb": peak_memory_mb(), "stored_bytes": model.stored_bytes(),
                 "train_patients": len(np.unique(data.patients[data.where("train")]))},
    } | extras)  # fmt: skip


def save_checkpoint(folder: Path, model: Method, optimizer, task: int, finished=None) -> None:
    """Save what the task after `task` starts from: weights, optimiser, method's memory; and `finished`."""
    state = {"task": task, "finished": finished, "model": model.state_dict(), "memory": model.memory()}
    content = io.BytesIO()  # torch.save to a full disk is no OSError
    torch.save(state | {"optimizer": optimizer and optimizer.state_dict()}, content)
    with atomic(folder / "resume.pt") as partial:
        partial.write_bytes(content.getvalue())


def load_checkpoint(folder: Path, model: Method, optimizer) -> tuple[int, object]:
    """Load what `save_checkpoint` wrote: (task, finished); (0, None) in a new folder."""
    path = folder / "resume.pt"
    if not path.exists():
        return 0, None
    with input_errors(path, "damaged; delete its folder and run again"):
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        model.load_memory(state["memory"])
        if optimizer:
            optimizer.load_state_dict(state["optimizer"])
        return state["task"], state["finished"]


def load_predictor(folder: Path, config: Config, device: str = "cpu") -> tuple:
    """(encoder, model, prompt bank, what was saved with them) of a run; InputError for another encoder."""
    path = folder / "adaptors.safetensors"
    model, known = load_model(path, config)
    name = known["encoder"] if config.encoder == Config.encoder else config.encoder  # the default: not given
    encoder = DualEncoder.load(name, config.encoder_dir, crop=known["crop"]).to(device)
    if encoder.fingerprint() != known["encoder_fingerprint"]:
        raise InputError(f"{path}: trained on another encoder than {name}; name the right one with --encoder")
    return encoder, model.to(device), embed_prompts(encoder, known["prompts"]).to(device), known


def predict(images: Sequence[str], folder: Path, config: Config) -> list[dict]:
    """Score images with a run's saved adaptors alone: [{"image", "findings": {name: {"score", "present"}}}].

    These are the paper's; the run's temperatures and thresholds add "probability" and "decision". InputError
    for an unreadable image, which with --skip-bad-images has "error" instead of findings.
    """
    device = pick_device(config.device)
    encoder, model, bank, known = load_predictor(folder, config, device)
    predictions = []
    for image in progress(images, desc="predicting", unit="image"):
        try:
            pixels = encoder.transform(read_image(image))[None].to(device)
        except InputError as error:
            if not config.skip_bad_images:
                raise
            predictions.append({"image": image, "error": str(error)})
            continue
        with torch.inference_mode():
            embedding = model.whitening(encoder.encode_images(pixels, known["precision"]))
            scores, decisions = model.scores(embedding, bank, known["score"])
            logits = model.logits(embedding, bank)
        values = zip(known["classes"], scores[0].tolist(), decisions[0].tolist())
        findings = {name: {"score": round(score, 6), "present": d > 0} for name, score, d in values}
        if known["decisions"]:  # (ours)
            experiment("decisions").add_decisions(findings, logits[0].tolist(), known["decisions"])
        predictions.append({"image": image, "findings": findings})
    return predictions


# ------------------------------------------------------------------------------------------------- 10. Report


def print_summary(config: Config, data: Radiographs, tasks: Sequence[Task], device: str) -> None:
    """Print before a run what it will do: the data, what became of their labels, the settings in force."""
    counts = ", ".join(f"{(data.split == split).sum():,} {split}" for split in SHARES)
    known = (~np.isnan(data.labels)).sum(0)
    shares = [f"{p / n:.0%}" if n else "no labels" for p, n in zip(np.nansum(data.labels, axis=0), known)]
    log(data.note or f"{config.data}: every label is known")
    log(f"{counts} images of {len(np.unique(data.patients)):,} patients")
    log("positive: " + ", ".join(f"{name} {share}" for name, share in zip(data.class_names, shares)))
    log(f"{config.method}, {config.scenario}, {len(tasks)} tasks; encoder {config.encoder}")
    names = "adaptor adapt pool negatives score logit_scale whiten optimizer lr batch_size epochs seed"
    log(", ".join(f"{name} {getattr(config, name)}" for name in names.split()) + f", device {device}\n")
    if config.encoder == "tiny" and config.data != "demo":
        log("the encoder tiny knows phantoms alone; for patients' images name another: docs/encoders.md\n")
    has_bf16 = not os.path.exists("/proc/cpuinfo") or "bf16" in Path("/proc/cpuinfo").read_text()
    if config.precision == "bf16" and device == "cpu" and not has_bf16:
        log("this CPU has no bf16 instructions: --precision fp32 is several times faster")


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """An aligned Markdown table; floats get three decimals, None and nan a dash."""

    def text(value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def stages(metrics: dict) -> list[tuple[str, dict]]:
    """(name, test metrics) of zero-shot and of every task."""
    names = ["zero-shot", *(f"{k}. {task['name']}" for k, task in enumerate(metrics["tasks"], 1))]
    return list(zip(names, (m["test"] for m in (metrics["zero_shot"], *metrics["after_task"]))))


def summary(metrics: dict) -> str:
    """The run in text: AUROC per task and class, continual-learning measures, a line for a paper."""
    config = metrics["config"]
    header = ["test AUROC after", *metrics["classes"], "macro AUROC", "macro AP", "macro F1", "exact match"]
    keys = ("auroc_macro", "ap_macro", "f1_macro", "accuracy")
    rows = [[name, *m["auroc"].values(), *(m[key] for key in keys)] for name, m in stages(metrics)]
    last = stages(metrics)[-1][1]
    numbers = (*metrics["continual"].values(), last["auroc_macro"], *last["auroc_macro_ci"])
    *continual, auroc, low, high = ("-" if value is None else f"{value:.3f}" for value in numbers)
    measures = (f"{key.replace('_', ' ')} {value}" for key, value in zip(metrics["continual"], continual))
    run = ", ".join(str(config[key]) for key in ("method", "data", "encoder", "scenario"))
    interval = f"95% CI {low} to {high}, 1,000 patient-level bootstrap resamples, n = {last['n']:,} images"
    line = f"{run}, seed {config['seed']}: macro AUROC {auroc} ({interval})"
    lines = [markdown_table(header, rows), ", ".join(measures), line]
    if "decisions" in metrics:  # (ours)
        lines += experiment().summaries(metrics)
    if config["data"] == "demo":
        lines.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(lines)


def report(folder: Path, metrics: dict, data: Radiographs, tasks: Sequence[Task]) -> None:
    """Write splits.csv, figures, table.md and, last, metrics.json, which marks the run as complete."""
    seen = np.full(len(data.names), "", object)
    for k, task in enumerate(tasks, 1):
        seen[task.rows] += f" {k}"
    write_splits(folder / "splits.csv", data, "task", map(str.strip, seen))
    if metrics["config"]["figures"]:
        heatmap(folder / "auroc.png", metrics, "auroc", "test AUROC", 0.5)
        heatmap(folder / "f1.png", metrics, "f1", "test F1", 0.0)
    write_text(folder / "table.md", summary(metrics) + "\n")
    write_json(folder / "metrics.json", metrics)
    (folder / "resume.pt").unlink(missing_ok=True)


def write_splits(path: Path, data: Radiographs, title: str, column: Iterable[str]) -> None:
    """Write a table of every image's patient and split, and what `column` [N] says of it."""
    with atomic(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        lines = zip(data.names, data.patients, data.split, column)
        csv.writer(file).writerows([("image", "patient", "split", title), *lines])


def heatmap(path: Path, metrics: dict, key: str, title: str, low: float) -> None:
    """Task x class picture, zero-shot on top, values in the cells; grey, so that any printer will do."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return log(f"{path.name} is not drawn: it needs matplotlib (pip install matplotlib)")
    grid = np.array([list(m[key].values()) for _, m in stages(metrics)], dtype=float)  # [T + 1, C]
    size = (3.2 + min(0.95 * grid.shape[1], 60), 1.7 + min(0.4 * len(grid), 60))  # inches
    axes = Figure(figsize=size, layout="constrained").add_subplot()
    picture = axes.imshow(grid, cmap="Greys", vmin=low, vmax=1, aspect="auto")
    for (t, c), value in np.ndenumerate(grid) if max(grid.shape) <= 64 else ():
        color = "white" if value > (low + 1.5) / 2.5 else "black"
        axes.text(c, t, "-" if math.isnan(value) else f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(grid.shape[1]), metrics["classes"], rotation=25, ha="right")
    axes.set_yticks(range(len(grid)), [name for name, _ in stages(metrics)])
    axes.axhline(0.5, color="black", linewidth=2)
    run = (metrics["config"][name] for name in ("data", "encoder", "scenario"))
    axes.set_title(f"{title}: {', '.join(Path(name).name for name in run)}", fontsize=10)
    axes.figure.colorbar(picture, ax=axes)
    with atomic(path) as partial:
        axes.figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})


# ------------------------------------------------------------------------------------------- 11. Command line


def build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with an option for every field of a dataclass made with `setting`."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "%(prog)s [option ...]"}
    section = parser = argparse.ArgumentParser(description=description, **options)
    for item in dataclasses.fields(config_class):
        options = dict(item.metadata)
        if group := options.pop("group", None):
            section = parser.add_argument_group(group)
        flag = options.pop("flag", f"--{item.name.replace('_', '-')}")
        if isinstance(item.default, bool):
            options["action"] = "store_false" if item.default else "store_true"
        elif item.default not in (None, ()):
            options.setdefault("type", type(item.default))
            options["help"] += f" (default: {str(item.default).removeprefix(f'{HERE}{os.sep}')})"
        section.add_argument(flag, dest=item.name, default=item.default, **options)
    return parser


def parse_config(config_class: type, arguments: argparse.Namespace):
    """The configuration that a command line gives."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def run_seeds(config: Config, seeds: Sequence[int]) -> None:
    """Run every seed and print its table; for several, also mean and deviation of the final test measures."""
    configs = [dataclasses.replace(config, seed=seed) for seed in dict.fromkeys(seeds)]
    if len({output_folder(chosen) for chosen in configs}) < len(configs):
        raise InputError(f"{len(configs)} runs need a folder each; --output must contain {{seed}}")
    runs = []
    for chosen in configs:
        if metrics := run(chosen):
            runs.append(metrics)
            log(f"{summary(metrics)}\n\nwritten to {output_folder(chosen)}\n")
    if len(runs) < 2:
        return
    rows = []
    for name in ("auroc_macro", "ap_macro", "f1_macro", "accuracy", *runs[0]["continual"]):
        found = [(stages(metrics)[-1][1] | metrics["continual"])[name] for metrics in runs]
        cell = "-" if None in found else f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"
        rows.append([name.replace("_", " "), cell])
    log(markdown_table(["last task, test split", f"mean ± standard deviation of {len(runs)} seeds"], rows))


def predictions_table(predictions: list[dict]) -> str:
    """A table of image x finding with probability (without thresholds: score) and decision."""
    names = list(dict.fromkeys(name for p in predictions for name in p.get("findings", ())))
    rows = []
    for p in predictions:
        found = p.get("findings", {}).values()
        shown = [(f.get("probability", f["score"]), f.get("decision", f["present"])) for f in found]
        cells = [f"{value:.3f} {'yes' if decision else ' no'}" for value, decision in shown]
        rows.append([p["image"], *(cells or ["unreadable"] * len(names))])
    return markdown_table(["image", *names], rows)


def execute(argv: Sequence[str]) -> None:
    """Do what the command line says."""
    method = experiment().describe(argv) if (HERE / "experiments").is_dir() else None
    parser = build_parser(Config, method or __doc__)
    other = parser.add_argument_group("instead of a run")
    images = "score images, folders or CSVs (column `path`) with a run's adaptors; also to --output FILE.csv"
    other.add_argument("--predict", nargs="+", metavar="PATH", help=images)
    other.add_argument("--heatmap", type=Path, metavar="DIR", help="where the encoder looks, for --predict")
    other.add_argument("--export", type=Path, metavar="FILE", help="write a run as an ONNX file")
    other.add_argument("--export-card", action="store_true", help="write a model card into a run")
    other.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run")
    other.add_argument("--json", action="store_true", help="predictions as JSON")
    other.add_argument("--convert", metavar="ENCODER", help="write an encoder in our folder format, to --to")
    other.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args(argv)
    if (arguments.json or arguments.heatmap) and not arguments.predict:
        parser.error("--json and --heatmap go with --predict")
    uses_run = arguments.predict or arguments.export or arguments.export_card
    if bool(uses_run) != bool(arguments.run) or bool(arguments.convert) != bool(arguments.to):
        parser.error("--predict, --export and --export-card need --run, and --convert needs --to")
    seeds = np.atleast_1d(arguments.seed).tolist()
    arguments.seed = seeds[0]
    config = parse_config(Config, arguments)
    if arguments.convert:
        DualEncoder.load(arguments.convert, config.encoder_dir, config.crop).save(arguments.to)
        print(f"written to {arguments.to}")
    elif uses_run:
        predictions = []
        if arguments.predict:
            predictions = predict(list_images(arguments.predict), arguments.run, config)
            print(json.dumps(predictions, indent=1) if arguments.json else predictions_table(predictions))
        more = arguments.export or arguments.export_card or arguments.heatmap
        if more or arguments.output != Config.output:
            experiment("deploy").execute(arguments, config, predictions)
    else:
        join_ranks()
        run_seeds(config, seeds)


def main(argv: Sequence[str] | None = None, action: Callable[[Sequence[str]], None] = execute) -> int:
    """Run a command line: 0, or 2 with one line on standard error for bad input, or 130 after Ctrl-C."""
    with warnings.catch_warnings():
        shown = functools.cache(lambda text: print(f"warning: {text}", file=sys.stderr))  # each text once
        warnings.showwarning = lambda message, *_: shown(str(message))
        try:
            action(sys.argv[1:] if argv is None else list(argv))
        except KeyboardInterrupt:
            print("\nstopped; the same command continues where it was", file=sys.stderr)
            return 130
        except (InputError, OSError) as error:  # of a worker process's, the line below its traceback
            print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            return 2
    return 0


# ------------------------------------------------------------------------------------------------ 12. Helpers


class InputError(ValueError):
    """Something the user gave cannot be used; one line that names it, its value and the remedy."""


@contextlib.contextmanager
def input_errors(subject: str | Path, trouble: str) -> Iterator[None]:
    """Turn any failure inside into an InputError: the file or option, what is wrong with it, the reason."""
    try:
        yield
    except Exception as error:
        missing = isinstance(error, FileNotFoundError) and str(error.filename) == str(subject)
        said = " ".join(str(error).split())[:500] or type(error).__name__
        raise InputError(f"{subject}: {'no such file' if missing else f'{trouble} ({said})'}") from None


def check_values(config, names: str, good: Callable, rule: str) -> None:
    """InputError for a setting that is not good: its option, its value and the rule ("be positive")."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise InputError(f"--{name.replace('_', '-')} {value} must {rule}")


def output_folder(config) -> Path:
    """`config.output` with the config's settings where {name} stands; InputError for an unknown name."""
    values = dataclasses.asdict(config)
    for name in (name for name in values if name.endswith("encoder")):  # a name, an id, a path, NAME=FILE
        values[name] = Path(values[name].split("=")[0]).name.replace(":", "-")
    with input_errors(f"--output {config.output}", "braces may hold any setting of a run"):
        return Path(config.output.format(**values))


def check_new_folder(directory: str | Path) -> Path:
    """The path of a folder to be written; InputError when something is there."""
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: choose another")
    return target


def suggest(name: str, known: Iterable[str]) -> str:
    """A message's tail: the known name most like `name`, then all of them."""
    known = list(known)
    alike = difflib.get_close_matches(name, known, 1, cutoff=0)
    return f"did you mean {alike[0]!r}? Known: {', '.join(known)}"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, a file or folder; rename it on success, remove it on an error."""
    partial = path.with_name(f".{path.name}.partial")  # a fixed name: a killed process's is replaced
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold `folder` for this process: wait for another one, or raise InputError at once."""
    import filelock

    try:
        with filelock.FileLock(folder / ".lock", blocking=wait):
            yield
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is writing here; use another --output") from None


def to_json(value):
    """Plain JSON types all the way down; NaN and infinity, which JSON lacks, become None."""
    return json.loads(json.dumps(value, default=np.generic.item), parse_constant=lambda _: None)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Write strict JSON, atomically."""
    write_text(path, json.dumps(to_json(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """Read a JSON file; InputError names the file and where it breaks."""
    with input_errors(path, "not valid JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def file_checksum(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors and what describes them as safetensors, atomically."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic(path) as partial:  # one entry, since the order of several changes from process to process
        partial.write_bytes(save(plain, {"retune": json.dumps(metadata)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_tensors` wrote; InputError for a missing or damaged file."""
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file; is the run finished?")
    with input_errors(path, "damaged; delete it and run again"), safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        return tensors, json.loads(file.metadata()["retune"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator only inside the block; modules draw their weights from no other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def experiment(name: str = ""):
    """The module `experiments.NAME`, or that package, where what goes beyond the method lives."""
    with input_errors(f"experiments/{name}", "needed for this, with what it imports"):
        return importlib.import_module(f".{name}", "experiments")


def pick_device(name: str) -> str:
    """auto: this rank's GPU, else Apple's, else the CPU."""
    if name == "auto" and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    with input_errors(f"--device {name}", "cannot be used"):
        torch.empty(0, device=name)
    return name


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process; None on Windows, which does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB; in bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def join_ranks() -> None:
    """Join the other processes if torchrun started this one; encoding may keep them apart for hours."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))


def ranks() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside torchrun."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def progress(iterable=None, **options):
    """tqdm on standard error, on the first rank only."""
    return tqdm(iterable, dynamic_ncols=True, leave=False, disable=ranks()[0] != 0, **options)


def log(text: str) -> None:
    """Print, on the first rank only."""
    if ranks()[0] == 0:
        print(text, flush=True)


if __name__ == "__main__":
    import retune  # a method's file imports it by this name, and must get the same classes

    sys.exit(retune.main())
