"""Segmentation on frozen patch tokens, the second downstream task of `adaptor.py`.

Masks (phantoms, SIIM's run-lengths, RSNA's boxes), the decoder, Dice, training, pictures. A mask follows its
image through the encoder's resize and crop: Dice is measured on the pixels that the encoder sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.unimodal import Side, blank_pixels, embed, train_epochs
from retune import DualEncoder, InputError, Radiographs, read_rows, say

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")

# ------------------------------------------------------------------------------------------------------ Masks


def rle_to_mask(text: str, height: int, width: int, row: str = "") -> np.ndarray:
    """SIIM's run-lengths -> bool [height, width]; "-1" or "" is an empty mask.

    Pairs "gap length", each gap counted from the end of the run before; pixels are numbered down the columns.
    InputError when the runs are no such pairs or leave the image.
    """
    mask = np.zeros(height * width, bool)
    if text in ("", "-1"):
        return mask.reshape(height, width)
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError:
        numbers = [-1]
    if len(numbers) % 2 or min(numbers) < 0:
        raise InputError(
            f"{row}: run-lengths must be pairs of numbers that are not negative, not {text[:40]!r}"
        )
    if sum(numbers) > mask.size:
        raise InputError(
            f"{row}: runs end at pixel {sum(numbers):,} of a {height} x {width} image: another size's mask"
        )
    end = 0
    for gap, length in zip(numbers[::2], numbers[1::2]):
        mask[end + gap : end + gap + length] = True
        end += gap + length
    return mask.reshape(width, height).T


def box_to_mask(box: Sequence[str], height: int, width: int, row: str = "") -> np.ndarray:
    """RSNA's x, y, width, height in pixels -> bool [height, width]; four blanks are an empty mask."""
    mask = np.zeros((height, width), bool)
    if not any(box):
        return mask
    try:
        x, y, w, h = (float(value) for value in box)
    except ValueError:
        raise InputError(f"{row}: box {', '.join(box)} is not four numbers") from None
    if not (0 <= x and 0 <= y and w > 0 and h > 0 and x + w <= width and y + h <= height):
        raise InputError(
            f"{row}: box {', '.join(box)} leaves the {height} x {width} image: another size's mask"
        )
    mask[round(y) : round(y + h), round(x) : round(x + w)] = True
    return mask


def read_masked_table(config) -> tuple[Path, dict[str, list[str]], str, str]:
    """(file, table, column of image ids, finding) of SIIM or RSNA."""
    root = Path(config.data_dir or "")
    if config.data_dir is None or not root.is_dir():
        raise InputError(f"--data {config.data} needs its folder; --data-dir {config.data_dir} is none")
    pattern = {"siim": "*rle*.csv", "rsna": "*train_labels*.csv"}[config.data]
    path = Path(config.labels_csv) if config.labels_csv else retune.one_file(root, [pattern])
    if config.data == "siim":
        return path, retune.read_table(path, ["ImageId", "EncodedPixels"]), "ImageId", "Pneumothorax"
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    return path, retune.read_table(path, columns), "patientId", "Pneumonia"


def load_masked(config) -> Radiographs:
    """SIIM-ACR pneumothorax or RSNA pneumonia: images anywhere under --data-dir, one finding, no reports.

    The files name no split: 70/10/20% of patients by hash. SIIM names no patient: each image counts as one.
    """
    path, table, column, finding = read_masked_table(config)
    files = {f.stem: f for f in sorted(Path(config.data_dir).rglob("*")) if f.suffix.lower() in SUFFIXES}
    ids, positive, rows = list(dict.fromkeys(table[column])), {}, {}
    for i, name in enumerate(table[column]):
        rows.setdefault(name, f"{path} row {i + 2}")
        found = (
            table["Target"][i] == "1"
            if config.data == "rsna"
            else table["EncodedPixels"][i] not in ("", "-1")
        )
        positive[name] = positive.get(name, False) or found
    for name in ids:
        if name not in files:
            raise InputError(
                f"{rows[name]}: no image {name}{'|'.join(SUFFIXES)} anywhere under {config.data_dir}"
            )
    labels = np.array([[positive[name]] for name in ids], np.float32)
    split = retune.patient_split(ids, retune.SHARES)
    for part in retune.SHARES:
        if part not in split:
            raise InputError(f"{path}: the {part} split is empty; give more images")
    note = "; each image counts as a patient of its own" if config.data == "siim" else ""
    images, rows = [files[name] for name in ids], [rows[name] for name in ids]
    return Radiographs(images, labels, (finding,), ids, split, ids, rows,
                       note=f"{config.data}: no official split: 70/10/20% by hash{note}")  # fmt: skip


def find_masks(config, data: Radiographs) -> Callable[[int], np.ndarray] | None:
    """Image row -> its masks, bool [C, H, W] in the image's own pixels; None for data without masks."""
    if config.data == "demo":
        phantoms = data.images.phantoms
        columns = [phantoms.class_names.index(name) for name in data.class_names]
        return lambda row: phantoms.masks(int(row))[columns]
    if config.data not in ("siim", "rsna"):
        return None
    path, table, column, _ = read_masked_table(config)
    lines: dict[str, list[int]] = {}
    for i, name in enumerate(table[column]):
        lines.setdefault(name, []).append(i)

    def masks(row: int) -> np.ndarray:
        height, width = retune.read_image(data.images[row]).shape[-2:]
        union = np.zeros((height, width), bool)
        for i in lines[data.names[row]]:
            where = f"{path} row {i + 2}"
            if config.data == "siim":
                union |= rle_to_mask(table["EncodedPixels"][i], height, width, where)
            else:
                box = [table[key][i] for key in ("x", "y", "width", "height")]
                union |= box_to_mask(box, height, width, where)
        return union[None]

    return masks


def transform_mask(mask: np.ndarray, resize, crop, **_) -> torch.Tensor:
    """Masks [C, H, W] through the encoder's resize and crop, nearest neighbour: bool [C, h, w]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = [resize] if isinstance(resize, int) else list(resize)
    mask = functional.resize(torch.from_numpy(mask), size, interpolation=InterpolationMode.NEAREST_EXACT)
    return mask if crop is None else functional.center_crop(mask, [crop, crop])


class MaskRows:
    """Masks by image row as bool [C, h, w], each made once and kept as bits."""

    def __init__(self, masks: Callable[[int], np.ndarray], encoder: DualEncoder, classes: int):
        self.masks, self.transform, self.kept = masks, encoder.config["transform"], {}
        self.shape = (classes, *blank_pixels(encoder).shape[-2:])

    def __getitem__(self, row: int) -> torch.Tensor:
        if row not in self.kept:
            mask = transform_mask(self.masks(row), **self.transform)
            if tuple(mask.shape) != self.shape:
                sizes = f"its mask becomes {tuple(mask.shape)}, the encoder sees {self.shape}"
                raise InputError(f"image {row}: {sizes}; crop to a square")
            self.kept[row] = np.packbits(mask.numpy())
        bits = np.unpackbits(self.kept[row], count=math.prod(self.shape))
        return torch.from_numpy(bits.reshape(self.shape).astype(bool))

    def stack(self, rows: np.ndarray) -> torch.Tensor:
        """bool [B, C, h, w]."""
        return torch.stack([self[int(row)] for row in rows])


# ----------------------------------------------------------------------------------------------------- Tokens


class PatchSide(Side):
    """The image tower's patch tokens as rows [T * d] for retune's `embed`; `grid` is (h, w), T = h * w."""

    def __init__(self, encoder: DualEncoder, name: str = ""):
        super().__init__(encoder, "image", 0)
        tokens = self.tokens(blank_pixels(encoder).to(next(encoder.parameters()).device))
        side = math.isqrt(tokens.shape[1])
        if side < 2:
            raise InputError(f"--image-encoder {name}: gives no map of patch tokens; segmentation needs one")
        self.grid, self.dim = (side, side), side * side * tokens.shape[2]

    @torch.inference_mode()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, H] -> patch tokens [B, T, d], without the class and register tokens in front."""
        features = self.encoder.image.tower(pixels)["last_hidden_state"]
        if features.ndim == 4:
            return features.flatten(2).transpose(1, 2).float()
        return features[:, features.shape[1] - math.isqrt(features.shape[1]) ** 2 :].float()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tokens(pixels).flatten(1)


def build_decoder(dim: int, first: int, classes: int) -> nn.ModuleList:
    """Four blocks of `first`, 1/2, 1/4, 1/8 of it channels (authors: 512-256-128-64), then the logits."""
    channels = [dim, *(max(8, first // 2**i) for i in range(4))]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(channels)
    ]
    last = nn.Conv2d(channels[-1], classes, 1)
    nn.init.constant_(last.bias, -4.0)  # (ours) most pixels of most images are empty: start there
    return nn.ModuleList([*blocks, last])


def decode(
    decoder: nn.ModuleList, tokens: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """Tokens [B, T, P] -> logits [B, C, H, W]; blocks double the map until it reaches the mask's size."""
    x = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    for block in decoder[:-1]:
        x = block(x)
        if x.shape[-1] < size[-1]:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return F.interpolate(decoder[-1](x), size, mode="bilinear")


# ------------------------------------------------------------------------------------------------------- Dice


def dice(prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """2 |P and M| / (|P| + |M|) of bool [..., H, W] -> [...]; two empty masks count 1."""
    total = prediction.sum((-2, -1)) + mask.sum((-2, -1))
    overlap = (prediction & mask).sum((-2, -1))
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp_min(1))


def mask_loss(
    logits: torch.Tensor, mask: torch.Tensor, alpha: float = 10.0, gamma: float = 2.0
) -> torch.Tensor:
    """alpha * focal - log(soft Dice), per finding over the batch; both [B, C, H, W].

    The facts name no alpha and gamma; these are ours.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    focal = ((1 - torch.exp(-entropy)) ** gamma * entropy).mean()
    p = logits.sigmoid()
    soft = (2 * (p * mask).sum((0, 2, 3)) + 1) / ((p + mask).sum((0, 2, 3)) + 1)
    return alpha * focal - soft.log().mean()


# --------------------------------------------------------------------------------------------------- Training


def segment(
    model: nn.Module, encoder: DualEncoder, data: Radiographs, masks: Callable, config, device: str
) -> list[dict]:
    """Train decoders on adapted and on bare patch tokens, frozen; test Dice per finding, overlay.png."""
    folder, file = config.folder, config.folder / "segmentation.json"
    if file.exists():
        return retune.read_json(file)
    side, rows = PatchSide(encoder, config.image_encoder), choose_rows(data, config.mask_images, config.seed)
    chosen = np.concatenate([rows["train"], rows["test"]])
    subset = Radiographs(
        [data.images[i] for i in chosen], data.labels[chosen], data.class_names, data.patients[chosen],
        data.split[chosen], [data.names[i] for i in chosen], [data.rows[i] for i in chosen],
        key=data.key and f"{data.key} rows {chosen.tolist()}",
    )  # fmt: skip
    train, test = np.split(np.arange(len(chosen)), [len(rows["train"])])
    say(f"segmentation: {len(train):,} training, {len(test):,} test images, {side.grid} tokens each")
    tokens = embed(side, subset, config, device, store="fp16")
    mask_rows = MaskRows(lambda i: masks(int(chosen[i])), encoder, len(data.class_names))
    found = {}
    for name in ("adaptor", "bare backbone"):

        def features(batch: np.ndarray, name=name) -> torch.Tensor:
            x = read_rows(tokens, torch.from_numpy(batch)).to(device)
            x = x.reshape(len(batch), side.grid[0] ** 2, -1)  # [B, T, d]
            with torch.no_grad():
                return model.alone("image", x) if name == "adaptor" else model.centre("image", x)

        place = folder / f"segmentation-{name.split()[0]}"
        decoder = fit_decoder(features, mask_rows, train, side.grid, config, place, device)
        found[name] = predict_masks(decoder, features, mask_rows, test, side.grid)
    truth = mask_rows.stack(test)
    draw_overlay(folder / "overlay.png", data, chosen, test, truth, found["adaptor"], encoder)
    columns = [("mean", slice(None)), *zip(data.class_names, range(len(data.class_names)))]
    result = [dice_row(finding, found, truth, column) for finding, column in columns]
    retune.write_json(file, result)
    return retune.read_json(file)


def choose_rows(data: Radiographs, most: int | None, seed: int) -> dict[str, np.ndarray]:
    """Training and test rows, at most `most` together in the data's own proportion, drawn by seed."""
    rows = {split: data.where(split) for split in ("train", "test")}
    share = min(1.0, (most or math.inf) / sum(map(len, rows.values())))
    draw = np.random.default_rng(seed)
    return {k: np.sort(draw.permutation(r)[: max(1, round(share * len(r)))]) for k, r in rows.items()}


def fit_decoder(
    features, masks: MaskRows, rows: np.ndarray, grid, config, folder: Path, device: str
) -> nn.ModuleList:
    """AdamW 5e-4, weight decay 1e-4, batches of 32, cosine to zero (ours)."""
    with retune.seeded(config.seed):
        decoder = build_decoder(features(rows[:1]).shape[-1], config.decoder_width, masks.shape[0]).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-4, weight_decay=1e-4)
    per_epoch = math.ceil(len(rows) / 32)

    def one_epoch(k: int) -> dict:
        decoder.train()
        losses = []
        for i, batch in enumerate(torch.randperm(len(rows)).split(32)):
            done = (k * per_epoch + i) / (config.mask_epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * done)) / 2
            logits = decode(decoder, features(rows[batch.numpy()]), grid, masks.shape[1:])
            loss = mask_loss(logits, masks.stack(rows[batch.numpy()]).float().to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"loss": float(np.mean(losses))}

    train_epochs(folder, decoder, optimizer, config.mask_epochs, config.seed, one_epoch)
    return decoder


@torch.no_grad()
def predict_masks(decoder, features, masks: MaskRows, rows: np.ndarray, grid) -> torch.Tensor:
    """bool [n, C, H, W] of the given rows."""
    decoder.eval()
    parts = np.array_split(rows, math.ceil(len(rows) / 32))
    return torch.cat([decode(decoder, features(part), grid, masks.shape[1:]).cpu() > 0 for part in parts])


def dice_row(name: str, found: dict[str, torch.Tensor], truth: torch.Tensor, column) -> dict:
    """A line of the table: Dice over all test images (empty-mask rule), and over those with the finding."""
    truth, row = truth[:, column], {"finding": name, "images": len(truth)}
    present = truth.flatten(-2).any(-1)
    row["with it"] = int(present.sum()) if present.ndim == 1 else int(present.any(1).sum())
    scores = {k: dice(v[:, column], truth) for k, v in found.items()}
    row |= {k: v.mean().item() for k, v in scores.items()}
    return row | {
        f"{k}, with it": v[present].mean().item() if present.any() else math.nan for k, v in scores.items()
    }


def segmentation_table(results: Sequence[dict]) -> str:
    """Test Dice per finding: over all images (1 for an empty mask found empty), and where it is present."""
    header = ["segmentation, test Dice", "images", "with it", "adaptor", "bare", "adaptor, where present",
              "bare, where present"]  # fmt: skip
    return retune.markdown_table(header, [list(row.values()) for row in results])


def draw_overlay(path: Path, data, chosen, test, truth, predicted, encoder, images: int = 4) -> None:
    """A few test images, true outlines above predicted ones, a colour per finding."""
    from matplotlib.figure import Figure

    present = truth.flatten(-2).any(-1).sum(1)
    picked = torch.argsort(present, descending=True, stable=True)[:images].tolist()
    figure = Figure(figsize=(2.6 * len(picked), 5.8), layout="constrained")
    axes = figure.subplots(2, len(picked), squeeze=False)
    colours = [f"C{c}" for c in range(len(data.class_names))]
    for column, i in enumerate(picked):
        image = data.images[chosen[test[i]]]
        image = (
            retune.read_image(image) if isinstance(image, Path) else torch.from_numpy(np.array(image))[None]
        )
        grey = encoder.transform(image)[0].numpy()
        for line, (masks, title) in enumerate(((truth[i], "true"), (predicted[i], "predicted"))):
            axes[line, column].imshow(grey, cmap="gray")
            for mask, colour in zip(masks, colours):
                if mask.any():
                    axes[line, column].contour(mask.numpy(), levels=[0.5], colors=colour, linewidths=1.2)
            axes[line, column].set_title(f"{title}: {data.names[chosen[test[i]]]}", fontsize=8)
            axes[line, column].axis("off")
    handles = [figure.axes[0].plot([], [], color=c, label=n)[0] for c, n in zip(colours, data.class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
