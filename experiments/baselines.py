"""Baselines for continual learning on the frozen image embeddings that RE-tune uses; no text, no prompts.

All share RE-tune's data, scenarios, optimiser, loss and metrics (`python retune.py --method NAME`):

    linear   one logistic regression per finding; findings share no weights
    mlp      the paper's image adaptor followed by that layer: shared weights, so it can forget
    ewc      mlp + a quadratic penalty on weights that mattered to earlier tasks (Kirkpatrick et al. 2017)
    lwf      mlp + distillation from the model before the task (Li & Hoiem 2016)
    replay   mlp + `--memory` images of earlier tasks, which means to keep patients' data
    joint    mlp + every image seen so far: the upper bound, it keeps all patients' data

A part brings the labels of its own findings alone, and nothing here sees more: remembered images keep the
labels that they came with. What a method carries from task to task is in its `state_dict`, as row numbers
where it is images: no embedding and no label is in a saved file, but `stored_bytes` tells what a hospital
would have to keep.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from retune import Adaptor, Config, InputError, PromptBank, Task, read_rows

# Strength of the penalty against the mean loss. 100 is the class-incremental default for permuted MNIST in
# the code of "Three types of incremental learning" (van de Ven, Tuytelaars & Tolias 2022); the Bayesian
# weight is 1 for tasks of equal size, and published values reach from 1 to 1e10. On the demo's validation
# split, class-incremental, 100 gave a macro AUROC of 0.824, 1e4 0.821, 1e6 0.803 and 1 0.797 (seed 7).
EWC_LAMBDA = 100.0
# Weight and temperature of the distillation loss: Li & Hoiem 2016, section 3 (lambda_o = 1, T = 2).
LWF_LAMBDA, LWF_TEMPERATURE = 1.0, 2.0


class Head(nn.Module):
    """Logistic layer on image embeddings [B, D], not normalised; behind the paper's adaptor if `adaptor`."""

    def __init__(self, dim: int, n_classes: int, adaptor: bool = True):
        super().__init__()
        self.network = nn.Sequential(
            Adaptor(dim, "mlp") if adaptor else nn.Identity(), nn.Linear(dim, n_classes)
        )

    def logits(self, images: torch.Tensor, bank: PromptBank | None = None) -> torch.Tensor:
        """Log odds [B, C]; `bank` is there for RE-tune's signature and unused."""
        return self.network(images)

    def scores(
        self, images: torch.Tensor, bank: PromptBank | None = None, rule: str = "diff"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities, decisions 0/1), both [B, C]; there are no cosines, so `rule` changes nothing."""
        logits = self.logits(images)
        return logits.sigmoid(), (logits > 0).float()


class EWC(Head):
    """Elastic weight consolidation, online: one Fisher diagonal, one anchor (Schwarz et al. 2018).

    Summing the diagonals keeps the state at twice the weights for any number of tasks; gamma is 1, no decay.
    """

    def __init__(self, dim: int, n_classes: int):
        super().__init__(dim, n_classes)
        count = sum(p.numel() for p in self.network.parameters())
        self.register_buffer("fisher", torch.zeros(count))
        self.register_buffer("anchor", torch.zeros(count))

    def penalty(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """lambda / 2 * sum of F (w - anchor)^2."""
        moved = parameters_to_vector(self.network.parameters()) - self.anchor
        return EWC_LAMBDA / 2 * (self.fisher * moved.square()).sum()

    def consolidate(self, embeddings: np.ndarray, labels: torch.Tensor, task: Task, bank=None) -> None:
        self.fisher += fisher_diagonal(self.network, embeddings, labels, task)
        self.anchor.copy_(parameters_to_vector(self.network.parameters()).detach())


def fisher_diagonal(
    network: nn.Module, embeddings: np.ndarray, labels: torch.Tensor, task: Task
) -> torch.Tensor:
    """Diagonal of the Fisher information of the task's outputs, mean over its rows: [P], as `parameters()`.

    The outputs are independent Bernoulli variables, so the expectation over labels is exact: the sum over
    classes with a known label of p (1 - p) (d logit / d w)^2. For a linear layer with input a and output
    gradient d the squared gradient of one image is the outer product of d^2 and a^2, so that the sum over
    images is a matrix product.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    seen: dict[nn.Module, tuple] = {}  # inputs, and the place of the output in the graph: ReLU overwrites it

    def remember(layer, inputs, output):
        seen[layer] = inputs[0], get_gradient_edge(output)

    hooks = [layer.register_forward_hook(remember) for layer in layers]
    total = {p: torch.zeros_like(p) for p in network.parameters()}
    for rows in torch.from_numpy(task.rows).split(4096):
        images = read_rows(embeddings, rows).to(next(network.parameters()).device)
        logits = network(images.requires_grad_())
        known = ~labels[rows].isnan().to(logits.device)
        for c in task.classes:
            p = logits[:, c].detach().sigmoid()
            weight = (p * (1 - p) * known[:, c])[:, None]  # [B, 1]
            gradients = torch.autograd.grad(
                logits[:, c].sum(), [seen[layer][1] for layer in layers], retain_graph=True
            )
            for layer, gradient in zip(layers, gradients):
                squared = weight * gradient.square()  # [B, out]
                total[layer.weight] += squared.T @ seen[layer][0].detach().square()
                total[layer.bias] += squared.sum(0)
    for hook in hooks:
        hook.remove()
    return parameters_to_vector(total[p] for p in network.parameters()) / len(task.rows)


class LwF(Head):
    """Learning without forgetting: on the new images, stay close to what the model said before the task.

    The softmax of the paper becomes one sigmoid per finding, over the findings that an earlier task trained.
    """

    def __init__(self, dim: int, n_classes: int):
        super().__init__(dim, n_classes)
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))
        for name, value in self.network.named_parameters():
            self.register_buffer(f"old_{name.replace('.', '_')}", torch.zeros_like(value))

    def old(self) -> dict[str, torch.Tensor]:
        """Weights before this task, by their names in `network`."""
        return {
            name: getattr(self, f"old_{name.replace('.', '_')}")
            for name, _ in self.network.named_parameters()
        }

    def penalty(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor | float:
        """lambda * mean cross-entropy between old and new probabilities at temperature T."""
        if not self.seen.any():
            return 0.0
        with torch.no_grad():
            target = (functional_call(self.network, self.old(), (images,)) / LWF_TEMPERATURE).sigmoid()
        new = logits[:, self.seen] / LWF_TEMPERATURE
        return LWF_LAMBDA * F.binary_cross_entropy_with_logits(new, target[:, self.seen])

    def consolidate(self, embeddings: np.ndarray, labels: torch.Tensor, task: Task, bank=None) -> None:
        self.seen[list(task.classes)] = True
        for name, value in self.network.named_parameters():
            self.old()[name].copy_(value.detach())


class Replay(Head):
    """Trains on the new part together with remembered images: `budget` of them, or all seen so far (None).

    The memory is a uniform sample of everything seen, as reservoir sampling keeps it (Vitter 1985; Chaudhry
    et al. 2019): every row has a random key by seed, and the smallest keys stay.
    """

    def __init__(self, dim: int, n_classes: int, budget: int | None, seed: int):
        super().__init__(dim, n_classes)
        self.dim, self.budget, self.seed = dim, budget, seed
        self.memory = torch.empty(0, 1 + n_classes, dtype=torch.int64)  # [M, row and one 0/1 per known label]

    def get_extra_state(self) -> torch.Tensor:
        return self.memory

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.memory = state

    def with_memory(self, task: Task) -> torch.Tensor:
        """Memory and the task's rows [M, 1 + C], by row; a row in both knows the labels of both."""
        new = torch.zeros(len(task.rows), self.memory.shape[1], dtype=torch.int64)
        new[:, 0] = torch.from_numpy(task.rows)
        new[:, [1 + c for c in task.classes]] = 1
        both = torch.cat([self.memory, new])
        rows, index = both[:, 0].unique(return_inverse=True)
        known = torch.zeros(len(rows), both.shape[1] - 1, dtype=torch.int64).index_add_(0, index, both[:, 1:])
        return torch.cat([rows[:, None], known.clamp(max=1)], 1)

    def rehearse(self, task: Task, labels: torch.Tensor) -> tuple[Task, torch.Tensor]:
        """The task with the remembered rows, and the labels [N, C] with nan where no part brought them."""
        joined = self.with_memory(task)
        rows, known = joined[:, 0], joined[:, 1:].bool()
        allowed = torch.full_like(labels, torch.nan)
        allowed[rows] = torch.where(known, labels[rows], torch.nan)
        return Task(task.name, rows.numpy(), tuple(known.any(0).nonzero()[:, 0].tolist())), allowed

    def consolidate(self, embeddings: np.ndarray, labels: torch.Tensor, task: Task, bank=None) -> None:
        joined = self.with_memory(task)
        if self.budget is not None:
            keys = np.random.default_rng(self.seed).random(len(labels))[joined[:, 0].numpy()]
            joined = joined[np.sort(np.argsort(keys)[: self.budget])]
        self.memory = joined

    def stored_bytes(self) -> int:
        """Bytes of patients' data to keep for the next task: float32 embeddings and labels."""
        return len(self.memory) * 4 * (self.dim + self.memory.shape[1] - 1)


def build(config: Config, dim: int, n_classes: int) -> nn.Module:
    """The untrained baseline `config.method`; InputError for an unknown one or a memory below 1."""
    if config.method == "replay" and config.memory < 1:
        raise InputError(
            f"--memory {config.memory}: replay needs at least 1 image; --method mlp has no memory"
        )
    makers = {
        "linear": lambda: Head(dim, n_classes, adaptor=False),
        "mlp": lambda: Head(dim, n_classes),
        "ewc": lambda: EWC(dim, n_classes),
        "lwf": lambda: LwF(dim, n_classes),
        "replay": lambda: Replay(dim, n_classes, config.memory, config.seed),
        "joint": lambda: Replay(dim, n_classes, None, config.seed),
    }
    if config.method not in makers:
        raise InputError(f"method {config.method!r} is not a baseline; known: {', '.join(makers)}")
    return makers[config.method]()
