"""Residual RE-tune with distillation (ours): what gradient descent makes of the idea of `analytic`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from retune import PromptBank, RETune, Task


class Distil(RETune):
    """RE-tune on whitened embeddings, residual adaptors, logit scale 10, held to its former answers (ours).

    From the second task on the loss has `strength` times the mean cross-entropy to the probabilities of the
    model before the task (temperature 1), over the findings that the task does not train.
    """

    whitens = True

    def __init__(self, dim: int, n_classes: int, strength: float = 3.0):
        super().__init__(dim, "residual", logit_scale=10.0)
        self.strength = strength
        self.n_classes = n_classes
        self.tasks = 0
        self.others: list[int] = []  # findings that the task does not train
        self.old: dict[str, Tensor] = {}  # weights before the task
        self.bank: PromptBank | None = None

    @classmethod
    def build(cls, config, dim: int, n_classes: int, **options) -> Distil:
        return cls(dim, n_classes, **options)

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        self.others = [c for c in range(self.n_classes) if c not in task.classes] if self.tasks else []
        self.old = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.bank = bank
        return task, labels

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor | float:
        """strength * mean cross-entropy between old and new probabilities."""
        if not self.others:
            return 0.0
        with torch.no_grad():
            positive, negative = functional_call(self, self.old, (images, self.bank))
            target = (self.logit_scale * (positive - negative)).sigmoid()
        others = self.others
        return self.strength * F.binary_cross_entropy_with_logits(logits[:, others], target[:, others])

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        self.tasks += 1

    def memory(self) -> dict[str, Tensor]:
        return {"tasks": torch.tensor(self.tasks)}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        self.tasks = int(tensors["tasks"])
