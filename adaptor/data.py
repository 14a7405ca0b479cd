"""Data sets that only Adaptor uses (SIIM, RSNA, COVIDx), and masks: phantoms', run-lengths, boxes."""

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchvision.transforms.v2 import functional

import retune
from retune import InputError, Radiographs, refuse_row

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}  # the authors' shares of RSNA and SIIM
COVIDX = {"normal": "Normal", "pneumonia": "Pneumonia", "covid-19": "COVID-19", "negative": "Negative",
          "positive": "COVID-19"}  # fmt: skip
COVIDX_LINE = rf"^(?P<patient>\S+)\s+(?P<file>.+?)\s+(?P<kind>{'|'.join(COVIDX)})(?:\s+(?P<source>\S+))?$"
RETUNE_SETTINGS = "data data_dir labels_csv classes view uncertain blank demo_images cache_dir"


def load_data(config) -> Radiographs:
    """retune's data sets, and RSNA's, SIIM's and COVIDx's, with retune's checks."""
    retune.DATASETS.update(siim=load_masked, rsna=load_masked, covidx=load_covidx)
    settings = {name: getattr(config, name) for name in RETUNE_SETTINGS.split()}
    return retune.load_radiographs(retune.Config(**settings))


def read_pixels(image) -> torch.Tensor:
    """An image of a data set, a path or an array [H, W], as uint8 [1 or 3, H, W]."""
    return torch.from_numpy(np.array(image))[None] if np.ndim(image) else retune.read_image(image)


def load_images(images: Sequence, rows: Sequence[int], use: Callable, *more: Sequence) -> list:
    """use(image, ...) of every row, read by threads; `more` are further arguments, one per row."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda row, *rest: use(read_pixels(images[int(row)]), *rest), rows, *more))


def read_masked_table(config) -> pd.DataFrame:
    """The table of SIIM or RSNA; `image` names each row's image."""
    siim = config.data == "siim"
    pattern = "*rle*.csv" if siim else "*train_labels*.csv"
    path = config.labels_csv or retune.only_file(Path(config.data_dir), pattern)
    columns = ["ImageId", "EncodedPixels"] if siim else ["patientId", "x", "y", "width", "height", "Target"]
    table = retune.read_table(path, columns)
    return table.apply(lambda column: column.str.strip()).rename(columns={columns[0]: "image"})


def load_masked(config) -> Radiographs:
    """SIIM (pneumothorax) or RSNA (pneumonia): images anywhere under --data-dir; 70/15/15% of patients by
    hash, or the table's own `split`. SIIM names no patient: each image counts as one."""
    files = {Path(file).stem: file for file in retune.list_images([str(config.root)])}
    table = read_masked_table(config)
    siim = config.data == "siim"
    refuse_row(table, ~table["image"].isin(list(files)), f"has no image under {config.root}", "image")
    positive = ~table["EncodedPixels"].isin(("", "-1")) if siim else table["Target"] == "1"
    first = table.drop_duplicates("image")
    ids = first["image"].tolist()
    labels = positive.groupby(table["image"], sort=False).any()[ids].to_numpy(np.float32)[:, None]
    split = retune.patient_split(ids, SHARES)
    note = f"{config.data}: 70/15/15% of the ids by hash"
    if "split" in table:
        refuse_row(table, ~table["split"].isin(list(SHARES)), "is not train, val or test", "split")
        own = table["image"].map(first.set_index("image")["split"])
        refuse_row(table, table["split"] != own, "is another split than in the image's first row", "split")
        split = first["split"].tolist()
        note = f"{config.data}: the table's own split"
    images = [files[name] for name in ids]
    findings = ["Pneumothorax" if siim else "Pneumonia"]
    return Radiographs(images, labels, findings, ids, split, ids, first.index, note=note)


def load_covidx(config) -> Radiographs:
    """COVIDx: `train*.txt`, `test*.txt` (`val*.txt`) of "patient file class source", images in `train`,
    `test`, `val`. Without a list for validation it is a fifth of the training patients."""
    tables = []
    for split in ("train", "test", "val"):
        for path in sorted(config.root.glob(f"{split}*.txt")):
            lines = pd.Series(path.read_text(encoding="utf-8").split("\n"))
            lines.index = [f"{path} row {i}" for i in range(1, len(lines) + 1)]
            table = lines[lines.str.strip() != ""].to_frame("line").assign(split=split)
            table = table.join(table["line"].str.strip().str.extract(COVIDX_LINE, re.IGNORECASE))
            refuse_row(table, table["kind"].isna(), "is not 'patient file class source'", "line")
            tables.append(table)
    table = pd.concat(tables or [pd.DataFrame({"split": []})])
    if not {"train", "test"} <= set(table["split"]):
        raise InputError(f"{config.root}: no train*.txt or test*.txt with COVIDx's lists of images")
    patients = (table["source"].fillna("?") + "/" + table["patient"]).tolist()  # sources number their own
    names = (table["split"] + "/" + table["file"]).tolist()
    split = table["split"].to_numpy(object)
    note = "covidx: official lists"
    if "val" not in split:
        held_out = retune.patient_split(patients, {"train": 0.8, "val": 0.2})
        split = np.where(split == "train", held_out, split)
        note += "; validation is a fifth of the training patients, by hash"
    found = table["kind"].str.lower().map(COVIDX)
    classes = [name for name in dict.fromkeys(COVIDX.values()) if name in set(found)]
    labels = np.stack([found == name for name in classes], 1)
    images = [str(config.root / name) for name in names]
    return Radiographs(images, labels, classes, patients, split, names, table.index, note=note)


def rle_to_mask(text: str, height: int, width: int, row: str = "") -> np.ndarray:
    """SIIM's run-lengths -> bool [height, width]; "-1" or "" is an empty mask. Pairs "gap length", each gap
    counted from the end of the run before; pixels are numbered down the columns."""
    mask = np.zeros(height * width, bool)
    words = [] if text == "-1" else text.split()
    numbers = [int(word) if word.isdecimal() else math.inf for word in words]
    if len(numbers) % 2 or sum(numbers) > mask.size:
        raise InputError(f"{row}: run-lengths {text[:40]!r} are not pairs within {height} x {width} pixels")
    edges = np.cumsum([0, *numbers])
    for start, end in zip(edges[1::2], edges[2::2]):
        mask[start:end] = True
    return mask.reshape(width, height).T


def box_to_mask(box: Sequence[str], height: int, width: int, row: str = "") -> np.ndarray:
    """RSNA's x, y, width, height in pixels -> bool [height, width]; four blanks are an empty mask."""
    mask = np.zeros((height, width), bool)
    if any(box):
        x, y, w, h = (float(value) if re.fullmatch(r"[\d.]+", value) else math.nan for value in box)
        if not (0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= width and y + h <= height):
            raise InputError(f"{row}: box {', '.join(box)} exceeds {height} x {width}: another size's mask?")
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
    table = read_masked_table(config)
    lines = table.groupby("image", sort=False).indices
    fields = table["EncodedPixels"] if config.data == "siim" else table[["x", "y", "width", "height"]]
    to_mask = rle_to_mask if config.data == "siim" else box_to_mask

    def masks(row: int, height: int, width: int) -> np.ndarray:
        found = [to_mask(fields.iloc[i], height, width, table.index[i]) for i in lines[data.names[row]]]
        return np.any(found, axis=0)[None]

    return masks


def transform_mask(mask: torch.Tensor, resize, crop, **_) -> torch.Tensor:
    """Masks [C, H, W] through the encoder's resize and crop, nearest neighbour: [C, h, w]."""
    size = [resize] if isinstance(resize, int) else list(resize)
    mask = functional.resize(mask, size, interpolation=functional.InterpolationMode.NEAREST_EXACT)
    return mask if crop is None else functional.center_crop(mask, [crop, crop])
