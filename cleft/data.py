"""Image-text pairs, from `retune`'s data sets and from EMBED, RSNA and CheXpert-5x200; pixels in batches."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

import retune
from cleft.captions import BI_RADS, DENSITY, MAMMOGRAM_CLASSES, chest_caption, mammogram_caption
from cleft.config import CHEXPERT, Config
from retune import DualEncoder, InputError, Radiographs


def load_pairs(config: Config) -> Radiographs:
    """A data set with labels of the evaluated classes; its reports are captions of all findings, or blank."""
    loaders = {"pretrain": load_pretrain, "rsna": load_rsna, "embed": load_embed}
    for name, load in (loaders | {"chexpert-5x200": load_chexpert_5x200}).items():
        retune.DATASETS[name] = functools.partial(load, config)  # retune checks what it reads
    data = retune.load_radiographs(config.public)
    default = retune.COMPETITION_FINDINGS if config.data in CHEXPERT else data.class_names
    wanted = retune.check_classes(config, data.class_names) or list(default)
    if config.captions == "reports" and data.reports is None:
        raise InputError(f"--captions reports: the data set {config.data} has no reports; use labels")
    reports = data.reports if config.captions != "labels" or config.data == "embed" else None
    reports = reports or [chest_caption(row, data.class_names, config) for row in data.labels]
    changes = {"reports": reports, "class_names": wanted}
    changes["labels"] = data.labels[:, [list(data.class_names).index(name) for name in wanted]]
    if config.data in ("demo", "pretrain"):  # drawn once: drawing takes longer than training
        changes["images"] = np.stack([data.images[i] for i in range(len(data.images))])
    return dataclasses.replace(data, **changes)


def load_pretrain(config: Config, public: retune.Config) -> Radiographs:
    """Phantoms of other patients, films and reporting habits than the demo's: for demo/tiny."""
    from demo import phantoms

    data = phantoms.make_phantoms(config.demo_images, seed=1000, domain="pretrain")
    split = retune.patient_split(data.patients, {"train": 0.98, "val": 0.01, "test": 0.01})
    columns = (data.images, data.labels, data.class_names, data.patients, split)
    about = {"note": "PHANTOMS of the pre-training domain", "key": f"pretrain {config.demo_images}"}
    return Radiographs(*columns, reports=data.reports, **about)


def load_rsna(config: Config, public: retune.Config) -> Radiographs:
    """RSNA pneumonia as a choice of two classes: `*train_labels*.csv`, a row per box (Target 1) or one
    (Target 0); images, named by patientId, anywhere under --data-dir. No official split."""
    path = public.labels_csv or retune.only_file(public.root, "*train_labels*.csv")
    table = retune.read_table(path, ["patientId", "Target"])
    files = {Path(file).stem: os.path.abspath(file) for file in retune.list_images([str(public.root)])}
    retune.refuse_row(table, ~table["Target"].isin(["0", "1"]), "is not 0 or 1", "Target")
    retune.refuse_row(table, ~table["patientId"].isin(list(files)), "has no image in --data-dir", "patientId")
    table["Target"] = table.groupby("patientId")["Target"].transform("max")
    table = table.drop_duplicates("patientId").rename(columns={"patientId": "patient"})
    table["name"] = table["patient"]
    table["path"] = table["name"].map(files)
    table["split"] = retune.patient_split(table["name"], retune.SHARES)
    labels = np.stack([table["Target"] == "1", table["Target"] == "0"], axis=1)
    return retune.from_table(table, labels, ("Pneumonia", "No Finding"), public, "rsna: 70/10/20% by hash")


def load_chexpert_5x200(config: Config, public: retune.Config) -> Radiographs:
    """CheXpert with the published list of test images, `Path` and a column per finding, as --labels-csv.
    Other images of the listed patients and CheXpert's own test set are left out."""
    if config.labels_csv is None:
        raise InputError("--data chexpert-5x200 needs --labels-csv; --data chexpert makes a list by rule")
    data = retune.load_radiographs(dataclasses.replace(public, data="chexpert", labels_csv=None))
    table = retune.read_table(config.labels_csv, ["Path", *retune.COMPETITION_FINDINGS])
    values, _ = retune.parse_labels(table, retune.COMPETITION_FINDINGS, config.uncertain, "zero")
    row_of = {name: row for row, name in enumerate(data.names)}
    listed = table["Path"].str.extract(r"((?:train|valid|test)/.*)")[0].map(row_of)
    retune.refuse_row(table, listed.isna(), f"is not an image of {public.root}", "Path")
    retune.refuse_row(table, values.sum(1) != 1, "must have exactly one of the five findings", "Path")
    listed = listed.astype(int).to_numpy()
    data.labels[np.ix_(listed, [data.class_names.index(n) for n in retune.COMPETITION_FINDINGS])] = values
    kept = (data.split != "test") & ~np.isin(data.patients, data.patients[listed])
    data.split[listed] = "test"
    kept[listed] = True
    rows = np.flatnonzero(kept)
    lists = {n: [getattr(data, n)[row] for row in rows] for n in ("images", "names", "rows", "view")}
    arrays = {n: getattr(data, n)[kept] for n in ("labels", "patients", "split")}
    note = f"{data.note}; test: the {len(listed):,} listed images, training without their patients"
    return dataclasses.replace(data, note=note, sex=None, age=None, part=None, **lists, **arrays)


def load_embed(config: Config, public: retune.Config) -> Radiographs:
    """EMBED mammography: *metadata*.csv (a row an image) joined with *clinical*.csv (a row a finding), also
    in `tables`. Labels: seven BI-RADS categories, then four densities, one-hot; nan where the exam has none.
    Only 2D images. Jeong et al., Radiology: Artificial Intelligence 2023; access by agreement."""
    root = public.root / "tables" if (public.root / "tables").is_dir() else public.root
    new_names = {"empi_anon": "patient", "ImageLateralityFinal": "side", "ViewPosition": "position"}
    needed = ["acc_anon", "anon_dicom_path", "FinalImageType", *new_names]
    table = retune.read_table(retune.only_file(root, "*metadata*.csv"), needed)
    table = table.rename(columns=new_names)[table["FinalImageType"] == "2D"].reset_index(names="row")
    exams = read_exams(retune.only_file(root, "*clinical*.csv"))
    table = table.merge(exams, on=["acc_anon", "side"]).set_index("row")
    if table.empty:
        raise InputError(f"{root}: no 2D image belongs to an exam with an assessment or a density")
    labels = [np.where(table["assessment"] == "", np.nan, table["assessment"] == key) for key in BI_RADS]
    labels += [np.where(table["density"] == "", np.nan, table["density"] == key) for key in DENSITY]
    table["report"] = [mammogram_caption(facts, config.caption_style) for facts in table.to_dict("records")]
    table["name"] = table["anon_dicom_path"].str.replace(r"^.*?(?=images/|cohort_)", "", regex=True)
    table["path"] = table["name"]
    table["split"] = retune.patient_split(table["patient"], retune.SHARES)
    note = f"EMBED: {len(table)} 2D images; {config.caption_style} captions; 70/10/20% by hash"
    return retune.from_table(table, np.stack(labels, axis=1), list(MAMMOGRAM_CLASSES), public, note)


def read_exams(path: Path):
    """A frame with a row for each acc_anon and side, L or R, of what is known, "" where it is not: assessment
    (the most serious), density, age, race, mass, calcification; the columns from age on are optional. A blank
    side or B is both. A mass or calcification that is described is present; that none is says nothing."""
    table = retune.read_table(path, ["acc_anon", "side", "asses", "tissueden"])
    for name in ("age_at_study", "RACE_DESC", "massshape", "massdens", "calcfind", "calcdistri"):
        table[name] = table.get(name, "")
    table["mass"] = table["massshape"] + table["massdens"]
    table["calcification"] = table["calcfind"] + table["calcdistri"]
    table["age"] = table["age_at_study"].str.split(".").str[0]
    table["race"] = table["RACE_DESC"].str.lower()
    table["density"] = table["tissueden"].str.split(".").str[0].where(lambda digit: digit.isin(DENSITY), "")
    serious = ["", *BI_RADS]
    table["assessment"] = [serious.index(letter) if letter in serious else 0 for letter in table["asses"]]
    table["side"] = [[side] if side in ("L", "R") else ["L", "R"] for side in table["side"]]
    facts = ["assessment", "density", "age", "race", "mass", "calcification"]
    exams = table.explode("side").groupby(["acc_anon", "side"])[facts].max().reset_index()
    exams["assessment"] = [serious[number] for number in exams["assessment"]]
    return exams[(exams["assessment"] + exams["density"]) != ""]


def otsu_threshold(grey: np.ndarray) -> int:
    """The grey value with the largest variance between the pixels up to it and those above (Otsu 1979)."""
    count = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below = count.cumsum()  # pixels up to each value
    mass = (count * np.arange(256)).cumsum()  # their sum
    between = (mass[-1] * below - below[-1] * mass) ** 2
    return int(np.argmax(between / np.maximum(below * (below[-1] - below), 1)))


def crop_foreground(image: Tensor) -> Tensor:
    """The smallest rectangle of a uint8 image [1 or 3, H, W] that holds its foreground, if it has one."""
    grey = image.float().mean(0).round().to(torch.uint8).numpy()  # [H, W]
    rows, columns = np.nonzero(grey > otsu_threshold(grey))
    if not len(rows):
        return image
    return image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def make_transform(encoder: DualEncoder, config: Config, training: bool) -> Callable[[Tensor], Tensor]:
    """uint8 image [1 or 3, H, W] -> pixels [3, h, w]: --foreground, then the encoder's transform; in
    training, with --augment, the authors' augmentation in place of the central crop."""
    settings = encoder.config["transform"]
    steps = [crop_foreground] if config.foreground == "on" else []
    if not training or config.augment != "on":
        return v2.Compose([*steps, encoder.transform])
    size = np.atleast_1d(settings["resize"]).tolist()
    steps += [
        v2.Resize(size, v2.InterpolationMode(settings["interpolation"])),
        v2.RandomCrop(settings["crop"] or size),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2)], p=0.4),
        v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], p=0.4),
        v2.RandomAffine(10, translate=(0.0625, 0.0625), scale=(0.8, 1.1)),
        v2.RandomHorizontalFlip(),
    ]
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    return v2.Compose([*steps, lambda image: (image / 255 - mean) / std])


class Pixels(torch.utils.data.Dataset):
    """(row, pixels [3, h, w]) of the key (row, draw), or (row, the reason why the image cannot be read).
    The transform's randomness is seeded by row and draw: neither workers nor a resumed run change it."""

    def __init__(self, data: Radiographs, transform: Callable[[Tensor], Tensor]):
        self.data = data
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | str]:
        row, draw = key
        image = self.data.images[row]
        try:
            image = retune.read_image(image) if isinstance(image, (str, Path)) else torch.tensor(image)[None]
        except InputError as error:
            return row, f"{self.data.rows[row]}: {error}"
        with retune.seeded((draw * 1_000_003 + row) % 2**63):
            return row, self.transform(image)


def load_batches(data: Radiographs, transform: Callable, batches: Iterable, workers: int) -> Iterator[tuple]:
    """(rows, pixels [B, 3, h, w]) of each batch (draw, rows); InputError for an image that cannot be read."""
    keys = ([(row, draw) for row in rows] for draw, rows in batches)
    options = {"batch_sampler": keys, "collate_fn": list, "num_workers": workers}
    for items in torch.utils.data.DataLoader(Pixels(data, transform), **options):
        for _, pixels in items:
            if isinstance(pixels, str):
                raise InputError(pixels)
        yield [row for row, _ in items], torch.stack([pixels for _, pixels in items])
