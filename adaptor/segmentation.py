"""Segmentation on frozen features: the paper's decoders and losses, on 1%, 10% and 100% of the labels."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional

import retune
from adaptor.classification import labelled_rows, table_by_fraction
from adaptor.config import Config
from adaptor.data import load_images, transform_mask
from adaptor.encoders import blank_pixels
from adaptor.figures import draw_overlay
from adaptor.model import FEATURES, Adaptor
from adaptor.pretraining import train_epochs
from retune import DualEncoder, InputError, Radiographs

KEPT = 4000  # images whose tokens stay in memory while nothing augments them


def convolution(inputs: int, outputs: int, size: int, padding: int = 1) -> nn.Conv2d:
    """A convolution with Kaiming's initialisation."""
    layer = nn.Conv2d(inputs, outputs, size, padding=padding)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def block(inputs: int, outputs: int, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs, 3, padding), nn.BatchNorm2d(outputs), nn.ReLU())


class PatchDecoder(nn.Module):
    """Patch tokens [B, T, d] on a square grid -> logits [B, C, size, size]. A first block brings the grid to
    size / 16 (16 x 16 tokens to 14 x 14, without padding), four blocks of `first`, 1/2, 1/4, 1/8 of it
    double the map. Grids that need fewer doublings have only those, and no first block (ours)."""

    def __init__(self, dim: int, first: int, classes: int, grid: int, size: int):
        super().__init__()
        self.grid = grid
        self.size = size
        self.doublings = max(0, min(4, round(math.log2(size / grid))))
        self.start = round(size / 2**self.doublings)
        channels = [dim, *(max(8, first // 2**i) for i in range(4))]
        valid = self.start == grid - 2
        self.first = nn.Identity() if self.start == grid else block(dim, dim, padding=0 if valid else 1)
        self.blocks = nn.ModuleList(block(a, b) for a, b in itertools.pairwise(channels))
        self.last = convolution(channels[-1], classes, 3)

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
    """Adapted image embedding [B, d] and the autoencoder's maps, of 64, 256, 512 and 1,024 channels at 1/2,
    1/4, 1/8 and 1/16 of the side -> logits [B, C, side, side]."""

    def __init__(self, dim: int, classes: int, size: int):
        super().__init__()
        if size not in (224, 448, 896):
            raise InputError(f"--image-size {size}: the U-Net decoder takes 224, 448 or 896")
        doubling = nn.ConvTranspose2d(512, 512, 2, stride=2, bias=False)  # shared by every further one
        self.neck = nn.Sequential(
            nn.ConvTranspose2d(dim, 512, 3, bias=False),
            nn.ConvTranspose2d(512, 512, 3, stride=2, bias=False), *[doubling] * (size // 448),
        )  # fmt: skip
        wide = [512, 512, 256, 128, 64]
        skips = [1024, 512, 256, 64]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in itertools.pairwise(wide))
        stages = (nn.Sequential(block(b + skip, b), block(b, b)) for b, skip in zip(wide[1:], skips))
        self.blocks = nn.ModuleList(stages)
        self.last = nn.Sequential(nn.ConvTranspose2d(64, 32, 2, stride=2), convolution(32, classes, 1, 0))

    def forward(self, embedding: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        x = self.neck(embedding[:, :, None, None])  # 1 -> 3 -> 7 (14, 28) pixels a side
        for up, stage, skip in zip(self.up, self.blocks, reversed(maps)):
            x = stage(torch.cat([up(x), skip], 1))
        return self.last(x)


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


def mask_loss(logits: torch.Tensor, mask: torch.Tensor, kind: str = "log") -> torch.Tensor:
    """The authors' losses of logits and masks [B, C, H, W], smoothing 1. log: 10 focal - log(soft Dice of the
    batch); dice: 1 - soft Dice; squares: 10 focal + sum over images of 1 - (sum pm + 1) / (sum p^2 + m^2 + 1)
    (their modified Dice, in which their p are logits, an oversight: here p is a probability)."""
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    focal = 10 * ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()
    p = logits.sigmoid()
    if kind == "squares":
        ratio = ((p * mask).sum((2, 3)) + 1) / ((p**2 + mask**2).sum((2, 3)) + 1)  # [B, C]
        return focal + (1 - ratio).sum(0).mean()
    soft = (2 * (p * mask).sum((0, 2, 3)) + 1) / ((p + mask).sum((0, 2, 3)) + 1)  # [C]
    return 1 - soft.mean() if kind == "dice" else focal - soft.log().mean()


@torch.no_grad()
def patch_tokens(encoder: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, H] -> patch tokens [B, T, d], without the class and register tokens in front."""
    tower = encoder.image.tower
    features = tower(pixels)["last_hidden_state"]
    if features.ndim == 4:
        channels_last = getattr(getattr(tower, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
        features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    return features[:, features.shape[1] - math.isqrt(features.shape[1]) ** 2 :].float()


class FrozenImages:
    """Frozen features and masks of a data set: tokens [B, T, d] or, for a U-Net, embedding and maps."""

    def __init__(self, encoder: DualEncoder, data: Radiographs, masks: Callable, config: Config, device: str):
        self.encoder = encoder.to(device)
        self.data = data
        self.masks = masks
        self.device = device
        self.unet = "last_stride" in encoder.config["image"]  # the autoencoder's
        blank = blank_pixels(encoder).to(device)
        self.side = blank.shape[-1]
        self.grid = math.isqrt(patch_tokens(encoder, blank).shape[1])
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.grid < 2:
            raise InputError(f"--image-encoder {config.image_encoder}: gives no map of patch tokens")

    def load(self, image: torch.Tensor, row: int, angle: float, scale: float) -> tuple:
        """Image [1 or 3, H, W], turned and scaled -> transformed pixels [3, h, h], masks bool [C, h, h]."""
        mask = torch.from_numpy(self.masks(row, *image.shape[-2:])).byte()
        if scale != 1:
            image, mask = (functional.affine(x, angle, [0, 0], scale, [0.0]) for x in (image, mask))
        pixels = self.encoder.transform(image)
        mask = transform_mask(mask, **self.encoder.config["transform"])
        if not mask.shape[1:] == pixels.shape[1:] == (self.side, self.side):
            raise InputError(f"{self.data.rows[row]}: {tuple(pixels.shape)} is not a square for decoders")
        return pixels, mask.bool()

    def read(self, rows: np.ndarray, augment: bool = False) -> tuple:
        """(tokens [B, T, d] or embeddings [B, d], maps or None, masks float [B, C, h, h]) of image rows.
        augment: half of them turned by up to 10 degrees and scaled by up to 10%."""
        if augment or self.unet or not all(int(row) in self.kept for row in rows):
            draw = torch.rand(3, len(rows)) if augment else torch.ones(3, len(rows))
            chosen = (draw[0] < 0.5).float()
            angles = (chosen * (20 * draw[1] - 10)).tolist()
            scales = (1 + chosen * (0.2 * draw[2] - 0.1)).tolist()
            found = load_images(self.data.images, rows, self.load, rows, angles, scales)
            pixels, masks = (torch.stack(part).to(self.device) for part in zip(*found))
            if self.unet:
                *maps, last = unet_maps(self.encoder.image.tower, pixels)
                return last.mean((2, 3)), maps, masks.float()
            tokens = patch_tokens(self.encoder, pixels)
            if augment or len(self.kept) + len(rows) > KEPT:
                return tokens, None, masks.float()
            self.kept |= {int(row): (tokens[i], masks[i]) for i, row in enumerate(rows)}
        # also the first time: another memory layout would round differently, and a resumed run with it
        tokens, masks = (torch.stack(part) for part in zip(*(self.kept[int(row)] for row in rows)))
        return tokens, None, masks.float()


def training_rows(data: Radiographs, config: Config, repeat: int) -> dict[float, np.ndarray]:
    """Classification's labelled rows, nested, without what --balance and --mask-images leave out."""
    rows = labelled_rows(data, config, repeat)
    train = data.where("train")
    positive = (data.labels[train] == 1).any(1)
    empty = np.random.default_rng(config.seed).permutation(train[~positive])
    left_out = empty[int(positive.sum()) :] if config.balance == "yes" else []
    order = []
    for fraction in sorted(rows):
        new = np.setdiff1d(rows[fraction], [*order, *left_out])
        order += np.random.default_rng(config.seed + repeat).permutation(new).astype(int).tolist()
        rows[fraction] = np.sort(np.array(order[: config.mask_images], int))
        if not order:
            raise InputError(f"--fractions {fraction:g}: no training image is left; give a larger share")
    return rows


@torch.no_grad()
def predict(decoder, model: Adaptor, images: FrozenImages, name: str, rows: np.ndarray) -> tuple:
    """(predicted masks, true masks) of image rows, bool [B, C, H, W], from features as FEATURES name them."""
    x, maps, masks = images.read(rows)
    return decoder.eval()(model.features(x, name), maps) > 0, masks.bool()


def train_decoder(model, images: FrozenImages, name: str, rows: dict, config: Config, seed: int, place: Path):
    """AdamW, cosine to zero over the epochs (the authors': over 100); the best epoch by validation Dice."""
    dim = model.settings["width" if name == "adaptor" else "image_dim"]
    classes = len(images.data.class_names)
    with retune.seeded(seed):
        if images.unet:
            decoder = UNetDecoder(dim, classes, images.side)
        else:
            decoder = PatchDecoder(dim, config.decoder_width, classes, images.grid, images.side)
    parameters = decoder.to(images.device).parameters()
    optimizer = torch.optim.AdamW(parameters, config.mask_lr, weight_decay=config.mask_weight_decay)

    def one_epoch(k: int) -> dict:
        decoder.train()
        factor = (1 + math.cos(math.pi * k / config.mask_epochs)) / 2
        optimizer.param_groups[0]["lr"] = config.mask_lr * factor
        for batch in torch.randperm(len(rows["train"])).split(config.mask_batch):
            x, maps, masks = images.read(rows["train"][batch.numpy()], config.augment == "yes")
            loss = mask_loss(decoder(model.features(x, name), maps), masks, config.mask_loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return {"score": measure_decoder(decoder, model, images, name, rows["val"])[0].mean().item()}

    train_epochs(place, decoder, optimizer, seed, config.mask_epochs, config.patience, one_epoch)
    return decoder


def measure_decoder(decoder, model: Adaptor, images: FrozenImages, name: str, rows: np.ndarray) -> tuple:
    """(Dice [n, C] on the pixels that the encoder sees, whether the finding is there [n, C]) of the rows."""
    parts = np.array_split(rows, math.ceil(len(rows) / 32))
    masks = (predict(decoder, model, images, name, part) for part in parts)
    found = [(dice(guess, truth).cpu(), truth.flatten(2).any(-1).cpu()) for guess, truth in masks]
    return tuple(map(torch.cat, zip(*found)))


def segment(model: Adaptor, encoder, data: Radiographs, masks, config: Config, device: str) -> list[dict]:
    """Test Dice of decoders on adapted and bare features, per labelled share and repeat; overlay.png."""
    file = config.folder / "segmentation.json"
    results = retune.read_json(file) if file.exists() else []
    jobs = [(r, f, name) for r in range(config.repeats) for f in config.fractions for name in FEATURES]
    images = FrozenImages(encoder, data, masks, config, device)
    random = np.random.default_rng(config.seed)
    most = config.mask_images and max(1, config.mask_images // 4)
    rows = {split: np.sort(random.permutation(data.where(split))[:most]) for split in ("val", "test")}
    retune.log(f"segmentation: {images.grid**2} tokens an image; {len(rows['test']):,} test images")
    for repeat, fraction, name in jobs[len(results) :]:
        rows["train"] = training_rows(data, config, repeat)[fraction]
        place = config.folder / "segmentation" / f"{name.split()[0]}-{fraction:g}-{repeat}"
        decoder = train_decoder(model, images, name, rows, config, config.seed + repeat, place)
        scores, present = measure_decoder(decoder, model, images, name, rows["test"])
        there = torch.where(present, scores, torch.nan)  # Dice where the finding is
        columns = [column.tolist() for column in (present.sum(0), scores.mean(0), there.nanmean(0))]
        results.append({"fraction": fraction, "repeat": repeat, "features": name, "n": len(rows["train"]),
                        "dice": scores.mean().item(), "dice, with it": there.nanmean().item(),
                        "findings": list(map(list, zip(data.class_names, *columns)))})  # fmt: skip
        if name == "adaptor" and repeat == 0 and fraction == max(config.fractions):
            picked = rows["test"][np.argsort(-(data.labels[rows["test"]] == 1).sum(1), kind="stable")[:4]]
            guess, truth = predict(decoder, model, images, name, picked)
            draw_overlay(config.folder / "overlay.png", encoder, data, picked, truth.cpu(), guess.cpu())
        retune.write_json(file, results)
    return retune.read_json(file)


def segmentation_table(results: Sequence[dict]) -> str:
    """Mean test Dice per labelled share, over all images and those with the finding; then per finding."""
    titles = {"dice": "test Dice, all images", "dice, with it": "test Dice, where present"}
    tables = [table_by_fraction(title, results, key) for key, title in titles.items()]
    largest = [r for r in results if r["fraction"] == max(r["fraction"] for r in results)]
    kinds = [[r["findings"] for r in largest if r["features"] == kind] for kind in FEATURES]
    rows = []
    for c, (name, count, *_) in enumerate(kinds[0][0]):
        means = [np.array([found[c][2:] for found in kind], float).mean(0) for kind in kinds]
        rows.append([name, count, *(float(mean[key]) for key in (0, 1) for mean in means)])
    header = ["test Dice, all labels", "with it", *FEATURES, *(f"{kind}, with it" for kind in FEATURES)]
    return "\n\n".join([*tables, retune.markdown_table(header, rows)])
