"""Pictures: masks, embeddings before and after, parameters against score. None without matplotlib."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import retune
from adaptor.data import read_pixels

POINTS = 600  # most images of a t-SNE


def new_figure(width: float, height: float):
    """A figure; None, with a message, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return retune.log("no figures: pip install matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})


def draw_overlay(path: Path, encoder, data, rows: np.ndarray, true, predicted) -> None:
    """Image rows [B] with true outlines above predicted ones, bool [B, C, H, W]; a colour per finding."""
    if (figure := new_figure(2.6 * len(rows), 5.8)) is None:
        return
    axes = figure.subplots(2, len(rows), squeeze=False)
    for line, title, masks in ((0, "true", true), (1, "predicted", predicted)):
        for column, row in enumerate(rows):
            panel = axes[line, column]
            panel.imshow(encoder.transform(read_pixels(data.images[row]))[0].numpy(), cmap="gray")
            for c in masks[column].flatten(1).any(1).nonzero().flatten().tolist():
                panel.contour(masks[column, c].numpy(), levels=[0.5], colors=f"C{c}", linewidths=1.2)
            panel.set_title(f"{title}: {data.names[row]}", fontsize=8)
            panel.axis("off")
    for c, name in enumerate(data.class_names):
        axes[0, 0].plot([], [], color=f"C{c}", label=name)
    figure.legend(loc="outside lower center", ncols=len(data.class_names), fontsize=8, frameon=False)
    save_figure(figure, path)


@torch.no_grad()
def draw_embeddings(path: Path, model, pairs, data, seed: int) -> None:
    """t-SNE of test images before the adaptor, and with their texts after it; red: the commonest finding."""
    from sklearn.manifold import TSNE

    rows = pairs.rows["test"][0][:POINTS]
    if len(rows) < 10 or (figure := new_figure(9, 4)) is None:
        return
    before, texts = pairs.read("test", torch.arange(len(rows)), model.log_scale)
    after = [F.normalize(x, dim=-1) for x in model(before, texts)]
    finding = int(np.nansum(data.labels, axis=0).argmax())
    labels = data.labels[rows][:, finding]
    panels = zip(figure.subplots(1, 2), (("bare backbone", [before]), ("adaptor, with the texts", after)))
    for axes, (title, parts) in panels:
        plane = TSNE(perplexity=min(30, len(rows) / 4), init="pca", random_state=seed)
        points = np.split(plane.fit_transform(torch.cat(parts).cpu().numpy()), len(parts))
        for part, marker in zip(points, "ox"):
            for value, colour in ((0, "0.65"), (1, "C3")):
                chosen = part[labels == value]
                axes.scatter(chosen[:, 0], chosen[:, 1], s=9, c=colour, marker=marker, linewidths=0.7)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    title = f"t-SNE of {len(rows)} test images (o) and texts (x); red: {data.class_names[finding]}"
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_scores(path: Path, rows: Sequence[dict]) -> None:
    """Trained parameters against the score of each pair of encoders, rows of `grid`."""
    if (figure := new_figure(6.4, 4.2)) is None:
        return
    axes = figure.add_subplot()
    for row in rows:
        x = row["parameters"] / 1e6
        axes.errorbar(x, row["mean"], row["deviation"], fmt="o", capsize=3, label=row["name"])
    axes.set(xlabel="trained parameters (millions)", ylabel=rows[0]["score"])
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
