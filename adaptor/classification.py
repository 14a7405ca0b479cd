"""Classification on frozen embeddings, the first downstream task of `adaptor.py`.

The authors' head is trained on 1%, 10% and 100% of the training patients' labels, on the adaptor's image
embeddings and on the bare backbone's; multi-label (or binary, which is one finding) and multi-class.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import InputError, Radiographs, markdown_table, read_rows


def nested_subsets(patients: Sequence[str], fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Rows of the first patients in a seeded order, per fraction: a smaller subset lies in every larger."""
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(ids))
    return [np.flatnonzero(place[patient] < max(1, round(fraction * len(ids)))) for fraction in fractions]


def labelled_shares(data: Radiographs, fractions: Sequence[float], seed: int) -> list[str]:
    """The least labelled share that each image is in, first repeat; "" outside the training split."""
    train, share = data.where("train"), [""] * len(data.images)
    fractions = sorted(fractions, reverse=True)
    for fraction, subset in zip(fractions, nested_subsets(data.patients[train], fractions, seed)):
        for row in train[subset]:
            share[row] = f"{fraction:g}"
    return share


def build_head(dim: int, classes: int) -> nn.Sequential:
    """The authors' classification head."""
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(dim, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(512, classes),
    )  # fmt: skip


def train_head(features: Callable, labels: torch.Tensor, rows: dict, config, seed: int) -> dict:
    """Train a head on rows["train"], keep its best state on rows["val"], and measure that on rows["test"].

    features: rows [B] -> [B, d]; labels [N, C]. AdamW 5e-4, weight decay 0.05, cosine restarts; as
    many steps for every subset, one restart a quarter (ours).
    """
    data = {k: (features(torch.from_numpy(rows[k])), labels[rows[k]]) for k in ("val", "test")}
    train = torch.from_numpy(rows["train"])
    with retune.seeded(seed):
        head = build_head(data["val"][0].shape[1], labels.shape[1]).to(data["val"][0].device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=5e-4, weight_decay=0.05)
        quarter, best, kept = max(1, config.head_steps // 4), -math.inf, None
        restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, quarter)
        drawn = train[torch.randint(len(train), (config.head_steps, 64))]
        seen, place = drawn.unique(return_inverse=True)  # features of what training sees, once
        x, y = features(seen), labels[seen].to(data["val"][0].device)
        for step, batch in enumerate(place, 1):
            logits, target = head.train()(x[batch]), y[batch]
            if config.multiclass:
                loss = F.cross_entropy(logits, target.argmax(1))
            else:
                loss = retune.prompt_contrastive_loss(logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            restarts.step()
            if step % quarter == 0:
                value = measure_head(head, *data["val"], config)["auroc_macro"]
                if kept is None or value > best:
                    best, kept = value, copy.deepcopy(head.state_dict())
    head.load_state_dict(kept)
    return measure_head(head, *data["test"], config)


@torch.inference_mode()
def measure_head(head: nn.Module, features: torch.Tensor, labels: torch.Tensor, config) -> dict:
    """retune's metrics of the head's answers; multi-class: softmax scores, the largest is the prediction."""
    logits = head.eval()(features).cpu()
    scores = logits.softmax(1) if config.multiclass else logits.sigmoid()
    chosen = F.one_hot(scores.argmax(1), scores.shape[1]) if config.multiclass else scores > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without both labels would be named at every measurement
        return retune.evaluate(scores.numpy(), chosen.float().numpy(), labels.numpy())


def classify(model: nn.Module, images: np.ndarray, data: Radiographs, config, device: str) -> list[dict]:
    """The head on the frozen adaptor and on the bare backbone, for each labelled share and repeat."""
    file = config.folder / "classification.json"
    if file.exists():
        return retune.read_json(file)
    if config.multiclass and not (np.nan_to_num(data.labels).sum(1) == 1).all():
        row = data.rows[int(np.flatnonzero(np.nan_to_num(data.labels).sum(1) != 1)[0])]
        raise InputError(
            f"{row}: --multiclass needs exactly one class of each image; leave it out for findings"
        )
    model.eval()

    @torch.no_grad()
    def adapted(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.alone("image", read_rows(images, r).to(device)) for r in rows.split(4096)])

    def bare(rows: torch.Tensor) -> torch.Tensor:
        return model.centre("image", read_rows(images, rows).to(device))  # in the same scale

    labels, train, results = torch.from_numpy(data.labels), data.where("train"), []
    for repeat in retune.progress(range(config.repeats), desc="classification", unit="repeat"):
        subsets = nested_subsets(data.patients[train], config.fractions, config.seed + repeat)
        for fraction, subset in zip(config.fractions, subsets):
            rows = {"train": train[subset], "val": data.where("val"), "test": data.where("test")}
            for name, features in (("adaptor", adapted), ("bare backbone", bare)):
                metrics = train_head(features, labels, rows, config, config.seed + repeat)
                patients = len({*data.patients[train][subset]})
                results.append({"fraction": fraction, "repeat": repeat, "features": name, "n": len(subset),
                                "patients": patients, "test": metrics})  # fmt: skip
    retune.write_json(file, results)
    return retune.read_json(file)


def classification_table(results: Sequence[dict], multiclass: bool) -> str:
    """Mean and deviation over the repeats, per labelled share."""
    key, rows = ("accuracy" if multiclass else "auroc_macro"), []
    for fraction in dict.fromkeys(r["fraction"] for r in results):
        group = [r for r in results if r["fraction"] == fraction]
        values = {name: np.array([r["test"][key] for r in group if r["features"] == name], float)
                  for name in ("adaptor", "bare backbone")}  # fmt: skip
        gain = values["adaptor"] - values["bare backbone"]
        rows.append([f"{fraction:.0%} of the labels", f"{np.mean([r['n'] for r in group]):.0f}",
                     *[spread(v) for v in values.values()], f"{gain.mean():+.3f}"])  # fmt: skip
    name = "accuracy" if multiclass else "macro AUROC"
    return markdown_table(
        [f"classification, test {name}", "images", "adaptor", "bare backbone", "difference"], rows
    )


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"
