"""Closed-form RE-tune (ours): a Bayesian least-squares correction of zero-shot logits; it cannot forget."""

import math

import numpy as np
import torch
from torch import Tensor

from experiments.common import LeastSquares, read_task, zero_shot_weights
from retune import PromptBank, Task

LAMBDAS = torch.logspace(-5, 1, 25, dtype=torch.float64)


class Analytic(LeastSquares):
    """Closed-form RE-tune (ours): one pass over a part, then weights from sums over all rows seen so far.

    Every finding regresses its labels, 1 or -1, on [sqrt(2 / M) relu(z R + beta), z, 1], z = x / sqrt(D); its
    weights have a Gaussian prior around a multiple of the zero-shot logit (docs/methods.md).

    features: M; 0 is linear in z, 1000 did best on the demo. shared: 1, lambda maximises the sum of evidences
    of all findings learned so far; 0, each finding has its own, and then forgetting is exactly 0. related: 1,
    the prior's centre adds a multiple of the other findings' mean weights, which helps with few images. seed:
    of R and beta; below 0, the run's.
    """

    whitens = True

    def __init__(self, dim: int, n_classes: int, features=300, shared=1, related=0, seed=-1):
        super().__init__(features + dim + 1, n_classes)
        generator = torch.Generator().manual_seed(max(0, seed))
        self.dim = dim
        self.shared = shared
        self.related = related
        self.register_buffer("projection", torch.randn(dim, features, generator=generator))  # [D, M]
        self.register_buffer("offset", 0.3 * torch.randn(features, generator=generator))  # [M]
        self.solved: dict[int, tuple[Tensor, Tensor]] = {}  # what `solve` gave for each finding

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
        learned = (self.grams.moment[:, -1].abs() < self.grams.count).nonzero()[:, 0].tolist()
        self.solved |= self.solve_groups([c for c in learned if c not in self.solved], prior[:, None])
        weights = self.choose(self.solved, learned, zero_shot)
        if self.related and len(learned) > 1:
            others = (weights[learned].sum(0) - weights) / (len(learned) - 1)
            solved = self.solve_groups(learned, torch.stack([prior, others], 1))
            weights = self.choose(solved, learned, zero_shot)
        self.weights.copy_(weights)

    def solve_groups(self, findings: list[int], centres: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """What `solve` gives for findings with prior centres [C, R, P]; one decomposition per Gram matrix."""
        solved = {}
        for group in self.grams.group[findings].unique().tolist():
            same = [c for c in findings if self.grams.group[c] == group]
            count = float(self.grams.count[same[0]])
            found = solve(self.grams.gram[group], self.grams.moment[same], count, centres[same], LAMBDAS)
            solved |= dict(zip(same, zip(*found)))
        return solved

    def choose(self, solved: dict, learned: list[int], otherwise: Tensor) -> Tensor:
        """Weights [C, P] at the best lambda; `otherwise` [C, P] for findings that are not learned."""
        weights = otherwise.clone()
        total = sum(solved[c][0] for c in learned)
        for c in learned:
            evidence, path = solved[c]
            weights[c] = path[(total if self.shared else evidence).argmax()]
        return weights

    def zero_shot(self, bank: PromptBank) -> Tensor:
        """[C, P]: weights that give the zero-shot logit, cos(x, t+) - cos(x, t-)."""
        weights, constant = zero_shot_weights(self.whitening, bank)
        hidden = torch.zeros(len(weights), self.weights.shape[1] - self.dim - 1, dtype=torch.float64)
        return torch.cat([hidden, math.sqrt(self.dim) * weights, constant[:, None]], 1)


def solve(gram: Tensor, moment: Tensor, count: float, centres: Tensor, lambdas: Tensor) -> tuple:
    """Log evidence [K, L] and posterior mean weights [K, L, P] of K findings with the same rows.

    gram [P, P] = F'F, moment [K, P] = F'y, count n, y = 1 or -1, centres [K, R, P] = W, lambdas [L]. Model:
    y ~ N(F w, sigma^2), w ~ N(W'a, sigma^2 / (n lambda)), so y ~ N(U a, sigma^2 C) with U = F W' and
    C = I + FF' / (n lambda); sigma and a are at their maxima (a below 0 becomes 0). The evidence leaves out
    -n/2 (1 + log 2 pi). One eigendecomposition serves every lambda.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    b = moment @ vectors  # [K, P]
    w = centres @ vectors  # [K, R, P]
    precision = count * lambdas[:, None]  # [L, 1]
    inverse = 1 / (values + precision)  # [L, P]
    y_y = count - b.square() @ inverse.T  # y' C^-1 y, [K, L]
    u_y = torch.einsum("krp,kp,lp->klr", w, b, precision * inverse)  # U' C^-1 y
    u_u = torch.einsum("krp,ksp,lp->klrs", w, w, values * precision * inverse)
    ridge = 1e-13 * u_u.diagonal(dim1=2, dim2=3).sum(-1)[..., None, None] + 1e-300  # a centre may be 0
    a = torch.linalg.solve(u_u + ridge * torch.eye(w.shape[1]), u_y).clamp_min(0)  # [K, L, R]
    residual = y_y - 2 * (a * u_y).sum(-1) + torch.einsum("klr,klrs,kls->kl", a, u_u, a)
    log_determinant = torch.log1p(values / precision).sum(1)  # [L]
    evidence = -(count * (residual / count).log() + log_determinant) / 2
    centre = b[:, None] + precision * (a @ w)  # [K, L, P]
    return evidence, (centre * inverse) @ vectors.T
