"""Pictures: losses, masks, embeddings before and after, parameters against score. None without matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adaptor.data import read_pixels
from retune import atomic, gather, log

DPI = 110
POINTS = 600  # most images of a t-SNE


def can_draw() -> bool:
    """Whether matplotlib is there; says so when it is not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        log("no figures: pip install matplotlib")
    return found


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    with atomic(path) as partial:
        figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})


def draw_curves(path: Path, history: Sequence[dict]) -> None:
    """Losses and recall at 5 over the epochs."""
    epochs = range(1, len(history) + 1)
    figure = new_figure(8, 3)
    left, right = figure.subplots(1, 2)
    for key, name, style in (("train_loss", "training", "-"), ("loss", "validation", "--")):
        left.plot(epochs, [e[key] for e in history], style, color="black", label=name)
    left.set(xlabel="epoch", ylabel="contrastive loss")
    for key, style in (("image_to_text", "-"), ("text_to_image", "--")):
        recalls = [e[key]["recall_5"] for e in history]
        right.plot(epochs, recalls, style, color="black", label=key.replace("_", " "))
    chance = history[0]["image_to_text"]["chance"]["recall_5"]
    right.axhline(chance, color="grey", linestyle=":", label="chance")
    right.set(xlabel="epoch", ylabel="validation recall at 5", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
    save_figure(figure, path)


@torch.no_grad()
def draw_overlay(path: Path, data, source, decoder, adapt, rows: np.ndarray, images: int = 4) -> None:
    """A few test images, true outlines above predicted ones, a colour per finding; adapt: tokens -> features."""
    picked = rows[np.argsort(-(data.labels[rows] == 1).sum(1), kind="stable")[:images]]
    tokens, maps, masks = next(iter(source.batches([picked])))
    predicted = (decoder(adapt(tokens), maps) > 0).cpu()
    figure = new_figure(2.6 * len(picked), 5.8)
    axes = figure.subplots(2, len(picked), squeeze=False)
    colours = [f"C{c}" for c in range(len(data.class_names))]
    for column, row in enumerate(picked):
        grey = source.images.transform(read_pixels(data.images[row]))[0].numpy()
        for line, (outlines, title) in enumerate(
            ((masks[column].cpu(), "true"), (predicted[column], "predicted"))
        ):
            axes[line, column].imshow(grey, cmap="gray")
            for mask, colour in zip(outlines, colours):
                if mask.any():
                    axes[line, column].contour(mask.numpy(), levels=[0.5], colors=colour, linewidths=1.2)
            axes[line, column].set_title(f"{title}: {data.names[row]}", fontsize=8)
            axes[line, column].axis("off")
    handles = [figure.axes[0].plot([], [], color=c, label=n)[0] for c, n in zip(colours, data.class_names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    save_figure(figure, path)


@torch.no_grad()
def draw_embeddings(path: Path, model, pairs, data, seed: int) -> None:
    """t-SNE of test images before the adaptor, and of images and their texts after it, by the commonest finding."""
    image_rows, _ = pairs.rows["test"]
    chosen = torch.arange(len(image_rows))[:POINTS]
    if len(chosen) < 10:
        return
    images, texts = pairs.read("test", chosen, model.log_scale)
    after_image, after_text = (F.normalize(x, dim=-1).cpu() for x in model(images, texts))
    c = int(np.nansum(data.labels, axis=0).argmax())
    labels = data.labels[image_rows[chosen]][:, c]
    panels = {"images, bare backbone": [gather(pairs.images, image_rows[chosen], model.log_scale).cpu()],
              "images, adaptor": [after_image], "images and texts, adaptor": [after_image, after_text]}  # fmt: skip
    figure = new_figure(11, 3.9)
    for axes, (title, parts) in zip(figure.subplots(1, len(panels)), panels.items()):
        for part, marker in zip(reduce_to_plane(parts, seed), "ox"):
            for value, colour in ((0, "0.65"), (1, "C3")):
                points = part[labels == value]
                axes.scatter(points[:, 0], points[:, 1], s=9, c=colour, marker=marker, linewidths=0.7)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    name = data.class_names[c]
    figure.suptitle(f"t-SNE of {len(chosen)} test images (o) and texts (x); red: {name}", fontsize=10)
    save_figure(figure, path)


def reduce_to_plane(parts: Sequence[torch.Tensor], seed: int) -> list[np.ndarray]:
    """t-SNE of the parts together, cut apart again: [n, 2] each."""
    from sklearn.manifold import TSNE

    together = torch.cat(list(parts)).numpy()
    plane = TSNE(perplexity=min(30, (len(together) - 1) / 3), init="pca", random_state=seed)
    return np.split(plane.fit_transform(together), np.cumsum([len(p) for p in parts])[:-1])


def draw_scores(path: Path, rows: Sequence[dict], label: str) -> None:
    """Trained parameters against score, a point per pair of encoders: {"name", "parameters", "mean", "deviation"}."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        axes.errorbar(row["parameters"] / 1e6, row["mean"], row["deviation"], fmt="o", color=f"C{i}",
                      capsize=3, label=row["name"])  # fmt: skip
    axes.set(xlabel="trained parameters (millions)", ylabel=label)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
