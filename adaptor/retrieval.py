"""Retrieval between images and reports, the test of `adaptor.py`'s pre-training: recall, table, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from retune import atomic, markdown_table


def retrieval(image: torch.Tensor, text: torch.Tensor, words: Sequence[str]) -> dict:
    """Recall at 1, 5, 10 and median rank over n pairs, both ways, from normalised [n, P] each.

    Each image asks for its report among the distinct reports, each distinct report for the best-ranked of its
    images. A wrong candidate with the same score counts as ranked before the right one, so that constant
    embeddings find nothing. `chance` is what a random order recalls.
    """
    _, first, group = np.unique(np.asarray(words), return_index=True, return_inverse=True)
    group, distinct = torch.from_numpy(group), torch.arange(len(first))
    sides = {
        "image_to_text": (image, group, text[first], distinct),
        "text_to_image": (text[first], distinct, image, group),
    }
    result = {"n": len(words), "distinct_reports": len(first)}
    for way, (query, asked, candidates, offered) in sides.items():
        rank, miss = [], []
        for q, a in zip(query.split(1024), asked.split(1024)):
            scores, right = q @ candidates.T, a[:, None] == offered  # [b, candidates]
            best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
            rank.append(1 + ((scores >= best) & ~right).sum(1))
            miss.append((~right).sum(1))
        rank, wrong, missed = torch.cat(rank), torch.cat(miss).double(), 1.0
        values = {"median_rank": rank.double().quantile(0.5).item(), "chance": {}}
        for k in range(1, 11):
            missed = missed * (wrong - k + 1).clamp_min(0) / max(1, len(candidates) - k + 1)  # place k too
            if k in (1, 5, 10):
                values[f"recall_{k}"] = (rank <= k).double().mean().item()
                values["chance"][f"recall_{k}"] = 1 - missed.mean().item()
        result[way] = values
    return result


def retrieval_table(found: dict) -> str:
    """Recall and median rank on the test pairs, both ways: by chance, before and after pre-training."""
    ways = ("image_to_text", "text_to_image")
    stages = {"chance": {way: found["test"][way]["chance"] for way in ways}}
    stages |= {"before pre-training": found["before"]} if "before" in found else {}
    stages |= {"adaptor": found["test"]}
    columns = {f"recall_{k}": f"R@{k}" for k in (1, 5, 10)} | {"median_rank": "median rank"}
    header = [f"{way.replace('_', ' ')} {short}" for way in ways for short in columns.values()]
    rows = [[name, *(m[way].get(key) for way in ways for key in columns)] for name, m in stages.items()]
    return markdown_table([f"retrieval, {found['test']['n']:,} test pairs", *header], rows)


def draw_curves(path: Path, history: Sequence[dict]) -> None:
    """Losses and recall at 5 over the epochs."""
    from matplotlib.figure import Figure

    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name, style in (("train_loss", "training", "-"), ("loss", "validation", "--")):
        left.plot(epochs, [e[key] for e in history], style, color="black", label=name)
    left.set(xlabel="epoch", ylabel="contrastive loss")
    for key, style in (("image_to_text", "-"), ("text_to_image", "--")):
        recall, name = [e[key]["recall_5"] for e in history], key.replace("_", " ")
        right.plot(epochs, recall, style, color="black", label=name)
    chance = history[0]["image_to_text"]["chance"]["recall_5"]
    right.axhline(chance, color="grey", linestyle=":", label="chance")
    right.set(xlabel="epoch", ylabel="validation recall at 5", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
