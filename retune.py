"""RE-tune: incremental fine-tuning of biomedical vision-language models for multi-label chest X-ray diagnosis.

The whole method is in this file, in the order in which a run uses it: prompts, radiographs, frozen encoders,
embeddings, model, loss, scenarios, metrics, training, report, command line. Nothing else of the project is
needed except `prompts.json`, an encoder and, for the demo, `phantoms.py` and `tiny/`.

    python retune.py --scenario data --epochs 5                       # embedded demo, no download
    python retune.py --data csv --data-dir my_xrays --scenario class  # your own images
    python retune.py --predict a.png b.png --run runs/NAME

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
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and the remedy in one line."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any error.

    The temporary name is always the same, so what a killed process left is overwritten by the next one.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold `folder` for this process alone; wait for another one or raise InputError at once.

    The lock is on the folder itself, so it leaves no file and ends with the process. Where folders cannot be
    locked (Windows), nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise InputError(f"{folder}: another process is writing here; wait for it or choose another --output")
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Write strict JSON (NaN and infinity become null), atomically."""

    def strict(v):
        if isinstance(v, dict):
            return {str(key): strict(item) for key, item in v.items()}
        if isinstance(v, list | tuple):
            return [strict(item) for item in v]
        if isinstance(v, float | np.floating):
            return float(v) if math.isfinite(v) else None
        return v.item() if isinstance(v, np.generic) else v

    with atomic(path) as partial:
        partial.write_text(json.dumps(strict(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path):
    """Read a JSON file; InputError names the file and the position of a syntax error."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """A message's tail: the nearest known name, then all of them."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    match = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.0)
    part = next((k for k in known if name.lower() in k.lower()), lower[match[0]] if match else None)
    return f"did you mean {part!r}? Known: {', '.join(known)}"


def ranks() -> tuple[int, int]:
    """(rank, number of processes) of this run; (0, 1) outside torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def barrier() -> None:
    if ranks()[1] > 1:
        torch.distributed.barrier()


def progress(iterable=None, **options):
    """tqdm on standard error; silent on every rank but the first."""
    return tqdm(iterable, dynamic_ncols=True, leave=False, disable=ranks()[0] != 0, **options)


def say(*parts) -> None:
    """Print on the first rank only."""
    if ranks()[0] == 0:
        print(*parts, flush=True)


# ------------------------------------------------------------------------------------------------------ 1. Prompts


def load_prompts(
    path: Path, class_names: Sequence[str], wording: str = "specific"
) -> dict[str, dict[str, list[str]]]:
    """Read the positive and negative prompts of every class from a JSON file.

    The file maps a finding to {"positive": [...], "negative": [...]} or to the name of a synonymous finding;
    "default" holds templates with `{finding}` for all others. Names match without regard to case, `_` and `-`.
    `wording="generic"` uses the templates for every class (ours, for the ablation).

    Returns {class: {"positive": [...], "negative": [...]}}. Raises InputError for a missing finding, an empty
    list or bad JSON. Source: FACTS "Authors' prompt templates"; the wording is ours.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object of findings")

    def plain(name: str) -> str:
        return name.lower().replace("_", " ").replace("-", " ").strip()

    entries = {plain(name): entry for name, entry in content.items()}
    prompts = {}
    for name in class_names:
        entry = entries.get("default" if wording == "generic" else plain(name), entries.get("default"))
        if isinstance(entry, str):
            entry = entries.get(plain(entry))
        if not isinstance(entry, dict):
            raise InputError(
                f"{path}: no prompts for finding {name!r} and no usable 'default' entry; add one"
            )
        prompts[name] = {}
        for polarity in ("positive", "negative"):
            texts = entry.get(polarity)
            if (
                not isinstance(texts, list)
                or not texts
                or not all(isinstance(t, str) and t.strip() for t in texts)
            ):
                raise InputError(
                    f"{path}: {polarity!r} of finding {name!r} must be a non-empty list of texts"
                )
            finding = name.replace("_", " ").lower()
            prompts[name][polarity] = [text.replace("{finding}", finding) for text in texts]
    return prompts


# -------------------------------------------------------------------------------------------------- 2. Radiographs

MAX_PIXELS = 100_000_000  # a larger image is refused before it is decoded (decompression bombs)


@dataclass
class Radiographs:
    """A data set: N images with the labels of C findings.

    images: paths, or uint8 [N, H, W] (an array, or anything that yields [H, W] by row and draws it on demand).
    labels: float32 [N, C], 1 / 0 / nan; nan is unknown: never trained on, never scored.
    patients, split: [N] strings; split is "train", "val" or "test". names: [N], what reports call an image.
    rows: [N], where each image's labels stand ("labels.csv row 7"). reports: [N] texts, if there are any.
    note: what the loader decided, one line for the user. key: identifies images that are not files.
    """

    images: Sequence
    labels: np.ndarray
    class_names: Sequence[str]
    patients: Sequence[str]
    split: Sequence[str]
    names: Sequence[str] | None = None
    rows: Sequence[str] | None = None
    reports: Sequence[str] | None = None
    note: str = ""
    key: str | None = None

    def __post_init__(self):
        n = len(self.images)
        self.labels = np.asarray(self.labels, dtype=np.float32).reshape(n, len(self.class_names))
        self.patients, self.split = np.asarray(self.patients, str), np.asarray(self.split, str)
        self.names = [f"image-{i:06d}" for i in range(n)] if self.names is None else list(self.names)
        self.rows = [f"row {i + 2}" for i in range(n)] if self.rows is None else self.rows
        if not np.all(np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)):
            raise InputError("labels must be 1, 0 or nan")
        if len({n, len(self.patients), len(self.split), len(self.names), len(self.rows)}) != 1:
            raise InputError("images, labels, patients, split, names and rows must have one entry per image")

    def where(self, split: str) -> np.ndarray:
        """Rows of one split, int64, in file order."""
        return np.flatnonzero(self.split == split)


def patient_split(patients: Sequence[str], fractions: dict[str, float]) -> np.ndarray:
    """Assign every image to a split by a hash of its patient id: adding patients never moves the old ones.

    fractions: split -> share of the patients, in order; must sum to 1. Returns [N] split names.
    """
    names, edges = list(fractions), np.cumsum(list(fractions.values()))
    assigned = {}
    for patient in dict.fromkeys(map(str, patients)):
        position = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
        assigned[patient] = names[min(int(np.searchsorted(edges, position, side="right")), len(names) - 1)]
    return np.array([assigned[str(patient)] for patient in patients], dtype=str)


def read_table(path: Path, required: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read a CSV (or CSV.gz) into {column: values}. Values are stripped; InputError names file, row, column."""
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable CSV ({error})") from None
    while rows and not rows[-1]:
        rows.pop()
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise InputError(f"{path}: two columns have the same name in the header {header}")
    for name in required:
        if name not in header:
            raise InputError(f"{path}: no column {name!r}; the columns are {', '.join(header) or '(none)'}")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path} row {i + 2}: {len(row)} fields where the header has {len(header)}")
    if not rows:
        raise InputError(f"{path}: no rows")
    return {name: [row[j].strip() for row in rows] for j, name in enumerate(header)}


def parse_labels(
    table: dict[str, list[str]], classes: Sequence[str], path: Path, uncertain: str, blank: str
) -> tuple[np.ndarray, str]:
    """Turn label columns into float32 [N, C] and a note that counts what -1 and blank labels became.

    uncertain: ones | zeros | ignore (CheXpert's U-Ones, U-Zeros, U-Ignore); blank: zero | ignore.
    """
    policy = {"ones": 1.0, "zeros": 0.0, "zero": 0.0, "ignore": math.nan}
    meaning = {"1": 1.0, "0": 0.0, "-1": policy[uncertain], "": policy[blank]}
    meaning |= {"1.0": 1.0, "0.0": 0.0, "-1.0": policy[uncertain], "nan": policy[blank]}
    labels, counts = np.empty((len(next(iter(table.values()))), len(classes)), np.float32), [0, 0]
    for j, name in enumerate(classes):
        values, inverse, number = np.unique(table[name], return_inverse=True, return_counts=True)
        for value in values:
            if value not in meaning:
                row = table[name].index(value) + 2
                raise InputError(
                    f"{path} row {row}, column {name!r}: label {value!r} is not 1, 0, -1 or blank"
                )
        labels[:, j] = np.array([meaning[value] for value in values])[inverse]
        counts[0] += int(number[np.isin(values, ["-1", "-1.0"])].sum())
        counts[1] += int(number[np.isin(values, ["", "nan"])].sum())
    note = f"{counts[0]:,} uncertain labels (-1) -> {uncertain}; {counts[1]:,} blank labels -> {blank}"
    return labels, note


@functools.lru_cache(maxsize=100_000)
def _real_folder(path: Path) -> Path:
    return path.resolve()


def safe_path(root: Path, relative: str, row: str) -> Path:
    """Join a path from a file to its root; InputError when it is empty or leaves the root in any way."""
    pure = PurePosixPath(relative.replace("\\", "/"))
    absolute = pure.is_absolute() or PureWindowsPath(relative).drive
    if not relative or "\0" in relative or absolute or ".." in pure.parts:
        raise InputError(f"{row}: path {relative!r} must be relative and stay inside {root}")
    path = root.joinpath(*pure.parts)
    real = path.resolve() if path.is_symlink() else _real_folder(path.parent)
    if not real.is_relative_to(_real_folder(root)):
        raise InputError(f"{row}: path {relative!r} leads outside {root} through a link; use the real folder")
    return path


def data_folder(config: Config) -> Path:
    if config.data_dir is None:
        raise InputError(f"--data {config.data} needs --data-dir, the folder that holds it")
    root = Path(config.data_dir)
    if not root.is_dir():
        raise InputError(f"--data-dir {root}: no such folder")
    return root


def one_file(root: Path, patterns: Sequence[str], what: str) -> Path:
    """The only file in `root` that matches one of the patterns, tried in order."""
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise InputError(
                f"{root}: {len(found)} files match {pattern}; leave one or name it with --labels-csv"
            )
        if found:
            return found[0]
    raise InputError(f"{root}: {what} is missing (looked for {', '.join(patterns)})")


def load_demo(config: Config) -> Radiographs:
    """Synthetic radiographs of `phantoms.py`, drawn when they are needed. Numbers on them are not clinical."""
    import phantoms

    demo = phantoms.make_phantoms(config.demo_images, seed=0, domain="demo")
    split = patient_split(demo.patients, {"train": 0.7, "val": 0.1, "test": 0.2})
    note = "DEMO: synthetic phantoms, not patients; these numbers say nothing about clinical performance."
    names = [f"phantom-{i:06d}" for i in range(len(demo.labels))]
    source = hashlib.sha256(Path(phantoms.__file__).read_bytes()).hexdigest()
    return Radiographs(
        demo.images, demo.labels, demo.class_names, demo.patients, split, names, reports=demo.reports, note=note,
        key=f"phantoms {config.demo_images} {source}",
    )  # fmt: skip


def load_csv(config: Config) -> Radiographs:
    """Anybody's own data: `path`, one column per finding (1/0/-1/blank), optional `patient`, `split`, `report`.

    Paths are relative to --data-dir, which holds the only CSV unless --labels-csv names one. Without `split`,
    70/10/20 by a hash of the patient; without `patient`, every image counts as its own patient, and we say so.
    """
    root = data_folder(config)
    path = Path(config.labels_csv) if config.labels_csv else one_file(root, ["*.csv"], "a CSV file")
    table = read_table(path, ["path"])
    names, n = table["path"], len(table["path"])
    classes = [name for name in table if name not in ("path", "patient", "split", "report")]
    if not classes:
        raise InputError(f"{path}: no finding columns beside path, patient, split, report")
    rows = [f"{path} row {i + 2}" for i in range(n)]
    images = [safe_path(root, name, row) for name, row in zip(names, rows)]
    labels, note = parse_labels(table, classes, path, config.uncertain, config.blank or "ignore")
    if "patient" not in table:
        note += "; no `patient` column: every image counts as its own patient"
    patients = table.get("patient", names)
    if "" in patients:
        raise InputError(f"{path} row {patients.index('') + 2}: empty patient id")
    split = table.get("split") or patient_split(patients, {"train": 0.7, "val": 0.1, "test": 0.2})
    for i, value in enumerate(split):
        if value not in ("train", "val", "test"):
            raise InputError(f"{rows[i]}: split {value!r} is not train, val or test")
    reports = table.get("report")
    return Radiographs(images, labels, classes, patients, split, names, rows, reports=reports, note=note)


def choose_classes(data: Radiographs, wanted: Sequence[str] | None) -> Radiographs:
    """Keep and order the findings that --classes names; InputError lists the known ones for an unknown name."""
    if not wanted:
        return data
    if len(set(wanted)) < len(wanted):
        raise InputError(f"--classes names a finding twice: {' '.join(wanted)}")
    for name in wanted:
        if name not in data.class_names:
            raise InputError(f"--classes {name!r}: {nearest(name, data.class_names)}")
    columns = [list(data.class_names).index(name) for name in wanted]
    return dataclasses.replace(data, labels=data.labels[:, columns], class_names=tuple(wanted))


def public(name: str) -> Callable[[Config], Radiographs]:
    """The loader of a published data set, from `public_data.py` beside this file."""

    def load(config: Config) -> Radiographs:
        import public_data

        return getattr(public_data, f"load_{name}")(config)

    return load


DATASETS: dict[str, Callable[[Config], Radiographs]] = {
    "demo": load_demo, "csv": load_csv,
    **{name: public(name) for name in ("nih", "chexpert", "mimic", "chestmnist")},
}  # fmt: skip


def load_radiographs(config: Config) -> Radiographs:
    """Load the data set of `config.data` with its chosen classes; refuse empty splits and duplicate images."""
    data = choose_classes(DATASETS[config.data](config), config.classes)
    seen: dict[str, int] = {}
    for i, name in enumerate(data.names):
        if name in seen:
            raise InputError(f"{data.rows[i]}: {name} is there twice, first at {data.rows[seen[name]]}")
        seen[name] = i
    for split in ("train", "val", "test"):
        if not len(data.where(split)):
            raise InputError(
                f"--data {config.data}: the {split} split is empty; give more patients or a split column"
            )
    home: dict[str, str] = {}
    for patient, split, row in zip(data.patients, data.split, data.rows):
        if home.setdefault(patient, split) != split:
            raise InputError(f"{row}: patient {patient!r} is in both {home[patient]} and {split}; use one")
    return data


def read_image(path: Path) -> torch.Tensor:
    """Decode a PNG, JPEG or DICOM file to uint8 [1 or 3, H, W].

    Deeper than 8 bits: scaled by the image's own minimum and maximum, since 12-bit images come in 16-bit files.
    An alpha channel is dropped; MONOCHROME1 is inverted. InputError when the file cannot be read as an image.
    """
    path = Path(path)
    if path.suffix.lower() in (".dcm", ".dicom"):
        return read_dicom(path)
    from PIL import Image
    from torchvision.io import decode_image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as header:
            width, height = header.size
        if width * height > MAX_PIXELS:
            raise InputError(f"{path}: {width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
        pixels = decode_image(str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (RuntimeError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({str(error).splitlines()[0]})") from None
    if pixels.shape[0] in (2, 4):
        pixels = pixels[:-1]
    return pixels if pixels.dtype == torch.uint8 else stretch(pixels.to(torch.float32))


def stretch(pixels: torch.Tensor) -> torch.Tensor:
    """Scale an image's own range to uint8 0..255; a constant image becomes 0."""
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)


def read_dicom(path: Path) -> torch.Tensor:
    """Read a DICOM image to uint8 [1, H, W] through pydicom, which only users of DICOM need."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: reading DICOM needs pydicom; pip install pydicom") from None
    try:
        image = pydicom.dcmread(path)
        if int(image.Rows) * int(image.Columns) > MAX_PIXELS:
            raise InputError(f"{path}: more pixels than the limit of {MAX_PIXELS:,}")
        pixels = torch.from_numpy(image.pixel_array.astype(np.float32))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # pydicom and its codecs raise nearly every type on a damaged file
        raise InputError(f"{path}: not a readable DICOM image ({type(error).__name__}: {error})") from None
    if pixels.ndim != 2:
        raise InputError(f"{path}: expected one grey image, found an array of shape {tuple(pixels.shape)}")
    return stretch(-pixels if image.get("PhotometricInterpretation") == "MONOCHROME1" else pixels)[None]


# ------------------------------------------------------------------------------------------ 3. Frozen encoders


def transform_image(image, resize, crop, interpolation, mean, std):
    """uint8 image [1 or 3,H,W] -> normalised float pixels [3,h,w]; a single channel is repeated to three.

    `resize` is the length of the shorter side, or [height, width] to fill whatever the proportions are; `crop` is
    the side of the central square, or None. Resizing is antialiased and rounds to uint8, as PIL's does.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = [resize] if isinstance(resize, int) else list(resize)
    image = functional.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    if crop is not None:
        image = functional.center_crop(image, [crop, crop])
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (image / 255 - mean) / std  # [1 or 3,h,w] - [3,1,1] -> [3,h,w]


class Normalize(nn.Module):
    """Scale the last dimension to unit length."""

    def forward(self, features):
        return nn.functional.normalize(features, dim=-1)


LAYERS = "Linear Conv2d BatchNorm2d LayerNorm ReLU GELU AdaptiveAvgPool2d Flatten Unflatten TransformerEncoderLayer"
LAYERS = {name: getattr(nn, name) for name in LAYERS.split()} | {"Normalize": Normalize}
POOLS = ("cls", "mean", "last", "pooler", "pre_norm_mean", "none")


def build_head(layers):
    """[[name in LAYERS, keyword arguments], ...] -> nn.Sequential; the empty list is the identity."""
    unknown = [name for name, _ in layers if name not in LAYERS]
    if unknown:
        raise InputError(f"unknown layers in an encoder's head: {unknown}: use {', '.join(LAYERS)}")
    return nn.Sequential(*(LAYERS[name](**options) for name, options in layers))


def build_tower(model, library="transformers", pool=None):
    """A transformers model from its config (a dict with "model_type"), or torchvision's up to a node, no weights."""
    if library == "torchvision":
        from torchvision.models import get_model
        from torchvision.models.feature_extraction import create_feature_extractor

        return create_feature_extractor(get_model(model["name"]), {model["node"]: "last_hidden_state"})
    import transformers

    config = transformers.AutoConfig.for_model(**model)
    tower = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model")(config)
    if pool != "pooler" and "pooler.dense.weight" in tower.state_dict():
        tower.pooler = None  # ViT's and BERT's: unused, and the published checkpoints lack it
    return tower


def pool_features(output, pool, mask=None):
    """A tower's output -> features [B,H]; "none" leaves its tokens [B,T,H] or its map [B,H,h,w] as they are."""
    if pool == "pooler":
        return output.pooler_output
    features = output.hidden_states[-1] if pool == "pre_norm_mean" else output.last_hidden_state
    if pool == "cls":
        return features[:, 0]
    if pool == "last":
        return features[torch.arange(len(features), device=features.device), mask.sum(1) - 1]
    if pool == "mean" and mask is not None:
        return (features * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    if pool in ("mean", "pre_norm_mean"):
        return features.mean(1) if features.ndim == 3 else features.mean((2, 3))
    return features


class Tower(nn.Module):
    """A tower, a pool and a head, as in config.json's "image" or "text"."""

    def __init__(self, model, pool, head, library="transformers"):
        super().__init__()
        if pool not in POOLS:
            raise InputError(f"unknown pool {pool!r} in an encoder's config: use {', '.join(POOLS)}")
        self.pool, self.library = pool, library
        self.tower, self.head = build_tower(model, library, pool), build_head(head)


class ImageTower(Tower):
    """Pixels [B,3,H,W] -> embeddings [B,D], not normalised."""

    def forward(self, pixels):
        if self.library == "torchvision":
            output = SimpleNamespace(**self.tower(pixels))
        else:
            output = self.tower(pixels, output_hidden_states=self.pool == "pre_norm_mean")
        return self.head(pool_features(output, self.pool))


class TextTower(Tower):
    """Tokens [M,T] and their mask -> embeddings [M,D], not normalised.

    `padding` "longest" hides the padding behind the mask; "max_length" fills the context and lets the tower attend
    to the padding, as SigLIP was trained. `strip`: characters that are cut from the end of a text (BioViL).
    """

    def __init__(self, model, pool, head, context_length, padding="longest", strip=""):
        super().__init__(model, pool, head)
        self.context_length, self.padding, self.strip = context_length, padding, strip

    def forward(self, input_ids, attention_mask):
        output = self.tower(input_ids, attention_mask=attention_mask if self.padding == "longest" else None)
        return self.head(pool_features(output, self.pool, attention_mask))


UNUSED_KEYS = r"position_ids$|num_batches_tracked$"


class DualEncoder(nn.Module):
    """A frozen image tower and text tower of one joint dimension, with their tokenizer and image transform."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.dim = config, tokenizer, config["dim"]
        self.image, self.text = ImageTower(**config["image"]), TextTower(**config["text"])
        self.transform = functools.partial(transform_image, **config["transform"])
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Transformed pixels [B,3,H,W] on the encoder's device -> embeddings [B,D], float32, not normalised."""
        return self.image(pixels).float()

    @torch.inference_mode()
    def encode_texts(self, texts, truncate=False, batch_size=64):
        """M texts -> embeddings [M,D], float32, not normalised; InputError where a text exceeds the context."""
        device = next(self.parameters()).device
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        tokens = (
            {key: value.to(device) for key, value in self.tokenize(b, truncate).items()} for b in batches
        )
        return torch.cat([self.text(**batch).float() for batch in tokens])

    def tokenize(self, texts, truncate=False):
        """M texts -> {"input_ids": [M,T], "attention_mask": [M,T]}, padded on the right."""
        texts, length = [text.rstrip(self.text.strip) for text in texts], self.text.context_length
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > length and not truncate:
                raise InputError(
                    f"a text has {len(ids)} tokens, the encoder reads {length}; shorten it: {text!r}"
                )
        options = {
            "padding": self.text.padding,
            "padding_side": "right",
            "truncation": True,
            "max_length": length,
        }
        tokens = self.tokenizer(texts, return_tensors="pt", return_attention_mask=True, **options)
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def fingerprint(self):
        """SHA-256 (hex) of the config without its name and of every tensor as float32; computed once."""
        if not hasattr(self, "_fingerprint"):
            config = {key: value for key, value in self.config.items() if key != "name"}
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
            for key, tensor in sorted(self.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, directory, dtype=torch.float32):
        """Write config.json, model.safetensors (as `dtype`) and the tokenizer into a new or empty folder."""
        from safetensors.torch import save_file

        target = Path(directory)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} exists and is not an empty folder: choose another")
        partial = target.with_name(f"{target.name}.partial{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            tensors = {key: value.cpu().contiguous() for key, value in self.state_dict().items()}
            tensors = {
                key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()
            }
            save_file(tensors, partial / "model.safetensors")
            self.tokenizer.save_pretrained(partial)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def load_weights(self, state, source):
        """Copy `state` (our key names) into the towers; InputError lists what is missing, unknown or mis-shaped."""
        expected = self.state_dict()
        missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
        unknown = [key for key in state if key not in expected and not re.search(UNUSED_KEYS, key)]
        state = {key: value for key, value in state.items() if key in expected}
        shapes = [(key, tuple(value.shape), tuple(expected[key].shape)) for key, value in state.items()]
        shapes = [f"{key} {found} instead of {wanted}" for key, found, wanted in shapes if found != wanted]
        problems = {"missing": missing, "unknown": unknown, "of another shape": shapes}
        problems = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys
        )
        if problems:
            raise InputError(f"{source} does not hold the weights of {self.config['name']}: {problems}")
        self.load_state_dict(state, strict=False)

    @classmethod
    def load(cls, name: str, directory: str | None = None, crop: int | None = None) -> DualEncoder:
        """The encoder `name`: tiny, biomedclip, biovil, a folder, or the hub id of a transformers CLIP or SigLIP.

        `directory` holds its files exactly as published, or as `save` wrote them, and rules out any network access;
        without it published encoders come from the hub's cache or are downloaded. `crop` changes BioViL's centre
        crop (512, the RE-tune authors'; its own is 480). InputError when a file is missing or does not fit.
        """
        folder = HERE / "tiny" if name == "tiny" and directory is None else Path(directory or name)
        if is_ours(folder):
            config, state, tokenizer = read_folder(folder)
        else:
            import public_encoders

            config, state, tokenizer = public_encoders.read_encoder(name, directory)
        if crop is not None:
            if config["image"].get("library") != "torchvision":
                raise InputError(f"--crop {crop}: the image size of {config['name']} is fixed; leave --crop out")
            config["transform"]["crop"] = crop
        with torch.random.fork_rng(devices=[]):  # building draws random weights: leave the caller's generator alone
            encoder = cls(config, tokenizer)
        encoder.load_weights(state, folder)
        return encoder


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an encoder in our format (see `DualEncoder.save`)."""
    config = folder / "config.json"
    return config.is_file() and {"image", "text", "transform", "dim"} <= set(read_json(config))


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, state, tokenizer) of an encoder in our format, without network."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    try:
        state = load_file(folder / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{folder}: not a complete encoder ({' '.join(str(error).split())})") from None
    return read_json(folder / "config.json"), {key: value.float() for key, value in state.items()}, tokenizer


# --------------------------------------------------------------------------------------------------- 4. Embeddings

CHUNK = 1024  # images a chunk: what a killed process loses at most; batches never straddle chunks


class Images(torch.utils.data.Dataset):
    """Decodes and transforms image `row` in a worker; an unreadable one gives None and the reason."""

    def __init__(self, images: Sequence, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None, str]:
        image = self.images[row]
        try:
            pixels = read_image(image) if isinstance(image, str | Path) else torch.from_numpy(image)[None]
            return row, self.transform(pixels), ""
        except InputError as error:
            return row, None, str(error)


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[int, str]]]:
    """(rows that could be read, their pixels [B, 3, H, W], unreadable rows with reasons)."""
    good = [(row, pixels) for row, pixels, _ in items if pixels is not None]
    bad = [(row, reason) for row, pixels, reason in items if pixels is None]
    return torch.tensor([row for row, _ in good]), torch.stack([p for _, p in good]) if good else None, bad


def embedding_key(encoder, radiographs: Radiographs, precision: str, store: str) -> str:
    """Everything that shapes the embeddings: encoder and transform, file names and sizes, precision."""
    digest = hashlib.sha256(f"{encoder.fingerprint()} {precision} {store} {len(radiographs.images)}".encode())
    if radiographs.key is not None:
        digest.update(radiographs.key.encode())
    elif isinstance(radiographs.images, np.ndarray):
        digest.update(np.ascontiguousarray(radiographs.images).data)
    else:
        for name, path in zip(radiographs.names, radiographs.images):
            size = os.stat(path).st_size if os.path.isfile(path) else -1
            digest.update(f"{name}\0{size}\0".encode())
    return digest.hexdigest()[:20]


def embed(
    encoder, radiographs: Radiographs, cache_dir: Path, *, batch_size: int = 32, workers: int = 0,
    precision: str = "fp32", store: str = "fp32", device: str = "cpu", skip_bad_images: bool = False,
) -> np.memmap:  # fmt: skip
    """Embed every image once: read-only memory map [N, D], float32 or float16, not normalised.

    The work is cut into chunks of fixed rows, each written whole under the cache key's folder; ranks take chunks
    in turn, a restarted process skips finished ones, and the first rank joins and checks them. Unreadable images
    are rows of nan and are listed by `embedding_facts`; InputError unless `skip_bad_images`.
    """
    folder = Path(cache_dir) / embedding_key(encoder, radiographs, precision, store)
    folder.mkdir(parents=True, exist_ok=True)
    final, facts = folder / "embeddings.npy", folder / "facts.json"
    rank, world = ranks()
    n, dtype = len(radiographs.images), np.float16 if store == "fp16" else np.float32
    with locked(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        if not facts.exists():
            chunks = [range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
            mine = [rows for rows in chunks[rank::world] if not chunk_file(folder, rows).exists()]
            embed_chunks(
                encoder,
                radiographs,
                folder,
                mine,
                dtype,
                batch_size,
                workers,
                precision,
                device,
                skip_bad_images,
            )
            barrier()
            if rank == 0:
                assemble(folder, chunks, final, facts, (n, encoder.dim), dtype, radiographs)
        barrier()
    return open_embeddings(final, (n, encoder.dim), dtype, skip_bad_images)


def chunk_file(folder: Path, rows: range) -> Path:
    return folder / f"chunk-{rows.start:09d}.npy"


def embed_chunks(
    encoder, data, folder, chunks, dtype, batch_size, workers, precision, device, skip_bad
) -> None:
    """Run the encoder over the rows of `chunks` and write each chunk with the seconds it took."""
    batches = [list(rows[i : i + batch_size]) for rows in chunks for i in range(0, len(rows), batch_size)]
    loader = torch.utils.data.DataLoader(
        Images(data.images, encoder.transform), batch_sampler=batches, num_workers=min(workers, len(batches)),
        collate_fn=collate, pin_memory=device.startswith("cuda"),
    )  # fmt: skip
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    encoder.to(device)
    stream, total = iter(loader), sum(map(len, chunks))
    with progress(total=total, desc="embedding", unit="image") as bar:
        for rows in chunks:
            block, start = np.full((len(rows), encoder.dim), np.nan, dtype), time.perf_counter()
            for _ in range(0, len(rows), batch_size):
                good, pixels, bad = next(stream)
                if bad and not skip_bad:
                    row, reason = bad[0]
                    raise InputError(
                        f"{data.rows[row]}: {reason}; --skip-bad-images goes on without such images"
                    )
                if pixels is not None:
                    kind = device.split(":")[0]
                    with torch.autocast(kind, autocast, enabled=autocast is not None):
                        features = encoder.encode_images(pixels.to(device, non_blocking=True))
                    block[good.numpy() - rows.start] = features.float().cpu().numpy()
                bar.update(len(good) + len(bad))
            with atomic(chunk_file(folder, rows)) as partial, open(partial, "wb") as file:
                np.save(file, block)
                np.save(file, np.float64(time.perf_counter() - start))


def assemble(folder, chunks, final, facts, shape, dtype, data: Radiographs) -> None:
    """Join the chunks into one array with its checksum, then delete them. A damaged chunk is removed and named."""
    seconds, unreadable, digest = 0.0, {}, hashlib.sha256()
    with atomic(final) as partial:
        whole = np.lib.format.open_memmap(partial, "w+", dtype, shape)
        for rows in chunks:
            try:
                with open(chunk_file(folder, rows), "rb") as file:
                    block, took = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
                whole[rows.start : rows.stop] = block
            except (ValueError, OSError, EOFError) as error:
                chunk_file(folder, rows).unlink(missing_ok=True)
                raise InputError(
                    f"{chunk_file(folder, rows)}: damaged ({error}) and removed; run again"
                ) from None
            digest.update(np.ascontiguousarray(block).data)
            seconds += float(took)
            for row in np.flatnonzero(np.isnan(block[:, 0])) + rows.start:
                unreadable[int(row)] = Images(data.images, lambda pixels: pixels)[int(row)][2]
        whole.flush()
        del whole
    write_json(facts, {"sha256": digest.hexdigest(), "seconds": seconds, "unreadable": unreadable})
    for rows in chunks:
        chunk_file(folder, rows).unlink(missing_ok=True)


def embedding_facts(embeddings: np.memmap) -> dict:
    """{"sha256", "seconds" it took, "unreadable": {row: reason}} of what `embed` returned."""
    facts = read_json(Path(embeddings.filename).with_name("facts.json"))
    return facts | {"unreadable": {int(row): reason for row, reason in facts["unreadable"].items()}}


def open_embeddings(final: Path, shape, dtype, skip_bad: bool) -> np.memmap:
    """Open the finished array after checking its shape and checksum."""
    try:
        embeddings = np.load(final, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{final}: damaged cache ({error}); delete the folder {final.parent}") from None
    digest = hashlib.sha256()
    if embeddings.shape == tuple(shape) and embeddings.dtype == dtype:
        for i in range(0, len(embeddings), CHUNK):
            digest.update(np.ascontiguousarray(embeddings[i : i + CHUNK]).data)
            release(embeddings)
    facts = embedding_facts(embeddings)
    if digest.hexdigest() != facts["sha256"]:
        raise InputError(f"{final}: damaged cache (its checksum differs); delete the folder {final.parent}")
    if facts["unreadable"] and not skip_bad:
        raise InputError(
            f"{next(iter(facts['unreadable'].values()))}; --skip-bad-images goes on without such images"
        )
    return embeddings


def release(embeddings: np.ndarray) -> None:
    """Give the pages of a memory map back, so that resident memory does not grow with what was read."""
    if hasattr(embeddings.base, "madvise"):
        import mmap

        embeddings.base.madvise(mmap.MADV_DONTNEED)


def read_rows(embeddings: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
    """Copy rows [B] of a memory map into memory: float32 [B, D]."""
    out = torch.empty(len(rows), embeddings.shape[1], dtype=torch.float32)
    for i in range(0, len(rows), 8192):
        out[i : i + 8192] = torch.from_numpy(np.take(embeddings, rows[i : i + 8192].numpy(), axis=0))
        release(embeddings)
    return out


# -------------------------------------------------------------------------------------------------------- 5. Model


class Adaptor(nn.Module):
    """Small network [.., D] -> [.., D] on frozen embeddings (FACTS 1).

    mlp: Linear(D, 2D), ReLU, Linear(2D, D), the paper's. linear: Linear(D, D), its ablation.
    residual (ours): x + mlp(x) on L2-normalised x, last layer zero, so that training starts at zero-shot.
    """

    def __init__(self, dim: int, kind: str = "mlp"):
        super().__init__()
        if kind not in ("mlp", "linear", "residual"):
            raise InputError(f"adaptor {kind!r} is not mlp, linear or residual")
        self.kind = kind
        if kind == "linear":
            self.layers = nn.Linear(dim, dim)
        else:
            self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        if kind == "residual":
            nn.init.zeros_(self.layers[2].weight)
            nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind != "residual":
            return self.layers(x)
        x = F.normalize(x, dim=-1)
        return x + self.layers(x)


@dataclass
class PromptBank:
    """Embeddings of all prompts [M, D], not normalised, and the group of each [M], int64.

    Group 2c holds the positive prompts of class c, 2c + 1 the negative ones; groups may differ in size.
    """

    embeddings: torch.Tensor
    group: torch.Tensor

    def to(self, device: str) -> PromptBank:
        return PromptBank(self.embeddings.to(device), self.group.to(device))

    def pooling(self, pool: str) -> torch.Tensor:
        """[2C, M]: row g averages group g, or for `single` picks its first prompt."""
        member = (
            self.group[None] == torch.arange(int(self.group.max()) + 1, device=self.group.device)[:, None]
        ).float()
        if pool == "single":
            member = member * (member.cumsum(1) == 1)
        return member / member.sum(1, keepdim=True)


def embed_prompts(encoder, prompts: dict[str, dict[str, list[str]]]) -> PromptBank:
    """Encode the prompts of all classes, in their order, once."""
    texts = [(t, 2 * c + k) for c, p in enumerate(prompts.values()) for k, s in enumerate(p) for t in p[s]]
    embeddings = encoder.encode_texts([text for text, _ in texts]).clone()  # a plain tensor, to train through
    return PromptBank(embeddings, torch.tensor([group for _, group in texts]))


class RETune(nn.Module):
    """Two adaptors on a frozen pair of encoders; one question per class: positive or negative prompts? (FACTS 1)

    adapt: both (default), shared (one module for both towers), image, text; none is zero-shot.
    pool: mean over the adapted prompts of a group, max over their cosines per image, single (the first prompt).
    """

    def __init__(
        self, dim: int, adaptor: str = "mlp", adapt: str = "both", pool: str = "mean", negatives: bool = True,
        logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if adapt not in ("both", "shared", "image", "text", "none") or pool not in ("mean", "max", "single"):
            raise InputError(f"adapt {adapt!r} or pool {pool!r} is unknown")
        self.pool, self.negatives, self.logit_scale = pool, negatives, logit_scale
        self.image_adaptor = Adaptor(dim, adaptor) if adapt in ("both", "shared", "image") else nn.Identity()
        self.text_adaptor = Adaptor(dim, adaptor) if adapt in ("both", "text") else nn.Identity()
        if adapt == "shared":
            self.text_adaptor = self.image_adaptor

    def forward(self, images: torch.Tensor, prompts: PromptBank) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine similarities (positive [B, C], negative [B, C]) of image embeddings [B, D], not normalised."""
        v = self.image_adaptor(images)  # [B, D]
        t = self.text_adaptor(prompts.embeddings)  # [M, D]
        if self.pool != "max":
            t = prompts.pooling(self.pool) @ t  # [2C, D]
        # the norm divides the small product: normalising v itself would write [B, D] twice more
        cosine = (v @ F.normalize(t, dim=-1).T) / v.norm(dim=-1, keepdim=True).clamp_min(
            1e-12
        )  # [B, 2C or M]
        if self.pool == "max":
            group = prompts.group.expand(len(v), -1)  # [B, M]
            empty = cosine.new_empty(len(v), int(prompts.group.max()) + 1)  # [B, 2C]
            cosine = empty.scatter_reduce(1, group, cosine, "amax", include_self=False)
        return cosine[:, 0::2], cosine[:, 1::2]

    def logits(self, images: torch.Tensor, prompts: PromptBank) -> torch.Tensor:
        """cos(v, t+) - cos(v, t-) [B, C], in [-2, 2] times the scale; without negatives cos(v, t+)."""
        positive, negative = self(images, prompts)
        return self.logit_scale * (positive - negative if self.negatives else positive)

    def scores(
        self, images: torch.Tensor, prompts: PromptBank, rule: str = "diff"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores in [0, 1], decisions 0/1), both [B, C]. diff: (cos+ - cos- + 2) / 4; pos: (cos+ + 1) / 2."""
        positive, negative = self(images, prompts)
        difference = positive - negative if self.negatives else positive
        use_difference = rule == "diff" and self.negatives
        return (difference + 2) / 4 if use_difference else (positive + 1) / 2, (difference > 0).float()


# --------------------------------------------------------------------------------------------------------- 6. Loss


def prompt_contrastive_loss(
    logits: torch.Tensor, labels: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Mean binary cross-entropy with logits over the known labels of a batch; both [B, C], nan is unknown.

    All unknown gives 0 with a graph. `count` divides instead of the number known here: the whole batch's, when
    this process holds a part of it. Source: FACTS 1 "Loss".
    """
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / max(1, int(known.sum()) if count is None else count)


# ---------------------------------------------------------------------------------------------------- 7. Scenarios


@dataclass(frozen=True)
class Task:
    """One step of a scenario: the training rows [n] it sees and the label columns it trains."""

    name: str
    rows: np.ndarray
    classes: tuple[int, ...]


def make_tasks(
    scenario: str, labels: np.ndarray, class_names: Sequence[str], parts: int | None, seed: int,
    patients: Sequence[str] | None = None, order: Sequence[str] | None = None, contiguous: bool = False,
    positives_only: bool = False,
) -> list[Task]:  # fmt: skip
    """Cut the training rows (0..N-1 of labels [N, C]) into the tasks of a scenario (FACTS 1 "Scenarios").

    data: `parts` (5) parts, each trains all classes. class: part t trains the t-th class (with fewer parts than
    classes, the t-th group). label: part t trains classes 0..t. joint: one task. zero: none. Parts are disjoint
    and no patient is in two of them; `contiguous` is the authors' cut, ceil(N / parts) rows in file order.
    `positives_only`: class-incremental task t has all positives of its classes instead, so an image with two
    findings is seen twice. `order` names the classes in training order. Tasks keep their rows in file order.
    """
    n, names = len(labels), list(class_names)
    if unknown := [name for name in order or [] if name not in names]:
        raise InputError(f"--class-order {unknown[0]!r}: {nearest(unknown[0], names)}")
    columns = [names.index(name) for name in order or names]
    if sorted(columns) != list(range(len(names))):
        raise InputError(f"--class-order must name each class once: {', '.join(names)}")
    if scenario in ("zero", "joint"):
        return [Task("joint", np.arange(n), tuple(range(len(names))))] if scenario == "joint" else []
    parts = parts or (5 if scenario == "data" else len(names))
    if parts < 1 or (scenario != "data" and parts > len(names)):
        raise InputError(
            f"--parts {parts}: {scenario}-incremental needs 1 to {len(names)} parts, one per class at most"
        )
    part = part_of_rows(n, parts, seed, patients, contiguous)
    groups = (
        [tuple(map(int, group)) for group in np.array_split(columns, parts)] if scenario != "data" else []
    )
    tasks = []
    for t in range(parts):
        rows = np.flatnonzero(part == t)
        if scenario == "data":
            tasks.append(Task(f"part {t + 1}", rows, tuple(range(len(names)))))
            continue
        if positives_only and scenario == "class":
            rows = np.flatnonzero((labels[:, groups[t]] == 1).any(1))
        name = ", ".join(names[c] for c in groups[t])
        trained = groups[t] if scenario == "class" else sum(groups[: t + 1], ())
        tasks.append(Task(name if scenario == "class" else f"+ {name}", rows, trained))
    if empty := [task.name for task in tasks if not len(task.rows)]:
        raise InputError(f"--parts {parts}: task {empty[0]!r} has no images; use fewer parts")
    return tasks


def part_of_rows(
    n: int, parts: int, seed: int, patients: Sequence[str] | None, contiguous: bool
) -> np.ndarray:
    """The part [N] of every row: whole patients in random order, or contiguous rows."""
    if contiguous:
        return np.arange(n) // max(1, math.ceil(n / parts))
    ids, patient = np.unique(np.arange(n) if patients is None else np.asarray(patients), return_inverse=True)
    if parts > len(ids):
        raise InputError(f"--parts {parts} is larger than the number of training patients ({len(ids)})")
    order = np.random.default_rng(seed).permutation(len(ids))
    part = np.empty(len(ids), np.int64)
    for t, chosen in enumerate(np.array_split(order, parts)):
        part[chosen] = t
    return part[patient]


# ------------------------------------------------------------------------------------------------------ 8. Metrics


def evaluate(scores: np.ndarray, predictions: np.ndarray, labels: np.ndarray, class_names=None) -> dict:
    """Multi-label metrics of scores, 0/1 predictions and labels, each [N, C]; nan labels are not scored.

    A class whose known labels have one value is nan, named in a warning and left out of the means; weighted
    means weigh by positives; accuracy is the exact match over fully labelled images. scikit-learn computes each.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    names = list(class_names or map(str, range(labels.shape[1])))
    table = np.full((5, len(names)), np.nan)  # auroc, ap, f1, precision, recall
    support = np.zeros(len(names))
    for c in range(len(names)):
        known = ~np.isnan(labels[:, c])
        y, score, prediction = labels[known, c], scores[known, c], predictions[known, c]
        if len(np.unique(y)) < 2:
            warnings.warn(f"{names[c]}: all known labels of a split are the same; not scored", stacklevel=2)
            continue
        precision, recall, f1, _ = precision_recall_fscore_support(
            y, prediction, average="binary", zero_division=0
        )
        table[:, c] = roc_auc_score(y, score), average_precision_score(y, score), f1, precision, recall
        support[c] = y.sum()
    auroc, ap, f1, precision, recall = table

    def mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
        scored = support > 0
        return (
            float(np.average(values[scored], weights=None if weights is None else weights[scored]))
            if any(scored)
            else math.nan
        )

    complete = ~np.isnan(labels).any(1)
    exact = float((predictions == labels)[complete].all(1).mean()) if complete.any() else math.nan
    return {
        "auroc_macro": mean(auroc), "auroc_weighted": mean(auroc, support),
        "f1_macro": mean(f1), "f1_weighted": mean(f1, support),
        "precision_weighted": mean(precision, support), "recall_weighted": mean(recall, support),
        "accuracy": exact, "ap_macro": mean(ap),
        "auroc": dict(zip(names, auroc.tolist())), "f1": dict(zip(names, f1.tolist())),
        "ap": dict(zip(names, ap.tolist())), "n": len(labels),
    }  # fmt: skip


def bootstrap_ci(
    scores: np.ndarray, labels: np.ndarray, patients: Sequence[str], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of macro AUROC, resampling patients with replacement; (nan, nan) when nothing can be scored.

    A resampled patient is a weight on its images, so one sort per class serves all resamples; tied scores
    count one half, as in scikit-learn's weighted AUROC.
    """
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=resamples)
    total, scored = np.zeros(resamples), np.zeros(resamples)
    for c in range(labels.shape[1]):
        known = np.flatnonzero(~np.isnan(labels[:, c]))
        known = known[np.argsort(scores[known, c], kind="stable")]
        if not len(known):
            continue
        first = np.flatnonzero(np.diff(scores[known, c], prepend=-np.inf))  # where each run of ties begins
        positive = labels[known, c] == 1
        for block in np.array_split(np.arange(resamples), max(1, resamples * len(known) // 10_000_000)):
            weight = drawn[np.ix_(block, patient[known])].astype(np.float64)  # [R, n]
            p = np.add.reduceat(weight * positive, first, axis=1)
            q = np.add.reduceat(weight * ~positive, first, axis=1)
            pairs = p.sum(1) * q.sum(1)
            wins = (p * (q.cumsum(1) - q / 2)).sum(1)
            total[block] += np.divide(wins, pairs, out=np.zeros(len(block)), where=pairs > 0)
            scored[block] += pairs > 0
    if not scored.any():
        return math.nan, math.nan
    low, high = np.percentile(total[scored > 0] / scored[scored > 0], [2.5, 97.5])
    return float(low), float(high)


def continual_metrics(auroc: np.ndarray, tasks: Sequence[Task], zero: np.ndarray) -> dict[str, float]:
    """Average AUROC, forgetting, backward and forward transfer (DESIGN "Definitions"); nan for a mean over nothing.

    auroc [T, C]: test AUROC of class c after task t; zero [C]: zero-shot. Classes that cannot be scored are left out.
    """
    grid = np.vstack([zero, *auroc])  # [T + 1, C], row 0 is zero-shot
    last = len(grid) - 1
    first = {
        c: next((t for t, task in enumerate(tasks, 1) if c in task.classes), None) for c in range(len(zero))
    }
    kept = [c for c in range(len(zero)) if not np.isnan(grid[:, c]).any()]
    earlier = [c for c in kept if first[c] and first[c] < last]
    later = [c for c in kept if first[c] and first[c] > 1]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    return {
        "average_auroc": mean([grid[last, c] for c in kept]),
        "forgetting": mean([grid[first[c] : last, c].max() - grid[last, c] for c in earlier]),
        "backward_transfer": mean([grid[last, c] - grid[first[c], c] for c in earlier]),
        "forward_transfer": mean([grid[first[c] - 1, c] - grid[0, c] for c in later]),
    }


# ----------------------------------------------------------------------------------------------------- 9. Training


def setting(default, help: str, **metadata):
    """A field of Config with its help; choices, many (several values give several runs) or type for the parser."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from it. None is settled by the data (see `settle`)."""

    data: str = setting("demo", "data set", choices=("demo", "csv", "nih", "chexpert", "mimic", "chestmnist"))
    data_dir: str | None = setting(None, "folder of the data set")
    labels_csv: str | None = setting(
        None, "label file instead of the data set's own (csv, chexpert, nih, mimic)"
    )
    classes: tuple[str, ...] | None = setting(
        None, "findings to use, in this order (default: all; CheXpert: 5)", nargs="+"
    )
    view: str = setting("all", "views to use (chexpert, mimic)", choices=("all", "frontal", "lateral"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(
        None, "what a blank label becomes (default: csv ignore, else zero)", choices=("zero", "ignore")
    )
    size: int = setting(224, "image side of ChestMNIST", choices=(28, 64, 128, 224))
    demo_images: int = setting(6000, "number of phantoms in the demo")
    skip_bad_images: bool = setting(False, "leave unreadable images out, and count them, instead of stopping")

    encoder: str = setting("tiny", "tiny, biomedclip, biovil, a folder, or a transformers CLIP or SigLIP id")
    encoder_dir: str | None = setting(
        None, "folder with the encoder's files as published; no network is used"
    )
    crop: int | None = setting(
        None, "centre crop instead of the encoder's default (biovil: 512, its own is 480)", type=int
    )

    scenario: str = setting(
        "data", "how training data arrive", choices=("data", "class", "label", "joint", "zero"), many=True
    )
    parts: int | None = setting(
        None, "number of parts (default: data 5; class and label one per class)", type=int
    )
    class_order: tuple[str, ...] | None = setting(
        None, "order in which classes arrive; `random` draws it by seed", nargs="+"
    )
    contiguous: bool = setting(False, "cut parts in file order, as the authors do, instead of by patient")
    positives_only: bool = setting(False, "class-incremental: train on the positives of each class only")

    method: str = setting("retune", "retune, or a baseline", choices=("retune",))
    adaptor: str = setting(
        "mlp", "mlp (the paper's), linear, or residual (ours)", choices=("mlp", "linear", "residual")
    )
    adapt: str = setting("both", "which towers get an adaptor", choices=("both", "shared", "image", "text"))
    pool: str = setting(
        "mean", "how prompts of one class and polarity join", choices=("mean", "single", "max")
    )
    negatives: bool = setting(True, "use positive prompts alone", flag="--no-negatives")
    score: str = setting("diff", "score for AUROC: diff, as in the loss, or pos", choices=("diff", "pos"))
    logit_scale: float = setting(1.0, "factor on the logits (the authors use none)")
    prompts: str = setting(str(HERE / "prompts.json"), "file of positive and negative prompts")
    wording: str = setting(
        "specific", "prompts of each finding, or generic templates", choices=("specific", "generic")
    )

    epochs: int | None = setting(None, "epochs per task (authors and small sets: 10)", type=int)
    lr: float | None = setting(
        None, "learning rate (authors: 1e-4; under 20,000 training images: 1e-3)", type=float
    )
    batch_size: int | None = setting(
        None, "batch size (authors: 6144; under 20,000 training images: 64)", type=int
    )
    optimizer: str = setting("adam", "optimiser, kept across tasks", choices=("adam", "sgd"))
    seed: int = setting(27, "seed; several give mean and standard deviation", many=True)

    output: str | None = setting(
        None, "folder of the run (default: runs/<data>-<encoder>-<scenario>-seed<seed>)"
    )
    cache_dir: str = setting("runs/cache", "folder of cached embeddings")
    device: str = setting("auto", "auto, cpu, cuda, cuda:0, mps")
    precision: str = setting("fp32", "arithmetic of the frozen encoder", choices=("fp32", "bf16", "fp16"))
    store: str = setting("fp32", "number format of cached embeddings", choices=("fp32", "fp16"))
    encode_batch: int = setting(32, "images per encoder batch")
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that decode images")

    def __post_init__(self):
        for name in ("epochs", "batch_size", "demo_images", "encode_batch", "lr", "logit_scale", "parts"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name.replace('_', '-')} {value} must be positive")

    @property
    def folder(self) -> Path:
        encoder = Path(self.encoder).name
        return Path(self.output or f"runs/{self.data}-{encoder}-{self.scenario}-seed{self.seed}")


AUTHORS = {"epochs": 10, "lr": 1e-4, "batch_size": 6144}  # FACTS 1 "Optimiser"
SMALL = {"epochs": 10, "lr": 1e-3, "batch_size": 64}  # (ours) enough steps to learn from a small set
SMALL_SET = 20_000  # training images below which SMALL applies
ELSEWHERE = (
    "data_dir",
    "output",
    "cache_dir",
    "device",
    "workers",
    "encode_batch",
    "encoder_dir",
)  # not results


def settle(config: Config, n_train: int, class_names: Sequence[str]) -> Config:
    """Fill what the user left open: the authors' hyperparameters, or SMALL's; a class order drawn by seed."""
    preset = SMALL if n_train < SMALL_SET else AUTHORS
    chosen = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.class_order == ("random",):
        order = np.random.default_rng(config.seed).permutation(len(class_names))
        chosen["class_order"] = tuple(class_names[i] for i in order)
    return dataclasses.replace(config, **chosen)


def pick_device(name: str) -> str:
    """`auto` is the GPU of this rank, Apple's GPU, or the CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block only; module initialisation has no generator argument."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


WINDOW_BYTES = 64 << 20  # embeddings held in memory at once while training
BLOCK = 64  # neighbouring rows that are read together when a task is larger than the window


def shuffled_windows(rows: torch.Tensor, window: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Split rows [n] into windows to load at once: all rows, or blocks of neighbours in random order.

    A task of at most `window` rows is one window, so its shuffle is the authors' full permutation.
    """
    if len(rows) <= window:
        yield rows
        return
    blocks = rows.split(BLOCK)
    yield from torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)]).split(window)


def fit(
    model: nn.Module, bank: PromptBank, embeddings: np.ndarray, labels: torch.Tensor, task: Task,
    optimizer: torch.optim.Optimizer, *, epochs: int, batch_size: int, generator: torch.Generator,
    device: str = "cpu", penalty: Callable | None = None,
) -> None:  # fmt: skip
    """Train `model` on one task: rows of embeddings [N, D] and labels [N, C], the task's columns only.

    Under torchrun each rank takes every world-th row of the same global batch and gradients are summed, which
    is the single process's step. `penalty(images, logits)` is added to the loss (baselines).
    Raises InputError when the loss is not finite. Source: FACTS 1 "Optimiser", "Scenarios".
    """
    rank, world = ranks()
    rows, columns = torch.from_numpy(task.rows), torch.tensor(task.classes, device=device)
    window = max(1, WINDOW_BYTES // (4 * embeddings.shape[1] * batch_size)) * batch_size
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loaded, step = None, 0
    with progress(total=epochs * math.ceil(len(rows) / batch_size), desc=task.name, unit="step") as bar:
        for _ in range(epochs):
            for chosen in shuffled_windows(rows, window, generator):
                if loaded is not chosen:
                    x, y, loaded = read_rows(embeddings, chosen), labels[chosen], chosen
                for batch in torch.randperm(len(chosen), generator=generator).split(batch_size):
                    target = y[batch][:, columns.cpu()]  # [B, C of the task]
                    count, batch, target = (
                        int((~target.isnan()).sum()),
                        batch[rank::world],
                        target[rank::world],
                    )
                    images = x[batch].to(device, non_blocking=True)
                    logits = model.logits(images, bank)
                    loss = prompt_contrastive_loss(logits[:, columns], target.to(device), count)
                    if penalty is not None:
                        loss = loss + penalty(images, logits) / world
                    step += 1
                    if not math.isfinite(loss.item()):
                        raise InputError(
                            f"task {task.name!r}, step {step}: the loss is {loss.item()}; lower --lr"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    sum_gradients(parameters)
                    optimizer.step()
                    bar.update()


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add the gradients of all ranks in one message."""
    if ranks()[1] == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(g.view_as(p))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    from safetensors.torch import save_file

    with atomic(path) as partial:
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(plain, partial, {"retune": json.dumps(metadata)})


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata that `save_tensors` wrote; InputError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["retune"])  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it to train again from there") from None


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit this model ({' '.join(str(error).split())})") from None


@dataclass
class Results:
    """What a run gives: metrics.json's content and where its folder is."""

    folder: Path
    metrics: dict


def claim(folder: Path, identity: dict) -> None:
    """Make `folder` this configuration's, or refuse with what differs from the configuration it holds."""
    path = folder / "config.json"
    if path.exists():
        old = read_json(path)
        new = json.loads(json.dumps(identity))
        differ = [k for k in sorted({*old, *new} - set(ELSEWHERE)) if old.get(k) != new.get(k)]
        if differ:
            key = differ[0]
            raise InputError(
                f"{folder}: holds a run with another {', '.join(differ)} ({key} {old.get(key)!r}, now {new.get(key)!r});"
                " choose another --output or delete it"
            )
    else:
        write_json(path, identity)


def cut_tasks(config: Config, data: Radiographs) -> list[Task]:
    """The scenario's tasks over the readable training images; their rows count in the whole data set."""
    train = data.where("train")
    tasks = make_tasks(
        config.scenario, data.labels[train], data.class_names, config.parts, config.seed, data.patients[train],
        config.class_order, config.contiguous, config.positives_only,
    )  # fmt: skip
    return [dataclasses.replace(task, rows=train[task.rows]) for task in tasks]


def run(config: Config) -> Results:
    """A whole scenario: embed, zero-shot, each task, metrics after each; resumes at the first unfinished task.

    Only what a run's folder holds decides what is left to do: finished tasks are not trained again and their
    metrics come from their saved adaptors, so an interrupted run ends with the same bytes.
    """
    data = load_radiographs(config)
    config = settle(config, len(data.where("train")), data.class_names)
    device = pick_device(config.device)
    prompts = load_prompts(Path(config.prompts), data.class_names, config.wording)
    tasks = cut_tasks(config, data)
    encoder = DualEncoder.load(config.encoder, config.encoder_dir, crop=config.crop)
    introduce(config, data, tasks, device)
    digest = hashlib.sha256(repr((data.names, data.patients.tolist(), data.split.tolist())).encode())
    digest.update(data.labels.tobytes())
    identity = dataclasses.asdict(config) | {
        "prompts": prompts, "encoder_fingerprint": encoder.fingerprint(), "data_fingerprint": digest.hexdigest(),
    }  # fmt: skip
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False) if ranks()[0] == 0 else contextlib.nullcontext():
        claim(folder, identity)
        if (folder / "metrics.json").exists():
            say(f"{folder}: this run is finished; delete the folder to run it again")
            return Results(folder, read_json(folder / "metrics.json"))
        embeddings = embed(
            encoder, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
            precision=config.precision, store=config.store, device=device, skip_bad_images=config.skip_bad_images,
        )  # fmt: skip
        if bad := embedding_facts(embeddings)["unreadable"]:
            say(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
            data.split[list(bad)] = "unreadable"
            tasks = cut_tasks(config, data)
        bank = embed_prompts(encoder, prompts).to(device)
        results = train_and_measure(config, identity, data, tasks, embeddings, bank, device)
        report(results, data, tasks)
        return results


def build_model(config: Config, dim: int, adapt: str) -> RETune:
    with seeded(config.seed):
        return RETune(dim, config.adaptor, adapt, config.pool, config.negatives, config.logit_scale)


def train_and_measure(config, identity, data, tasks, embeddings, bank, device) -> Results:
    """Zero-shot, then every task: train it or load what an earlier process saved, and measure."""
    folder, dim = config.folder, embeddings.shape[1]
    labels = torch.from_numpy(data.labels)

    def measure(model: RETune) -> dict:
        return {
            split: measure_split(model, bank, embeddings, data, split, config.score)
            for split in ("val", "test")
        }

    zero_shot = measure(build_model(config, dim, "none").to(device))
    model = build_model(config, dim, config.adapt).to(device)
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    done, seconds = restore(folder, model, optimizer)
    metadata = {
        "classes": list(data.class_names), "prompts": identity["prompts"], "score": config.score,
        "encoder": config.encoder, "crop": config.crop, "encoder_fingerprint": identity["encoder_fingerprint"],
        "model": {"dim": dim, "adaptor": config.adaptor, "adapt": config.adapt, "pool": config.pool,
                  "negatives": config.negatives, "logit_scale": config.logit_scale},
    }  # fmt: skip
    after_task = []
    for k, task in enumerate(tasks, 1):
        path = folder / f"task_{k}.safetensors"
        if k <= done:
            snapshot = build_model(config, dim, config.adapt).to(device)
            load_weights(snapshot, load_tensors(path)[0], path)
            after_task.append(measure(snapshot))
            continue
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(
            config.seed * 10_007 + k
        )  # its own, so resuming needs no state
        fit(
            model, bank, embeddings, labels, task, optimizer, epochs=config.epochs, batch_size=config.batch_size,
            generator=generator, device=device,
        )  # fmt: skip
        seconds += time.perf_counter() - start
        if ranks()[0] == 0:
            save_tensors(path, model.state_dict(), metadata)
            keep(folder, model, optimizer, k, seconds)
        after_task.append(measure(model))
    if ranks()[0] == 0:
        save_tensors(folder / "adaptors.safetensors", model.state_dict(), metadata)
    facts = embedding_facts(embeddings)
    auroc = np.array([[m["test"]["auroc"][c] for c in data.class_names] for m in [zero_shot, *after_task]])
    cost = {
        "trainable_parameters": sum(p.numel() for p in model.parameters()) if tasks else 0,
        "embed_seconds": facts["seconds"], "train_seconds": seconds,
        "images_per_second": len(embeddings) / facts["seconds"], "peak_memory_mb": peak_memory_mb(),
    }  # fmt: skip
    names = [
        {"name": t.name, "classes": [data.class_names[c] for c in t.classes], "n_train": len(t.rows)}
        for t in tasks
    ]
    return Results(folder, {
        "config": identity, "classes": list(data.class_names), "tasks": names, "zero_shot": zero_shot,
        "after_task": after_task, "continual": continual_metrics(auroc[1:], tasks, auroc[0]), "cost": cost,
    })  # fmt: skip


@torch.inference_mode()
def score_rows(model, bank, embeddings, rows: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and decisions, float32 [n, C], of the given rows of the embeddings [N, D]."""
    device, parts = bank.embeddings.device, []
    for chosen in torch.from_numpy(rows).split(8192):
        parts.append(model.scores(read_rows(embeddings, chosen).to(device), bank, rule))
    return tuple(torch.cat(part).float().cpu().numpy() for part in zip(*parts))


def measure_split(model, bank, embeddings, data: Radiographs, split: str, rule: str) -> dict:
    """metrics.json's M of one split, with the bootstrap interval."""
    rows = data.where(split)
    scores, predictions = score_rows(model, bank, embeddings, rows, rule)
    metrics = evaluate(scores, predictions, data.labels[rows], data.class_names)
    return metrics | {"auroc_macro_ci": list(bootstrap_ci(scores, data.labels[rows], data.patients[rows]))}


def keep(folder: Path, model, optimizer, task: int, seconds: float) -> None:
    """Save what the next task starts from, once task `task` is saved: weights and the optimiser's state."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{key}": value for key, value in values.items() if value is not None}
    save_tensors(folder / "resume.safetensors", state, {"task": task, "seconds": seconds})


def restore(folder: Path, model, optimizer) -> tuple[int, float]:
    """Load what `keep` saved; (finished tasks, seconds they took), (0, 0.0) for a new run."""
    path = folder / "resume.safetensors"
    if not path.exists():
        return 0, 0.0
    tensors, metadata = load_tensors(path)
    load_weights(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["task"], metadata["seconds"]


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1024**2
    )


# ------------------------------------------------------------------------------------------------------ 10. Report


def introduce(config: Config, data: Radiographs, tasks: Sequence[Task], device: str) -> None:
    """Say what will run before it runs: data, what labels became, encoder, settings in force."""
    if data.note:
        say(data.note)
    counts = ", ".join(f"{len(data.where(s)):,} {s}" for s in ("train", "val", "test"))
    say(
        f"data: {config.data}: {counts} images of {len(np.unique(data.patients)):,} patients; encoder: {config.encoder}"
    )
    positives = [f"{name} {np.nanmean(data.labels[:, c]):.0%}" for c, name in enumerate(data.class_names)]
    say(f"findings: {', '.join(positives)}")
    ours = " (ours)" if config.adaptor == "residual" else ""
    say(
        f"{config.scenario}-incremental, {len(tasks)} tasks; adaptor {config.adaptor}{ours} on {config.adapt};"
        f" {config.optimizer} lr {config.lr:g}, batch {config.batch_size}, {config.epochs} epochs a task,"
        f" logit scale {config.logit_scale:g}, pool {config.pool}, score {config.score}, seed {config.seed}, {device}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """An aligned Markdown table; floats get three decimals, None and nan a dash."""

    def text(value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in [header, *rows]]
    width = [max(len(row[j]) for row in cells) for j in range(len(header))]
    lines = [
        "| "
        + " | ".join(v.ljust(w) if j == 0 else v.rjust(w) for j, (v, w) in enumerate(zip(row, width)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join(("-" * (w + 1) + (":" if j else "-")) for j, w in enumerate(width)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def task_table(metrics: dict) -> str:
    """One row per task, zero-shot first; AUROC of each class, then macro columns; test split."""
    config = metrics["config"]
    kind = f" [{config['adaptor']}, ours]" if config["adaptor"] == "residual" else ""
    rows = []
    for name, m in zip(["zero-shot", *[f"{k}. {t['name']}{kind}" for k, t in enumerate(metrics["tasks"], 1)]],
                       [metrics["zero_shot"], *metrics["after_task"]]):  # fmt: skip
        m = m["test"]
        rows.append(
            [name, *m["auroc"].values(), m["auroc_macro"], m["ap_macro"], m["f1_macro"], m["accuracy"]]
        )
    header = ["after task", *metrics["classes"], "macro AUROC", "macro AP", "macro F1", "exact match"]
    return markdown_table(header, rows)


def results_line(metrics: dict) -> str:
    """A sentence for a paper: macro AUROC with its 95% interval."""
    config, last = metrics["config"], (metrics["after_task"] or [metrics["zero_shot"]])[-1]["test"]
    low, high = (float("nan") if v is None else v for v in last["auroc_macro_ci"])
    return (
        f"RE-tune ({config['encoder']}, {config['data']}, {config['scenario']}, seed {config['seed']}): macro AUROC"
        f" {last['auroc_macro'] or math.nan:.3f} (95% CI {low:.3f}-{high:.3f}, 1,000 patient-level bootstrap resamples,"
        f" n = {last['n']:,} test images)"
    )


def summary(metrics: dict) -> str:
    """Table, continual-learning lines and results line, for the terminal and table.md."""
    values = {k: "-" if v is None or math.isnan(v) else f"{v:+.3f}" for k, v in metrics["continual"].items()}
    lines = [
        f"{name.replace('_', ' ')}: {value.lstrip('+') if name == 'average_auroc' else value}"
        for name, value in values.items()
    ]
    notice = (
        ["Demo: synthetic phantoms; these numbers are not clinical.\n"]
        if metrics["config"]["data"] == "demo"
        else []
    )
    return "\n".join(
        [
            *notice,
            "AUROC on the test split\n",
            task_table(metrics),
            "",
            "; ".join(lines),
            "",
            results_line(metrics),
        ]
    )


def report(results: Results, data: Radiographs, tasks: Sequence[Task]) -> None:
    """Write splits.csv, the figures, table.md and, last, metrics.json: its presence says that the run is whole."""
    if ranks()[0] != 0:
        return
    folder, metrics = results.folder, results.metrics
    seen: dict[int, list[str]] = {}
    for k, task in enumerate(tasks, 1):
        for row in task.rows:
            seen.setdefault(int(row), []).append(str(k))
    with atomic(folder / "splits.csv") as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", "split", "task"])
        for i, line in enumerate(zip(data.names, data.patients, data.split)):
            writer.writerow([*line, " ".join(seen.get(i, []))])
    heatmap(folder / "auroc.png", metrics, "auroc", "Test AUROC")
    heatmap(folder / "f1.png", metrics, "f1", "Test F1")
    with atomic(folder / "table.md") as partial:
        partial.write_text(summary(metrics) + "\n", encoding="utf-8")
    write_json(folder / "metrics.json", metrics)
    (folder / "resume.safetensors").unlink(missing_ok=True)


def heatmap(path: Path, metrics: dict, key: str, title: str) -> None:
    """Task x class picture with the zero-shot row on top and the values in the cells; grey, for any printer."""
    from matplotlib.figure import Figure

    stages = [metrics["zero_shot"], *metrics["after_task"]]
    grid = np.array(
        [[m["test"][key][c] for c in metrics["classes"]] for m in stages], dtype=float
    )  # [T + 1, C]
    names = ["zero-shot", *[f"{k}. {t['name']}" for k, t in enumerate(metrics["tasks"], 1)]]
    figure = Figure(figsize=(2.5 + 0.95 * grid.shape[1], 1.6 + 0.42 * len(grid)), layout="constrained")
    axes = figure.add_subplot()
    low = 0.5 if key == "auroc" else 0.0
    picture = axes.imshow(grid, cmap="Greys", vmin=low, vmax=1, aspect="auto")
    for t, c in np.ndindex(*grid.shape):
        value = grid[t, c]
        color = "white" if value > low + 0.6 * (1 - low) else "black"
        axes.text(c, t, "-" if math.isnan(value) else f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(grid.shape[1]), metrics["classes"], rotation=25, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.axhline(0.5, color="black", linewidth=2)
    config = metrics["config"]
    axes.set_title(f"{title}: {config['data']}, {config['encoder']}, {config['scenario']}", fontsize=11)
    figure.colorbar(picture, ax=axes)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def seeds_table(runs: Sequence[Results]) -> str:
    """Mean and standard deviation over the seeds of each scenario, last task, test split."""
    rows = []
    for scenario in dict.fromkeys(r.metrics["config"]["scenario"] for r in runs):
        group = [r.metrics for r in runs if r.metrics["config"]["scenario"] == scenario]
        last = [(m["after_task"] or [m["zero_shot"]])[-1]["test"] for m in group]
        columns = [
            [m["zero_shot"]["test"]["auroc_macro"] for m in group],
            *[[m[k] for m in last] for k in ("auroc_macro", "f1_macro", "accuracy")],
        ]
        columns += [
            [m["continual"][k] for m in group]
            for k in ("forgetting", "backward_transfer", "forward_transfer")
        ]
        spread = [np.array([math.nan if v is None else v for v in column], float) for column in columns]
        rows.append(
            [
                scenario,
                len(group),
                *[
                    "-" if np.isnan(v).any() else f"{v.mean():.3f} ± {v.std(ddof=len(v) > 1):.3f}"
                    for v in spread
                ],
            ]
        )
    header = [
        "scenario",
        "seeds",
        "zero-shot AUROC",
        "macro AUROC",
        "macro F1",
        "exact match",
        "forgetting",
        "backward transfer",
        "forward transfer",
    ]
    return markdown_table(header, rows)


# ------------------------------------------------------------------------------------------------ 11. Command line


def build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with one option for each field of a Config dataclass made with `setting`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for item in dataclasses.fields(config_class):
        options = dict(item.metadata)
        text, many, flag = options.pop("help"), options.pop("many", False), options.pop("flag", None)
        name = flag or f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            action = "store_false" if item.default else "store_true"
            parser.add_argument(name, dest=item.name, action=action, help=text)
            continue
        if item.default is not None:
            options.setdefault("type", type(item.default))
            text += f" (default: {Path(item.default).name if item.name == 'prompts' else item.default})"
        if many:
            options["nargs"] = "+"
        default = [item.default] if many else item.default
        parser.add_argument(name, dest=item.name, default=default, help=text.replace("%", "%%"), **options)
    return parser


def build_configs(config_class: type, arguments: argparse.Namespace) -> list:
    """One Config for each combination of the options that take several values."""
    fields = dataclasses.fields(config_class)
    values = {f.name: getattr(arguments, f.name) for f in fields}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    many = [f.name for f in fields if f.metadata.get("many")]
    return [
        config_class(**values | dict(zip(many, chosen)))
        for chosen in itertools.product(*[dict.fromkeys(values[name]) for name in many])
    ]


def predict(images: Sequence[str], folder: Path, config: Config) -> list[dict]:
    """Score images with a run's saved adaptors alone: [{"image", "findings": {name: {"score", "present"}}}].

    Raises InputError when the encoder is not the one that the adaptors were trained on.
    """
    path = folder / "adaptors.safetensors"
    weights, known = load_tensors(path)
    name = known["encoder"] if config.encoder == "tiny" else config.encoder
    encoder = DualEncoder.load(name, config.encoder_dir, crop=config.crop or known["crop"])
    if encoder.fingerprint() != known["encoder_fingerprint"]:
        raise InputError(
            f"{path}: was trained on another encoder than {name!r} is now; name it with --encoder"
        )
    model = RETune(**known["model"]).eval()
    load_weights(model, weights, path)
    pixels = torch.stack([encoder.transform(read_image(Path(image))) for image in images])
    bank = embed_prompts(encoder, known["prompts"])
    with torch.inference_mode():
        scores, decisions = model.scores(encoder.encode_images(pixels), bank, known["score"])
    return [
        {"image": image, "findings": {name: {"score": round(float(s), 6), "present": bool(d)} for name, s, d in zip(known["classes"], row, decided)}}
        for image, row, decided in zip(images, scores, decisions)
    ]  # fmt: skip


def print_predictions(predictions: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(predictions, indent=1))
        return
    names = list(predictions[0]["findings"])
    rows = [
        [
            p["image"],
            *[f"{f['score']:.3f} {'yes' if f['present'] else 'no':>3}" for f in p["findings"].values()],
        ]
        for p in predictions
    ]
    print(markdown_table(["image", *names], rows))


def join_ranks() -> None:
    """Meet the other processes when torchrun started us; embedding may keep ranks apart for hours."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))


def run_all(configs: Sequence[Config]) -> None:
    """Run each configuration, print its table, and over several seeds or scenarios the mean and deviation."""
    if len(configs) > 1 and configs[0].output:
        base = Path(configs[0].output)
        configs = [dataclasses.replace(c, output=str(base / f"{c.scenario}-seed{c.seed}")) for c in configs]
    runs = []
    for config in configs:
        runs.append(run(config))
        say(f"\n{summary(runs[-1].metrics)}\n\nwritten to {runs[-1].folder}\n")
    if len(runs) > 1:
        say("Last task, test split, mean ± standard deviation over seeds\n\n" + seeds_table(runs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 on success, 2 with one line on standard error for bad input."""
    parser = build_parser(Config, __doc__)
    parser.add_argument(
        "--predict", nargs="+", metavar="IMAGE", help="score images with the adaptors of --run"
    )
    parser.add_argument("--run", type=Path, help="a run's folder, for --predict")
    parser.add_argument("--json", action="store_true", help="print predictions as JSON")
    parser.add_argument("--convert", metavar="ENCODER", help="write an encoder in our folder format to --to")
    parser.add_argument("--to", type=Path, help="new folder, for --convert")
    arguments = parser.parse_args(argv)
    try:
        configs = build_configs(Config, arguments)
        if arguments.convert:
            if arguments.to is None:
                raise InputError("--convert needs --to, the folder to write")
            DualEncoder.load(arguments.convert, arguments.encoder_dir, crop=arguments.crop).save(arguments.to)
            print(f"written to {arguments.to}")
        elif arguments.predict:
            if arguments.run is None:
                raise InputError("--predict needs --run, the folder of a finished run")
            print_predictions(predict(arguments.predict, arguments.run, configs[0]), arguments.json)
        else:
            join_ranks()
            run_all(configs)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.modules["retune"] = sys.modules[
        "__main__"
    ]  # modules that import retune get this one, not a second copy
    sys.exit(main())
