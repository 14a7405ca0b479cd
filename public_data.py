"""Loaders of published chest X-ray data sets in the layouts of their releases; `retune.py` imports them by name.

A loader takes a `Config` and returns `Radiographs`. Label policies, safe paths and errors are retune's. Whether an
image exists is found out when it is read, so a set of hundreds of thousands of images opens in seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import math
import os
import re
import shutil
import struct
import time
import tokenize
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from radiographs import Radiographs, one_file, parse_labels, patient_split, read_table, safe_path
from retune import Config, InputError, atomic, locked, nearest, progress

CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COMPETITION_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- ChestX-ray14


def load_nih(config: Config) -> Radiographs:
    """NIH ChestX-ray14: 112,120 frontal images of 30,805 patients, 14 findings, each present (1) or not (0).

    Both layouts (`images/`, `images_001..012/images/`) and the official lists (86,524 train_val, 25,596 test); an
    eighth of the train_val patients, by hash, become validation, which gives ChestMNIST's 7:1:2.
    Wang et al., "ChestX-ray8", CVPR 2017. Free to use; cite the paper and link to the NIH's download page.
    """
    root = config.root
    path = Path(config.labels_csv) if config.labels_csv else one_file(root, ["Data_Entry_2017*.csv"])
    table = read_table(path, ["Image Index", "Finding Labels", "Patient ID"])
    lists = {}
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        if not (root / file).is_file():
            raise InputError(f"{root / file}: no such file; the official lists decide the split")
        lists |= dict.fromkeys((root / file).read_text(encoding="utf-8", errors="replace").split(), split)
    names, rows = table["Image Index"], [f"{path} row {i + 2}" for i in range(len(table["Image Index"]))]
    labels = np.zeros((len(names), len(NIH_FINDINGS)), np.float32)
    column = {name: j for j, name in enumerate(NIH_FINDINGS)}
    for i, findings in enumerate(table["Finding Labels"]):
        for finding in findings.split("|"):
            if finding in column:
                labels[i, column[finding]] = 1
            elif finding != "No Finding":
                raise InputError(f"{rows[i]}: unknown finding {finding!r}; {nearest(finding, NIH_FINDINGS)}")
        if names[i] not in lists:
            raise InputError(f"{rows[i]}: {names[i]} is in neither train_val_list.txt nor test_list.txt")
    held_out = patient_split(table["Patient ID"], {"train": 7 / 8, "val": 1 / 8})
    split = [held_out[i] if lists[name] == "train" else "test" for i, name in enumerate(names)]
    folders = [d for d in [root / "images", *sorted(root.glob("images_*/images"))] if d.is_dir()]
    home = {name: folder for folder in folders for name in os.listdir(folder)}
    images = [safe_path(home.get(name, root / "images"), name, row) for name, row in zip(names, rows)]
    note = "nih: labels mined from reports; every finding that is not named counts as absent"
    return Radiographs(images, labels, NIH_FINDINGS, table["Patient ID"], split, names, rows, note=note)


# ----------------------------------------------------------------------------------------------------- CheXpert


def load_chexpert(config: Config) -> Radiographs:
    """CheXpert: 223,414 training images of 64,540 patients (191,027 frontal), 14 findings with -1 for uncertain.

    `train.csv` (or --labels-csv: VisualCheXbert, CheXbert), `valid.csv` (234 images of 200 studies), and for the
    test (668 images of 500 studies) `test_labels.csv`, one row per image, or `groundtruth.csv`, one per study.
    Without either, `valid.csv` is the test set and a twentieth of the training patients validate, and we say so.
    Irvin et al., AAAI 2019. Stanford's research use agreement; neither images nor labels may be passed on.
    """
    home = chexpert_home(root := config.root)
    train, valid = (home.get(name, root) / name for name in ("train.csv", "valid.csv"))
    train = Path(config.labels_csv or train)
    test = next((home[n] / n for n in ("test_labels.csv", "groundtruth.csv") if n in home), None)
    files = {"train": train, "val": valid, "test": test} if test else {"train": train, "test": valid}
    names, images, rows, labels, split, notes = [], [], [], [], [], []
    for part, path in files.items():
        table = read_table(path)
        classes = wanted_findings(config, path, table)
        values, counted = parse_labels(table, classes, path, config.uncertain, config.blank or "zero")
        found = list(chexpert_images(home, root, config.view, path, table))
        names += [name for name, _, _ in found]
        images += [image for _, image, _ in found]
        rows += [f"{path} row {i + 2}" for _, _, i in found]
        labels.append(values[np.array([i for _, _, i in found], int)])
        split += [part] * len(found)
        notes.append(f"{path.name} {counted}")
    patients = [name.split("/")[1] for name in names]
    if not test:
        notes.append("no test labels, so valid.csv is the test set and val is cut from train by patient")
        held_out = patient_split(patients, {"train": 0.95, "val": 0.05})
        split = [held_out[i] if part == "train" else part for i, part in enumerate(split)]
    note, labels = "; ".join(notes), np.concatenate(labels)
    return Radiographs(images, labels, classes, patients, split, names, rows, note=note)


def wanted_findings(config: Config, path: Path, table: dict[str, list[str]]) -> tuple[str, ...]:
    """--classes or CheXpert's five competition findings; InputError when the label file lacks one."""
    known = [name for name in CHEXPERT_FINDINGS if name in table]
    for name in config.classes or COMPETITION_FINDINGS:
        if name not in known:
            raise InputError(f"{path}: no finding {name!r}; {nearest(name, known or CHEXPERT_FINDINGS)}")
    return tuple(config.classes or COMPETITION_FINDINGS)


def chexpert_home(root: Path) -> dict[str, Path]:
    """Which folder holds each file, split or patient: `root`, its `test`, or an unpacked archive inside it.

    An archive is `CheXpert-v1.0-small`, `CheXpert-v1.0`, or one of the four `CheXpert-v1.0 batch ...` of the full
    resolution, of which three hold patients without a `train` folder.
    """
    home: dict[str, Path] = {}
    for folder in (root, root / "test", *sorted(root.glob("CheXpert-v1.0*"))):
        for name in os.listdir(folder) if folder.is_dir() else ():
            if home.setdefault(name, folder) not in (folder, root) and name in ("train", "train.csv"):
                raise InputError(f"{root}: {name} is in {home[name]} and {folder}; give one as --data-dir")
    return home


def chexpert_images(
    home: dict[str, Path], root: Path, wanted: str, path: Path, table: dict[str, list[str]]
) -> Iterator[tuple[str, Path, int]]:
    """(name from train, valid or test on, file, data row) of every image in a CheXpert table of the wanted view.

    What stands before the split (`CheXpert-v1.0/`, `CheXpert-v1.0-small/`) does not matter. The row of a study
    (column `Study`) stands for each image in the study's folder, so that folder must be there.
    """
    column = "Study" if "Study" in table else "Path"
    if column not in table:
        raise InputError(f"{path}: no column 'Path' or 'Study'; the columns are {', '.join(table)}")
    views = table.get("Frontal/Lateral")
    for i, place in enumerate(table[column]):
        row, parts = f"{path} row {i + 2}", place.replace("\\", "/").split("/")
        start = next((k for k, part in enumerate(parts) if part in ("train", "valid", "test")), len(parts))
        parts = parts[start:]
        if len(parts) < 3:
            raise InputError(f"{row}: {place!r} is not <train|valid|test>/<patient>/<study>/<image>")
        in_batch = parts[0] not in home and parts[1] in home
        file = safe_path(home.get(parts[in_batch], root), "/".join(parts[in_batch:]), row)
        files = [file] if column == "Path" else sorted(file.glob("*.jpg"))
        if not files:
            raise InputError(f"{row}: no .jpg in {file}, where this study's images belong")
        for image in files:
            view = views[i] if views else image.stem.rsplit("_", 1)[-1]  # VisualCheXbert has no such column
            if wanted in ("all", view.lower()):
                yield "/".join(parts if column == "Path" else (*parts, image.name)), image, i


# ---------------------------------------------------------------------------------------------------- MIMIC-CXR

MIMIC_SPLITS = {"train": "train", "validate": "val", "test": "test"}
MIMIC_VIEWS = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}
SECTION = re.compile(r"^[ \t]*([A-Z][A-Z /,()]+):", re.MULTILINE)  # a title in a report


def load_mimic(config: Config) -> Radiographs:
    """MIMIC-CXR-JPG: 377,110 images of 227,835 studies of 65,379 patients, CheXpert's 14 findings per study.

    Labels of `mimic-cxr-2.0.0-chexpert.csv` (or --labels-csv: `-negbio`), the official split, and for --view the
    metadata, gzipped or not. Reports (MIMIC-CXR) are read on demand when they lie in `files/` too.
    Johnson et al., arXiv 1901.07042. PhysioNet's credentialed licence; neither images nor labels may be passed on.
    """
    root = config.root
    path = Path(config.labels_csv or mimic_file(root, "chexpert"))
    studies = read_table(path, ["study_id"])
    classes = wanted_findings(config, path, studies)
    values, note = parse_labels(studies, classes, path, config.uncertain, config.blank or "zero")
    row_of: dict[str, int] = {}
    for i, study in enumerate(studies["study_id"]):
        if row_of.setdefault(study, i) != i:
            raise InputError(f"{path} row {i + 2}: study {study} is there twice")
    path, views, kept, unlabelled = mimic_file(root, "split"), {}, [], set()
    columns = ("dicom_id", "study_id", "subject_id", "split")
    table = read_table(path, columns)
    if config.view != "all":
        metadata = read_table(mimic_file(root, "metadata"), ["dicom_id", "ViewPosition"])
        views = dict(zip(metadata["dicom_id"], metadata["ViewPosition"]))
    for i, (dicom, study, subject, part) in enumerate(zip(*(table[name] for name in columns))):
        row = f"{path} row {i + 2}"
        if part not in MIMIC_SPLITS:
            raise InputError(f"{row}: split {part!r} is not train, validate or test")
        if study not in row_of:
            unlabelled.add(study)
        elif config.view in ("all", MIMIC_VIEWS.get(views.get(dicom))):
            name = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
            kept.append((name, safe_path(root, name, row), row_of[study], subject, MIMIC_SPLITS[part], row))
    names, images, labelled, patients, split, rows = list(zip(*kept)) or [()] * 6
    reports = MimicReports(images) if images and images[0].parent.with_suffix(".txt").is_file() else None
    labels = values[np.array(labelled, int)]
    note += f"; left out {len(unlabelled):,} studies without labels"
    return Radiographs(images, labels, classes, patients, split, names, rows, reports, note)


def mimic_file(root: Path, kind: str) -> Path:
    """A table of the release, gzipped or not."""
    path = root / f"mimic-cxr-2.0.0-{kind}.csv"
    return path if path.is_file() else path.with_suffix(".csv.gz")


class MimicReports(Sequence):
    """Each image's report, read when asked for: what stands under FINDINGS and IMPRESSION, else all of it."""

    def __init__(self, images: Sequence[Path]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> str:
        text = self.images[i].parent.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        _, *sections = SECTION.split(text)  # title, text, title, text, ...
        chosen = [t for title, t in zip(sections[::2], sections[1::2]) if title in ("FINDINGS", "IMPRESSION")]
        return " ".join(" ".join(chosen or [text]).split())


# --------------------------------------------------------------------------------------------------- ChestMNIST

ZENODO = "https://zenodo.org/records/10519652/files"
CHESTMNIST_MD5 = {
    28: "02c8a6516a18b556561a56cbdd36c4a8",
    64: "9de6cd0b934ebb5b7426cfba5efbae16",
    128: "db107e5590b27930b62dbaf558aebee3",
    224: "45bd33e6f06c3e8cdb481c74a89152aa",
}
MAX_IMAGES = 200_000  # a split; a larger one is refused, since a few bytes may unpack to any number
TRIES, PAUSE = 5, 2.0  # connections for one download, and seconds between them


def load_chestmnist(config: Config) -> Radiographs:
    """ChestMNIST: ChestX-ray14 at 28, 64, 128 or 224 pixels: 78,468 train, 11,219 val, 22,433 test; 14 findings.

    Reads `chestmnist.npz` or `chestmnist_<size>.npz` in --data-dir (else in --cache-dir), or downloads it there.
    The images go uncompressed into --cache-dir, so that memory does not grow with --size. No patient ids.
    Yang et al., "MedMNIST v2", Scientific Data 2023. CC BY 4.0.
    """
    cache = Path(config.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    folder, suffix = config.root if config.data_dir else cache, "" if config.size == 28 else f"_{config.size}"
    path, published = folder / f"chestmnist{suffix}.npz", CHESTMNIST_MD5[config.size]
    if not path.exists():
        with locked(folder, wait=True):
            download(f"{ZENODO}/{path.name}?download=1", path, published)
    found = md5(path)
    with locked(cache, wait=True):
        images, labels, split = unpack_chestmnist(path, config.size, cache / f"{path.stem}-{found}.uint8")
    names = [f"{part}-{i:06d}" for i, part in enumerate(split)]
    note = "chestmnist: official split; no patient ids, so each image counts as a patient of its own"
    if found != published:
        note += f"; {path} is not the published file (its MD5 is {found}, not {published})"
    return Radiographs(
        images, labels, NIH_FINDINGS, names, split, names, note=note, key=f"chestmnist {found}"
    )


class MappedImages(Sequence):
    """uint8 [N, side, side] in a raw file; another process opens the file instead of receiving a copy."""

    def __init__(self, path: Path, n: int, side: int):
        self.arguments = (path, n, side)
        self.pixels = np.memmap(path, np.uint8, "r", shape=(n, side, side))

    def __reduce__(self):
        return MappedImages, self.arguments

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.pixels[i]


@contextlib.contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple]:
    """(file at the first number, shape, dtype) of a member; ValueError when it is not as long as its header says."""
    with archive.open(name) as member:
        major, _ = np.lib.format.read_magic(member)
        shape, fortran, kind = getattr(np.lib.format, f"read_array_header_{1 if major == 1 else 2}_0")(member)
        size = archive.getinfo(name).file_size
        if kind.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never read: allow_pickle=False")
        if fortran:
            raise ValueError(f"{name.removesuffix('.npy')} is {kind} {shape} by columns")
        if min(shape, default=0) < 0 or member.tell() + math.prod(shape) * kind.itemsize != size:
            raise ValueError(f"{name} is {kind} {shape} in {size:,} bytes")
        yield member, shape, kind


def unpack_chestmnist(path: Path, side: int, file: Path) -> tuple[MappedImages, np.ndarray, list[str]]:
    """Images of all splits, copied into `file` unless they are there, labels [N, 14] and split [N] of an .npz."""
    labels, split = [], []
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            if new := not file.exists():
                output = stack.enter_context(open(stack.enter_context(atomic(file)), "wb"))
            for part in ("train", "val", "test"):
                with open_array(archive, f"{part}_labels.npy") as (member, shape, kind):
                    fits = shape[1:] == (len(NIH_FINDINGS),) and shape[0] <= MAX_IMAGES
                    labels.append(np.frombuffer(member.read(), kind).reshape(shape) if fits else None)
                if not fits or not np.isin(labels[-1], (0, 1)).all():
                    raise ValueError(f"{part}_labels {shape} must be 0 or 1 for {len(NIH_FINDINGS)} findings")
                split += [part] * len(labels[-1])
                with open_array(archive, f"{part}_images.npy") as (member, found, kind):
                    if (found, kind) != ((shape[0], side, side), np.uint8):
                        raise ValueError(f"{part}_images is {kind} {found}")
                    if new:
                        shutil.copyfileobj(member, output, 1 << 20)
    except (
        KeyError, ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError,  # numpy reads text headers
        RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, OverflowError, IndexError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # the disk's fault, not the file's
            raise
        raise InputError(f"{path}: not ChestMNIST at {side} pixels: {error}") from None
    if file.stat().st_size != len(split) * side * side:
        raise InputError(f"{file}: damaged cache; delete this file to unpack it again")
    return MappedImages(file, len(split), side), np.concatenate(labels), split


def md5(path: Path) -> str:
    """MD5 of a file, in hex: an identity as published, not a protection."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, checksum: str) -> None:
    """Fetch `url` to `path` unless it is there; only a file with this MD5 ever gets that name.

    Bytes that arrived before a cut, or before the process was killed, stay beside it and are not fetched again.
    """
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    for left in reversed(range(TRIES)):
        try:
            receive(url, partial)
            break
        except (OSError, http.client.HTTPException) as error:
            hopeless = getattr(error, "code", 500) < 500 or getattr(error, "errno", None) == errno.ENOSPC
            if hopeless or not left:
                raise InputError(f"{url}: {error}; run again to go on, or put the file at {path}") from None
            time.sleep(PAUSE)
    if (found := md5(partial)) != checksum:
        partial.unlink()
        raise InputError(f"{url}: its MD5 {found} is not the published {checksum}; removed it, run again")
    os.replace(partial, path)


def receive(url: str, partial: Path) -> None:
    """One connection: append to `partial` what it lacks, or start over with a server that cannot go on."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what we have; the checksum decides
            return
        raise
    have = have if response.status == 206 else 0
    total = have + int(response.headers.get("Content-Length", 0))
    bar = progress(total=total, initial=have, unit="B", unit_scale=True, desc=f"downloading {url}")
    with response, bar, open(partial, "ab" if have else "wb") as file:
        while block := response.read1(1 << 20):
            bar.update(file.write(block))
        if file.tell() < total:
            raise ConnectionError(f"cut after {file.tell():,} of {total:,} bytes")
