"""Methods of today that learn from frozen features in one pass, for findings with unknown labels.

    ncm      the mean of a finding's positives and of its negatives (Mensink et al. 2013)
    slda     deep streaming linear discriminant analysis (Hayes & Kanan 2020)
    ranpac   ridge regression on random features (McDonnell et al. 2023)
    l3a      the same with pseudo-labels and weighted images (Zhang et al., ICML 2025)

Each finding is its own two-class problem over the images that label it. Nothing here is trained by gradient.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.common import Grams, LeastSquares, Remembering, read_task, zero_shot_logits
from retune import PromptBank, Task


class NCM(Remembering):
    """Nearest class mean: cos(x, mean of the finding's positives) - cos(x, mean of its negatives).

    The visual twin of positive and negative prompts. A mean of nothing counts as a cosine of 0.
    """

    remembered = ("sums", "count")

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(2, n_classes, dim))  # of negatives, of positives
        self.sums = torch.zeros(2, n_classes, dim, dtype=torch.float64)
        self.count = torch.zeros(2, n_classes, 1, dtype=torch.float64)

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        negative, positive = F.normalize(images, dim=-1) @ F.normalize(self.means, dim=-1).mT  # [B, C] each
        return positive - negative

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        for _, images, known in read_task(self, embeddings, labels, task):
            member = torch.stack([known == 0, known == 1]).double()  # [2, n, C]
            self.sums += member.mT @ images
            self.count += member.sum(1)[..., None]
        self.means.copy_(self.sums / self.count.clamp_min(1))


class SLDA(Remembering):
    """Deep streaming linear discriminant analysis: a Gaussian for each label, one covariance a finding.

    Image by image, in file order: S <- (n S + n / (n + 1) d d') / (n + 1) with d = x - mean of its label so
    far, 0 for the first. The score is the log odds, with the precision pinv((1 - shrinkage) S + shrinkage I);
    0 for labels of one kind. shrinkage: 1e-4 in the authors' code; 1e-5 suits small variances.
    """

    remembered = ("sums", "count", "scatter")

    def __init__(self, dim: int, n_classes: int, shrinkage=1e-5):
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("weights", torch.zeros(n_classes, dim))
        self.register_buffer("bias", torch.zeros(n_classes))
        self.sums = torch.zeros(n_classes, 2, dim, dtype=torch.float64)  # of negatives, of positives
        self.count = torch.zeros(n_classes, 2, dtype=torch.float64)
        self.scatter = torch.zeros(n_classes, dim, dim, dtype=torch.float64)  # n S

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        return images @ self.weights.T + self.bias

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        for _, images, known in read_task(self, embeddings, labels, task):
            for c in task.classes:
                row = ~known[:, c].isnan()
                self.update(c, images[row], known[row, c].long())
        for c in (c for c in task.classes if self.count[c].min() > 0):
            covariance = self.scatter[c] / self.count[c].sum()
            eye = torch.eye(len(covariance), dtype=covariance.dtype)
            softened = (1 - self.shrinkage) * covariance + self.shrinkage * eye
            means = self.sums[c] / self.count[c][:, None]
            weights = means @ torch.linalg.pinv(softened, hermitian=True)  # [2, D]
            self.weights[c] = weights[1] - weights[0]
            constant = self.count[c].log() - (weights * means).sum(1) / 2
            self.bias[c] = constant[1] - constant[0]

    def update(self, c: int, images: Tensor, y: Tensor) -> None:
        """All rows [n, D] with labels [n] at once, equal to one after the other."""
        member = F.one_hot(y, 2).double()  # [n, 2]
        seen = self.count[c] + member.cumsum(0) - member  # [n, 2]: images of either label before this one
        before = (member[:, :, None] * images[:, None]).cumsum(0) - member[:, :, None] * images[:, None]
        index = torch.arange(len(y))
        number = seen[index, y][:, None]
        mean = (self.sums[c, y] + before[index, y]) / number.clamp_min(1)
        difference = torch.where(number > 0, images - mean, 0)  # [n, D]
        total = seen.sum(1)
        self.scatter[c] += difference.T @ (difference * (total / (total + 1))[:, None])
        self.sums[c] += member.T @ images
        self.count[c] += member.sum(0)


class RandomFeatures(LeastSquares):
    """Regression of labels, 1 or 0, on [relu(x W), 1] for a random W; a Gram matrix per pattern of labels.

    ridge: 0, each finding's own, 1e-8 to 1e8, with the lowest squared error on a fifth of the images of the
    last task that labels it, after learning all others seen so far; then the fifth is learned too.
    """

    remembered = ("ridges",)

    def __init__(self, projection: Tensor, n_classes: int, ridge: float, seed: int):
        super().__init__(projection.shape[1] + 1, n_classes)
        self.register_buffer("projection", projection)  # [D, M]
        self.register_buffer("learned", torch.zeros(n_classes, dtype=torch.bool))
        self.ridge = ridge
        self.seed = max(0, seed)
        self.ridges = torch.full((n_classes,), self.ridge or 1.0, dtype=torch.float64)

    def features(self, images: Tensor) -> Tensor:
        """[B, M + 1] of images [B, D], in their dtype."""
        return F.pad((images @ self.projection.to(images)).relu(), (0, 1), value=1.0)

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        """4 (u - 1/2) [B, C] of the regression u, as its sigmoid is near u; 0 for findings without labels."""
        return 4 * (self.features(images) @ self.weights.to(images).T - 0.5) * self.learned

    def complete(self, features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Labels to learn [n, C], from those that a task brings, and weights of its images [n]."""
        return known, known.new_ones(len(known))

    def after_task(self, embeddings: np.ndarray, labels: Tensor, task: Task, bank: PromptBank) -> None:
        held_out = Grams.zeros(self.weights.shape[1], len(self.weights))
        fold = torch.from_numpy(np.random.default_rng(self.seed).random(len(labels)) < 0.2)
        for rows, images, known in read_task(self, embeddings, labels, task):
            features = self.features(images)
            known, weights = self.complete(features, known)
            for part, chosen in ((self.grams, ~fold[rows]), (held_out, fold[rows])):
                part.add(features[chosen], known[chosen], weights[chosen])
        brought = [c for c in task.classes if held_out.count[c]]
        self.ridges[brought] = self.ridge or choose_ridges(self.grams, held_out, brought)
        self.grams.merge(held_out)
        self.learned.copy_(self.grams.count > 0)
        eye = torch.eye(self.weights.shape[1], dtype=torch.float64)
        for c in self.learned.nonzero()[:, 0].tolist():
            gram = self.grams.gram[self.grams.group[c]]
            self.weights[c] = torch.linalg.solve(gram + self.ridges[c] * eye, self.grams.moment[c])


def choose_ridges(training: Grams, held_out: Grams, findings: list[int]) -> Tensor:
    """The ridge of each finding with the lowest squared error on held-out rows, [len(findings)]."""
    ridges = torch.logspace(-8, 8, 17, dtype=torch.float64)
    chosen = torch.ones(len(held_out.count), dtype=torch.float64)
    for group in training.group[findings].unique().tolist():
        values, vectors = torch.linalg.eigh(training.gram[group])
        for c in (c for c in findings if training.group[c] == group):
            scaled = (training.moment[c] @ vectors) / (values.clamp_min(0) + ridges[:, None])
            weights = scaled @ vectors.T  # [L, P]
            gram = held_out.gram[held_out.group[c]]
            error = ((weights @ gram) * weights).sum(1) - 2 * weights @ held_out.moment[c]
            chosen[c] = ridges[error.argmin()]
    return chosen[findings]


class RanPAC(RandomFeatures):
    """Ridge regression on random features, W ~ N(0, 1), without the authors' fine-tuning of the encoder.

    features: 10,000 in the paper. ridge: 0, by the squared error on a fifth of the task's images. For that
    the authors learn its other images alone: ridges too small for all images seen (data-incremental 0.871,
    not 0.913, on the demo, seed 27). zero_shot: 1, findings without labels keep the zero-shot logit (ours).
    """

    def __init__(self, dim: int, n_classes: int, features=2000, ridge=0.0, zero_shot=0, seed=-1):
        projection = torch.randn(dim, features, generator=torch.Generator().manual_seed(max(0, seed)))
        super().__init__(projection, n_classes, ridge, seed)
        self.zero_shot = zero_shot

    def logits(self, images: Tensor, bank: PromptBank | None = None) -> Tensor:
        logits = super().logits(images)
        if not self.zero_shot:
            return logits
        return torch.where(self.learned, logits, zero_shot_logits(self, images, bank))


class L3A(RandomFeatures):
    """Label-augmented analytic adaptation: pseudo-labels for earlier findings, images weighted by rarity.

    Labels of earlier findings that a task does not bring are 1 where the sigmoid of the regression is above
    `threshold`, else 0. An image weighs the mean, over its positive findings, of 1 / sqrt(positives so far),
    scaled to a mean of 1 over the findings; 1 without a positive (undefined in the paper). Findings not yet
    seen stay unknown; the authors count them negative. features: 4,096 in the paper, W uniform within
    1 / sqrt(D) of 0. ridge: the authors' code has 1,000 for COCO; 0, by squared error on a fifth of the task.
    """

    remembered = ("ridges", "positives")

    def __init__(self, dim: int, n_classes: int, features=2000, ridge=0.0, threshold=0.7, seed=-1):
        uniform = torch.rand(dim, features, generator=torch.Generator().manual_seed(max(0, seed)))
        super().__init__((2 * uniform - 1) / dim**0.5, n_classes, ridge, seed)
        self.threshold = threshold
        self.positives = torch.zeros(n_classes, dtype=torch.float64)
        self.rarity = torch.zeros(n_classes, dtype=torch.float64)  # of this task's positives

    def before_task(self, task: Task, labels: Tensor, bank: PromptBank) -> tuple[Task, Tensor]:
        classes = list(task.classes)
        self.positives[classes] += (labels[task.rows][:, classes] == 1).sum(0)
        rarity = torch.where(self.positives > 0, self.positives.rsqrt(), 0)
        seen = int(self.learned.cpu().index_fill(0, torch.tensor(classes), True).sum())
        self.rarity = rarity * seen / rarity.sum().clamp_min(1e-12)
        return task, labels

    def complete(self, features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        pseudo = ((features @ self.weights.to(features).T).sigmoid() > self.threshold).double()
        known = torch.where(known.isnan() & self.learned.cpu(), pseudo, known)
        positive = (known == 1).double()
        number = positive.sum(1)
        return known, torch.where(number > 0, positive @ self.rarity / number.clamp_min(1), 1)
