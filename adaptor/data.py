"""Data sets that only Adaptor uses (SIIM, RSNA, COVIDx), and masks: phantoms', run-lengths, boxes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import retune
from adaptor.config import OWN_SETS
from retune import InputError, Radiographs

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}  # the authors' shares of RSNA and SIIM
COVIDX = {"normal": "Normal", "pneumonia": "Pneumonia", "covid-19": "COVID-19", "negative": "Negative",
          "positive": "COVID-19"}  # fmt: skip
RETUNE_SETTINGS = ("data", "data_dir", "labels_csv", "classes", "view", "uncertain", "blank", "size",
                   "demo_images", "cache_dir")  # fmt: skip


def load_data(config) -> Radiographs:
    """retune's data sets, and RSNA's, SIIM's and COVIDx's."""
    if config.data not in OWN_SETS:
        return retune.load_radiographs(
            retune.Config(**{key: getattr(config, key) for key in RETUNE_SETTINGS})
        )
    if config.data_dir is None or not Path(config.data_dir).is_dir():
        raise InputError(
            f"--data {config.data} needs its folder; --data-dir {config.data_dir} is not a folder"
        )
    data = load_covidx(config) if config.data == "covidx" else load_masked(config)
    retune.check_patients(data)
    retune.check_splits(data)
    return data


def read_pixels(image) -> torch.Tensor:
    """An image of a data set, a path or an array [H, W], as uint8 [1 or 3, H, W]."""
    return (
        retune.read_image(image)
        if isinstance(image, (str, Path))
        else torch.from_numpy(np.array(image))[None]
    )


def load_images(images: Sequence, rows: Sequence[int], use: Callable, *more: Sequence) -> list:
    """use(image, ...) of every row, read by threads; `more` are further arguments, one per row."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda row, *rest: use(read_pixels(images[int(row)]), *rest), rows, *more))


# ------------------------------------------------------------------------------------------------ RSNA and SIIM


def read_masked_table(config) -> tuple[Path, pd.DataFrame]:
    """(file, table) of SIIM or RSNA; `image` names each row's image."""
    siim = config.data == "siim"
    pattern = "*rle*.csv" if siim else "*train_labels*.csv"
    path = Path(config.labels_csv or retune.one_file(Path(config.data_dir), [pattern]))
    columns = ["ImageId", "EncodedPixels"] if siim else ["patientId", "x", "y", "width", "height", "Target"]
    table = retune.read_table(path, columns)
    table = table.assign(**{name: table[name].str.strip() for name in columns})
    return path, table.assign(image=table[columns[0]])


def load_masked(config) -> Radiographs:
    """SIIM-ACR pneumothorax or RSNA pneumonia: images anywhere under --data-dir, one finding, no reports.

    The files name no split: 70/15/15% of patients by hash, unless the table has a `split` column of your own.
    SIIM names no patient: each image counts as one.
    """
    path, table = read_masked_table(config)
    files = {f.stem: f for f in sorted(Path(config.data_dir).rglob("*")) if f.suffix.lower() in SUFFIXES}
    siim = config.data == "siim"
    positive = ~table["EncodedPixels"].isin(("", "-1")) if siim else table["Target"].eq("1")
    first = table.drop_duplicates("image")
    ids, rows = first["image"].tolist(), [f"{path} row {i + 2}" for i in first.index]
    for name, row in zip(ids, rows):
        if name not in files:
            raise InputError(f"{row}: no image {name}{'|'.join(SUFFIXES)} anywhere under {config.data_dir}")
    labels = positive.groupby(table["image"], sort=False).any()[ids].to_numpy(np.float32)[:, None]
    split, note = retune.patient_split(ids, SHARES), f"{config.data}: no official split: 70/15/15% by hash"
    if "split" in table:
        split, note = own_split(table, path), f"{config.data}: the table's own split"
    note += "; each image counts as a patient of its own" if siim else ""
    images, finding = [files[name] for name in ids], "Pneumothorax" if siim else "Pneumonia"
    return Radiographs(images, labels, (finding,), ids, split, ids, rows, note=note)


def own_split(table: pd.DataFrame, path: Path) -> list[str]:
    """The `split` column [n images]; InputError for another word, or two splits of one image."""
    split = table["split"].str.strip()
    if not (known := split.isin(list(SHARES))).all():
        row = int((~known).argmax())
        raise InputError(f"{path} row {row + 2}: split {split[row]!r} is not train, val or test")
    by_image = split.groupby(table["image"], sort=False)
    if (by_image.nunique() > 1).any():
        raise InputError(f"{path}: image {by_image.nunique().idxmax()} is in more than one split")
    return by_image.first().tolist()


# --------------------------------------------------------------------------------------------------- COVIDx


def load_covidx(config) -> Radiographs:
    """COVIDx: `train*.txt`, `test*.txt` (and `val*.txt`) with lines "patient file class source", images beside.

    Images are in the folders `train`, `test` and `val`. Without a list for validation it is a fifth of the
    training patients, by hash (the authors: a fifth of the images).
    """
    lists = {part: sorted(Path(config.data_dir).glob(f"{part}*.txt")) for part in ("train", "test", "val")}
    if not lists["train"] or not lists["test"]:
        raise InputError(f"{config.data_dir}: no train*.txt or test*.txt with COVIDx's lists of images")
    lines = [line for part, paths in lists.items() for path in paths for line in read_list(part, path)]
    names, patients, found, split, rows = map(list, zip(*lines))
    note = "covidx: official lists"
    if not lists["val"]:
        held_out = retune.patient_split(patients, {"train": 0.8, "val": 0.2})
        split = [h if part == "train" else part for h, part in zip(held_out, split)]
        note += "; validation: a fifth of the training patients, by hash"
    classes = [name for name in dict.fromkeys(COVIDX.values()) if name in found]
    labels = np.array([[name == kind for kind in classes] for name in found], np.float32)
    images = [Path(config.data_dir) / name for name in names]
    return Radiographs(images, labels, classes, patients, split, names, rows, note=note)


def read_list(part: str, path: Path) -> list[tuple[str, str, str, str, str]]:
    """(image, patient, class, split, row) of each line; the source may be missing, a file name hold spaces."""
    found = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        place = next((k for k in (-1, -2) if len(words) >= 2 - k and words[k].lower() in COVIDX), None)
        if words and place is None:
            raise InputError(f"{path} row {i}: {line[:60]!r} is not 'patient file class source'")
        if words:
            patient = f"{words[-1] if place == -2 else '?'}/{words[0]}"  # sources number their own patients
            image = f"{part}/{' '.join(words[1:place])}"
            found.append((image, patient, COVIDX[words[place].lower()], part, f"{path} row {i}"))
    return found


# ---------------------------------------------------------------------------------------------------- Masks


def rle_to_mask(text: str, height: int, width: int, row: str = "") -> np.ndarray:
    """SIIM's run-lengths -> bool [height, width]; "-1" or "" is an empty mask.

    Pairs "gap length", each gap counted from the end of the run before; pixels are numbered down the columns.
    InputError when the runs are not such pairs or leave the image.
    """
    mask = np.zeros(height * width, bool)
    words = [] if text == "-1" else text.split()
    if len(words) % 2 or not all(word.isdecimal() for word in words):
        raise InputError(f"{row}: run-lengths {text[:40]!r} are not pairs of numbers from 0 up")
    edges = np.cumsum([int(word) for word in words])
    if len(edges) and edges[-1] > mask.size:
        size = f"a {height} x {width} image"
        raise InputError(f"{row}: runs end at pixel {edges[-1]:,} of {size}: another size's mask")
    for start, end in zip(edges[::2], edges[1::2]):
        mask[start:end] = True
    return mask.reshape(width, height).T


def box_to_mask(box: Sequence[str], height: int, width: int, row: str = "") -> np.ndarray:
    """RSNA's x, y, width, height in pixels -> bool [height, width]; four blanks are an empty mask."""
    mask = np.zeros((height, width), bool)
    if not any(box):
        return mask
    try:
        x, y, w, h = (float(value) for value in box)
    except ValueError:
        raise InputError(f"{row}: box {', '.join(box)} is not four numbers") from None
    if not (0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= width and y + h <= height):
        size = f"the {height} x {width} image"
        raise InputError(f"{row}: box {', '.join(box)} leaves {size}: another size's mask")
    mask[round(y) : round(y + h), round(x) : round(x + w)] = True
    return mask


def find_masks(config, data: Radiographs) -> Callable[[int, int, int], np.ndarray] | None:
    """(image row, height, width) -> its masks, bool [C, height, width]; None for data without masks."""
    if config.data == "demo":
        phantoms = data.images.phantoms
        columns = [phantoms.class_names.index(name) for name in data.class_names]
        return lambda row, height, width: phantoms.masks(int(row))[columns]
    if config.data not in ("siim", "rsna"):
        return None
    path, table = read_masked_table(config)
    lines = table.groupby("image", sort=False).indices

    def masks(row: int, height: int, width: int) -> np.ndarray:
        union = np.zeros((height, width), bool)
        for i in lines[data.names[row]]:
            where = f"{path} row {i + 2}"
            if config.data == "siim":
                union |= rle_to_mask(table["EncodedPixels"][i], height, width, where)
            else:
                union |= box_to_mask(
                    table.loc[i, ["x", "y", "width", "height"]].tolist(), height, width, where
                )
        return union[None]

    return masks


def transform_mask(mask: np.ndarray, resize, crop, **_) -> torch.Tensor:
    """Masks [C, H, W] through the encoder's resize and crop, nearest neighbour: bool [C, h, w]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = [resize] if isinstance(resize, int) else list(resize)
    mask = functional.resize(torch.from_numpy(mask), size, interpolation=InterpolationMode.NEAREST_EXACT)
    return mask if crop is None else functional.center_crop(mask, [crop, crop])
