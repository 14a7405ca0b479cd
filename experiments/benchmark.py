"""Speed and memory, each a ratio to a yardstick measured in the same run.

    python -m experiments.benchmark [--only NAME ...]

Medians of interleaved repeats, so that a machine that slows down slows both sides. No network and no data are
needed: weights, images and tables are random. A GPU is used for the encoder if there is one.
"""

import argparse
import multiprocessing
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
from PIL import Image

import retune

BATCH = 6144  # the authors'
CLASSES = 5
PROMPTS = 40  # of all classes
TOKENS = 22  # BERT-base's own tokenizer pads the prompts of CheXpert's classes in prompts.json to this length
CHEXPERT = 223_414  # training images
MATMUL = 2 * 2048**3  # operations of the fp32 product whose rate is the machine's practical peak


def interleaved(ours: Callable, plain: Callable, repeats: int) -> list[float]:
    """Medians of the seconds that two functions take (or report), run in turn after one warm-up each."""

    def seconds(function: Callable) -> float:
        start = time.perf_counter()
        reported = function()
        return reported if isinstance(reported, float) else time.perf_counter() - start

    pairs = [(seconds(ours), seconds(plain)) for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*pairs)]


def run_retune(folder: Path, *options: str, ranks: int = 1) -> dict:
    """metrics.json of a run in processes of its own; all cores are shared by the ranks."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [sys.executable, *launcher, retune.__file__, *options, "--output", run, "--cache-dir", run]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
        return retune.read_json(Path(run) / "metrics.json")


def peak_memory(job: Callable, *arguments) -> float:
    """Highest anonymous memory, in MB, of a job in a process of its own; only Linux reports it."""
    process = multiprocessing.get_context("spawn").Process(target=job, args=arguments)
    process.start()
    peak = 0
    while process.is_alive():
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *map(int, re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        time.sleep(0.005)
    return peak / 1024


def trainer(embeddings: np.ndarray) -> Callable:
    """A function of (epochs, task or everything) that trains on embeddings [N, D] in the authors' setting."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(PROMPTS, embeddings.shape[1], generator=generator)
    bank = retune.PromptBank(texts, torch.arange(2 * CLASSES).repeat_interleave(PROMPTS // CLASSES // 2))
    model = retune.RETune(embeddings.shape[1])
    labels = (torch.rand(len(embeddings), CLASSES, generator=generator) < 0.2).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    everything = retune.Task("benchmark", np.arange(len(embeddings)), tuple(range(CLASSES)))

    def train(epochs: int, task: retune.Task = everything) -> None:
        options = {"epochs": epochs, "batch_size": BATCH, "generator": generator}
        retune.fit(model, bank, embeddings, labels, task, optimizer, **options)

    return train


def random_embeddings(rows: int, dim: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)


def training(repeats: int, folder: Path) -> Iterator[tuple]:
    """Floating-point rate of adaptor training as a share of the matrix product's."""
    square = torch.ones(2048, 2048)
    for dim, steps in ((128, 40), (512, 10)):
        train = trainer(random_embeddings(BATCH, dim))
        # Linear(D, 2D) and Linear(2D, D): forward 8, weight gradients 8, one input gradient 4 (x has none).
        operations = 20 * BATCH * dim**2 + 6 * BATCH * dim * 2 * CLASSES + 24 * PROMPTS * dim**2
        ours, peak = interleaved(lambda n=steps, f=train: f(n), lambda: square @ square, repeats)
        rate = operations * steps / ours / 1e9
        best = MATMUL / peak / 1e9
        what = f"training, D = {dim}, batch {BATCH}"
        yield what, f"{rate:.0f} GFLOP/s", f"{best:.0f} GFLOP/s fp32 matmul", rate / best


def prompts(repeats: int, folder: Path) -> Iterator[tuple]:
    """Our step against the same step that runs a BERT-base-sized text tower over 40 prompts first."""
    from transformers import BertConfig, BertModel

    tower = BertModel(BertConfig(), add_pooling_layer=False).eval().requires_grad_(False)
    tokens = torch.randint(1000, (PROMPTS, TOKENS))
    train = trainer(random_embeddings(BATCH, 128))
    twenty, theirs = interleaved(lambda: train(20), lambda: (tower(tokens), train(1)), repeats)
    yardstick = f"{theirs * 1e3:.0f} ms re-encoding 40 prompts of {TOKENS} tokens"
    yield "step, prompts embedded once", f"{twenty * 50:.1f} ms", yardstick, theirs * 20 / twenty


def scale(repeats: int, folder: Path) -> Iterator[tuple]:
    """A data-incremental training, 20 parts x 10 epochs, on as many embeddings as CheXpert has images."""
    labels = np.zeros((CHEXPERT, CLASSES))
    tasks = retune.make_tasks("data", labels, list("abcde"), 20, 0, np.arange(CHEXPERT) // 4)
    square = torch.ones(2048, 2048)
    for dim in (128, 512):
        train = trainer(random_embeddings(CHEXPERT, dim))
        ours, peak = interleaved(lambda f=train: [f(10, t) for t in tasks], lambda: square @ square, 1)
        ideal = peak * 10 * CHEXPERT * 20 * dim**2 / MATMUL
        what = f"20 parts x 10 epochs, {CHEXPERT:,} x {dim}"
        yield what, f"{ours:.1f} s", f"{ideal:.1f} s at matmul peak", ideal / ours


def train_on(file: Path) -> None:
    """Train one epoch on a file of embeddings."""
    trainer(np.load(file, mmap_mode="r"))(1)


def memory(repeats: int, folder: Path) -> Iterator[tuple]:
    """Anonymous memory of training at three sizes of the embedding file; the ratio is to the smallest."""
    smallest = None
    for rows in (50_000, 200_000, 1_000_000):
        file = folder / "embeddings.npy"
        array = np.lib.format.open_memmap(file, "w+", np.float32, (rows, 512))
        for start in range(0, rows, 10_000):
            array[start : start + 10_000] = random_embeddings(10_000, 512)
        mb = statistics.median(peak_memory(train_on, file) for _ in range(repeats))
        smallest = smallest or mb
        yardstick = f"{smallest:,.0f} MB at 50,000 rows"
        yield f"training, anonymous memory, {rows:,} x 512", f"{mb:,.0f} MB", yardstick, mb / smallest


def embedding(repeats: int, folder: Path) -> Iterator[tuple]:
    """Images a second of a ViT-B/16 from 320 x 320 JPEG files against its bare forward; bf16 against fp32."""
    device = retune.pick_device("auto")
    count = 24
    batch = 8
    tiny = retune.DualEncoder.load("tiny")
    encoder = retune.DualEncoder(retune.BIOMEDCLIP | {"text": tiny.config["text"]}, tiny.tokenizer).to(device)
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    images = [folder / f"{i}.jpg" for i in range(count)]
    for i, image in enumerate(images):
        coarse = np.random.default_rng(i).integers(0, 256, (20, 20), np.uint8)
        Image.fromarray(coarse).resize((320, 320)).save(image)
    data = retune.Radiographs(images, np.zeros((count, 1)), ["x"], images, ["train"] * count)

    def bare(precision: str = "fp32") -> None:
        for _ in range(count // batch):
            encoder.encode_images(pixels, precision).cpu()

    def from_files() -> None:
        options = {"batch_size": batch, "workers": retune.Config.workers, "device": device}
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            retune.embed(encoder, data, Path(cache), **options)

    rate = "{:.1f} images/s".format
    ours, forward = interleaved(from_files, bare, repeats)
    yardstick = f"{rate(count / forward)} bare forward"
    yield "embedding 320 x 320 JPEGs, ViT-B/16", rate(count / ours), yardstick, forward / ours
    low, full = interleaved(lambda: bare("bf16"), bare, repeats)
    yield "encoder in bf16", rate(count / low), f"{rate(count / full)} in fp32", full / low


def ranks(repeats: int, folder: Path) -> Iterator[tuple]:
    """Time of embedding the demo in one process against two ranks, on the same cores."""
    options = ("--scenario", "zero", "--workers", "0", "--no-figures")

    def launch(processes: int) -> float:
        return run_retune(folder, *options, ranks=processes)["cost"]["embed_seconds"] / processes

    ours, single = interleaved(lambda: launch(2), lambda: launch(1), repeats)
    yield "embedding the demo on 2 ranks", f"{ours:.1f} s", f"{single:.1f} s on 1", single / ours


def loading(repeats: int, folder: Path) -> Iterator[tuple]:
    """Loading CheXpert's tables against pandas reading train.csv alone; memory above the libraries'."""
    file = folder / "train.csv"
    paths = [f"CheXpert-v1.0/train/patient{i // 4:05d}/study{i % 4}/a.jpg" for i in range(CHEXPERT)]
    columns = {"Path": paths, "Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal", "AP/PA": "AP"}
    table = pd.DataFrame(columns)
    for finding in retune.CHEXPERT_FINDINGS:
        table[finding] = np.random.default_rng(0).choice(["", "1.0", "0.0", "-1.0"], CHEXPERT)
    table.to_csv(file, index=False)
    table["Path"] = table["Path"].str.replace("train/patient", "valid/other")
    table.head(234).to_csv(folder / "valid.csv", index=False)
    load = retune.load_radiographs
    config = retune.Config(data="chexpert", data_dir=str(folder))
    ours, plain = interleaved(lambda: load(config), lambda: pd.read_csv(file), repeats)
    what = f"loading CheXpert's tables, {CHEXPERT:,} rows"
    yield what, f"{ours:.2f} s", f"{plain:.2f} s pandas.read_csv", ours / plain
    libraries = peak_memory(random_embeddings, 1, 1)
    mb = peak_memory(load, config) - libraries
    yield f"{what}, memory", f"{mb:,.0f} MB", f"{libraries:,.0f} MB of libraries", mb / libraries


def demo(repeats: int, folder: Path) -> Iterator[tuple]:
    """Wall time of the demo's main job against importing torch."""
    options = ("--scenario", "data", "--epochs", "5")
    nothing = [sys.executable, "-c", "import torch"]
    jobs = (lambda: run_retune(folder, *options), lambda: subprocess.run(nothing, check=True))
    ours, plain = interleaved(*jobs, repeats)
    yield "the demo, --scenario data --epochs 5", f"{ours:.1f} s", f"{plain:.1f} s import torch", ours / plain


MEASURES = {f.__name__: f for f in (memory, training, prompts, embedding, ranks, scale, loading, demo)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="measure these alone")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {retune.pick_device('auto')}\n")
        print("| what | ours | yardstick | ratio |\n| --- | ---: | ---: | ---: |", flush=True)
        for name in arguments.only:
            for what, ours, yardstick, ratio in MEASURES[name](arguments.repeats, Path(folder)):
                print(f"| {what} | {ours} | {yardstick} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
