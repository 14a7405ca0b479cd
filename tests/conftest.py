"""What the tests share: random encoders, small data sets, a finished run, helpers to run and read programs.

One thread for torch, also in processes that tests start, as bits depend on the number of threads; no network.
"""

import functools
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import retune

torch.set_num_threads(1)

ROOT = Path(retune.__file__).resolve().parent
# pytest offers these below this folder alone; test_retune.py, above it, imports them
__all__ = ["csv_set", "demo_arguments", "encoder", "encoder_folder", "finished", "in_empty_folder"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than five seconds; skip with -m 'not slow'")


# --------------------------------------------------------------------------------------------------- encoders
def word_tokenizer(words: list[str]):
    """A tokenizer of whole words in lower case; an end token, number 2, follows every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[END]", *sorted(set(words))])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def save_random_encoder(folder: Path, seed: int) -> Path:
    """A small untrained encoder in the format of `demo/tiny`: 32 px, 16 dimensions, words of prompts.json."""
    words = re.findall("[a-z0-9]+", (ROOT / "prompts.json").read_text(encoding="utf-8").lower())
    tokenizer = word_tokenizer(words)
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    gpt2 = {"model_type": "gpt2", "vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "n_positions": 64}
    head = [retune.linear(16, 16)]
    config = {
        "name": folder.name, "dim": 16,
        "image": {"model": resnet | {"layer_type": "basic"}, "pool": "mean", "head": head},
        "text": {"model": gpt2 | ends, "pool": "last", "head": head, "context_length": 64},
        "transform": {"resize": 32, "crop": 32, "interpolation": "bilinear",
                      "mean": [0.5] * 3, "std": [0.25] * 3}}  # fmt: skip
    with retune.seeded(seed):
        retune.DualEncoder(config, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    return save_random_encoder(tmp_path_factory.mktemp("encoder") / "small", seed=0)


@pytest.fixture(scope="session")
def encoder(encoder_folder) -> retune.DualEncoder:
    return retune.DualEncoder.load(str(encoder_folder))


# ------------------------------------------------------------------------------------------------------- data
def noise_images(n: int = 70, seed: int = 0) -> retune.Radiographs:
    """n grey images of noise, one a patient, in all splits, with two labels of both values."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 40, 36), np.uint8)
    labels = (np.arange(2 * n).reshape(n, 2) // 2 % [2, 3] == 1).astype(np.float32)
    split = np.resize(["train", "train", "val", "test"], n)
    return retune.Radiographs(images, labels, ("Edema", "Mass"), [f"p{i}" for i in range(n)], split)


def csv_rows(root: Path, n: int = 24) -> list[dict]:
    """Write n grey images of noise below `root`; the rows of their label file, both labels in every split."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"images/{i:02d}.png"
        Image.fromarray(generator.integers(0, 256, (40, 36), np.uint8)).save(root / name)
        patient = f"Patient-{i // 2 if i < 12 else i:03d}-Kowalski"
        split = "train" if i < 12 else ("val", "test")[i // 4 % 2]
        labels = {"Edema": str(i % 2), "Mass": str(i // 2 % 2)}
        rows.append({"path": name, "patient": patient, **labels, "split": split})
    return rows


def write_rows(path: Path, rows: list, header: list[str] | None = None) -> Path:
    """A CSV file, also .csv.gz, of dictionaries or, with a header, of lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=header).to_csv(path, index=False)
    return path


@pytest.fixture
def csv_set(tmp_path, encoder_folder):
    """(folder, rows, arguments of a run) of a CSV data set; write the rows again after changing them."""
    root = tmp_path / "my x-rays"
    rows = csv_rows(root)
    write_rows(root / "labels.csv", rows)
    arguments = ["--data", "csv", "--data-dir", root, "--encoder", encoder_folder, "--workers", "0"]
    arguments += ["--epochs", "1", "--scenario", "class", "--no-figures", "--output", tmp_path / "run"]
    return root, rows, [str(argument) for argument in arguments]


def write_dicom(path: Path, pixels: np.ndarray, **changes) -> Path:
    """A DICOM file of 12-bit pixels [H, W], with other elements as given."""
    pydicom = pytest.importorskip("pydicom")
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = "1.2.3"
    elements = {"Rows": len(pixels), "Columns": len(pixels[0]), "PixelData": pixels.astype("<u2").tobytes(),
                "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0,
                "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}  # fmt: skip
    for name, value in (elements | changes).items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)
    return path


def load_set(name: str, root: Path, **options) -> retune.Radiographs:
    return retune.load_radiographs(retune.Config(data=name, data_dir=str(root), **options))


load_csv = functools.partial(load_set, "csv")


def mimic_tree(root: Path, end=".csv") -> Path:
    """30 patients, a study each of six images, one a view; the study of the last patient has no labels."""
    positions = ("PA", "AP", "LATERAL", "LL", "", "SWIMMERS")
    images, views, studies = [], [], []
    for p in range(30):
        subject, study = 10000032 + p, 50414267 + p
        split = ("train", "validate", "test")[p % 3]
        for v, view in enumerate(positions):
            images.append((f"{p:02d}-{v}", study, subject, split))
            views.append((f"{p:02d}-{v}", subject, study, view))
        if p < 29:
            studies.append((subject, study, *[("1.0", "0.0", "-1.0", "")[p % 4]] * 14))
    write_rows(root / f"mimic-cxr-2.0.0-split{end}", images, ["dicom_id", "study_id", "subject_id", "split"])
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    write_rows(root / f"mimic-cxr-2.0.0-metadata{end}", views, header)
    header = ["subject_id", "study_id", *retune.CHEXPERT_FINDINGS]
    write_rows(root / f"mimic-cxr-2.0.0-chexpert{end}", studies, header)
    write_rows(root / f"mimic-cxr-2.0.0-negbio{end}", [(*row[:2], *["0.0"] * 14) for row in studies], header)
    return root


def write_masked(root: Path, name: str, n: int = 24) -> Path:
    """SIIM's or RSNA's layout, 28 x 28 images with a bright square where the finding is."""
    (root / "images/a").mkdir(parents=True)
    siim = name == "siim"
    lines = [f"{'ImageId, EncodedPixels' if siim else 'patientId,x,y,width,height,Target'},split"]
    for i in range(n):
        image = np.full((28, 28), 4 * i, np.uint8)
        image[3:8, 2:6] = 250 if i % 2 else image[0, 0]
        if siim:
            Image.fromarray(image).save(root / f"images/a/id{i}.png")
        else:
            write_dicom(root / f"images/a/id{i}.dcm", image)
        kinds = (" -1", " 59 5 23 5 23 5 23 5") if siim else (",,,,0", "2,3,4,5,1")
        lines.append(f"id{i},{kinds[i % 2]},{('train', 'val', 'test')[i // 2 % 3]}")
    lines.append(lines[2].replace("59 5", "600 3").replace("2,3,4,5,1", "0,0,1,1,1"))  # a second line of id1
    (root / ("train-rle.csv" if siim else "stage_2_train_labels.csv")).write_text("\n".join(lines))
    return root


COUNTS = {"train": 7, "val": 3, "test": 5}


def chestmnist_arrays(side: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(side)
    images = {f"{s}_images": rng.integers(0, 256, (n, side, side), np.uint8) for s, n in COUNTS.items()}
    return images | {f"{s}_labels": rng.integers(0, 2, (n, 14), np.uint8) for s, n in COUNTS.items()}


# ------------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    """The test fails as soon as anything opens a connection or looks up a name."""

    def refuse(*arguments, **options):
        raise AssertionError(f"network touched: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def demo_arguments(encoder_folder, tmp_path_factory) -> list[str]:
    """A small demo run in three tasks, with embeddings that all tests share."""
    cache = tmp_path_factory.mktemp("cache")
    arguments = ["--demo-images", "240", "--encoder", str(encoder_folder), "--cache-dir", str(cache)]
    return [*arguments, "--workers", "0", "--epochs", "2", "--scenario", "class", "--parts", "3"]


@pytest.fixture(scope="session")
def finished(demo_arguments, tmp_path_factory) -> Path:
    """The folder of that run, uninterrupted; to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert retune.main([*demo_arguments, "--output", str(folder)]) == 0
    return folder


SMALL_RUNS = {
    "retune": "--epochs 2 --workers 0 --demo-images 240 --scenario label --parts 3 --encoder {encoder}",
    "adaptor": "--epochs 2 --batch-size 32 --width 16 --heads 2 --feedforward 32 --head-epochs 1 --workers 0"
    " --repeats 1 --demo-images 150 --stages retrieval classification"
    " --image-encoder {encoder} --text-encoder {encoder}",
    "cleft": "all --dim 8 --batch-size 12 --steps 4 --prompt-steps 4 --save-every 2 --truncate --balanced 0"
    " --augment on --demo-images 300 --image {encoder} --text {encoder}"}  # fmt: skip


def program_arguments(program: str, encoder: Path) -> list[str]:
    """A small run of one of the three programs on the demo."""
    words = f"{SMALL_RUNS[program]} --device cpu --cache-dir cache --output run"
    return words.format(encoder=encoder).split()


def call_program(program: str, arguments: list[str]) -> int:
    """Run a program in this process, embedding in small chunks."""
    retune.CHUNK = 64
    module = retune if program == "retune" else importlib.import_module(f"{program}.__main__")
    return module.main(arguments)


def read_metrics(folder: Path) -> dict:
    """metrics.json, which must be strict JSON."""
    return json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)


def metrics_of(folder: Path) -> dict:
    """metrics.json without what may differ between equal runs: costs and the names of folders."""
    metrics = read_metrics(folder)
    del metrics["cost"]
    for name in ("output", "cache_dir", "data_dir"):
        del metrics["config"][name]
    return metrics


def model_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def assert_same_run(folder: Path, other: Path) -> None:
    assert metrics_of(folder) == metrics_of(other)
    assert model_bytes(folder) == model_bytes(other)


def read_failure(capsys, arguments, main=retune.main) -> str:
    """Run a command line, which must fail with code 2 and one line of error; that line."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.replace("\r", "\n")
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2 and lines[-1].startswith("error: ") and error.count("error: ") == 1, error
    return lines[-1]


def run_python(folder: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    """Run Python in `folder`, where nothing of this project can be imported but what lies there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def fork():
    """Starts `function(*arguments)` in a process that has imported our programs but run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs POSIX processes")
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "resnet")]
    heavy = ["pandas", "sklearn.metrics", "torchvision.transforms.v2", "matplotlib.backends.backend_agg"]
    ours = ["tests.trust.test_processes", "adaptor.__main__", "cleft.__main__"]
    context.set_forkserver_preload([*ours, *heavy, *models, "safetensors.torch", "PIL.PngImagePlugin"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        multiprocessing.forkserver.ensure_running()

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def exit_code(process) -> int | None:
    process.join(240)
    return process.exitcode
