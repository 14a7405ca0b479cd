"""Loaders of published chest X-ray data sets in the layouts of their releases; `retune.py` imports them by name.

A loader takes a `Config` and returns `Radiographs`. Label policies, paths and errors are retune's.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np

from retune import (
    Config,
    InputError,
    Radiographs,
    data_folder,
    nearest,
    one_file,
    parse_labels,
    patient_split,
    read_table,
    safe_path,
)

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


def load_nih(config: Config) -> Radiographs:
    """NIH ChestX-ray14 (Wang et al., CVPR 2017): 112,120 images of 30,805 patients, 14 findings.

    Both layouts (`images/`, `images_001..012/images/`), official lists; a tenth of the train_val patients
    become validation. Free to use; cite the paper and link its download page.
    """
    root = data_folder(config)
    path = Path(config.labels_csv or one_file(root, ["Data_Entry_2017*.csv"], "Data_Entry_2017*.csv"))
    table = read_table(path, ["Image Index", "Finding Labels", "Patient ID"])
    folders = [d for d in [root / "images", *sorted(root.glob("images_*/images"))] if d.is_dir()]
    place = {name: folder for folder in folders for name in os.listdir(folder)}
    lists = {}
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        if not (root / file).is_file():
            raise InputError(f"{root / file}: no such file; the official lists decide the split")
        lists |= dict.fromkeys((root / file).read_text(encoding="utf-8").split(), split)
    names, n = table["Image Index"], len(table["Image Index"])
    rows = [f"{path} row {i + 2}" for i in range(n)]
    labels = np.zeros((n, len(NIH_FINDINGS)), np.float32)
    column = {name: j for j, name in enumerate(NIH_FINDINGS)}
    for i, findings in enumerate(table["Finding Labels"]):
        for finding in findings.split("|"):
            if finding in column:
                labels[i, column[finding]] = 1
            elif finding != "No Finding":
                raise InputError(f"{rows[i]}: unknown finding {finding!r}; {nearest(finding, NIH_FINDINGS)}")
        if names[i] not in lists:
            raise InputError(f"{rows[i]}: {names[i]} is in neither train_val_list.txt nor test_list.txt")
    patients = table["Patient ID"]
    held_out = patient_split(patients, {"train": 0.9, "val": 0.1})
    split = [held_out[i] if lists[name] == "train" else "test" for i, name in enumerate(names)]
    images = [safe_path(place.get(name, root / "images"), name, row) for name, row in zip(names, rows)]
    return Radiographs(images, labels, NIH_FINDINGS, patients, split, names, rows)


def chexpert_images(root: Path, path: Path, table: dict[str, list[str]]) -> dict[str, list[str]]:
    """Bring a CheXpert table to one row per image, with `Path` from train|valid|test on.

    The prefixes `CheXpert-v1.0/` and `CheXpert-v1.0-small/` go; test labels given per `Study` are repeated for
    each image of the study's folder.
    """
    if "Path" in table:
        places = table["Path"]
    elif "Study" in table:
        places = table["Study"]
    else:
        raise InputError(f"{path}: no column 'Path' or 'Study'; the columns are {', '.join(table)}")
    short, source = [], []
    for i, place in enumerate(places):
        parts = place.replace("\\", "/").split("/")
        start = next((k for k, part in enumerate(parts) if part in ("train", "valid", "test")), None)
        if start is None:
            raise InputError(f"{path} row {i + 2}: path {place!r} has no train, valid or test folder in it")
        place = "/".join(parts[start:])
        folder = safe_path(root, place, f"{path} row {i + 2}")
        images = [place] if "Path" in table else [f"{place}/{f.name}" for f in sorted(folder.glob("*.jpg"))]
        short += images
        source += [i] * len(images)
    return {name: [values[i] for i in source] for name, values in table.items()} | {
        "Path": short, "row": [str(i + 2) for i in source],
    }  # fmt: skip


def load_chexpert(config: Config) -> Radiographs:
    """CheXpert (Irvin et al., AAAI 2019): 223,414 training images of 64,540 patients, 14 findings.

    `train.csv` (or --labels-csv: VisualCheXbert, CheXbert), `valid.csv` (234 images), `test_labels.csv` or
    `groundtruth.csv` (668 images). Without test labels, `valid.csv` is the test set and a twentieth of the
    training patients validate, and we say so. Stanford's research licence; the images may not be shared.
    """
    root = data_folder(config)
    files = {"train": Path(config.labels_csv or root / "train.csv"), "val": root / "valid.csv"}
    found = [
        p for name in ("test_labels.csv", "groundtruth.csv") for p in (root / name, root / "test" / name)
    ]
    files["test"] = next((p for p in found if p.is_file()), None)
    note = ""
    if files["test"] is None:
        files = {"train": files["train"], "test": files["val"]}
        note = "; no test_labels.csv or groundtruth.csv: valid.csv is the test set, val is cut from train by patient"
    names, rows, split, patients, labels, notes = [], [], [], [], [], []
    for part, path in files.items():
        table = chexpert_images(root, path, read_table(path))
        classes = [name for name in CHEXPERT_FINDINGS if name in table]
        if missing := [name for name in config.classes or COMPETITION_FINDINGS if name not in table]:
            raise InputError(f"{path}: no column {missing[0]!r}; {nearest(missing[0], classes)}")
        wanted = list(config.classes or COMPETITION_FINDINGS)
        values, counted = parse_labels(table, wanted, path, config.uncertain, config.blank or "zero")
        keep = [config.view in ("all", view_of(table, i)) for i in range(len(values))]
        labels.append(values[keep])
        short = list(itertools.compress(table["Path"], keep))
        names += short
        rows += [f"{path} row {row}" for row in itertools.compress(table["row"], keep)]
        patients += [name.split("/")[1] for name in short]
        split += [part] * len(short)
        notes.append(f"{part}: {counted}")
    if "val" not in files:
        held_out = patient_split(patients, {"train": 0.95, "val": 0.05})
        split = [held_out[i] if part == "train" else part for i, part in enumerate(split)]
    images = [safe_path(root, name, row) for name, row in zip(names, rows)]
    note = "; ".join(notes) + note
    return Radiographs(images, np.concatenate(labels), wanted, patients, split, names, rows, note=note)


def view_of(table: dict[str, list[str]], i: int) -> str:
    """frontal or lateral, from CheXpert's column or, in label files without it, from the file name."""
    return (
        (table["Frontal/Lateral"][i] if "Frontal/Lateral" in table else table["Path"][i].split("_")[-1])
        .split(".")[0]
        .lower()
    )
