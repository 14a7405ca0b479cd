"""Segmentation on frozen patch tokens: 1%, 10% and 100% of the labels, Dice on the pixels that the encoder sees."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.classification import FEATURES, labelled_rows, table_by_fraction
from adaptor.config import Config
from adaptor.data import load_images, transform_mask
from adaptor.decoders import PatchDecoder, UNetDecoder, dice, mask_loss, unet_maps
from adaptor.encoders import blank_pixels
from adaptor.model import Adaptor
from adaptor.pretraining import train_epochs
from retune import DualEncoder, InputError, Radiographs

KEPT = 4000  # images whose tokens stay in memory while nothing augments them


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
    """Frozen features and masks of a data set's images: tokens [B, T, d], or for a U-Net embedding and maps."""

    def __init__(self, encoder: DualEncoder, data: Radiographs, masks: Callable, config: Config, device: str):
        self.encoder, self.data, self.masks, self.config, self.device = encoder, data, masks, config, device
        self.side = blank_pixels(encoder).shape[-1]
        tokens = patch_tokens(encoder, blank_pixels(encoder).to(device))
        self.grid, self.kept = math.isqrt(tokens.shape[1]), {}
        if self.grid < 2:
            raise InputError(
                f"--image-encoder {config.image_encoder}: gives no map of patch tokens to segment"
            )

    def load(self, image: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image [1 or 3, H, W] -> transformed pixels [3, h, h], masks bool [C, h, h]."""
        pixels = self.encoder.transform(image)
        mask = transform_mask(self.masks(row, *image.shape[-2:]), **self.encoder.config["transform"])
        if not mask.shape[1:] == pixels.shape[1:] == (self.side, self.side):
            sizes = f"the image becomes {tuple(pixels.shape[1:])}, its mask {tuple(mask.shape[1:])}"
            raise InputError(f"{self.data.rows[row]}: {sizes}, the encoder sees a square of {self.side}")
        return pixels, mask

    def read(self, rows: np.ndarray, augment: bool = False) -> tuple:
        """(tokens [B, T, d] or embeddings [B, d], maps or None, masks float [B, C, h, h]) of image rows."""
        if augment or self.config.decoder == "unet" or not all(int(row) in self.kept for row in rows):
            found = load_images(self.data.images, rows, self.load, rows)
            pixels, masks = (torch.stack(part).to(self.device) for part in zip(*found))
            if augment:
                pixels, masks = turn_and_scale(pixels, masks, self.encoder.config["transform"])
            if self.config.decoder == "unet":
                *maps, last = unet_maps(self.encoder.image.tower, pixels)
                return last.mean((2, 3)), maps, masks.float()
            tokens = patch_tokens(self.encoder, pixels)
            if augment or len(self.kept) + len(rows) > KEPT:
                return tokens, None, masks.float()
            self.kept |= {int(row): (tokens[i], masks[i]) for i, row in enumerate(rows)}
        tokens, masks = (torch.stack(part) for part in zip(*(self.kept[int(row)] for row in rows)))
        return tokens, None, masks.float()


def turn_and_scale(pixels: torch.Tensor, masks: torch.Tensor, transform: dict) -> tuple:
    """Half of the images turned by up to 10 degrees and scaled by up to 10%, with their masks; black around."""
    chosen = (torch.rand(len(pixels)) < 0.5).float()
    angle = chosen * (2 * torch.rand(len(pixels)) - 1) * math.radians(10)
    scale = 1 + chosen * (2 * torch.rand(len(pixels)) - 1) * 0.1
    cosine, sine, zero = torch.cos(angle) / scale, torch.sin(angle) / scale, torch.zeros(len(pixels))
    theta = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    mean, std = (torch.tensor(transform[key]).to(pixels).view(1, -1, 1, 1) for key in ("mean", "std"))
    turned = F.grid_sample(pixels + mean / std, grid, align_corners=False) - mean / std
    return turned, F.grid_sample(masks.float(), grid, mode="nearest", align_corners=False)


def training_rows(data: Radiographs, config: Config, repeat: int) -> dict[float, np.ndarray]:
    """The labelled training rows of each fraction, nested: classification's.

    --balance leaves out empty images beyond the number of others (the authors', for SIIM); --mask-images leaves
    images out of the larger shares.
    """
    rows = labelled_rows(data, config, repeat)
    train, order = data.where("train"), []
    positive = (data.labels[train] == 1).any(1)
    empty = np.random.default_rng(config.seed).permutation(train[~positive])
    left_out = empty[int(positive.sum()) :] if config.balance == "yes" else []
    for fraction in sorted(rows):
        new = np.setdiff1d(rows[fraction], [*order, *left_out])
        order += np.random.default_rng(config.seed + repeat).permutation(new).astype(int).tolist()
        rows[fraction] = np.sort(np.array(order[: config.mask_images], int))
        if not order:
            raise InputError(f"--fractions {fraction:g}: no training image is left; give a larger share")
    return rows


def build_decoder(dim: int, images: FrozenImages, config: Config) -> nn.Module:
    """The decoder that the settings name, for features of `dim`."""
    classes = len(images.data.class_names)
    if config.decoder == "unet":
        return UNetDecoder(dim, classes, images.side)
    return PatchDecoder(dim, config.decoder_width, classes, images.grid, images.side)


def train_decoder(model, images: FrozenImages, name: str, rows: dict, config: Config, seed: int, place: Path):
    """AdamW, cosine to zero over the epochs (the authors': over 100); the best epoch by validation Dice."""
    dim = model.settings["width" if name == "adaptor" else "image_dim"]
    with retune.seeded(seed):
        decoder = build_decoder(dim, images, config).to(images.device)
    optimizer = torch.optim.AdamW(decoder.parameters(), config.mask_lr, weight_decay=config.mask_weight_decay)

    def one_epoch(k: int) -> dict:
        decoder.train()
        optimizer.param_groups[0]["lr"] = (
            config.mask_lr * (1 + math.cos(math.pi * k / config.mask_epochs)) / 2
        )
        losses = []
        for batch in torch.randperm(len(rows["train"])).split(config.mask_batch):
            x, maps, masks = images.read(rows["train"][batch.numpy()], config.augment == "yes")
            loss = mask_loss(decoder(adapt(model, x, name), maps), masks, config.mask_loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        score = measure_decoder(decoder, model, images, name, rows["val"])[0].mean().item()
        return {"loss": float(np.mean(losses)), "score": score}

    train_epochs(place, decoder, optimizer, seed, config.mask_epochs, config.patience, one_epoch)
    return decoder.eval()


@torch.no_grad()
def adapt(model: Adaptor, x: torch.Tensor, name: str) -> torch.Tensor:
    """Frozen tokens [B, T, d], or embeddings [B, d], as FEATURES name them."""
    return model.features(x) if name == "adaptor" else model.centre("image", x)


@torch.no_grad()
def measure_decoder(decoder, model, images: FrozenImages, name: str, rows: np.ndarray) -> tuple:
    """(Dice [n, C], whether the finding is there [n, C]) of the given rows."""
    decoder.eval()
    scores, present = [], []
    for batch in np.array_split(rows, math.ceil(len(rows) / 32)):
        x, maps, masks = images.read(batch)
        scores.append(dice(decoder(adapt(model, x, name), maps) > 0, masks.bool()).cpu())
        present.append(masks.flatten(2).any(-1).cpu())
    return torch.cat(scores), torch.cat(present)


def segment(
    model: Adaptor, encoder, data: Radiographs, masks, config: Config, device: str, draw: Callable
) -> list:
    """Train decoders on adapted and on bare frozen features for each labelled share and repeat; test Dice.

    draw(model, images, decoder, test rows) makes a picture with the first decoder of the largest share.
    """
    file = config.folder / "segmentation.json"
    results = retune.read_json(file) if file.exists() else []
    jobs = [(r, f, name) for r in range(config.repeats) for f in config.fractions for name in FEATURES]
    if len(results) == len(jobs):
        return results
    images, random = (
        FrozenImages(encoder.to(device), data, masks, config, device),
        np.random.default_rng(config.seed),
    )
    most = config.mask_images and max(1, config.mask_images // 4)
    rows = {split: np.sort(random.permutation(data.where(split))[:most]) for split in ("val", "test")}
    retune.log(
        f"segmentation: {images.grid} x {images.grid} tokens an image; {len(rows['test']):,} test images"
    )
    for repeat, fraction, name in jobs[len(results) :]:
        rows["train"] = training_rows(data, config, repeat)[fraction]
        place = config.folder / "segmentation" / f"{name.split()[0]}-{fraction:g}-{repeat}"
        decoder = train_decoder(model, images, name, rows, config, config.seed + repeat, place)
        scores, present = measure_decoder(decoder, model, images, name, rows["test"])
        known = {"fraction": fraction, "repeat": repeat, "features": name, "n": len(rows["train"])}
        results.append(known | summarise(scores, present, data.class_names))
        if name == "adaptor" and repeat == 0 and fraction == max(config.fractions):
            draw(model, images, decoder, rows["test"])
        retune.write_json(file, results)
    return retune.read_json(file)


def summarise(scores: torch.Tensor, present: torch.Tensor, names: Sequence[str]) -> dict:
    """Dice [n, C] -> means over all images (1 for an empty mask found empty), and over those with the finding."""
    there = torch.where(present, scores, torch.nan)
    findings = {name: {"with it": int(present[:, c].sum()), "dice": scores[:, c].mean().item(),
                       "dice, with it": there[:, c].nanmean().item()} for c, name in enumerate(names)}  # fmt: skip
    return {"images": len(scores), "dice": scores.mean().item(), "dice, with it": there.nanmean().item(),
            "findings": findings}  # fmt: skip


def segmentation_table(results: Sequence[dict]) -> str:
    """Mean test Dice per labelled share, over all images and where the finding is present; then per finding."""
    titles = {"dice": "all images", "dice, with it": "where present"}
    tables = [
        table_by_fraction(f"segmentation, test Dice, {title}", results, key) for key, title in titles.items()
    ]
    largest = [r for r in results if r["fraction"] == max(r["fraction"] for r in results)]
    rows = []
    for name, found in largest[0]["findings"].items():
        values = [[r["findings"][name][key] for r in largest if r["features"] == kind]
                  for key in titles for kind in FEATURES]  # fmt: skip
        rows.append(
            [name, largest[0]["images"], found["with it"], *(np.mean(np.array(v, float)) for v in values)]
        )
    header = [
        "test Dice, all labels",
        "images",
        "with it",
        *FEATURES,
        *(f"{kind}, with it" for kind in FEATURES),
    ]
    return "\n\n".join([*tables, retune.markdown_table(header, rows)])
