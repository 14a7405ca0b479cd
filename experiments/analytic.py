"""Closed-form RE-tune (ours): a Bayesian least-squares correction of the frozen zero-shot logits; it cannot forget."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from experiments.common import Grams, read_task, with_seed, zero_shot_weights
from retune import Method, PromptBank, Task

LAMBDAS = torch.logspace(-5, 1, 25, dtype=torch.float64)


class Analytic(Method):
    """Closed-form RE-tune (ours): one pass over a part, then weights from sums over all rows seen so far.

    Features of a whitened image x: z = x / sqrt(D), [sqrt(2 / M) relu(z R + beta), z, 1] with R ~ N(0, 1) and
    beta ~ N(0, 0.3^2). Every finding regresses its labels, y = 1 or -1, on them. The prior of its weights is a
    Gaussian around `a` times the zero-shot logit, written in z, with precision n lambda / sigma^2; sigma, a >= 0
    and lambda have the maximum of the evidence. A finding whose labels are unknown or all alike keeps the
    zero-shot logit.

    features: M; 0 is linear in z, 1000 did best on the demo. shared: 1, lambda maximises the sum of the evidences
    of all findings learned so far; 0, each finding has its own, and then forgetting is exactly 0. seed: of R and
    beta, the run's by default.

    The sums, in float64, are only needed to learn on and are kept apart from the classifier
    (statistics.safetensors): 8 (M + D + 1)^2 bytes for each set of findings labelled on the same images. They
    are no privacy guarantee: with fewer images than features a Gram matrix determines the images up to a rotation.
    """

    whitens = True

    def __init__(self, dim: int, n_classes: int, features: int = 300, shared: int = 1, seed: int = -1):
        super().__init__()
        generator = torch.Generator().manual_seed(max(0, seed))
        self.dim = dim
        self.shared = shared
        self.register_buffer("projection", torch.randn(dim, features, generator=generator))  # [D, M]
        self.register_buffer("offset", 0.3 * torch.randn(features, generator=generator))  # [M]
        self.register_buffer("weights", torch.zeros(n_classes, features + dim + 1))  # [C, P]
        self.grams = Grams(features + dim + 1, n_classes)
        self.solved: dict[int, tuple[Tensor, Tensor]] = {}  # what `solve` gave for each finding

    @classmethod
    def build(cls, config, dim: int, n_classes: int, **options) -> Analytic:
        return cls(dim, n_classes, **with_seed(config, options))

    def features(self, images: Tensor) -> Tensor:
        """[B, P] of whitened images [B, D], in their dtype."""
        z = images / math.sqrt(self.dim)
        hidden = (z @ self.projection.to(z) + self.offset.to(z)).relu()  # [B, M]
        ones = torch.ones_like(z[:, :1])
        return torch.cat([math.sqrt(2 / max(1, hidden.shape[1])) * hidden, z, ones], 1)

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        """Log odds [B, C]: twice the regression on labels 1 and -1, for sigmoid(2 u) is near (1 + u) / 2."""
        return 2 * self.features(images) @ self.weights.to(images).T

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        for _, images, known in read_task(self, embeddings, labels, task):
            self.grams.add(self.features(images), 2 * known - 1)
        for c in task.classes:
            self.solved.pop(c, None)
        zero_shot = self.zero_shot(bank)
        prior = zero_shot.clone()
        prior[:, -1] = 0  # the constant is learned
        self.weights.copy_(self.posterior(prior, zero_shot))

    def zero_shot(self, bank: PromptBank) -> Tensor:
        """[C, P]: weights that give the zero-shot logit, cos(x, t+) - cos(x, t-)."""
        weights, constant = zero_shot_weights(self.whitening, bank)
        hidden = torch.zeros(len(weights), self.weights.shape[1] - self.dim - 1, dtype=torch.float64)
        return torch.cat([hidden, math.sqrt(self.dim) * weights, constant[:, None]], 1)

    def posterior(self, prior: Tensor, otherwise: Tensor) -> Tensor:
        """Mean weights [C, P] at the best lambda for a prior [C, P]; `otherwise` [C, P] where labels do not differ."""
        grams = self.grams
        learned = (grams.moment[:, -1].abs() < grams.count).nonzero()[:, 0].tolist()
        for group in grams.group[learned].unique().tolist():
            findings = [c for c in learned if grams.group[c] == group and c not in self.solved]
            if findings:
                count = float(grams.count[findings[0]])
                found = solve(grams.gram[group], grams.moment[findings], count, prior[findings], LAMBDAS)
                self.solved |= dict(zip(findings, zip(*found)))
        weights = otherwise.clone()
        total = sum((self.solved[c][0] for c in learned), torch.zeros(len(LAMBDAS), dtype=torch.float64))
        for c in learned:
            evidence, path = self.solved[c]
            weights[c] = path[(total if self.shared else evidence).argmax()]
        return weights

    def memory(self) -> dict[str, Tensor]:
        return self.grams.tensors()

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        self.grams.load(tensors)


def solve(
    gram: Tensor, moment: Tensor, count: float, prior: Tensor, lambdas: Tensor
) -> tuple[Tensor, Tensor]:
    """Log evidence [K, L] and posterior mean weights [K, L, P] of K findings with the same rows.

    gram [P, P] = F'F, moment [K, P] = F'y, count n, y = 1 or -1, prior [K, P] = w0, lambdas [L]. The model is
    y ~ N(F w, sigma^2), w ~ N(a w0, sigma^2 / (n lambda)), so y ~ N(a F w0, sigma^2 C), C = I + FF' / (n lambda);
    sigma and a are at their maxima. The evidence leaves out -n/2 (1 + log 2 pi). One eigendecomposition serves
    every lambda.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    b = moment @ vectors  # [K, P]
    w = prior @ vectors  # [K, P]
    precision = count * lambdas  # [L]
    inverse = 1 / (values + precision[:, None])  # [L, P]
    y_y = count - b.square() @ inverse.T  # y' C^-1 y, [K, L]
    u_y = precision * ((w * b) @ inverse.T)  # u' C^-1 y with u = F w0
    u_u = precision * ((values * w.square()) @ inverse.T)
    a = (u_y / u_u.clamp_min(1e-300)).clamp_min(0)
    residual = y_y - 2 * a * u_y + a.square() * u_u
    log_determinant = torch.log1p(values / precision[:, None]).sum(1)  # [L]
    evidence = -(count * (residual / count).log() + log_determinant) / 2
    centre = b[:, None] + (precision * a)[..., None] * w[:, None]  # [K, L, P]
    return evidence, (centre * inverse) @ vectors.T
