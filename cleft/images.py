"""From image files to pixels: Otsu's foreground, augmentation, and the loader of all training loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

import retune
from cleft.config import Config
from retune import DualEncoder, InputError, Radiographs


def otsu_threshold(grey: np.ndarray) -> int:
    """The grey value of a uint8 image with the largest variance between the pixels up to it and above (Otsu 1979)."""
    count = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, mass = count.cumsum(), (count * np.arange(256)).cumsum()  # pixels up to each value, and their sum
    between = (mass[-1] * below - below[-1] * mass) ** 2
    return int(np.argmax(between / np.maximum(below * (below[-1] - below), 1)))


def crop_foreground(image: Tensor) -> Tensor:
    """The smallest rectangle of a uint8 image [1 or 3, H, W] that holds its foreground; all of it if it has none."""
    grey = image.float().mean(0).round().to(torch.uint8).numpy()  # [H, W]
    rows, columns = np.nonzero(grey > otsu_threshold(grey))
    if not len(rows):
        return image
    return image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def plain_transform(encoder: DualEncoder, config: Config) -> Callable[[Tensor], Tensor]:
    """uint8 image [1 or 3, H, W] -> pixels [3, h, w] without chance: foreground, then the encoder's transform."""
    if config.foreground != "on":
        return encoder.transform
    return lambda image: encoder.transform(crop_foreground(image))


def training_transform(encoder: DualEncoder, config: Config) -> Callable[[Tensor], Tensor]:
    """`plain_transform` with the authors' augmentation instead of the central crop, if --augment is on."""
    plain = plain_transform(encoder, config)
    if config.augment != "on":
        return plain
    settings = encoder.config["transform"]
    size = settings["resize"]
    steps = [crop_foreground] if config.foreground == "on" else []
    steps += [
        v2.Resize(
            size if isinstance(size, list) else [size], v2.InterpolationMode(settings["interpolation"])
        ),
        v2.RandomCrop(settings["crop"] or size),
        v2.RandomApply([v2.ColorJitter(0.2, 0.2)], p=0.4),
        v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], p=0.4),
        v2.RandomAffine(10, translate=(0.0625, 0.0625), scale=(0.8, 1.1)),
        v2.RandomHorizontalFlip(),
    ]
    augment = v2.Compose(steps)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    return lambda image: (augment(image) / 255 - mean) / std


class Pixels(torch.utils.data.Dataset):
    """Pixels [3, h, w] of the key (row, draw), or the reason why the image cannot be read.

    `draw` seeds the transform's randomness together with the row: neither workers nor a resumed run change it.
    """

    def __init__(
        self, data: Radiographs, rows: np.ndarray, transform: Callable[[Tensor], Tensor], config: Config
    ):
        self.images, self.rows, self.transform = data.images, data.rows, transform
        if config.data in (
            "demo",
            "pretrain",
        ):  # phantoms take longer to draw than to train on: once is enough
            self.images = {row: data.images[row] for row in rows.tolist()}

    def __getitem__(self, key: tuple[int, int]) -> Tensor | str:
        row, draw = key
        image = self.images[row]
        try:
            pixels = (
                retune.read_image(image)
                if isinstance(image, (str, Path))
                else torch.from_numpy(np.array(image))[None]
            )
        except InputError as error:
            return f"{self.rows[row]}: {error}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((draw * 1_000_003 + row) % 2**63)
            return self.transform(pixels)


def load_pixels(
    dataset: Pixels, batches: Iterable[Sequence[tuple[int, int]]], workers: int
) -> Iterator[Tensor]:
    """Pixels [B, 3, h, w] of each batch of keys; InputError for an image that cannot be read."""
    for items in torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=list, num_workers=workers
    ):
        for item in items:
            if isinstance(item, str):
                raise InputError(item)
        yield torch.stack(items)
