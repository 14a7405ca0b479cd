"""What users rely on through kills, full disks, damaged files, several processes, odd numbers; privacy."""

import contextlib
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retune
from tests.fixtures import (
    assert_same_run,
    csv_rows,
    exit_code,
    noise_images,
    read_failure,
    read_metrics,
    write_rows,
)

pytestmark = [
    pytest.mark.usefixtures("in_empty_folder"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX"),
]

SMALL_RUNS = {
    "retune": "--epochs 2 --workers 0 --demo-images 240 --scenario label --parts 3 --encoder {encoder}",
    "adaptor": "--epochs 2 --batch-size 32 --width 16 --heads 2 --feedforward 32 --head-epochs 1 --workers 0"
    " --repeats 1 --demo-images 150 --stages retrieval classification"
    " --image-encoder {encoder} --text-encoder {encoder}",
    "cleft": "all --dim 8 --batch-size 12 --steps 4 --prompt-steps 4 --save-every 2 --truncate --balanced 0"
    " --augment on --demo-images 300 --image {encoder} --text {encoder}"}  # fmt: skip


def program_arguments(program: str, encoder: Path) -> list[str]:
    """A small run of one of the three programs on the demo."""
    shared = ["--device", "cpu", "--cache-dir", "cache", "--output", "run"]
    return [*SMALL_RUNS[program].format(encoder=encoder).split(), *shared]


def call_program(program: str, arguments: list[str]) -> int:
    """Run a program in this process, embedding in small chunks."""
    retune.CHUNK = 64
    module = retune if program == "retune" else importlib.import_module(f"{program}.__main__")
    return module.main(arguments)


def run_and_exit(arguments: list[str], environment: dict | None = None, limit: int = 0, said="") -> None:
    """retune.py in a process of its own: with the environment of a rank, or where no file may exceed `limit`
    bytes, so that writes fail halfway as on a full disk, with standard error in the file `said`."""
    import resource

    os.environ.update(environment or {})
    if limit:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(call_program("retune", arguments))


def run_until_change(program: str, arguments: list[str], folder: Path, last: float) -> None:
    """Run a program in `folder`; die by SIGKILL before its change number `last` to the files there."""
    kinds = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
    left = [last]

    def count(event: str, values: tuple) -> None:
        writing = event == "open" and str(values[1])[:1] in "wax"
        if (writing or event in kinds) and not os.path.isabs(str(values[0])):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    sys.addaudithook(count)
    sys.exit(call_program(program, arguments))


def contents(folder: Path) -> dict:
    """What every file below `folder` holds, except for measured times; JSON and pickles by content."""
    measured = {"seconds", "embed_seconds", "train_seconds", "images_per_second", "peak_memory_mb"}

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in measured}
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.detach().numpy().tobytes()
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def read(path: Path):
        if path.suffix == ".pt":
            return plain(torch.load(path, weights_only=True))
        return plain(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    return {str(p.relative_to(folder)): p.is_dir() or read(p) for p in sorted(folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["retune", "adaptor", "cleft"])
def test_a_killed_program_ends_like_an_uninterrupted_one(program, fork, encoder_folder, tmp_path):
    """Each process dies a few file changes later than the one before; nothing is lost or left over."""
    arguments, kills = program_arguments(program, encoder_folder), 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert exit_code(fork(run_until_change, program, arguments, whole, math.inf)) == 0
    while (code := exit_code(fork(run_until_change, program, arguments, killed, 3 + 5 * kills))) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert kills > 3
    expected, found = contents(whole), contents(killed)
    assert {name for name in expected | found if expected.get(name) != found.get(name)} == set()


@pytest.mark.parametrize("limit", [500, 5000, 20000])
def test_a_full_disk_leaves_whole_files_and_the_run_goes_on(demo_arguments, finished, fork, tmp_path, limit):
    run, report = tmp_path / "run", tmp_path / "report.txt"
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output", str(run)]
    code, said = exit_code(fork(run_and_exit, arguments, None, limit, report)), report.read_text()
    assert code == 2 and "error: " in said and "Traceback" not in said, (code, said)
    assert not list(tmp_path.rglob("*partial*"))
    assert all(path.read_bytes() == (finished / path.name).read_bytes() for path in run.glob("task*"))
    assert exit_code(fork(run_and_exit, arguments)) == 0
    assert_same_run(run, finished)


def test_processes_share_one_cache_and_one_wins_the_output_folder(demo_arguments, finished, fork, tmp_path):
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output"]
    shared = [fork(run_and_exit, [*arguments, str(tmp_path / "a")]) for _ in range(2)]
    alone = fork(run_and_exit, [*arguments, str(tmp_path / "b")])
    assert sorted(map(exit_code, shared)) in ([0, 0], [0, 2]) and exit_code(alone) == 0
    for name in "ab":
        assert_same_run(tmp_path / name, finished)
    assert len(list((tmp_path / "cache").rglob("embeddings.npy"))) == 1
    assert not list(tmp_path.rglob("*partial*"))


def test_two_ranks_give_the_run_of_one_process(demo_arguments, fork, finished, tmp_path):
    """Sharded embedding is the same array; adaptors and metrics agree within 1e-5."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    two, cache = tmp_path / "two", Path(demo_arguments[demo_arguments.index("--cache-dir") + 1])
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output", str(two)]
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [fork(run_and_exit, arguments, common | rank) for rank in ranks]
    assert [exit_code(process) for process in processes] == [0, 0]
    found, wanted = (np.load(next(folder.rglob("embeddings.npy"))) for folder in (tmp_path / "cache", cache))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for name in ("task_1", "task_2", "task_3"):
        found, wanted = (retune.load_tensors(f / f"{name}.safetensors")[0] for f in (two, finished))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    found, wanted = (read_metrics(f)["after_task"][-1]["test"]["auroc_macro"] for f in (two, finished))
    assert found == pytest.approx(wanted, abs=1e-3)


NUMBERS = (b"9" * 20, b"-1", b"1e999", b"NaN", b"0", b"", b"2147483648", b"[]", b'"', b"null")


def damage(generator: np.random.Generator, content: bytes) -> bytes:
    """Flip bits, cut, insert, double, delete or replace a span, or change a number; half hit the head."""
    near = len(content) if generator.random() < 0.5 else min(len(content), 400)
    start = int(generator.integers(0, near + 1))
    length = int(2 ** generator.uniform(0, 9))
    head, span, tail = content[:start], content[start : start + length], content[start + length :]
    noise = generator.bytes(length)
    flipped = bytes(byte ^ (1 << generator.integers(8)) for byte in span)
    damaged = [head, head + flipped + tail, head + noise + span + tail, head + span * 2 + tail, head + tail]
    damaged.append(head + noise + tail)
    if found := list(re.finditer(rb"\d+", content[: start + 4096])):
        number = found[generator.integers(len(found))]
        other = NUMBERS[generator.integers(len(NUMBERS))]
        damaged.append(content[: number.start()] + other + content[number.end() :])
    return damaged[generator.integers(len(damaged))]


def load(folder: Path, name: str, **options) -> retune.Radiographs:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    config = retune.Config(data=name, data_dir=str(folder), cache_dir=str(folder / "cache"), **options)
    return retune.load_radiographs(config)


def make_csv(folder, encoder):
    return [write_rows(folder / "labels.csv", csv_rows(folder))], lambda: load(folder, "csv")


def make_npz(folder, encoder):
    counts = {"train": 4, "val": 2, "test": 3}
    arrays = {f"{part}_images": np.full((n, 28, 28), n, np.uint8) for part, n in counts.items()}
    arrays |= {f"{part}_labels": np.zeros((n, 14), np.uint8) for part, n in counts.items()}
    np.savez(folder / "chestmnist.npz", **arrays)
    return [folder / "chestmnist.npz"], lambda: load(folder, "chestmnist", size=28)


def make_images(folder, encoder):
    color = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    grey = Image.fromarray(color[..., 0])
    grey.save(folder / "grey.png")
    grey.convert("I;16").save(folder / "deep.tiff")
    Image.fromarray(color).convert("P").save(folder / "palette.png")
    Image.fromarray(color).save(folder / "color.jpg", progressive=True)
    files = sorted(folder.iterdir())
    return files, lambda: [encoder.transform(retune.read_image(path)) for path in files]


def make_adaptors(folder, encoder):
    options = "--demo-images 60 --scenario joint --epochs 1 --no-figures --workers 0 --encoder"
    places = ["--output", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    assert retune.main([*options.split(), encoder.source, *places]) == 0
    Image.new("L", (20, 20)).save(folder / "a.png")
    config = retune.Config(encoder=encoder.source, device="cpu")
    file = folder / "run/adaptors.safetensors"
    return [file], lambda: retune.predict([folder / "a.png"], folder / "run", config)


def make_encoder(folder, encoder):
    shutil.copytree(encoder.source, folder / "encoder")
    return sorted((folder / "encoder").iterdir()), lambda: retune.DualEncoder.load(str(folder / "encoder"))


def make_pickles(folder, encoder):
    tensors = {"visual.trunk.blocks.0.attn.qkv.weight": torch.ones(6, 2), "logit_scale": torch.tensor(1.0)}
    torch.save(tensors, folder / "pytorch_model.bin")
    return [folder / "pytorch_model.bin"], lambda: retune.read_weights(folder, "*.bin")


def make_cache(folder, encoder):
    data = noise_images(32)

    def read():
        found = retune.embed(encoder, data, folder)
        assert np.isfinite(found).all() and retune.embedding_facts(found)["seconds"] > 0

    read()
    return [path for path in sorted(folder.rglob("*.*")) if path.stat().st_size], read


CASES = {name[5:]: make for name, make in list(globals().items()) if name.startswith("make_")}


def read_damaged(folder: Path, encoder_folder: str, name: str, report: Path) -> None:
    """Damage a case's files 20 times and read them; every error that is no InputError goes to the report."""
    encoder = retune.DualEncoder.load(encoder_folder)
    encoder.source = encoder_folder
    files, read = CASES[name](folder, encoder)
    valid, bugs, refused = {file: file.read_bytes() for file in files}, {}, 0
    read()
    for i in range(20):
        report.write_text(json.dumps([refused, {"died": f"input {i}"}]))
        generator = np.random.default_rng((1, i))
        for file, content in valid.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        victim = files[generator.integers(len(files))]
        victim.write_bytes(damage(generator, valid[victim]))
        try:
            read()
        except retune.InputError as error:
            refused += bool(str(error)) and "\n" not in str(error)
        except Exception as error:
            bugs[f"{i}, {victim.name}"] = "".join(traceback.format_exception(error)[-3:])
    report.write_text(json.dumps([refused, bugs]))


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_read_or_refused(name, fork, encoder_folder, tmp_path):
    """In another process, since a decoder may end its process."""
    (tmp_path / "files").mkdir()
    process = fork(read_damaged, tmp_path / "files", str(encoder_folder), name, tmp_path / "report")
    code, (refused, bugs) = exit_code(process), json.loads((tmp_path / "report").read_text())
    assert code == 0 and not bugs, (code, bugs)
    assert refused > 0


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["pickles", "npz", "cache", "encoder", "adaptors"])
def test_no_file_runs_code(name, encoder, encoder_folder, tmp_path):
    encoder.source, evil = str(encoder_folder), Evil(tmp_path / "executed")
    (tmp_path / "files").mkdir()
    files, read = CASES[name](tmp_path / "files", encoder)
    np.save(array := io.BytesIO(), np.array([evil], object), allow_pickle=True)
    torch.save({"model": {"a": evil}}, archive := io.BytesIO())
    code = f"import os; os.mkdir({str(evil.folder)!r})\nclass A: pass\n"
    automatic = {"auto_map": {k: "code.A" for k in ("AutoTokenizer", "AutoModel")}, "tokenizer_class": "A"}
    evils = [pickle.dumps(evil), array.getvalue(), archive.getvalue(), json.dumps(automatic).encode()]
    valid = {file: file.read_bytes() for file in files}
    for file in files:
        (file.parent / "code.py").write_text(code)
        for content in evils:
            file.write_bytes(content)
            with contextlib.suppress(retune.InputError):
                read()
            assert not evil.folder.exists(), (file, content[:80])
            for path, whole in valid.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(whole)
    pickle.loads(evils[0])
    assert evil.folder.exists()


NORMAL = np.random.default_rng(0).normal(size=(12, 6))
EMBEDDINGS = {
    "constant": np.ones((12, 6)), "zeros": np.zeros((12, 6)), "one zero": np.eye(12, 6),
    "1e15": NORMAL * 1e15, "1e30": NORMAL * 1e30, "1e-30": NORMAL * 1e-30,
    "float32 max": np.full((12, 6), 3.4e38)}  # fmt: skip


@pytest.mark.parametrize("adaptor, pool", [("mlp", "mean"), ("linear", "single"), ("residual", "max")])
@pytest.mark.parametrize("values", EMBEDDINGS)
def test_any_embeddings_give_finite_metrics_or_an_input_error(values, adaptor, pool):
    embeddings = EMBEDDINGS[values].astype(np.float32)
    labels = np.resize(np.float32([[0, 1], [1, 0], [1, 1]]), (12, 2))
    patients = [f"p{i}" for i in range(12)]
    with retune.seeded(0):
        model = retune.RETune(6, adaptor=adaptor, pool=pool, logit_scale=10)
        bank = retune.PromptBank(torch.randn(4, 6), torch.arange(4))
    options = {"epochs": 1, "batch_size": 4, "generator": torch.Generator().manual_seed(0)}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    try:
        for task in retune.make_tasks("class", labels, "ab", None, 0, patients):
            retune.fit(model, bank, embeddings, torch.from_numpy(labels), task, optimizer, **options)
    except retune.InputError as error:
        assert values in ("1e30", "float32 max"), error
        return
    assert all(p.isfinite().all() for p in model.parameters())
    scores, decisions = retune.score_rows(model, bank, embeddings, np.arange(12), "diff")
    assert (scores >= -1e-6).all() and (scores <= 1 + 1e-6).all()
    measured = retune.evaluate(scores, decisions, labels, "ab")
    assert all(math.isfinite(measured[key]) for key in ("auroc_macro", "ap_macro", "f1_macro", "accuracy"))
    assert np.isfinite(retune.bootstrap_ci(scores, labels, patients, 50)).all()
    if len(np.unique(embeddings, axis=0)) == 1:
        assert measured["auroc_macro"] == 0.5, "equal images cannot be told apart"


@pytest.fixture(scope="module")
def everything(encoder_folder, tmp_path_factory) -> tuple[Path, Path]:
    """(data, results) of all programs and methods, finished and interrupted; names that are not ASCII."""
    root = tmp_path_factory.mktemp("places") / "Ordner mit Ä ü 影像"
    rows = csv_rows(root / "Daten 胸部", 48)
    for i, row in enumerate(rows):
        row |= {"report": f"report of ärztin number {i}", "Mass": str((i * i // 3 + i // 8) % 2)}
    write_rows(root / "Daten 胸部" / "labels.csv", rows)
    (root / "Ergebnisse").mkdir()
    data = ["--data", "csv", "--data-dir", str(root / "Daten 胸部")]
    options = [*program_arguments("retune", encoder_folder), *data, "--parts", "2", "--output"]
    fit, trained = retune.fit, []

    def interrupted(*positional, **options):
        if trained:
            raise KeyboardInterrupt
        trained.append(fit(*positional, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "Ergebnisse")
        for method in ("retune", "linear", "mlp", "ewc", "lwf", "replay", "analytic"):
            assert retune.main([*options, method, "--method", method]) == 0
        for program, more in {"adaptor": ["--export", "pair"], "cleft": []}.items():
            arguments = [*program_arguments(program, encoder_folder), *data, "--output", program, *more]
            assert call_program(program, arguments) == 0
        patch.setattr(retune, "fit", interrupted)
        assert retune.main([*options, "interrupted"]) == 130
    return root / "Daten 胸部", root / "Ergebnisse"


def secrets(data: Path, results: Path) -> set[bytes]:
    """What no model may hold: patients' texts, pixel rows, labels, 3 neighbouring numbers of an embedding."""
    table = retune.read_table(data / "labels.csv")
    texts = [*table["patient"], *table["path"], *table["report"], "Kowalski", "ärztin"]
    found = {text.encode() for text in texts}
    for name in table["path"]:
        pixels = np.asarray(Image.open(data / name))
        found |= {pixels[k, :12].tobytes() for k in range(0, 40, 4)}
    train = np.array(table["split"]) == "train"
    for labels in (np.array(table[column], np.float32) for column in ("Edema", "Mass")):
        for kind in (np.uint8, np.int64, np.float32, np.float64):
            found |= {labels[:24].astype(kind).tobytes(), labels[train].astype(kind).tobytes()}
    for file in results.glob("cache/*/embeddings.npy"):
        for row in np.load(file):
            unit = row / np.linalg.norm(row)
            for x in (x.astype(kind) for x in (row, unit) for kind in (np.float16, np.float32, np.float64)):
                found |= {x[k : k + 3].tobytes() for k in range(0, len(x) - 2, 5)}
    return {secret for secret in found if any(secret)}


@pytest.mark.slow
def test_no_model_of_any_program_holds_anything_of_a_patient(everything):
    data, results = everything
    kinds = (".safetensors", ".pt")
    models = [p for p in results.rglob("*") if p.is_file() and (p.suffix in kinds or p.parent.name == "pair")]
    folders = {p.relative_to(results).parts[0] for p in models}
    assert {"retune", "replay", "interrupted", "adaptor", "pair", "cleft"} <= folders
    hidden = secrets(data, results)
    assert len(hidden) > 3000
    allowed = "statistics.safetensors"  # what a method says it stores of patients, beside the model
    leaks = {(str(p), s) for p in models if p.name != allowed for s in hidden if s in p.read_bytes()}
    assert not leaks


def test_images_changed_under_a_run_are_refused(csv_set, capsys, monkeypatch):
    root, rows, arguments = csv_set
    monkeypatch.setattr(retune, "fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert retune.main(arguments) == 130
    monkeypatch.undo()
    for row in rows:
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / row["path"], format="PNG")
    assert "images or their embeddings changed" in read_failure(capsys, arguments)


def test_scoring_switches_dropout_off():
    class Noisy(retune.Method):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def logits(self, images, bank):
            return self.dropout(images[:, :1])

    bank = retune.PromptBank(torch.zeros(2, 8), torch.arange(2))
    scores, _ = retune.score_rows(Noisy(), bank, np.ones((99, 8), np.float32), np.arange(99), "diff")
    assert len(np.unique(scores)) == 1


def test_heatmaps_and_json_belong_to_predictions(capsys):
    for option in (["--heatmap", "maps"], ["--json"]):
        with pytest.raises(SystemExit):
            retune.main(option)
        assert "go with --predict" in capsys.readouterr().err


def test_a_task_without_labels_is_named(csv_set, capsys):
    root, rows, arguments = csv_set
    for row in rows:
        row["Edema"] = "" if row["split"] == "train" else row["Edema"]
    write_rows(root / "labels.csv", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert retune.main(arguments) == 0
    assert "Edema has no known label" in capsys.readouterr().err
