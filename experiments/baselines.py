"""Baselines trained by gradient on the frozen image embeddings that RE-tune uses; no text, no prompts.

All share RE-tune's data, scenarios, optimiser, loss and metrics (`python retune.py --method NAME`):

    linear   one logistic regression per finding; findings share no weights
    mlp      the paper's image adaptor followed by that layer: shared weights, so it can forget
    ewc      mlp + a quadratic penalty on weights that mattered to earlier tasks (Kirkpatrick et al. 2017)
    lwf      mlp + distillation from the model before the task (Li & Hoiem 2016)
    replay   mlp + a memory of images of earlier tasks, which means to keep patients' data
    joint    mlp + every image seen so far, trained to convergence: the bound, it keeps all data

A part brings the labels of its own findings alone, and nothing here sees more: remembered images keep the
labels that they came with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from experiments.common import with_seed
from retune import Adaptor, InputError, Method, PromptBank, Task, fit, gather, prompt_contrastive_loss


class Linear(Method):
    """Logistic layer on image embeddings [B, D], not normalised."""

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.network = nn.Sequential(nn.Identity(), nn.Linear(dim, n_classes))

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        """Log odds [B, C]; the prompts are not used."""
        return self.network(images)


class MLP(Linear):
    """Logistic layer behind the paper's image adaptor."""

    def __init__(self, dim: int, n_classes: int):
        Method.__init__(self)
        self.network = nn.Sequential(Adaptor(dim, "mlp"), nn.Linear(dim, n_classes))


class EWC(MLP):
    """Elastic weight consolidation, online: one Fisher diagonal, one anchor (Schwarz et al. 2018).

    Summing the diagonals keeps the state at one number a weight for any number of tasks; gamma is 1, no decay.
    strength: lambda of the penalty against the mean loss. 100 is the class-incremental default for permuted
    MNIST in the code of "Three types of incremental learning" (van de Ven, Tuytelaars & Tolias 2022); the
    Bayesian weight is 1 for tasks of equal size, and published values reach from 1 to 1e10. On the demo's
    validation split, class-incremental, 100 gave a macro AUROC of 0.824, 1e4 0.821, 1e6 0.803, 1 0.797 (seed 7).
    """

    def __init__(self, dim: int, n_classes: int, strength: float = 100.0):
        super().__init__(dim, n_classes)
        self.strength = strength
        weights = parameters_to_vector(self.network.parameters()).detach()
        self.register_buffer("fisher", torch.zeros_like(weights), persistent=False)
        self.register_buffer("anchor", weights, persistent=False)

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank | None) -> tuple[Task, Tensor]:
        self.anchor.copy_(parameters_to_vector(self.network.parameters()).detach())
        return task, labels

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor:
        """lambda / 2 * sum of F (w - anchor)^2."""
        moved = parameters_to_vector(self.network.parameters()) - self.anchor
        return self.strength / 2 * (self.fisher * moved.square()).sum()

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank | None) -> None:
        for rows in torch.from_numpy(task.rows).split(4096):
            images = self.whitening(gather(embeddings, rows, self.anchor))
            known = ~labels[rows].isnan().to(images.device)
            self.fisher += fisher_diagonal(self.network, images, known, task.classes) / len(task.rows)

    def memory(self) -> dict[str, Tensor]:
        return {"fisher": self.fisher}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        self.fisher.copy_(tensors["fisher"])


def fisher_diagonal(network: nn.Module, images: Tensor, known: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Diagonal of the Fisher information of the outputs, summed over images [B, D]: [P], as `parameters()`.

    The outputs are independent Bernoulli variables, so the expectation over labels is exact: the sum over
    classes with a known label ([B, C], bool) of p (1 - p) (d logit / d w)^2. For a linear layer with input a
    and output gradient d the squared gradient of one image is the outer product of d^2 and a^2, so that the
    sum over images is a matrix product.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    seen: dict[nn.Module, tuple] = {}  # inputs, and the place of the output in the graph: ReLU overwrites it

    def remember(layer, inputs, output):
        seen[layer] = inputs[0], get_gradient_edge(output)

    hooks = [layer.register_forward_hook(remember) for layer in layers]
    logits = network(images.requires_grad_())
    for hook in hooks:
        hook.remove()
    total = {p: torch.zeros_like(p) for p in network.parameters()}
    for c in classes:
        p = logits[:, c].detach().sigmoid()
        weight = (p * (1 - p) * known[:, c])[:, None]  # [B, 1]
        outputs = [seen[layer][1] for layer in layers]
        gradients = torch.autograd.grad(logits[:, c].sum(), outputs, retain_graph=True)
        for layer, gradient in zip(layers, gradients):
            squared = weight * gradient.square()  # [B, out]
            total[layer.weight] += squared.T @ seen[layer][0].detach().square()
            total[layer.bias] += squared.sum(0)
    return parameters_to_vector(total[p] for p in network.parameters())


class LwF(MLP):
    """Learning without forgetting: on the new images, stay close to what the model said before the task.

    The softmax of the paper becomes one sigmoid per finding, over the findings that an earlier task trained.
    strength, temperature: lambda_o and T of Li & Hoiem 2016, section 3.
    """

    def __init__(self, dim: int, n_classes: int, strength: float = 1.0, temperature: float = 2.0):
        super().__init__(dim, n_classes)
        self.strength = strength
        self.temperature = temperature
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool), persistent=False)
        self.old: dict[str, Tensor] = {}  # weights before this task, by their names in `network`

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank | None) -> tuple[Task, Tensor]:
        self.old = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        return task, labels

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor | float:
        """lambda * mean cross-entropy between old and new probabilities at temperature T."""
        if not self.seen.any():
            return 0.0
        with torch.no_grad():
            target = (functional_call(self.network, self.old, (images,)) / self.temperature).sigmoid()
        new = logits[:, self.seen] / self.temperature
        return self.strength * F.binary_cross_entropy_with_logits(new, target[:, self.seen])

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank | None) -> None:
        self.seen[list(task.classes)] = True

    def memory(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        self.seen.copy_(tensors["seen"])


class Replay(MLP):
    """Trains on the new part together with `memory` remembered images.

    The memory is a uniform sample of everything seen, as reservoir sampling keeps it (Vitter 1985; Chaudhry
    et al. 2019): every row has a random key by seed, and the smallest keys stay.
    """

    def __init__(self, dim: int, n_classes: int, memory: int = 500, seed: int = -1):
        super().__init__(dim, n_classes)
        if memory < 1:
            raise InputError(
                f"--set memory={memory}: replay needs at least 1 image; --method mlp has no memory"
            )
        self.budget = memory
        self.seed = max(0, seed)
        self.dim = dim
        self.stored = torch.empty(0, 1 + n_classes, dtype=torch.int64)  # [M, row and one 0/1 per known label]

    @classmethod
    def build(cls, config, dim: int, n_classes: int, **options) -> Replay:
        return cls(dim, n_classes, **with_seed(config, options))

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank | None) -> tuple[Task, Tensor]:
        """The task with the remembered rows, and the labels [N, C] with nan where no part brought them."""
        return joined_task(self.with_stored(task), task.name, labels)

    def with_stored(self, task: Task) -> Tensor:
        """Stored and the task's rows [M, 1 + C], by row; a row in both knows the labels of both."""
        new = torch.zeros(len(task.rows), self.stored.shape[1], dtype=torch.int64)
        new[:, 0] = torch.from_numpy(task.rows)
        new[:, [1 + c for c in task.classes]] = 1
        both = torch.cat([self.stored, new])
        rows, index = both[:, 0].unique(return_inverse=True)
        known = torch.zeros(len(rows), both.shape[1] - 1, dtype=torch.int64).index_add_(0, index, both[:, 1:])
        return torch.cat([rows[:, None], known.clamp(max=1)], 1)

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank | None) -> None:
        joined = self.with_stored(task)
        keys = np.random.default_rng(self.seed).random(len(labels))[joined[:, 0].numpy()]
        self.stored = joined[np.sort(np.argsort(keys)[: self.budget])]

    def memory(self) -> dict[str, Tensor]:
        return {"rows": self.stored}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        self.stored = tensors["rows"]

    def stored_bytes(self) -> int:
        """Bytes of patients' data to keep for the next task: float32 embeddings and labels."""
        return len(self.stored) * 4 * (self.dim + self.stored.shape[1] - 1)


def joined_task(joined: Tensor, name: str, labels: Tensor) -> tuple[Task, Tensor]:
    """The task of rows and known labels [M, 1 + C], and the labels [N, C] with nan where they are unknown."""
    rows = joined[:, 0]
    known = joined[:, 1:].bool()
    allowed = torch.full_like(labels, torch.nan)
    allowed[rows] = torch.where(known, labels[rows], torch.nan)
    return Task(name, rows.numpy(), tuple(known.any(0).nonzero()[:, 0].tolist())), allowed


class Joint(Replay):
    """Trains on every image seen so far, from new weights after every task, until it no longer improves: the bound.

    The number of epochs, whatever --epochs says, is where the loss of a held-out tenth is lowest (ten more did not
    lower it); then all images are trained on for as many. At most MOST_EPOCHS: of a tenth in which a finding's labels are
    all alike the loss falls for ever.
    """

    MOST_EPOCHS = 200

    def __init__(self, dim: int, n_classes: int, seed: int = -1):
        super().__init__(dim, n_classes, seed=seed)
        self.settings = {}
        self.start = copy.deepcopy(self.network.state_dict())

    @classmethod
    def build(cls, config, dim: int, n_classes: int, **options) -> Joint:
        model = super().build(config, dim, n_classes, **options)
        model.settings = {"lr": config.lr, "batch_size": config.batch_size}
        return model

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        self.stored = self.with_stored(task)
        held_out = np.random.default_rng(self.seed).random(len(labels))[self.stored[:, 0].numpy()] < 0.1
        check, answers = joined_task(self.stored[held_out], task.name, labels)
        images = self.whitening(gather(embeddings, torch.from_numpy(check.rows), bank.embeddings))
        best = math.inf
        epochs = 0
        for epoch, _ in enumerate(self.epochs(self.stored[~held_out], embeddings, labels, bank), 1):
            with torch.no_grad():
                loss = float(prompt_contrastive_loss(self.logits(images), answers[check.rows]))
            if loss < best:
                best = loss
                epochs = epoch
            if epoch in (epochs + 10, self.MOST_EPOCHS):
                break
        for _ in zip(range(epochs), self.epochs(self.stored, embeddings, labels, bank)):
            pass

    def epochs(
        self, joined: Tensor, embeddings: np.ndarray, labels: Tensor, bank: PromptBank
    ) -> Iterator[None]:
        """Start anew on rows and their known labels [M, 1 + C], and yield after every epoch."""
        task, known = joined_task(joined, "all data", labels)
        self.network.load_state_dict(self.start)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings["lr"], fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        options = {"epochs": 1, "batch_size": self.settings["batch_size"], "generator": generator}
        while True:
            fit(self, bank, embeddings, known, task, optimizer, **options)
            yield
