"""Where the encoder looks (ours): `retune.py --predict IMAGE --run FOLDER --heatmap DIR` (docs/deploy.md).

The similarity of each patch, or position of the last map, with a finding's positive prompts minus that with
its negative ones, before and after the adaptors, over the image that the encoder saw. It needs a tower whose
positions go through its embedding's head; it shows what the score is made of, not why a finding is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import retune
from experiments.figures import new_figure


@torch.inference_mode()
def embed_positions(encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels [B,3,H,W] -> embeddings [B,T,D] of positions, after the CLS token if there is one, and (h, w).

    InputError for towers that pool by more than a choice or a mean, or whose last map is not available.
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
def similarity_maps(encoder, model, bank, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """cos+ - cos- of pixels [3,H,W] at each position, before and after the adaptors: [C,h,w] each."""
    positions, size = embed_positions(encoder, pixels[None])
    x = positions[0, -size[0] * size[1] :]  # [h*w,D]
    before = retune.RETune(encoder.dim, adapt="none", pool=model.pool).logits(x, bank)
    after = model.logits(model.whitening(x), bank) / model.logit_scale
    maps = {"before: frozen encoder": before, "after: adaptors": after}
    return {title: values.T.unflatten(1, size) for title, values in maps.items()}


def draw(images: Sequence[str], run: Path, folder: Path, config) -> None:
    """A PNG per image in `folder`: the image, and the maps of every finding before and after the adaptors.

    A column per finding; red is for the finding, blue against it; each row has its own scale.
    """
    encoder, model, bank, known = retune.load_predictor(run, config)
    if not isinstance(model, retune.RETune):
        raise retune.InputError(f"--heatmap: {type(model).__name__} compares no image with prompts")
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(retune.progress(images, desc="drawing", unit="image")):
        pixels = encoder.transform(retune.read_image(image))
        maps = similarity_maps(encoder, model, bank, pixels)
        grey = pixels.mean(0).numpy()
        path = folder / f"{i:04d}-{Path(image).stem}.png"
        with new_figure(path, len(known["classes"]) + 1, 2, 1.9, 2.2) as (figure, axes):
            for row, (title, values) in zip(axes.reshape(2, -1), maps.items()):
                limit = values.abs().max().item()
                for axis, name, overlay in zip(row, [title, *known["classes"]], [None, *values.numpy()]):
                    axis.imshow(grey, cmap="gray")
                    axis.set_axis_off()
                    axis.set_title(name, fontsize=9)
                    if overlay is not None:
                        style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.55}
                        extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
                        picture = axis.imshow(overlay, extent=extent, interpolation="bilinear", **style)
                figure.colorbar(picture, ax=row, label="cos+ - cos-")
    print(f"written to {folder}: {len(images)} figures")
