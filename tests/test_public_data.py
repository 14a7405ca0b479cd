"""Loaders of published data sets, on miniature trees in the layouts of the releases and a server on 127.0.0.1."""

import concurrent.futures
import errno
import gzip
import hashlib
import http.server
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import public_data
import pytest
from public_data import CHEXPERT_FINDINGS, COMPETITION_FINDINGS, NIH_FINDINGS

from retune import Config, InputError, load_radiographs

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_FINDINGS]


def write_csv(path: Path, header, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n"
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"image")


# ----------------------------------------------------------------------------------------------------- ChestX-ray14


def nih_tree(root: Path, layout: str, findings=("Hernia|Effusion", "No Finding")) -> Path:
    """40 patients of two images; the last ten are the test list."""
    names = [f"{patient:08d}_{k:03d}.png" for patient in range(40) for k in range(2)]
    rows = [(name, findings[i % 2], int(name[:8])) for i, name in enumerate(names)]
    write_csv(root / "Data_Entry_2017_v2020.csv", ["Image Index", "Finding Labels", "Patient ID"], rows)
    (root / "train_val_list.txt").write_text("\n".join(names[:60]))
    (root / "test_list.txt").write_text("\n".join(names[60:]) + "\n")
    for i, name in enumerate(names):
        touch(root / layout.format(1 + i // 40) / name)
    return root


@pytest.mark.parametrize("layout", ["images", "images_{:03d}/images"])
def test_nih_reads_both_layouts_and_keeps_the_official_lists(tmp_path, layout):
    data = load_radiographs(Config(data="nih", data_dir=str(nih_tree(tmp_path, layout))))
    assert data.class_names == NIH_FINDINGS and len(data.images) == 80
    assert all(image.is_file() for image in data.images)
    assert (data.labels[0] == [name in ("Hernia", "Effusion") for name in NIH_FINDINGS]).all()
    assert (data.labels[1] == 0).all()
    assert (data.split[60:] == "test").all() and set(data.split[:60]) == {"train", "val"}


def test_nih_errors_name_what_is_wrong(tmp_path):
    config = Config(data="nih", data_dir=str(nih_tree(tmp_path, "images", ("Hernya", "No Finding"))))
    with pytest.raises(InputError, match=r"row 2: unknown finding 'Hernya'; did you mean 'Hernia'"):
        load_radiographs(config)
    nih_tree(tmp_path, "images")
    (tmp_path / "test_list.txt").write_text("00000030_000.png")
    with pytest.raises(InputError, match="row 63: 00000030_001.png is in neither"):
        load_radiographs(config)
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(InputError, match="test_list.txt: no such file"):
        load_radiographs(config)
    shutil.copy(tmp_path / "Data_Entry_2017_v2020.csv", tmp_path / "Data_Entry_2017.csv")
    with pytest.raises(InputError, match="2 files match .*--labels-csv"):
        load_radiographs(config)


# --------------------------------------------------------------------------------------------------------- CheXpert


def chexpert_rows(split: str, patients, prefix="CheXpert-v1.0-small/", labels=("1.0", "", "-1.0")) -> list:
    """A frontal and a lateral image a patient; every label column holds labels[patient % 3]."""
    return [
        [f"{prefix}{split}/patient{p:05d}/study1/view{v}_{view}.jpg", "Male", 60, view.title(), "AP"]
        + [labels[p % 3]] * 14
        for p in patients
        for v, view in enumerate(("frontal", "lateral"), 1)
    ]


def chexpert_tree(root: Path, prefix="CheXpert-v1.0-small/", test: str | None = "test_labels.csv") -> Config:
    write_csv(root / "train.csv", HEADER, chexpert_rows("train", range(1, 61), prefix))
    write_csv(root / "valid.csv", HEADER, chexpert_rows("valid", range(61, 64), prefix, ("0", "1", "0")))
    rows = chexpert_rows("test", range(71, 74), "", ("0", "1", "0"))
    if test == "groundtruth.csv":
        studies = [[f"CheXpert-v1.0/{row[0].rsplit('/', 1)[0]}", *row[5:]] for row in rows[::2]]
        write_csv(root / test, ["Study", *CHEXPERT_FINDINGS], studies)
        for row in rows:
            touch(root / row[0])
    elif test:
        short = [[row[0], *row[6:]] for row in rows]  # as released: no views, no "No Finding"
        write_csv(root / test, ["Path", *CHEXPERT_FINDINGS[1:]], short)
    return Config(data="chexpert", data_dir=str(root))


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
@pytest.mark.parametrize("test", ["test_labels.csv", "test/test_labels.csv", "groundtruth.csv"])
def test_chexpert_layouts_give_the_same_data(tmp_path, prefix, test):
    data = load_radiographs(chexpert_tree(tmp_path, prefix, test))
    assert data.class_names == COMPETITION_FINDINGS
    assert [(data.split == split).sum() for split in ("train", "val", "test")] == [120, 6, 6]
    assert data.names[0] == "train/patient00001/study1/view1_frontal.jpg"
    assert data.images[-1] == tmp_path / "test/patient00073/study1/view2_lateral.jpg"
    assert np.isnan(data.labels[2]).all() and (data.labels[4] == 1).all() and (data.labels[0] == 0).all()
    assert data.labels[-6:, 0].tolist() == [0, 0, 0, 0, 1, 1]  # patients 71, 72, 73
    assert data.patients[0] == "patient00001" and data.rows[-1].endswith(
        "row " + ("4" if "ground" in test else "7")
    )
    assert "train.csv labels: 200 uncertain (-1) -> ignore, 200 blank -> zero" in data.note


@pytest.mark.parametrize("view", ["frontal", "lateral"])
@pytest.mark.parametrize("test", ["test_labels.csv", "groundtruth.csv"])
def test_chexpert_views(tmp_path, view, test):
    config = chexpert_tree(tmp_path, test=test)
    data = load_radiographs(Config(data="chexpert", data_dir=config.data_dir, view=view))
    assert len(data.images) == 66 and all(view in name for name in data.names)


def test_chexpert_policies_and_classes(tmp_path):
    folder = chexpert_tree(tmp_path).data_dir
    classes = ("Fracture", "Edema")
    data = load_radiographs(
        Config(data="chexpert", data_dir=folder, uncertain="ones", blank="ignore", classes=classes)
    )
    assert data.class_names == classes and (data.labels[2] == 1).all() and np.isnan(data.labels[0]).all()


def test_chexpert_replacement_labels_without_views(tmp_path):
    folder = chexpert_tree(tmp_path).data_dir
    rows = [[row[0], *["0.0"] * 14] for row in chexpert_rows("train", range(1, 61), "CheXpert-v1.0/")]
    path = write_csv(tmp_path / "elsewhere" / "visual.csv", ["Path", *CHEXPERT_FINDINGS], rows)
    config = Config(data="chexpert", data_dir=folder, labels_csv=str(path), view="frontal")
    data = load_radiographs(config)
    train = data.split == "train"
    assert train.sum() == 60 and (data.labels[train] == 0).all() and "visual.csv" in data.rows[0]


def test_chexpert_without_test_labels_says_so_and_keeps_patients_apart(tmp_path):
    data = load_radiographs(chexpert_tree(tmp_path, test=None))
    assert "valid.csv is the test set" in data.note
    assert all(name.startswith("valid/") for name in np.array(data.names)[data.split == "test"])
    assert not set(data.patients[data.split == "train"]) & set(data.patients[data.split == "val"])


def test_chexpert_finds_images_in_unpacked_archives(tmp_path):
    whole = tmp_path / "parent"
    chexpert_tree(whole / "CheXpert-v1.0-small")
    data = load_radiographs(Config(data="chexpert", data_dir=str(whole)))
    assert data.rows[0] == f"{whole / 'CheXpert-v1.0-small' / 'train.csv'} row 2"
    touch(whole / "CheXpert-v1.0-small" / data.names[0])
    data = load_radiographs(Config(data="chexpert", data_dir=str(whole)))
    assert data.images[0].is_file()

    batches = tmp_path / "batches"
    chexpert_tree(batches / "CheXpert-v1.0 batch 1 (validate & csv)", "CheXpert-v1.0/")
    touch(batches / "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient00061/study1/view1_frontal.jpg")
    touch(batches / "CheXpert-v1.0 batch 2 (train 1)/patient00001/study1/view1_frontal.jpg")
    data = load_radiographs(Config(data="chexpert", data_dir=str(batches)))
    assert data.images[0].is_file() and "batch 2" in str(data.images[0])
    assert data.images[120].is_file() and data.names[120].startswith("valid/patient00061")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train.csv").unlink(), r"train.csv: no such file"),
        (lambda root: (root / "valid.csv").unlink(), r"valid.csv: no such file"),
        (
            lambda root: write_csv(root / "train.csv", ["Path", "Edema"], [["a", 1]]),
            "no finding 'Atelectasis'",
        ),
        (lambda root: write_csv(root / "train.csv", ["X", *HEADER[1:]], [["a"] * 19]), "not 1, 0, -1"),
        (
            lambda root: write_csv(root / "train.csv", ["X", *HEADER[1:]], [[1] * 19]),
            "no column 'Path' or 'Study'",
        ),
        (
            lambda root: write_csv(root / "train.csv", HEADER, [["b.jpg", *[1] * 18]]),
            "row 2: 'b.jpg' is not <train",
        ),
        (
            lambda root: write_csv(root / "train.csv", HEADER, [["train/../../../x.jpg", *[1] * 18]]),
            "must be relative and stay inside",
        ),
        (
            lambda root: write_csv(root / "train.csv", HEADER, chexpert_rows("train", [1, 1, 2])),
            "row 4: image 'train/patient00001/study1/view1_frontal.jpg' is there twice",
        ),
        (
            lambda root: write_csv(root / "test_labels.csv", HEADER, chexpert_rows("test", [1])),
            "patient 'patient00001' is in",
        ),
    ],
)
def test_chexpert_errors(tmp_path, spoil, message):
    config = chexpert_tree(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        load_radiographs(config)


def test_chexpert_refuses_to_guess_between_archives_and_studies_without_images(tmp_path):
    for name in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        chexpert_tree(tmp_path / "two" / name)
    with pytest.raises(InputError, match="give one as --data-dir"):
        load_radiographs(Config(data="chexpert", data_dir=str(tmp_path / "two")))
    config = chexpert_tree(tmp_path / "one", test="groundtruth.csv")
    shutil.rmtree(tmp_path / "one/test/patient00072")
    with pytest.raises(InputError, match="groundtruth.csv row 3: no .jpg in .*patient00072"):
        load_radiographs(config)
    with pytest.raises(InputError, match="no finding 'Edma'; did you mean 'Edema'"):
        load_radiographs(Config(data="chexpert", data_dir=config.data_dir, classes=("Edma",)))


# -------------------------------------------------------------------------------------------------------- MIMIC-CXR

VIEWS = ("PA", "AP", "LATERAL", "LL", "", "SWIMMERS")


def mimic_tree(root: Path, end=".csv", reports=False) -> Config:
    """30 patients, a study each of six images, one a view; the study of the last patient has no labels."""
    images, views, studies = [], [], []
    for p in range(30):
        subject, study = 10000032 + p, 50414267 + p
        split = ("train", "validate", "test")[p % 3]
        for v, view in enumerate(VIEWS):
            images.append((f"{p:02d}-{v}", study, subject, split))
            views.append((f"{p:02d}-{v}", subject, study, view))
        if p < 29:
            studies.append((subject, study, *[("1.0", "0.0", "-1.0", "")[p % 4]] * 14))
        if reports:
            path = root / f"files/p10/p{subject}/s{study}.txt"
            path.parent.mkdir(parents=True)
            path.write_text(
                "     FINAL REPORT\n INDICATION:  Cough.\n\n FINDINGS: \n \n Clear  lungs.\n\n IMPRESSION:\n Normal: fine.\n"
                if p
                else "No sections here."
            )
    write_csv(root / f"mimic-cxr-2.0.0-split{end}", ["dicom_id", "study_id", "subject_id", "split"], images)
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    write_csv(root / f"mimic-cxr-2.0.0-metadata{end}", header, views)
    header = ["subject_id", "study_id", *CHEXPERT_FINDINGS]
    write_csv(root / f"mimic-cxr-2.0.0-chexpert{end}", header, studies)
    write_csv(root / f"mimic-cxr-2.0.0-negbio{end}", header, [(*row[:2], *["0.0"] * 14) for row in studies])
    return Config(data="mimic", data_dir=str(root))


@pytest.mark.parametrize("end", [".csv", ".csv.gz"])
def test_mimic_joins_study_labels_to_images(tmp_path, end):
    data = load_radiographs(mimic_tree(tmp_path, end))
    assert data.class_names == COMPETITION_FINDINGS and data.reports is None
    assert [(data.split == split).sum() for split in ("train", "val", "test")] == [60, 60, 54]
    assert data.images[0] == tmp_path / "files/p10/p10000032/s50414267/00-0.jpg"
    assert data.names[6] == "files/p10/p10000033/s50414268/01-0.jpg" and data.patients[6] == "10000033"
    assert (
        (data.labels[:6] == 1).all() and (data.labels[6:12] == 0).all() and np.isnan(data.labels[12:18]).all()
    )
    assert (
        "labels: 35 uncertain (-1) -> ignore, 35 blank -> zero; left out 1 studies without labels"
        in data.note
    )
    negbio = Config(
        data="mimic", data_dir=str(tmp_path), labels_csv=str(tmp_path / f"mimic-cxr-2.0.0-negbio{end}")
    )
    assert (load_radiographs(negbio).labels == 0).all()


@pytest.mark.parametrize(("view", "kept"), [("frontal", "01"), ("lateral", "23")])
def test_mimic_views(tmp_path, view, kept):
    config = mimic_tree(tmp_path)
    data = load_radiographs(Config(data="mimic", data_dir=config.data_dir, view=view))
    assert len(data.images) == 58 and {image.stem[-1] for image in data.images} == set(kept)


def test_mimic_reports_are_their_findings_and_impression(tmp_path):
    reports = load_radiographs(mimic_tree(tmp_path, reports=True)).reports
    assert len(reports) == 174 and reports[0] == "No sections here."
    assert reports[6] == reports[11] == "Clear lungs. Normal: fine." and len(list(reports)) == 174


def test_mimic_errors(tmp_path):
    config = mimic_tree(tmp_path)
    labels, split = tmp_path / "mimic-cxr-2.0.0-chexpert.csv", tmp_path / "mimic-cxr-2.0.0-split.csv"
    text = labels.read_text()
    labels.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(InputError, match="chexpert.csv row 31: study 50414267 is there twice"):
        load_radiographs(config)
    labels.write_text(text)
    split.write_text(split.read_text().replace("validate", "valid", 1))
    with pytest.raises(InputError, match="split.csv row 8: split 'valid' is not train, validate or test"):
        load_radiographs(config)
    split.write_text("dicom_id,study_id,subject_id,split\n../../x,50414267,10000032,train\n")
    with pytest.raises(InputError, match="must be relative and stay inside"):
        load_radiographs(config)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(InputError, match="metadata.csv.gz: no such file"):
        load_radiographs(Config(data="mimic", data_dir=str(tmp_path), view="frontal"))
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(gzip.compress(text.encode())[:100])
    labels.unlink()
    with pytest.raises(InputError, match="chexpert.csv.gz: not a readable CSV"):
        load_radiographs(config)


# ------------------------------------------------------------------------------------------------------- ChestMNIST

COUNTS = {"train": 7, "val": 3, "test": 5}


def chestmnist_arrays(side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(side)
    arrays = {
        f"{split}_images": rng.integers(0, 256, (n, side, side), np.uint8) for split, n in COUNTS.items()
    }
    return arrays | {f"{split}_labels": rng.integers(0, 2, (n, 14), np.uint8) for split, n in COUNTS.items()}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, at most the next number of bytes in `server.cuts`; keeps the Range headers it got."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked[6:-1]) if asked and server.ranges else 0
        if server.status or start >= len(server.content):
            return self.send_error(server.status or 416)
        body = server.content[start:]
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked and server.ranges:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of chestmnist_64.npz, which load_chestmnist takes for Zenodo."""
    np.savez_compressed(tmp_path / "source.npz", **chestmnist_arrays(64))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.content, server.ranges, server.status = (tmp_path / "source.npz").read_bytes(), True, 0
        server.cuts, server.asked = [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(public_data, "ZENODO", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(public_data, "PAUSE", 0)
        digest = hashlib.md5(server.content).hexdigest()
        monkeypatch.setitem(public_data.CHESTMNIST_MD5, 64, digest)
        yield server
        server.shutdown()
        thread.join()


def chestmnist(tmp_path: Path, **options) -> Config:
    return Config(data="chestmnist", size=64, cache_dir=str(tmp_path / "cache"), **options)


def check(data, side=64):
    arrays = chestmnist_arrays(side)
    assert data.class_names == NIH_FINDINGS
    assert data.split.tolist() == np.repeat(list(COUNTS), list(COUNTS.values())).tolist()
    assert (np.stack(list(data.images)) == np.concatenate([arrays[f"{s}_images"] for s in COUNTS])).all()
    assert (data.labels == np.concatenate([arrays[f"{s}_labels"] for s in COUNTS])).all()
    assert len(set(data.patients)) == 15 and "each image counts as a patient of its own" in data.note


@pytest.mark.parametrize(
    ("cuts", "asked"), [([], [None]), ([5000], [None, "5000"]), ([1, 0, 9], [None, "1", "1", "10"])]
)
def test_chestmnist_download_resumes_where_it_was_cut(tmp_path, server, cuts, asked):
    server.cuts = list(cuts)
    data = load_radiographs(chestmnist(tmp_path))
    check(data)
    assert server.asked == [a and f"bytes={a}-" for a in asked] and "not the published" not in data.note
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npz", ".uint8"]
    again = load_radiographs(chestmnist(tmp_path))
    assert len(server.asked) == len(asked) and again.key == data.key
    check(pickle.loads(pickle.dumps(again)))


def test_chestmnist_download_that_was_killed_before_it_got_its_name(tmp_path, server):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".chestmnist_64.npz.partial").write_bytes(server.content)
    check(load_radiographs(chestmnist(tmp_path)))
    assert server.asked == [f"bytes={len(server.content)}-"]


def test_chestmnist_processes_that_start_together_download_once(tmp_path, server):
    pytest.importorskip("fcntl")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for data in pool.map(load_radiographs, [chestmnist(tmp_path)] * 4):
            check(data)
    assert server.asked == [None]


def test_chestmnist_download_starts_over_where_ranges_are_ignored(tmp_path, server):
    server.ranges, server.cuts = False, [5000]
    check(load_radiographs(chestmnist(tmp_path)))


def test_chestmnist_download_gives_up_keeps_what_came_and_goes_on_in_the_next_run(tmp_path, server):
    server.cuts = [100] * 5
    with pytest.raises(InputError, match="cut after 500 of .*run again to go on, or put the file at"):
        load_radiographs(chestmnist(tmp_path))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".chestmnist_64.npz.partial"]
    check(load_radiographs(chestmnist(tmp_path)))
    assert server.asked[-1] == "bytes=500-"


@pytest.mark.parametrize("start", [b"", b"other bytes", b"more" * 100_000])
def test_chestmnist_wrong_bytes_are_refused_and_removed(tmp_path, server, start):
    cache = tmp_path / "cache"
    cache.mkdir()
    if start:
        (cache / ".chestmnist_64.npz.partial").write_bytes(start)
    else:
        server.content = b"x" * len(server.content)
    with pytest.raises(InputError, match="is not the published .* removed it"):
        load_radiographs(chestmnist(tmp_path))
    assert not list(cache.iterdir())
    if start:
        check(load_radiographs(chestmnist(tmp_path)))


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, 5)])
def test_chestmnist_server_errors(tmp_path, server, status, tries):
    server.status = status
    with pytest.raises(InputError, match=f"{status}.*put the file at"):
        load_radiographs(chestmnist(tmp_path))
    assert len(server.asked) == tries


def test_chestmnist_full_disk_is_said_at_once(tmp_path, monkeypatch):
    tried = []

    def receive(url, partial):
        tried.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(public_data, "receive", receive)
    with pytest.raises(InputError, match="No space left on device; run again to go on"):
        load_radiographs(chestmnist(tmp_path))
    assert len(tried) == 1


def test_chestmnist_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(public_data, "ZENODO", "http://127.0.0.1:9")
    monkeypatch.setattr(public_data, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match="refused.*put the file at"):
        load_radiographs(chestmnist(tmp_path))


def test_chestmnist_downloads_to_the_data_folder_or_reads_the_file_there(tmp_path, server):
    folder = tmp_path / "data"
    folder.mkdir()
    check(load_radiographs(chestmnist(tmp_path, data_dir=str(folder))))
    assert [p.name for p in folder.iterdir()] == ["chestmnist_64.npz"]
    np.savez(folder / "chestmnist.npz", **chestmnist_arrays(28))
    mine = Config(data="chestmnist", size=28, data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    data = load_radiographs(mine)
    check(data, 28)
    assert "chestmnist.npz is not the published file" in data.note and len(server.asked) == 1
    (cached,) = (tmp_path / "cache").glob("chestmnist-*.uint8")
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged cache; delete this file"):
        load_radiographs(mine)
    with pytest.raises(InputError, match="--data-dir"):
        load_radiographs(chestmnist(tmp_path, data_dir=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": None}, "no item named 'val_images.npy'"),
        ({"val_images": np.zeros((3, 28, 28), np.uint8)}, r"val_images is uint8 \(3, 28, 28\)"),
        ({"val_images": np.zeros((3, 64, 64), np.float32)}, "val_images is float32"),
        ({"val_images": np.asfortranarray(np.ones((3, 64, 64), np.uint8))}, "val_images is uint8"),
        ({"val_labels": np.full((3, 14), 2)}, "must be 0 or 1"),
        ({"val_labels": np.zeros((3, 13))}, "must be 0 or 1 for 14 findings"),
        ({"val_labels": np.array([{}] * 3, object)}, "allow_pickle=False"),
        (b"not a zip", "not a zip"),
        (4000, "not a zip"),
        (-4000, "Bad CRC-32|Error -3|invalid"),
    ],
)
def test_chestmnist_refuses_other_files(tmp_path, change, message):
    arrays = chestmnist_arrays(64) | (change if isinstance(change, dict) else {})
    path = tmp_path / "chestmnist_64.npz"
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    content = bytearray(path.read_bytes())
    if isinstance(change, bytes):
        content = change
    elif change == 4000:
        content = content[:change]
    elif change == -4000:
        content[4000] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_radiographs(chestmnist(tmp_path, data_dir=str(tmp_path)))
    assert not list((tmp_path / "cache").iterdir())
