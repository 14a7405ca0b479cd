"""Tests of retune.py: every formula against plain float64 code, every promise of the command line by running it.

They need no network and no data. With RETUNE_NIH_DIR set to a folder in the layout of NIH ChestX-ray14, the
command line also runs on real radiographs; with pydicom installed, DICOM files are read.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import encoders
import hypothesis.strategies as st
import numpy as np
import pytest
import radiographs
import torch
from hypothesis import given, settings
from PIL import Image
from sklearn import metrics as sklearn_metrics

import retune

HERE = Path(__file__).resolve().parent
NAMES = ("Edema", "Mass", "Nodule", "Hernia", "Fibrosis", "Pneumonia")
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore:.*all alike")
quick = settings(max_examples=60, deadline=None)


# --------------------------------------------------------------------------------------------------- fixtures


def save_random_encoder(folder: Path, seed: int) -> Path:
    """A small untrained encoder in the format of `tiny/`: 32 px, 16 dimensions, the words of prompts.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (HERE / "prompts.json").read_text(encoding="utf-8").lower()
    words = sorted(set("".join(c if c.isalnum() else " " for c in words).split()))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    gpt2 = {"model_type": "gpt2", "vocab_size": len(vocabulary), "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "n_positions": 64}
    config = {
        "name": folder.name,
        "dim": 16,
        "image": {
            "library": "transformers",
            "model": resnet | {"layer_type": "basic"},
            "pool": "mean",
            "head": [["Linear", {"in_features": 16, "out_features": 16}]],
        },
        "text": {"model": gpt2 | ends, "pool": "last", "head": [], "context_length": 64},
        "transform": {
            "resize": 32,
            "crop": 32,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoders.DualEncoder(config, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return save_random_encoder(tmp_path_factory.mktemp("encoder") / "small", seed=0)


@pytest.fixture(scope="session")
def encoder(encoder_folder):
    return encoders.DualEncoder.load(str(encoder_folder))


@pytest.fixture(scope="session")
def demo_arguments(encoder_folder, tmp_path_factory):
    """A small demo run in three tasks, with embeddings that all tests share."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--demo-images", "240", "--encoder", str(encoder_folder), "--cache-dir", str(cache)),
        *("--workers", "0", "--epochs", "2", "--scenario", "class", "--parts", "3"),
    ]


@pytest.fixture(scope="session")
def finished(demo_arguments, tmp_path_factory):
    """The folder of that run, uninterrupted; to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert retune.main([*demo_arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def fork():
    """Starts `function(*arguments)` in a process that has imported retune but run nothing."""
    if not hasattr(signal, "SIGKILL") or "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs POSIX processes")
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "resnet")]
    heavy = [
        "test_retune",
        "torchvision.transforms.v2",
        "matplotlib.backends.backend_agg",
        "safetensors.torch",
    ]
    context.set_forkserver_preload([*heavy, "PIL.PngImagePlugin", *models])
    here = os.getcwd()
    os.chdir(HERE)
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


def metrics_of(folder: Path) -> dict:
    """metrics.json without what may differ between equal runs: costs and the names of folders."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["cost"]
    for name in ("output", "cache_dir", "data_dir"):
        del metrics["config"][name]
    return metrics


def model_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "partial" in path.name]


def failure(capsys, arguments) -> str:
    """Run the command line, which must fail with code 2 and one line of error; that line."""
    capsys.readouterr()
    code = retune.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.replace("\r", "\n")
    lines = [line for line in error.splitlines() if line.strip()]
    assert code == 2 and lines[-1].startswith("error: ") and error.count("error: ") == 1, error
    return lines[-1]


# ------------------------------------------------------------------------------- a data set of our own making


def csv_rows(root: Path, n: int = 24) -> list[dict]:
    """Write n grey images of noise below `root`; the rows of their label file, both labels in every split."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"images/{i:02d}.png"
        Image.fromarray(generator.integers(0, 256, (40, 36), np.uint8)).save(root / name)
        rows.append({
            "path": name, "patient": f"Patient-{i // 2 if i < 12 else i:03d}-Kowalski", "Edema": str(i % 2),
            "Mass": str(i // 2 % 2), "split": "train" if i < 12 else ("val", "test")[i // 4 % 2],
        })  # fmt: skip
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def csv_set(tmp_path, encoder_folder):
    """(folder, rows, arguments of a run) of a CSV data set; write the rows after changing them."""
    root = tmp_path / "my x-rays"
    rows = csv_rows(root)
    arguments = ["--data", "csv", "--data-dir", root, "--encoder", encoder_folder, "--workers", "0"]
    return root, rows, [*arguments, "--epochs", "1", "--scenario", "class", "--output", tmp_path / "run"]


# --------------------------------------------------------------------------------------------- 0. Foundations


def test_atomic_removes_what_was_written_when_the_disk_is_full_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(OSError), retune.atomic(target) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), retune.atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with retune.atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["folder", "folder/a"]


def test_written_json_is_strict_and_keeps_every_number(tmp_path):
    value = {
        "a": [1, 0.1, NAN, math.inf],
        "b": {"c": np.float64(2.5), "d": np.int64(3)},
        "e": None,
        4: ("x",),
    }
    retune.write_json(tmp_path / "x.json", value)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"a": [1, 0.1, None, None], "b": {"c": 2.5, "d": 3}, "e": None, "4": ["x"]}


def test_importing_retune_alone_changes_nothing_global(tmp_path):
    """retune.py copied by itself: every global generator, filter and default before and after."""
    shutil.copy(HERE / "retune.py", tmp_path)
    program = """
import hashlib, logging, os, pickle, random, signal, sys, warnings
import numpy as np, torch, tqdm

def state():
    values = [random.getstate(), np.random.get_state(), torch.get_rng_state().tolist(), warnings.filters[:],
              torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
              torch.are_deterministic_algorithms_enabled(), logging.root.level, len(logging.root.handlers),
              np.geterr(), np.get_printoptions(), os.getcwd(), signal.getsignal(signal.SIGINT),
              torch.backends.cudnn.benchmark, sys.excepthook, sys.stdout, os.umask(0o22)]
    return [repr(value) for value in values]

before = state()
import retune
assert retune.__file__.startswith(os.getcwd()), retune.__file__
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
heavy = {"transformers", "sklearn", "matplotlib", "torchvision", "PIL"} & set(sys.modules)
assert not heavy, heavy
print(retune.prompt_contrastive_loss(torch.zeros(2, 3), torch.ones(2, 3)).item())
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(2), abs=1e-7)


def run_copied(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """Run Python in `folder`, where nothing of this project can be imported but what lies there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_retune_copied_alone_trains_on_embeddings_of_your_own(tmp_path):
    shutil.copy(HERE / "retune.py", tmp_path)
    program = """
import numpy as np, torch, retune
rng = np.random.default_rng(0)
labels = rng.integers(0, 2, (300, 3)).astype(np.float32)
embeddings = (labels @ rng.normal(size=(3, 16)) + rng.normal(size=(300, 16)) / 4).astype(np.float32)
bank = retune.PromptBank(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6))
torch.manual_seed(0)
model, tasks = retune.RETune(16), retune.make_tasks("data", labels[:200], list("abc"), 2, seed=0)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for task in tasks:
    retune.fit(model, bank, embeddings, torch.from_numpy(labels), task, optimizer, epochs=20, batch_size=32,
               generator=torch.Generator().manual_seed(0))
scores, decisions = retune.score_rows(model, bank, embeddings, np.arange(200, 300), "diff")
print(retune.evaluate(scores, decisions, labels[200:], list("abc"))["auroc_macro"])
"""
    done = run_copied(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.95


def test_three_copied_files_run_on_images_of_your_own(csv_set, encoder_folder):
    root, rows, _ = csv_set
    write_rows(root / "labels.csv", rows)
    for name in ("retune.py", "radiographs.py", "encoders.py", "prompts.json"):
        shutil.copy(HERE / name, root.parent)
    arguments = ("--data", "csv", "--data-dir", root, "--encoder", encoder_folder, "--epochs", "1")
    done = run_copied(root.parent, "retune.py", *arguments, "--output", "run")
    assert done.returncode == 0, done.stderr
    done = run_copied(root.parent, "retune.py", "--predict", root / rows[0]["path"], "--run", "run")
    assert done.returncode == 0 and rows[0]["path"] in done.stdout, done.stderr


def test_names_of_the_companions_are_had_from_retune_too():
    assert retune.DualEncoder is encoders.DualEncoder and retune.embed is encoders.embed
    assert retune.Radiographs is radiographs.Radiographs
    choices = retune.Config.__dataclass_fields__["data"].metadata["choices"]
    assert set(choices) <= set(radiographs.DATASETS)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        retune.missing  # noqa: B018


def test_a_run_leaves_global_random_state_threads_and_warnings_as_they_were(demo_arguments, tmp_path):
    def state():
        generators = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
        return *generators, torch.get_num_threads(), list(warnings.filters), torch.is_grad_enabled()

    before = state()
    assert retune.main([*demo_arguments, "--scenario", "joint", "--output", str(tmp_path / "run")]) == 0
    assert state() == before


# ------------------------------------------------------------------------------------------------- 1. Prompts


def test_prompts_fill_templates_follow_synonyms_and_prefer_the_findings_own(tmp_path):
    path = tmp_path / "prompts.json"
    own = {"positive": ["wet lungs"], "negative": ["dry lungs", "clear"]}
    default = {"positive": ["there is {finding}"], "negative": ["no {finding}", "{finding} is absent"]}
    path.write_text(json.dumps({"default": default, "edema": own, "Effusion": "Edema"}))
    found = retune.load_prompts(path, ["Edema", "EFFUSION", "Pleural_Thickening"])
    filled = {
        "positive": ["there is pleural thickening"],
        "negative": ["no pleural thickening", "pleural thickening is absent"],
    }
    assert found == {"Edema": own, "EFFUSION": own, "Pleural_Thickening": filled}
    assert retune.load_prompts(path, ["Edema"], wording="generic")["Edema"]["positive"] == ["there is edema"]


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"default": {"positive": ["a"]', "JSON"),
        ("[1]", "object"),
        ('{"Mass": {"positive": ["a"], "negative": ["b"]}}', "'Edema'"),
        ('{"Edema": {"positive": [], "negative": ["b"]}}', "'positive'"),
        ('{"Edema": {"positive": ["a"], "negative": "b"}}', "'negative'"),
        ('{"Edema": {"positive": ["a"]}}', "'negative'"),
        ('{"Edema": {"positive": ["a", 3], "negative": ["b"]}}', "'positive'"),
        ('{"Edema": {"positive": ["a", " "], "negative": ["b"]}}', "'positive'"),
        ('{"Edema": "Nowhere"}', "'Edema'"),
        (None, "no such file"),
    ],
)
def test_unusable_prompts_are_refused_naming_file_and_finding(tmp_path, content, named):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(retune.InputError, match="p.json") as error:
        retune.load_prompts(path, ["Edema"])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_prompts_are_distinct_within_every_known_finding():
    import public_data

    names = sorted({*public_data.CHEXPERT_FINDINGS, *public_data.NIH_FINDINGS, *COMPETITION})
    for name, pair in retune.load_prompts(HERE / "prompts.json", names).items():
        texts = pair["positive"] + pair["negative"]
        assert len(set(texts)) == len(texts) >= 2, name
        assert not any("{" in text for text in texts), name


# --------------------------------------------------------------------------------------------- 2. Radiographs


@quick
@given(st.lists(st.text(max_size=8), min_size=1, max_size=30), st.lists(st.text(max_size=8), max_size=30))
def test_adding_patients_never_moves_the_old_ones(old, new):
    before, after = radiographs.patient_split(old, SHARES), radiographs.patient_split(new + old, SHARES)
    assert after[len(new) :].tolist() == before.tolist()
    assert len({*zip(new + old, after.tolist())}) == len({*new, *old})


def test_patient_split_is_the_documented_hash_and_keeps_its_shares():
    ids = [f"patient{i:05d}" for i in range(20000)]
    split = radiographs.patient_split(ids, SHARES)
    for name, share in SHARES.items():
        assert abs((split == name).mean() - share) < 4 * math.sqrt(share * (1 - share) / 20000)
    for i in range(100):
        position = int(hashlib.sha256(ids[i].encode()).hexdigest()[:16], 16) / 2**64
        assert split[i] == ("train" if position < 0.7 else "val" if position < 0.8 else "test")


def test_read_table_reads_quotes_byte_order_marks_and_gzip(tmp_path):
    text = '\ufeffpath, Mass\r\n"a, b.png",1\r\n c.png ,\r\n\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("t.csv", "t.csv.gz"):
        table = radiographs.read_table(tmp_path / name, ["path"])
        assert table == {"path": ["a, b.png", "c.png"], "Mass": ["1", ""]}


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("t.csv", b"", ["'path'"]),
        ("t.csv", b"path,Mass\n", ["no rows"]),
        ("t.csv", b"Path,Mass\na.png,1\n", ["'path'", "Path, Mass"]),
        ("t.csv", b"path,Mass,Mass\na.png,1,0\n", ["'Mass'", "twice"]),
        ("t.csv", b"path,Mass\na.png,1\nb.png\n", ["row 3"]),
        ("t.csv", b"path,Mass\na.png,1\n\nb.png,1\n", ["row 3"]),
        ("t.csv", b"path,Mass\na.png,1,0\n", ["row 2"]),
        ("t.csv", b"path,Mass\n\xff\xfe.png,1\n", ["CSV"]),
        ("t.csv.gz", b"path,Mass\na.png,1\n", ["CSV"]),
        ("t.csv.gz", gzip.compress(b"path,Mass\na.png,1\n")[:-12], ["CSV"]),
        ("t.csv", None, ["no such file"]),
    ],
)
def test_unusable_tables_are_refused_naming_file_row_and_column(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(retune.InputError, match=name) as error:
        radiographs.read_table(tmp_path / name, ["path"])
    assert all(text in str(error.value) for text in named) and "\n" not in str(error.value)


@pytest.mark.parametrize("uncertain, minus_one", [("ones", 1), ("zeros", 0), ("ignore", NAN)])
@pytest.mark.parametrize("blank, empty", [("zero", 0), ("ignore", NAN)])
def test_labels_follow_the_policies_and_are_counted(uncertain, minus_one, blank, empty):
    table = {
        "A": ["1", "0", "-1", "", "nan"],
        "B": ["1.0", "0.0", "-1.0", "NaN", "1"],
        "C": ["1", "1", "1", "1", "1"],
    }
    labels, note = radiographs.parse_labels(table, ["B", "A"], Path("x.csv"), uncertain, blank)
    wanted = [[1, 1], [0, 0], [minus_one, minus_one], [empty, empty], [1, empty]]
    np.testing.assert_array_equal(labels, np.array(wanted, np.float32))
    assert labels.dtype == np.float32
    assert "2 uncertain" in note and "3 blank" in note


@pytest.mark.parametrize("value", ["2", "yes", "1.5", "1.0.0", "--1", "inf", "01", "1e0", "٣"])
def test_a_label_that_is_none_is_refused_with_file_row_column_and_value(value):
    table = {"A": ["1", "0", "1"], "B": ["0", value, value]}
    with pytest.raises(retune.InputError) as error:
        radiographs.parse_labels(table, ["A", "B"], Path("labels.csv"), "ignore", "ignore")
    assert all(text in str(error.value) for text in ("labels.csv", "row 3", "'B'", repr(value)))


@pytest.mark.parametrize(
    "path",
    ["../out.png", "a/../../out.png", "a/..", "/etc/passwd", "C:\\x.png", "c:x.png", "\\\\server\\share\\x.png",
     "\\x.png", "..\\out.png", "", "a\0b.png"],
)  # fmt: skip
def test_paths_that_leave_the_root_are_refused(tmp_path, path):
    with pytest.raises(retune.InputError, match="table.csv row 9"):
        radiographs.safe_path(tmp_path, path, "table.csv row 9")


def test_symlinks_may_stay_inside_the_root_but_not_leave_it(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (root / "inside" / "a.png").write_bytes(b"x")
    (root / "file.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    (root / "inside" / "deep").symlink_to(outside)
    (root / "good.png").symlink_to(root / "inside" / "a.png")
    (root / "other").symlink_to(root / "inside")
    for path in ("file.png", "folder/secret.png", "inside/deep/secret.png", "folder/new/none.png"):
        with pytest.raises(retune.InputError, match="row 2"):
            radiographs.safe_path(root, path, "row 2")
    for path in (
        "good.png",
        "other/a.png",
        "inside/a.png",
        "not yet there/ü.png",
        "a..b.png",
        "./inside/a.png",
    ):
        assert radiographs.safe_path(root, path, "row 2").resolve().is_relative_to(root.resolve())


def test_pixels_of_every_kind_of_image_are_read_exactly(tmp_path):
    generator = np.random.default_rng(1)
    grey = generator.integers(0, 256, (7, 5), np.uint8)
    rgb, rgba = (generator.integers(0, 256, (7, 5, n), np.uint8) for n in (3, 4))
    deep = generator.integers(300, 4000, (7, 5)).astype(np.uint16)
    for name, pixels in (("grey", grey), ("rgb", rgb), ("rgba", rgba), ("deep", deep)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.fromarray(np.stack([grey, 255 - grey], 2), "LA").save(tmp_path / "la.png")
    Image.new("I;16", (5, 7), 900).save(tmp_path / "constant.png")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "flat.jpg", quality=95)
    stretched = np.round((deep - deep.min()) / float(deep.max() - deep.min()) * 255)
    for name, wanted in {
        "grey.png": grey[None], "rgb.png": rgb.transpose(2, 0, 1), "rgba.png": rgba[..., :3].transpose(2, 0, 1),
        "la.png": grey[None], "deep.png": stretched[None], "constant.png": np.zeros((1, 7, 5)),
        "flat.jpg": np.full((1, 16, 16), 77),
    }.items():  # fmt: skip
        pixels = radiographs.read_image(tmp_path / name)
        assert pixels.dtype == torch.uint8, name
        np.testing.assert_array_equal(pixels.numpy(), wanted, name)


def test_unreadable_and_oversized_images_are_refused_by_name(tmp_path, monkeypatch):
    Image.new("L", (50, 40)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    for name, content in (("cut.png", whole[:40]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(retune.InputError, match=name):
            radiographs.read_image(tmp_path / name)
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "cut.dcm"):
        with pytest.raises(retune.InputError, match=path.name):
            radiographs.read_image(path)
    monkeypatch.setattr(radiographs, "MAX_PIXELS", 1999)
    with pytest.raises(retune.InputError, match=r"good.png.*1,999"):
        radiographs.read_image(tmp_path / "good.png")


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom_is_stretched_and_monochrome1_inverted(tmp_path, photometric):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset

    pixels = np.random.default_rng(2).integers(100, 3000, (6, 4)).astype(np.uint16)
    image = pydicom.Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = pydicom.uid.generate_uid()
    image.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    image.Rows, image.Columns, image.SamplesPerPixel, image.PixelRepresentation = 6, 4, 1, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PhotometricInterpretation, image.PixelData = photometric, pixels.tobytes()
    image.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    grey = (pixels - pixels.min()) / float(pixels.max() - pixels.min()) * 255
    wanted = np.round(255 - grey if photometric == "MONOCHROME1" else grey)
    found = radiographs.read_image(tmp_path / "a.dcm")
    assert found.shape == (1, 6, 4)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=1 if photometric == "MONOCHROME1" else 0)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:200])
    with pytest.raises(retune.InputError, match="a.dcm"):
        radiographs.read_image(tmp_path / "a.dcm")


def test_csv_set_is_read_as_written_with_chosen_and_ordered_classes(csv_set):
    root, rows, _ = csv_set
    rows[3]["Mass"], rows[4]["Mass"] = "", "-1"
    path = write_rows(root / "labels.csv", rows)
    data = radiographs.load_radiographs(
        retune.Config(data="csv", data_dir=str(root), classes=("Mass", "Edema"), uncertain="ones")
    )
    wanted = [[float(r["Mass"] or "nan"), float(r["Edema"])] for r in rows]
    wanted[4][0] = 1
    np.testing.assert_array_equal(data.labels, np.array(wanted, np.float32))
    assert data.class_names == ("Mass", "Edema") and data.rows[7] == f"{path} row 9"
    assert [str(p.relative_to(root)) for p in data.images] == [r["path"] for r in rows] == data.names
    assert data.patients.tolist() == [r["patient"] for r in rows]
    assert [data.where(s).tolist() for s in ("train", "val", "test")] == [
        list(range(12)), [16, 17, 18, 19], [12, 13, 14, 15, 20, 21, 22, 23],
    ]  # fmt: skip


def test_without_splits_patients_are_hashed_and_without_patients_we_say_so(csv_set):
    root, rows, _ = csv_set
    for i, row in enumerate(rows):
        del row["split"]
        row["patient"] = f"p{i % 18}"
    write_rows(root / "labels.csv", rows)
    data = radiographs.load_radiographs(retune.Config(data="csv", data_dir=str(root)))
    assert data.split.tolist() == radiographs.patient_split(data.patients, SHARES).tolist()
    assert "patient" not in data.note
    for row in rows:
        del row["patient"]
    write_rows(root / "labels.csv", rows)
    data = radiographs.load_radiographs(retune.Config(data="csv", data_dir=str(root)))
    assert "patient" in data.note and len(set(data.patients)) == 24


def set_value(column, value, row=5):
    def change(root, rows):
        rows[row][column] = value

    return change


def empty_split(name):
    def change(root, rows):
        rows[:] = [row for row in rows if row["split"] != name]

    return change


def drop_column(name):
    def change(root, rows):
        for row in rows:
            del row[name]

    return change


def make_link(root, rows):
    (root / "link").symlink_to(root.parent)
    rows[5]["path"] = "link/other.png"


@pytest.mark.parametrize(
    "change, named",
    [
        (set_value("path", "../x.png"), ["labels.csv row 7", "'../x.png'"]),
        (set_value("path", "/etc/x.png"), ["labels.csv row 7", "'/etc/x.png'"]),
        (make_link, ["labels.csv row 7", "'link/other.png'"]),
        (set_value("path", "images/none.png"), ["labels.csv row 7", "images/none.png"]),
        (set_value("path", "images/01.png"), ["labels.csv row 7", "'images/01.png'", "labels.csv row 3"]),
        (set_value("path", "./images/01.png"), ["labels.csv row 7", "row 3"]),
        (set_value("path", "images//01.png"), ["labels.csv row 7", "row 3"]),
        (set_value("Mass", "maybe"), ["labels.csv row 7", "'Mass'", "'maybe'"]),
        (set_value("split", "validation"), ["labels.csv row 7", "'validation'"]),
        (set_value("patient", ""), ["labels.csv row 7", "patient"]),
        (set_value("patient", "Patient-013-Kowalski"), ["row", "'Patient-013-Kowalski'", "train", "test"]),
        (empty_split("val"), ["val split"]),
        (empty_split("test"), ["test split"]),
        (empty_split("train"), ["train split"]),
        (drop_column("path"), ["labels.csv", "'path'"]),
    ],
)
def test_bad_rows_of_a_csv_set_exit_2_with_file_row_and_value(csv_set, capsys, change, named):
    root, rows, arguments = csv_set
    change(root, rows)
    write_rows(root / "labels.csv", rows)
    line = failure(capsys, arguments)
    assert all(text in line for text in named), line


@pytest.mark.parametrize(
    "options, named",
    [
        (["--data-dir", "nowhere"], ["nowhere"]),
        (["--labels-csv", "none.csv"], ["none.csv"]),
        (["--classes", "Edema", "Mas"], ["'Mas'", "did you mean 'Mass'", "Edema, Mass"]),
        (["--classes", "Edema", "Edema"], ["twice"]),
        (["--class-order", "Mass"], ["--class-order"]),
        (["--class-order", "Mass", "Edemaa"], ["'Edemaa'", "did you mean 'Edema'"]),
        (["--scenario", "data", "--parts", "7"], ["--parts 7", "patients (6)"]),
        (["--scenario", "class", "--parts", "3"], ["--parts 3", "(2)"]),
        (["--parts", "0"], ["--parts 0"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "nan"], ["--lr"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--encoder", "nowhere/encoder"], ["nowhere/encoder"]),
        (["--prompts", "none.json"], ["none.json"]),
        (["--output", "my x-rays/images/00.png"], ["00.png"]),
        (["--seed", "-1"], ["seed"]),
        (["--workers", "-1"], ["workers"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_options_exit_2_with_the_option_and_the_value(csv_set, capsys, monkeypatch, options, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root, rows, arguments = csv_set
    write_rows(root / "labels.csv", rows)
    line = failure(capsys, [*arguments, *options])
    assert all(text in line for text in named), line


def test_argparse_errors_exit_2_too(capsys):
    for arguments in (
        ["--scenario", "sideways"],
        ["--predict", "a.png"],
        ["--epochs", "ten"],
        ["--run", "x"],
    ):
        with pytest.raises(SystemExit) as stop:
            retune.main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_two_label_files_in_a_folder_are_ambiguous_until_one_is_named(csv_set, capsys):
    root, rows, arguments = csv_set
    write_rows(root / "a.csv", rows)
    write_rows(root / "b.csv", rows[:5])
    assert "--labels-csv" in failure(capsys, arguments)
    config = retune.Config(data="csv", data_dir=str(root), labels_csv=str(root / "a.csv"))
    assert len(radiographs.load_radiographs(config).images) == 24


def spoil(root: Path, rows: list[dict]) -> None:
    """A 16-bit, an RGB, an RGBA and a corrupt image, and labels that are missing."""
    generator = np.random.default_rng(3)
    Image.fromarray(generator.integers(0, 4096, (40, 36)).astype(np.uint16)).save(root / "images/01.png")
    for i, channels in ((2, 3), (3, 4)):
        Image.fromarray(generator.integers(0, 256, (40, 36, channels), np.uint8)).save(
            root / f"images/{i:02d}.png"
        )
    (root / "images/13.png").write_bytes((root / "images/13.png").read_bytes()[:200])
    rows[0]["Edema"] = rows[15]["Mass"] = ""


def test_a_corrupt_image_is_named_with_its_row_and_can_be_skipped_and_counted(csv_set, capsys):
    root, rows, arguments = csv_set
    spoil(root, rows)
    write_rows(root / "labels.csv", rows)
    line = failure(capsys, arguments)
    assert "labels.csv row 15" in line and "images/13.png" in line and "--skip-bad-images" in line
    assert retune.main([*map(str, arguments), "--skip-bad-images"]) == 0
    said = capsys.readouterr().out
    assert "1 unreadable image" in said and "labels.csv row 15" in said
    metrics = json.loads((root.parent / "run/metrics.json").read_text())
    assert [metrics["zero_shot"][s]["n"] for s in ("val", "test")] == [4, 7]
    assert sum(task["n_train"] for task in metrics["tasks"]) == 12
    splits = radiographs.read_table(root.parent / "run/splits.csv")
    assert dict(zip(splits["image"], splits["split"]))["images/13.png"] == "unreadable"
    values = [metrics["after_task"][-1]["test"]["auroc"][c] for c in ("Edema", "Mass")]
    assert all(0 <= value <= 1 for value in values)


def test_skipping_every_image_of_a_split_is_an_error(csv_set, capsys):
    root, rows, arguments = csv_set
    for i in range(16, 20):
        (root / f"images/{i}.png").write_bytes(b"nothing")
    write_rows(root / "labels.csv", rows)
    assert "val" in failure(capsys, [*arguments, "--skip-bad-images"])


def write_chexpert(root: Path, prefix: str, test: str | None) -> None:
    """CheXpert in miniature: 40 training patients with two views each, 2 of validation and 2 of test."""
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *COMPETITION]
    lines = {"train": [], "valid": [], "test": []}
    for split, first, patients in (("train", 1, 40), ("valid", 64541, 2), ("test", 64741, 2)):
        for p in range(first, first + patients):
            for view in ("view1_frontal", "view2_lateral"):
                place = f"{split}/patient{p:05d}/study1/{view}.jpg"
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                (root / place).write_bytes(b"")
                side = view[6:].capitalize()
                values = ["1.0", "0.0", "-1.0", "", "1.0"] if split == "train" else ["1", "0", "0", "1", "0"]
                lines[split].append([prefix + place, "Male", "60", side, "AP", "", *values])
    for split, name in (("train", "train.csv"), ("valid", "valid.csv"), ("test", test)):
        if name == "groundtruth.csv":
            studies = sorted({line[0].rsplit("/", 1)[0] for line in lines["test"]})
            table = [
                ["Study", *COMPETITION],
                *([s, "0", "1", "0", "1", str(i)] for i, s in enumerate(studies)),
            ]
        elif name == "test_labels.csv":
            table = [["Path", *COMPETITION], *([line[0][len(prefix) :], *line[6:]] for line in lines[split])]
        else:
            table = [header, *lines[split]]
        if name:
            with open(root / name, "w", newline="") as file:
                csv.writer(file).writerows(table)


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", "CheXpert-v1.0-small/"])
@pytest.mark.parametrize("test", ["test_labels.csv", "groundtruth.csv"])
def test_chexpert_reads_both_prefixes_and_both_forms_of_test_labels(tmp_path, prefix, test):
    write_chexpert(tmp_path, prefix, test)
    data = radiographs.load_radiographs(retune.Config(data="chexpert", data_dir=str(tmp_path)))
    assert data.class_names == COMPETITION
    assert [len(data.where(s)) for s in ("train", "val", "test")] == [80, 4, 4]
    assert all(path.is_file() for path in data.images)
    assert data.names[3] == "train/patient00002/study1/view2_lateral.jpg" and data.rows[3].endswith("row 5")
    assert data.patients[[0, 1, 80, 84]].tolist() == [
        "patient00001", "patient00001", "patient64541", "patient64741"
    ]  # fmt: skip
    np.testing.assert_array_equal(data.labels[:80], np.tile(np.float32([1, 0, NAN, 0, 1]), (80, 1)))
    np.testing.assert_array_equal(data.labels[80:84], np.tile(np.float32([1, 0, 0, 1, 0]), (4, 1)))
    per_study = np.float32([[0, 1, 0, 1, 0]] * 2 + [[0, 1, 0, 1, 1]] * 2)
    wanted = per_study if test == "groundtruth.csv" else data.labels[80:84]
    np.testing.assert_array_equal(data.labels[84:], wanted)


def test_chexpert_policies_views_classes_and_label_files(tmp_path):
    write_chexpert(tmp_path, "CheXpert-v1.0/", "groundtruth.csv")

    def load(**options):
        return radiographs.load_radiographs(retune.Config(data="chexpert", data_dir=str(tmp_path), **options))

    assert load(uncertain="ones", blank="ignore").labels[0].tolist()[:3] == [1, 0, 1]
    assert np.isnan(load(uncertain="ones", blank="ignore").labels[0, 3])
    assert load(uncertain="zeros").labels[0].tolist() == [1, 0, 0, 0, 1]
    frontal, lateral = load(view="frontal"), load(view="lateral")
    assert len(frontal.images) == len(lateral.images) == 44
    assert all("frontal" in name for name in frontal.names)
    assert all("lateral" in name for name in lateral.names)
    assert load(classes=("Edema", "Atelectasis"), blank="zero").labels[0].tolist() == [0, 1]
    rows = [
        {
            "Path": f"CheXpert-v1.0/train/patient{p:05d}/study1/view1_frontal.jpg",
            **dict.fromkeys(COMPETITION, p % 2),
        }
        for p in range(1, 41)
    ]
    replaced = load(labels_csv=str(write_rows(tmp_path / "visualchexbert.csv", rows)))
    assert len(replaced.where("train")) == 40 and replaced.labels[:40].mean() == 0.5


def test_chexpert_without_test_labels_tests_on_valid_and_says_so(tmp_path):
    write_chexpert(tmp_path, "CheXpert-v1.0-small/", None)
    data = radiographs.load_radiographs(retune.Config(data="chexpert", data_dir=str(tmp_path)))
    assert "valid.csv" in data.note
    assert {name.split("/")[0] for name in np.array(data.names)[data.where("test")]} == {"valid"}
    validation = {data.patients[i] for i in data.where("val")}
    assert validation and not validation & {data.patients[i] for i in data.where("train")}


@pytest.mark.parametrize("layout", ["images", "images_0"])
def test_nih_reads_both_layouts_its_lists_and_cuts_validation_by_patient(tmp_path, layout):
    names = [f"{p:08d}_{k:03d}.png" for p in range(1, 61) for k in range(2)]
    findings = ["No Finding", "Mass|Edema", "Hernia", "Effusion|Mass|Pleural_Thickening"]
    lines = [["Image Index", "Finding Labels", "Follow-up #", "Patient ID"]]
    for i, name in enumerate(names):
        folder = tmp_path / ("images" if layout == "images" else f"images_{i % 12 + 1:03d}/images")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
        lines.append([name, findings[i % 4], "0", str(int(name[:8]))])
    with open(tmp_path / "Data_Entry_2017.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:100]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[100:]) + "\n")
    data = radiographs.load_radiographs(retune.Config(data="nih", data_dir=str(tmp_path)))
    assert all(path.is_file() for path in data.images) and len(data.class_names) == 14
    assert data.where("test").tolist() == list(range(100, 120))
    held_out = radiographs.patient_split(data.patients[:100], {"train": 7 / 8, "val": 1 / 8})
    assert data.split[:100].tolist() == held_out.tolist() and {"train", "val"} == set(held_out)
    for i in range(8):
        positive = {data.class_names[c] for c in np.flatnonzero(data.labels[i])}
        assert positive == set(findings[i % 4].split("|")) - {"No Finding"}
    assert not np.isnan(data.labels).any()
    (tmp_path / "test_list.txt").write_text("\n".join(names[101:]))
    with pytest.raises(retune.InputError, match="row 102.*test_list.txt"):
        radiographs.load_radiographs(retune.Config(data="nih", data_dir=str(tmp_path)))
    lines[5][1] = "Mass|Edemma"
    with open(tmp_path / "Data_Entry_2017.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    with pytest.raises(retune.InputError, match="row 6.*'Edemma'.*'Edema'"):
        radiographs.load_radiographs(retune.Config(data="nih", data_dir=str(tmp_path)))


def test_radiographs_refuse_columns_of_other_lengths_and_other_labels():
    images = np.zeros((2, 4, 4), np.uint8)
    good = {
        "labels": [[0.0], [1.0]],
        "class_names": ["A"],
        "patients": ["p", "q"],
        "split": ["train", "test"],
    }
    assert len(radiographs.Radiographs(images, **good).images) == 2
    for name, value in (
        ("labels", [[0.0]]), ("labels", [[0.5], [1]]), ("labels", [[0, 1], [1, 0]]), ("patients", ["p"]),
        ("split", ["train"] * 3),
    ):  # fmt: skip
        with pytest.raises(retune.InputError):
            radiographs.Radiographs(images, **good | {name: value})


# ----------------------------------------------------------------------------------------- 3. Frozen encoders


def test_an_encoder_is_frozen_and_saved_and_loaded_bit_by_bit(encoder, tmp_path):
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    encoder.save(tmp_path / "copy")
    copy = encoders.DualEncoder.load(str(tmp_path / "copy"))
    assert copy.fingerprint() == encoder.fingerprint()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copy.encode_images(pixels), encoder.encode_images(pixels))
    assert copy.encode_images(pixels).dtype == torch.float32
    with pytest.raises(retune.InputError, match="copy"):
        encoder.save(tmp_path / "copy")


def test_the_fingerprint_tells_a_single_changed_bit_and_a_changed_transform(encoder_folder):
    prints = set()
    for change in range(4):
        encoder = encoders.DualEncoder.load(str(encoder_folder))
        if change == 1:
            next(encoder.image.parameters()).view(-1)[0] += 1e-6
        elif change == 2:
            list(encoder.text.parameters())[-1].view(-1)[-1] += 1e-6
        elif change == 3:
            encoder.config = encoder.config | {"transform": encoder.config["transform"] | {"crop": 31}}
        prints.add(encoder.fingerprint())
    assert len(prints) == 4


def test_a_texts_embedding_does_not_depend_on_its_neighbours(encoder):
    texts = ["edema", "there is no pleural effusion and the heart is normal in size", "", "no edema"]
    texts[2] = "mass"
    together = encoder.encode_texts(texts)
    for text, embedding in zip(texts, together):
        torch.testing.assert_close(encoder.encode_texts([text])[0], embedding, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode_texts(texts, batch_size=3), together, atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[3], atol=1e-3)
    with pytest.raises(retune.InputError, match="65.*64"):
        encoder.encode_texts(["edema " * 65])


@pytest.mark.parametrize("damage", ["cut", "missing", "config", "no tokenizer"])
def test_a_damaged_encoder_folder_is_refused_by_name(encoder_folder, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(encoder_folder, folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        state = load_file(weights)
        state.pop(min(state))
        save_file(state, weights)
    elif damage == "config":
        (folder / "config.json").write_text('{"dim": 16')
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(retune.InputError, match="damaged"):
        encoders.DualEncoder.load(str(folder))


# ---------------------------------------------------------------------------------------------- 4. Embeddings


def noise_images(n=70, seed=0) -> radiographs.Radiographs:
    images = np.random.default_rng(seed).integers(0, 256, (n, 40, 36), np.uint8)
    return radiographs.Radiographs(
        images, np.zeros((n, 1)), ["A"], [f"p{i}" for i in range(n)], ["train"] * n
    )


def test_embeddings_are_the_encoders_of_the_transformed_images(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK", 32)
    data = noise_images()
    embeddings = encoders.embed(encoder, data, tmp_path, batch_size=8)
    assert isinstance(embeddings, np.memmap) and not embeddings.flags.writeable
    for i, image in enumerate(data.images):
        pixels = torch.from_numpy(image)[None].float()
        resized = torch.nn.functional.interpolate(pixels[None], (35, 32), mode="bilinear", antialias=True)[0]
        cropped = resized[:, 2:34].round().repeat(3, 1, 1)
        alone = encoder.encode_images(((cropped / 255 - 0.5) / 0.25)[None])[0]
        np.testing.assert_allclose(embeddings[i], alone.numpy(), atol=2e-2 * alone.abs().max().item())
        alone = encoder.encode_images(encoder.transform(torch.from_numpy(image)[None])[None])[0]
        np.testing.assert_allclose(embeddings[i], alone.numpy(), atol=1e-5)


def test_a_cache_hit_encodes_nothing_and_any_change_of_input_misses(encoder, tmp_path, monkeypatch):
    data, encoded = noise_images(), []
    encode = encoders.DualEncoder.encode_images

    def counting(self, pixels):
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(encoders.DualEncoder, "encode_images", counting)
    first = np.array(encoders.embed(encoder, data, tmp_path))
    assert sum(encoded) == 70
    np.testing.assert_array_equal(encoders.embed(encoder, data, tmp_path), first)
    assert sum(encoded) == 70
    encoders.embed(encoder, noise_images(seed=1), tmp_path)
    assert sum(encoded) == 140
    encoders.embed(encoder, data, tmp_path, store="fp16")
    assert sum(encoded) == 210
    encoders.embed(encoder, data, tmp_path, precision="bf16")
    assert sum(encoded) == 280


def test_a_changed_file_or_order_of_files_is_embedded_anew(encoder, csv_set):
    root, rows, _ = csv_set
    cache = root.parent / "cache"

    def embedded():
        write_rows(root / "labels.csv", rows)
        data = radiographs.load_radiographs(retune.Config(data="csv", data_dir=str(root)))
        return np.array(encoders.embed(encoder, data, cache))

    first = embedded()
    rows[0], rows[1] = rows[1], rows[0]
    np.testing.assert_array_equal(embedded(), first[[1, 0, *range(2, 24)]])
    Image.new("L", (40, 36), 200).save(root / rows[5]["path"])
    changed = np.abs(embedded() - first[[1, 0, *range(2, 24)]]).max(1) > 1e-3
    assert np.flatnonzero(changed).tolist() == [5]


def test_worker_processes_and_half_precision_give_the_same_embeddings(encoder, tmp_path):
    data = noise_images()
    plain = np.array(encoders.embed(encoder, data, tmp_path / "a"))
    np.testing.assert_array_equal(encoders.embed(encoder, data, tmp_path / "b", workers=2), plain)
    half = encoders.embed(encoder, data, tmp_path / "c", store="fp16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, plain, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "facts"])
def test_a_damaged_cache_is_refused_and_says_what_to_delete(encoder, tmp_path, damage):
    path = Path(encoders.embed(encoder, noise_images(), tmp_path).filename)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1234] ^= 4
    elif damage == "header":
        content[20] ^= 255
    path.write_bytes({"cut": content[:-64], "empty": b""}.get(damage, content))
    if damage == "facts":
        facts = path.with_name("facts.json")
        facts.write_text(facts.read_text()[:-20])
    with pytest.raises(retune.InputError, match=path.parent.name):
        encoders.embed(encoder, noise_images(), tmp_path)
    shutil.rmtree(path.parent)
    assert len(encoders.embed(encoder, noise_images(), tmp_path)) == 70


def test_embedding_goes_on_with_the_chunks_that_a_failure_left(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK", 16)
    data, encoded = noise_images(), []
    encode = encoders.DualEncoder.encode_images

    def failing(self, pixels):
        if len(encoded) == 7:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(encoders.DualEncoder, "encode_images", failing)
    with pytest.raises(KeyboardInterrupt):
        encoders.embed(encoder, data, tmp_path, batch_size=8)
    encoded.clear()
    encoded.append(None)
    again = encoders.embed(encoder, data, tmp_path, batch_size=8)
    assert sum(encoded[1:]) == 70 - 48
    monkeypatch.undo()
    np.testing.assert_array_equal(again, encoders.embed(encoder, data, tmp_path / "other", batch_size=8))
    assert not partial_files(tmp_path)


def test_a_damaged_chunk_is_removed_so_that_the_next_run_embeds_it(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK", 16)
    assemble = encoders.assemble
    monkeypatch.setattr(encoders, "assemble", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encoders.embed(encoder, noise_images(), tmp_path, batch_size=8)
    monkeypatch.setattr(encoders, "assemble", assemble)
    chunk = sorted(tmp_path.rglob("chunk*"))[2]
    chunk.write_bytes(chunk.read_bytes()[:300])
    with pytest.raises(retune.InputError, match=chunk.name):
        encoders.embed(encoder, noise_images(), tmp_path, batch_size=8)
    again = encoders.embed(encoder, noise_images(), tmp_path, batch_size=8)
    np.testing.assert_array_equal(
        again, encoders.embed(encoder, noise_images(), tmp_path / "b", batch_size=8)
    )


def test_rows_of_a_half_precision_memory_map_are_read_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal((20000, 5)).astype(np.float16)
    np.save(tmp_path / "x.npy", values)
    rows = torch.randint(0, 20000, (9001,), generator=torch.Generator().manual_seed(0))
    read = retune.read_rows(np.load(tmp_path / "x.npy", mmap_mode="r"), rows)
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), values[rows.numpy()].astype(np.float32))
    np.testing.assert_array_equal(retune.read_rows(values, rows), read)
    assert retune.read_rows(values, rows[:0]).shape == (0, 5)


# ------------------------------------------------ 5 and 6. Model and loss, against loops in float64


def plain_adaptor(x, weights, kind):
    """One embedding [D] through an adaptor's weights in the order of its parameters; None leaves it alone."""
    if weights is None:
        return x
    if kind == "linear":
        return weights[0] @ x + weights[1]
    if kind == "residual":
        x = x / (x @ x).sqrt()
    y = weights[2] @ torch.clamp(weights[0] @ x + weights[1], min=0) + weights[3]
    return x + y if kind == "residual" else y


def plain_cosine(a, b):
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def plain_model(images, prompts, group, image_weights, text_weights, kind, pool):
    """Cosines of every image with every group of prompts, [B][2C]."""
    texts = [plain_adaptor(p, text_weights, kind) for p in prompts]
    members = [[t for t, g in zip(texts, group) if g == wanted] for wanted in range(max(group) + 1)]
    cosines = []
    for x in images:
        v = plain_adaptor(x, image_weights, kind)
        row = []
        for texts in members:
            if pool == "max":
                row.append(max((plain_cosine(v, t) for t in texts), key=lambda cosine: cosine.item()))
            else:
                row.append(plain_cosine(v, texts[0] if pool == "single" else sum(texts) / len(texts)))
        cosines.append(row)
    return cosines


def plain_loss(logits, labels):
    """Mean of -y log p - (1 - y) log(1 - p) over the labels that are known."""
    terms = []
    for row, wanted in zip(logits, labels):
        for z, y in zip(row, wanted):
            if not math.isnan(y):
                p = 1 / (1 + torch.exp(-z))
                terms.append(-torch.log(p if y == 1 else 1 - p))
    return sum(terms) / len(terms)


def small_bank(dim=6, sizes=(2, 1, 3, 2, 1, 1), seed=5):
    """Prompts of three classes in groups of different sizes and lengths."""
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    embeddings = torch.randn(len(group), dim, generator=torch.Generator().manual_seed(seed))
    return retune.PromptBank(
        embeddings * torch.arange(1, len(group) + 1)[:, None] ** 0.5, torch.tensor(group)
    )


def random_weights(model, seed=6):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("pool", ["mean", "single", "max"])
@pytest.mark.parametrize("adapt", ["both", "shared", "image", "text"])
@pytest.mark.parametrize("kind", ["mlp", "linear", "residual"])
def test_logits_scores_loss_and_gradients_equal_the_plain_float64_version(kind, adapt, pool, negatives):
    bank = small_bank()
    images = torch.randn(5, 6, generator=torch.Generator().manual_seed(7)) * 3
    labels = torch.tensor([[1, 0, NAN], [0, 1, 1], [NAN, NAN, NAN], [1, 1, 0], [0, NAN, 0]])
    model = random_weights(retune.RETune(6, kind, adapt, pool, negatives, logit_scale=2.5))
    logits = model.logits(images, bank)
    loss = retune.prompt_contrastive_loss(logits, labels)
    loss.backward()

    exact = {p: p.detach().double().requires_grad_() for p in model.parameters()}
    image_weights = [exact[p] for p in model.image_adaptor.parameters()] or None
    text_weights = [exact[p] for p in model.text_adaptor.parameters()] or None
    assert (image_weights is None, text_weights is None) == (adapt == "text", adapt == "image")
    prompts = bank.embeddings.double()
    cosines = plain_model(
        images.double(), prompts, bank.group.tolist(), image_weights, text_weights, kind, pool
    )
    plain = [[2.5 * (row[2 * c] - negatives * row[2 * c + 1]) for c in range(3)] for row in cosines]
    plain_loss(plain, labels.tolist()).backward()
    wanted = torch.tensor([[z.item() for z in row] for row in plain], dtype=torch.float64)
    torch.testing.assert_close(logits.double(), wanted, atol=1e-6, rtol=0)
    assert abs(loss.item() - plain_loss(plain, labels.tolist()).item()) <= 1e-6
    for p, wanted in exact.items():
        torch.testing.assert_close(p.grad.double(), wanted.grad, atol=1e-6, rtol=0)
        assert wanted.grad.abs().max() > 1e-3

    for rule in ("diff", "pos"):
        scores, decisions = model.scores(images, bank, rule)
        for i, row in enumerate(cosines):
            for c in range(3):
                positive, negative = row[2 * c].item(), row[2 * c + 1].item()
                difference = rule == "diff" and negatives
                wanted = (positive - negative + 2) / 4 if difference else (positive + 1) / 2
                assert abs(scores[i, c].item() - wanted) <= 1e-6
                assert decisions[i, c].item() == (positive > (negative if negatives else 0))


def test_the_gradient_of_max_pooling_is_the_same_every_time():
    bank, images = small_bank(), torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    model, gradients = random_weights(retune.RETune(6, "linear", "image", "max")), []
    for _ in range(300):
        model.zero_grad()
        model.logits(images, bank).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_prompts_are_averaged_after_the_adaptor_and_before_normalisation():
    """By hand: the mean of (3, 0) and (0, 1) is (1.5, 0.5), of cosine 0.9487 with (1, 0)."""
    bank = retune.PromptBank(torch.tensor([[3.0, 0], [0, 1], [0, -2]]), torch.tensor([0, 0, 1]))
    image = torch.tensor([[2.0, 0.0]])
    for pool, wanted in (("mean", 1.5 / math.sqrt(2.5)), ("single", 1.0), ("max", 1.0)):
        positive, negative = retune.RETune(2, adapt="none", pool=pool)(image, bank)
        assert positive.item() == pytest.approx(wanted, abs=1e-6) and negative.item() == 0
    scores, decisions = retune.RETune(2, adapt="none").scores(image, bank)
    assert scores.item() == pytest.approx((1.5 / math.sqrt(2.5) + 2) / 4, abs=1e-6) and decisions.item() == 1


def test_an_image_of_zeros_gives_finite_cosines_and_gradients():
    model = random_weights(retune.RETune(6, adapt="text"))
    logits = model.logits(torch.zeros(2, 6), small_bank())
    retune.prompt_contrastive_loss(logits, torch.ones(2, 3)).backward()
    assert torch.equal(logits, torch.zeros(2, 3))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_loss_masks_unknown_labels_and_is_zero_with_a_graph_when_all_are_unknown():
    logits = torch.tensor([[0.0, 3.0], [50.0, -50.0]], requires_grad=True)
    labels = torch.tensor([[1, NAN], [1, 0]])
    loss = retune.prompt_contrastive_loss(logits, labels)
    assert loss.item() == pytest.approx(math.log(2) / 3, abs=1e-6)
    loss.backward()
    np.testing.assert_allclose(logits.grad, [[-0.5 / 3, 0], [0, 0]], atol=1e-7)
    logits.grad = None
    unknown = retune.prompt_contrastive_loss(logits, torch.full((2, 2), NAN))
    unknown.backward()
    assert unknown.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 2))
    half = retune.prompt_contrastive_loss(logits[:1], labels[:1], count=3)
    rest = retune.prompt_contrastive_loss(logits[1:], labels[1:], count=3)
    assert (half + rest).item() == pytest.approx(loss.item(), abs=1e-7)


def test_unknown_labels_change_nothing_whatever_stands_there():
    logits, labels = torch.randn(40, 3), torch.randint(0, 2, (40, 3)).float()
    known = torch.rand(40, 3) > 0.4
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    masked = torch.where(known, labels, torch.tensor(NAN))
    assert retune.prompt_contrastive_loss(logits, masked).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_residual_adaptor_starts_at_zero_shot_of_normalised_embeddings():
    bank, images = small_bank(), torch.randn(5, 6) * 4
    unit = torch.nn.functional.normalize(bank.embeddings, dim=1)
    start = retune.RETune(6, "residual").scores(images, bank)
    zero = retune.RETune(6, adapt="none").scores(images, retune.PromptBank(unit, bank.group))
    torch.testing.assert_close(start[0], zero[0], atol=1e-6, rtol=0)
    assert torch.equal(start[1], zero[1])


@pytest.mark.parametrize(
    "kind, adapt, count",
    [
        ("mlp", "both", 2 * (128 * 256 + 256 + 256 * 128 + 128)),
        ("mlp", "shared", 128 * 256 + 256 + 256 * 128 + 128),
        ("linear", "image", 128 * 128 + 128),
        ("residual", "text", 128 * 256 + 256 + 256 * 128 + 128),
        ("mlp", "none", 0),
    ],
)
def test_adaptors_have_the_papers_sizes(kind, adapt, count):
    model = retune.RETune(128, kind, adapt)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.image_adaptor is model.text_adaptor) == (adapt == "shared")


def test_unknown_kinds_of_model_are_refused():
    for options in ({"adaptor": "lora"}, {"adapt": "neither"}, {"pool": "median"}):
        with pytest.raises(retune.InputError, match=str(next(iter(options.values())))):
            retune.RETune(4, **options)


def test_prompts_are_embedded_in_groups_of_class_and_polarity(encoder):
    prompts = {
        "A": {"positive": ["edema", "there is edema"], "negative": ["no edema"]},
        "B": {"positive": ["mass"], "negative": ["no mass", "mass is absent", "no nodule or mass"]},
    }
    bank = retune.embed_prompts(encoder, prompts)
    assert bank.group.tolist() == [0, 0, 1, 2, 3, 3, 3]
    texts = ["edema", "there is edema", "no edema", "mass", "no mass", "mass is absent", "no nodule or mass"]
    torch.testing.assert_close(bank.embeddings, encoder.encode_texts(texts).clone(), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- 7. Scenarios


@st.composite
def training_sets(draw):
    """(labels [N, C] with unknown ones, class names, patients [N], number of different patients)."""
    n, c, patients = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = generator.choice([0, 1, NAN], (n, c), p=[0.5, 0.3, 0.2]).astype(np.float32)
    owners = [f"patient {i}" for i in generator.integers(0, patients, n)]
    return labels, NAMES[:c], owners, len(set(owners))


def assert_parts(tasks, n, owners):
    """Disjoint, complete, in file order, and no patient in two parts."""
    rows = np.concatenate([task.rows for task in tasks])
    assert sorted(rows.tolist()) == list(range(n))
    assert all((np.diff(task.rows) > 0).all() for task in tasks)
    held = [{owners[i] for i in task.rows} for task in tasks]
    assert sum(map(len, held)) == len(set(owners))
    assert max(map(len, held)) - min(map(len, held)) <= 1


@quick
@given(training_sets(), st.integers(1, 25), st.integers(0, 5))
def test_data_incremental_parts_are_disjoint_complete_and_patient_wise(data, parts, seed):
    labels, names, owners, patients = data
    if parts > patients:
        with pytest.raises(retune.InputError, match=rf"--parts {parts} .*\({patients}\)"):
            retune.make_tasks("data", labels, names, parts, seed, owners)
        return
    tasks = retune.make_tasks("data", labels, names, parts, seed, owners)
    assert len(tasks) == parts and all(task.classes == tuple(range(len(names))) for task in tasks)
    assert_parts(tasks, len(labels), owners)
    again = retune.make_tasks("data", labels, names, parts, seed, owners)
    assert [t.rows.tolist() for t in again] == [t.rows.tolist() for t in tasks]


@quick
@given(training_sets(), st.randoms(use_true_random=False), st.sampled_from(["class", "label"]), st.data())
def test_class_and_label_incremental_tasks_train_the_right_columns(data, rng, scenario, draws):
    labels, names, owners, patients = data
    order = rng.sample(names, len(names))
    parts = draws.draw(st.none() | st.integers(1, len(names)))
    count = parts or len(names)
    if count > patients:
        with pytest.raises(retune.InputError, match=rf"--parts {count}"):
            retune.make_tasks(scenario, labels, names, parts, 3, owners, order)
        return
    tasks = retune.make_tasks(scenario, labels, names, parts, 3, owners, order)
    assert_parts(tasks, len(labels), owners)
    assert len(tasks) == count
    arrived = []
    for task in tasks:
        new = [c for c in task.classes if c not in arrived]
        assert new and list(task.classes) == (new if scenario == "class" else arrived + new)
        arrived += new
    assert [names[c] for c in arrived] == list(order)
    sizes = [len(set(task.classes)) for task in tasks]
    if scenario == "class":
        assert max(sizes) - min(sizes) <= 1


@quick
@given(st.integers(1, 60), st.integers(1, 12))
def test_contiguous_parts_are_the_authors_cut_of_ceil_n_over_parts(n, parts):
    labels, size = np.zeros((n, 1), np.float32), math.ceil(n / parts)
    wanted = [list(range(n))[k * size : (k + 1) * size] for k in range(parts)]
    if not all(wanted):
        with pytest.raises(retune.InputError, match=f"--parts {parts}"):
            retune.make_tasks("data", labels, ["A"], parts, 0, contiguous=True)
        return
    tasks = retune.make_tasks("data", labels, ["A"], parts, 0, ["p"] * n, contiguous=True)
    assert [task.rows.tolist() for task in tasks] == wanted


@quick
@given(training_sets())
def test_positives_only_tasks_hold_all_positives_of_their_class(data):
    labels, names, owners, patients = data
    empty = [name for name, column in zip(names, labels.T) if not (column == 1).any()]
    if empty or len(names) > patients:
        with pytest.raises(retune.InputError):
            retune.make_tasks("class", labels, names, None, 0, owners, positives_only=True)
        return
    tasks = retune.make_tasks("class", labels, names, None, 0, owners, positives_only=True)
    for c, task in enumerate(tasks):
        assert task.classes == (c,)
        assert task.rows.tolist() == [i for i in range(len(labels)) if labels[i, c] == 1]


@quick
@given(training_sets())
def test_the_bounds_are_one_task_of_everything_and_none_at_all(data):
    labels, names, owners, _ = data
    (joint,) = retune.make_tasks("joint", labels, names, 5, 0, owners)
    assert joint.rows.tolist() == list(range(len(labels))) and joint.classes == tuple(range(len(names)))
    assert retune.make_tasks("zero", labels, names, 5, 0, owners) == []


def test_another_seed_gives_other_parts_and_five_parts_are_the_default():
    labels = np.zeros((200, 2), np.float32)
    cuts = [retune.make_tasks("data", labels, "AB", None, seed, range(200)) for seed in range(3)]
    assert {len(tasks) for tasks in cuts} == {5} and {len(t.rows) for tasks in cuts for t in tasks} == {40}
    assert len({tuple(tasks[0].rows) for tasks in cuts}) == 3


# ------------------------------------------------------------------------------------------------- 8. Metrics


def random_results(seed, n=60, c=4, unknown=0.0):
    """Scores with ties, decisions and labels of which some are unknown."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, c)) < generator.uniform(0.2, 0.7, c)).astype(np.float32)
    scores = np.round(generator.random((n, c)) + 0.3 * labels, 1 if seed % 2 else 6)
    decisions = (scores > generator.uniform(0.3, 0.9, c)).astype(np.float32)
    labels[generator.random((n, c)) < unknown] = NAN
    return scores, decisions, labels


@pytest.mark.parametrize("seed", range(8))
def test_metrics_of_complete_labels_are_scikit_learns(seed):
    scores, decisions, labels = random_results(seed)
    found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    for average in ("macro", "weighted"):
        auroc = sklearn_metrics.roc_auc_score(labels, scores, average=average)
        f1 = sklearn_metrics.f1_score(labels, decisions, average=average, zero_division=0)
        assert found[f"auroc_{average}"] == pytest.approx(auroc, abs=1e-12)
        assert found[f"f1_{average}"] == pytest.approx(f1, abs=1e-12)
    for name in ("precision", "recall"):
        score = getattr(sklearn_metrics, f"{name}_score")
        wanted = score(labels, decisions, average="weighted", zero_division=0)
        assert found[f"{name}_weighted"] == pytest.approx(wanted, abs=1e-12)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, decisions), abs=1e-12)
    assert found["ap_macro"] == pytest.approx(
        sklearn_metrics.average_precision_score(labels, scores, average="macro"), abs=1e-12
    )
    assert found["n"] == 60 and list(found["auroc"]) == list(found["f1"]) == list(found["ap"]) == list(
        NAMES[:4]
    )


@pytest.mark.parametrize("seed", range(4))
def test_unknown_labels_are_left_out_class_by_class(seed):
    scores, decisions, labels = random_results(seed, unknown=0.3)
    found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    for c, name in enumerate(NAMES[:4]):
        known = ~np.isnan(labels[:, c])
        y, s, d = labels[known, c], scores[known, c], decisions[known, c]
        assert found["auroc"][name] == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
        assert found["ap"][name] == pytest.approx(sklearn_metrics.average_precision_score(y, s), abs=1e-12)
        assert found["f1"][name] == pytest.approx(sklearn_metrics.f1_score(y, d, zero_division=0), abs=1e-12)
    weights = [np.nansum(labels[:, c]) for c in range(4)]
    wanted = np.average(list(found["auroc"].values()), weights=weights)
    assert found["auroc_weighted"] == pytest.approx(wanted, abs=1e-12)
    whole = ~np.isnan(labels).any(1)
    assert found["accuracy"] == pytest.approx((decisions == labels)[whole].all(1).mean(), abs=1e-12)


def test_metrics_of_a_case_counted_by_hand():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.float32)
    scores = np.array([[0.9, 0.1], [0.4, 0.5], [0.4, 0.5], [0.1, 0.9]])
    decisions = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    found = retune.evaluate(scores, decisions, labels, ["A", "B"])
    assert found["auroc"] == {"A": 3.5 / 4, "B": 3.5 / 4}
    assert found["f1"] == {"A": 0.5, "B": 1.0} and found["f1_macro"] == found["f1_weighted"] == 0.75
    assert found["accuracy"] == 0.5 and found["precision_weighted"] == found["recall_weighted"] == 0.75
    assert found["ap"]["A"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


def test_a_class_of_one_value_is_nan_named_in_a_warning_and_left_out_of_means():
    scores, decisions, labels = random_results(2)
    labels[:, 1], labels[:, 2] = 0, NAN
    with pytest.warns(UserWarning) as caught:
        found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    text = " ".join(str(w.message) for w in caught)
    assert "Mass" in text and "Nodule" in text and "Edema" not in text and "Hernia" not in text
    rest = [0, 3]
    assert all(math.isnan(found[key][name]) for key in ("auroc", "f1", "ap") for name in ("Mass", "Nodule"))
    wanted = sklearn_metrics.roc_auc_score(labels[:, rest], scores[:, rest])
    assert found["auroc_macro"] == pytest.approx(wanted, abs=1e-12)
    wanted = sklearn_metrics.f1_score(labels[:, rest], decisions[:, rest], average="weighted")
    assert found["f1_weighted"] == pytest.approx(wanted, abs=1e-12)


def test_nothing_to_score_gives_nan_and_not_a_number_that_looks_good():
    with pytest.warns(UserWarning):
        found = retune.evaluate(np.ones((3, 2)), np.ones((3, 2)), np.full((3, 2), NAN), ["A", "B"])
    assert all(math.isnan(found[key]) for key in found if key.endswith(("macro", "weighted", "accuracy")))
    assert all(map(math.isnan, retune.bootstrap_ci(np.ones((3, 2)), np.full((3, 2), NAN), ["p", "q", "q"])))
    assert all(map(math.isnan, retune.bootstrap_ci(np.ones((3, 2)), np.ones((3, 2)), ["p", "q", "q"])))


@pytest.mark.filterwarnings("ignore:Only one class")
@pytest.mark.parametrize("seed", range(2))
def test_bootstrap_equals_a_slow_loop_of_scikit_learn_over_the_same_patients(seed):
    scores, _, labels = random_results(seed, n=50, c=3, unknown=0.2)
    labels[:, 2] = np.where(np.arange(50) < 2, 1, 0)
    patients = np.random.default_rng(seed + 9).integers(0, 12, 50).astype(str)
    ids = np.unique(patients)
    draws = np.random.default_rng(4).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), 40)
    values = []
    for draw in draws:
        weight = np.array([draw[ids.tolist().index(p)] for p in patients])
        aurocs = []
        for c in range(3):
            rows = np.flatnonzero(~np.isnan(labels[:, c]) & (weight > 0))
            if len(np.unique(labels[rows, c])) == 2:
                aurocs.append(
                    sklearn_metrics.roc_auc_score(
                        labels[rows, c], scores[rows, c], sample_weight=weight[rows]
                    )
                )
        values.append(np.mean(aurocs))
    wanted = np.percentile(values, [2.5, 97.5])
    found = retune.bootstrap_ci(scores, labels, patients, resamples=40, seed=4)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert found[0] < found[1]


def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    """Normal scores one deviation apart have AUROC 0.7602; 95% of 200 intervals should hold it."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        labels = np.repeat([0.0, 1.0], 60)[:, None]
        scores = generator.standard_normal((120, 1)) + labels
        low, high = retune.bootstrap_ci(scores, labels, range(120), resamples=200)
        held += low <= 0.76025 <= high
    assert 180 <= held <= 198


def tasks_of(*classes):
    return [retune.Task(f"task {t}", np.arange(3), c) for t, c in enumerate(classes, 1)]


@pytest.mark.parametrize(
    "tasks, auroc, zero, wanted",
    [
        (  # class: k = 1, 2, 3
            tasks_of((0,), (1,), (2,)),
            [[0.9, 0.5, 0.5], [0.8, 0.8, 0.6], [0.7, 0.85, 0.9]],
            [0.6, 0.55, 0.5],
            {"average_auroc": 2.45 / 3, "forgetting": (0.2 - 0.05) / 2, "backward_transfer": (-0.2 + 0.05) / 2,
             "forward_transfer": ((0.5 - 0.55) + (0.6 - 0.5)) / 2},
        ),
        (  # data: k = 1 for all
            tasks_of((0, 1), (0, 1), (0, 1)),
            [[0.7, 0.6], [0.9, 0.65], [0.8, 0.7]],
            [0.5, 0.5],
            {"average_auroc": 0.75, "forgetting": (0.1 - 0.05) / 2, "backward_transfer": (0.1 + 0.1) / 2,
             "forward_transfer": NAN},
        ),
        (  # label: k = 1, 2
            tasks_of((1,), (1, 0)),
            [[0.6, 0.9], [0.8, 0.7]],
            [0.5, 0.4],
            {"average_auroc": 0.75, "forgetting": 0.2, "backward_transfer": -0.2, "forward_transfer": 0.1},
        ),
        (  # a class without a score is left out
            tasks_of((0,), (1,), (2,)),
            [[0.9, NAN, 0.5], [0.8, NAN, 0.6], [0.7, NAN, 0.9]],
            [0.6, NAN, 0.5],
            {"average_auroc": 0.8, "forgetting": 0.2, "backward_transfer": -0.2, "forward_transfer": 0.1},
        ),
        (  # joint: one task
            tasks_of((0, 1)),
            [[0.7, 0.9]],
            [0.5, 0.5],
            {"average_auroc": 0.8, "forgetting": NAN, "backward_transfer": NAN, "forward_transfer": NAN},
        ),
        (  # zero-shot: no task
            [],
            np.empty((0, 2)),
            [0.5, 0.7],
            {"average_auroc": 0.6, "forgetting": NAN, "backward_transfer": NAN, "forward_transfer": NAN},
        ),
    ],
    ids=["class", "data", "label", "unscored", "joint", "zero"],
)  # fmt: skip
def test_continual_metrics_of_matrices_worked_out_by_hand(tasks, auroc, zero, wanted):
    found = retune.continual_metrics(np.array(auroc), tasks, np.array(zero))
    assert set(found) == set(wanted)
    np.testing.assert_allclose([found[key] for key in wanted], list(wanted.values()), atol=1e-12)


@quick
@given(st.integers(0, 10000), st.integers(1, 6), st.integers(1, 5))
def test_continual_metrics_follow_their_definitions_on_random_matrices(seed, n_tasks, n_classes):
    generator = np.random.default_rng(seed)
    grid = generator.random((n_tasks + 1, n_classes))
    first = generator.integers(1, n_tasks + 1, n_classes)
    tasks = tasks_of(*(tuple(np.flatnonzero(first <= t)) for t in range(1, n_tasks + 1)))
    found = retune.continual_metrics(grid[1:], tasks, grid[0])
    forgetting, backward, forward = [], [], []
    for c, k in enumerate(first):
        if k < n_tasks:
            forgetting.append(max(grid[t, c] for t in range(k, n_tasks)) - grid[n_tasks, c])
            backward.append(grid[n_tasks, c] - grid[k, c])
        if k > 1:
            forward.append(grid[k - 1, c] - grid[0, c])
    assert found["average_auroc"] == pytest.approx(np.mean(grid[-1]), abs=1e-12)
    for key, values in (
        ("forgetting", forgetting),
        ("backward_transfer", backward),
        ("forward_transfer", forward),
    ):
        if values:
            assert found[key] == pytest.approx(np.mean(values), abs=1e-12)
        else:
            assert math.isnan(found[key])


# ------------------------------------------------------------------------------------------------ 9. Training


def train(model, embeddings, labels, tasks, bank=None, optimizer=None, **options):
    """Fit tasks one after the other with one optimiser, as a run does."""
    options = {"epochs": 3, "batch_size": 8} | options
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(11)
    for task in tasks:
        retune.fit(
            model, bank or small_bank(), embeddings, labels, task, optimizer, generator=generator, **options
        )
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def training_data(n=30, dim=6, seed=8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n, 3), generator=generator).float()
    labels[labels == 2] = NAN
    return torch.randn(n, dim, generator=generator).numpy() * 2, labels


def assert_same(first: dict, second: dict, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0, msg=name)


def test_full_batch_training_of_two_tasks_is_plain_adam_in_float64_with_one_state():
    embeddings, labels = training_data()
    model = random_weights(retune.RETune(6))
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]
    tasks = [retune.Task("a", np.arange(0, 20), (0, 2)), retune.Task("b", np.arange(15, 30), (1,))]
    trained = train(model, embeddings, labels, tasks, epochs=3, batch_size=50)

    bank = small_bank()
    prompts, first, second, step = bank.embeddings.double(), [0.0] * 8, [0.0] * 8, 0
    for task in tasks:
        x, y = torch.tensor(embeddings[task.rows]).double(), labels[task.rows][:, task.classes].tolist()
        for _ in range(3):
            step += 1
            cosines = plain_model(x, prompts, bank.group.tolist(), weights[:4], weights[4:], "mlp", "mean")
            loss = plain_loss([[row[2 * c] - row[2 * c + 1] for c in task.classes] for row in cosines], y)
            gradients = torch.autograd.grad(loss, weights)
            for i, (w, g) in enumerate(zip(weights, gradients)):
                first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
                mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
                w.data -= 1e-2 * mean / (square.sqrt() + 1e-8)
    for found, wanted in zip(trained.values(), weights):
        torch.testing.assert_close(found.double(), wanted.detach(), atol=2e-5, rtol=0)


def test_training_reads_only_the_rows_and_label_columns_of_its_task():
    embeddings, labels = training_data()
    task = retune.Task("t", np.arange(5, 25), (1,))
    wanted = train(random_weights(retune.RETune(6)), embeddings, labels, [task])
    other, wrong = np.full_like(embeddings, NAN), 1 - labels
    other[5:25], wrong[5:25, 1] = embeddings[5:25], labels[5:25, 1]
    assert_same(train(random_weights(retune.RETune(6)), other, wrong, [task]), wanted)


def test_training_lowers_the_loss_and_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (300, 3), generator=generator).float()
    embeddings = (
        torch.randn(300, 6, generator=generator) + 4 * torch.nn.functional.pad(labels, (0, 3))
    ).numpy()
    task, model = retune.Task("t", np.arange(200), (0, 1, 2)), retune.RETune(6)

    def auroc():
        scores, decisions = retune.score_rows(model, small_bank(), embeddings, np.arange(200, 300), "diff")
        return retune.evaluate(scores, decisions, labels[200:].numpy())["auroc_macro"]

    train(model, embeddings, labels, [task], epochs=20)
    assert auroc() > 0.97


def test_training_on_a_float16_memory_map_in_windows_sees_every_row_once_an_epoch(tmp_path, monkeypatch):
    embeddings, labels = training_data(n=700)
    embeddings[:, 0] = np.arange(700)
    np.save(tmp_path / "x.npy", embeddings.astype(np.float16))
    model, seen = random_weights(retune.RETune(6)), []
    logits = model.logits

    def watching(images, bank):
        seen.append(images[:, 0].tolist())
        return logits(images, bank)

    monkeypatch.setattr(model, "logits", watching)
    monkeypatch.setattr(retune, "WINDOW", 4 * 6 * 150)
    task = retune.Task("t", np.arange(0, 700, 2), (0, 1, 2))
    train(model, np.load(tmp_path / "x.npy", mmap_mode="r"), labels, [task], epochs=2, batch_size=50)
    rows = [int(value) for batch in seen for value in batch]
    assert sorted(rows[:350]) == sorted(rows[350:]) == list(range(0, 700, 2))
    assert rows[:350] != rows[350:] and max(map(len, seen)) == 50


@quick
@given(st.integers(1, 1000), st.integers(1, 300), st.integers(0, 9))
def test_shuffled_windows_cover_each_row_once_and_hold_at_most_a_window(n, window, seed):
    rows = torch.arange(n) * 3
    pieces = list(retune.shuffled_windows(rows, window, torch.Generator().manual_seed(seed)))
    assert sorted(torch.cat(pieces).tolist()) == rows.tolist()
    assert max(map(len, pieces)) <= max(window, 1)
    again = list(retune.shuffled_windows(rows, window, torch.Generator().manual_seed(seed)))
    assert all(torch.equal(a, b) for a, b in zip(pieces, again))


def test_a_loss_that_is_not_finite_stops_with_task_and_step_before_it_spoils_the_weights():
    embeddings, labels = training_data()
    embeddings[20] = NAN
    model = random_weights(retune.RETune(6))
    with pytest.raises(retune.InputError, match=r"'Edema', step [1-3]\b.*nan.*--lr"):
        train(model, embeddings, labels, [retune.Task("Edema", np.arange(24), (0,))], epochs=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_models_of_one_seed_are_alike_and_drawn_without_the_global_generator():
    before = torch.get_rng_state()
    models = [retune.build_model(retune.Config(seed=seed), 6, 3).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(models[0], models[1])
    assert not torch.equal(*(next(iter(m.values())) for m in models[1:]))


# ------------------------------------------------------------------------------------------- 9. The whole run


def test_only_adaptors_are_trained_and_the_encoder_stays_as_it_was(demo_arguments, tmp_path, monkeypatch):
    seen, encode = {}, encoders.DualEncoder.encode_images

    def remember(self, pixels):
        seen[id(self)] = self
        return encode(self, pixels)

    monkeypatch.setattr(encoders.DualEncoder, "encode_images", remember)
    output = ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    assert retune.main([*demo_arguments, *output, "--lr", "0.1"]) == 0
    (encoder,) = seen.values()
    fresh = encoders.DualEncoder.load(demo_arguments[demo_arguments.index("--encoder") + 1])
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not encoder.training
    for name, value in fresh.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    saved, start = (
        retune.load_tensors(tmp_path / "run/adaptors.safetensors")[0],
        retune.build_model(retune.Config(), 16, 5),
    )
    assert all(not torch.equal(saved[name], value) for name, value in start.state_dict().items())


def test_two_runs_with_one_seed_agree_in_every_bit(demo_arguments, finished, tmp_path):
    cache = ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "again")]
    assert retune.main([*demo_arguments, *cache]) == 0
    assert metrics_of(tmp_path / "again") == metrics_of(finished)
    assert model_bytes(tmp_path / "again") == model_bytes(finished)
    for name in ("splits.csv", "table.md", "auroc.png", "f1.png"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def run_until_killed(arguments, files, batches):
    """Run the command line; die by SIGKILL after so many files were renamed, or batches of images encoded."""
    replace, encode, left = (
        os.replace,
        encoders.DualEncoder.encode_images,
        {"files": files, "batches": batches},
    )

    def count(what):
        left[what] -= 1
        if not left[what]:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting_replace(*paths, **options):
        replace(*paths, **options)
        count("files")

    def counting_encode(self, pixels):
        count("batches")
        return encode(self, pixels)

    os.replace, encoders.DualEncoder.encode_images, encoders.CHUNK = counting_replace, counting_encode, 64
    sys.exit(retune.main(arguments))


def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(
    demo_arguments, finished, fork, tmp_path
):
    """SIGKILL while embedding, between chunks and tasks, before and after each saved state, in the report."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = [*demo_arguments, "--cache-dir", str(cache), "--output", str(run)]
    process = fork(run_until_killed, arguments, -1, 6)
    assert exit_code(process) == -signal.SIGKILL and not (run / "metrics.json").exists()
    assert len(list(cache.rglob("chunk-*.npy"))) == 2
    for files in (2, 2, 3, 2, 3, 6):
        assert exit_code(fork(run_until_killed, arguments, files, -1)) == -signal.SIGKILL, files
    assert exit_code(fork(run_until_killed, arguments, -1, -1)) == 0
    assert metrics_of(run) == metrics_of(finished)
    assert model_bytes(run) == model_bytes(finished)
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in finished.iterdir())
    assert not partial_files(tmp_path) and not list(cache.rglob("chunk-*.npy"))


def stop_after_task(task, arguments, monkeypatch, error=KeyboardInterrupt):
    """Run until `task` is finished, then raise `error` when the next one begins."""
    fit, started = retune.fit, []

    def interrupted(*positional, **options):
        started.append(None)
        if len(started) > task:
            raise error
        return fit(*positional, **options)

    with monkeypatch.context() as patch:
        patch.setattr(retune, "fit", interrupted)
        with pytest.raises(error):
            retune.main(arguments)


def test_resuming_after_task_2_trains_only_what_is_left(demo_arguments, finished, tmp_path, monkeypatch):
    arguments = [*demo_arguments, "--output", str(tmp_path / "run")]
    stop_after_task(2, arguments, monkeypatch)
    assert not (tmp_path / "run/metrics.json").exists()
    fit, trained = retune.fit, []

    def watching(model, bank, embeddings, labels, task, *positional, **options):
        trained.append(task.name)
        return fit(model, bank, embeddings, labels, task, *positional, **options)

    monkeypatch.setattr(retune, "fit", watching)
    assert retune.main(arguments) == 0 and len(trained) == 1
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    assert model_bytes(tmp_path / "run") == model_bytes(finished)
    assert retune.main(arguments) == 0 and len(trained) == 1


@pytest.mark.parametrize("name", ["task_1.safetensors", "resume.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name(demo_arguments, tmp_path, monkeypatch, capsys, name):
    arguments = [*demo_arguments, "--output", str(tmp_path / "run")]
    stop_after_task(2, arguments, monkeypatch)
    path = tmp_path / "run" / name
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    for damaged in (content[:-50], content[:4], b"", b"\xff" * len(content), flipped):
        path.write_bytes(damaged)
        assert str(path) in failure(capsys, arguments)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--epochs", "3"], ["epochs", "2", "3"]),
        (["--seed", "28"], ["seed", "27", "28"]),
        (["--lr", "0.5", "--pool", "max"], ["lr", "0.001", "0.5", "pool", "mean", "max"]),
        (["--demo-images", "241"], ["demo_images", "240", "241"]),
    ],
)
def test_a_folder_of_another_configuration_is_refused_saying_what_differs(
    demo_arguments, finished, capsys, options, named
):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    line = failure(capsys, [*demo_arguments, "--output", finished, *options])
    assert all(text in line for text in [str(finished), *named]), line
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_changed_prompts_encoder_or_labels_make_another_configuration(csv_set, tmp_path, capsys):
    root, rows, arguments = csv_set
    write_rows(root / "labels.csv", rows)
    prompts = tmp_path / "prompts.json"
    prompts.write_text((HERE / "prompts.json").read_text())
    arguments += ["--prompts", prompts]
    assert retune.main([*map(str, arguments)]) == 0
    assert retune.main([*map(str, arguments)]) == 0
    other = save_random_encoder(tmp_path / "other", seed=1)
    assert "encoder" in failure(capsys, [*arguments, "--encoder", other])
    prompts.write_text(prompts.read_text().replace("pulmonary edema", "edema of the lungs"))
    assert "prompt" in failure(capsys, arguments)
    prompts.write_text((HERE / "prompts.json").read_text())
    rows[2]["Mass"] = str(1 - int(rows[2]["Mass"]))
    write_rows(root / "labels.csv", rows)
    assert "data" in failure(capsys, arguments)


def test_a_second_process_on_one_output_folder_is_refused(demo_arguments, tmp_path, capsys):
    arguments = [*demo_arguments, "--output", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with retune.locked(tmp_path / "run", wait=False):
        assert "another process" in failure(capsys, arguments)
    assert not list((tmp_path / "run").iterdir())
    assert retune.main([*map(str, arguments), "--scenario", "zero"]) == 0


def run_and_exit(arguments):
    encoders.CHUNK = 64
    sys.exit(retune.main(arguments))


def test_two_processes_share_one_cache_and_one_wins_the_output_folder(
    demo_arguments, finished, fork, tmp_path
):
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output"]
    shared = [fork(run_and_exit, [*arguments, str(tmp_path / "a")]) for _ in range(2)]
    alone = fork(run_and_exit, [*arguments, str(tmp_path / "b")])
    assert sorted(map(exit_code, shared)) in ([0, 0], [0, 2]) and exit_code(alone) == 0
    for name in "ab":
        assert metrics_of(tmp_path / name) == metrics_of(finished)
        assert model_bytes(tmp_path / name) == model_bytes(finished)
    assert len(list((tmp_path / "cache").rglob("embeddings.npy"))) == 1 and not partial_files(tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_finished_tasks(
    demo_arguments, finished, tmp_path, monkeypatch, capsys
):
    arguments = [*demo_arguments, "--output", str(tmp_path / "run")]
    loss, fit, tasks = retune.prompt_contrastive_loss, retune.fit, []

    def counting(*positional, **options):
        tasks.append(positional[4].name)
        return fit(*positional, **options)

    with monkeypatch.context() as patch:
        patch.setattr(retune, "fit", counting)
        patch.setattr(
            retune, "prompt_contrastive_loss", lambda *a, **k: loss(*a, **k) * (NAN if len(tasks) == 3 else 1)
        )
        line = failure(capsys, arguments)
    assert tasks[-1] in line and "step 1" in line and "--lr" in line
    saved = model_bytes(tmp_path / "run")
    assert {"task_1.safetensors", "task_2.safetensors"} <= set(saved) and "task_3.safetensors" not in saved
    assert retune.main(arguments) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    assert model_bytes(tmp_path / "run") == model_bytes(finished)


def run_on_small_disk(arguments, limit, report):
    """Run the command line where no file may exceed `limit` bytes: writes fail halfway, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    encoders.CHUNK = 64
    with open(report, "w") as sys.stderr:
        code = retune.main(arguments)
    sys.exit(code)


@pytest.mark.parametrize("limit", [500, 5000, 20000])
def test_a_full_disk_leaves_whole_files_only_and_the_run_goes_on_later(
    demo_arguments, finished, fork, tmp_path, limit
):
    run, report = tmp_path / "run", tmp_path / "report.txt"
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output", str(run)]
    process = fork(run_on_small_disk, arguments, limit, report)
    code, said = exit_code(process), report.read_text()
    assert code == 2 and "error: " in said and "Traceback" not in said, (code, said)
    assert not partial_files(tmp_path)
    assert all(path.read_bytes() == (finished / path.name).read_bytes() for path in run.glob("task*"))
    assert exit_code(fork(run_and_exit, arguments)) == 0
    assert metrics_of(run) == metrics_of(finished) and model_bytes(run) == model_bytes(finished)


# --------------------------------------------------------------------------------------- 9. Several processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(world: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def fit_fifty_steps() -> dict[str, torch.Tensor]:
    embeddings, labels = training_data(n=103, dim=16)
    model = random_weights(retune.RETune(16))
    task = retune.Task("t", np.arange(2, 102), (0, 2))
    return train(model, embeddings, labels, [task], small_bank(16), epochs=5, batch_size=10)


def fit_on_one_rank(environment, file):
    os.environ.update(environment)
    retune.join_ranks()
    trained = fit_fifty_steps()
    torch.save(trained, f"{file}.{environment['RANK']}")


def test_fifty_data_parallel_steps_equal_those_of_one_process(fork, tmp_path):
    ranks = [fork(fit_on_one_rank, environment, tmp_path / "x") for environment in environments(2)]
    assert [exit_code(process) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"x.{rank}", weights_only=True) for rank in range(2))
    assert_same(first, second)
    assert_same(first, fit_fifty_steps(), tolerance=1e-5)


def test_torchrun_on_two_ranks_gives_the_run_of_one_process(demo_arguments, tmp_path):
    """The real launcher: sharded embedding is the same array, metrics and adaptors within 1e-5."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = [
        "--cache-dir",
        str(tmp_path / "cache"),
        "--epochs",
        "1",
        "--demo-images",
        "1200",
        "--batch-size",
        "64",
    ]
    done = subprocess.run(
        [*launcher, HERE / "retune.py", *demo_arguments, *options, "--output", str(tmp_path / "two")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    options[1] = str(tmp_path / "alone")
    assert retune.main([*demo_arguments, *options, "--output", str(tmp_path / "one")]) == 0
    two, one = (np.load(next((tmp_path / name).rglob("embeddings.npy"))) for name in ("cache", "alone"))
    assert len(two) > encoders.CHUNK
    np.testing.assert_allclose(two, one, atol=1e-6)
    for k in (1, 2, 3):
        pair = [retune.load_tensors(tmp_path / name / f"task_{k}.safetensors")[0] for name in ("one", "two")]
        assert_same(*pair, tolerance=1e-5)
    two, one = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert two["after_task"][-1]["test"]["auroc_macro"] == pytest.approx(
        one["after_task"][-1]["test"]["auroc_macro"], abs=1e-3
    )


# ------------------------------------------------------------------------------------------------- 10. Report


def test_metrics_json_is_strict_complete_and_consistent_with_itself(finished):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    metrics = json.loads((finished / "metrics.json").read_text(), parse_constant=refuse)
    assert {"config", "classes", "tasks", "zero_shot", "after_task", "continual", "cost"} <= set(metrics)
    measures = {
        "auroc_macro", "auroc_weighted", "f1_macro", "f1_weighted", "precision_weighted", "recall_weighted",
        "accuracy", "ap_macro", "auroc", "f1", "ap", "auroc_macro_ci", "n",
    }  # fmt: skip
    assert len(metrics["tasks"]) == len(metrics["after_task"]) == 3
    for stage in (metrics["zero_shot"], *metrics["after_task"]):
        for split in ("val", "test"):
            m = stage[split]
            assert measures <= set(m) and list(m["auroc"]) == list(COMPETITION)
            scored = [v for v in m["auroc"].values() if v is not None]
            assert m["auroc_macro"] == pytest.approx(np.mean(scored), abs=1e-12)
    last = metrics["after_task"][-1]["test"]
    low, high = last["auroc_macro_ci"]
    assert low < last["auroc_macro"] < high
    grid = [
        [m["test"]["auroc"][c] for c in COMPETITION] for m in (metrics["zero_shot"], *metrics["after_task"])
    ]
    first = [
        next(t for t, task in enumerate(metrics["tasks"], 1) if c in task["classes"]) for c in COMPETITION
    ]
    forgetting = [max(grid[t][c] for t in range(k, 3)) - grid[3][c] for c, k in enumerate(first) if k < 3]
    forward = [grid[k - 1][c] - grid[0][c] for c, k in enumerate(first) if k > 1]
    assert metrics["continual"]["average_auroc"] == pytest.approx(np.mean(grid[3]), abs=1e-12)
    assert metrics["continual"]["forgetting"] == pytest.approx(np.mean(forgetting), abs=1e-12)
    assert metrics["continual"]["forward_transfer"] == pytest.approx(np.mean(forward), abs=1e-12)
    assert metrics["cost"]["trainable_parameters"] == 2 * (16 * 32 + 32 + 32 * 16 + 16)


def saved_weights(folder, kind, n_classes):
    """The image and the text adaptor of a run, each as float64 weights in the order of its parameters."""
    tensors, _ = retune.load_tensors(folder / "adaptors.safetensors")
    names = list(retune.build_model(retune.Config(adaptor=kind), 16, n_classes).state_dict())
    assert sorted(names) == sorted(tensors)
    return [[tensors[n].double() for n in names if n.startswith(tower)] for tower in ("image", "text")]


def test_zero_shot_and_final_metrics_follow_from_the_saved_adaptors(demo_arguments, finished, encoder):
    """Everything again from the files: adaptors, cached embeddings, prompts, in plain float64."""
    metrics = json.loads((finished / "metrics.json").read_text())
    cache = Path(demo_arguments[demo_arguments.index("--cache-dir") + 1])
    data = radiographs.load_radiographs(retune.Config(demo_images=240))
    embeddings = encoders.embed(encoder, data, cache)
    prompts = retune.load_prompts(HERE / "prompts.json", COMPETITION)
    bank = retune.embed_prompts(encoder, prompts)
    image, text = saved_weights(finished, "mlp", 5)
    rows = data.where("test")
    for weights, stage in (((None, None), metrics["zero_shot"]), ((image, text), metrics["after_task"][-1])):
        cosines = plain_model(
            torch.tensor(embeddings[rows]).double(),
            bank.embeddings.double(),
            bank.group.tolist(),
            *weights,
            "mlp",
            "mean",
        )
        scores = np.array([[row[2 * c].item() - row[2 * c + 1].item() for c in range(5)] for row in cosines])
        assert stage["test"]["n"] == len(rows)
        for c, name in enumerate(COMPETITION):
            auroc = sklearn_metrics.roc_auc_score(data.labels[rows, c], scores[:, c])
            assert stage["test"]["auroc"][name] == pytest.approx(auroc, abs=2e-3), name
            f1 = sklearn_metrics.f1_score(data.labels[rows, c], scores[:, c] > 0, zero_division=0)
            assert stage["test"]["f1"][name] == pytest.approx(f1, abs=2e-2), name


def test_splits_csv_gives_every_image_its_patient_split_and_task(finished):
    data = radiographs.load_radiographs(retune.Config(demo_images=240))
    table = radiographs.read_table(finished / "splits.csv", ["image", "patient", "split", "task"])
    assert table["image"] == list(data.names) and table["patient"] == data.patients.tolist()
    homes = {}
    for patient, split, task in zip(table["patient"], table["split"], table["task"]):
        assert homes.setdefault(patient, (split, task)) == (split, task)
        assert (task in "123" and task != "") == (split == "train")
    counts = [table["task"].count(str(k)) for k in (1, 2, 3)]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert counts == [task["n_train"] for task in metrics["tasks"]]
    assert sum(counts) == table["split"].count("train") == len(data.where("train"))


def test_the_table_holds_the_numbers_of_metrics_json(finished):
    metrics, table = json.loads((finished / "metrics.json").read_text()), (finished / "table.md").read_text()
    for stage in (metrics["zero_shot"], *metrics["after_task"]):
        row = [f"{value:.3f}" for value in stage["test"]["auroc"].values()]
        assert " | ".join([*row, f"{stage['test']['auroc_macro']:.3f}"]) in " ".join(table.split()), row
    low, high = metrics["after_task"][-1]["test"]["auroc_macro_ci"]
    for value in (low, high, *(v for v in metrics["continual"].values() if v is not None)):
        assert f"{value:.3f}" in table
    assert "not clinical" in table


def test_heatmaps_print_every_value_with_zero_shot_on_top(finished, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    metrics, texts = json.loads((finished / "metrics.json").read_text()), {}
    draw = Axes.text

    def remember(self, x, y, text, **options):
        texts[round(y), round(x)] = text
        return draw(self, x, y, text, **options)

    monkeypatch.setattr(Axes, "text", remember)
    retune.heatmap(tmp_path / "a.png", metrics, "auroc", "test AUROC")
    for t, stage in enumerate((metrics["zero_shot"], *metrics["after_task"])):
        for c, value in enumerate(stage["test"]["auroc"].values()):
            assert texts[t, c] == f"{value:.3f}"
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 10


def test_several_seeds_give_mean_and_deviation_of_their_own_runs(demo_arguments, tmp_path, capsys):
    seeds = ["--seed", "1", "2", "3", "--scenario", "joint", "--output"]
    assert "{seed}" in failure(capsys, [*demo_arguments, *seeds, tmp_path / "runs"])
    assert retune.main([*demo_arguments, *seeds, str(tmp_path / "runs" / "{seed}")]) == 0
    last_lines = capsys.readouterr().out.strip().splitlines()[-1]
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").rglob("metrics.json"))]
    assert [m["config"]["seed"] for m in runs] == [1, 2, 3]
    for key in ("auroc_macro", "f1_macro", "accuracy"):
        values = np.array([m["after_task"][-1]["test"][key] for m in runs])
        assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in last_lines
    assert len({m["after_task"][-1]["test"]["auroc_macro"] for m in runs}) == 3


@pytest.mark.parametrize("stop", [False, True], ids=["finished", "interrupted"])
def test_saved_models_hold_no_image_embedding_label_or_patient(csv_set, monkeypatch, stop):
    root, rows, arguments = csv_set
    write_rows(root / "labels.csv", rows)
    arguments = [*map(str, arguments), "--cache-dir", "cache"]
    if stop:
        stop_after_task(1, arguments, monkeypatch)
    else:
        assert retune.main(arguments) == 0
    saved = model_bytes(root.parent / "run")
    assert ("resume.safetensors" in saved) == stop and "task_1.safetensors" in saved
    embeddings = np.load(next(Path("cache").rglob("embeddings.npy")))
    data = radiographs.load_radiographs(retune.Config(data="csv", data_dir=str(root)))
    forbidden = [row["patient"].encode() for row in rows] + [row["path"].encode() for row in rows]
    forbidden += [b"Kowalski", root.name.encode()]
    for row, embedding in zip(rows, embeddings):
        pixels = np.asarray(Image.open(root / row["path"]))
        forbidden += [pixels[k, :12].tobytes() for k in range(0, 40, 8)]
        for kind in (np.float16, np.float32, np.float64):
            forbidden += [embedding.astype(kind)[k : k + 3].tobytes() for k in (0, 5, 10)]
    train = data.labels[data.where("train")]
    for kind in (np.uint8, np.int64, np.float32):
        forbidden += [part.astype(kind).tobytes() for part in (train, train.T, train[:, 0], train[:, 1])]
    for name, content in saved.items():
        for secret in forbidden:
            assert secret not in content, (name, secret)


# ------------------------------------------------------------------------------------------- 11. Command line


@pytest.fixture
def csv_run(csv_set):
    """(folder of the images, rows, folder of a finished run) on a CSV data set."""
    root, rows, arguments = csv_set
    write_rows(root / "labels.csv", rows)
    assert retune.main([*map(str, arguments), "--score", "pos", "--adaptor", "residual", "--lr", "0.05"]) == 0
    return root, rows, root.parent / "run"


def test_predict_gives_the_runs_own_scores_without_the_data_set(csv_run, encoder, capsys):
    root, rows, run = csv_run
    images = [str(root / row["path"]) for row in rows if row["split"] == "test"]
    (root / "labels.csv").unlink()
    capsys.readouterr()
    assert retune.main(["--predict", *images, "--run", str(run), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [p["image"] for p in predictions] == images
    image, text = saved_weights(run, "residual", 2)
    bank = retune.embed_prompts(encoder, retune.load_prompts(HERE / "prompts.json", ["Edema", "Mass"]))
    metrics, scores = json.loads((run / "metrics.json").read_text()), []
    for prediction in predictions:
        pixels = encoder.transform(radiographs.read_image(Path(prediction["image"])))[None]
        x = encoder.encode_images(pixels).double()
        cosines = plain_model(
            x, bank.embeddings.double(), bank.group.tolist(), image, text, "residual", "mean"
        )[0]
        for c, name in enumerate(("Edema", "Mass")):
            found = prediction["findings"][name]
            assert found["score"] == pytest.approx((cosines[2 * c].item() + 1) / 2, abs=2e-6)
            assert found["present"] == (cosines[2 * c] > cosines[2 * c + 1]).item()
        scores.append([prediction["findings"][name]["score"] for name in ("Edema", "Mass")])
    labels = np.array([[int(row["Edema"]), int(row["Mass"])] for row in rows if row["split"] == "test"])
    auroc = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics["after_task"][-1]["test"]["auroc_macro"] == pytest.approx(auroc, abs=0.05)
    assert retune.main(["--predict", *images, "--run", str(run)]) == 0
    table = capsys.readouterr().out
    assert all(f"{score:.3f}" in table for row in scores for score in row)


def test_predict_refuses_another_encoder_a_missing_run_and_an_unreadable_image(csv_run, tmp_path, capsys):
    root, rows, run = csv_run
    image = root / rows[0]["path"]
    other = save_random_encoder(tmp_path / "other", seed=2)
    assert "encoder" in failure(capsys, ["--predict", image, "--run", run, "--encoder", other])
    assert "nowhere" in failure(capsys, ["--predict", image, "--run", "nowhere"])
    assert "none.png" in failure(capsys, ["--predict", image, "none.png", "--run", run])
    path = run / "adaptors.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    assert "adaptors.safetensors" in failure(capsys, ["--predict", image, "--run", run])


@pytest.mark.parametrize(
    "options, tasks",
    [
        (["--scenario", "data", "--parts", "4", "--adapt", "shared"], 4),
        (["--scenario", "label", "--pool", "max", "--class-order", "random"], 5),
        (["--scenario", "zero"], 0),
        (["--scenario", "joint", "--no-negatives", "--score", "pos", "--optimizer", "sgd"], 1),
        (
            [
                "--scenario",
                "class",
                "--positives-only",
                "--parts",
                "5",
                "--adaptor",
                "linear",
                "--adapt",
                "image",
            ],
            5,
        ),
        (["--scenario", "data", "--contiguous", "--parts", "3", "--pool", "single", "--adapt", "text"], 3),
        (["--scenario", "joint", "--adaptor", "residual", "--logit-scale", "10", "--classes", "Edema"], 1),
    ],
)
def test_every_switch_runs_end_to_end_and_scores_every_class(demo_arguments, tmp_path, options, tasks):
    arguments = demo_arguments[: demo_arguments.index("--scenario")]
    assert retune.main([*arguments, "--epochs", "1", *options, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert len(metrics["after_task"]) == len(metrics["tasks"]) == tasks
    last = [metrics["zero_shot"], *metrics["after_task"]][-1]
    assert all(0 <= value <= 1 for value in last["test"]["auroc"].values())
    assert len(list((tmp_path / "run").glob("task_*.safetensors"))) == tasks


def test_the_default_run_learns_what_the_readme_says(tmp_path):
    """The first command of the README but for fewer images: above zero-shot, little forgotten."""
    if not (HERE / "tiny/model.safetensors").is_file():
        pytest.skip("the embedded encoder is not here")
    arguments = ["--epochs", "5", "--demo-images", "3000", "--output", str(tmp_path / "run")]
    assert retune.main([*arguments, "--scenario", "data"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    zero, last = (stage["test"]["auroc_macro"] for stage in (metrics["zero_shot"], metrics["after_task"][-1]))
    assert 0.55 < zero < 0.8 and last > zero + 0.05 and last > 0.75
    assert metrics["continual"]["forgetting"] < 0.05


def test_real_radiographs_run_end_to_end(tmp_path, demo_arguments):
    folder = os.environ.get("RETUNE_NIH_DIR")
    if not folder:
        pytest.skip("RETUNE_NIH_DIR is not set")
    classes = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion"]
    tiny = (HERE / "tiny/model.safetensors").is_file()
    encoder = "tiny" if tiny else demo_arguments[demo_arguments.index("--encoder") + 1]
    arguments = ["--data", "nih", "--data-dir", folder, "--scenario", "class", "--classes", *classes]
    options = ["--encoder", encoder, "--epochs", "2", "--output", str(tmp_path / "run")]
    assert retune.main([*arguments, *options]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    table = radiographs.read_table(next(Path(folder).glob("Data_Entry*.csv")))
    test = set(Path(folder, "test_list.txt").read_text().split())
    listed = [
        findings for name, findings in zip(table["Image Index"], table["Finding Labels"]) if name in test
    ]
    last = metrics["after_task"][-1]["test"]
    assert last["n"] == len(listed) and list(last["auroc"]) == classes
    assert all(0.2 < value < 1 for value in last["auroc"].values())
    data = radiographs.load_radiographs(retune.Config(data="nih", data_dir=folder, classes=tuple(classes)))
    for c, name in enumerate(classes):
        positives = sum(name in findings.split("|") for findings in listed)
        assert data.labels[data.where("test"), c].sum() == positives > 0
    splits = radiographs.read_table(tmp_path / "run/splits.csv")
    assert len(set(zip(splits["patient"], splits["split"]))) == len(set(splits["patient"]))
    assert len(splits["image"]) == len(table["Image Index"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_metrics_of_the_cpu(demo_arguments, finished, tmp_path):
    arguments = [
        "--device",
        "cuda",
        "--cache-dir",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "run"),
    ]
    assert retune.main([*demo_arguments, *arguments]) == 0
    tasks = [
        retune.read_json(folder / "metrics.json")["after_task"] for folder in (tmp_path / "run", finished)
    ]
    for gpu, cpu in zip(*tasks):
        assert gpu["test"]["auroc_macro"] == pytest.approx(cpu["test"]["auroc_macro"], abs=1e-3)


def readme_commands() -> list[list[str]]:
    """The README's calls of our programs, as lists of words; comments and line ends inside a call removed."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(
        text.split("```bash\n")[k].split("```")[0] for k in range(1, text.count("```bash\n") + 1)
    )
    lines = [line.split("  #")[0] for line in blocks.replace("\\\n", " ").splitlines()]
    calls = [call.split() for line in lines for call in line.split("&&")]
    return [words[words.index("python") + 1 :] for words in calls if "python" in words]


def test_every_command_of_the_readme_is_one_that_its_program_takes(monkeypatch):
    commands = readme_commands()
    assert ["retune.py", "--scenario", "data", "--epochs", "5"] in commands
    assert len(commands) >= 5
    parsed = 0
    monkeypatch.setattr(retune, "run_all", lambda configs: None)
    monkeypatch.setattr(retune, "predict", lambda *arguments: [{"image": "a", "findings": {}}])
    monkeypatch.setattr(
        encoders.DualEncoder, "load", lambda *a, **k: type("E", (), {"save": lambda *a: None})
    )
    for program, *arguments in commands:
        if program == "retune.py":
            assert retune.main(arguments) == 0, arguments
            parsed += 1
    assert parsed >= 5


def test_ci_runs_the_test_command_of_the_readme():
    ci = (HERE / ".ci" / "run").read_text(encoding="utf-8")
    readme = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    command = next(line for line in readme if line.startswith("pip install") and "pytest" in line)
    assert command == "pip install -r requirements.txt && python -m pytest -q"
    assert "grep -m 1 '^pip install.*pytest' README.md" in ci
