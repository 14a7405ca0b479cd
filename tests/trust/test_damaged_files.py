"""Damaged files are read or refused, and no file runs code."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retune
from tests.conftest import chestmnist_arrays, csv_rows, exit_code, load_set, noise_images, write_rows

pytestmark = [pytest.mark.usefixtures("in_empty_folder"), pytest.mark.filterwarnings("ignore")]

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


def make_csv(folder, encoder):
    return [write_rows(folder / "labels.csv", csv_rows(folder))], lambda: load_set("csv", folder)


def make_npz(folder, encoder):
    np.savez(folder / "chestmnist.npz", **chestmnist_arrays(28))
    options = {"size": 28, "cache_dir": str(folder / "cache")}
    return [folder / "chestmnist.npz"], lambda: load_set("chestmnist", folder, **options)


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


def write(contents: dict[Path, bytes]) -> None:
    for file, content in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def read_damaged(folder: Path, encoder_folder: str, name: str, report: Path) -> None:
    """Damage a case's files 20 times; each is read or refused in one line, some are refused."""
    encoder = retune.DualEncoder.load(encoder_folder)
    encoder.source = encoder_folder
    files, read = CASES[name](folder, encoder)
    valid, refused = {file: file.read_bytes() for file in files}, []
    read()
    for i in range(20):
        generator = np.random.default_rng((1, i))
        victim = files[generator.integers(len(files))]
        write(valid | {victim: damage(generator, valid[victim])})
        report.write_text(f"input {i}, {victim.name}")
        try:
            read()
        except retune.InputError as error:
            refused.append(str(error))
    report.write_text(f"refused: {refused}")
    assert refused and all(message and "\n" not in message for message in refused)


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_file_is_read_or_refused(name, fork, encoder_folder, tmp_path):
    """In another process, since a decoder may end its process."""
    (tmp_path / "files").mkdir()
    process = fork(read_damaged, tmp_path / "files", str(encoder_folder), name, tmp_path / "report")
    assert exit_code(process) == 0, (tmp_path / "report").read_text()


@pytest.mark.parametrize("name", ["pickles", "npz", "cache", "encoder", "adaptors"])
def test_no_file_runs_code(name, encoder, encoder_folder, tmp_path):
    encoder.source, executed = str(encoder_folder), tmp_path / "executed"
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(executed),))})()
    (tmp_path / "files").mkdir()
    files, read = CASES[name](tmp_path / "files", encoder)
    np.save(array := io.BytesIO(), np.array([evil], object), allow_pickle=True)
    labels = {"train_labels": np.array([evil], object)}
    np.savez(arrays := io.BytesIO(), **chestmnist_arrays(28) | labels)
    torch.save({"model": {"a": evil}}, archive := io.BytesIO())
    code = f"import os; os.mkdir({str(executed)!r})\nclass A: pass\n"
    classes = {"AutoTokenizer": ["code.A", None], "AutoModel": "code.A"}
    automatic = json.dumps({"auto_map": classes, "tokenizer_class": "A"}).encode()
    evils = [pickle.dumps(evil), array.getvalue(), arrays.getvalue(), archive.getvalue(), automatic]
    valid = {file: file.read_bytes() for file in files}
    for file in files:
        (file.parent / "code.py").write_text(code)
        for content in evils:
            file.write_bytes(content)
            with contextlib.suppress(retune.InputError):
                read()
            assert not executed.exists(), (file, content[:80])
            write(valid)
    pickle.loads(evils[0])
    assert executed.exists()
