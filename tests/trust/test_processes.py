"""Runs that are killed, meet a full disk or other processes, or go on: the same files as in one piece."""

import json
import math
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retune
from tests.conftest import assert_same_run, call_program, exit_code, program_arguments, read_failure

resource = pytest.importorskip("resource")  # POSIX
pytestmark = [pytest.mark.usefixtures("in_empty_folder"), pytest.mark.filterwarnings("ignore")]


def run_and_exit(arguments: list[str], environment: dict | None = None, limit: int = 0, said="") -> None:
    """retune.py in a process of its own: with the environment of a rank, or where no file may exceed `limit`
    bytes, so that writes fail halfway as on a full disk, with standard error in the file `said`."""
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

    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    sys.addaudithook(count)
    sys.exit(call_program(program, arguments))


def contents(folder: Path) -> dict:
    """What every file below `folder` holds, except for measured times; JSON and pickles by content."""
    measured = {"seconds", "embed_seconds", "train_seconds", "images_per_second", "peak_memory_mb"}

    def without_times(values: dict) -> dict:
        return {key: value for key, value in values.items() if key not in measured}

    def read(path: Path):
        text = path.read_bytes()
        if path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            text = json.dumps(saved, default=lambda tensor: [str(tensor.dtype), tensor.tolist()])
        return json.loads(text, object_hook=without_times) if path.suffix in (".pt", ".json") else text

    return {str(p.relative_to(folder)): p.is_dir() or read(p) for p in sorted(folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["retune", "adaptor", "cleft"])
def test_a_killed_program_ends_like_an_uninterrupted_one(program, fork, encoder_folder, tmp_path):
    """Each process dies a few file changes later than the one before; nothing is lost or left over."""
    arguments, kills = program_arguments(program, encoder_folder), 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
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
    """Sharded embedding is the same array; adaptors agree within 1e-5."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    two, cache = tmp_path / "two", Path(demo_arguments[demo_arguments.index("--cache-dir") + 1])
    arguments = [*demo_arguments, "--cache-dir", str(tmp_path / "cache"), "--output", str(two)]
    ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [fork(run_and_exit, arguments, rank) for rank in ranks]
    assert [*map(exit_code, processes)] == [0, 0]
    found, wanted = (np.load(next(folder.rglob("embeddings.npy"))) for folder in (tmp_path / "cache", cache))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for name in ("task_1", "task_2", "task_3"):
        found, wanted = (retune.load_tensors(f / f"{name}.safetensors")[0] for f in (two, finished))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_images_changed_under_a_run_are_refused(csv_set, capsys, monkeypatch):
    root, rows, arguments = csv_set
    monkeypatch.setattr(retune, "fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert retune.main(arguments) == 130
    monkeypatch.undo()
    for row in rows:
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / row["path"], format="PNG")
    assert "images or their embeddings changed" in read_failure(capsys, arguments)
