"""Tests of what a user must be able to rely on whatever happens: kills, damaged files, degenerate numbers, privacy.

A handful of each runs in seconds. RETUNE_TRUST=40 multiplies the amounts by 40 and adds what is too large for
every day: thousands of damaged files, a kill before every single change of a file, 100,000 rows, 1,000,000 images.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import downstream
import hypothesis.strategies as st
import numpy as np
import phantoms
import public_data
import public_encoders
import pytest
import torch
import towers
from hypothesis import given, settings
from PIL import Image

import adaptor
import cleft
import retune

HERE = Path(__file__).resolve().parent
TIMES = int(os.environ.get("RETUNE_TRUST", "1"))
MEASURED = {"seconds", "embed_seconds", "train_seconds", "images_per_second", "peak_memory_mb"}
PROGRAMS = {"retune": retune.main, "adaptor": adaptor.main, "cleft": cleft.main}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX"),
]
thorough = pytest.mark.skipif(TIMES == 1, reason="large: RETUNE_TRUST=40")
quick = settings(max_examples=min(50 * TIMES, 5000), deadline=None)


# --------------------------------------------------------------------------------- One encoder and data for all


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """A random encoder that all three programs take: ViT images of 16 pixels, GPT-2 texts, 8 dimensions."""
    texts = [
        *phantoms.make_phantoms(60, seed=1).reports,
        *towers.strings(retune.read_json(HERE / "prompts.json")),
    ]
    tokenizer = towers.train_tokenizer(texts)
    vit = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    text = towers.SMALL_TEXT | {"vocab_size": len(tokenizer), "n_embd": 16}
    config = {
        "name": "random", "dim": 8, "image": {"model": vit, "pool": "pre_norm_mean", "head": towers.head(24, 8)},
        "text": {"model": text, "pool": "last", "head": towers.head(16, 8), "context_length": 128},
        "transform": {"resize": 16, "crop": 16, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip
    with retune.seeded(0):
        retune.DualEncoder(config, tokenizer).save(folder := tmp_path_factory.mktemp("encoder") / "small")
    return folder


@pytest.fixture(scope="session")
def encoder(encoder_folder) -> retune.DualEncoder:
    return retune.DualEncoder.load(str(encoder_folder))


RETUNE = "--epochs 2 --workers 0 --cache-dir cache --output run --encoder {encoder} --device cpu"
ADAPTOR = (
    "--epochs 3 --batch-size 32 --width 16 --heads 2 --feedforward 32 --repeats 1 --head-steps 8 --mask-images 40"
    " --mask-epochs 2 --decoder-width 16 --workers 0 --device cpu --image-encoder {encoder} --text-encoder {encoder}"
    " --cache-dir cache --output run"
)
CLEFT = (
    "all --image {encoder} --text {encoder} --dim 8 --batch-size 12 --steps 6 --prompt-steps 6 --save-every 2"
    " --output run --cache-dir cache --device cpu --truncate"
)


def write_set(root: Path, n: int = 48) -> None:
    """A CSV data set of n images of noise in `root`, with patients, reports and names that are not ASCII."""
    generator, lines = np.random.default_rng(0), ["path,patient,split,Edema,Mass,report"]
    (root / "Bilder 1").mkdir(parents=True)
    for i in range(n):
        name = f"Bilder 1/Röntgen {i:02d} 胸.png"
        Image.fromarray(generator.integers(0, 256, (40, 36), np.uint8)).save(root / name)
        split = ("train", "train", "val", "test")[i // 2 % 4]
        mass = (i * i // 3 + i // 8) % 2  # no pattern that a causal mask has too
        lines.append(f"{name},Kowalski-{i // 2:03d},{split},{i % 2},{mass},report of ärztin number {i}")
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ 1. Kill anywhere


def serve() -> None:
    """Run jobs that come on standard input, a line of JSON each, in processes that start with all imported."""
    modules = ("sklearn.linear_model sklearn.pipeline sklearn.metrics peft matplotlib.backends.backend_agg"
               " torch._dynamo torchvision.transforms.v2 torchvision.io safetensors.torch tokenizers.trainers"
               " baselines classification segmentation unimodal reports transformers.models.vit.modeling_vit"
               " transformers.models.gpt2.modeling_gpt2 PIL.PngImagePlugin PIL.JpegImagePlugin")  # fmt: skip
    for name in modules.split():
        importlib.import_module(name)
    for line in sys.stdin:
        job, start = json.loads(line), time.perf_counter()
        if not (pid := os.fork()):
            work(job)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        status = wait(pid, start + job.get("seconds", math.inf))
        print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start]), flush=True)


def wait(pid: int, end: float) -> int:
    """The exit status of a process, whose whole group is killed when the clock shows `end`."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.perf_counter() > end:
            os.killpg(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.001)


def work(job: dict) -> None:
    """Run a job's program in its folder, output to a log beside it; ends the process."""
    os.setpgid(0, 0)
    os.chdir(job["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(job["folder"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if job["program"] == "script":
        os.execvpe("bash", ["bash", "run_experiments.sh"], os.environ | job["environment"])
    for module in list(sys.modules.values()):
        if hasattr(module, "CHUNK") and str(getattr(module, "__file__", "")).startswith(str(HERE)):
            module.CHUNK = 32
    try:
        if job["program"] in PROGRAMS:
            changes = count_changes(job.get("change", math.inf))
            code = PROGRAMS[job["program"]](job["argv"])
            Path(job["folder"] + ".changes").write_text("\n".join(changes))
        else:
            report, code = globals()[job["program"]](Path(job["folder"]), *job["argv"]), 0
            Path(job["folder"]).with_name("report").write_text(json.dumps(report))
    except BaseException:  # noqa: BLE001, the child reports it and ends
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def count_changes(last: float) -> list[str]:
    """List this process's changes to files below its folder as they come; SIGKILL before number `last`."""
    kinds, changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}, []

    def hook(event: str, arguments: tuple) -> None:
        writing = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
        if not (writing or event in kinds) or not isinstance(arguments[0], (str, Path)):
            return
        if not os.path.isabs(arguments[0]):
            changes.append(f"{event} {arguments[0]}")
            if len(changes) == last:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    return changes


@pytest.fixture(scope="session")
def server() -> Iterator[Callable]:
    """run(job) -> (exit code, seconds), in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
    )

    def run(job: dict) -> tuple[int, float]:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    process.wait()


def results(folder: Path) -> dict:
    """What every file below `folder` holds, but for what a clock measured; no logs of a script.

    JSON and checkpoints by content: pickle writes one string twice or refers to it, as it came from a file or not.
    """

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in MEASURED}
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.detach().numpy().tobytes()
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    def read(path: Path):
        if path.suffix == ".pt":
            return plain(torch.load(path, weights_only=True))
        return plain(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    files = [path for path in sorted(folder.rglob("*")) if path.name not in ("log.txt", "commands.txt")]
    return {str(path.relative_to(folder)): path.is_dir() or read(path) for path in files}


DEMO = f"{RETUNE} --demo-images 240"
STAGES = {  # what runs, and whether the embeddings are there already
    "embedding": ("retune", f"{DEMO} --scenario label --epochs 3", False),
    "training": ("retune", f"{DEMO} --scenario label --epochs 20 --no-figures", True),
    "replay": ("retune", f"{DEMO} --scenario class --method replay --memory 30 --no-figures", True),
    "report": ("retune", f"{DEMO} --scenario joint --epochs 1", True),
    "workers": ("retune", f"{DEMO} --scenario joint --epochs 1 --no-figures --workers 2", False),
    "adaptor": ("adaptor", f"{ADAPTOR} --demo-images 150", False),
    "cleft": ("cleft", f"{CLEFT} --demo-images 300 --balanced 0", False),
    "export": ("cleft", f"{CLEFT} --demo-images 300".replace("all", "export") + " --to exported", False),
}  # fmt: skip
EVERYDAY = ("embedding", "adaptor", "cleft")


def kill_and_compare(server: Callable, job: dict, prepare: Callable, note: str) -> None:
    """Kill a job at a moment, restart it, kill it again, until it is done; compare with the uninterrupted one.

    Moments are times, and, where the program is ours, changes of files: the last change of each kind and name.
    """
    generator, whole, kills = np.random.default_rng(TIMES), prepare("whole"), 0
    code, duration = server(job | {"folder": str(whole)})
    assert code == 0, Path(f"{whole}.log").read_text()[-3000:]
    expected, moments = results(whole), [{"seconds": s} for s in generator.uniform(0, duration, TIMES)]
    if Path(f"{whole}.changes").exists():
        lines = Path(f"{whole}.changes").read_text().splitlines()
        last = generator.permutation(list({line: n for n, line in enumerate(lines, 1)}.values()))
        changes = [{"change": int(n)} for n in last[: 8 * TIMES]]
        moments = changes[:1] if TIMES == 1 else moments + changes  # restarts die at random times anyway
    for number, moment in enumerate(moments):
        folder, code, again = prepare(str(number)), -signal.SIGKILL, moment
        while code == -signal.SIGKILL:
            code, _ = server(job | {"folder": str(folder)} | again)
            again, kills = {"seconds": generator.uniform(0, 2 * duration)}, kills + (code != 0)
        said = Path(f"{folder}.log").read_text()
        assert code == 0 or "exported exists" in said, (
            moment,
            said[-3000:],
        )  # the export was whole when it died
        found = results(folder)
        differ = {name for name in expected | found if expected.get(name) != found.get(name)}
        assert not differ, (moment, lines[moment["change"] - 1] if "change" in moment else duration, differ)
        shutil.rmtree(folder)
    print(f"{note}: {kills} kills in {len(moments)} runs of {duration:.1f} s")


@pytest.mark.parametrize("stage", STAGES if TIMES > 1 else EVERYDAY)
def test_a_killed_program_ends_like_an_uninterrupted_one(server, encoder_folder, tmp_path, stage):
    """SIGKILL to the process group at any time and before any change of a file: nothing lost, nothing left."""
    program, arguments, warm = STAGES[stage]
    job = {"program": program, "argv": arguments.format(encoder=encoder_folder).split()}
    before = job | {"folder": str(tmp_path / "before")}
    os.mkdir(before["folder"])
    if warm or stage == "export":  # a run of other settings leaves its embeddings, or stage 1
        argv = [a for a in before["argv"] if a not in ("--to", "exported")]
        argv = [*argv, "--output", "other"] if warm else ["all", *argv[1:]]
        assert server(before | {"argv": argv})[0] == 0

    def prepare(name: str) -> Path:
        shutil.copytree(before["folder"], tmp_path / name)
        return tmp_path / name

    kill_and_compare(server, job, prepare, stage)


STAND_IN = """#!/usr/bin/env bash
name=$OUT/$(cksum <<<"$*" | tr ' ' -).txt
sleep 0.1; echo "$*" >$name.partial; sleep 0.05; mv $name.partial $name
"""


def test_a_killed_experiment_script_ends_like_an_uninterrupted_one(server, tmp_path):
    """With a stand-in for python, and the real one when there is time."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {"SEEDS": "27", "OUT": "results", "ONLY": "main order", "ORDERS": "1"}
    environment["PATH"] = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    real = environment | {"ONLY": "main", "OPTIONS": "--demo-images 200 --epochs 1 --workers 0"}
    real["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def prepare(name: str) -> Path:
        (tmp_path / name / "results").mkdir(parents=True)
        for file in ("run_experiments.sh", "retune.py", "tables.py"):
            (tmp_path / name / file).symlink_to(HERE / file)
        return tmp_path / name

    job = {"program": "script", "environment": environment}
    kill_and_compare(server, job, prepare, "script with a stand-in")
    if TIMES > 1:
        shutil.rmtree(tmp_path / "whole")
        kill_and_compare(server, job | {"environment": real}, prepare, "script")


# ------------------------------------------------------------------------------------------------ 2. Damaged files


def damage(generator: np.random.Generator, content: bytes) -> bytes:
    """Flip bits, cut, insert, double, delete or replace spans, fill with ones, write other numbers; up to 3 of it."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        near = (
            len(data) if generator.random() < 0.5 else min(len(data), 400)
        )  # half of all damage hits the head
        i, n = int(generator.integers(0, near + 1)), int(2 ** generator.uniform(0, 9))
        kind = generator.integers(8)
        if kind == 0:
            for k in generator.integers(0, len(data), 4) if data else ():
                data[k] ^= 1 << generator.integers(8)
        elif kind == 7 and (numbers := list(re.finditer(rb"\d+", data[: i + 4096]))):
            number = numbers[generator.integers(len(numbers))]
            other = (b"9" * 20, b"-1", b"1e999", b"NaN", b"0", b"", b"2147483648", b"[]", b'"', b"null")
            data[number.start() : number.end()] = other[generator.integers(len(other))]
        else:
            replaced = {1: len(data), 4: n, 5: n, 6: 4}.get(kind, 0)
            new = {2: generator.bytes(n), 3: data[i : i + n] * 2, 5: generator.bytes(n), 6: b"\xff" * 4}
            data[i : i + replaced] = new.get(kind, b"")
    return bytes(data)


def damage_inside(generator: np.random.Generator, name: str, content: bytes) -> bytes:
    """Damage what a checksum, a compression or a length of a header protects, and make those right again."""
    if name.endswith(".gz"):
        return gzip.compress(damage(generator, gzip.decompress(content)), 1)
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            members = {member: old.read(member) for member in old.namelist()}
        chosen = list(members)[generator.integers(len(members))]
        members[chosen] = damage(generator, members[chosen])
        return zipped(members)
    if name.endswith(".safetensors"):
        header = damage(generator, content[8 : 8 + int.from_bytes(content[:8], "little")])
        return (
            len(header).to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]
        )
    if name.endswith(".png"):
        chunks, place = [], 8
        while place < len(content):
            n = int.from_bytes(content[place : place + 4], "big")
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + n]))
            place += 12 + n
        i = generator.integers(len(chunks))
        chunks[i] = chunks[i][0], damage(generator, chunks[i][1])
        return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)
    return damage(generator, content)


def damage_outside(generator: np.random.Generator, name: str, content: bytes) -> bytes:
    return damage(generator, content)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zipped(members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(output := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return output.getvalue()


@contextlib.contextmanager
def memory(gigabytes: float) -> Iterator[None]:
    """Let this process take so much more address space at most; what needs more ends with MemoryError."""
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


CASES: dict[str, Callable] = {}  # name: (folder, encoder) -> (valid files, what reads them)


def case(make: Callable) -> Callable:
    CASES[make.__name__.removeprefix("case_")] = make
    return make


def load(folder: Path, name: str, **options) -> retune.Radiographs:
    cache = shutil.rmtree(folder / "cache", ignore_errors=True) or str(folder / "cache")
    return retune.load_radiographs(retune.Config(data=name, data_dir=str(folder), cache_dir=cache, **options))


@case
def case_csv(folder, encoder):
    write_set(folder / "data")
    return [folder / "data/labels.csv"], lambda: load(folder / "data", "csv")


@case
def case_nih(folder, encoder):
    lines = [f"{i:03d}.png,{'Mass|Hernia' if i % 2 else 'No Finding'},{i // 2}" for i in range(60)]
    (folder / "Data_Entry_2017.csv").write_text("\n".join(["Image Index,Finding Labels,Patient ID", *lines]))
    for name, rows in (("train_val", range(40)), ("test", range(40, 60))):
        (folder / f"{name}_list.txt").write_text("\n".join(f"{i:03d}.png" for i in rows))
    files = [folder / name for name in ("Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt")]
    return files, lambda: load(folder, "nih")


@case
def case_chexpert(folder, encoder):
    findings = public_data.COMPETITION_FINDINGS
    for k, (name, part) in enumerate((("train", "train"), ("valid", "valid"), ("test_labels", "test"))):
        rows = [
            f"CheXpert-v1.0/{part}/patient{k}{i:04d}/study1/view1_frontal.jpg,Frontal,1.0,0.0,-1.0,,1"
            for i in range(9)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["Path,Frontal/Lateral," + ",".join(findings), *rows]))
    return sorted(folder.glob("*.csv")), lambda: load(folder, "chexpert", view="frontal")


@case
def case_mimic(folder, encoder):
    parts, rows = ("train", "validate", "test"), range(18)
    tables = {
        "chexpert": [
            "study_id," + ",".join(public_data.COMPETITION_FINDINGS),
            *(f"{i},1.0,0.0,-1.0,,1" for i in rows),
        ],
        "split": ["dicom_id,study_id,subject_id,split", *(f"d{i},{i},1{i:03d},{parts[i % 3]}" for i in rows)],
        "metadata": ["dicom_id,ViewPosition", *(f"d{i},PA" for i in rows)],
    }
    for name, lines in tables.items():
        with gzip.open(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt") as file:
            file.write("\n".join(lines))
    return sorted(folder.glob("*.gz")), lambda: load(folder, "mimic", view="frontal")


@case
def case_npz(folder, encoder):
    arrays = {
        f"{part}_images": np.full((n, 28, 28), n, np.uint8)
        for part, n in (("train", 4), ("val", 2), ("test", 3))
    }
    arrays |= {
        f"{part}_labels": np.zeros((n, 14), np.uint8) for part, n in (("train", 4), ("val", 2), ("test", 3))
    }
    np.savez(folder / "chestmnist.npz", **arrays)
    return [folder / "chestmnist.npz"], lambda: load(folder, "chestmnist", size=28)


@case
def case_masks(folder, encoder):
    from segmentation import find_masks, load_masked

    for i in range(30):
        Image.new("L", (16, 16)).save(folder / f"{i}.png")
    runs = [f"{i},{'-1' if i % 2 else '3 4 10 2'}" for i in range(30)]
    boxes = [f"{i},{',,,,0' if i % 2 else '1,2,3.5,4,1'}" for i in range(30)]
    (folder / "rle.csv").write_text("\n".join(["ImageId,EncodedPixels", *runs]))
    (folder / "train_labels.csv").write_text("\n".join(["patientId,x,y,width,height,Target", *boxes]))

    def read():
        for name in ("siim", "rsna"):
            data = load_masked(config := adaptor.Config(data=name, data_dir=str(folder)))
            masks = find_masks(config, data)
            assert all(masks(i).shape == (1, 16, 16) for i in range(len(data.images)))

    return [folder / "rle.csv", folder / "train_labels.csv"], read


@case
def case_mammograms(folder, encoder):
    images = [f"p{i},a{i},images/{i}.dcm,L,CC,2D" for i in range(40)]
    names = "empi_anon,acc_anon,anon_dicom_path,ImageLateralityFinal,ViewPosition,FinalImageType"
    (folder / "metadata.csv").write_text("\n".join([names, *images]))
    (folder / "clinical.csv").write_text(
        "\n".join(
            [
                "acc_anon,side,asses,tissueden",
                *(f"a{i},L,{'NBAPSMK'[i % 7]},{i % 4 + 1}.0" for i in range(40)),
            ]
        )
    )
    config = retune.Config(data_dir=str(folder))
    return [folder / "metadata.csv", folder / "clinical.csv"], lambda: downstream.load_embed(config)


@case
def case_prompts(folder, encoder):
    shutil.copy(HERE / "prompts.json", folder)
    names = ("Edema", "Pleural Effusion", "Other")

    def read():
        retune.embed_prompts(encoder, retune.load_prompts(folder / "prompts.json", names))

    return [folder / "prompts.json"], read


@case
def case_images(folder, encoder):
    generator = np.random.default_rng(0)
    grey, color = (
        generator.integers(0, 256, (40, 36), np.uint8),
        generator.integers(0, 256, (40, 36, 3), np.uint8),
    )
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 99).save(folder / "deep.png")
    Image.fromarray(color).convert("P").save(folder / "palette.png")
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(color).save(folder / "color.jpg", progressive=True)
    files = sorted(folder.iterdir())

    def read():
        for path in files:
            pixels = retune.read_image(path)
            assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) in (1, 3)
            assert encoder.transform(pixels).shape == (3, 16, 16)

    return files, read


@case
def case_dicom(folder, encoder):
    pytest.importorskip("pydicom")
    for name, little in (("explicit", False), ("implicit", True)):
        write_dicom(folder / f"{name}.dcm", implicit=little)
    files = sorted(folder.iterdir())
    return files, lambda: [encoder.transform(retune.read_image(path)) for path in files]


def write_dicom(path: Path, implicit=False, **changes) -> Path:
    """A DICOM file of 6 x 4 pixels of 12 bits, with other elements as given."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    image = pydicom.Dataset()
    image.file_meta = FileMetaDataset()
    syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.TransferSyntaxUID = changes.pop("syntax", syntax)
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = "1.2.3"
    image.Rows, image.Columns, image.SamplesPerPixel, image.PixelRepresentation = 6, 4, 1, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PhotometricInterpretation = "MONOCHROME2"
    image.PixelData = np.random.default_rng(2).integers(100, 3000, (6, 4)).astype(np.uint16).tobytes()
    for name, value in changes.items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)
    return path


@case
def case_adaptors(folder, encoder):
    options = f"{RETUNE} --demo-images 60 --scenario joint --epochs 1 --no-figures"
    assert retune.main(options.format(encoder=encoder.folder).split()) == 0
    Image.new("L", (20, 20)).save(folder / "a.png")
    config = retune.Config(encoder=str(encoder.folder), device="cpu")
    return [folder / "run/adaptors.safetensors"], lambda: retune.predict(
        [folder / "a.png"], folder / "run", config
    )


@case
def case_resume(folder, encoder):
    def start():
        model = retune.RETune(4)
        return model, torch.optim.Adam(model.parameters())

    def step(model, optimizer):
        bank = retune.PromptBank(torch.ones(2, 4), torch.arange(2))
        retune.prompt_contrastive_loss(model.logits(torch.randn(3, 4), bank), torch.ones(3, 1)).backward()
        optimizer.step()

    def read():
        model, optimizer = start()
        retune.restore(folder, model, optimizer)
        step(model, optimizer)

    step(*(trained := start()))
    retune.keep(folder, *trained, 1, 2.0)
    return [folder / "resume.safetensors"], read


@case
def case_encoder(folder, encoder):
    shutil.copytree(encoder.folder, folder / "encoder")

    def read():
        damaged = retune.DualEncoder.load(str(folder / "encoder"))
        damaged.encode_texts(["no edema", "there is edema"])
        damaged.encode_images(damaged.transform(torch.zeros(1, 20, 30, dtype=torch.uint8))[None])

    return sorted((folder / "encoder").iterdir()), read


@case
def case_pickles(folder, encoder):
    tensors = {"visual.trunk.blocks.0.attn.qkv.weight": torch.ones(6, 2), "logit_scale": torch.tensor(1.0)}
    for name, new in (("new", True), ("old", False)):
        (folder / name).mkdir()
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    files = sorted(folder.rglob("*.bin"))
    return files, lambda: [public_encoders.read_weights(path.parent, "*.bin") for path in files]


@case
def case_checkpoint(folder, encoder):
    class Learner(torch.nn.Linear):
        def learned(self):
            return dict(self.named_parameters())

    def start():
        model = Learner(4, 3)
        return model, torch.optim.AdamW(model.parameters())

    def read():
        model, optimizer = start()
        towers.restore(folder / "stage1.pt", model, optimizer)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    model, optimizer = start()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save(
        {"step": 3, "model": model.learned(), "optimizer": optimizer.state_dict()}, folder / "stage1.pt"
    )
    return [folder / "stage1.pt"], read


def noise(n: int = 32) -> retune.Radiographs:
    """n images of noise, one a patient, in all splits, with labels of both values."""
    generator = np.random.default_rng(0)
    labels, split = (
        np.arange(2 * n).reshape(n, 2) // 2 % [2, 3] == 1,
        np.resize(["train", "train", "val", "test"], n),
    )
    images = generator.integers(0, 256, (n, 16, 16), np.uint8)
    return retune.Radiographs(images, labels, ("Edema", "Mass"), [f"p{i}" for i in range(n)], split)


@case
def case_cache(folder, encoder):
    def read():
        found = retune.embed(encoder, noise(), folder)
        facts = retune.embedding_facts(found)
        assert np.isfinite(found).all() and facts["seconds"] > 0 and not facts["unreadable"]

    read()
    return sorted(folder.rglob("*.*")), read


@case
def case_chunk(folder, encoder):
    def read():
        for name in ("embeddings.npy", "facts.json"):
            (chunk.parent / name).unlink(missing_ok=True)
        assert np.isfinite(retune.embed(encoder, noise(), folder)).all()

    chunk = Path(retune.embed(encoder, noise(), folder).filename).with_name("chunk-000000000.npy")
    options = (np.dtype(np.float32), 32, 0, "fp32", "cpu", False)
    retune.embed_chunks(encoder, noise(), {chunk: range(32)}, *options)
    return [chunk], read


@case
def case_config(folder, encoder):
    retune.write_json(folder / "config.json", {"seed": 3, "classes": ["a", "b"], "prompts": {"a": ["b"]}})
    return [folder / "config.json"], lambda: retune.claim(folder, {"seed": 3, "classes": ["a", "b"]})


def read_damaged(folder: Path, encoder_folder: str, name: str, first: int, count: int) -> dict:
    """Damage a case's files `count` times; {"refused": number, "bugs": {place: example}}. Notes how far it is."""
    encoder = retune.DualEncoder.load(encoder_folder)
    encoder.folder = encoder_folder
    files, read = CASES[name](folder, encoder)
    valid, bugs, refused = {file: file.read_bytes() for file in files}, {}, 0
    read()
    with memory(3):
        for i in range(first, count):
            (folder.parent / "at").write_text(str(i))
            generator = np.random.default_rng((TIMES, i))
            for file, content in valid.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            victim = files[generator.integers(len(files))]
            change = damage_inside if generator.random() < 0.6 else damage_outside
            victim.write_bytes(change(generator, victim.name, valid[victim]))
            try:
                read()
            except retune.InputError as error:
                refused += 1
                assert str(error), "an error without words"
            except Exception as error:  # noqa: BLE001, every other type is a bug
                place = traceback.extract_tb(error.__traceback__)
                ours = [
                    f for f in place if f.filename.startswith(str(HERE)) and "test" not in f.filename
                ] or place
                key = f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}"
                bugs.setdefault(key, f"input {i}, {victim.name}: {error!r}"[:400])
    return {"refused": refused, "bugs": bugs}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_read_or_refused_by_an_input_error(name, server, encoder_folder, tmp_path):
    """In another process, since a decoder may end its process."""
    count, first, bugs, refused = 20 * TIMES, 0, {}, 0
    while first < count and len(bugs) < 9:
        (folder := tmp_path / str(first) / name).mkdir(parents=True)
        job = {
            "program": "read_damaged",
            "argv": [str(encoder_folder), name, first, count],
            "folder": str(folder),
        }
        code, _ = server(job)
        assert code <= 0, Path(f"{folder}.log").read_text()[-3000:]
        if code == 0:
            report = json.loads((folder.parent / "report").read_text())
            bugs, refused, first = bugs | report["bugs"], refused + report["refused"], count
        else:
            first = int((folder.parent / "at").read_text()) + 1
            bugs[f"input {first - 1}"] = f"the process died by signal {-code}"
    print(f"{name}: {count} damaged files, {refused} refused, {len(bugs)} bugs")
    assert not bugs, "\n".join(f"{key}: {value}" for key, value in bugs.items())


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def object_array(evil: Evil) -> bytes:
    np.save(output := io.BytesIO(), np.array([evil], object), allow_pickle=True)
    return output.getvalue()


@pytest.mark.parametrize("name", ["pickles", "checkpoint", "npz", "chunk", "cache", "encoder"])
def test_no_file_runs_code(name, encoder, encoder_folder, tmp_path):
    encoder.folder, evil = encoder_folder, Evil(tmp_path / "executed")
    (tmp_path / "files").mkdir()
    files, read = CASES[name](tmp_path / "files", encoder)
    contents = [pickle.dumps(evil), pickle.dumps({"model": evil}), object_array(evil)]
    torch.save({"model": {"a": evil}}, output := io.BytesIO())
    contents += [
        output.getvalue(),
        zipped({f"{part}_labels.npy": contents[2] for part in ("train", "val", "test")}),
    ]
    code = f"import os; os.mkdir({str(evil.folder)!r})\nclass A: pass\n"
    contents += [
        json.dumps(
            {"auto_map": {k: "code.A" for k in ("AutoTokenizer", "AutoModel")}, "tokenizer_class": "A"}
        ).encode()
    ]
    valid = {file: file.read_bytes() for file in files}
    for file in files:
        for content in contents:
            for path, whole in valid.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(whole)
            file.write_bytes(content)
            (file.parent / "code.py").write_text(code)
            with contextlib.suppress(retune.InputError):
                read()
            (file.parent / "code.py").unlink()
            assert not evil.folder.exists(), (file, content[:80])
    pickle.loads(contents[0])
    assert evil.folder.exists()


def huge_png(folder):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = (
        png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9999))) + png_chunk(b"IEND", b"")
    )
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return lambda: retune.read_image(folder / "a.png")


def huge_jpeg(folder):
    Image.new("L", (16, 16)).save(output := io.BytesIO(), "JPEG")
    content = output.getvalue()
    place = content.index(b"\xff\xc0") + 5
    (folder / "a.jpg").write_bytes(content[:place] + b"\xff\xdc\xff\xdc" + content[place + 4 :])
    return lambda: retune.read_image(folder / "a.jpg")


def animated_gif(folder):
    frames = [Image.new("L", (999, 999), i) for i in range(20)]
    frames[0].save(folder / "a.png", "GIF", save_all=True, append_images=frames[1:])
    return lambda: retune.read_image(folder / "a.png")


def many_frames(folder):
    pytest.importorskip("pydicom")
    write_dicom(folder / "a.dcm", NumberOfFrames=1000, PixelData=bytes(48_000))
    return lambda: retune.read_image(folder / "a.dcm")


def deflated_dicom(folder):
    syntax = pytest.importorskip("pydicom").uid.DeflatedExplicitVRLittleEndian
    write_dicom(folder / "a.dcm", syntax=syntax, PatientComments="0" * 999_999)
    return lambda: retune.read_image(folder / "a.dcm")


def endless_table(folder):
    with gzip.open(folder / "labels.csv.gz", "wb", 1) as file:
        for _ in range(3000 if TIMES > 1 else 20):
            file.write(bytes(1 << 20))
    return lambda: retune.read_table(folder / "labels.csv.gz")


def long_cell(folder, column=1):
    rows = [f"{i}.png,p{i},train,1" for i in range(20_000)]
    cells = rows[9].split(",")
    cells[column] = "7" * 130_000
    (folder / "labels.csv").write_text(
        "\n".join(["path,patient,split,Edema", *rows[:9], ",".join(cells), *rows[10:]])
    )
    return lambda: load(folder, "csv")


def endless_labels(folder):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**10, 14)}
    )
    (folder / "chestmnist.npz").write_bytes(zipped({"train_labels.npy": header.getvalue() + bytes(999)}))
    return lambda: load(folder, "chestmnist", size=28)


def endless_images(folder):
    _, read = case_npz(folder, None)
    with zipfile.ZipFile(folder / "chestmnist.npz") as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["train_images.npy"] += bytes(50_000_000)
    (folder / "chestmnist.npz").write_bytes(zipped(members))
    return read


BOMBS = {  # what makes it, and what the refusal must name
    "png": (huge_png, "limit"),
    "jpeg": (huge_jpeg, "limit"),
    "gif": (animated_gif, "identify"),
    "dicom of many frames": (many_frames, "grey image"),
    "deflated dicom": (deflated_dicom, "deflated"),
    "gzipped table": (endless_table, "unpacks"),
    "patient": (long_cell, "characters"),
    "label": (lambda folder: long_cell(folder, 3), "7777"),
    "npz of labels": (endless_labels, "labels"),
    "npz of images": (endless_images, "images"),
}


def read_bomb(folder: Path, name: str) -> list:
    """[type, text] of the error that reading a bomb raises."""
    for module in list(sys.modules.values()):  # a table's limit that takes no minute to exceed
        if hasattr(module, "MAX_TABLE") and TIMES == 1:
            module.MAX_TABLE = 8 << 20
    read = BOMBS[name][0](folder)
    with memory(2):
        try:
            read()
        except Exception as error:  # noqa: BLE001, its type is what the test looks at
            return [type(error).__name__, str(error)]
    return ["no error", ""]


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_would_fill_the_memory_are_refused(name, server, tmp_path):
    (folder := tmp_path / "bomb").mkdir()
    code, _ = server({"program": "read_bomb", "argv": [name], "folder": str(folder)})
    assert code == 0, Path(f"{folder}.log").read_text()[-3000:]
    kind, text = json.loads((tmp_path / "report").read_text())
    assert kind == "InputError" and re.search(BOMBS[name][1], text) and len(text) < 1000, (kind, text[:300])
    assert not [
        path for path in (folder / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    ]


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: ("path,Edema\n" + text).encode("utf-8", "replace"))
)
@quick
def test_any_text_is_a_table_or_an_input_error(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "labels.csv").write_bytes(content)
        with contextlib.suppress(retune.InputError):
            table = retune.read_table(Path(folder, "labels.csv"))
            assert len({len(column) for column in table.values()}) <= 1
        with contextlib.suppress(retune.InputError):
            load(Path(folder), "csv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["edema", "{finding}", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["default", "edema", "positive", "negative"]) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
@quick
def test_any_json_is_prompts_or_an_input_error(encoder, value):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "prompts.json").write_text(json.dumps(value))
        with contextlib.suppress(retune.InputError):
            prompts = retune.load_prompts(Path(folder, "prompts.json"), ["Edema", "Mass"])
            assert retune.embed_prompts(encoder, prompts).groups == 4


@given(
    st.text(max_size=20)
    | st.lists(
        st.sampled_from(["..", ".", "/", "\\", "in", "out", "C:", "~", "\0", "", "loop", "a.png"])
    ).map("".join)
)
@quick
def test_no_path_of_a_file_leaves_the_root(relative):
    with tempfile.TemporaryDirectory() as folder:
        root, outside = Path(folder, "root"), Path(folder, "outside")
        (root / "in").mkdir(parents=True)
        outside.mkdir()
        (root / "out").symlink_to(outside)
        (root / "loop").symlink_to(root / "loop")
        with contextlib.suppress(retune.InputError):
            found = retune.safe_path(root, relative, "row 2")
            assert Path(os.path.realpath(found)).is_relative_to(os.path.realpath(root)), found


# -------------------------------------------------------------------------------------------- 3. Degenerate numbers


def learn(
    embeddings: np.ndarray, labels: np.ndarray, adaptor: str = "mlp", pool: str = "mean", scenario="class"
) -> dict:
    """Train on all rows and measure on the same; weights must be finite and scores in [0, 1]."""
    (n, dim), classes = embeddings.shape, labels.shape[1]
    names, patients = [f"c{c}" for c in range(classes)], [f"p{i}" for i in range(n)]
    with retune.seeded(0):
        model = retune.RETune(dim, adaptor, pool=pool, logit_scale=10)
        bank = retune.PromptBank(torch.randn(2 * classes, dim), torch.arange(2 * classes))
    optimizer, grid = torch.optim.Adam(model.parameters(), 1e-2), []
    tasks = retune.make_tasks(scenario, labels, names, None, 0, patients)

    def measure(model: torch.nn.Module) -> dict:
        scores, decisions = retune.score_rows(model, bank, embeddings, np.arange(n), "diff")
        measured = retune.evaluate(scores, decisions, labels, names)
        assert np.isfinite(scores).all() and (scores >= -1e-6).all() and (scores <= 1 + 1e-6).all()
        return measured | {"ci": retune.bootstrap_ci(scores, labels, patients, 50)}

    for task in tasks:
        options = {"epochs": 1, "batch_size": 4, "generator": torch.Generator().manual_seed(0)}
        retune.fit(model, bank, embeddings, torch.from_numpy(labels), task, optimizer, **options)
        assert all(p.isfinite().all() for p in model.parameters())
        grid.append(list((measured := measure(model))["auroc"].values()))
    zero = list(measure(retune.RETune(dim, adapt="none", pool=pool))["auroc"].values())
    return measured | {"continual": retune.continual_metrics(np.array(grid), tasks, np.array(zero))}


EMBEDDINGS = {
    "constant": np.ones((12, 6)), "zeros": np.zeros((12, 6)), "one zero": np.eye(12, 6), "float16 max": np.full((12, 6), 65504.0),
    "1e15": np.random.default_rng(0).normal(size=(12, 6)) * 1e15, "1e30": np.random.default_rng(0).normal(size=(12, 6)) * 1e30,
    "1e-30": np.random.default_rng(0).normal(size=(12, 6)) * 1e-30, "float32 max": np.full((12, 6), 3.4e38),
}  # fmt: skip


@pytest.mark.parametrize("adaptor_kind, pool", [("mlp", "mean"), ("linear", "single"), ("residual", "max")])
@pytest.mark.parametrize("values", EMBEDDINGS)
def test_any_embeddings_give_finite_weights_and_metrics_or_an_input_error(values, adaptor_kind, pool):
    embeddings = EMBEDDINGS[values].astype(np.float32)
    labels = np.resize(np.float32([[0, 1], [1, 0], [1, 1]]), (12, 2))
    try:
        measured = learn(embeddings, labels, adaptor_kind, pool)
    except retune.InputError as error:
        assert values in ("1e30", "float32 max"), error
        return
    assert all(math.isfinite(measured[key]) for key in ("auroc_macro", "ap_macro", "f1_macro", "accuracy"))
    if len(np.unique(embeddings, axis=0)) == 1:
        assert measured["auroc_macro"] == 0.5, "equal images cannot be told apart"


def test_an_encoder_of_huge_numbers_is_refused(encoder, tmp_path):
    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.image.head[0].weight.mul_(1e25)
    with pytest.raises(retune.InputError, match="row 2"):
        retune.embed(broken, noise(), tmp_path)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=min(20 * TIMES, 600), deadline=None)
def test_no_metric_is_made_up(n, classes, seed):
    """Any labels: a class is scored if and only if both its values occur; means exist if and only if one is."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.float32([0, 1, math.nan]), (n, classes))
    embeddings = generator.normal(size=(n, 4)).astype(np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = learn(embeddings, labels, scenario="joint")
    scored = [c for c in range(classes) if {0, 1} <= set(labels[:, c])]
    assert {f"c{c}" for c in scored} == {
        name for name, value in measured["auroc"].items() if not math.isnan(value)
    }
    named = {str(w.message).split(":")[0] for w in caught if "all alike" in str(w.message)}
    assert named == {f"c{c}" for c in range(classes)} - {f"c{c}" for c in scored}
    for key in ("auroc_macro", "auroc_weighted", "f1_macro", "f1_weighted", "ap_macro"):
        assert math.isfinite(measured[key]) == bool(scored), key
    assert math.isnan(measured["ci"][0]) == (not scored) and math.isfinite(
        measured["continual"]["average_auroc"]
    ) == bool(scored)


def small(images: int, split: list[str], labels, patients=None) -> retune.Radiographs:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 16, 16), np.uint8)
    labels = np.array(labels, np.float32)
    names = tuple(f"Finding {c}" for c in range(labels.shape[1]))
    return retune.Radiographs(pixels, labels, names, patients or [f"p{i}" for i in range(images)], split)


THREE = ["train", "val", "test"]
SETS = {
    "one image a split": small(3, THREE, [[1, 0], [0, 1], [1, 1]]),
    "one class": small(12, THREE * 4, np.arange(12).reshape(12, 1) // 3 % 2),
    "one patient a split": small(12, THREE * 4, np.arange(24).reshape(12, 2) // 6 % 2, THREE * 4),
    "all unknown": small(6, THREE * 2, np.full((6, 2), math.nan)),
    "all positive": small(6, THREE * 2, np.ones((6, 2))),
}


@pytest.mark.parametrize("name", SETS)
def test_smallest_sets_run_to_the_end_with_null_for_what_does_not_exist(name, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in ("retune", "replay", "ewc", "lwf"):
        config = retune.Config(
            scenario="joint", epochs=1, output=f"run-{method}", workers=0, method=method, device="cpu"
        )
        metrics = retune.run(config, lambda _: SETS[name], lambda *_: encoder).metrics
        values = metrics["after_task"][0]["test"]
        exists = name in ("one class", "one patient a split")
        assert [values[key] is not None for key in ("auroc_macro", "f1_macro", "ap_macro")] == [exists] * 3
        assert (values["auroc_macro_ci"] == [None, None]) == (not exists)
        assert json.loads(Path(f"run-{method}/metrics.json").read_text()) == metrics
        for file in Path(f"run-{method}").glob("*.safetensors"):
            assert all(t.isfinite().all() for t in retune.load_tensors(file)[0].values())
    config = retune.Config(scenario="data", parts=9, output="parts", workers=0, device="cpu")
    with pytest.raises(retune.InputError, match="--parts 9"):
        retune.run(config, lambda _: SETS[name], lambda *_: encoder)


def test_a_thousand_classes(tmp_path):
    generator, names = np.random.default_rng(0), [f"c{c}" for c in range(1000)]
    labels = generator.integers(0, 2, (20, 1000 if TIMES > 1 else 60)).astype(np.float32)
    measured = learn(generator.normal(size=(20, 8)).astype(np.float32), labels, scenario="joint")
    assert len(measured["auroc"]) == labels.shape[1] and 0.4 < measured["auroc_macro"] <= 1
    split = {"auroc": dict.fromkeys(names, 0.7)}
    metrics = {
        "config": {"data": "csv", "encoder": "tiny", "scenario": "class", "adaptor": "mlp"},
        "classes": names,
    }
    metrics |= {
        "tasks": [{"name": "part"}] * 5,
        "zero_shot": {"test": split},
        "after_task": [{"test": split}] * 5,
    }
    with memory(3):
        retune.heatmap(tmp_path / "auroc.png", metrics, "auroc", "test AUROC")
    with Image.open(tmp_path / "auroc.png") as picture:
        assert max(picture.size) < 30_000


# ------------------------------------------------------------------------------ 4. Privacy, paths and determinism


def fill(template: str, **values) -> list[str]:
    """The arguments of a template, whose values may hold spaces."""
    return [argument.format(**values) if "{" in argument else argument for argument in template.split()]


def run_everything(home: Path, encoder: Path, data: Path, run: Callable, workers: str) -> None:
    """All programs and baselines with results below `home`: two of five tasks of each, models, exports."""
    place = {"encoder": encoder, "data": data, "home": home}
    methods = "retune linear mlp ewc lwf replay joint"
    common = f"--data csv --data-dir {{data}} --workers {workers} --device cpu --cache-dir {{home}}/cache"
    both = "--image-encoder {encoder} --text-encoder {encoder}"
    retune_options = (
        f"{common} --encoder {{encoder}} --epochs 2 --scenario class --memory 10 --method {methods}"
    )
    assert run("retune", [*fill(retune_options, **place), "--output", f"{home}/{{method}}"]) == 0
    stages = "--stages retrieval classification --export {home}/pair --data csv --data-dir {data}"
    argv = fill(
        f"{ADAPTOR.split('--workers')[0]} {both} {common} --output {{home}}/adaptor {stages}", **place
    )
    assert run("adaptor", argv) == 0
    argv = fill(
        f"{CLEFT.split('--output')[0]} {common} --output {{home}}/cleft --truncate --balanced 0", **place
    )
    assert run("cleft", argv) == 0
    assert run("cleft", ["export", *argv[1:], "--to", f"{home}/exported"]) == 0


@pytest.fixture(scope="session")
def places(encoder_folder, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(home of results, encoder, data): names with spaces, umlauts and Chinese, two of them behind links."""
    root = tmp_path_factory.mktemp("places") / "Ordner mit Ä ü 影像"
    (root / "echte Ergebnisse").mkdir(parents=True)
    (root / "Ergebnisse ß").symlink_to(root / "echte Ergebnisse")
    write_set(root / "echte Daten")
    (root / "Daten 胸部").symlink_to(root / "echte Daten")
    shutil.copytree(encoder_folder, root / "Kodierer é")
    return root / "Ergebnisse ß", root / "Kodierer é", root / "Daten 胸部"


@pytest.fixture(scope="session")
def everything(places) -> Path:
    """The folder with the results of all programs, run in this process."""
    home, encoder, data = places
    run_everything(home, encoder, data, lambda program, argv: PROGRAMS[program](argv), "0")
    return home


def models(home: Path) -> dict[str, bytes]:
    """The content of every file below `home` that somebody may publish as a model."""
    kinds = (".safetensors", ".pt")
    inside = [p for p in home.rglob("*") if p.suffix in kinds or p.parent.name in ("pair", "exported")]
    return {str(path.relative_to(home)): path.read_bytes() for path in inside if path.is_file()}


def test_paths_with_spaces_other_scripts_and_links_serve_all_programs(everything):
    names = {path.split("/")[0] for path in models(everything)}
    assert names == {
        "retune",
        "linear",
        "mlp",
        "ewc",
        "lwf",
        "replay",
        "joint",
        "adaptor",
        "pair",
        "cleft",
        "exported",
    }
    assert not [path for path in everything.rglob("*") if "partial" in path.name or "resume" in path.name]


def secrets(places, home: Path) -> Iterator[bytes]:
    """What no model may hold: texts of patients, rows of pixels, labels, 3 neighbouring numbers of an embedding."""
    table = retune.read_table(places[2] / "labels.csv")
    yield from (
        text.encode() for text in {*table["patient"], *table["path"], *table["report"], "Kowalski", "ärztin"}
    )
    for name in table["path"]:
        pixels = np.asarray(Image.open(places[2] / name))
        yield from (pixels[k, :12].tobytes() for k in range(0, 40, 4))
    for column in ("Edema", "Mass"):
        labels = np.array(table[column], np.float32)
        for some in (labels, labels[np.array(table["split"]) == "train"]):
            yield from (
                some[:24].astype(kind).tobytes() for kind in (np.uint8, np.int64, np.float32, np.float64)
            )
    for file in home.glob("cache/*/embeddings.npy"):
        for row in np.load(file):
            for kind in (np.float16, np.float32, np.float64):
                some = row.astype(kind)
                unit = (row / np.linalg.norm(row.astype(np.float32))).astype(kind)
                yield from (x[k : k + 3].tobytes() for x in (some, unit) for k in range(0, len(some) - 2, 5))


def test_no_model_of_any_program_holds_anything_of_a_patient(places, everything):
    found, hidden = models(everything), {secret for secret in secrets(places, everything) if any(secret)}
    assert len(found) > 25 and len(hidden) > 3000
    leaks = {name: secret for name, content in found.items() for secret in hidden if secret in content}
    assert not leaks


def test_a_tokenizer_learns_no_rare_word_of_the_reports(tmp_path):
    reports = [f"lungs are clear, seen by dr okonkwo{i}" for i in range(40)]
    tokenizer = towers.text_part(cleft.settle(cleft.Config(text="small")), reports)[1]
    tokenizer.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    assert "clear" in content and "okonkwo" not in content.lower()


def test_another_process_with_other_workers_gives_the_same_bytes(places, everything, server, tmp_path):
    def run(program: str, argv: list[str]) -> int:
        code, _ = server({"program": program, "argv": argv, "folder": str(tmp_path)})
        assert code == 0, Path(f"{tmp_path}.log").read_text()[-3000:]
        return code

    run_everything(tmp_path / "again", places[1], places[2], run, "2")
    first, second = models(everything), models(tmp_path / "again")
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]


def test_workers_that_are_spawned_give_the_same_bytes(places, everything, tmp_path):
    """As on macOS and Windows, where a worker imports the program anew."""
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
    )
    options = "--data csv --data-dir {data} --encoder {encoder} --epochs 2 --scenario class --workers {workers} --device cpu"
    values = {"data": places[2], "encoder": places[1], "workers": 1 if TIMES == 1 else 2}
    argv = fill(f"{options} --cache-dir cache --output run --no-figures", **values)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(HERE / "retune.py"), *argv]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for file in sorted((everything / "retune").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "run" / file.name).read_bytes(), file.name


# ------------------------------------------------------------------------------------------------------- 5. Scale


def load_large_table(folder: Path) -> dict:
    """Load a CSV of 100,000 images; seconds and the growth of peak memory."""
    lines = (f"p{i // 3 % 999}/{i:06d}.png,p{i // 3},{i % 2},{i % 3 // 2},-1,,1" for i in range(100_000))
    (folder / "labels.csv").write_text("\n".join(["path,patient,A,B,C,D,E", *lines]))
    before, start = retune.peak_memory_mb(), time.perf_counter()
    data = load(folder, "csv")
    assert data.labels.shape == (100_000, 5) and len(np.unique(data.patients)) == 33_334
    return {"seconds": time.perf_counter() - start, "megabytes": retune.peak_memory_mb() - before}


def train_on_a_million(folder: Path) -> dict:
    """Train two tasks on a memory map of 1,000,000 x 128 numbers and measure on 200,000; seconds and memory."""
    n, dim, generator = 1_000_000, 128, np.random.default_rng(0)
    stored = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (n, dim))
    for i in range(0, n, 10_000):
        stored[i : i + 10_000] = generator.normal(size=(10_000, dim))
    stored.flush()
    embeddings, labels = np.load(folder / "x.npy", mmap_mode="r"), np.zeros((n, 5), np.float32)
    labels[:] = np.asarray(stored[:, :5]) > 1
    del stored
    patients = np.array([f"p{i // 4}" for i in range(n)])
    split = np.resize(["train"] * 7 + ["val"] + ["test"] * 2, n // 4).repeat(4)
    data = retune.Radiographs(
        np.broadcast_to(np.uint8(0), (n, 1, 1)), labels, tuple("ABCDE"), patients, split
    )
    model = retune.RETune(dim)
    bank, rows = retune.PromptBank(torch.randn(10, dim), torch.arange(10)), data.where("train")
    before, start = retune.peak_memory_mb(), time.perf_counter()
    tasks = retune.make_tasks("data", labels[rows], data.class_names, 2, 0, patients[rows])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for task in tasks:
        task = dataclasses.replace(task, rows=rows[task.rows])
        options = {"epochs": 1, "batch_size": 6144, "generator": torch.Generator().manual_seed(0)}
        retune.fit(model, bank, embeddings, torch.from_numpy(labels), task, optimizer, **options)
    trained, seconds = retune.peak_memory_mb() - before, time.perf_counter() - start
    metrics = retune.measure_split(model, bank, embeddings, data, "test", "diff")
    found = {"train_seconds": seconds, "train_megabytes": trained, "auroc": metrics["auroc_macro"]}
    return found | {"measure_megabytes": retune.peak_memory_mb() - before}


@thorough
@pytest.mark.parametrize("job, limits", [
    ("load_large_table", {"seconds": 60, "megabytes": 400}),
    ("train_on_a_million", {"train_megabytes": 700, "measure_megabytes": 1500}),
])  # fmt: skip
def test_large_sets_fit(job, limits, server, tmp_path):
    (folder := tmp_path / "work").mkdir()
    code, _ = server({"program": job, "argv": [], "folder": str(folder)})
    assert code == 0, Path(f"{folder}.log").read_text()[-3000:]
    found = json.loads((tmp_path / "report").read_text())
    print(f"{job}: {found}")
    assert all(found[key] < limit for key, limit in limits.items()), found


if __name__ == "__main__":
    serve()
