"""What the tests share: a random encoder, a CSV set, a finished run, and helpers to run and read programs.

One thread for torch, here and in the processes that tests start, since bits depend on the number of threads.
"""

import csv
import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import retune

torch.set_num_threads(1)

ROOT = Path(retune.__file__).resolve().parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than five seconds; skip with -m 'not slow'")


# --------------------------------------------------------------------------------------------------- encoders


def save_random_encoder(folder: Path, seed: int) -> Path:
    """A small untrained encoder in the format of `demo/tiny`: 32 px, 16 dimensions, words of prompts.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (ROOT / "prompts.json").read_text(encoding="utf-8").lower()
    words = sorted(set("".join(c if c.isalnum() else " " for c in words).split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    gpt2 = {"model_type": "gpt2", "vocab_size": len(vocabulary), "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "n_positions": 64}
    head = [["Linear", {"in_features": 16, "out_features": 16}]]
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


def write_rows(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
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
    elements = {
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelData": pixels.astype("<u2").tobytes(),
    }
    elements |= {"Rows": len(pixels), "Columns": len(pixels[0]), "PhotometricInterpretation": "MONOCHROME2"}
    for name, value in ({"SamplesPerPixel": 1, "PixelRepresentation": 0} | elements | changes).items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)
    return path


def load_csv(root: Path, **options) -> retune.Radiographs:
    return retune.load_radiographs(retune.Config(data="csv", data_dir=str(root), **options))


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def read_metrics(folder: Path) -> dict:
    """metrics.json, which must be strict JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


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
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    environment = inherited | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def fork():
    """Starts `function(*arguments)` in a process that has imported our programs but run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs POSIX processes")
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "resnet")]
    heavy = ["pandas", "sklearn.metrics", "torchvision.transforms.v2", "matplotlib.backends.backend_agg"]
    ours = ["tests.test_trust", "adaptor.__main__", "cleft.__main__"]
    context.set_forkserver_preload([*ours, *heavy, *models, "safetensors.torch", "PIL.PngImagePlugin"])
    here = os.getcwd()
    os.chdir(ROOT)
    multiprocessing.forkserver.ensure_running()
    os.chdir(here)

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


def exit_code(process) -> int | None:
    process.join(240)
    return process.exitcode
