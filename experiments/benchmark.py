"""Speed and memory, each a ratio to a yardstick measured in the same run.

    python -m experiments.benchmark [--only NAME ...]

Medians of interleaved repeats, so that a machine that slows down slows both sides. No network and no data are
needed: weights, images and tables are random. A GPU is used for the encoder if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import retune

BATCH, CLASSES, PROMPTS = 6144, 5, 8  # the authors' batch, classes, prompts a class (four of each polarity)
TOKENS = 22  # BERT-base's own tokenizer pads the prompts of CheXpert's classes in prompts.json to this length
CHEXPERT = 223_414  # training images


def interleaved(ours: Callable[[], float], plain: Callable[[], float], repeats: int) -> list[float]:
    """Medians of the seconds that two functions report, run in turn after one warm-up each."""
    pairs = [(ours(), plain()) for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*pairs)]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def child(job: str, path: Path) -> tuple[float, float]:
    """Seconds of a job in a process of its own, and the MB of its highest anonymous memory; Linux alone tells."""
    command = [sys.executable, "-m", "experiments.benchmark", "--child", job, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(retune.__file__).parent)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *map(int, re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        time.sleep(0.005)
    return float(process.stdout.read()), peak / 1024


def training_problem(dim: int, rows: int = BATCH, model_class: type = retune.RETune) -> tuple:
    """(model, prompt bank, embeddings [rows, dim], labels, optimiser) of the authors' setting."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(CLASSES * PROMPTS, dim, generator=generator)
    bank = retune.PromptBank(prompts, torch.arange(2 * CLASSES).repeat_interleave(PROMPTS // 2))
    model = model_class(dim)
    embeddings = torch.randn(rows, dim, generator=generator).numpy()
    labels = (torch.rand(rows, CLASSES, generator=generator) < 0.2).float()
    return model, bank, embeddings, labels, torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)


def train(problem: tuple, epochs: int, task: retune.Task | None = None) -> float:
    """Seconds of `retune.fit` on a task, all rows and classes where none is given."""
    model, bank, embeddings, labels, optimizer = problem
    task = task or retune.Task("benchmark", np.arange(len(embeddings)), tuple(range(CLASSES)))
    return seconds(
        lambda: retune.fit(
            model, bank, embeddings, labels, task, optimizer, epochs=epochs, batch_size=BATCH,
            generator=torch.Generator().manual_seed(0),
        )
    )  # fmt: skip


def matmul_seconds(size: int = 2048) -> float:
    """Seconds of one fp32 product of two square matrices, the machine's practical peak."""
    a = torch.ones(size, size)
    return seconds(lambda: [a @ a for _ in range(3)]) / 3


def training(repeats: int, folder: Path) -> Iterator[tuple]:
    """Floating-point rate of adaptor training as a share of the matrix product's."""
    for dim, steps in ((128, 40), (512, 10)):
        problem = training_problem(dim)
        ours, peak = interleaved(lambda p=problem, n=steps: train(p, n) / n, matmul_seconds, repeats)
        # Linear(D, 2D) and Linear(2D, D): forward 8, weight gradients 8, one input gradient 4 (x has none).
        operations = 20 * BATCH * dim**2 + 6 * BATCH * dim * 2 * CLASSES + 24 * CLASSES * PROMPTS * dim**2
        rate, best = operations / ours, 2 * 2048**3 / peak
        yardstick = f"{best / 1e9:.0f} GFLOP/s fp32 matmul"
        yield f"training, D = {dim}, batch {BATCH}", f"{rate / 1e9:.0f} GFLOP/s", yardstick, rate / best


def reencoding(repeats: int, folder: Path) -> Iterator[tuple]:
    """Our step against the same step that runs a BERT-base-sized text tower over 40 prompts first."""
    from transformers import BertConfig, BertModel

    tower = BertModel(BertConfig(), add_pooling_layer=False).eval()
    tokens = torch.randint(1000, (CLASSES * PROMPTS, TOKENS))

    class Reencoding(retune.RETune):
        def penalty(self, images, logits):
            with torch.no_grad():
                tower(tokens)
            return 0.0

    cached, encoding = training_problem(128), training_problem(128, model_class=Reencoding)
    ours, theirs = interleaved(lambda: train(cached, 20) / 20, lambda: train(encoding, 1), repeats)
    yardstick = f"{theirs * 1e3:.0f} ms re-encoding 40 prompts of {TOKENS} tokens"
    yield "step, prompts embedded once", f"{ours * 1e3:.1f} ms", yardstick, theirs / ours


def scale(repeats: int, folder: Path) -> Iterator[tuple]:
    """A whole data-incremental training, 20 parts x 10 epochs, on as many embeddings as CheXpert has images."""
    for dim in (128, 512):
        problem = training_problem(dim, CHEXPERT)
        patients = np.arange(CHEXPERT) // 4
        tasks = retune.make_tasks("data", problem[3].numpy(), list("abcde"), 20, 0, patients)
        took = sum(train(problem, 10, task) for task in tasks)
        peak = statistics.median(matmul_seconds() for _ in range(repeats))
        ideal = 10 * CHEXPERT * 20 * dim**2 * peak / (2 * 2048**3)
        what = f"20 parts x 10 epochs, {CHEXPERT:,} x {dim}"
        yield what, f"{took:.1f} s", f"{ideal:.1f} s at matmul peak", ideal / took


def write_embeddings(file: Path, rows: int) -> None:
    """A file of embeddings [rows, 512], written in blocks."""
    array = np.lib.format.open_memmap(file, "w+", np.float32, (rows, 512))
    block = np.random.default_rng(0).standard_normal((10_000, 512), dtype=np.float32)
    for start in range(0, rows, len(block)):
        array[start : start + len(block)] = block


def train_on(file: str) -> float:
    """Train one epoch on a file of embeddings."""
    model, bank, _, _, optimizer = training_problem(512, rows=1)
    embeddings = np.load(file, mmap_mode="r")
    labels = torch.empty(len(embeddings), CLASSES).bernoulli_(0.2)
    return train((model, bank, embeddings, labels, optimizer), 1)


def memory(repeats: int, folder: Path) -> Iterator[tuple]:
    """Anonymous memory of training at three sizes of the embedding file; the ratio is to the smallest."""
    peaks = {}
    for rows in (50_000, 200_000, 1_000_000):
        file = folder / f"{rows}.npy"
        write_embeddings(file, rows)
        peaks[rows] = statistics.median(child("train", file)[1] for _ in range(repeats))
        file.unlink()
    for rows, mb in peaks.items():
        yardstick = f"{peaks[50_000]:,.0f} MB at 50,000 rows"
        yield f"training, anonymous memory, {rows:,} x 512", f"{mb:,.0f} MB", yardstick, mb / peaks[50_000]


def vit_encoder() -> retune.DualEncoder:
    """BiomedCLIP's image tower (ViT-B/16) with random weights; the text tower is that of the demo."""
    tiny = retune.DualEncoder.load("tiny")
    return retune.DualEncoder(retune.BIOMEDCLIP | {"text": tiny.config["text"]}, tiny.tokenizer)


def jpegs(folder: Path, count: int) -> retune.Radiographs:
    """A data set of 320 x 320 grey JPEG files, the size of CheXpert-small."""
    from torchvision.io import write_jpeg

    generator = torch.Generator().manual_seed(0)
    images = [folder / f"{i:04d}.jpg" for i in range(count)]
    for image in images:
        coarse = torch.rand(1, 1, 20, 20, generator=generator) * 255
        pixels = nn.functional.interpolate(coarse, size=(320, 320), mode="bilinear")[0].to(torch.uint8)
        write_jpeg(pixels, str(image))
    return retune.Radiographs(images, np.zeros((count, 1)), ["x"], images, ["train"] * count)


def embedding(repeats: int, folder: Path) -> Iterator[tuple]:
    """Images a second from JPEG files against the tower's bare forward; bf16 against fp32."""
    device, count, batch = retune.pick_device("auto"), 24, 8
    encoder, data = vit_encoder().to(device), jpegs(folder, count)
    pixels = torch.randn(batch, 3, 224, 224, device=device)

    def bare(dtype: torch.dtype | None = None) -> float:
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype is not None):
            return seconds(lambda: [encoder.encode_images(pixels).cpu() for _ in range(count // batch)])

    def from_files() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            options = {"batch_size": batch, "workers": 2, "device": device}
            return seconds(lambda: retune.embed(encoder, data, Path(cache), **options))

    ours, forward = interleaved(from_files, bare, repeats)
    rate = "{:.1f} images/s".format
    yardstick = f"{rate(count / forward)} bare forward"
    yield "embedding 320 x 320 JPEGs, ViT-B/16", rate(count / ours), yardstick, forward / ours
    low, full = interleaved(lambda: bare(torch.bfloat16), bare, repeats)
    yield "encoder in bf16", rate(count / low), f"{rate(count / full)} in fp32", full / low


def two_ranks(repeats: int, folder: Path) -> Iterator[tuple]:
    """Wall time of embedding the demo in one process against two ranks, on the same cores."""

    def launch(ranks: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            options = ["--scenario", "zero", "--output", f"{output}/run", "--cache-dir", f"{output}/cache"]
            command = [sys.executable, *launcher, retune.__file__, *options, "--workers", "0", "--no-figures"]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
            subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
            return json.loads(Path(f"{output}/run/metrics.json").read_text())["cost"]["embed_seconds"] / ranks

    ours, single = interleaved(lambda: launch(2), lambda: launch(1), repeats)
    yield "embedding the demo on 2 ranks", f"{ours:.1f} s", f"{single:.1f} s on 1", single / ours


def write_chexpert(folder: Path) -> None:
    """CheXpert's label files at their full size, without images."""
    rows = range(CHEXPERT)
    table = pd.DataFrame(
        {"Path": [f"CheXpert-v1.0/train/patient{i // 4:05d}/study{i % 4}/a.jpg" for i in rows]}
    )
    table = table.assign(**{"Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal", "AP/PA": "AP"})
    for finding in retune.CHEXPERT_FINDINGS:
        table[finding] = np.random.default_rng(0).choice(["", "1.0", "0.0", "-1.0"], CHEXPERT)
    table.to_csv(folder / "train.csv", index=False)
    valid = table.head(234).assign(Path=table["Path"].str.replace("train/patient", "valid/other"))
    valid.to_csv(folder / "valid.csv", index=False)


def load_chexpert(folder: str) -> float:
    config = retune.Config(data="chexpert", data_dir=folder)
    return seconds(lambda: retune.load_radiographs(config))


def loading(repeats: int, folder: Path) -> Iterator[tuple]:
    """Loading CheXpert's tables against pandas reading train.csv alone; memory above the libraries'."""
    write_chexpert(folder)
    took, mb = (statistics.median(column) for column in zip(*(child("load", folder) for _ in range(repeats))))
    libraries = child("nothing", folder)[1]
    plain = statistics.median(seconds(lambda: pd.read_csv(folder / "train.csv")) for _ in range(repeats))
    what = f"loading CheXpert's tables, {CHEXPERT:,} rows"
    yield what, f"{took:.2f} s", f"{plain:.2f} s pandas.read_csv", took / plain
    yield (
        f"{what}, memory",
        f"{mb - libraries:,.0f} MB",
        f"{libraries:,.0f} MB of libraries",
        mb / libraries - 1,
    )


def help_time(repeats: int, folder: Path) -> Iterator[tuple]:
    """Wall time of `retune.py --help` against importing torch."""

    def run(*command: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True))

    ours, plain = interleaved(lambda: run(retune.__file__, "-h"), lambda: run("-c", "import torch"), repeats)
    yield "retune.py --help", f"{ours:.2f} s", f"{plain:.2f} s import torch", ours / plain


MEASURES = {
    "memory": memory, "training": training, "prompts": reencoding, "embedding": embedding, "ranks": two_ranks,
    "scale": scale, "loading": loading, "help": help_time,
}  # fmt: skip


JOBS = {"train": train_on, "load": load_chexpert, "nothing": lambda path: 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="measure these alone")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: 5)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return print(JOBS[arguments.child[0]](arguments.child[1]))
    with tempfile.TemporaryDirectory() as folder:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {retune.pick_device('auto')}\n")
        print("| what | ours | yardstick | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
        for name in arguments.only:
            for what, ours, yardstick, ratio in MEASURES[name](arguments.repeats, Path(folder)):
                print(f"| {what} | {ours} | {yardstick} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
