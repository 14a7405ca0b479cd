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
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from encoders import DualEncoder
    from radiographs import Radiographs

HERE = Path(__file__).resolve().parent


def __getattr__(name: str):
    """`retune.DualEncoder` and all else of encoders.py and radiographs.py, imported when first asked for."""
    for companion in () if name.startswith("__") else ("radiographs", "encoders"):
        if name in vars(module := importlib.import_module(companion)):
            return getattr(module, name)
    raise AttributeError(f"module 'retune' has no attribute {name!r}")


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
    from encoders import DualEncoder, embed, embedding_facts
    from radiographs import load_radiographs, refuse_empty_splits

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
            return importlib.import_module("baselines").build(config, dim, n_classes)
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
    from encoders import DualEncoder
    from radiographs import load_radiographs

    runs, share = [], functools.lru_cache(maxsize=1)  # these runs mostly read the same data and encoder
    load_data, load_encoder = share(load_radiographs), share(DualEncoder.load)
    for config in configs:
        results = run(config, load_data, load_encoder)
        if ranks()[0] == 0:
            runs.append(results.metrics)
            say(f"{summary(results.metrics)}\n\nwritten to {results.folder}\n")
    if len(runs) > 1:
        from tables import seeds_table

        say(f"last task, test split, mean ± standard deviation over seeds\n\n{seeds_table(runs)}")


def predict(images: Sequence[str], folder: Path, config: Config) -> list[dict]:
    """Score images with a run's saved adaptors alone: [{"image", "findings": {name: {"score", "present"}}}].

    InputError when the encoder is not the one that the adaptors were trained on.
    """
    from encoders import DualEncoder
    from radiographs import read_image

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
            from encoders import DualEncoder

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


if __name__ == "__main__":
    sys.modules["retune"] = sys.modules[__name__]  # what imports retune gets this module, not a second copy
    sys.exit(main())
