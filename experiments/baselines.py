"""Methods trained by gradient on frozen image embeddings, in RE-tune's place (`retune.py --method NAME`).

    linear   one logistic regression per finding; findings share no weights
    mlp      the paper's image adaptor followed by that layer: shared weights, so it can forget
    ewc      mlp + a quadratic penalty on weights that mattered to earlier tasks (Kirkpatrick et al. 2017)
    lwf      mlp + distillation from the model before the task (Li & Hoiem 2016)
    replay   mlp + a memory of images of earlier tasks, which means keeping patients' data
    joint    mlp + every image seen so far, trained to convergence: the bound, it keeps all data
    distil   residual RE-tune + distillation (ours): what gradient descent makes of the idea of `analytic`

A part brings only the labels of its own findings; remembered images keep the labels that they came with.
"""

import copy
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parameters_to_vector

from experiments.common import Remembering
from retune import Adaptor, InputError, Method, PromptBank, RETune, Task, fit, gather, prompt_contrastive_loss


class Linear(Remembering):
    """Logistic layer on image embeddings [B, D], not normalised."""

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.network = nn.Sequential(nn.Identity(), nn.Linear(dim, n_classes))

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        return self.network(images)


class MLP(Linear):
    """Logistic layer behind the paper's image adaptor."""

    def __init__(self, dim: int, n_classes: int):
        Remembering.__init__(self)
        self.network = nn.Sequential(Adaptor(dim, "mlp"), nn.Linear(dim, n_classes))


class EWC(MLP):
    """Elastic weight consolidation, online: one Fisher diagonal, one anchor (Schwarz et al. 2018).

    Diagonals are summed without decay. strength: lambda of the penalty against the mean loss; 100 is the
    class-incremental default of van de Ven, Tuytelaars & Tolias 2022; published values range from 1 to 1e10.
    On the demo's validation split 100 gave macro AUROC 0.824, 1e4 0.821, 1e6 0.803, 1 0.797 (class, seed 7).
    """

    remembered = ("fisher",)

    def __init__(self, dim: int, n_classes: int, strength=100.0):
        super().__init__(dim, n_classes)
        self.strength = strength
        self.anchor = parameters_to_vector(self.network.parameters()).detach()
        self.register_buffer("fisher", torch.zeros_like(self.anchor), persistent=False)

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        self.anchor = parameters_to_vector(self.network.parameters()).detach()
        return task, labels

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor:
        moved = parameters_to_vector(self.network.parameters()) - self.anchor
        return self.strength / 2 * (self.fisher * moved.square()).sum()

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        for rows in torch.from_numpy(task.rows).split(4096):
            images = self.whitening(gather(embeddings, rows, self.anchor))
            known = ~labels[rows].isnan().to(images.device)
            self.fisher += fisher_diagonal(self.network, images, known, task.classes) / len(task.rows)


def fisher_diagonal(network: nn.Module, images: Tensor, known: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Diagonal of the Fisher information of the outputs, summed over images [B, D]: [P], as `parameters()`.

    Layers follow each other. Outputs are independent Bernoulli variables, so the expectation over labels is
    exact: the sum over classes with a known label ([B, C], bool) of p (1 - p) (d logit / d w)^2. A linear
    layer's squared gradient for one image is the outer product of two squares, summed by a matrix product.
    """
    logits = images
    inputs = {}  # of each linear layer
    outputs = []  # their places in the graph, since ReLU overwrites the values
    for module in (module for module in network.modules() if not list(module.children())):
        if isinstance(module, nn.Linear):
            inputs[module] = logits.detach()
        logits = module(logits)
        if module in inputs:
            outputs.append(get_gradient_edge(logits))
    total = {p: torch.zeros_like(p) for p in network.parameters()}
    for c in classes:
        p = logits[:, c].detach().sigmoid()
        weight = (p * (1 - p) * known[:, c])[:, None]  # [B, 1]
        gradients = torch.autograd.grad(logits[:, c].sum(), outputs, retain_graph=True)
        for layer, gradient in zip(inputs, gradients):
            squared = weight * gradient.square()  # [B, out]
            total[layer.weight] += squared.T @ inputs[layer].square()
            total[layer.bias] += squared.sum(0)
    return parameters_to_vector(total[p] for p in network.parameters())


class Distilling(Remembering):
    """From the second task on, the loss adds `strength` times the mean cross-entropy between the
    probabilities before the task and now, at a temperature, for the findings `held`."""

    temperature = 1.0
    held: Tensor  # [C], bool
    teacher: tuple | None = None  # the model before the task and its prompts; a tuple is not in state_dict

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        self.teacher = None
        self.teacher = copy.deepcopy(self).requires_grad_(False), bank
        return task, labels

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor | float:
        if not self.held.any():
            return 0.0
        model, bank = self.teacher
        target = (model.logits(images, bank) / self.temperature).sigmoid()[:, self.held]
        new = logits[:, self.held] / self.temperature
        return self.strength * F.binary_cross_entropy_with_logits(new, target)


class LwF(Distilling, MLP):
    """Learning without forgetting: on the new images, stay close to what the model said before the task.

    The softmax of the paper becomes one sigmoid per finding, over the findings that an earlier task trained.
    strength, temperature: lambda_o and T of Li & Hoiem 2016, section 3.
    """

    remembered = ("seen",)
    held = property(lambda self: self.seen)

    def __init__(self, dim: int, n_classes: int, strength=1.0, temperature=2.0):
        super().__init__(dim, n_classes)
        self.strength = strength
        self.temperature = temperature
        self.seen = torch.zeros(n_classes, dtype=torch.bool)

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        self.seen[list(task.classes)] = True


class Distil(Distilling, RETune):
    """RE-tune on whitened embeddings, residual adaptors, logit scale 10, held to its former answers (ours).

    strength: of the cross-entropy to the model before the task, over findings that the task does not train.
    """

    whitens = True
    remembered = ("tasks",)

    def __init__(self, dim: int, n_classes: int, strength=3.0):
        super().__init__(dim, "residual", logit_scale=10.0)
        self.strength = strength
        self.tasks = torch.tensor(0)

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        self.held = torch.full((labels.shape[1],), bool(self.tasks))
        self.held[list(task.classes)] = False
        return super().before_task(task, labels, bank)

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        self.tasks = self.tasks + 1


class Replay(MLP):
    """Trains on the new part together with `memory` remembered images.

    The memory is a uniform sample of everything seen, as reservoir sampling keeps it (Vitter 1985; Chaudhry
    et al. 2019): every row has a random key by seed, and the smallest keys stay.
    """

    remembered = ("rows",)

    def __init__(self, dim: int, n_classes: int, memory=500, seed=-1):
        super().__init__(dim, n_classes)
        if memory < 1:
            raise InputError(f"--set memory={memory}: replay needs at least 1 image; mlp has no memory")
        self.budget = memory
        self.seed = max(0, seed)
        self.dim = dim
        self.rows = torch.empty(0, 1 + n_classes, dtype=torch.int64)  # [M, row and one 0/1 per known label]

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        """The task with the remembered rows, and the labels [N, C] with nan where no part brought them."""
        return joined_task(self.known(task, labels), task.name, labels)

    def known(self, task: Task, labels: Tensor) -> Tensor:
        """[N, C], bool: the labels that the remembered rows and the task brought."""
        known = torch.zeros(labels.shape, dtype=torch.bool)
        known[self.rows[:, 0]] = self.rows[:, 1:].bool()
        known[np.ix_(task.rows, task.classes)] = True
        return known

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        known = self.known(task, labels)
        rows = known.any(1).nonzero()[:, 0]
        keys = np.random.default_rng(self.seed).random(len(labels))[rows]
        rows = rows[np.sort(np.argsort(keys)[: self.budget])]
        self.rows = torch.cat([rows[:, None], known[rows]], 1)

    def stored_bytes(self) -> int:
        """Bytes of patients' data to keep for the next task: float32 embeddings and labels."""
        return len(self.rows) * 4 * (self.dim + self.rows.shape[1] - 1)


def joined_task(known: Tensor, name: str, labels: Tensor) -> tuple[Task, Tensor]:
    """The task of all rows with known labels, [N, C], bool, and the labels [N, C] with nan where unknown."""
    classes = tuple(known.any(0).nonzero()[:, 0].tolist())
    return Task(name, known.any(1).nonzero()[:, 0].numpy(), classes), torch.where(known, labels, torch.nan)


class Joint(Replay):
    """Trains on every image seen so far, from new weights after each task, until convergence: the bound.

    The number of epochs, whatever --epochs says, is where the loss of a held-out tenth is lowest (ten more
    did not lower it); then all images are trained on for as many. At most MOST_EPOCHS: if a finding's labels
    in that tenth are all alike, the loss falls for ever.
    """

    MOST_EPOCHS = 200

    def __init__(self, dim: int, n_classes: int, seed=-1):
        super().__init__(dim, n_classes, memory=sys.maxsize, seed=seed)
        self.settings = {}
        self.start = copy.deepcopy(self.network.state_dict())

    @classmethod
    def build(cls, config, dim: int, n_classes: int, **options) -> Method:
        model = super().build(config, dim, n_classes, **options)
        model.settings = {"lr": config.lr, "batch_size": config.batch_size}
        return model

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        known = self.known(task, labels)
        super().after_task(embeddings, labels, task, bank)
        held_out = torch.from_numpy(np.random.default_rng(self.seed).random(len(labels)) < 0.1)[:, None]
        check, answers = joined_task(known & held_out, task.name, labels)
        images = self.whitening(gather(embeddings, torch.from_numpy(check.rows), bank.embeddings))
        losses = []
        for _ in self.epochs(known & ~held_out, embeddings, labels, bank):
            with torch.no_grad():
                losses.append(float(prompt_contrastive_loss(self.logits(images), answers[check.rows])))
            best = int(np.argmin(losses)) + 1
            if len(losses) in (best + 10, self.MOST_EPOCHS):
                break
        for _ in zip(range(best), self.epochs(known, embeddings, labels, bank)):
            pass

    def epochs(self, known: Tensor, embeddings, labels: Tensor, bank: PromptBank) -> Iterator[None]:
        """Restart on the rows with known labels, [N, C], bool, and yield after every epoch."""
        task, targets = joined_task(known, "all data", labels)
        self.network.load_state_dict(self.start)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.settings["lr"], fused=True)
        options = {"epochs": 1, "batch_size": self.settings["batch_size"]}
        options["generator"] = torch.Generator().manual_seed(self.seed)
        while True:
            fit(self, bank, embeddings, targets, task, optimizer, **options)
            yield
