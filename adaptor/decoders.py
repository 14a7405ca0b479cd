"""What segmentation trains: the two decoders of the paper, their losses, and Dice."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


def block(inputs: int, outputs: int, padding: int = 1) -> nn.Sequential:
    """Convolution 3 x 3 with Kaiming's initialisation, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=padding)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class PatchDecoder(nn.Module):
    """Patch tokens [B, T, d] on a square grid -> logits [B, C, size, size]; 10.40 M parameters at width 512.

    A first block at the tokens' width brings the grid to size / 16 (of 16 x 16 tokens its convolution without
    padding makes 14 x 14), four blocks of `first`, 1/2, 1/4, 1/8 of it double the map, a 3 x 3 convolution gives
    the logits. Grids that need fewer doublings have those alone, and no first block (ours).
    """

    def __init__(self, dim: int, first: int, classes: int, grid: int, size: int):
        super().__init__()
        self.grid, self.size = grid, size
        self.doublings = max(0, min(4, round(math.log2(size / grid))))
        self.start = round(size / 2**self.doublings)
        channels = [dim, *(max(8, first // 2**i) for i in range(4))]
        self.first = nn.Identity()
        if self.start != grid:
            self.first = block(dim, dim, padding=0 if self.start == grid - 2 else 1)
        self.blocks = nn.ModuleList(block(a, b) for a, b in itertools.pairwise(channels))
        self.last = nn.Conv2d(channels[-1], classes, 3, padding=1)
        nn.init.kaiming_normal_(self.last.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, tokens: torch.Tensor, maps: list[torch.Tensor] | None = None) -> torch.Tensor:
        x = self.first(tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        if x.shape[-1] != self.start:
            x = F.interpolate(x, (self.start, self.start))
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            x = F.interpolate(x, scale_factor=2) if i < self.doublings else x
        x = self.last(x)
        return x if x.shape[-1] == self.size else F.interpolate(x, (self.size, self.size), mode="bilinear")


class UNetDecoder(nn.Module):
    """The autoencoder's decoder: the adapted image embedding [B, d] and the tower's maps -> logits [B, C, H, W].

    maps: 64, 256, 512 and 1,024 channels at 1/2, 1/4, 1/8 and 1/16 of the side, which is 224 times a power of 2.
    """

    def __init__(self, dim: int, classes: int, size: int):
        super().__init__()
        if size not in (224, 448, 896):
            raise ValueError(f"the U-Net decoder takes images of 224, 448 or 896 pixels, not {size}")
        doubling = nn.ConvTranspose2d(
            512, 512, 2, stride=2, bias=False
        )  # one module for every further doubling
        self.neck = nn.Sequential(
            nn.ConvTranspose2d(dim, 512, 3, bias=False), nn.ConvTranspose2d(512, 512, 3, stride=2, bias=False),
            *[doubling] * (size // 448),
        )  # fmt: skip
        wide, skips = [512, 512, 256, 128, 64], [1024, 512, 256, 64]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in itertools.pairwise(wide))
        self.blocks = nn.ModuleList(
            nn.Sequential(block(b + skip, b), block(b, b)) for b, skip in zip(wide[1:], skips)
        )
        self.last_up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.last = nn.Conv2d(32, classes, 1)
        nn.init.kaiming_normal_(self.last.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, embedding: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        x = self.neck(embedding[:, :, None, None])  # 1 -> 3 -> 7 (14, 28) pixels a side
        for up, stage, skip in zip(self.up, self.blocks, reversed(maps)):
            x = stage(torch.cat([up(x), skip], 1))
        return self.last(self.last_up(x))


@torch.no_grad()
def unet_maps(tower: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Maps of a transformers ResNet before its max-pooling and after each stage, finest first."""
    maps = [tower.embedder.embedder(pixels)]
    x = tower.embedder.pooler(maps[0])
    for stage in tower.encoder.stages:
        x = stage(x)
        maps.append(x)
    return maps


def dice(prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """2 |P and M| / (|P| + |M|) of bool [..., H, W] -> [...]; two empty masks count 1."""
    total = prediction.sum((-2, -1)) + mask.sum((-2, -1))
    overlap = (prediction & mask).sum((-2, -1))
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp_min(1))


def mask_loss(
    logits: torch.Tensor, mask: torch.Tensor, kind: str = "log", alpha: float = 10.0, gamma: float = 2.0
) -> torch.Tensor:
    """The authors' losses of logits and masks, both [B, C, H, W]; smoothing 1, mean over the findings.

    log: alpha * focal - log(soft Dice of the batch); dice: 1 - soft Dice of the batch; squares: alpha * focal +
    sum over the images of 1 - (sum pm + 1) / (sum p^2 + m^2 + 1), their modified Dice, which they give logits
    for p, an oversight: here p is a probability.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    focal = alpha * ((1 - torch.exp(-entropy)) ** gamma * entropy).mean()
    p = logits.sigmoid()
    if kind == "squares":
        ratio = ((p * mask).sum((2, 3)) + 1) / ((p**2 + mask**2).sum((2, 3)) + 1)  # [B, C]
        return focal + (1 - ratio).sum(0).mean()
    soft = (2 * (p * mask).sum((0, 2, 3)) + 1) / ((p + mask).sum((0, 2, 3)) + 1)  # [C]
    return 1 - soft.mean() if kind == "dice" else focal - soft.log().mean()
