"""Speed and memory, each a ratio to a yardstick measured in the same run: `python benchmark.py [--only NAME ...]`.

Medians of interleaved repeats, so that a machine that slows down slows both sides. No network and no data are
needed: weights and images are random. A GPU is used for the encoder if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import retune

BATCH, CLASSES, PROMPTS = 6144, 5, 8  # the authors' batch, classes, prompts a class (four of each polarity)
TOKENS = 22  # BERT-base's own tokenizer pads the prompts of CheXpert's classes in prompts.json to this length


def interleaved(
    ours: Callable[[], float], yardstick: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Medians of the seconds that two functions report, run in turn after one warm-up each."""
    ours(), yardstick()
    pairs = [(ours(), yardstick()) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def seconds(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def training_problem(dim: int, rows: int = BATCH):
    """(model, prompt bank, embeddings [rows, dim], labels, optimiser) of the authors' setting."""
    generator = torch.Generator().manual_seed(0)
    bank = retune.PromptBank(
        torch.randn(CLASSES * PROMPTS, dim, generator=generator),
        torch.arange(2 * CLASSES).repeat_interleave(PROMPTS // 2),
    )
    model = retune.RETune(dim)
    embeddings = torch.randn(rows, dim, generator=generator).numpy()
    labels = (torch.rand(rows, CLASSES, generator=generator) < 0.2).float()
    return model, bank, embeddings, labels, torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)


def step_seconds(problem, steps: int, before_step: Callable | None = None) -> float:
    """Seconds a step of `retune.fit`; `before_step()` runs inside every step."""
    model, bank, embeddings, labels, optimizer = problem
    task = retune.Task("benchmark", np.arange(len(embeddings)), tuple(range(CLASSES)))
    penalty = None if before_step is None else (lambda images, logits: before_step())
    start = time.perf_counter()
    retune.fit(
        model, bank, embeddings, labels, task, optimizer, epochs=steps, batch_size=BATCH,
        generator=torch.Generator().manual_seed(0), penalty=penalty,
    )  # fmt: skip
    return (time.perf_counter() - start) / steps


def matmul_seconds(size: int = 2048) -> float:
    """Seconds of one fp32 product of two square matrices, the machine's practical peak."""
    a = torch.ones(size, size)
    return seconds(lambda: [a @ a for _ in range(3)]) / 3


def training_flops(dim: int, repeats: int) -> tuple:
    """Floating-point rate of adaptor training as a share of the matrix product's."""
    problem = training_problem(dim)
    ours, peak = interleaved(lambda: step_seconds(problem, 512 // dim * 10), matmul_seconds, repeats)
    # Linear(D, 2D) and Linear(2D, D): forward 8, weight gradients 8, one input gradient 4 (x has none).
    operations = 20 * BATCH * dim**2 + 6 * BATCH * dim * 2 * CLASSES + 24 * CLASSES * PROMPTS * dim**2
    rate, best = operations / ours, 2 * 2048**3 / peak
    return (
        f"training, D = {dim}, batch {BATCH}",
        f"{rate / 1e9:.0f} GFLOP/s",
        f"{best / 1e9:.0f} GFLOP/s fp32 matmul",
        rate / best,
    )


def reencoding(repeats: int) -> tuple:
    """Our step against the same step that runs a BERT-base-sized text tower over 40 prompts first."""
    from transformers import BertConfig, BertModel

    tower = BertModel(BertConfig(), add_pooling_layer=False).eval()
    tokens = torch.randint(1000, (CLASSES * PROMPTS, TOKENS))

    def encode() -> float:
        with torch.no_grad():
            tower(tokens)
        return 0.0

    problem = training_problem(128)
    ours, theirs = interleaved(
        lambda: step_seconds(problem, 20), lambda: step_seconds(problem, 1, encode), repeats
    )
    return (
        "step, prompts embedded once",
        f"{ours * 1e3:.1f} ms",
        f"{theirs * 1e3:.0f} ms re-encoding 40 prompts of {TOKENS} tokens",
        theirs / ours,
    )


def vit_encoder(folder: Path) -> retune.DualEncoder:
    """A dual encoder with BiomedCLIP's image tower (ViT-B/16), random weights, and a one-layer text tower."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    text = {
        "model_type": "bert",
        "vocab_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    projection = ["Linear", {"in_features": 32, "out_features": 768}]
    config = {
        "name": "vit", "dim": 768,
        "image": {"model": {"model_type": "vit"}, "pool": "cls", "head": []},
        "text": {"model": text, "pool": "cls", "head": [projection], "context_length": 16},
        "transform": {"resize": 224, "crop": 224, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    }  # fmt: skip
    return retune.DualEncoder(config, tokenizer)


def jpegs(folder: Path, count: int) -> retune.Radiographs:
    """A data set of 320 x 320 grey JPEG files, the size of CheXpert-small."""
    from torchvision.io import write_jpeg

    generator, images = torch.Generator().manual_seed(0), []
    for i in range(count):
        coarse = torch.rand(1, 1, 20, 20, generator=generator) * 255
        pixels = nn.functional.interpolate(coarse, size=(320, 320), mode="bilinear")[0].to(torch.uint8)
        images.append(folder / f"{i:04d}.jpg")
        write_jpeg(pixels, str(images[-1]))
    return retune.Radiographs(images, np.zeros((count, 1)), ["x"], images, ["train"] * count)


def embedding(repeats: int, folder: Path) -> list[tuple]:
    """Images a second from JPEG files against the tower's bare forward; bf16 against fp32."""
    device, count, batch = retune.pick_device("auto"), 24, 8
    encoder, data = vit_encoder(folder).to(device), jpegs(folder, count)
    pixels = torch.randn(batch, 3, 224, 224, device=device)

    def bare(dtype: torch.dtype | None = None) -> float:
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype is not None):
            return seconds(lambda: [encoder.encode_images(pixels).cpu() for _ in range(count // batch)])

    def from_files() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            took = seconds(
                lambda: retune.embed(encoder, data, Path(cache), batch_size=batch, workers=2, device=device)
            )
        return took

    ours, forward = interleaved(from_files, bare, repeats)
    low, full = interleaved(lambda: bare(torch.bfloat16), bare, repeats)
    return [
        ("embedding 320 x 320 JPEGs, ViT-B/16", f"{count / ours:.1f} images/s", f"{count / forward:.1f} images/s bare forward", forward / ours),
        ("encoder in bf16", f"{count / low:.1f} images/s", f"{count / full:.1f} images/s in fp32", full / low),
    ]  # fmt: skip


def two_ranks(repeats: int, folder: Path) -> tuple:
    """Wall time of embedding the demo in one process against two ranks, on the same cores."""
    script = Path(retune.__file__)

    def launch(ranks: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            command = [
                sys.executable,
                *launcher,
                str(script),
                "--scenario",
                "zero",
                "--output",
                f"{output}/run",
            ]
            command += ["--cache-dir", f"{output}/cache", "--workers", "0", "--no-figures"]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
            subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
            return json.loads(Path(f"{output}/run/metrics.json").read_text())["cost"]["embed_seconds"] / ranks

    ours, single = interleaved(lambda: launch(2), lambda: launch(1), repeats)
    return "embedding the demo on 2 ranks", f"{ours:.1f} s", f"{single:.1f} s on 1", single / ours


def write_embeddings(file: Path, rows: int) -> None:
    """A file of embeddings [rows, 512], written, not mapped: a child's peak memory begins at its parent's."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 512)}
    block = np.random.default_rng(0).standard_normal((10_000, 512), dtype=np.float32)
    with open(file, "wb") as output:
        np.lib.format.write_array_header_1_0(output, header)
        output.writelines(block.data for _ in range(rows // len(block)))


def peak_memory(file: Path) -> float:
    """Peak resident MB of a process that trains one epoch on a file of embeddings."""
    command = [sys.executable, __file__, "--train-on", str(file)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def train_on(file: Path) -> None:
    """Train one epoch on a file of embeddings and print this process's peak memory."""
    embeddings = np.load(file, mmap_mode="r")
    model, bank, _, _, optimizer = training_problem(512, rows=1)
    labels = torch.empty(len(embeddings), CLASSES).bernoulli_(0.2)
    task = retune.Task("benchmark", np.arange(len(embeddings)), tuple(range(CLASSES)))
    retune.fit(
        model, bank, embeddings, labels, task, optimizer, epochs=1, batch_size=BATCH,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    print(retune.peak_memory_mb())


def memory(repeats: int, folder: Path) -> list[tuple]:
    """Peak memory of training at three sizes of the embedding file; the ratio is to the smallest."""
    files = {rows: folder / f"{rows}.npy" for rows in (50_000, 200_000, 1_000_000)}
    for rows, file in files.items():
        write_embeddings(file, rows)
    peaks = [[peak_memory(file) for file in files.values()] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*peaks)]
    for file in files.values():
        file.unlink()
    return [
        (f"training memory, {rows:,} x 512", f"{mb:,.0f} MB", f"{medians[0]:,.0f} MB at 50,000 rows", mb / medians[0])
        for rows, mb in zip(files, medians)
    ]  # fmt: skip


def scale(repeats: int) -> list[tuple]:
    """A whole data-incremental training, 20 parts x 10 epochs, on as many embeddings as CheXpert has images."""
    rows = []
    for dim in (128, 512):
        model, bank, embeddings, labels, optimizer = training_problem(dim, 223_414)
        tasks = retune.make_tasks("data", labels.numpy(), list("abcde"), 20, 0, np.arange(223_414) // 4)
        start = time.perf_counter()
        for task in tasks:
            retune.fit(
                model, bank, embeddings, labels, task, optimizer, epochs=10, batch_size=BATCH,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        took, operations = time.perf_counter() - start, 10 * 223_414 * 20 * dim**2
        ideal = operations / (2 * 2048**3 / statistics.median(matmul_seconds() for _ in range(repeats)))
        rows.append(
            (
                f"20 parts x 10 epochs, 223,414 x {dim}",
                f"{took:.1f} s",
                f"{ideal:.1f} s at matmul peak",
                ideal / took,
            )
        )
    return rows


def help_time(repeats: int) -> tuple:
    """Wall time of `retune.py --help` against importing torch."""
    run = lambda *command: seconds(
        lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)
    )
    ours, torch_alone = interleaved(
        lambda: run(retune.__file__, "--help"), lambda: run("-c", "import torch"), repeats
    )
    return "retune.py --help", f"{ours:.2f} s", f"{torch_alone:.2f} s import torch", ours / torch_alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Memory first: a child's peak begins at that of its parent, which the other measures raise.
    names = ("memory", "training", "prompts", "embedding", "ranks", "scale", "help")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="measure these alone")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: 5)")
    parser.add_argument("--train-on", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_on:
        return train_on(arguments.train_on)
    n = arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        measures = {
            "training": lambda: [training_flops(128, n), training_flops(512, n)],
            "prompts": lambda: [reencoding(n)],
            "embedding": lambda: embedding(n, folder),
            "ranks": lambda: [two_ranks(n, folder)],
            "memory": lambda: memory(n, folder),
            "scale": lambda: scale(n),
            "help": lambda: [help_time(n)],
        }
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {retune.pick_device('auto')}\n")
        print("| what | ours | yardstick | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
        for name in arguments.only:
            for what, ours, yardstick, ratio in measures[name]():  # rows appear as they are ready
                print(f"| {what} | {ours} | {yardstick} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
