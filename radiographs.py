"""Chest radiographs with the labels of their findings: reading them from files, splitting them by patient.

`Radiographs` is what everything else works on; `DATASETS` has a loader for each kind of data: the demo's
phantoms, a CSV of your own, and the published sets of `public_data.py`. What a user's files contain is checked
here: labels, paths that leave their folder, images too large or damaged, patients in two splits.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import math
import os
import posixpath
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retune import Config, InputError, nearest

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the patients where a data set has no splits
# Limits against files that unpack to more than any memory holds
MAX_PIXELS = 80_000_000  # of an image; it is refused before it is decoded
MAX_TABLE = 1 << 30  # bytes of a table, unpacked
MAX_ID = 1000  # characters of a patient's id: an array of texts gives each the space of the longest


@dataclass
class Radiographs:
    """A data set: N images with the labels of C findings.

    images: paths, or uint8 [N, H, W] (an array, or what yields [H, W] by row and draws it on demand).
    labels: float32 [N, C], 1 / 0 / nan; nan is unknown: never trained on, never scored.
    patients, split: [N] texts; split is "train", "val" or "test". names: [N], what reports call an image.
    rows: [N], where each image's labels stand ("labels.csv row 7"). reports: [N] texts, if there are any.
    note: what the loader decided, for the user to read. key: identifies images that are not files.
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
        self.labels = np.asarray(self.labels, np.float32)
        self.patients, self.split = id_array(self.patients), np.asarray(self.split, "<U10")
        self.names = [f"image-{i:06d}" for i in range(n)] if self.names is None else list(self.names)
        self.rows = [f"row {i + 2}" for i in range(n)] if self.rows is None else list(self.rows)
        if {len(self.labels), len(self.patients), len(self.split), len(self.names), len(self.rows)} != {n}:
            raise InputError(f"labels, patients, split, names, rows: give one for each of {n} images")
        if self.labels.shape != (n, len(self.class_names)):
            wanted = f"{n} images x {len(self.class_names)} classes"
            raise InputError(f"labels {self.labels.shape} are not {wanted}")
        if not (np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)).all():
            raise InputError("labels must be 1, 0 or nan")

    def where(self, split: str) -> np.ndarray:
        """Rows of one split, int64, in file order."""
        return np.flatnonzero(self.split == split)


def id_array(ids: Sequence[str]) -> np.ndarray:
    """Patient ids as one array [N]; InputError for one that would make it huge."""
    ids = list(map(str, ids))
    if (longest := max(map(len, ids), default=0)) > MAX_ID:
        raise InputError(f"a patient id has {longest:,} characters; at most {MAX_ID:,} are read")
    return np.array(ids, str)


def patient_split(patients: Sequence[str], shares: dict[str, float]) -> np.ndarray:
    """The split of every image [N] by a hash of its patient id: new patients never move the old ones.

    shares: split -> share of the patients; their sum is 1.
    """
    edges = np.cumsum(list(shares.values()))[:-1]
    ids, patient = np.unique(id_array(patients), return_inverse=True)
    position = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") / 2**64 for p in ids]
    return np.array(list(shares))[np.searchsorted(edges, position, side="right")][patient]


def read_table(path: Path, required: Sequence[str] = ()) -> dict[str, list[str]]:
    """A CSV (or .gz) as {column: stripped values}; InputError names file and row. Row 1 is the header."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_TABLE + 1)
        if len(content) > MAX_TABLE:
            raise InputError(f"{path}: unpacks to more than the limit of {MAX_TABLE:,} bytes")
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header, *rows = [[value.strip() for value in row] for row in lines] or [[]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable CSV ({error})") from None
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{path}: column {min(twice)!r} is there twice")
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {missing[0]!r}; the columns are {', '.join(header) or 'none'}")
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    if not rows:
        raise InputError(f"{path}: no rows")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path} row {i + 2}: {len(row)} fields where the header has {len(header)}")
    return {name: [row[j] for row in rows] for j, name in enumerate(header)}


def parse_labels(
    table: dict[str, list[str]], classes: Sequence[str], path: Path, uncertain: str, blank: str
) -> tuple[np.ndarray, str]:
    """Label columns as float32 [N, C], and a note that counts what -1 and blank labels became.

    uncertain: ones | zeros | ignore (CheXpert's U-Ones, U-Zeros, U-Ignore); blank: zero | ignore.
    """
    policy = {"ones": 1.0, "zeros": 0.0, "zero": 0.0, "ignore": math.nan}
    meaning = {"1": 1.0, "0": 0.0, "-1": policy[uncertain], "": policy[blank]}
    labels, counts = np.empty((len(table[classes[0]]), len(classes)), np.float32), {"-1": 0, "": 0}
    for j, name in enumerate(classes):
        number = Counter(table[name])
        plain = {value: "" if value.lower() == "nan" else value.removesuffix(".0") for value in number}
        for value, text in plain.items():
            if text not in meaning:
                where = f"{path} row {table[name].index(value) + 2}, column {name!r}"
                raise InputError(f"{where}: label {value[:40]!r} is not 1, 0, -1, blank")
            if text in counts:
                counts[text] += number[value]
        labels[:, j] = [meaning[plain[value]] for value in table[name]]
    note = f"labels: {counts['-1']:,} uncertain (-1) -> {uncertain}, {counts['']:,} blank -> {blank}"
    return labels, note


@functools.lru_cache(maxsize=100_000)
def real_folder(folder: str) -> str:
    """`os.path.realpath` that looks at each parent folder once: a data set has 100,000 of them."""
    parent, name = os.path.split(folder)
    if name in ("", os.curdir, os.pardir) or os.path.islink(folder):
        return os.path.realpath(folder)
    return os.path.join(real_folder(parent or os.curdir), name)


def safe_path(root: Path, relative: str, row: str) -> Path:
    """Join a path that a file gave to its root; InputError when it is empty or leaves the root in any way."""
    parts = relative.replace("\\", "/").split("/")
    if not relative or "\0" in relative or not parts[0] or parts[0][1:2] == ":" or ".." in parts:
        raise InputError(f"{row}: path {relative!r} must be relative and stay inside {root}")
    path, base = os.path.join(root, *parts), real_folder(os.fspath(root))
    real = os.path.realpath(path) if os.path.islink(path) else real_folder(os.path.dirname(path))
    if real != base and not real.startswith(os.path.join(base, "")):
        raise InputError(f"{row}: path {relative!r} is a link out of {root}; use real folders")
    return Path(path)


def load_demo(config: Config) -> Radiographs:
    """Synthetic radiographs of `phantoms.py`, drawn when needed. Numbers on them are not clinical."""
    import phantoms

    demo = phantoms.make_phantoms(config.demo_images, seed=0, domain="demo")
    names = [f"phantom-{i:06d}" for i in range(len(demo.labels))]
    source = hashlib.sha256(Path(phantoms.__file__).read_bytes()).hexdigest()
    return Radiographs(
        demo.images, demo.labels, demo.class_names, demo.patients, patient_split(demo.patients, SHARES),
        names, reports=demo.reports, key=f"{config.demo_images} phantoms of {source}",
        note="DEMO: synthetic phantoms, not patients; these numbers say nothing about clinical performance.",
    )  # fmt: skip


def load_csv(config: Config) -> Radiographs:
    """Anybody's own data: `path`, a column per finding (1/0/-1/blank), optional `patient`, `split`, `report`.

    Paths are relative to --data-dir, which holds the only CSV unless --labels-csv names one. Without `split`:
    70/10/20% of the patients by hash. Without `patient` each image counts as a patient, and we say so.
    """
    path = Path(config.labels_csv) if config.labels_csv else one_file(config.root, ["*.csv"])
    table = read_table(path, ["path"])
    names, rows = table["path"], [f"{path} row {i + 2}" for i in range(len(table["path"]))]
    classes = [name for name in table if name not in ("path", "patient", "split", "report")]
    if not classes:
        raise InputError(f"{path}: no finding columns beside path, patient, split and report")
    root = config.root
    images = [safe_path(root, name, row) for name, row in zip(names, rows)]
    labels, note = parse_labels(table, classes, path, config.uncertain, config.blank or "ignore")
    note += "" if "patient" in table else "; no `patient` column: each image counts as a patient of its own"
    patients = table.get("patient", names)
    split = table.get("split") or patient_split(patients, SHARES)
    for patient, value, row in zip(patients, split, rows):
        if not patient or value not in ("train", "val", "test"):
            found = f"patient {patient!r}, split {str(value)!r}"
            raise InputError(f"{row}: {found}; need an id; train, val, test")
    return Radiographs(images, labels, classes, patients, split, names, rows, table.get("report"), note)


def one_file(root: Path, patterns: Sequence[str]) -> Path:
    """The only file of `root` that matches the first pattern which any file matches."""
    found = next(filter(None, (sorted(root.glob(pattern)) for pattern in patterns)), [])
    if len(found) != 1:
        count = f"{len(found)} files match" if found else "no file matches"
        raise InputError(f"{root}: {count} {' or '.join(patterns)}; name the label file with --labels-csv")
    return found[0]


def public(name: str) -> Callable[[Config], Radiographs]:
    """The loader of a published data set, imported when it is called."""
    return lambda config: getattr(importlib.import_module("public_data"), f"load_{name}")(config)


DATASETS: dict[str, Callable[[Config], Radiographs]] = {"demo": load_demo, "csv": load_csv}
DATASETS |= {name: public(name) for name in ("nih", "chexpert", "mimic", "chestmnist")}


def load_radiographs(config: Config) -> Radiographs:
    """The data set that `config` names, with its chosen classes; refuses what would falsify a result."""
    data = DATASETS[config.data](config)
    for name in config.classes or ():
        if name not in data.class_names:
            raise InputError(f"--classes {name!r}: {nearest(name, data.class_names)}")
    wanted = tuple(config.classes or data.class_names)
    if len(set(wanted)) < len(wanted):
        raise InputError(f"--classes names a finding twice: {', '.join(wanted)}")
    columns = [list(data.class_names).index(name) for name in wanted]
    data = dataclasses.replace(data, labels=data.labels[:, columns], class_names=wanted)
    first: dict[str, str] = {}
    home: dict[str, str] = {}
    for name, patient, split, row in zip(data.names, data.patients, data.split, data.rows):
        if first.setdefault(posixpath.normpath(name), row) is not row:
            before = first[posixpath.normpath(name)]
            raise InputError(f"{row}: image {name!r} is there twice, first in {before}")
        if home.setdefault(patient, split) != split:
            raise InputError(f"{row}: patient {str(patient)!r} is in {home[patient]} and in {split}")
    refuse_empty_splits(data)
    return data


def refuse_empty_splits(data: Radiographs) -> None:
    """InputError that names a split without images."""
    for split in ("train", "val", "test"):
        if not (data.split == split).any():
            raise InputError(f"the {split} split has no readable images; add patients or a split column")


def read_image(path: Path) -> torch.Tensor:
    """Decode a PNG, JPEG or DICOM file to uint8 [1 or 3, H, W]; InputError when it is not one.

    More than 8 bits are scaled by the image's own range, since 12-bit images come in 16-bit files. An alpha
    channel is dropped; DICOM's MONOCHROME1 is inverted.
    """
    from PIL import Image
    from torchvision.io import decode_image

    try:
        if path.suffix.lower() in (".dcm", ".dicom"):
            return read_dicom(path)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise InputError(f"{path}: {image.size} pixels are more than the limit of {MAX_PIXELS:,}")
            pixels = decode_png(image) if image.format == "PNG" else None
        pixels = decode_image(str(path)) if pixels is None else pixels
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - decoders raise nearly every type on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable image ({reason})") from None
    pixels = pixels[: {2: 1, 4: 3}.get(len(pixels))]
    return pixels if pixels.dtype == torch.uint8 else stretch(pixels.float())


def decode_png(image) -> torch.Tensor | None:
    """An open PNG as [1, 2, 3 or 4, H, W], by PIL: torchvision 0.29's libpng ends the process on a damaged file.

    None for colours of 16 bits, which PIL would cut to 8: it only finds out whether the file is whole.
    """
    deep = "16" in str(image.tile[0][3]) and not image.mode.startswith("I")
    image.load()
    if deep:
        return None
    image = image.convert({"P": "RGB", "1": "L"}.get(image.mode, image.mode))
    pixels = np.array(image, np.float32 if image.mode.startswith("I") else np.uint8)  # [H, W] or [H, W, C]
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def stretch(pixels: torch.Tensor) -> torch.Tensor:
    """Scale an image's own range to uint8 0..255; a constant image becomes 0."""
    low, high = pixels.aminmax()
    return ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)


def read_dicom(path: Path) -> torch.Tensor:
    """A DICOM image as uint8 [1, H, W], through pydicom, which only users of DICOM need."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: DICOM needs pydicom (pip install pydicom)") from None
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:  # unpacked whole, whatever its size
            raise ValueError("deflated files are not read; store it in another transfer syntax")
        image = pydicom.dcmread(path)
        grey = image.get("SamplesPerPixel", 1) == 1 and int(image.get("NumberOfFrames") or 1) == 1
        if image.Rows * image.Columns > MAX_PIXELS or not grey:
            size = f"{image.Rows} x {image.Columns} pixels"
            raise ValueError(f"{size}; one grey image up to {MAX_PIXELS:,} is read")
        pixels = torch.from_numpy(image.pixel_array.astype(np.float32)).reshape(1, image.Rows, image.Columns)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom's codecs raise nearly every type on a damaged file
        raise InputError(f"{path}: not a readable DICOM image ({type(error).__name__}: {error})") from None
    return stretch(-pixels if image.get("PhotometricInterpretation") == "MONOCHROME1" else pixels)
