"""RE-tune: incremental fine-tuning of biomedical vision-language models for multi-label chest X-rays.

The whole method is in this file, in the order in which a run uses it: prompts, model, loss, scenarios,
metrics, training, report, command line. Copied alone it works on embeddings of your own (`RETune`, `PromptBank`,
`make_tasks`, `fit`, `evaluate`). A run from image files imports, when it starts, `radiographs` (data) and
`encoders` (frozen towers and the embedding cache); other modules only when asked for by name.

    python retune.py --scenario data --epochs 5                       # embedded demo, nothing to download
    python retune.py --data csv --data-dir my_xrays --scenario class  # your own images
    python retune.py --predict a.png b.png --run runs/NAME            # score images with a run's adaptors

Reference: Mistretta & Bagdanov, "RE-tune: Incremental Fine Tuning of Biomedical Vision-Language Models for
Multi-label Chest X-ray Classification", arXiv 2410.17827. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import functools
import gzip
import hashlib
import http.client
import importlib
import io
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import struct
import sys
import time
import tokenize
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """Something the user gave cannot be used; one line that names it, its value and the remedy."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, a file or folder; rename it on success, remove it on an error.

    The temporary name is always the same, so the next process overwrites what a killed one left.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold `folder` for this process: wait for another one, or raise InputError at once.

    The lock is on the folder itself: it leaves no file and ends with the process. Windows has none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f"{folder}: another process is writing here; use another --output") from None
            say(f"{folder}: waiting for another process")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def strict(value):
    """Plain JSON types all the way down; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Write strict JSON, atomically."""
    write_text(path, json.dumps(strict(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """Read a JSON file; InputError names the file and where it breaks."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def checksum(tensors: dict[str, torch.Tensor], metadata: dict) -> str:
    """SHA-256 (hex) of tensors and of what describes them."""
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors, what describes them (if anything) and a checksum of both as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    description = metadata and metadata | {"sha256": checksum(plain, metadata)}
    try:
        with atomic(path) as partial:  # one entry, since the order of several changes from process to process
            save_file(plain, partial, {"retune": json.dumps(description)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_tensors` wrote; InputError for a missing or damaged file."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            metadata = json.loads(file.metadata()["retune"])
        if metadata and metadata.pop("sha256") != checksum(tensors, metadata):
            raise ValueError("its checksum differs")
        return tensors, metadata
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - a damaged file can make the reader raise nearly anything
        raise InputError(f"{path}: damaged ({error}); delete its folder and run again") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """A message's tail: the known name most like `name`, then all of them."""
    known = list(known)
    alike = [k for k in known if name.lower() in k.lower()]
    alike = alike or difflib.get_close_matches(name, known, 1, cutoff=0)
    return f"did you mean {alike[0]!r}? Known: {', '.join(known)}"


def ranks() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside torchrun."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)


def barrier() -> None:
    """Wait until every rank is here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def progress(iterable=None, **options):
    """tqdm on standard error, on the first rank only."""
    return tqdm(iterable, dynamic_ncols=True, leave=False, disable=ranks()[0] != 0, **options)


def say(text: str) -> None:
    """Print, on the first rank only."""
    if ranks()[0] == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------- 1. Prompts


def load_prompts(path: Path, class_names: Sequence[str], wording: str = "specific") -> dict[str, dict]:
    """Positive and negative prompts of every class, {class: {"positive": [...], "negative": [...]}}.

    The JSON file maps a finding to such a pair or to the name of a synonymous finding; "default" holds
    templates with `{finding}` for all others. Names match without regard to case, `_` and `-`.
    `wording="generic"` uses the templates for every class (ours). InputError for a missing finding, an empty
    list or bad JSON. The wording is ours, in the spirit of the authors' templates.
    """
    content = read_json(path)

    def plain(name: str) -> str:
        return re.sub("[_-]", " ", name).lower().strip()

    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object of findings")
    entries, prompts = {plain(name): entry for name, entry in content.items()}, {}
    for name in class_names:
        entry = entries.get("default" if wording == "generic" else plain(name), entries.get("default"))
        entry = entries.get(plain(entry)) if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise InputError(f"{path}: finding {name!r} has no prompts, 'default' no templates; add either")
        prompts[name] = {}
        for polarity in ("positive", "negative"):
            texts = entry.get(polarity)
            good = isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)
            if not good or not texts:
                raise InputError(f"{path}: {polarity!r} of {name!r} must be a list of texts, at least one")
            prompts[name][polarity] = [text.replace("{finding}", plain(name)) for text in texts]
    return prompts


# --------------------------------------------------------------------------------------------------- 2. Model


class Adaptor(nn.Module):
    """A small network [.., D] -> [.., D] on frozen embeddings.

    mlp: Linear(D, 2D), ReLU, Linear(2D, D), the paper's. linear: Linear(D, D), its ablation. residual (ours):
    x + mlp(x) on L2-normalised x with the last layer zero, so that training starts at zero-shot.
    """

    def __init__(self, dim: int, kind: str = "mlp"):
        super().__init__()
        if kind not in ("mlp", "linear", "residual"):
            raise InputError(f"adaptor {kind!r} is not mlp, linear or residual")
        self.residual = kind == "residual"
        self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(inplace=True), nn.Linear(2 * dim, dim))
        if kind == "linear":
            self.layers = nn.Linear(dim, dim)
        if self.residual:
            nn.init.zeros_(self.layers[2].weight)
            nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.residual:
            return self.layers(x)
        x = F.normalize(x, dim=-1)
        return x + self.layers(x)


@dataclass
class PromptBank:
    """All prompts' embeddings [M, D], not normalised, and the group of each [M], int64.

    Group 2c holds the positive prompts of class c and 2c + 1 its negative ones; groups may differ in size.
    """

    embeddings: torch.Tensor
    group: torch.Tensor

    def to(self, device: str) -> PromptBank:
        return PromptBank(self.embeddings.to(device), self.group.to(device))

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    def pooling(self, pool: str) -> torch.Tensor:
        """[2C, M]: row g averages group g (mean) or picks its first prompt (single)."""
        member = (self.group == torch.arange(self.groups, device=self.group.device)[:, None]).float()
        member = member * (member.cumsum(1) == 1) if pool == "single" else member
        return member / member.sum(1, keepdim=True)


def embed_prompts(encoder: DualEncoder, prompts: dict[str, dict[str, list[str]]]) -> PromptBank:
    """Encode the prompts of all classes once, in the order of the classes."""
    sets = [texts for pair in prompts.values() for texts in (pair["positive"], pair["negative"])]
    group = [g for g, texts in enumerate(sets) for _ in texts]
    embeddings = encoder.encode_texts([text for texts in sets for text in texts])
    return PromptBank(embeddings.clone(), torch.tensor(group))  # a plain tensor: adaptors train through it


class RETune(nn.Module):
    """Two adaptors on a frozen pair of encoders; each class asks: positive or negative prompts?

    adapt: both (default), shared (one module for both towers), image, text; none is zero-shot.
    pool: mean of a group's adapted prompts; max of their cosines per image; single, the first prompt alone.
    """

    def __init__(
        self, dim: int, adaptor: str = "mlp", adapt: str = "both", pool: str = "mean", negatives: bool = True,
        logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        if adapt not in ("both", "shared", "image", "text", "none") or pool not in ("mean", "max", "single"):
            raise InputError(f"adapt {adapt!r} or pool {pool!r} is unknown")
        self.pool, self.negatives, self.logit_scale = pool, negatives, logit_scale
        self.image_adaptor = nn.Identity() if adapt in ("none", "text") else Adaptor(dim, adaptor)
        self.text_adaptor = Adaptor(dim, adaptor) if adapt in ("both", "text") else nn.Identity()
        if adapt == "shared":
            self.text_adaptor = self.image_adaptor

    def forward(self, images: torch.Tensor, prompts: PromptBank) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines (positive [B, C], negative [B, C]) of image embeddings [B, D], not normalised."""
        v = self.image_adaptor(images)  # [B, D]
        t = self.text_adaptor(prompts.embeddings)  # [M, D]
        if self.pool != "max":
            t = prompts.pooling(self.pool) @ t  # [2C, D]
        length = v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        # Dividing the small product spares writing a normalised copy of v, forth and back.
        cosine = (v @ F.normalize(t, dim=-1).T) / length  # [B, 2C or M]
        if self.pool == "max":
            # -2 is below every cosine; backward would count ties with it if it equalled one
            group, out = prompts.group.expand(len(v), -1), cosine.new_full((len(v), prompts.groups), -2.0)
            cosine = out.scatter_reduce(1, group, cosine, "amax", include_self=False)  # [B, 2C]
        return cosine[:, 0::2], cosine[:, 1::2]

    def logits(self, images: torch.Tensor, prompts: PromptBank) -> torch.Tensor:
        """cos(v, t+) - cos(v, t-) [B, C] in [-2, 2], times the scale; cos(v, t+) alone without negatives."""
        positive, negative = self(images, prompts)
        return self.logit_scale * (positive - negative if self.negatives else positive)

    def scores(self, images: torch.Tensor, prompts: PromptBank, rule: str = "diff") -> tuple:
        """Scores in [0, 1] and decisions 0/1, [B, C]. diff: (cos+ - cos- + 2) / 4; pos: (cos+ + 1) / 2."""
        positive, negative = self(images, prompts)
        decisions = positive > (negative if self.negatives else 0)
        diff = rule == "diff" and self.negatives
        return (positive - negative + 2) / 4 if diff else (positive + 1) / 2, decisions.float()


# ---------------------------------------------------------------------------------------------------- 3. Loss


def prompt_contrastive_loss(
    logits: torch.Tensor, labels: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Mean binary cross-entropy with logits over the known labels; both [B, C], nan is unknown.

    All unknown gives 0 with a graph. `count` divides instead of the number known here: the whole batch's,
    when this rank holds a part of it.
    """
    known = ~labels.isnan()
    loss = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (loss * known).sum() / max(1, int(known.sum()) if count is None else count)


# ----------------------------------------------------------------------------------------------- 4. Scenarios


@dataclass(frozen=True)
class Task:
    """One step of a scenario: the rows [n] it trains on, in file order, and the label columns it trains."""

    name: str
    rows: np.ndarray
    classes: tuple[int, ...]


def make_tasks(
    scenario: str, labels: np.ndarray, class_names: Sequence[str], parts: int | None, seed: int,
    patients: Sequence[str] | None = None, order: Sequence[str] | None = None, contiguous: bool = False,
    positives_only: bool = False,
) -> list[Task]:  # fmt: skip
    """Cut training rows 0..N-1 with labels [N, C] into the tasks of a scenario.

    data: `parts` (5) parts train all classes. class: part t trains the t-th class (with fewer parts than
    classes, the t-th group of them); label: part t trains classes 0..t. joint: one task; zero: none. Parts
    are disjoint and share no patient; `contiguous` is the authors' cut, ceil(N / parts) rows in file order.
    `positives_only`: class-incremental task t has all positives of its classes instead, so that an image with
    two findings comes twice. `order` names the classes in the order of their arrival.
    """
    n, names = len(labels), list(class_names)
    if unknown := [name for name in order or () if name not in names]:
        raise InputError(f"--class-order {unknown[0]!r}: {nearest(unknown[0], names)}")
    columns, everything = [names.index(name) for name in order or names], tuple(range(len(names)))
    if sorted(columns) != list(everything):
        raise InputError(f"--class-order must name each class once: {', '.join(names)}")
    if scenario in ("zero", "joint"):
        return [Task("joint", np.arange(n), everything)] if scenario == "joint" else []
    parts = parts or (5 if scenario == "data" else len(names))
    if scenario != "data" and parts > len(names):
        raise InputError(f"--parts {parts}: {scenario}-incremental has one per class at most ({len(names)})")
    part, groups = part_of_rows(n, parts, seed, patients, contiguous), np.array_split(columns, parts)
    tasks = []
    for t, group in enumerate(groups if scenario != "data" else range(parts)):
        rows, name, trained = np.flatnonzero(part == t), f"part {t + 1}", everything
        if scenario != "data":
            name = " + ".join(names[c] for c in group)
            trained = tuple(map(int, group if scenario == "class" else np.concatenate(groups[: t + 1])))
        if scenario == "class" and positives_only:
            rows = np.flatnonzero((labels[:, trained] == 1).any(1))
        if not len(rows):
            raise InputError(f"--parts {parts}: task {name!r} has no images; use fewer parts")
        tasks.append(Task(name, rows, trained))
    return tasks


def part_of_rows(
    n: int, parts: int, seed: int, patients: Sequence[str] | None, contiguous: bool
) -> np.ndarray:
    """The part [N] of every row: whole patients in random order, or contiguous rows."""
    if contiguous:
        return np.arange(n) // max(1, math.ceil(n / parts))
    ids, patient = np.unique(np.arange(n) if patients is None else np.asarray(patients), return_inverse=True)
    if parts > len(ids):
        raise InputError(f"--parts {parts} is larger than the number of training patients ({len(ids)})")
    part = np.empty(len(ids), np.int64)
    for t, chosen in enumerate(np.array_split(np.random.default_rng(seed).permutation(len(ids)), parts)):
        part[chosen] = t
    return part[patient]


# ------------------------------------------------------------------------------------------------- 5. Metrics


def evaluate(scores: np.ndarray, predictions: np.ndarray, labels: np.ndarray, class_names=None) -> dict:
    """Multi-label metrics of scores, 0/1 predictions and labels, each [N, C]; nan labels are not scored.

    A class whose known labels are all alike is nan, named in a warning and left out of the means. Weighted
    means weigh by positives; accuracy is the exact match of fully labelled images.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    names = list(class_names or map(str, range(labels.shape[1])))
    if not np.isfinite(scores).all():
        raise InputError("scores are not finite: the embeddings hold huge numbers, or the weights diverged")
    values, positives = np.full((5, len(names)), np.nan), np.zeros(len(names))
    for c, name in enumerate(names):
        known = ~np.isnan(labels[:, c])
        y, score, decision = labels[known, c], scores[known, c], predictions[known, c]
        if len(np.unique(y)) < 2:
            warnings.warn(f"{name}: known labels in a split are all alike, so it is not scored", stacklevel=2)
            continue
        recalled = precision_recall_fscore_support(y, decision, average="binary", zero_division=0)
        precision, recall, f1, _ = recalled
        values[:, c] = roc_auc_score(y, score), f1, average_precision_score(y, score), precision, recall
        positives[c] = y.sum()
    scored, complete = positives > 0, ~np.isnan(labels).any(1)
    macro, weighted = np.full(5, np.nan), np.full(5, np.nan)
    if scored.any():
        macro = values[:, scored].mean(1)
        weighted = np.average(values[:, scored], axis=1, weights=positives[scored])
    exact = (predictions == labels)[complete].all(1).mean() if complete.any() else math.nan
    named = [dict(zip(names, row.tolist())) for row in values[:3]]
    return {
        "auroc_macro": float(macro[0]), "auroc_weighted": float(weighted[0]), "f1_macro": float(macro[1]),
        "f1_weighted": float(weighted[1]), "precision_weighted": float(weighted[3]),
        "recall_weighted": float(weighted[4]), "accuracy": float(exact), "ap_macro": float(macro[2]),
        "auroc": named[0], "f1": named[1], "ap": named[2], "n": len(labels),
    }  # fmt: skip


def bootstrap_ci(
    scores: np.ndarray, labels: np.ndarray, patients: Sequence[str], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of macro AUROC, resampling patients with replacement; nan when no class can be scored.

    A resampled patient is a weight of its images, so that one sort a class serves all resamples; tied scores
    count one half, which is scikit-learn's weighted AUROC.
    """
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), resamples)
    drawn = drawn.astype(np.float32)  # [R, patients], whole numbers
    total, scored = np.zeros(resamples), np.zeros(resamples)
    for c in range(labels.shape[1]):
        positive, negative = (np.flatnonzero(labels[:, c] == value) for value in (1, 0))
        negative = negative[np.argsort(scores[negative, c], kind="stable")]
        if not len(positive) or not len(negative):
            continue
        ranked = scores[negative, c]
        below, upto = (np.searchsorted(ranked, scores[positive, c], side) for side in ("left", "right"))
        for block in np.array_split(np.arange(resamples), 1 + resamples * len(labels) // 4_000_000):
            won = np.zeros((len(block), len(negative) + 1), np.float32)  # negatives' weight up to a rank
            np.cumsum(drawn[np.ix_(block, patient[negative])], axis=1, out=won[:, 1:])
            weight = drawn[np.ix_(block, patient[positive])]  # [R, positives]
            wins = (weight * (won[:, below] + won[:, upto])).sum(1, dtype=np.float64) / 2
            pairs = weight.sum(1, dtype=np.float64) * won[:, -1]
            total[block] += wins / np.maximum(pairs, 1)
            scored[block] += pairs > 0
    if not scored.any():
        return math.nan, math.nan
    low, high = np.percentile(total[scored > 0] / scored[scored > 0], [2.5, 97.5])
    return float(low), float(high)


def continual_metrics(auroc: np.ndarray, tasks: Sequence[Task], zero: np.ndarray) -> dict[str, float]:
    """Average AUROC, forgetting, backward and forward transfer (README "Definitions"); nan without a class.

    auroc [T, C]: test AUROC of class c after task t; zero [C]: zero-shot. Unscored classes are left out.
    """
    grid = np.vstack([zero, *auroc])  # [T + 1, C]; row 0 is zero-shot
    last, mean = len(grid) - 1, lambda values: float(np.mean(values)) if values else math.nan
    first = {c: t for t, task in reversed(list(enumerate(tasks, 1))) for c in task.classes}  # k(c)
    scored = [c for c in range(len(zero)) if not np.isnan(grid[:, c]).any()]
    earlier = [(c, first[c]) for c in scored if first.get(c, last) < last]
    later = [(c, first[c]) for c in scored if first.get(c, 1) > 1]
    return {
        "average_auroc": mean([grid[last, c] for c in scored]),
        "forgetting": mean([grid[k:last, c].max() - grid[last, c] for c, k in earlier]),
        "backward_transfer": mean([grid[last, c] - grid[k, c] for c, k in earlier]),
        "forward_transfer": mean([grid[k - 1, c] - grid[0, c] for c, k in later]),
    }


# ------------------------------------------------------------------------------------------------ 6. Training


def fill_in(config) -> Path:
    """`config.output` with the config's settings where {name} stands; InputError for a name that is none."""
    values = dataclasses.asdict(config)
    for name in (name for name in values if name.endswith("encoder")):  # a name, an id, a path, NAME=FILE
        values[name] = Path(values[name].split("=")[0]).name.replace(":", "-")
    try:
        return Path(config.output.format(**values))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"--output {config.output}: {error} is no setting of a run") from None


def setting(default, help: str, **metadata):
    """A dataclass field that `build_parser` makes an option of.

    metadata: choices, type, nargs; flag; group opens a section of --help; many: several values, several runs.
    """
    return field(default=default, metadata={"help": help, **metadata})


def refuse_values(config, *rules: tuple[str, Callable, str]) -> None:
    """InputError for a setting that breaks its rule: (names, what holds for a good value, "be positive")."""
    for names, good, rule in rules:
        for name in names.split():
            if (value := getattr(config, name)) is not None and not good(value):
                raise InputError(f"--{name.replace('_', '-')} {value} must {rule}")


POSITIVE = (lambda value: 0 < value < math.inf), "be positive"
SEED = (lambda value: 0 <= value < 2**32), "be from 0 to 4294967295"


@dataclass(frozen=True)
class DataConfig:
    """The data set: settings that all programs have."""

    # fmt: off
    data: str = setting("demo", "data set", group="data",
                        choices=("demo", "csv", "nih", "chexpert", "mimic", "chestmnist"))
    data_dir: str | None = setting(None, "folder of the data set; chestmnist is downloaded to it")
    labels_csv: str | None = setting(None, "label file instead of the data set's own")
    classes: tuple[str, ...] | None = setting(None, "findings, in order (default: see README)", nargs="+")
    view: str = setting("all", "views, for chexpert and mimic", choices=("all", "frontal", "lateral"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(None, "what a blank label becomes (csv: ignore)", choices=("zero", "ignore"))
    size: int = setting(224, "image side, for chestmnist", choices=(28, 64, 128, 224))
    demo_images: int = setting(6000, "number of phantoms in the demo")
    # fmt: on

    @property
    def root(self) -> Path:
        """The data set's folder, which must exist."""
        if self.data_dir is None or not Path(self.data_dir).is_dir():
            raise InputError(f"--data {self.data} needs its folder; --data-dir {self.data_dir} is none")
        return Path(self.data_dir)


DATA_KEYS = (*(item.name for item in dataclasses.fields(DataConfig)), "cache_dir")


@dataclass(frozen=True)
class Config(DataConfig):
    """Every setting of a run; the command line is made from it. What is None here is settled by the data."""

    # fmt: off
    skip_bad_images: bool = setting(False, "leave out unreadable images, and count them, instead of stopping")

    encoder: str = setting("tiny", "tiny, biomedclip, biovil, a folder, a CLIP or SigLIP id", group="encoder")
    encoder_dir: str | None = setting(None, "folder of the encoder's files as published: no network")
    crop: int | None = setting(None, "centre crop of BioViL (RE-tune: 512; its own: 480)", type=int)
    precision: str = setting("fp32", "arithmetic of the encoder", choices=("fp32", "bf16", "fp16"))
    store: str = setting("fp32", "numbers in the embedding cache", choices=("fp32", "fp16"))
    encode_batch: int = setting(32, "images a batch of the encoder")
    workers: int = setting(min(8, os.cpu_count() or 1), "processes that decode images")
    cache_dir: str = setting("runs/cache", "folder of the embedding cache")

    scenario: str = setting("data", "how training data arrive", many=True,
                            choices=("data", "class", "label", "joint", "zero"), group="scenario")
    parts: int | None = setting(None, "parts of the training set (5, or one per class)", type=int, many=True)
    class_order: tuple[str, ...] | None = setting(None, "order of arrival, or `random` by seed", nargs="+")
    contiguous: bool = setting(False, "cut parts in file order, as the authors do, instead of by patient")
    positives_only: bool = setting(False, "class-incremental: train on all positives of the class only")

    method: str = setting("retune", "retune, or a baseline", group="method", many=True,
                          choices=("retune", "linear", "mlp", "ewc", "lwf", "replay", "joint"))
    memory: int = setting(500, "embeddings that the replay baseline stores")
    adaptor: str = setting("mlp", "mlp (the paper's), linear, residual (ours)", many=True,
                           choices=("mlp", "linear", "residual"))
    adapt: str = setting("both", "towers that get an adaptor", many=True,
                         choices=("both", "shared", "image", "text"))
    pool: str = setting("mean", "how a class's prompts join", choices=("mean", "single", "max"), many=True)
    negatives: bool = setting(True, "train and score with positive prompts alone", flag="--no-negatives")
    score: str = setting("diff", "score for AUROC; diff is the loss's", choices=("diff", "pos"), many=True)
    logit_scale: float = setting(1.0, "factor on the logits (authors: none)", many=True)
    prompts: str = setting(str(HERE / "prompts.json"), "file of positive and negative prompts")
    wording: str = setting("specific", "prompts of each finding, or templates", many=True,
                           choices=("specific", "generic"))

    epochs: int | None = setting(None, "epochs a task (10)", type=int, group="training")
    lr: float | None = setting(None, "learning rate (authors: 1e-4; small sets: 1e-3)", type=float, many=True)
    batch_size: int | None = setting(None, "batch size (authors: 6144; small sets: 64)", type=int)
    optimizer: str = setting("adam", "optimiser, one for all tasks", choices=("adam", "sgd"))
    seed: int = setting(27, "seed; several give mean and standard deviation", many=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    output: str = setting("runs/{data}-{encoder}-{scenario}-seed{seed}",
                          "folder of the run; any setting in braces is filled in")
    figures: bool = setting(True, "draw no figures", flag="--no-figures")
    # fmt: on

    def __post_init__(self):
        positive = "demo_images encode_batch parts memory epochs batch_size lr logit_scale"
        refuse_values(self, (positive, *POSITIVE), ("seed workers", *SEED))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return fill_in(self)


def same(name: str):
    """The setting `name` of `Config` in another program's configuration."""
    original = Config.__dataclass_fields__[name]
    return field(default=original.default, metadata=original.metadata)


AUTHORS = {"epochs": 10, "lr": 1e-4, "batch_size": 6144}  # arXiv 2410.17827
SMALL = {"epochs": 10, "lr": 1e-3, "batch_size": 64}  # (ours) enough steps for a small set to learn
SMALL_SET = 20_000  # training images from which on the authors' settings hold
NOT_RESULTS = (  # settings that may differ when a run is resumed
    "data_dir", "output", "cache_dir", "device", "workers", "encode_batch", "encoder_dir", "prompts",
    "figures", "skip_bad_images",
)  # fmt: skip


def settle(config: Config, data: Radiographs) -> Config:
    """Fill in what the data decide: hyperparameters by the size of the set, a random class order."""
    preset = SMALL if len(data.where("train")) < SMALL_SET else AUTHORS
    chosen = {name: value for name, value in preset.items() if getattr(config, name) is None}
    if config.class_order == ("random",):
        order = np.random.default_rng(config.seed).permutation(len(data.class_names))
        chosen["class_order"] = tuple(data.class_names[c] for c in order)
    return dataclasses.replace(config, **chosen)


def pick_device(name: str) -> str:
    """auto: this rank's GPU, else Apple's, else the CPU."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from None
        return name
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def release(embeddings: np.ndarray) -> None:
    """Hand the pages of a memory map back, so that resident memory does not grow with what was read."""
    if hasattr(embeddings.base, "madvise"):  # not on Windows, and not of an array in memory
        import mmap

        embeddings.base.madvise(mmap.MADV_DONTNEED)


def read_rows(embeddings: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
    """Copy rows [B] of a memory map [N, D] into memory: float32 [B, D]."""
    out = torch.empty(len(rows), embeddings.shape[1])
    for i in range(0, len(rows), 1024):  # few at a time: a row may bring 2 MB of the file into memory
        out[i : i + 1024] = torch.from_numpy(np.take(embeddings, rows[i : i + 1024].numpy(), axis=0))
        release(embeddings)
    return out


WINDOW = 64 << 20  # bytes of embeddings that training holds in memory
BLOCK = 64  # neighbouring rows that are read together when a task is larger than the window


def shuffled_windows(rows: torch.Tensor, window: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rows [n] in pieces to load one after the other: all at once, or random blocks of neighbours.

    Up to `window` rows are one piece, so that shuffling it is the authors' shuffle of the whole task.
    """
    if len(rows) <= window:
        yield rows
    else:
        blocks = torch.randperm(math.ceil(len(rows) / BLOCK), generator=generator).int()
        order = (blocks[:, None] * BLOCK + torch.arange(BLOCK, dtype=torch.int32)).flatten()
        order = order[order < len(rows)]  # the last block may be short
        yield from (rows[part] for part in order.split(window))


def fit(
    model: nn.Module, bank: PromptBank, embeddings: np.ndarray, labels: torch.Tensor, task: Task,
    optimizer: torch.optim.Optimizer, *, epochs: int, batch_size: int, generator: torch.Generator,
    device: str = "cpu", penalty: Callable | None = None,
) -> None:  # fmt: skip
    """Train on one task: its rows of embeddings [N, D] and labels [N, C], the loss on its classes alone.

    Under torchrun each rank takes its share of the same global batch and gradients are summed, which is one
    process's step. `penalty(images, logits)` adds to the loss (baselines). InputError for a loss not finite.
    """
    rank, world = ranks()
    rows, columns = torch.from_numpy(task.rows), list(task.classes)
    if columns == list(range(labels.shape[1])):
        columns = slice(None)  # a view of all; a list would copy in every step
    window = max(1, WINDOW // (4 * embeddings.shape[1] * batch_size)) * batch_size
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loaded, steps = None, epochs * math.ceil(len(rows) / batch_size)
    torch.empty(31 << 18)  # freed, it makes glibc keep what steps free; new pages cost a tenth of their time
    with progress(total=steps, desc=f"training {task.name}", unit="step") as bar:
        for piece in (p for _ in range(epochs) for p in shuffled_windows(rows, window, generator)):
            if loaded is not piece:
                x = None  # let go of one window before the next is read
                x, y = read_rows(embeddings, piece), labels[piece][:, columns]  # [n, D], [n, classes]
                loaded = piece
            for batch in torch.randperm(len(piece), generator=generator).split(batch_size):
                target, batch = y[batch], batch[rank::world]
                count = int((~target.isnan()).sum())
                images = x.index_select(0, batch).to(device)
                target = target[rank::world].to(device)
                logits = model.logits(images, bank)
                loss = prompt_contrastive_loss(logits[:, columns], target, count)
                if penalty is not None:
                    loss = loss + penalty(images, logits) / world
                bar.update()
                if not math.isfinite(loss.item()):
                    raise InputError(f"task {task.name!r}, step {bar.n}: loss is {loss.item()}; lower --lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                sum_gradients(parameters)
                optimizer.step()
    if not all(p.isfinite().all() for p in parameters):  # by the last step, which no loss came after
        raise InputError(f"task {task.name!r}: its weights are no longer finite; lower --lr")


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in one message."""
    if ranks()[1] > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(gradient.view_as(p))


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into a model; InputError when names or shapes differ."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit this model ({' '.join(str(error).split())})") from None


@dataclass
class Results:
    """A run's folder and the content of its metrics.json."""

    folder: Path
    metrics: dict


def claim(folder: Path, identity: dict) -> None:
    """Write config.json, or refuse a folder that holds another configuration, saying what differs."""
    path, identity = folder / "config.json", json.loads(json.dumps(identity))
    if not path.exists():
        return write_json(path, identity)
    old = read_json(path)
    differ = [key for key in identity if key not in NOT_RESULTS and old.get(key) != identity[key]]
    if differ:
        pairs = [f"{key} {str(old.get(key))[:60]}, now {str(identity[key])[:60]}" for key in differ]
        raise InputError(f"{folder}: holds another run ({'; '.join(pairs)}); use another --output")


def cut_tasks(config: Config, data: Radiographs) -> list[Task]:
    """The tasks of the scenario, with rows counted in the whole data set."""
    train = data.where("train")
    tasks = make_tasks(
        config.scenario, data.labels[train], data.class_names, config.parts, config.seed,
        data.patients[train], config.class_order, config.contiguous, config.positives_only,
    )  # fmt: skip
    return [dataclasses.replace(task, rows=train[task.rows]) for task in tasks]


def run(config: Config, load_data: Callable | None = None, load_encoder: Callable | None = None) -> Results:
    """A whole scenario: embed, zero-shot, each task, metrics after each; resumes at an unfinished task.

    What the run's folder holds decides what is left to do: finished tasks are loaded and measured again, so
    that an interrupted run ends with the same metrics, bit for bit.
    """

    load_data, load_encoder = load_data or load_radiographs, load_encoder or DualEncoder.load
    data = load_data(dataclasses.replace(Config(), **{key: getattr(config, key) for key in DATA_KEYS}))
    data, config = dataclasses.replace(data, split=data.split.copy()), settle(config, data)
    prompts = load_prompts(Path(config.prompts), data.class_names, config.wording)
    tasks, device = cut_tasks(config, data), pick_device(config.device)
    encoder = load_encoder(config.encoder, config.encoder_dir, config.crop)
    introduce(config, data, tasks, device)
    digest = hashlib.sha256(repr((data.names, data.patients.tolist(), data.split.tolist())).encode())
    digest.update(data.labels.tobytes())
    identity = dataclasses.asdict(config) | {
        "prompt_texts": prompts, "encoder_fingerprint": encoder.fingerprint(),
        "data_fingerprint": digest.hexdigest(),
    }  # fmt: skip
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False) if ranks()[0] == 0 else contextlib.nullcontext():
        if ranks()[0] == 0:
            claim(folder, identity)
        if (folder / "metrics.json").exists():
            (folder / "resume.safetensors").unlink(missing_ok=True)
            say(f"{folder}: finished before; delete it to run again")
            return Results(folder, read_json(folder / "metrics.json"))
        embeddings = embed(
            encoder, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
            precision=config.precision, store=config.store, device=device,
            skip_bad_images=config.skip_bad_images,
        )  # fmt: skip
        facts = embedding_facts(embeddings)
        if bad := facts["unreadable"]:
            say(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
            data.split[list(bad)] = "unreadable"
            refuse_empty_splits(data)
            tasks = cut_tasks(config, data)
        bank = embed_prompts(encoder, prompts).to(device)
        cost = {
            "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
            "embed_seconds": facts["seconds"], "images_per_second": len(embeddings) / facts["seconds"],
        }  # fmt: skip
        results = train_and_measure(config, identity, data, tasks, embeddings, bank, cost, device)
        if ranks()[0] == 0:
            report(results, data, tasks)
    return results


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block alone; modules draw their weights from no other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def build_model(config: Config, dim: int, n_classes: int) -> nn.Module:
    """The model of `config.method` for embeddings [.., D], seeded without touching the global generator."""
    with seeded(config.seed):
        if config.method != "retune":
            return importlib.import_module("experiments.baselines").build(config, dim, n_classes)
        return RETune(dim, config.adaptor, config.adapt, config.pool, config.negatives, config.logit_scale)


def train_and_measure(config, identity, data, tasks, embeddings, bank, cost, device) -> Results:
    """Zero-shot, then every task: train it or load what an earlier process saved, and measure."""
    folder, dim, labels = config.folder, embeddings.shape[1], torch.from_numpy(data.labels)

    def measure(model: nn.Module) -> dict:
        splits = ("val", "test") if ranks()[0] == 0 else ()
        return {split: measure_split(model, bank, embeddings, data, split, config.score) for split in splits}

    zero_shot = measure(RETune(dim, adapt="none", pool=config.pool, negatives=config.negatives))
    model = build_model(config, dim, len(data.class_names)).to(device)
    make_optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    optimizer = make_optimizer(model.parameters(), lr=config.lr, fused=True)
    metadata = {
        "classes": data.class_names, "prompts": identity["prompt_texts"], "dim": dim,
        "encoder": config.encoder, "encoder_fingerprint": identity["encoder_fingerprint"],
    } | {key: identity[key] for key in MODEL_KEYS}  # fmt: skip
    (done, seconds), after_task = restore(folder, model, optimizer), []
    for k, task in enumerate(tasks, 1):
        file = folder / f"task_{k}.safetensors"
        if k <= done:
            finished = build_model(config, dim, len(data.class_names)).to(device)
            load_weights(finished, load_tensors(file)[0], file)
            after_task.append(measure(finished))
            continue
        start, generator = time.perf_counter(), torch.Generator().manual_seed(10_007 * config.seed + k)
        seen = model.rehearse(task, labels) if hasattr(model, "rehearse") else (task, labels)
        fit(
            model, bank, embeddings, seen[1], seen[0], optimizer, epochs=config.epochs,
            batch_size=config.batch_size, generator=generator, device=device,
            penalty=getattr(model, "penalty", None),
        )  # fmt: skip
        if hasattr(model, "consolidate"):
            model.consolidate(embeddings, labels, task, bank)
        seconds += time.perf_counter() - start
        if ranks()[0] == 0:
            save_tensors(file, model.state_dict(), metadata)
            keep(folder, model, optimizer, k, seconds)
        after_task.append(measure(model))
    if ranks()[0] != 0:
        return Results(folder, {})
    save_tensors(folder / "adaptors.safetensors", model.state_dict(), metadata)
    auroc = np.array([[m["test"]["auroc"][c] for c in data.class_names] for m in (zero_shot, *after_task)])
    cost = cost | {
        "trainable_parameters": sum(p.numel() for p in model.parameters()) if tasks else 0,
        "train_seconds": seconds, "peak_memory_mb": peak_memory_mb(),
        "stored_bytes": model.stored_bytes() if hasattr(model, "stored_bytes") else 0,
        "train_patients": len(np.unique(data.patients[data.where("train")])),
    }  # fmt: skip
    return Results(folder, strict({
        "config": identity, "classes": data.class_names,
        "tasks": [{"name": task.name, "classes": [data.class_names[c] for c in task.classes],
                   "n_train": len(task.rows)} for task in tasks],
        "zero_shot": zero_shot, "after_task": after_task,
        "continual": continual_metrics(auroc[1:], tasks, auroc[0]), "cost": cost,
    }))  # fmt: skip


MODEL_KEYS = ("method", "adaptor", "adapt", "pool", "negatives", "logit_scale", "score", "crop", "seed")


@torch.inference_mode()
def score_rows(model, bank: PromptBank, embeddings: np.ndarray, rows: np.ndarray, rule: str) -> tuple:
    """(scores, decisions), float32 [n, C] each, of rows [n] of the embeddings [N, D]."""
    device, rows = bank.embeddings.device, torch.from_numpy(rows)
    parts = [model.scores(read_rows(embeddings, piece).to(device), bank, rule) for piece in rows.split(8192)]
    return tuple(torch.cat(part).cpu().numpy() for part in zip(*parts))


def measure_split(model, bank, embeddings, data: Radiographs, split: str, rule: str) -> dict:
    """metrics.json's M of one split, with the bootstrap interval."""
    rows = data.where(split)
    scores, decisions = score_rows(model, bank, embeddings, rows, rule)
    metrics = evaluate(scores, decisions, data.labels[rows], data.class_names)
    return metrics | {"auroc_macro_ci": list(bootstrap_ci(scores, data.labels[rows], data.patients[rows]))}


def keep(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, task: int, seconds: float) -> None:
    """Save what the task after `task` starts from: weights and the optimiser's state."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items() if value is not None}
    save_tensors(folder / "resume.safetensors", tensors, {"task": task, "seconds": seconds})


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load what `keep` saved: (finished tasks, seconds they took); (0, 0.0) in a new folder."""
    path = folder / "resume.safetensors"
    if not path.exists():
        return 0, 0.0
    tensors, metadata = load_tensors(path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    load_weights(model, weights, path)
    state: dict[int, dict] = {}
    for kind, i, key in (k.split(".", 2) for k in tensors if k.startswith("optimizer.")):
        state.setdefault(int(i), {})[key] = tensors[f"{kind}.{i}.{key}"]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["task"], metadata["seconds"]


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB; in bytes on macOS
    return peak / (1 << (20 if sys.platform == "darwin" else 10))


# -------------------------------------------------------------------------------------------------- 7. Report


def introduce(config: Config, data: Radiographs, tasks: Sequence[Task], device: str) -> None:
    """Say before a run what it will do: the data, what became of their labels, the settings in force."""
    counts = ", ".join(f"{(data.split == split).sum():,} {split}" for split in ("train", "val", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without a known label has no share
        shares = zip(data.class_names, np.nanmean(data.labels, axis=0))
    say(data.note or f"{config.data}: every label is known")
    say(f"{counts} images of {len(np.unique(data.patients)):,} patients")
    say("positive: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    ours = " (ours)" if config.adaptor == "residual" else ""
    say(
        f"{config.method}, {config.scenario}, {len(tasks)} tasks; encoder {config.encoder}; adaptor"
        f" {config.adaptor}{ours} on {config.adapt}; {config.optimizer}, lr {config.lr:g}, batch"
        f" {config.batch_size}, {config.epochs} epochs a task; logit scale {config.logit_scale:g}, pool"
        f" {config.pool}, score {config.score}, {'' if config.negatives else 'no '}negative prompts;"
        f" seed {config.seed}; {device}\n"
    )


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """An aligned Markdown table; floats get three decimals, None and nan a dash."""

    def text(value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def stages(metrics: dict) -> list[tuple[str, dict]]:
    """(name, M of the test split) of zero-shot and of every task."""
    ours = " [residual, ours]" if metrics["config"]["adaptor"] == "residual" else ""
    names = ["zero-shot", *(f"{k}. {task['name']}{ours}" for k, task in enumerate(metrics["tasks"], 1))]
    return list(zip(names, (m["test"] for m in (metrics["zero_shot"], *metrics["after_task"]))))


def summary(metrics: dict) -> str:
    """The run in text: AUROC per task and class, continual-learning measures, a line for a paper."""
    config, (_, last) = metrics["config"], stages(metrics)[-1]
    header = ["test AUROC after", *metrics["classes"], "macro AUROC", "macro AP", "macro F1", "exact match"]
    rows = [
        [name, *m["auroc"].values(), m["auroc_macro"], m["ap_macro"], m["f1_macro"], m["accuracy"]]
        for name, m in stages(metrics)
    ]
    value = {key: "-" if v is None else f"{v:.3f}" for key, v in metrics["continual"].items()}
    low, high = ("-" if v is None else f"{v:.3f}" for v in last["auroc_macro_ci"])
    auroc = "-" if last["auroc_macro"] is None else f"{last['auroc_macro']:.3f}"
    run = ", ".join(str(config[key]) for key in ("method", "data", "encoder", "scenario"))
    interval = f"95% CI {low} to {high}, 1,000 patient-level bootstrap resamples, n = {last['n']:,} images"
    lines = [markdown_table(header, rows), ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())]
    lines.append(f"{run}, seed {config['seed']}: macro AUROC {auroc} ({interval})")
    if config["data"] == "demo":
        lines.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(lines)


def report(results: Results, data: Radiographs, tasks: Sequence[Task]) -> None:
    """Write splits.csv, figures, table.md and, last, metrics.json, which says that the run is whole."""
    folder, metrics, seen = results.folder, results.metrics, [[] for _ in data.names]
    for k, task in enumerate(tasks, 1):
        for row in task.rows.tolist():
            seen[row].append(str(k))
    write_splits(folder / "splits.csv", data, "task", map(" ".join, seen))
    for key, title in (("auroc", "test AUROC"), ("f1", "test F1")) if metrics["config"]["figures"] else ():
        heatmap(folder / f"{key}.png", metrics, key, title)
    write_text(folder / "table.md", summary(metrics) + "\n")
    write_json(folder / "metrics.json", metrics)
    (folder / "resume.safetensors").unlink(missing_ok=True)


def write_splits(path: Path, data: Radiographs, title: str, column: Iterable[str]) -> None:
    """Write a table of every image's patient and split, and what `column` [N] says of it."""
    with atomic(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        lines = zip(data.names, data.patients, data.split, column)
        csv.writer(file).writerows([("image", "patient", "split", title), *lines])


def heatmap(path: Path, metrics: dict, key: str, title: str) -> None:
    """Task x class picture, zero-shot on top, values in the cells; grey, so that any printer will do."""
    from matplotlib.figure import Figure

    config, names = metrics["config"], [name for name, _ in stages(metrics)]
    grid = np.array([list(m[key].values()) for _, m in stages(metrics)], dtype=float)  # [T + 1, C]
    size = 3.2 + min(0.95 * grid.shape[1], 60), 1.7 + min(0.4 * len(grid), 60)  # inches; cells of any number
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    low, high = (0.5, 1.0) if key == "auroc" else (0.0, 1.0)
    picture = axes.imshow(grid, cmap="Greys", vmin=low, vmax=high, aspect="auto")
    for (t, c), value in np.ndenumerate(grid) if max(grid.shape) <= 64 else ():
        color = "white" if value > (low + 1.5 * high) / 2.5 else "black"
        axes.text(c, t, "-" if math.isnan(value) else f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(grid.shape[1]), metrics["classes"], rotation=25, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.axhline(0.5, color="black", linewidth=2)
    encoder = Path(config["encoder"]).name
    axes.set_title(f"{title}: {config['data']}, {encoder}, {config['scenario']}", fontsize=10)
    figure.colorbar(picture, ax=axes)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})


# -------------------------------------------------------------------------------------------- 8. Command line


def build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """A parser with an option for every field of a dataclass made with `setting`."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "%(prog)s [option ...]"}
    section = parser = argparse.ArgumentParser(description=description, **options)
    for item in dataclasses.fields(config_class):
        options = dict(item.metadata)
        if group := options.pop("group", None):
            section = parser.add_argument_group(group)
        many, flag = options.pop("many", False), options.pop("flag", f"--{item.name.replace('_', '-')}")
        if isinstance(item.default, bool):
            options["action"] = "store_false" if item.default else "store_true"
        elif item.default is not None:
            options.setdefault("type", type(item.default))
            options["help"] += f" (default: {str(item.default).removeprefix(f'{HERE}{os.sep}')})"
        options |= {"nargs": "+", "default": [item.default]} if many else {"default": item.default}
        section.add_argument(flag, dest=item.name, **options)
    return parser


def build_configs(config_class: type, arguments: argparse.Namespace) -> list:
    """One configuration for each combination of the options that take many values."""
    fields = dataclasses.fields(config_class)
    values = {item.name: getattr(arguments, item.name) for item in fields}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    many = [item.name for item in fields if item.metadata.get("many")]
    chosen = itertools.product(*(dict.fromkeys(values[name]) for name in many))
    return [config_class(**values | dict(zip(many, choice))) for choice in chosen]


def run_all(configs: Sequence[Config]) -> None:
    """Run every configuration and print its table; of several, also the mean and deviation over seeds."""
    if len({config.folder for config in configs}) < len(configs):
        many = [item.name for item in dataclasses.fields(Config) if item.metadata.get("many")]
        names = [f"{{{name}}}" for name in many if len({getattr(config, name) for config in configs}) > 1]
        names = " and ".join(names)
        raise InputError(f"{len(configs)} runs need a folder each; --output must contain {names}")

    runs, share = [], functools.lru_cache(maxsize=1)  # these runs mostly read the same data and encoder
    load_data, load_encoder = share(load_radiographs), share(DualEncoder.load)
    for config in configs:
        results = run(config, load_data, load_encoder)
        if ranks()[0] == 0:
            runs.append(results.metrics)
            say(f"{summary(results.metrics)}\n\nwritten to {results.folder}\n")
    if len(runs) > 1:
        from experiments.tables import seeds_table

        say(f"last task, test split, mean ± standard deviation over seeds\n\n{seeds_table(runs)}")


def predict(images: Sequence[str], folder: Path, config: Config) -> list[dict]:
    """Score images with a run's saved adaptors alone: [{"image", "findings": {name: {"score", "present"}}}].

    InputError when the encoder is not the one that the adaptors were trained on.
    """

    path, device = folder / "adaptors.safetensors", pick_device(config.device)
    weights, known = load_tensors(path)
    name = known["encoder"] if config.encoder == "tiny" else config.encoder
    encoder = DualEncoder.load(name, config.encoder_dir, crop=known["crop"]).to(device)
    if encoder.fingerprint() != known["encoder_fingerprint"]:
        raise InputError(f"{path}: trained on another encoder than {name}; name the right one with --encoder")
    settings = dataclasses.replace(config, **{key: known[key] for key in MODEL_KEYS})
    model = build_model(settings, known["dim"], len(known["classes"])).to(device).eval()
    load_weights(model, weights, path)
    bank, predictions = embed_prompts(encoder, known["prompts"]).to(device), []
    for image in progress(images, desc="predicting", unit="image"):
        embedding = encoder.encode_images(encoder.transform(read_image(Path(image)))[None].to(device))
        with torch.inference_mode():
            scores, decisions = model.scores(embedding, bank, known["score"])
        findings = zip(known["classes"], scores[0].tolist(), decisions[0].tolist())
        findings = {finding: {"score": round(s, 6), "present": d > 0} for finding, s, d in findings}
        predictions.append({"image": image, "findings": findings})
    return predictions


def print_predictions(predictions: list[dict], as_json: bool) -> None:
    """A table of image x finding with score and decision, or JSON."""
    if as_json:
        return print(json.dumps(predictions, indent=1))
    rows = []
    for p in predictions:
        cells = [f"{f['score']:.3f} {'yes' if f['present'] else ' no'}" for f in p["findings"].values()]
        rows.append([p["image"], *cells])
    print(markdown_table(["image", *predictions[0]["findings"]], rows))


def join_ranks() -> None:
    """Meet the other processes when torchrun started this one; encoding may keep them apart for hours."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=7))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on standard error for bad input."""
    parser = build_parser(Config, __doc__)
    other = parser.add_argument_group("instead of a run")
    other.add_argument("--predict", nargs="+", metavar="IMAGE", help="score images with a run's adaptors")
    other.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run")
    other.add_argument("--json", action="store_true", help="predictions as JSON")
    other.add_argument("--convert", metavar="ENCODER", help="write an encoder in our folder format, to --to")
    other.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder")
    arguments = parser.parse_args(argv)
    if bool(arguments.predict) != bool(arguments.run) or bool(arguments.convert) != bool(arguments.to):
        parser.error("--predict needs --run and --convert needs --to")
    try:
        configs = build_configs(Config, arguments)
        if arguments.convert:
            DualEncoder.load(arguments.convert, arguments.encoder_dir, crop=arguments.crop).save(arguments.to)
            print(f"written to {arguments.to}")
        elif arguments.predict:
            print_predictions(predict(arguments.predict, arguments.run, configs[0]), arguments.json)
        else:
            join_ranks()
            run_all(configs)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the patients where a data set has no splits
# Limits against files that unpack to more than any memory holds
MAX_PIXELS = 80_000_000  # of an image; it is refused before it is decoded
MAX_TABLE = 1 << 30  # bytes of a table, unpacked
MAX_ID = 1000  # characters of a patient's id: an array of texts gives each the space of the longest


@dataclass
class Radiographs:
    """A data set: N images with the labels of C findings.

    images: paths, or uint8 [N, H, W] (an array, or what yields [H, W] by row and draws it on demand).
    labels: float32 [N, C], 1 / 0 / nan; nan is unknown: never trained on, never scored.
    patients, split: [N] texts; split is "train", "val" or "test". names: [N], what reports call an image.
    rows: [N], where each image's labels stand ("labels.csv row 7"). reports: [N] texts, if there are any.
    note: what the loader decided, for the user to read. key: identifies images that are not files.
    """

    images: Sequence
    labels: np.ndarray
    class_names: Sequence[str]
    patients: Sequence[str]
    split: Sequence[str]
    names: Sequence[str] | None = None
    rows: Sequence[str] | None = None
    reports: Sequence[str] | None = None
    note: str = ""
    key: str | None = None

    def __post_init__(self):
        n = len(self.images)
        self.labels = np.asarray(self.labels, np.float32)
        self.patients, self.split = id_array(self.patients), np.asarray(self.split, "<U10")
        self.names = [f"image-{i:06d}" for i in range(n)] if self.names is None else list(self.names)
        self.rows = [f"row {i + 2}" for i in range(n)] if self.rows is None else list(self.rows)
        if {len(self.labels), len(self.patients), len(self.split), len(self.names), len(self.rows)} != {n}:
            raise InputError(f"labels, patients, split, names, rows: give one for each of {n} images")
        if self.labels.shape != (n, len(self.class_names)):
            wanted = f"{n} images x {len(self.class_names)} classes"
            raise InputError(f"labels {self.labels.shape} are not {wanted}")
        if not (np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)).all():
            raise InputError("labels must be 1, 0 or nan")

    def where(self, split: str) -> np.ndarray:
        """Rows of one split, int64, in file order."""
        return np.flatnonzero(self.split == split)


def id_array(ids: Sequence[str]) -> np.ndarray:
    """Patient ids as one array [N]; InputError for one that would make it huge."""
    ids = list(map(str, ids))
    if (longest := max(map(len, ids), default=0)) > MAX_ID:
        raise InputError(f"a patient id has {longest:,} characters; at most {MAX_ID:,} are read")
    return np.array(ids, str)


def patient_split(patients: Sequence[str], shares: dict[str, float]) -> np.ndarray:
    """The split of every image [N] by a hash of its patient id: new patients never move the old ones.

    shares: split -> share of the patients; their sum is 1.
    """
    edges = np.cumsum(list(shares.values()))[:-1]
    ids, patient = np.unique(id_array(patients), return_inverse=True)
    position = [int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") / 2**64 for p in ids]
    return np.array(list(shares))[np.searchsorted(edges, position, side="right")][patient]


def read_table(path: Path, required: Sequence[str] = ()) -> dict[str, list[str]]:
    """A CSV (or .gz) as {column: stripped values}; InputError names file and row. Row 1 is the header."""
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_TABLE + 1)
        if len(content) > MAX_TABLE:
            raise InputError(f"{path}: unpacks to more than the limit of {MAX_TABLE:,} bytes")
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header, *rows = [[value.strip() for value in row] for row in lines] or [[]]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable CSV ({error})") from None
    if twice := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{path}: column {min(twice)!r} is there twice")
    if missing := [name for name in required if name not in header]:
        raise InputError(f"{path}: no column {missing[0]!r}; the columns are {', '.join(header) or 'none'}")
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    if not rows:
        raise InputError(f"{path}: no rows")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path} row {i + 2}: {len(row)} fields where the header has {len(header)}")
    return {name: [row[j] for row in rows] for j, name in enumerate(header)}


def parse_labels(
    table: dict[str, list[str]], classes: Sequence[str], path: Path, uncertain: str, blank: str
) -> tuple[np.ndarray, str]:
    """Label columns as float32 [N, C], and a note that counts what -1 and blank labels became.

    uncertain: ones | zeros | ignore (CheXpert's U-Ones, U-Zeros, U-Ignore); blank: zero | ignore.
    """
    policy = {"ones": 1.0, "zeros": 0.0, "zero": 0.0, "ignore": math.nan}
    meaning = {"1": 1.0, "0": 0.0, "-1": policy[uncertain], "": policy[blank]}
    labels, counts = np.empty((len(table[classes[0]]), len(classes)), np.float32), {"-1": 0, "": 0}
    for j, name in enumerate(classes):
        number = Counter(table[name])
        plain = {value: "" if value.lower() == "nan" else value.removesuffix(".0") for value in number}
        for value, text in plain.items():
            if text not in meaning:
                where = f"{path} row {table[name].index(value) + 2}, column {name!r}"
                raise InputError(f"{where}: label {value[:40]!r} is not 1, 0, -1, blank")
            if text in counts:
                counts[text] += number[value]
        labels[:, j] = [meaning[plain[value]] for value in table[name]]
    note = f"labels: {counts['-1']:,} uncertain (-1) -> {uncertain}, {counts['']:,} blank -> {blank}"
    return labels, note


@functools.lru_cache(maxsize=100_000)
def real_folder(folder: str) -> str:
    """`os.path.realpath` that looks at each parent folder once: a data set has 100,000 of them."""
    parent, name = os.path.split(folder)
    if name in ("", os.curdir, os.pardir) or os.path.islink(folder):
        return os.path.realpath(folder)
    return os.path.join(real_folder(parent or os.curdir), name)


def safe_path(root: Path, relative: str, row: str) -> Path:
    """Join a path that a file gave to its root; InputError when it is empty or leaves the root in any way."""
    parts = relative.replace("\\", "/").split("/")
    if not relative or "\0" in relative or not parts[0] or parts[0][1:2] == ":" or ".." in parts:
        raise InputError(f"{row}: path {relative!r} must be relative and stay inside {root}")
    path, base = os.path.join(root, *parts), real_folder(os.fspath(root))
    real = os.path.realpath(path) if os.path.islink(path) else real_folder(os.path.dirname(path))
    if real != base and not real.startswith(os.path.join(base, "")):
        raise InputError(f"{row}: path {relative!r} is a link out of {root}; use real folders")
    return Path(path)


def load_demo(config: Config) -> Radiographs:
    """Synthetic radiographs of `phantoms.py`, drawn when needed. Numbers on them are not clinical."""
    from demo import phantoms

    demo = phantoms.make_phantoms(config.demo_images, seed=0, domain="demo")
    names = [f"phantom-{i:06d}" for i in range(len(demo.labels))]
    source = hashlib.sha256(Path(phantoms.__file__).read_bytes()).hexdigest()
    return Radiographs(
        demo.images, demo.labels, demo.class_names, demo.patients, patient_split(demo.patients, SHARES),
        names, reports=demo.reports, key=f"{config.demo_images} phantoms of {source}",
        note="DEMO: synthetic phantoms, not patients; these numbers say nothing about clinical performance.",
    )  # fmt: skip


def load_csv(config: Config) -> Radiographs:
    """Anybody's own data: `path`, a column per finding (1/0/-1/blank), optional `patient`, `split`, `report`.

    Paths are relative to --data-dir, which holds the only CSV unless --labels-csv names one. Without `split`:
    70/10/20% of the patients by hash. Without `patient` each image counts as a patient, and we say so.
    """
    path = Path(config.labels_csv) if config.labels_csv else one_file(config.root, ["*.csv"])
    table = read_table(path, ["path"])
    names, rows = table["path"], [f"{path} row {i + 2}" for i in range(len(table["path"]))]
    classes = [name for name in table if name not in ("path", "patient", "split", "report")]
    if not classes:
        raise InputError(f"{path}: no finding columns beside path, patient, split and report")
    root = config.root
    images = [safe_path(root, name, row) for name, row in zip(names, rows)]
    labels, note = parse_labels(table, classes, path, config.uncertain, config.blank or "ignore")
    note += "" if "patient" in table else "; no `patient` column: each image counts as a patient of its own"
    patients = table.get("patient", names)
    split = table.get("split") or patient_split(patients, SHARES)
    for patient, value, row in zip(patients, split, rows):
        if not patient or value not in ("train", "val", "test"):
            found = f"patient {patient!r}, split {str(value)!r}"
            raise InputError(f"{row}: {found}; need an id; train, val, test")
    return Radiographs(images, labels, classes, patients, split, names, rows, table.get("report"), note)


def one_file(root: Path, patterns: Sequence[str]) -> Path:
    """The only file of `root` that matches the first pattern which any file matches."""
    found = next(filter(None, (sorted(root.glob(pattern)) for pattern in patterns)), [])
    if len(found) != 1:
        count = f"{len(found)} files match" if found else "no file matches"
        raise InputError(f"{root}: {count} {' or '.join(patterns)}; name the label file with --labels-csv")
    return found[0]


def load_radiographs(config: Config) -> Radiographs:
    """The data set that `config` names, with its chosen classes; refuses what would falsify a result."""
    data = DATASETS[config.data](config)
    for name in config.classes or ():
        if name not in data.class_names:
            raise InputError(f"--classes {name!r}: {nearest(name, data.class_names)}")
    wanted = tuple(config.classes or data.class_names)
    if len(set(wanted)) < len(wanted):
        raise InputError(f"--classes names a finding twice: {', '.join(wanted)}")
    columns = [list(data.class_names).index(name) for name in wanted]
    data = dataclasses.replace(data, labels=data.labels[:, columns], class_names=wanted)
    first: dict[str, str] = {}
    home: dict[str, str] = {}
    for name, patient, split, row in zip(data.names, data.patients, data.split, data.rows):
        if first.setdefault(posixpath.normpath(name), row) is not row:
            before = first[posixpath.normpath(name)]
            raise InputError(f"{row}: image {name!r} is there twice, first in {before}")
        if home.setdefault(patient, split) != split:
            raise InputError(f"{row}: patient {str(patient)!r} is in {home[patient]} and in {split}")
    refuse_empty_splits(data)
    return data


def refuse_empty_splits(data: Radiographs) -> None:
    """InputError that names a split without images."""
    for split in ("train", "val", "test"):
        if not (data.split == split).any():
            raise InputError(f"the {split} split has no readable images; add patients or a split column")


def read_image(path: Path) -> torch.Tensor:
    """Decode a PNG, JPEG or DICOM file to uint8 [1 or 3, H, W]; InputError when it is not one.

    More than 8 bits are scaled by the image's own range, since 12-bit images come in 16-bit files. An alpha
    channel is dropped; DICOM's MONOCHROME1 is inverted.
    """
    from PIL import Image
    from torchvision.io import decode_image

    try:
        if path.suffix.lower() in (".dcm", ".dicom"):
            return read_dicom(path)
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise InputError(f"{path}: {image.size} pixels are more than the limit of {MAX_PIXELS:,}")
            pixels = decode_png(image) if image.format == "PNG" else None
        pixels = decode_image(str(path)) if pixels is None else pixels
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001 - decoders raise nearly every type on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable image ({reason})") from None
    pixels = pixels[: {2: 1, 4: 3}.get(len(pixels))]
    return pixels if pixels.dtype == torch.uint8 else stretch(pixels.float())


def decode_png(image) -> torch.Tensor | None:
    """An open PNG as [1, 2, 3 or 4, H, W], by PIL: torchvision 0.29's libpng ends the process on a damaged file.

    None for colours of 16 bits, which PIL would cut to 8: it only finds out whether the file is whole.
    """
    deep = "16" in str(image.tile[0][3]) and not image.mode.startswith("I")
    image.load()
    if deep:
        return None
    image = image.convert({"P": "RGB", "1": "L"}.get(image.mode, image.mode))
    pixels = np.array(image, np.float32 if image.mode.startswith("I") else np.uint8)  # [H, W] or [H, W, C]
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def stretch(pixels: torch.Tensor) -> torch.Tensor:
    """Scale an image's own range to uint8 0..255; a constant image becomes 0."""
    low, high = pixels.aminmax()
    return ((pixels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)


def read_dicom(path: Path) -> torch.Tensor:
    """A DICOM image as uint8 [1, H, W], through pydicom, which only users of DICOM need."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: DICOM needs pydicom (pip install pydicom)") from None
    try:
        syntax = pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:  # unpacked whole, whatever its size
            raise ValueError("deflated files are not read; store it in another transfer syntax")
        image = pydicom.dcmread(path)
        grey = image.get("SamplesPerPixel", 1) == 1 and int(image.get("NumberOfFrames") or 1) == 1
        if image.Rows * image.Columns > MAX_PIXELS or not grey:
            size = f"{image.Rows} x {image.Columns} pixels"
            raise ValueError(f"{size}; one grey image up to {MAX_PIXELS:,} is read")
        pixels = torch.from_numpy(image.pixel_array.astype(np.float32)).reshape(1, image.Rows, image.Columns)
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - pydicom's codecs raise nearly every type on a damaged file
        raise InputError(f"{path}: not a readable DICOM image ({type(error).__name__}: {error})") from None
    return stretch(-pixels if image.get("PhotometricInterpretation") == "MONOCHROME1" else pixels)


CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COMPETITION_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- ChestX-ray14


def load_nih(config: Config) -> Radiographs:
    """NIH ChestX-ray14: 112,120 frontal images of 30,805 patients, 14 findings, each present (1) or not (0).

    Both layouts (`images/`, `images_001..012/images/`) and the official lists (86,524 train_val, 25,596 test); an
    eighth of the train_val patients, by hash, become validation, which gives ChestMNIST's 7:1:2.
    Wang et al., "ChestX-ray8", CVPR 2017. Free to use; cite the paper and link to the NIH's download page.
    """
    root = config.root
    path = Path(config.labels_csv) if config.labels_csv else one_file(root, ["Data_Entry_2017*.csv"])
    table = read_table(path, ["Image Index", "Finding Labels", "Patient ID"])
    lists = {}
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        if not (root / file).is_file():
            raise InputError(f"{root / file}: no such file; the official lists decide the split")
        lists |= dict.fromkeys((root / file).read_text(encoding="utf-8", errors="replace").split(), split)
    names, rows = table["Image Index"], [f"{path} row {i + 2}" for i in range(len(table["Image Index"]))]
    labels = np.zeros((len(names), len(NIH_FINDINGS)), np.float32)
    column = {name: j for j, name in enumerate(NIH_FINDINGS)}
    for i, findings in enumerate(table["Finding Labels"]):
        for finding in findings.split("|"):
            if finding in column:
                labels[i, column[finding]] = 1
            elif finding != "No Finding":
                raise InputError(f"{rows[i]}: unknown finding {finding!r}; {nearest(finding, NIH_FINDINGS)}")
        if names[i] not in lists:
            raise InputError(f"{rows[i]}: {names[i]} is in neither train_val_list.txt nor test_list.txt")
    held_out = patient_split(table["Patient ID"], {"train": 7 / 8, "val": 1 / 8})
    split = [held_out[i] if lists[name] == "train" else "test" for i, name in enumerate(names)]
    folders = [d for d in [root / "images", *sorted(root.glob("images_*/images"))] if d.is_dir()]
    home = {name: folder for folder in folders for name in os.listdir(folder)}
    images = [safe_path(home.get(name, root / "images"), name, row) for name, row in zip(names, rows)]
    note = "nih: labels mined from reports; every finding that is not named counts as absent"
    return Radiographs(images, labels, NIH_FINDINGS, table["Patient ID"], split, names, rows, note=note)


# ----------------------------------------------------------------------------------------------------- CheXpert


def load_chexpert(config: Config) -> Radiographs:
    """CheXpert: 223,414 training images of 64,540 patients (191,027 frontal), 14 findings with -1 for uncertain.

    `train.csv` (or --labels-csv: VisualCheXbert, CheXbert), `valid.csv` (234 images of 200 studies), and for the
    test (668 images of 500 studies) `test_labels.csv`, one row per image, or `groundtruth.csv`, one per study.
    Without either, `valid.csv` is the test set and a twentieth of the training patients validate, and we say so.
    Irvin et al., AAAI 2019. Stanford's research use agreement; neither images nor labels may be passed on.
    """
    home = chexpert_home(root := config.root)
    train, valid = (home.get(name, root) / name for name in ("train.csv", "valid.csv"))
    train = Path(config.labels_csv or train)
    test = next((home[n] / n for n in ("test_labels.csv", "groundtruth.csv") if n in home), None)
    files = {"train": train, "val": valid, "test": test} if test else {"train": train, "test": valid}
    names, images, rows, labels, split, notes = [], [], [], [], [], []
    for part, path in files.items():
        table = read_table(path)
        classes = wanted_findings(config, path, table)
        values, counted = parse_labels(table, classes, path, config.uncertain, config.blank or "zero")
        found = list(chexpert_images(home, root, config.view, path, table))
        names += [name for name, _, _ in found]
        images += [image for _, image, _ in found]
        rows += [f"{path} row {i + 2}" for _, _, i in found]
        labels.append(values[np.array([i for _, _, i in found], int)])
        split += [part] * len(found)
        notes.append(f"{path.name} {counted}")
    patients = [name.split("/")[1] for name in names]
    if not test:
        notes.append("no test labels, so valid.csv is the test set and val is cut from train by patient")
        held_out = patient_split(patients, {"train": 0.95, "val": 0.05})
        split = [held_out[i] if part == "train" else part for i, part in enumerate(split)]
    note, labels = "; ".join(notes), np.concatenate(labels)
    return Radiographs(images, labels, classes, patients, split, names, rows, note=note)


def wanted_findings(config: Config, path: Path, table: dict[str, list[str]]) -> tuple[str, ...]:
    """--classes or CheXpert's five competition findings; InputError when the label file lacks one."""
    known = [name for name in CHEXPERT_FINDINGS if name in table]
    for name in config.classes or COMPETITION_FINDINGS:
        if name not in known:
            raise InputError(f"{path}: no finding {name!r}; {nearest(name, known or CHEXPERT_FINDINGS)}")
    return tuple(config.classes or COMPETITION_FINDINGS)


def chexpert_home(root: Path) -> dict[str, Path]:
    """Which folder holds each file, split or patient: `root`, its `test`, or an unpacked archive inside it.

    An archive is `CheXpert-v1.0-small`, `CheXpert-v1.0`, or one of the four `CheXpert-v1.0 batch ...` of the full
    resolution, of which three hold patients without a `train` folder.
    """
    home: dict[str, Path] = {}
    for folder in (root, root / "test", *sorted(root.glob("CheXpert-v1.0*"))):
        for name in os.listdir(folder) if folder.is_dir() else ():
            if home.setdefault(name, folder) not in (folder, root) and name in ("train", "train.csv"):
                raise InputError(f"{root}: {name} is in {home[name]} and {folder}; give one as --data-dir")
    return home


def chexpert_images(
    home: dict[str, Path], root: Path, wanted: str, path: Path, table: dict[str, list[str]]
) -> Iterator[tuple[str, Path, int]]:
    """(name from train, valid or test on, file, data row) of every image in a CheXpert table of the wanted view.

    What stands before the split (`CheXpert-v1.0/`, `CheXpert-v1.0-small/`) does not matter. The row of a study
    (column `Study`) stands for each image in the study's folder, so that folder must be there.
    """
    column = "Study" if "Study" in table else "Path"
    if column not in table:
        raise InputError(f"{path}: no column 'Path' or 'Study'; the columns are {', '.join(table)}")
    views = table.get("Frontal/Lateral")
    for i, place in enumerate(table[column]):
        row, parts = f"{path} row {i + 2}", place.replace("\\", "/").split("/")
        start = next((k for k, part in enumerate(parts) if part in ("train", "valid", "test")), len(parts))
        parts = parts[start:]
        if len(parts) < 3:
            raise InputError(f"{row}: {place!r} is not <train|valid|test>/<patient>/<study>/<image>")
        in_batch = parts[0] not in home and parts[1] in home
        file = safe_path(home.get(parts[in_batch], root), "/".join(parts[in_batch:]), row)
        files = [file] if column == "Path" else sorted(file.glob("*.jpg"))
        if not files:
            raise InputError(f"{row}: no .jpg in {file}, where this study's images belong")
        for image in files:
            view = views[i] if views else image.stem.rsplit("_", 1)[-1]  # VisualCheXbert has no such column
            if wanted in ("all", view.lower()):
                yield "/".join(parts if column == "Path" else (*parts, image.name)), image, i


# ---------------------------------------------------------------------------------------------------- MIMIC-CXR

MIMIC_SPLITS = {"train": "train", "validate": "val", "test": "test"}
MIMIC_VIEWS = {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "LL": "lateral"}
SECTION = re.compile(r"^[ \t]*([A-Z][A-Z /,()]+):", re.MULTILINE)  # a title in a report


def load_mimic(config: Config) -> Radiographs:
    """MIMIC-CXR-JPG: 377,110 images of 227,835 studies of 65,379 patients, CheXpert's 14 findings per study.

    Labels of `mimic-cxr-2.0.0-chexpert.csv` (or --labels-csv: `-negbio`), the official split, and for --view the
    metadata, gzipped or not. Reports (MIMIC-CXR) are read on demand when they lie in `files/` too.
    Johnson et al., arXiv 1901.07042. PhysioNet's credentialed licence; neither images nor labels may be passed on.
    """
    root = config.root
    path = Path(config.labels_csv or mimic_file(root, "chexpert"))
    studies = read_table(path, ["study_id"])
    classes = wanted_findings(config, path, studies)
    values, note = parse_labels(studies, classes, path, config.uncertain, config.blank or "zero")
    row_of: dict[str, int] = {}
    for i, study in enumerate(studies["study_id"]):
        if row_of.setdefault(study, i) != i:
            raise InputError(f"{path} row {i + 2}: study {study} is there twice")
    path, views, kept, unlabelled = mimic_file(root, "split"), {}, [], set()
    columns = ("dicom_id", "study_id", "subject_id", "split")
    table = read_table(path, columns)
    if config.view != "all":
        metadata = read_table(mimic_file(root, "metadata"), ["dicom_id", "ViewPosition"])
        views = dict(zip(metadata["dicom_id"], metadata["ViewPosition"]))
    for i, (dicom, study, subject, part) in enumerate(zip(*(table[name] for name in columns))):
        row = f"{path} row {i + 2}"
        if part not in MIMIC_SPLITS:
            raise InputError(f"{row}: split {part!r} is not train, validate or test")
        if study not in row_of:
            unlabelled.add(study)
        elif config.view in ("all", MIMIC_VIEWS.get(views.get(dicom))):
            name = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
            kept.append((name, safe_path(root, name, row), row_of[study], subject, MIMIC_SPLITS[part], row))
    names, images, labelled, patients, split, rows = list(zip(*kept)) or [()] * 6
    reports = MimicReports(images) if images and images[0].parent.with_suffix(".txt").is_file() else None
    labels = values[np.array(labelled, int)]
    note += f"; left out {len(unlabelled):,} studies without labels"
    return Radiographs(images, labels, classes, patients, split, names, rows, reports, note)


def mimic_file(root: Path, kind: str) -> Path:
    """A table of the release, gzipped or not."""
    path = root / f"mimic-cxr-2.0.0-{kind}.csv"
    return path if path.is_file() else path.with_suffix(".csv.gz")


class MimicReports(Sequence):
    """Each image's report, read when asked for: what stands under FINDINGS and IMPRESSION, else all of it."""

    def __init__(self, images: Sequence[Path]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> str:
        text = self.images[i].parent.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
        _, *sections = SECTION.split(text)  # title, text, title, text, ...
        chosen = [t for title, t in zip(sections[::2], sections[1::2]) if title in ("FINDINGS", "IMPRESSION")]
        return " ".join(" ".join(chosen or [text]).split())


# --------------------------------------------------------------------------------------------------- ChestMNIST

ZENODO = "https://zenodo.org/records/10519652/files"
CHESTMNIST_MD5 = {
    28: "02c8a6516a18b556561a56cbdd36c4a8",
    64: "9de6cd0b934ebb5b7426cfba5efbae16",
    128: "db107e5590b27930b62dbaf558aebee3",
    224: "45bd33e6f06c3e8cdb481c74a89152aa",
}
MAX_IMAGES = 200_000  # a split; a larger one is refused, since a few bytes may unpack to any number
TRIES, PAUSE = 5, 2.0  # connections for one download, and seconds between them


def load_chestmnist(config: Config) -> Radiographs:
    """ChestMNIST: ChestX-ray14 at 28, 64, 128 or 224 pixels: 78,468 train, 11,219 val, 22,433 test; 14 findings.

    Reads `chestmnist.npz` or `chestmnist_<size>.npz` in --data-dir (else in --cache-dir), or downloads it there.
    The images go uncompressed into --cache-dir, so that memory does not grow with --size. No patient ids.
    Yang et al., "MedMNIST v2", Scientific Data 2023. CC BY 4.0.
    """
    cache = Path(config.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    folder, suffix = config.root if config.data_dir else cache, "" if config.size == 28 else f"_{config.size}"
    path, published = folder / f"chestmnist{suffix}.npz", CHESTMNIST_MD5[config.size]
    if not path.exists():
        with locked(folder, wait=True):
            download(f"{ZENODO}/{path.name}?download=1", path, published)
    found = md5(path)
    with locked(cache, wait=True):
        images, labels, split = unpack_chestmnist(path, config.size, cache / f"{path.stem}-{found}.uint8")
    names = [f"{part}-{i:06d}" for i, part in enumerate(split)]
    note = "chestmnist: official split; no patient ids, so each image counts as a patient of its own"
    if found != published:
        note += f"; {path} is not the published file (its MD5 is {found}, not {published})"
    return Radiographs(
        images, labels, NIH_FINDINGS, names, split, names, note=note, key=f"chestmnist {found}"
    )


class MappedImages(Sequence):
    """uint8 [N, side, side] in a raw file; another process opens the file instead of receiving a copy."""

    def __init__(self, path: Path, n: int, side: int):
        self.arguments = (path, n, side)
        self.pixels = np.memmap(path, np.uint8, "r", shape=(n, side, side))

    def __reduce__(self):
        return MappedImages, self.arguments

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.pixels[i]


@contextlib.contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple]:
    """(file at the first number, shape, dtype) of a member; ValueError when it is not as long as its header says."""
    with archive.open(name) as member:
        major, _ = np.lib.format.read_magic(member)
        shape, fortran, kind = getattr(np.lib.format, f"read_array_header_{1 if major == 1 else 2}_0")(member)
        size = archive.getinfo(name).file_size
        if kind.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never read: allow_pickle=False")
        if fortran:
            raise ValueError(f"{name.removesuffix('.npy')} is {kind} {shape} by columns")
        if min(shape, default=0) < 0 or member.tell() + math.prod(shape) * kind.itemsize != size:
            raise ValueError(f"{name} is {kind} {shape} in {size:,} bytes")
        yield member, shape, kind


def unpack_chestmnist(path: Path, side: int, file: Path) -> tuple[MappedImages, np.ndarray, list[str]]:
    """Images of all splits, copied into `file` unless they are there, labels [N, 14] and split [N] of an .npz."""
    labels, split = [], []
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            if new := not file.exists():
                output = stack.enter_context(open(stack.enter_context(atomic(file)), "wb"))
            for part in ("train", "val", "test"):
                with open_array(archive, f"{part}_labels.npy") as (member, shape, kind):
                    fits = shape[1:] == (len(NIH_FINDINGS),) and shape[0] <= MAX_IMAGES
                    labels.append(np.frombuffer(member.read(), kind).reshape(shape) if fits else None)
                if not fits or not np.isin(labels[-1], (0, 1)).all():
                    raise ValueError(f"{part}_labels {shape} must be 0 or 1 for {len(NIH_FINDINGS)} findings")
                split += [part] * len(labels[-1])
                with open_array(archive, f"{part}_images.npy") as (member, found, kind):
                    if (found, kind) != ((shape[0], side, side), np.uint8):
                        raise ValueError(f"{part}_images is {kind} {found}")
                    if new:
                        shutil.copyfileobj(member, output, 1 << 20)
    except (
        KeyError, ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError,  # numpy reads text headers
        RuntimeError, zipfile.BadZipFile, zlib.error, struct.error, OverflowError, IndexError, OSError,
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # the disk's fault, not the file's
            raise
        raise InputError(f"{path}: not ChestMNIST at {side} pixels: {error}") from None
    if file.stat().st_size != len(split) * side * side:
        raise InputError(f"{file}: damaged cache; delete this file to unpack it again")
    return MappedImages(file, len(split), side), np.concatenate(labels), split


def md5(path: Path) -> str:
    """MD5 of a file, in hex: an identity as published, not a protection."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, checksum: str) -> None:
    """Fetch `url` to `path` unless it is there; only a file with this MD5 ever gets that name.

    Bytes that arrived before a cut, or before the process was killed, stay beside it and are not fetched again.
    """
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    for left in reversed(range(TRIES)):
        try:
            receive(url, partial)
            break
        except (OSError, http.client.HTTPException) as error:
            hopeless = getattr(error, "code", 500) < 500 or getattr(error, "errno", None) == errno.ENOSPC
            if hopeless or not left:
                raise InputError(f"{url}: {error}; run again to go on, or put the file at {path}") from None
            time.sleep(PAUSE)
    if (found := md5(partial)) != checksum:
        partial.unlink()
        raise InputError(f"{url}: its MD5 {found} is not the published {checksum}; removed it, run again")
    os.replace(partial, path)


def receive(url: str, partial: Path) -> None:
    """One connection: append to `partial` what it lacks, or start over with a server that cannot go on."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what we have; the checksum decides
            return
        raise
    have = have if response.status == 206 else 0
    total = have + int(response.headers.get("Content-Length", 0))
    bar = progress(total=total, initial=have, unit="B", unit_scale=True, desc=f"downloading {url}")
    with response, bar, open(partial, "ab" if have else "wb") as file:
        while block := response.read1(1 << 20):
            bar.update(file.write(block))
        if file.tell() < total:
            raise ConnectionError(f"cut after {file.tell():,} of {total:,} bytes")


# -------------------------------------------------------------------------------------------- Frozen encoders


def one_line(error: BaseException) -> str:
    """The first 200 characters of what another library says of an error, in one line."""
    return " ".join(str(error).split())[:200]


def transform_image(image: torch.Tensor, resize, crop, interpolation, mean, std) -> torch.Tensor:
    """uint8 image [1 or 3,H,W] -> normalised float pixels [3,h,w]; a single channel is repeated to three.

    `resize`: length of the shorter side, or [height, width]; `crop`: side of the central square, or None. The
    resizing is antialiased and rounds to uint8, as PIL's does.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = [resize] if isinstance(resize, int) else list(resize)
    image = functional.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    if crop is not None:
        image = functional.center_crop(image, [crop, crop])
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (image / 255 - mean) / std  # [1 or 3,h,w] - [3,1,1] -> [3,h,w]


class Normalize(nn.Module):
    """Scale the last dimension to unit length."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=-1)


POOLS = ("cls", "mean", "last", "pooler", "pre_norm_mean", "none")
LAYERS = ["Linear", "Conv2d", "BatchNorm2d", "LayerNorm", "ReLU", "GELU", "AdaptiveAvgPool2d", "Flatten"]
LAYERS = [*LAYERS, "Unflatten", "TransformerEncoderLayer"]
LAYERS = {name: getattr(nn, name) for name in LAYERS} | {"Normalize": Normalize}


class Tower(nn.Module):
    """Pixels [B,3,H,W], or tokens and their mask [M,T], -> embeddings [B or M,D]: a tower, a pool and a head.

    `config`: config.json's "image" or "text". Pools: the CLS token, the mean of the tokens or of the map, the
    last token, the model's own, CLEFT's mean before the last norm, or none: the head sees it all.
    """

    def __init__(self, config: dict):
        super().__init__()
        model, self.pool, head = config["model"], config["pool"], config["head"]
        if unknown := {name for name, _ in head} - set(LAYERS) | {self.pool} - set(POOLS):
            raise InputError(f"encoder config: unknown {unknown}; pools: {POOLS}, head layers: {[*LAYERS]}")
        self.head = nn.Sequential(*(LAYERS[name](**options) for name, options in head))
        if config.get("library") == "torchvision":
            from torchvision.models import get_model
            from torchvision.models.feature_extraction import create_feature_extractor

            nodes = {model["node"]: "last_hidden_state"}
            self.tower = create_feature_extractor(get_model(model["name"]), nodes)
            return
        import transformers

        settings = transformers.AutoConfig.for_model(**model)
        self.tower = getattr(transformers, type(settings).__name__.removesuffix("Config") + "Model")(settings)
        if self.pool != "pooler" and "pooler.dense.weight" in self.tower.state_dict():
            self.tower.pooler = None  # BERT's and ViT's: not used, and the published checkpoints lack it

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self.pool == "pre_norm_mean":
            options["output_hidden_states"] = True
        output = self.tower(inputs, **options)
        if self.pool == "pooler":
            return self.head(output["pooler_output"])
        # tokens [B,T,H], or the map [B,H,h,w] of a convolutional tower
        x = output["hidden_states"][-1] if self.pool == "pre_norm_mean" else output["last_hidden_state"]
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "last":
            x = x[torch.arange(len(x), device=x.device), attention_mask.sum(1) - 1]
        elif self.pool == "mean" and attention_mask is not None:
            x = (x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        elif self.pool != "none":
            x = x.mean(1) if x.ndim == 3 else x.mean((2, 3))
        return self.head(x)


def new_folder(directory: str | Path) -> Path:
    """The path of a folder that is to be written; InputError when something is there."""
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: choose another")
    return target


# in some published files, but part of neither embedding
UNUSED_KEYS = r"^logit_|position_ids$|num_batches_tracked$|^text\.tower\.pooler\.|^cls\.|^image\.tower\.fc\."


class DualEncoder(nn.Module):
    """A frozen image tower and text tower of one dimension, with their tokenizer and image transform."""

    def __init__(self, config: dict, tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.dim = config, tokenizer, config["dim"]
        self.image, self.text = Tower(config["image"]), Tower(config["text"])
        self.transform = functools.partial(transform_image, **config["transform"])
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transformed pixels [B,3,H,W] on the encoder's device -> float32 embeddings [B,D], unnormalised."""
        return self.image(pixels).float()

    @torch.inference_mode()
    def encode_texts(
        self, texts: Sequence[str], truncate: bool = False, batch_size: int = 64
    ) -> torch.Tensor:
        """M texts -> float32 embeddings [M,D], unnormalised; a text beyond the context is an InputError."""
        device, embeddings = next(self.parameters()).device, []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size], truncate)
            embeddings.append(self.text(*(tensor.to(device) for tensor in tokens.values())).float())
        return torch.cat(embeddings)

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> dict[str, torch.Tensor]:
        """M texts -> {"input_ids": [M,T], "attention_mask": [M,T]}, padded on the right.

        Padding "longest" is masked; "max_length" fills the context and is attended to, as SigLIP was trained.
        """
        config = self.config["text"]
        length, padding = config["context_length"], config.get("padding", "longest")
        texts = [text.rstrip(config.get("strip", "")) for text in texts]
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > length and not truncate:
                raise InputError(f"{len(ids)} tokens, the encoder reads {length}; shorten the text {text!r}")
        options = {"padding": padding, "padding_side": "right", "truncation": True, "max_length": length}
        tokens = self.tokenizer(texts, return_tensors="pt", return_attention_mask=True, **options)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask if padding == "longest" else torch.ones_like(mask)}

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the config without its name and of every tensor as float32; computed once."""
        if not hasattr(self, "_fingerprint"):
            config = {key: value for key, value in self.config.items() if key != "name"}
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
            for key, tensor in sorted(self.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors (as `dtype`) and the tokenizer into a new or empty folder."""
        with atomic(new_folder(directory)) as partial:
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            state = self.state_dict()
            state |= {key: value.to(dtype) for key, value in state.items() if value.is_floating_point()}
            save_tensors(partial / "model.safetensors", state, {})
            self.tokenizer.save_pretrained(partial)

    def load_weights(self, state: dict[str, torch.Tensor], source: str | Path) -> None:
        """Copy `state` into the towers; InputError lists the keys that are missing, unknown or mis-shaped."""
        wanted, found = ({k: tuple(v.shape) for k, v in x.items()} for x in (self.state_dict(), state))
        missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
        unknown = [key for key in found if key not in wanted and not re.search(UNUSED_KEYS, key)]
        differ = [key for key in wanted if key in found and found[key] != wanted[key]]
        misshaped = [f"{key} {found[key]} for {wanted[key]}" for key in differ]
        kinds = {"missing": missing, "unknown": unknown, "mis-shaped": misshaped}
        if wrong := [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds.items() if keys]:
            raise InputError(f"{source} does not fit the encoder {self.config['name']}: {'; '.join(wrong)}")
        self.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)

    @classmethod
    def load(cls, name: str, directory: str | Path | None = None, crop: int | None = None) -> DualEncoder:
        """The encoder `name`: tiny, biomedclip, biovil, a folder, or a hub id of a transformers CLIP/SigLIP.

        `directory` holds its files exactly as published, or as `save` wrote them, and rules out the network;
        without it they come from the hub's cache or are downloaded. `crop` replaces a convolutional tower's
        (BioViL: RE-tune's 512; its own is 480). InputError if a file is missing or unfit.
        """
        folder = Path(directory or (HERE / "demo" / "tiny" if name == "tiny" else name))
        if is_ours(folder):
            config, state, tokenizer = read_folder(folder)
        else:
            config, state, tokenizer = read_published(name, directory)
        if name in ("biomedclip", "biovil") and config.get("name") != name:
            raise InputError(f"{folder} holds the encoder {config.get('name')}, not {name}")
        if crop is not None:
            if config["image"].get("library") != "torchvision":
                raise InputError(f"crop {crop}: the image size of {config['name']} is fixed, leave crop out")
            config = config | {"transform": config["transform"] | {"crop": crop}}
        try:
            with torch.random.fork_rng(devices=[]), WithoutRandomWeights():
                encoder = cls({"name": folder.name} | config, tokenizer)
            encoder.load_weights(state, folder)
            # A tokenizer or a transform that does not fit the towers fails here and not in the middle of a run.
            encoder.encode_texts(["", "no finding"])
            encoder.encode_images(encoder.transform(torch.zeros(1, 40, 60, dtype=torch.uint8))[None])
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - layers' complaints; tokenizers' panic is no Exception
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"{folder}: config or tokenizer describe no encoder ({reason})") from None
        return encoder


class WithoutRandomWeights(TorchFunctionMode):
    """Build modules with zeros for the weights that a file is about to replace: ten times faster.

    Zeros and not what memory held: torch's truncated normal draws until every value lies in its interval.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in ("normal_", "uniform_", "kaiming_uniform_"):
            return function(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        tensor.detach().zero_()
        return tensor


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an encoder as `DualEncoder.save` writes it."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return isinstance(config, dict) and {"dim", "image", "text", "transform"} <= set(config)


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, tensors, tokenizer) of an encoder as `DualEncoder.save` writes it, without network."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    try:
        state = load_file(folder / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raise nearly every type on a damaged file
        raise InputError(f"{folder}: not a whole encoder folder ({one_line(error)})") from None
    return read_json(folder / "config.json"), state, tokenizer


# ------------------------------------------------------------------------------------------------- Embeddings


CHUNK = 1024  # images a chunk: the most that a killed process loses; batches never straddle chunks
# What numpy raises on a damaged file, whose header it reads as Python text.
DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, SyntaxError, tokenize.TokenError,
    OverflowError, MemoryError, IndexError,
)  # fmt: skip


class Images(torch.utils.data.Dataset):
    """(row, transformed pixels [3, h, w], "") of image `row`; (row, None, reason) of an unreadable one."""

    def __init__(self, images: Sequence, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None, str]:
        image = self.images[row]
        try:
            pixels = read_image(image) if isinstance(image, Path) else torch.from_numpy(np.array(image))[None]
            return row, self.transform(pixels), ""
        except InputError as error:
            return row, None, str(error)


def collate(items: list) -> tuple[list[int], torch.Tensor | None, list[tuple[int, str]]]:
    """Readable rows, their pixels [B, 3, h, w], and unreadable rows with reasons."""
    good = [(row, pixels) for row, pixels, _ in items if pixels is not None]
    bad = [(row, reason) for row, pixels, reason in items if pixels is None]
    return [row for row, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, bad


def embedding_key(encoder: DualEncoder, data: Radiographs, precision: str, store: str) -> str:
    """A hash of all that shapes the embeddings: encoder with transform, image names and sizes, precision."""
    settings = f"{encoder.fingerprint()} {precision} {store} {len(data.images)} {data.key}"
    digest = hashlib.sha256(settings.encode())
    if data.key is None and isinstance(data.images, np.ndarray):
        digest.update(np.ascontiguousarray(data.images).data)
    elif data.key is None:
        for name, path in zip(data.names, data.images):
            digest.update(f"{name}\0{os.stat(path).st_size if os.path.isfile(path) else None}\0".encode())
    return digest.hexdigest()[:20]


def embed(
    encoder: DualEncoder, data: Radiographs, cache_dir: Path, *, batch_size: int = 32, workers: int = 0,
    precision: str = "fp32", store: str = "fp32", device: str = "cpu", skip_bad_images: bool = False,
) -> np.memmap:  # fmt: skip
    """Embed every image once: a read-only memory map [N, D], float32 or float16 (`store`), not normalised.

    The rows are cut into chunks, each written whole into the cache key's folder; ranks take chunks in turn,
    a restarted process skips finished ones, and the first rank joins them. An unreadable image raises
    InputError, or with `skip_bad_images` is a row of nan, listed by `embedding_facts`.
    """
    folder = Path(cache_dir) / embedding_key(encoder, data, precision, store)
    folder.mkdir(parents=True, exist_ok=True)
    (rank, world), n = ranks(), len(data.images)
    shape, dtype = (n, encoder.dim), np.dtype(np.float16 if store == "fp16" else np.float32)
    chunks = {folder / f"chunk-{i:09d}.npy": range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)}
    with locked(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        barrier()  # the other ranks start when the first one holds the folder
        if not (folder / "facts.json").exists():
            mine = dict(list(chunks.items())[rank::world])
            todo = {file: rows for file, rows in mine.items() if not file.exists()}
            embed_chunks(encoder, data, todo, dtype, batch_size, workers, precision, device, skip_bad_images)
            barrier()
            if rank == 0:
                assemble(folder, data, chunks, shape, dtype)
        barrier()
        for chunk in chunks if rank == 0 else ():
            chunk.unlink(missing_ok=True)
    embeddings = open_embeddings(folder, shape, dtype)
    bad = embedding_facts(embeddings)["unreadable"]
    if bad and not skip_bad_images:
        raise InputError(f"{next(iter(bad.values()))}; --skip-bad-images leaves such out")
    return embeddings


def embed_chunks(encoder, data, chunks, dtype, batch_size, workers, precision, device, skip_bad) -> None:
    """Run the encoder over {file: rows} and write each chunk, followed by the seconds that it took."""
    pieces = [rows[i : i + batch_size] for rows in chunks.values() for i in range(0, len(rows), batch_size)]
    stream = iter(torch.utils.data.DataLoader(
        Images(data.images, encoder.transform), batch_sampler=pieces, num_workers=min(workers, len(pieces)),
        collate_fn=collate, pin_memory=device.startswith("cuda"), generator=torch.Generator(),
    ))  # fmt: skip
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    encoder.to(device)
    with progress(total=sum(map(len, chunks.values())), desc="embedding", unit="image") as bar:
        for file, rows in chunks.items():
            block, start = np.full((len(rows), encoder.dim), np.nan, dtype), time.perf_counter()
            for _ in range(0, len(rows), batch_size):
                good, pixels, bad = next(stream)
                for row, reason in [] if skip_bad else bad:
                    raise InputError(f"{data.rows[row]}: {reason}; --skip-bad-images leaves such out")
                if good:
                    with torch.autocast(device.split(":")[0], low, enabled=low is not None):
                        features = encoder.encode_images(pixels.to(device, non_blocking=True))
                    block[np.array(good) - rows.start] = features.cpu().numpy()
                    norms = np.linalg.norm(block[np.array(good) - rows.start].astype(np.float32), axis=1)
                    if not np.isfinite(norms).all():  # of numbers above 1e19 the cosines would all be 0
                        where = data.rows[good[0]]
                        raise InputError(f"{where}: its batch embeds to nan or huge numbers; use fp32")
                bar.update(len(good) + len(bad))
            with atomic(file) as partial, open(partial, "wb") as output:
                np.save(output, block)
                np.save(output, np.float64(time.perf_counter() - start))
                np.save(output, np.array(hashlib.sha256(block.data).hexdigest()))


def assemble(folder: Path, data: Radiographs, chunks: dict[Path, range], shape, dtype) -> None:
    """Join the chunks into embeddings.npy, then write facts.json, whose presence says that it is whole."""
    seconds, unreadable, digest = 0.0, {}, hashlib.sha256()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Written, not mapped: a full disk is an error here, and a killed process under a memory map.
    with atomic(folder / "embeddings.npy") as partial, open(partial, "wb") as whole:
        np.lib.format.write_array_header_1_0(whole, header)
        for chunk, rows in chunks.items():
            try:
                with open(chunk, "rb") as file:
                    block, took, checksum = (np.load(file, allow_pickle=False) for _ in range(3))
                if (block.shape, block.dtype) != ((len(rows), shape[1]), dtype):
                    raise ValueError(f"it holds {block.dtype} {block.shape}")
                if hashlib.sha256(block.data).hexdigest() != str(checksum) or not 0 < float(took) < math.inf:
                    raise ValueError("its checksum differs")
            except DAMAGED as error:
                chunk.unlink(missing_ok=True)
                raise InputError(f"{chunk}: damaged ({error}), so it was removed; run again") from None
            whole.write(block.data)
            digest.update(block.data)
            seconds += float(took)
            for row in np.flatnonzero(np.isnan(block[:, 0])) + rows.start:
                reason = Images(data.images, lambda pixels: pixels)[row][2]
                unreadable[int(row)] = f"{data.rows[row]}: {reason}"
    facts = {"sha256": digest.hexdigest(), "seconds": seconds, "unreadable": unreadable}
    write_json(folder / "facts.json", facts)


def embedding_facts(embeddings: np.memmap) -> dict:
    """{"sha256", "seconds" spent, "unreadable": {row: reason}} of what `embed` returned."""
    facts = read_json(Path(embeddings.filename).with_name("facts.json"))
    return facts | {"unreadable": {int(row): reason for row, reason in facts["unreadable"].items()}}


def open_embeddings(folder: Path, shape: tuple[int, int], dtype: np.dtype) -> np.memmap:
    """Open the finished array after checking its shape and checksum; InputError when it is damaged."""
    try:
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        digest = hashlib.sha256()
        for i in range(0, len(embeddings), 8192):
            digest.update(embeddings[i : i + 8192])
            release(embeddings)
        if (embeddings.shape, embeddings.dtype) != (shape, dtype):
            raise ValueError(f"it holds {embeddings.dtype} {embeddings.shape}")
        if digest.hexdigest() != embedding_facts(embeddings)["sha256"]:
            raise ValueError("its checksum differs")
    except DAMAGED as error:
        raise InputError(f"{folder}: damaged cache ({error}); delete this folder to embed again") from None
    return embeddings


def linear(inputs: int, outputs: int, bias: bool = True) -> list:
    return ["Linear", {"in_features": inputs, "out_features": outputs, "bias": bias}]


def convolution(inputs: int, outputs: int, bias: bool = True) -> list:
    return ["Conv2d", {"in_channels": inputs, "out_channels": outputs, "kernel_size": 1, "bias": bias}]


# The published encoders in our format, their tensors' names (regular expressions) and their files.
# fmt: off
BIOMEDCLIP = {
    "name": "biomedclip", "dim": 512,
    "image": {"model": {"model_type": "vit", "layer_norm_eps": 1e-6}, "pool": "cls",
              "head": [linear(768, 512, False)]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 256,
             "head": [linear(768, 640, False), ["GELU", {}], linear(640, 512, False)]},
    "transform": {"resize": 224, "crop": 224, "interpolation": "bicubic",
                  "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}
BIOVIL = {  # its projection comes before the spatial mean; "strip" is what its own inference does to a prompt
    "name": "biovil", "dim": 128,
    "image": {"library": "torchvision", "model": {"name": "resnet50", "node": "layer4"}, "pool": "none",
              "head": [convolution(2048, 128, False), ["BatchNorm2d", {"num_features": 128}], ["ReLU", {}],
                       convolution(128, 128), ["AdaptiveAvgPool2d", {"output_size": 1}], ["Flatten", {}]]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 512, "strip": "!?.",
             "head": [linear(768, 128), ["GELU", {}], ["LayerNorm", {"normalized_shape": 128, "eps": 1e-12}],
                      linear(128, 128)]},
    "transform": {"resize": 512, "crop": 512, "interpolation": "bilinear", "mean": [0.0] * 3,
                  "std": [1.0] * 3},
}
KEYS = {  # BiomedCLIP; BioViL; CLIP and SigLIP
    "visual.trunk.(cls_token)": r"image.tower.embeddings.\1", "visual.trunk.norm": "image.tower.layernorm",
    "visual.trunk.pos_embed": "image.tower.embeddings.position_embeddings",
    "visual.trunk.patch_embed.proj": "image.tower.embeddings.patch_embeddings.projection",
    r"visual.trunk.blocks.(\d+).norm1": r"image.tower.layers.\1.layernorm_before",
    r"visual.trunk.blocks.(\d+).norm2": r"image.tower.layers.\1.layernorm_after",
    r"visual.trunk.blocks.(\d+).attn.proj": r"image.tower.layers.\1.attention.o_proj",
    r"visual.trunk.blocks.(\d+).attn.qkv": r"image.tower.layers.\1.attention.qkv",
    r"visual.trunk.blocks.(\d+).mlp": r"image.tower.layers.\1.mlp", "visual.head.proj": "image.head.0",
    "text.transformer": "text.tower", "text.proj": "text.head",
    "encoder.encoder": "image.tower", "projector.model": "image.head", "bert": "text.tower",
    "cls_projection_head.dense_to_hidden": "text.head.0", "cls_projection_head.LayerNorm": "text.head.2",
    "cls_projection_head.dense_to_output": "text.head.3",
    "vision_model": "image.tower", "text_model": "text.tower",
    "visual_projection": "image.head.0", "text_projection": "text.head.0",
}
# fmt: on
BIOVIL_IMAGE = "biovil_image_resnet50_proj_size_128.pt"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB = {  # name: repository, revision, alternatives for the weights, the best first
    "biomedclip": ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", None, OPEN_CLIP_WEIGHTS),
    "biovil": ("microsoft/BiomedVLP-CXR-BERT-specialized", "v1.1", WEIGHTS),
}


def read_published(name: str, directory: str | Path | None) -> tuple[dict, dict[str, Tensor], object]:
    """(config, tensors, tokenizer) of the encoder `name`, from `directory` alone if it is given."""
    folder = Path(directory or name)
    if directory is None and (name in HUB or not folder.is_dir()):
        folder = download_encoder(name)
    try:
        config, state, tokenizer = read_encoder(folder)
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{folder}: no encoder as published ({reason})") from error
    if config["name"] == folder.name and not Path(name).is_dir():
        config["name"] = name  # a hub id rather than the folder with its files
    return config, state, tokenizer


def download_encoder(name: str) -> Path:
    """The folder in the hub's cache with the published files of the encoder `name`, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if name not in HUB and "/" not in name:
        known = f"tiny, {', '.join(HUB)}, a folder, or a hub id OWNER/NAME"
        raise InputError(f"unknown encoder {name!r}: use {known}")
    repository, revision, weights = HUB.get(name, (name, None, WEIGHTS))
    try:
        for pattern in weights:
            patterns = ["*.json", "*.txt", "*.model", BIOVIL_IMAGE, pattern]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
            if any(folder.glob(pattern)):
                break
        return folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"encoder {name!r} is neither a folder nor in the hub's cache, {repository} cannot be downloaded: "
            f"fetch its files elsewhere and name their folder with --encoder-dir ({reason})"
        ) from error


def read_weights(folder: Path, *patterns: str) -> dict[str, Tensor]:
    """The tensors in the files of the first pattern that fits any, under our names; runs no pickled code."""
    from safetensors.torch import load_file

    files = next((found for found in (sorted(folder.glob(pattern)) for pattern in patterns) if found), [])
    if not files:
        raise InputError(f"{folder} holds no weights: {' or '.join(patterns)} is missing")
    state = {}
    for file in files:
        try:
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            state |= renamed({key: tensor.detach() for key, tensor in found.items()})
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{file} is damaged or holds more than tensors: {reason}") from error
    return state


def renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names."""
    state = {}
    for key, tensor in found.items():
        for pattern, replacement in KEYS.items():
            key = re.sub(rf"^{pattern}(?=\.|$)", replacement, key)
        thirds = zip("qkv", tensor.chunk(3)) if ".attention.qkv." in key else ()  # timm's are one tensor
        state |= {key.replace("qkv", f"{part}_proj"): third for part, third in thirds} or {key: tensor}
    return state


def read_tokenizer(folder: Path, bert: bool = False):
    from transformers import AutoTokenizer, BertTokenizer

    names = ("vocab.txt", "tokenizer.json", "vocab.json", "spiece.model")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} holds no tokenizer: one of {', '.join(names)} is missing")
    try:
        if bert:  # by hand: BioViL's config asks AutoTokenizer to run code from the hub
            vocabulary = str(files[0])
            if files[0].suffix == ".json":
                vocabulary = json.loads(files[0].read_text(encoding="utf-8"))["model"]["vocab"]
            return BertTokenizer(vocab=vocabulary)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from error


def read_encoder(folder: Path) -> tuple[dict, dict[str, Tensor], object]:
    """(config, tensors, tokenizer) of a folder in our format or as published; InputError on anything else."""
    names = ("config.json", "open_clip_config.json")
    config, open_clip = (read_json(folder / name) if (folder / name).is_file() else {} for name in names)
    if is_ours(folder):
        return read_folder(folder)
    if config.get("model_type") in ("clip", "siglip"):
        return read_transformers(folder, config), read_weights(folder, *WEIGHTS), read_tokenizer(folder)
    if open_clip:
        normalise = {key: open_clip["preprocess_cfg"][key] for key in ("mean", "std")}
        config = BIOMEDCLIP | {"transform": BIOMEDCLIP["transform"] | normalise}
        return config, read_weights(folder, *OPEN_CLIP_WEIGHTS), read_tokenizer(folder, bert=True)
    if (folder / BIOVIL_IMAGE).is_file():
        state = read_weights(folder, BIOVIL_IMAGE) | read_weights(folder, *WEIGHTS)
        return BIOVIL, state, read_tokenizer(folder, bert=True)
    raise InputError(f"{folder} holds no encoder: no known {' nor '.join(names)}, and no {BIOVIL_IMAGE}")


def read_transformers(folder: Path, published: dict) -> dict:
    """Our config for a transformers CLIP or SigLIP; its image processor's settings become the transform."""
    from transformers import AutoImageProcessor

    kind, towers = published["model_type"], {}
    wanted = "hidden_act|layer_norm_eps|num_.*|.*_size|.*_token_id|max_position_embeddings"  # shape a tower
    for part in ("vision", "text"):
        found = (published.get(f"{part}_config") or {}) | (published.get(f"{part}_config_dict") or {})
        model = {key: value for key, value in found.items() if re.fullmatch(wanted, key)}
        towers[part] = {"model": {"model_type": f"{kind}_{part}_model"} | model, "pool": "pooler", "head": []}
    vision, text = towers["vision"], towers["text"]
    text["context_length"] = text["model"].get("max_position_embeddings", 77 if kind == "clip" else 64)
    if kind == "clip":
        dim = published.get("projection_dim", 512)
        vision["head"] = [linear(vision["model"].get("hidden_size", 768), dim, bias=False)]
        text["head"] = [linear(text["model"].get("hidden_size", 512), dim, bias=False)]
    else:
        dim, text["padding"] = vision["model"].get("hidden_size", 768), "max_length"
        # the text tower uses neither, and transformers' defaults for them lie outside its vocabulary
        text["model"] |= {"bos_token_id": None, "eos_token_id": None}
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    transform = {
        "resize": processor.size.shortest_edge or [processor.size.height, processor.size.width],
        "crop": processor.crop_size.height if processor.do_center_crop else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}[processor.resample],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
    return {"name": folder.name, "dim": dim, "image": vision, "text": text, "transform": transform}


DATASETS: dict[str, Callable[[Config], Radiographs]] = {
    "demo": load_demo,
    "csv": load_csv,
    "nih": load_nih,
    "chexpert": load_chexpert,
    "mimic": load_mimic,
    "chestmnist": load_chestmnist,
}

if __name__ == "__main__":
    sys.modules["retune"] = sys.modules[__name__]  # what imports retune gets this module, not a second copy
    sys.exit(main())
