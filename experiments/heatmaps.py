"""Where the encoder looks (ours): `retune.py --predict IMAGE --run FOLDER --heatmap DIR`.

The similarity of each patch, or position of the last map, with a finding's positive prompts minus that with its
negative ones, before and after the adaptors, over the image that the encoder saw. It needs a tower whose positions
go through the same head as its embedding; it shows what the score is made of, not why a finding is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import retune


@torch.inference_mode()
def embed_positions(encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels [B,3,H,W] -> embeddings [B,T,D] of the positions, after the CLS token if there is one, and (h, w).

    InputError for towers that pool by more than a choice or a mean, or whose last map is not to be had.
    """
    image = encoder.image
    pool = getattr(image, "pool", "")  # open_clip's towers have none to name
    by_norm = pool == "pooler" and encoder.config["image"]["model"]["model_type"] == "clip_vision_model"
    if not by_norm and pool not in ("cls", "mean", "none"):
        raise retune.InputError(f"--heatmap: {encoder.config['name']} pools its map by a layer of its own")
    x = image.tower(pixels)["last_hidden_state"]
    if x.ndim == 4:
        x = image.head[:-2](x) if pool == "none" else x  # BioViL's head ends with the mean over the map
        size = tuple(x.shape[2:])
        x = x.flatten(2).mT  # [B,D,h,w] -> [B,T,D]
        return x if pool == "none" else image.head(x), size
    side = int(x.shape[1] ** 0.5)
    return image.head(image.tower.post_layernorm(x) if by_norm else x), (side, side)


@torch.inference_mode()
def similarity_maps(encoder, model, bank, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos+ - cos- of pixels [3,H,W] at each position, before and after the adaptors: [C,h,w] each."""
    if not isinstance(model, retune.RETune):
        raise retune.InputError(f"--heatmap: {type(model).__name__} compares no image with prompts")
    positions, size = embed_positions(encoder, pixels[None])
    x = positions[0, -size[0] * size[1] :]  # [h*w,D]
    before = retune.RETune(encoder.dim, adapt="none", pool=model.pool).logits(x, bank)
    after = model.logits(model.whitening(x), bank) / model.logit_scale
    return before.T.unflatten(1, size), after.T.unflatten(1, size)


def draw(images: Sequence[str], run: Path, folder: Path, config) -> None:
    """A PNG per image in `folder`: the image, and the maps of every finding before and after the adaptors."""
    encoder, model, bank, known = retune.load_predictor(run, config)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(retune.progress(images, desc="drawing", unit="image")):
        pixels = encoder.transform(retune.read_image(image))
        maps = similarity_maps(encoder, model, bank, pixels)
        draw_image(folder / f"{i:04d}-{Path(image).stem}.png", pixels, maps, known["classes"])
    print(f"written to {folder}: {len(images)} figures")


def draw_image(path: Path, pixels: torch.Tensor, maps: tuple, classes: Sequence[str]) -> None:
    """One image's figure: a column per finding; red is for the finding, blue against it."""
    from matplotlib.figure import Figure

    grey = pixels.mean(0).numpy()
    titles = ("before: frozen encoder", "after: adaptors")
    figure = Figure(figsize=(1.9 * (len(classes) + 1), 4.4), layout="constrained")
    grid = figure.subplots(2, len(classes) + 1)
    for row, (title, values) in enumerate(zip(titles, maps)):
        limit = values.abs().max().item()  # one scale for a row: the stages differ
        for column, axes in enumerate(grid[row]):
            axes.imshow(grey, cmap="gray")
            axes.set_axis_off()
            if column:
                extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
                style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.55, "extent": extent}
                picture = axes.imshow(values[column - 1].numpy(), interpolation="bilinear", **style)
                axes.set_title(classes[column - 1], fontsize=9)
            else:
                axes.set_title(title, fontsize=9)
        figure.colorbar(picture, ax=list(grid[row]), label="cos+ - cos-")
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
