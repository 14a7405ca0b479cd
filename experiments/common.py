"""What the methods share: memory, a task's pieces, zero-shot logits, sums for least squares."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.whitening import Whitening
from retune import Config, Method, PromptBank, Task, gather


class Remembering(Method):
    """A method whose memory is its attributes `remembered`; a `seed` below 0 becomes the run's."""

    remembered: tuple[str, ...] = ()

    @classmethod
    def build(cls, config: Config, dim: int, n_classes: int, **options) -> Method:
        if options.get("seed", 0) < 0:
            options["seed"] = config.seed
        return cls(dim, n_classes, **options)

    def memory(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.remembered}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        for name in self.remembered:
            setattr(self, name, tensors[name].to(getattr(self, name).device))


def read_task(
    model: Method, embeddings: np.ndarray, labels: Tensor, task: Task
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of a task in file order: rows [n], whitened images [n, D], labels [n, C], nan for other classes.

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
    """cos(x, t+) - cos(x, t-) [B, C] of images [B, D] that went through the model's whitening, if any."""
    if not isinstance(model.whitening, Whitening):
        return F.normalize(images, dim=-1) @ prompt_directions(bank).T
    solved = isinstance(bank, SolvedBank)
    weights, constant = bank.zero_shot if solved else zero_shot_weights(model.whitening, bank)
    return images @ weights.to(images).T + constant.to(images)


def zero_shot_weights(whitening: Whitening, bank: PromptBank) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and constants [C] of the zero-shot logits of whitened images; float64 on the CPU."""
    directions = prompt_directions(bank).cpu().double()
    weights = torch.linalg.solve(whitening.matrix.cpu().double(), directions.T).T
    return weights, directions @ whitening.mean.cpu().double()


class SolvedBank(PromptBank):
    """Prompts with their zero-shot weights for a whitening, for exporters, which cannot solve."""

    def __init__(self, bank: PromptBank, whitening: Whitening):
        super().__init__(bank.embeddings, bank.group)
        self.zero_shot = zero_shot_weights(whitening, bank)


def prompt_directions(bank: PromptBank) -> Tensor:
    """[C, D]: t+ - t- of every class, the normalised means of its prompts."""
    means = F.normalize(bank.pooling("mean") @ bank.embeddings, dim=-1)
    return means[0::2] - means[1::2]


@dataclass
class Grams:
    """Sums over the rows that label a finding: features' products, features times label, rows; float64.

    gram [K, P, P], moment [C, P], count [C], and group [C]: which matrix is a finding's. Findings always
    labelled on the same rows share one, so there is one for each pattern of known labels, at most one a
    finding. One matrix for all would count an unknown label as a negative.
    """

    gram: Tensor
    moment: Tensor
    count: Tensor
    group: Tensor

    @classmethod
    def zeros(cls, size: int, n_classes: int) -> "Grams":
        shapes = ((1, size, size), (n_classes, size), (n_classes,))
        sums = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(*sums, torch.zeros(n_classes, dtype=torch.int64))

    def add(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows with features [n, P], labels [n, C], nan where unknown, and weights [n]."""
        if not len(features):
            return
        known = ~labels.isnan()
        weighted = features if weights is None else features * weights[:, None]
        patterns, group = known.unique(dim=1, return_inverse=True)  # [n, U], [C]
        gram = torch.stack([weighted[rows].T @ features[rows] for rows in patterns.T])
        self.merge(Grams(gram, labels.nan_to_num().T @ weighted, known.sum(0), group))

    def merge(self, other: "Grams") -> None:
        """Add the sums over other rows."""
        pairs, self.group = torch.stack([self.group, other.group]).unique(dim=1, return_inverse=True)
        self.gram = torch.stack([self.gram[k] + other.gram[u] for k, u in pairs.T.tolist()])
        self.moment = self.moment + other.moment
        self.count = self.count + other.count


class LeastSquares(Remembering):
    """Scores are linear in `features` [B, P] of images; what is learned are sums of their products."""

    def __init__(self, size: int, n_classes: int):
        super().__init__()
        self.register_buffer("weights", torch.zeros(n_classes, size))  # [C, P]
        self.grams = Grams.zeros(size, n_classes)

    def memory(self) -> dict[str, Tensor]:
        return vars(self.grams) | super().memory()

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        super().load_memory(tensors)
        self.grams = Grams(*(tensors[name] for name in vars(self.grams)))
