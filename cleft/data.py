"""Image-text pairs: `load_pairs` gives a data set with the evaluated classes as labels and captions as reports.

EMBED mammograms, RSNA pneumonia, CheXpert-5x200 and phantoms of another domain are read here, others by `retune`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from cleft.captions import BI_RADS, DENSITY, MAMMOGRAM_CLASSES, mammogram_caption, pair_captions
from cleft.config import CHEXPERT, Config
from retune import InputError, Radiographs

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")


def load_pairs(config: Config) -> Radiographs:
    """The data set of `config`: labels of the evaluated classes, `reports` the captions, "" where none can be said.

    Captions name all findings of the data set, whatever --classes evaluates.
    """
    data = LOADERS[config.data](config) if config.data in LOADERS else retune.load_radiographs(config.public)
    if config.data in LOADERS:
        data = retune.choose_view(data, config.public) if config.view != "all" else data
        retune.check_patients(data)
        retune.check_splits(data)
    default = retune.COMPETITION_FINDINGS if config.data in CHEXPERT else data.class_names
    wanted = tuple(retune.check_classes(config, data.class_names) or default)
    columns = [list(data.class_names).index(name) for name in wanted]
    captions = pair_captions(data, config)
    return dataclasses.replace(data, labels=data.labels[:, columns], class_names=wanted, reports=captions)


def load_pretrain(config: Config) -> Radiographs:
    """Phantoms of other patients, films and reporting habits than the demo's: what `demo/tiny` is trained on."""
    from demo import phantoms

    data = phantoms.make_phantoms(config.demo_images, seed=1000, domain="pretrain")
    split = retune.patient_split(data.patients, {"train": 0.98, "val": 0.01, "test": 0.01})
    return Radiographs(
        data.images, data.labels, data.class_names, data.patients, split, reports=data.reports,
        note="PHANTOMS: synthetic films of the pre-training domain.", key=f"pretrain {config.demo_images}",
    )  # fmt: skip


def load_rsna(config: Config) -> Radiographs:
    """RSNA pneumonia as a choice of two classes: `*train_labels*.csv`, images anywhere under --data-dir.

    A patient has a row per box (Target 1) or one row (Target 0) and one image, <patientId>.dcm, or PNG or JPEG.
    No official split: 70/10/20% of the patients by hash.
    """
    root = config.public.root
    path = Path(config.labels_csv or retune.one_file(root, ["*train_labels*.csv"]))
    table = retune.read_table(path, ["patientId", "Target"])
    found = sorted(root.rglob("*"))
    files = {file.stem: file for file in found if file.suffix.lower() in SUFFIXES}
    for i, (name, value) in enumerate(zip(table["patientId"], table["Target"], strict=True)):
        if value not in ("0", "1"):
            raise InputError(f"{path} row {i + 2}: Target {value!r} is not 0 or 1")
        if name not in files:
            raise InputError(f"{path} row {i + 2}: no image {name!r} anywhere under {root}")
    present = table.groupby("patientId", sort=False)["Target"].max() == "1"
    labels = np.stack([present, ~present], axis=1).astype(np.float32)
    names = list(present.index)
    rows = [f"{path} row {i + 2}" for i in table.index[~table["patientId"].duplicated()]]
    return Radiographs(
        [files[name] for name in names], labels, ("Pneumonia", "No Finding"), names,
        retune.patient_split(names, retune.SHARES), names, rows, note="rsna: no official split: 70/10/20% by hash",
    )  # fmt: skip


def load_chexpert_5x200(config: Config) -> Radiographs:
    """CheXpert with the published list of test images, `Path` and a column per finding, as --labels-csv.

    The listed images are the test set, with the list's labels. As most of them lie in CheXpert's training set,
    all other images of their patients are left out, and so is CheXpert's own test set.
    """
    if config.labels_csv is None:
        problem = "needs the published list as --labels-csv; --data chexpert makes a balanced test by rule"
        raise InputError(f"--data chexpert-5x200 {problem}")
    data = retune.load_radiographs(dataclasses.replace(config.public, data="chexpert", labels_csv=None))
    path, findings = Path(config.labels_csv), retune.COMPETITION_FINDINGS
    table = retune.read_table(path, ["Path", *findings])
    values, _ = retune.parse_labels(table, findings, path, config.uncertain, "zero")
    row_of = {name: row for row, name in enumerate(data.names)}
    columns = [list(data.class_names).index(name) for name in findings]
    listed = np.zeros(len(data.names), bool)
    for i, place in enumerate(table["Path"]):
        name = place[max(place.find("train/"), place.find("valid/"), place.find("test/"), 0) :]
        if name not in row_of or values[i].sum() != 1:
            problem = (
                "is not an image of --data-dir"
                if name not in row_of
                else "must have one of the five findings"
            )
            raise InputError(f"{path} row {i + 2}: {place!r} {problem}")
        listed[row_of[name]] = True
        data.labels[row_of[name], columns] = values[i]
    unused = (data.split == "test") | np.isin(data.patients, data.patients[listed])
    split = np.where(listed, "test", np.where(unused, "unused", data.split))
    note = f"{data.note}; test: the {listed.sum():,} images of {path.name}, training without their patients"
    return dataclasses.replace(data, split=split, note=note)


def load_embed(config: Config) -> Radiographs:
    """EMBED mammography: *metadata*.csv (a row an image) joined with *clinical*.csv (a row a finding).

    Labels: seven BI-RADS categories, then four densities, one-hot; nan where the exam has none. Only 2D images.
    Jeong et al., Radiology: Artificial Intelligence 2023; access by agreement.
    """
    root = config.public.root
    images_csv, clinical_csv = (
        retune.one_file(root, [f"*{kind}*.csv", f"tables/*{kind}*.csv"]) for kind in ("metadata", "clinical")
    )
    columns = [
        "empi_anon",
        "acc_anon",
        "anon_dicom_path",
        "ImageLateralityFinal",
        "ViewPosition",
        "FinalImageType",
    ]
    table = retune.read_table(images_csv, columns)
    table["row"] = [f"{images_csv} row {i + 2}" for i in table.index]
    table = table.rename(columns={"ImageLateralityFinal": "side", "ViewPosition": "view"})
    table = table[table["FinalImageType"] == "2D"].merge(read_exams(clinical_csv), on=["acc_anon", "side"])
    if table.empty:
        raise InputError(f"{images_csv}: no 2D image belongs to an exam with an assessment in {clinical_csv}")
    labels = [
        np.where(table["assessment"] == "", np.nan, table["assessment"] == letter) for letter in BI_RADS
    ]
    labels += [np.where(table["density"] == "", np.nan, table["density"] == digit) for digit in DENSITY]
    captions = [mammogram_caption(facts, config.caption_style) for facts in table.to_dict("records")]
    names = table["anon_dicom_path"].str.replace(r"^.*?(?=images/|cohort_)", "", regex=True).tolist()
    rows, patients = table["row"].tolist(), table["empi_anon"].tolist()
    paths = [retune.join_path(root, name, row) for name, row in zip(names, rows, strict=True)]
    note = (
        f"EMBED: {len(names)} 2D images; {config.caption_style} captions; 70/10/20% of the patients by hash"
    )
    return Radiographs(
        paths, np.stack(labels, axis=1), tuple(MAMMOGRAM_CLASSES), patients,
        retune.patient_split(patients, retune.SHARES), names, rows, captions, note,
    )  # fmt: skip


def read_exams(path: Path) -> pd.DataFrame:
    """A row for each acc_anon and side, L or R: assessment (the most serious), density, age, race, mass, calcification.

    A blank side or B is both. The columns from age on are optional. A mass or calcification that is described is
    present; that none is described says nothing. Unknown is "", and a row has an assessment or a density.
    """
    table = retune.read_table(path, ["acc_anon", "side", "asses", "tissueden"])
    for name in ("age_at_study", "RACE_DESC", "massshape", "massdens", "calcfind", "calcdistri"):
        table[name] = table.get(name, "")
    table["mass"], table["calcification"] = (
        table["massshape"] + table["massdens"],
        table["calcfind"] + table["calcdistri"],
    )
    table["age"], table["race"] = table["age_at_study"].str.split(".").str[0], table["RACE_DESC"].str.lower()
    table["density"] = table["tissueden"].str.split(".").str[0].where(lambda digit: digit.isin(DENSITY), "")
    serious = ["", *BI_RADS]
    table["assessment"] = [serious.index(letter) if letter in serious else 0 for letter in table["asses"]]
    table["side"] = [[side] if side in ("L", "R") else ["L", "R"] for side in table["side"]]
    facts = ["assessment", "density", "age", "race", "mass", "calcification"]
    exams = table.explode("side").groupby(["acc_anon", "side"])[facts].max().reset_index()
    exams["assessment"] = [serious[number] for number in exams["assessment"]]
    return exams[(exams["assessment"] + exams["density"]) != ""]


LOADERS = {"pretrain": load_pretrain, "rsna": load_rsna, "embed": load_embed}
LOADERS["chexpert-5x200"] = load_chexpert_5x200
