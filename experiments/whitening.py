"""Whitening of image embeddings (ours): `--whiten`, and built into `--method distil` and `analytic`."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from retune import gather


class Whitening(nn.Module):
    """x [B, D] -> (x / |x| - mean) matrix: centred and half-whitened, of mean squared length D (ours).

    With the covariance U diag(l) U' of normalised embeddings and q = l + mean(l) the matrix is
    sqrt(D) U q^(-1/2) / sqrt(sum(l / q)). Estimated once, on the first part's training images without labels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.normalize(x, dim=-1) - self.mean.to(x)) @ self.matrix.to(x)

    def estimate(self, embeddings: np.ndarray, rows: np.ndarray) -> None:
        """Take mean and covariance over rows [n] of embeddings [N, D], in float64."""
        total = torch.zeros(len(self.mean), dtype=torch.float64)
        moment = torch.zeros(len(total), len(total), dtype=torch.float64)
        for piece in torch.from_numpy(rows).split(8192):
            x = F.normalize(gather(embeddings, piece, total), dim=-1)
            total += x.sum(0)
            moment += x.T @ x
        mean = total / len(rows)
        values, vectors = torch.linalg.eigh(moment / len(rows) - mean.outer(mean))
        values = values.clamp_min(0)
        softened = (values + values.mean()).clamp_min(1e-12)
        scale = math.sqrt(len(mean) / max(1e-12, float((values / softened).sum())))
        self.mean.copy_(mean)
        self.matrix.copy_(scale * vectors * softened.rsqrt())
