"""What the methods share: a task's data in pieces, the zero-shot logit, sums for least squares."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retune import Config, Method, PromptBank, Task, Whitening, gather


def with_seed(config: Config, options: dict) -> dict:
    """The options of a method; a `seed` below 0 becomes the run's."""
    return options | {"seed": config.seed if options.get("seed", -1) < 0 else options["seed"]}


def read_task(
    model: Method, embeddings: np.ndarray, labels: Tensor, task: Task
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of a task in file order: rows [n], whitened images [n, D], labels [n, C] with nan for other classes.

    Float64 on the CPU, so that the sums do not depend on how the rows were cut into tasks.
    """
    whitening = copy.deepcopy(model.whitening).cpu().double()
    columns = list(task.classes)
    for rows in torch.from_numpy(task.rows).split(4096):
        images = whitening(gather(embeddings, rows, torch.empty(0, dtype=torch.float64)))
        known = torch.full((len(rows), labels.shape[1]), torch.nan, dtype=torch.float64)
        known[:, columns] = labels[rows][:, columns].double()
        yield rows, images, known


def zero_shot_logits(model: Method, images: Tensor, bank: PromptBank) -> Tensor:
    """cos(x, t+) - cos(x, t-) [B, C] of images [B, D] that went through the model's whitening, if it has one."""
    if not isinstance(model.whitening, Whitening):
        return F.normalize(images, dim=-1) @ prompt_directions(bank).T
    weights, constant = zero_shot_weights(model.whitening, bank)
    return images @ weights.to(images).T + constant.to(images)


def zero_shot_weights(whitening: Whitening, bank: PromptBank) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and constants [C] that give the zero-shot logits of whitened images; float64 on the CPU."""
    directions = prompt_directions(bank).cpu().double()  # [C, D]
    weights = torch.linalg.solve(whitening.matrix.cpu().double(), directions.T).T
    return weights, directions @ whitening.mean.cpu().double()


def prompt_directions(bank: PromptBank) -> Tensor:
    """[C, D]: t+ - t- of every class, the normalised means of its prompts."""
    means = F.normalize(bank.pooling("mean") @ bank.embeddings, dim=-1)
    return means[0::2] - means[1::2]


class Grams:
    """Sums over the rows that label a finding: features' products, features times label, rows; float64.

    Findings whose labels always came on the same rows share a matrix, so there is one for each pattern of known
    labels and at most one a finding. One matrix for all would count an unknown label as a negative.
    """

    def __init__(self, size: int, n_classes: int):
        self.gram = torch.zeros(1, size, size, dtype=torch.float64)  # [K, P, P]
        self.moment = torch.zeros(n_classes, size, dtype=torch.float64)  # [C, P]
        self.count = torch.zeros(n_classes, dtype=torch.float64)  # [C]
        self.group = torch.zeros(n_classes, dtype=torch.int64)  # [C], the matrix of each finding

    def add(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows with features [n, P], labels [n, C], nan where unknown, and weights [n]."""
        known = ~labels.isnan()
        weighted = features if weights is None else features * weights[:, None]
        new = copy.copy(self)
        patterns, new.group = known.unique(dim=1, return_inverse=True)  # [n, U], [C]
        new.gram = torch.stack([weighted[rows].T @ features[rows] for rows in patterns.T])
        new.moment = labels.nan_to_num().T @ weighted
        new.count = known.sum(0)
        self.merge(new)

    def merge(self, other: Grams) -> None:
        """Add the sums over other rows."""
        pairs, self.group = torch.stack([self.group, other.group]).unique(dim=1, return_inverse=True)
        self.gram = torch.stack([self.gram[k] + other.gram[u] for k, u in pairs.T.tolist()])
        self.moment = self.moment + other.moment
        self.count = self.count + other.count

    def of(self, finding: int) -> Tensor:
        """The matrix [P, P] of a finding."""
        return self.gram[self.group[finding]]

    def tensors(self) -> dict[str, Tensor]:
        return {"gram": self.gram, "moment": self.moment, "count": self.count, "group": self.group}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.gram = tensors["gram"]
        self.moment = tensors["moment"]
        self.count = tensors["count"]
        self.group = tensors["group"]
