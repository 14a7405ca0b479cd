"""Image-text pairs: `load_pairs` gives a data set with the evaluated classes as labels and captions as reports.

EMBED mammograms, RSNA pneumonia, CheXpert-5x200 and phantoms of another domain are read here, others by `retune`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

import retune
from cleft.captions import BI_RADS, DENSITY, MAMMOGRAM_CLASSES, mammogram_caption, pair_captions
from cleft.config import CHEXPERT, Config
from retune import DualEncoder, InputError, Radiographs

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")


def load_pairs(config: Config) -> Radiographs:
    """The data set of `config`: labels of the evaluated classes, `reports` the captions, "" where none can
    be said. Captions name all findings of the data set, whatever --classes evaluates."""
    data = LOADERS[config.data](config) if config.data in LOADERS else retune.load_radiographs(config.public)
    if config.data in LOADERS:
        data = retune.choose_view(data, config.public) if config.view != "all" else data
        retune.check_patients(data)
        retune.check_splits(data)
    default = retune.COMPETITION_FINDINGS if config.data in CHEXPERT else data.class_names
    wanted = tuple(retune.check_classes(config, data.class_names) or default)
    changes = {"reports": pair_captions(data, config), "class_names": wanted}
    changes["labels"] = data.labels[:, [list(data.class_names).index(name) for name in wanted]]
    if config.data in ("demo", "pretrain"):  # drawn once, which takes longer than to train on them
        changes["images"] = np.stack([data.images[i] for i in range(len(data.images))])
    return dataclasses.replace(data, **changes)


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
    """RSNA pneumonia as a choice of two classes: `*train_labels*.csv`, images anywhere under --data-dir. A
    patient has a row per box (Target 1) or one row (Target 0) and one image, <patientId>.dcm, or PNG or
    JPEG. No official split: 70/10/20% of the patients by hash."""
    root = config.public.root
    path = Path(config.labels_csv or retune.one_file(root, ["*train_labels*.csv"]))
    table = retune.read_table(path, ["patientId", "Target"])
    files = {file.stem: file for file in sorted(root.rglob("*")) if file.suffix.lower() in SUFFIXES}
    for i, (name, value) in enumerate(zip(table["patientId"], table["Target"], strict=True)):
        if value not in ("0", "1") or name not in files:
            problem = f"Target {value!r} is not 0 or 1" if name in files else f"no image {name!r} in {root}"
            raise InputError(f"{path} row {i + 2}: {problem}")
    present = table.groupby("patientId", sort=False)["Target"].max() == "1"
    names = list(present.index)
    return Radiographs(
        [files[name] for name in names], np.stack([present, ~present], axis=1), ("Pneumonia", "No Finding"),
        names, retune.patient_split(names, retune.SHARES), names,
        [f"{path} row {i + 2}" for i in table.index[~table["patientId"].duplicated()]],
        note="rsna: no official split: 70/10/20% by hash",
    )  # fmt: skip


def load_chexpert_5x200(config: Config) -> Radiographs:
    """CheXpert with the published list of test images, `Path` and a column per finding, as --labels-csv.
    The listed images are the test set, with the list's labels. As most of them lie in CheXpert's training
    set, all other images of their patients are left out, and so is CheXpert's own test set."""
    if config.labels_csv is None:
        problem = "needs the published list as --labels-csv; --data chexpert makes a balanced test by rule"
        raise InputError(f"--data chexpert-5x200 {problem}")
    data = retune.load_radiographs(dataclasses.replace(config.public, data="chexpert", labels_csv=None))
    path, findings = Path(config.labels_csv), retune.COMPETITION_FINDINGS
    table = retune.read_table(path, ["Path", *findings])
    values, _ = retune.parse_labels(table, findings, path, config.uncertain, "zero")
    row_of = {name: row for row, name in enumerate(data.names)}
    listed = []
    for i, place in enumerate(table["Path"]):
        name = place[max(place.find("train/"), place.find("valid/"), place.find("test/"), 0) :]
        if name not in row_of or values[i].sum() != 1:
            problem = "is not in --data-dir" if name not in row_of else "must have one of the five findings"
            raise InputError(f"{path} row {i + 2}: {place!r} {problem}")
        listed.append(row_of[name])
    data.labels[np.ix_(listed, [data.class_names.index(name) for name in findings])] = values
    data.split[(data.split == "test") | np.isin(data.patients, data.patients[listed])] = "unused"
    data.split[listed] = "test"
    data.note += f"; test: the {len(listed):,} images of {path.name}, training without their patients"
    return data


def load_embed(config: Config) -> Radiographs:
    """EMBED mammography: *metadata*.csv (a row an image) joined with *clinical*.csv (a row a finding).
    Labels: seven BI-RADS categories, then four densities, one-hot; nan where the exam has none. Only 2D
    images. Jeong et al., Radiology: Artificial Intelligence 2023; access by agreement."""
    root = config.public.root
    tables = [[f"*{kind}*.csv", f"tables/*{kind}*.csv"] for kind in ("metadata", "clinical")]
    images_csv, clinical_csv = (retune.one_file(root, patterns) for patterns in tables)
    columns = ["empi_anon", "acc_anon", "anon_dicom_path", "ImageLateralityFinal", "ViewPosition"]
    table = retune.read_table(images_csv, [*columns, "FinalImageType"])
    table["row"] = [f"{images_csv} row {i + 2}" for i in table.index]
    table = table.rename(columns={"ImageLateralityFinal": "side", "ViewPosition": "view"})
    table = table[table["FinalImageType"] == "2D"].merge(read_exams(clinical_csv), on=["acc_anon", "side"])
    if table.empty:
        raise InputError(f"{images_csv}: no 2D image belongs to an exam with an assessment in {clinical_csv}")
    labels = [np.where(table["assessment"] == "", np.nan, table["assessment"] == key) for key in BI_RADS]
    labels += [np.where(table["density"] == "", np.nan, table["density"] == key) for key in DENSITY]
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


def read_exams(path: Path):
    """A frame with a row for each acc_anon and side, L or R, of what is known, "" where it is not.
    Assessment (the most serious), density, age, race, mass, calcification; the columns from age on are
    optional. A blank side or B is both. A mass or calcification that is described is present; that none is
    says nothing."""
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


LOADERS = {"pretrain": load_pretrain, "rsna": load_rsna, "embed": load_embed}
LOADERS["chexpert-5x200"] = load_chexpert_5x200


def otsu_threshold(grey: np.ndarray) -> int:
    """The grey value of a uint8 image with the largest variance between the pixels up to it and above (Otsu 1979)."""
    count = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, mass = count.cumsum(), (count * np.arange(256)).cumsum()  # pixels up to each value, and their sum
    between = (mass[-1] * below - below[-1] * mass) ** 2
    return int(np.argmax(between / np.maximum(below * (below[-1] - below), 1)))


def crop_foreground(image: Tensor) -> Tensor:
    """The smallest rectangle of a uint8 image [1 or 3, H, W] that holds its foreground; all of it if it has none."""
    grey = image.float().mean(0).round().to(torch.uint8).numpy()  # [H, W]
    rows, columns = np.nonzero(grey > otsu_threshold(grey))
    if not len(rows):
        return image
    return image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def make_transform(encoder: DualEncoder, config: Config, training: bool) -> Callable[[Tensor], Tensor]:
    """uint8 image [1 or 3, H, W] -> pixels [3, h, w]: the foreground if --foreground is on, the encoder's
    transform. In training, if --augment is on, the authors' augmentation takes the place of the central
    crop."""
    settings = encoder.config["transform"]
    steps = [crop_foreground] if config.foreground == "on" else []
    if not training or config.augment != "on":
        return v2.Compose([*steps, encoder.transform])
    size = settings["resize"]
    steps += [
        v2.Resize([size] if isinstance(size, int) else size, v2.InterpolationMode(settings["interpolation"])),
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
    `draw` seeds the transform's randomness together with the row: neither workers nor a resumed run change
    it."""

    def __init__(self, data: Radiographs, transform: Callable[[Tensor], Tensor]):
        self.images, self.transform = data.images, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor | str]:
        row, draw = key
        image = self.images[row]
        try:
            file = isinstance(image, (str, Path))
            pixels = retune.read_image(image) if file else torch.from_numpy(np.array(image))[None]
        except InputError as error:
            return row, str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((draw * 1_000_003 + row) % 2**63)
            return row, self.transform(pixels)


def load_batches(
    data: Radiographs, transform: Callable, batches: Iterable[tuple[int, list[int]]], workers: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(rows, pixels [B, 3, h, w]) of each (draw, rows); InputError for an image that cannot be read."""
    keys = ([(row, draw) for row in rows] for draw, rows in batches)
    options = {"batch_sampler": keys, "collate_fn": list, "num_workers": workers}
    for items in torch.utils.data.DataLoader(Pixels(data, transform), **options):
        for row, pixels in items:
            if isinstance(pixels, str):
                raise InputError(f"{data.rows[row]}: {pixels}")
        yield [row for row, _ in items], torch.stack([pixels for _, pixels in items])
