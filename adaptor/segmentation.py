"""Segmentation on frozen patch tokens, the second downstream task: 1%, 10% and 100% of the labels, Dice.

Tokens come from the embedding cache; with augmentation, or for the autoencoder's decoder, which wants the
tower's maps too, the frozen tower runs with every batch, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.classification import FEATURES, labelled_rows, rows_by_fraction
from adaptor.config import Config
from adaptor.data import read_pixels, transform_mask
from adaptor.decoders import PatchDecoder, UNetDecoder, dice, mask_loss, unet_maps
from adaptor.encoders import Side, blank_pixels, embed
from adaptor.model import Adaptor
from adaptor.pretraining import train_epochs
from retune import DualEncoder, InputError, Radiographs, gather, log, markdown_table

EVALUATION_BATCH = 32


class PatchSide(Side):
    """The image tower's patch tokens as rows [T * d] for retune's `embed`; T = grid * grid."""

    def __init__(self, encoder: DualEncoder, name: str = ""):
        super().__init__(encoder, "image", 0)
        tokens = self.tokens(blank_pixels(encoder).to(next(encoder.parameters()).device))
        self.grid, self.width = math.isqrt(tokens.shape[1]), tokens.shape[2]
        if self.grid < 2:
            raise InputError(f"--image-encoder {name}: gives no map of patch tokens; segmentation needs one")
        self.dim = self.grid**2 * self.width

    @torch.inference_mode()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, H] -> patch tokens [B, T, d], without the class and register tokens in front."""
        tower = self.encoder.image.tower
        features = tower(pixels)["last_hidden_state"]
        if features.ndim == 4:
            channels_last = getattr(getattr(tower, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return features[:, features.shape[1] - math.isqrt(features.shape[1]) ** 2 :].float()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tokens(pixels).flatten(1)


class MaskedImages(torch.utils.data.Dataset):
    """(transformed pixels [3, h, w], masks bool [C, h, w]) of an image row."""

    def __init__(self, data: Radiographs, masks: Callable, encoder: DualEncoder):
        self.images, self.masks, self.transform = data.images, masks, encoder.transform
        self.options, self.classes = encoder.config["transform"], len(data.class_names)
        self.side = blank_pixels(encoder).shape[-1]

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = read_pixels(self.images[row])
        mask = transform_mask(self.masks(row, *image.shape[-2:]), **self.options)
        pixels = self.transform(image)
        if not mask.shape[1:] == pixels.shape[1:] == (self.side, self.side):
            sizes = f"the image becomes {tuple(pixels.shape[1:])}, its mask {tuple(mask.shape[1:])}"
            raise InputError(f"image row {row}: {sizes}, the encoder sees a square of {self.side}")
        return pixels, mask


@dataclass
class Source:
    """Frozen features and masks of images, batch by batch. Tokens [n, T * d] are stored, or None: then live."""

    images: MaskedImages
    side: PatchSide
    config: Config
    device: str
    place: dict[int, int]  # image row -> row of tokens and of bits
    tokens: np.ndarray | None = None
    bits: np.ndarray | None = None  # packed masks [n, C * h * w / 8]

    def batches(self, batches: Sequence[np.ndarray], augment: bool = False) -> Iterator[tuple]:
        """(tokens [B, T, d] or embeddings [B, d], maps or None, masks float [B, C, h, w]) of each batch of rows."""
        if self.tokens is not None:
            yield from self.stored(batches)
            return
        loader = torch.utils.data.DataLoader(
            self.images, batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(self.config.workers, len(batches)), generator=torch.Generator(),
        )  # fmt: skip
        for pixels, masks in loader:
            pixels, masks = pixels.to(self.device), masks.to(self.device).float()
            if augment:
                pixels, masks = turn_and_scale(pixels, masks, self.images.options)
            if self.config.decoder == "unet":
                *maps, last = unet_maps(self.side.encoder.image.tower, pixels)
                yield last.mean((2, 3)), maps, masks
            else:
                yield self.side.tokens(pixels), None, masks

    def stored(self, batches: Sequence[np.ndarray]) -> Iterator[tuple]:
        side, like = self.images.side, torch.empty(0, device=self.device)
        for batch in batches:
            rows = [self.place[int(row)] for row in batch]
            tokens = gather(self.tokens, torch.tensor(rows), like).unflatten(1, (-1, self.side.width))
            masks = np.unpackbits(self.bits[rows], axis=1, count=self.images.classes * side**2)
            yield (
                tokens,
                None,
                torch.from_numpy(masks).to(self.device).float().view(len(rows), -1, side, side),
            )


def turn_and_scale(
    pixels: torch.Tensor, masks: torch.Tensor, options: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the images turned by up to 10 degrees and scaled by up to 10%, with their masks; black around."""
    n = len(pixels)
    chosen = (torch.rand(n) < 0.5).float()
    angle = chosen * (2 * torch.rand(n) - 1) * math.radians(10)
    scale = 1 + chosen * (2 * torch.rand(n) - 1) * 0.1
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1)
    grid = F.affine_grid(theta.to(pixels), list(pixels.shape), align_corners=False)
    mean, std = (torch.tensor(options[key]).to(pixels).view(1, -1, 1, 1) for key in ("mean", "std"))
    black = -mean / std
    turned = F.grid_sample(pixels - black, grid, align_corners=False) + black
    return turned, F.grid_sample(masks, grid, mode="nearest", align_corners=False)


# ------------------------------------------------------------------------------------------------------- Rows


def evaluation_rows(data: Radiographs, config: Config) -> dict[str, np.ndarray]:
    """Rows to choose an epoch on and to test on, at most a quarter of --mask-images each, by seed."""
    most = None if config.mask_images is None else max(1, config.mask_images // 4)
    draw = np.random.default_rng(config.seed)
    return {split: np.sort(draw.permutation(data.where(split))[:most]) for split in ("val", "test")}


def balance_empty(rows: np.ndarray, data: Radiographs, seed: int) -> np.ndarray:
    """Training rows with as many empty images as others, drawn by seed (the authors', for SIIM)."""
    positive = (data.labels[rows] == 1).any(1)
    empty = np.random.default_rng(seed).permutation(rows[~positive])[: max(1, int(positive.sum()))]
    return np.sort(np.concatenate([rows[positive], empty]))


def training_rows(data: Radiographs, config: Config, repeat: int) -> dict[float, np.ndarray]:
    """The labelled training rows of each fraction: classification's, balanced if asked for.

    --mask-images leaves images out of the larger shares only, and they stay nested.
    """
    rows = labelled_rows(data, config, repeat)
    if config.balance == "yes":
        kept = balance_empty(data.where("train"), data, config.seed)
        rows = {fraction: np.intersect1d(subset, kept) for fraction, subset in rows.items()}
    order: list[int] = []
    for fraction in sorted(rows):
        new = np.random.default_rng(config.seed + repeat).permutation(np.setdiff1d(rows[fraction], order))
        order += new.tolist()
        rows[fraction] = np.sort(np.array(order[: config.mask_images], int))
        if not len(rows[fraction]):
            raise InputError(f"--fractions {fraction:g}: no training image with a mask; give a larger share")
    return rows


# --------------------------------------------------------------------------------------------------- Training


def open_source(
    encoder: DualEncoder, data: Radiographs, masks: Callable, rows, config: Config, device: str
) -> Source:
    """The frozen features of image rows: stored tokens, or live ones where images are augmented."""
    side, images = PatchSide(encoder, config.image_encoder), MaskedImages(data, masks, encoder)
    place = {int(row): i for i, row in enumerate(rows)}
    source = Source(images, side, config, device, place)
    if config.augment == "yes" or config.decoder == "unet":
        return source
    subset = dataclasses.replace(data.take(rows), key=data.key and f"{data.key} rows {rows.tolist()}")
    source.tokens = embed(side, subset, config, device)
    bar = retune.progress(rows, desc="masks", unit="image")
    source.bits = np.stack([np.packbits(images[int(row)][1].numpy()) for row in bar])
    return source


def adapt(model: Adaptor, tokens: torch.Tensor, name: str) -> torch.Tensor:
    """Frozen tokens [B, T, d], or embeddings [B, d], as FEATURES name them."""
    with torch.no_grad():
        return model.features(tokens) if name == "adaptor" else model.centre("image", tokens)


def build_decoder(dim: int, source: Source, config: Config) -> nn.Module:
    """The decoder that the settings name, for features of `dim` and the source's grid and image size."""
    classes, size = source.images.classes, source.images.side
    if config.decoder == "unet":
        return UNetDecoder(dim, classes, size)
    return PatchDecoder(dim, config.decoder_width, classes, source.side.grid, size)


def train_decoder(
    model: Adaptor, source: Source, name: str, rows: dict, config: Config, seed: int, folder: Path
) -> nn.Module:
    """AdamW, cosine to zero over the epochs (the authors': over 100); the best epoch by validation Dice."""
    dim = model.settings["width"] if name == "adaptor" else model.settings["image_dim"]
    with retune.seeded(seed):
        decoder = build_decoder(dim, source, config).to(source.device)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=config.mask_lr, weight_decay=config.mask_weight_decay
    )

    def one_epoch(k: int) -> dict:
        decoder.train()
        optimizer.param_groups[0]["lr"] = (
            config.mask_lr * (1 + math.cos(math.pi * k / config.mask_epochs)) / 2
        )
        order = rows["train"][torch.randperm(len(rows["train"])).numpy()]
        batches = [order[i : i + config.mask_batch] for i in range(0, len(order), config.mask_batch)]
        losses = []
        for tokens, maps, masks in source.batches(batches, config.augment == "yes"):
            loss = mask_loss(decoder(adapt(model, tokens, name), maps), masks, config.mask_loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        score = measure_decoder(decoder, model, source, name, rows["val"])[0].mean().item()
        return {"loss": float(np.mean(losses)), "score": score}

    train_epochs(folder, decoder, optimizer, seed, config.mask_epochs, config.patience, one_epoch)
    return decoder.eval()


@torch.no_grad()
def measure_decoder(
    decoder, model, source: Source, name: str, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Dice [n, C], whether the finding is there [n, C]) of the given rows."""
    decoder.eval()
    scores, present = [], []
    for tokens, maps, masks in source.batches(np.array_split(rows, math.ceil(len(rows) / EVALUATION_BATCH))):
        predicted = decoder(adapt(model, tokens, name), maps) > 0
        scores.append(dice(predicted, masks.bool()).cpu())
        present.append(masks.flatten(2).any(-1).cpu())
    return torch.cat(scores), torch.cat(present)


def segment(
    model: Adaptor, encoder: DualEncoder, data: Radiographs, masks: Callable, config: Config, device: str,
    draw: Callable,
) -> list[dict]:  # fmt: skip
    """Train decoders on adapted and on bare frozen features for each labelled share and repeat; test Dice.

    draw(source, decoder, model, test rows) makes a picture with the first decoder of the largest share.
    """
    file = config.folder / "segmentation.json"
    results = retune.read_json(file) if file.exists() else []
    jobs = [(repeat, fraction, name) for repeat in range(config.repeats) for fraction in config.fractions
            for name in FEATURES]  # fmt: skip
    if len(results) == len(jobs):
        return results
    rows = evaluation_rows(data, config)
    shares = [training_rows(data, config, repeat) for repeat in range(config.repeats)]
    every = np.unique(np.concatenate([*rows.values(), *(s for share in shares for s in share.values())]))
    source = open_source(encoder.to(device), data, masks, every, config, device)
    log(f"segmentation: {len(every):,} images, {source.side.grid} x {source.side.grid} tokens each")
    for repeat, fraction, name in jobs[len(results) :]:
        chosen = rows | {"train": shares[repeat][fraction]}
        place = config.folder / "segmentation" / f"{name.split()[0]}-{fraction:g}-{repeat}"
        decoder = train_decoder(model, source, name, chosen, config, config.seed + repeat, place)
        scores, present = measure_decoder(decoder, model, source, name, rows["test"])
        results.append({"fraction": fraction, "repeat": repeat, "features": name, "n": len(chosen["train"]),
                        **summarise(scores, present, data.class_names)})  # fmt: skip
        if name == "adaptor" and repeat == 0 and fraction == max(config.fractions):
            draw(source, decoder, model, rows["test"])
        retune.write_json(file, results)
    return retune.read_json(file)


def summarise(scores: torch.Tensor, present: torch.Tensor, names: Sequence[str]) -> dict:
    """Dice [n, C] -> means over all images (1 for an empty mask found empty), and over those with the finding."""
    there = torch.where(present, scores, torch.nan)
    per_finding = {
        name: {"with it": int(present[:, c].sum()), "dice": scores[:, c].mean().item(),
               "dice, with it": there[:, c].nanmean().item()}
        for c, name in enumerate(names)
    }  # fmt: skip
    return {"images": len(scores), "dice": scores.mean().item(), "dice, with it": there.nanmean().item(),
            "findings": per_finding}  # fmt: skip


def segmentation_table(results: Sequence[dict]) -> str:
    """Mean test Dice per labelled share, over all images and where the finding is present; then per finding."""
    tables = []
    for key, title in (("dice", "all images"), ("dice, with it", "where present")):
        flat = [result | {key: math.nan if result[key] is None else result[key]} for result in results]
        header = [f"segmentation, test Dice, {title}", "images", *FEATURES, "difference"]
        tables.append(markdown_table(header, rows_by_fraction(flat, key)))
    largest = [r for r in results if r["fraction"] == max(r["fraction"] for r in results)]
    rows = []
    for name, found in largest[0]["findings"].items():
        cells = [name, largest[0]["images"], found["with it"]]
        for key in ("dice", "dice, with it"):
            for kind in FEATURES:
                values = [r["findings"][name][key] for r in largest if r["features"] == kind]
                cells.append(None if None in values else float(np.mean(values)))
        rows.append(cells)
    header = [
        "test Dice, all labels",
        "images",
        "with it",
        *FEATURES,
        *(f"{kind}, with it" for kind in FEATURES),
    ]
    return "\n\n".join([*tables, markdown_table(header, rows)])
