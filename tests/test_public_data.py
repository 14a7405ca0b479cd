"""Data from files: images, a user's own CSV, and miniature trees in the layouts of published data sets."""

import itertools
import os
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retune
from retune import CHEXPERT_FINDINGS, COMPETITION_FINDINGS, NIH_FINDINGS, InputError
from tests.conftest import (
    COUNTS,
    ROOT,
    chestmnist_arrays,
    load_csv,
    load_set,
    mimic_tree,
    read_failure,
    read_metrics,
    run_python,
    write_dicom,
    write_rows,
)

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS]

pytestmark = pytest.mark.usefixtures("in_empty_folder")


# ------------------------------------------------------------------------------------------------ image files
def test_pixels_of_every_kind_of_image_are_read_exactly(tmp_path):
    generator = np.random.default_rng(1)
    grey = generator.integers(0, 256, (7, 5), np.uint8)
    rgb, rgba = (generator.integers(0, 256, (7, 5, n), np.uint8) for n in (3, 4))
    deep = generator.integers(300, 4000, (7, 5)).astype(np.uint16)
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn to the right shows it upright
    flat = np.full((16, 16), 77, np.uint8)
    stretched = (deep - deep.min()) / float(deep.max() - deep.min()) * 255
    for name, pixels, options, wanted in (
        ("grey.PNG", grey, {}, grey[None]),
        ("grey.tiff", grey, {}, grey[None]),
        ("la.png", np.stack([grey, 255 - grey], 2), {}, grey[None]),
        ("turned.png", grey, {"exif": turned}, np.rot90(grey, -1)[None]),
        ("rgb.png", rgb, {}, rgb.transpose(2, 0, 1)),
        ("rgba.png", rgba, {}, rgba[..., :3].transpose(2, 0, 1)),
        ("deep.png", deep, {}, stretched.round()[None]),
        ("deep.TIF", deep, {}, stretched.round()[None]),
        ("white-is-zero.tif", deep, {"tiffinfo": {262: 0}}, (255 - stretched).round()[None]),
        ("constant.png", np.full((7, 5), 900, np.uint16), {}, np.zeros((1, 7, 5))),
        ("flat.JPEG", flat, {"quality": 95}, flat[None]),
    ):
        Image.fromarray(pixels).save(tmp_path / name, **options)
        found = retune.read_image(tmp_path / name)
        assert found.dtype == torch.uint8, name
        np.testing.assert_array_equal(found.numpy(), wanted, name)
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    rgb = np.stack([ramp, ramp[:, ::-1], ramp], 2)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    found = retune.read_image(tmp_path / "cmyk.jpg").permute(1, 2, 0)
    assert found.shape == rgb.shape and np.abs(found.numpy() - rgb.astype(float)).mean() < 4


def test_unreadable_images_are_refused_by_name_and_reason(tmp_path, monkeypatch):
    Image.new("L", (100, 40)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    reasons = {"none.png": "no such file", "nan.tiff": "not all numbers", "good.png": "4000 pixels",
               "pages.tif": "2 pages", "deep.png": "16 bits are of colour", "": "directory"}  # fmt: skip
    for name, content in (("cut.png", whole[:40]), ("text.jpg", b"hello"), ("page.pdf", b"%PDF-1.7")):
        (tmp_path / name).write_bytes(content)
        reasons[name] = "PNG.*JPEG.*TIFF.*DICOM"
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    page = Image.new("L", (8, 8))
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)  # 16-bit colour, which Pillow does not write
    rows = zlib.compress(bytes(8 * (1 + 8 * 6)))
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    blocks = [struct.pack(">I", len(x)) + t + x + struct.pack(">I", zlib.crc32(t + x)) for t, x in chunks]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(blocks))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"{(tmp_path / name).name}.*{reason}"):
            retune.read_image(tmp_path / name)


def test_dicom_follows_rescale_window_table_and_monochrome1(tmp_path):
    """A window of centre 1000 and width 800 shows 600 to 1400 (PS3.3 C.11.2.1.2); MONOCHROME1 is inverted."""
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.LUTData = np.sqrt(np.arange(4096) * 4095).astype("<u2").tobytes()
    table["LUTData"].VR = "OW"
    curve = {"VOILUTSequence": pydicom.Sequence([table])}
    window = {"RescaleSlope": 2, "RescaleIntercept": -500, "WindowCenter": 1000, "WindowWidth": 800}
    pixels = np.random.default_rng(2).integers(100, 3000, (6, 4))
    curved = np.sqrt(pixels * 4095).astype("<u2").astype(int)
    windowed = np.clip(((pixels * 2 - 500) - 999.5) / 799 + 0.5, 0, 1)
    kinds = ((pixels, {}), (windowed, window), (curved, curve))
    for (values, changes), sign in itertools.product(kinds, (1, -1)):
        changes = changes | {"PhotometricInterpretation": "MONOCHROME2" if sign == 1 else "MONOCHROME1"}
        found = retune.read_image(write_dicom(tmp_path / "a.dcm", pixels, **changes))
        wanted = (sign * values - (sign * values).min()) / np.ptp(values) * 255
        np.testing.assert_allclose(found.numpy(), wanted[None], atol=0.51)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:200])
    with pytest.raises(InputError, match="a.dcm"):
        retune.read_image(tmp_path / "a.dcm")
    path = write_dicom(tmp_path / "cine.dcm", np.zeros((24, 8)), Rows=8, NumberOfFrames=3)
    with pytest.raises(InputError, match=r"cine.dcm.*\(3, 8, 8\).*one grey frame is read"):
        retune.read_image(path)


# ------------------------------------------------------------------------------------------- a user's own CSV
def test_a_csv_set_is_read_as_written_with_chosen_classes(csv_set):
    root, rows, _ = csv_set
    rows[3]["Mass"], rows[4]["Mass"] = "", "-1"
    path = write_rows(root / "labels.csv", rows)
    data = load_csv(root, classes=("Mass", "Edema"), uncertain="ones")
    wanted = [[float(r["Mass"] or "nan"), float(r["Edema"])] for r in rows]
    wanted[4][0] = 1
    np.testing.assert_array_equal(data.labels, np.array(wanted, np.float32))
    assert data.class_names == ("Mass", "Edema") and data.rows[7] == f"{path} row 9"
    assert [os.path.relpath(p, root) for p in data.images] == [r["path"] for r in rows] == list(data.names)
    assert list(data.patients) == [r["patient"] for r in rows]
    splits = {"train": [*range(12)], "val": [*range(16, 20)], "test": [*range(12, 16), *range(20, 24)]}
    assert {split: data.where(split).tolist() for split in splits} == splits


def test_without_splits_patients_are_hashed(csv_set):
    root, rows, _ = csv_set
    for i, row in enumerate(rows):
        del row["split"]
        row["patient"] = f"p{i % 18}"
    write_rows(root / "labels.csv", rows)
    data = load_csv(root)
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    assert list(data.split) == list(retune.patient_split(data.patients, shares))
    assert "patient" not in data.note
    for row in rows:
        del row["patient"]
    write_rows(root / "labels.csv", rows)
    data = load_csv(root)
    assert "patient" in data.note and len(set(data.patients)) == 24


def test_paths_may_be_absolute_or_pass_through_links(csv_set, encoder):
    root, rows, _ = csv_set
    plain = np.array(retune.embed(encoder, load_csv(root), root.parent / "cache"))
    (root / "images").rename(root.parent / "big disk")
    (root / "images").symlink_to(root.parent / "big disk")
    (root / "one.png").symlink_to(root / "images/01.png")
    rows[0]["path"] = str(root.parent / "big disk/00.png")
    rows[1]["path"] = "one.png"
    rows[2]["path"] = "../big disk/02.png"
    rows[3]["path"] = "./images//03.png"
    write_rows(root / "labels.csv", rows)
    data = load_csv(root)
    np.testing.assert_array_equal(retune.embed(encoder, data, root.parent / "cache"), plain)


def test_columns_that_are_no_findings_are_left_out_and_named(csv_set):
    root, rows, _ = csv_set
    for i, row in enumerate(rows):
        groups = {"age": f"{40 + i}", "sex": f"{i % 2}", "VIEW": ("PA", "LATERAL ")[i % 2], "part": "1"}
        row |= groups | {"ward": "B2", "Notes": "", "Patient": row.pop("patient")}
    write_rows(root / "labels.csv", rows)
    data = load_csv(root)
    assert tuple(data.class_names) == ("Edema", "Mass") and "'ward', 'Notes'" in data.note
    assert list(data.patients) == [row["Patient"] for row in rows]
    for name in groups:
        assert list(getattr(data, name.lower())) == [row[name].strip() for row in rows], name
    lateral = load_csv(root, view="lateral")
    assert list(lateral.names) == [row["path"] for row in rows[1::2]] and set(lateral.view) == {"LATERAL"}
    assert "left out 12 images of other views" in lateral.note
    rows[3]["Mass"] = "unclear"
    write_rows(root / "labels.csv", rows)
    assert tuple(load_csv(root, classes=("Edema",)).class_names) == ("Edema",)
    for classes in (("Edema", "Mass"), None):  # a column of labels but for one is a finding too
        with pytest.raises(InputError, match="row 5: Mass 'unclear'"):
            load_csv(root, classes=classes)


def drop(split):
    return lambda rows: rows.__setitem__(slice(None), [row for row in rows if row["split"] != split])


@pytest.mark.parametrize("change, named", [
    ({"path": "images/none.png"}, ["labels.csv row 7", "images/none.png"]),
    ({"path": ""}, ["labels.csv row 7", "path"]),
    ({"path": "images/01.png"}, ["labels.csv row 7", "'images/01.png'", "row 3"]),
    ({"path": "./images//01.png"}, ["labels.csv row 7", "row 3"]),
    (lambda rows: rows[5].update(path=f"{Path.cwd()}/my x-rays/images/01.png"), ["row 7", "row 3"]),
    (lambda rows: [row.update(Sex="F", sex="F") for row in rows], ["labels.csv", "upper and lower case"]),
    (lambda rows: [row.update(patient_id=row.pop("patient")) for row in rows], ["'patient_id'"]),
    ({"patient": ""}, ["labels.csv row 7", "patient"]),
    ({"split": "validation"}, ["labels.csv row 7", "'validation'"]),
    ({"patient": "Patient-013-Kowalski"}, ["row", "'Patient-013-Kowalski'", "train", "test"]),
    (lambda rows: [row.update(Edema="", Mass="") for row in rows], ["label", "Edema, Mass"]),
    (lambda rows: [row.update(Edema="x", Mass="y") for row in rows], ["labels.csv", "--classes"]),
    (lambda rows: write_rows(Path("my x-rays/b.csv"), rows), ["--labels-csv"]),
    (lambda rows: [row.pop("split") and row.update(patient="p1") for row in rows], ["split", "patients: 1"]),
    (drop("val"), ["val split"]), (drop("test"), ["test split"]),
    (drop("train"), ["train split"])])  # fmt: skip
def test_bad_rows_of_a_csv_set_exit_2_naming_file_row_and_value(csv_set, capsys, change, named):
    """A dictionary changes row 7 of the file."""
    root, rows, arguments = csv_set
    rows[5].update(change) if isinstance(change, dict) else change(rows)
    write_rows(root / "labels.csv", rows)
    line = read_failure(capsys, arguments)
    assert all(text in line for text in named), line


def test_a_corrupt_image_is_named_with_its_row_or_skipped_and_counted(csv_set, capsys):
    root, _, arguments = csv_set
    for i, mode in ((1, "I;16"), (2, "RGB"), (3, "RGBA")):  # one batch of all kinds
        Image.new(mode, (36, 40)).save(root / f"images/{i:02d}.png")
    (root / "images/13.png").write_bytes((root / "images/13.png").read_bytes()[:200])
    line = read_failure(capsys, arguments)
    assert "labels.csv row 15" in line and "images/13.png" in line and "--skip-bad-images" in line
    assert retune.main([*arguments, "--skip-bad-images"]) == 0
    said = capsys.readouterr().out
    assert "1 unreadable image" in said and "labels.csv row 15" in said
    metrics = read_metrics(root.parent / "run")
    assert [metrics["zero_shot"][s]["n"] for s in ("val", "test")] == [4, 7]
    assert sum(task["n_train"] for task in metrics["tasks"]) == 12
    splits = retune.read_table(root.parent / "run/splits.csv")
    assert dict(zip(splits["image"], splits["split"]))["images/13.png"] == "unreadable"
    for i in range(16, 20):
        (root / f"images/{i}.png").write_bytes(b"nothing")
    other = ["--output", root.parent / "other", "--skip-bad-images"]
    assert "val" in read_failure(capsys, [*arguments, *other])


def test_a_task_without_labels_is_named(csv_set, capsys):
    root, rows, arguments = csv_set
    for row in rows[:12]:
        row["Edema"] = ""
    write_rows(root / "labels.csv", rows)
    assert retune.main(arguments) == 0 and "Edema has no known label" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- published data sets
def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


def nih_tree(root: Path, layout: str = "images") -> Path:
    """40 patients of two images; the last ten are the test list."""
    names = [f"{patient:08d}_{k:03d}.png" for patient in range(40) for k in range(2)]
    columns = (("Hernia|Effusion", "PA"), ("No Finding", "AP"))
    rows = [(name, columns[i % 2][0], int(name[:8]), columns[i % 2][1]) for i, name in enumerate(names)]
    header = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    write_rows(root / "Data_Entry_2017_v2020.csv", rows, header)
    (root / "train_val_list.txt").write_text("\n".join(names[:60]))
    (root / "test_list.txt").write_text("\n".join(names[60:]) + "\n")
    for i, name in enumerate(names):
        touch(root / layout.format(1 + i // 40) / name)
    return root


@pytest.mark.parametrize("layout", ["images", "images_{:03d}/images"])
def test_nih_reads_both_layouts_and_keeps_the_official_lists(tmp_path, layout):
    data = load_set("nih", nih_tree(tmp_path, layout))
    assert data.class_names == NIH_FINDINGS and len(data.images) == 80
    assert all(map(os.path.isfile, data.images))
    assert (data.labels[0] == [name in ("Hernia", "Effusion") for name in NIH_FINDINGS]).all()
    assert (data.labels[1] == 0).all()
    held_out = retune.patient_split(data.patients[:60], {"train": 7 / 8, "val": 1 / 8})
    assert list(data.split) == [*held_out, *["test"] * 20] and {"train", "val"} == set(held_out)
    assert load_set("nih", tmp_path, view="ap").names == data.names[1::2]


def chexpert_rows(split: str, patients, prefix="CheXpert-v1.0-small/", labels=("1.0", "", "-1.0")) -> list:
    """A frontal and a lateral image a patient; every label column holds labels[patient % 3]."""
    views = ("frontal", "lateral", "AP", "")
    return [
        [f"{prefix}{split}/patient{p:05d}/study1/view{v + 1}_{views[v]}.jpg",
         "Male", 60, views[v].title(), views[v + 2]] + [labels[p % 3]] * 14
        for p in patients
        for v in (0, 1)
    ]  # fmt: skip


def chexpert_tree(root: Path, prefix="CheXpert-v1.0-small/", test: str | None = "test_labels.csv") -> Path:
    write_rows(root / "train.csv", chexpert_rows("train", range(1, 61), prefix), HEADER)
    write_rows(root / "valid.csv", chexpert_rows("valid", range(61, 64), prefix, ("0", "1", "0")), HEADER)
    rows = chexpert_rows("test", range(71, 74), "", ("0", "1", "0"))
    if test == "groundtruth.csv":
        studies = [[f"CheXpert-v1.0/{row[0].rsplit('/', 1)[0]}", *row[5:]] for row in rows[::2]]
        write_rows(root / test, studies, ["Study", *CHEXPERT_FINDINGS])
        for row in rows:
            touch(root / row[0])
    elif test:
        short = [[row[0], *row[6:]] for row in rows]  # as released: no views, no "No Finding"
        write_rows(root / test, short, ["Path", *CHEXPERT_FINDINGS[1:]])
    return root


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
@pytest.mark.parametrize("test", ["test_labels.csv", "test/test_labels.csv", "groundtruth.csv"])
def test_chexpert_layouts_give_the_same_data(tmp_path, prefix, test):
    data = load_set("chexpert", chexpert_tree(tmp_path, prefix, test))
    assert data.class_names == COMPETITION_FINDINGS
    assert [(data.split == split).sum() for split in ("train", "val", "test")] == [120, 6, 6]
    assert data.names[0] == "train/patient00001/study1/view1_frontal.jpg"
    assert data.images[-1] == f"{tmp_path}/test/patient00073/study1/view2_lateral.jpg"
    assert np.isnan(data.labels[2]).all() and (data.labels[4] == 1).all() and (data.labels[0] == 0).all()
    assert data.labels[-6:, 0].tolist() == [0, 0, 0, 0, 1, 1]  # patients 71, 72, 73
    last = "row 4" if "ground" in test else "row 7"
    assert data.patients[0] == "patient00001" and data.rows[-1].endswith(last)
    assert (data.view[:2], data.view[-1]) == (["AP", "Lateral"], "lateral")
    assert "200 uncertain (-1) -> ignore, 200 blank -> zero" in data.note
    for view in ("frontal", "lateral"):
        data = load_set("chexpert", tmp_path, view=view)
        assert len(data.images) == 66 and all(view in name for name in data.names)
    data = load_set("chexpert", tmp_path, uncertain="ones", blank="ignore", classes=("Edema", "Atelectasis"))
    assert data.class_names == ("Edema", "Atelectasis")
    assert (data.labels[2] == 1).all() and np.isnan(data.labels[0]).all()


def test_chexpert_replacement_labels_without_views(tmp_path):
    rows = [[row[0], *["0.0"] * 14] for row in chexpert_rows("train", range(1, 61), "CheXpert-v1.0/")]
    path = write_rows(tmp_path / "elsewhere" / "visual.csv", rows, ["Path", *CHEXPERT_FINDINGS])
    data = load_set("chexpert", chexpert_tree(tmp_path), labels_csv=str(path), view="frontal")
    train = data.split == "train"
    assert train.sum() == 60 and (data.labels[train] == 0).all() and "visual.csv" in data.rows[0]


def test_chexpert_without_test_labels_says_so_and_keeps_patients_apart(tmp_path):
    data = load_set("chexpert", chexpert_tree(tmp_path, test=None))
    assert "valid.csv is the test set" in data.note
    assert all(name.startswith("valid/") for name in np.array(data.names)[data.split == "test"])
    train, held_out = (data.patients[data.split == split] for split in ("train", "val"))
    assert not set(train) & set(held_out) and len(train) > 9 * len(held_out)


def test_chexpert_finds_images_in_unpacked_archives_or_refuses_to_guess(tmp_path):
    archive = chexpert_tree(tmp_path / "parent" / "CheXpert-v1.0-small")
    touch(archive / "train/patient00001/study1/view1_frontal.jpg")
    data = load_set("chexpert", archive.parent)
    assert data.rows[0] == f"{archive / 'train.csv'} row 2" and os.path.isfile(data.images[0])
    chexpert_tree(archive.parent / "CheXpert-v1.0")
    with pytest.raises(InputError, match="--data-dir"):
        load_set("chexpert", archive.parent)
    batches = tmp_path / "batches"
    chexpert_tree(batches / "CheXpert-v1.0 batch 1 (validate & csv)", "CheXpert-v1.0/")
    touch(batches / "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient00061/study1/view1_frontal.jpg")
    touch(batches / "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg")
    data = load_set("chexpert", batches)
    assert os.path.isfile(data.images[0]) and "batch 2" in str(data.images[0])
    assert os.path.isfile(data.images[120]) and data.names[120].startswith("valid/patient00061")


def test_chexpert_refuses_studies_without_images_and_unknown_classes(tmp_path):
    chexpert_tree(tmp_path, test="groundtruth.csv")
    shutil.rmtree(tmp_path / "test/patient00072")
    with pytest.raises(InputError, match="groundtruth.csv row 3: .*patient00072/study1"):
        load_set("chexpert", tmp_path)
    with pytest.raises(InputError, match="'Edma'"):
        load_set("chexpert", tmp_path, classes=("Edma",))


@pytest.mark.parametrize("end", [".csv", ".csv.gz"])
def test_mimic_joins_study_labels_to_images(tmp_path, end):
    data = load_set("mimic", mimic_tree(tmp_path, end))
    assert data.class_names == COMPETITION_FINDINGS and data.reports is None
    assert [(data.split == split).sum() for split in ("train", "val", "test")] == [60, 60, 54]
    assert data.images[0] == f"{tmp_path}/files/p10/p10000032/s50414267/00-0.jpg"
    assert data.names[6] == "files/p10/p10000033/s50414268/01-0.jpg" and data.patients[6] == "10000033"
    np.testing.assert_array_equal(data.labels[:18, 0], np.repeat([1, 0, np.nan], 6))
    assert "35 uncertain (-1) -> ignore, 35 blank -> zero; left out 1 studies without labels" in data.note
    negbio = load_set("mimic", tmp_path, labels_csv=str(tmp_path / f"mimic-cxr-2.0.0-negbio{end}"))
    assert (negbio.labels == 0).all()
    for view, kept in (("frontal", "01"), ("lateral", "23")):
        names = load_set("mimic", tmp_path, view=view).names
        assert len(names) == 58 and {name[-5] for name in names} == set(kept)


FIRST, TWICE = r"(?s)^([^\n]*\n)([^\n]*\n)", r"\1\2\2"


@pytest.mark.parametrize("name, file, old, new, message", [
    ("nih", "Data_Entry_2017_v2020.csv", "Hernia", "Hernya", "row 2: .*'Hernya"),
    ("nih", "test_list.txt", "00000030_001.png", "", "row 63: .*'00000030_001.png'"),
    ("nih", "test_list.txt", None, None, "test_list.txt"),
    ("nih", "Data_Entry_2017.csv", None, "", "2 files .*--labels-csv"),
    ("chexpert", "train.csv", None, None, "train.csv: no such file"),
    ("chexpert", "valid.csv", None, None, "valid.csv: no such file"),
    ("chexpert", "train.csv", "Atelectasis", "Atelectases", "'Atelectasis'"),
    ("chexpert", "train.csv", "Path", "X", "'Path'"),
    ("chexpert", "train.csv", "-1.0,-1.0,-1.0", "0,0,a", "row 4: Cardiomegaly 'a'"),
    ("chexpert", "train.csv", "(?m)^Che[^,]*", "b.jpg", "row 2: Path 'b.jpg'"),
    ("chexpert", "train.csv", FIRST, TWICE, "row 3: .*'train/patient00001/study1/view1_frontal.jpg'.*row 2"),
    ("chexpert", "test_labels.csv", "patient00071", "patient00001", "'patient00001'"),
    ("mimic", "mimic-cxr-2.0.0-chexpert.csv", FIRST, TWICE, "chexpert.csv row 3: .*'50414267'"),
    ("mimic", "mimic-cxr-2.0.0-split.csv", "validate", "valid", "split.csv row 8: .*'valid'"),
    ("mimic", "mimic-cxr-2.0.0-metadata.csv", None, None, "metadata.csv.*: no such file")])  # fmt: skip
def test_bad_tables_of_published_sets_are_refused(tmp_path, name, file, old, new, message):
    """The first `old` becomes `new`; without `old` the file is written, or deleted if `new` is None."""
    {"nih": nih_tree, "chexpert": chexpert_tree, "mimic": mimic_tree}[name](tmp_path)
    path = tmp_path / file
    if new is None:
        path.unlink()
    else:
        path.write_text(re.sub(old, new, path.read_text(), count=1) if old else new)
    with pytest.raises((InputError, OSError), match=message):
        load_set(name, tmp_path, **({} if name == "chexpert" else {"view": "frontal"}))


def load_chestmnist(root: Path, side=64) -> retune.Radiographs:
    return load_set("chestmnist", root, size=side, cache_dir=str(root / "cache"))


def test_chestmnist_is_read_where_it_lies_or_downloaded_with_its_checksum(tmp_path, monkeypatch):
    asked = []

    def download_url(url, root, name, md5):
        asked.append((url, md5))
        if len(asked) > 1:
            raise OSError("offline")
        np.savez_compressed(Path(root) / name, **chestmnist_arrays(64))

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    np.savez(tmp_path / "chestmnist.npz", **chestmnist_arrays(28))
    for side in (28, 64, 64):
        data = pickle.loads(pickle.dumps(load_chestmnist(tmp_path, side)))
        arrays = chestmnist_arrays(side)
        assert tuple(data.class_names) == NIH_FINDINGS
        assert list(data.split) == np.repeat(list(COUNTS), list(COUNTS.values())).tolist()
        assert (np.stack(list(data.images)) == np.concatenate([arrays[f"{s}_images"] for s in COUNTS])).all()
        assert (data.labels == np.concatenate([arrays[f"{s}_labels"] for s in COUNTS])).all()
        assert len(set(data.patients)) == 15 and "each image counts as a patient of its own" in data.note
    assert asked == [(retune.CHESTMNIST.format("chestmnist_64.npz"), retune.CHESTMNIST_MD5[64])]
    with pytest.raises(InputError, match=r"chestmnist_128\.npz: .*put the published file there.*offline"):
        load_chestmnist(tmp_path, 128)
    with pytest.raises(InputError, match="--data-dir"):
        load_set("chestmnist", tmp_path / "none")


@pytest.mark.parametrize("change", [
    {"val_images": None}, {"val_images": np.zeros((3, 28, 28), np.uint8)},
    {"val_images": np.zeros((3, 64, 64))}, {"val_labels": np.full((3, 14), 2)},
    {"val_labels": np.zeros((3, 13))}, {"val_labels": np.array([{}] * 3, object)}, b"not a zip"])  # fmt: skip
def test_chestmnist_refuses_other_files(tmp_path, change):
    arrays = chestmnist_arrays(64) | (change if isinstance(change, dict) else {})
    path = tmp_path / "chestmnist_64.npz"
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    if isinstance(change, bytes):
        path.write_bytes(change)
    with pytest.raises(InputError, match=r"chestmnist_64\.npz: not ChestMNIST at 64 pixels"):
        load_chestmnist(tmp_path)


# ------------------------------------------------------------------------------------------------------ scale
@pytest.mark.slow
def test_a_table_of_chexperts_size_loads_in_little_memory(tmp_path):
    """223,414 rows with CheXpert's columns, in another process; the README's bound: 400 MB above torch."""
    write_rows(tmp_path / "train.csv", chexpert_rows("train", range(1, 111_708)), HEADER)
    write_rows(tmp_path / "valid.csv", chexpert_rows("valid", range(120_000, 120_003)), HEADER)
    program = f"""
import pandas, sklearn.metrics, retune
before = retune.peak_memory_mb()
data = retune.load_radiographs(retune.Config(data="chexpert", data_dir={str(tmp_path)!r}))
assert len(data.images) == 223_420 and data.images[0].endswith("/view1_frontal.jpg")
print(retune.peak_memory_mb() - before)
"""
    done = run_python(ROOT, "-c", program)
    assert done.returncode == 0, done.stderr
    print(f"{float(done.stdout):.0f} MB more at the peak")
    assert float(done.stdout) < 400
