"""Figures of finished runs, in greys and with a line style each, so that any printer will do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import retune
from experiments.runs import BASIC, SCENARIOS, labels_of, pick, variants
from experiments.scores import load_run


def new_figure(columns: int, rows: int, width: float, height: float):
    """(figure, list of axes) without pyplot, which would keep every figure in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def save_figure(path: Path, figure) -> None:
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})


def read_metrics(runs: pd.DataFrame, folder: Path) -> list[dict]:
    return [retune.read_json(folder / "runs" / run / "metrics.json") for run in runs["run"]]


def task_heatmaps(runs: pd.DataFrame, folder: Path) -> None:
    """Task x class AUROC and F1 of RE-tune, mean over seeds, for each scenario with several tasks."""
    for scenario in BASIC[1:]:
        found = read_metrics(pick(runs, **SCENARIOS[scenario]), folder)
        name = f"{SCENARIOS[scenario]['scenario']}.png"
        for key, title, low in (("auroc", "test AUROC", 0.5), ("f1", "test F1", 0.0)):
            stages = zip(*([m["zero_shot"], *m["after_task"]] for m in found))
            frames = [pd.DataFrame([run["test"][key] for run in stage], dtype=float) for stage in stages]
            zero, *after = [{"test": {key: frame.mean().to_dict()}} for frame in frames]
            means = found[0] | {"zero_shot": zero, "after_task": after}
            retune.heatmap(folder / f"{key}-{name}", means, key, f"{title}, mean of {len(found)} seeds", low)


def auroc_over_tasks(runs: pd.DataFrame, folder: Path) -> None:
    """Macro AUROC after every task, a line per method: as published above, with whitened embeddings below."""
    figure, axes = new_figure(3, 2, 4.6, 3.9)
    methods = sorted({(v["method"], v["set"]) for v in variants(runs)})
    for ax, (whitened, scenario) in zip(axes, [(w, s) for w in ("no", "yes") for s in BASIC[1:]]):
        for v in variants(runs):
            if labels_of(v)[1] not in (whitened, "built in"):
                continue
            found = read_metrics(pick(runs, **SCENARIOS[scenario], **v), folder)
            stages = [[m["zero_shot"], *m["after_task"]] for m in found]
            auroc = np.array([[s["test"]["auroc_macro"] for s in run] for run in stages], float).mean(0)
            style = line_style(methods.index((v["method"], v["set"])), v["method"] == "retune")
            ax.plot(np.arange(1, len(auroc)), auroc[1:], label=labels_of(v)[0], **style)
        ax.axhline(auroc[0], color="0.6", linewidth=1, zorder=0)
        ax.text(len(auroc) - 1, auroc[0], "zero-shot", color="0.4", fontsize=8, ha="right", va="top")
        ax.set_title(f"{scenario}{', whitened' if whitened == 'yes' else ''}")
        ax.set_xticks(range(1, len(auroc)))
        ax.grid(color="0.9")
    low, high = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(max(0.4, min(low)), max(high))
    for ax in axes[::3]:
        ax.set_ylabel("macro AUROC, test")
    for ax in axes[3:]:
        ax.set_xlabel("tasks trained")
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, handlelength=5, fontsize=9
    )
    save_figure(folder / "auroc-over-tasks.png", figure)


def line_style(index: int, heavy: bool) -> dict:
    """A grey, a line style and a marker of its own for each method."""
    return {
        "color": ("0.0", "0.3", "0.5", "0.65")[0 if heavy else index % 4], "linewidth": 2.8 if heavy else 1.3,
        "linestyle": "-" if heavy else ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")[index % 5],
        "marker": "os^vDP*X<>phd"[index % 13], "markersize": 5,
    }  # fmt: skip


@torch.inference_mode()
def tsne(runs: pd.DataFrame, folder: Path, images: int = 600) -> None:
    """t-SNE of test images with at most one finding, before and after the image adaptor (joint, first seed)."""
    from sklearn.manifold import TSNE

    run = pick(runs, **SCENARIOS["joint"])["run"].iloc[0]
    _, data, embeddings, bank, model = load_run(folder / "runs" / run)
    rows = data.where("test")
    rows = rows[np.nansum(data.labels[rows], axis=1) <= 1]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:images])
    before = retune.gather(embeddings, torch.from_numpy(rows), bank.embeddings)
    after = model.image_adaptor(model.whitening(before))
    figure, axes = new_figure(2, 1, 5.2, 5.0)
    for ax, title, x in zip(axes, ("before: frozen encoder", "after: image adaptor"), (before, after)):
        perplexity = min(30, (len(rows) - 1) / 3)
        chart = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine")
        scatter_classes(ax, chart.fit_transform(x.numpy()), data.labels[rows], data.class_names)
        ax.set(title=title, xticks=[], yticks=[])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    save_figure(folder / "tsne.png", figure)


def scatter_classes(ax, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """One marker and grey per finding; images without a finding as small light dots behind."""
    none = np.nansum(labels, axis=1) == 0
    ax.scatter(*points[none].T, s=8, color="0.8", label="no finding", zorder=1)
    for c, name in enumerate(class_names):
        chosen = labels[:, c] == 1
        style = {"marker": "osD^vP*Xp<>hd8"[c % 14], "s": 26, "linewidths": 0.7, "edgecolors": "black"}
        ax.scatter(*points[chosen].T, color=str(round(0.9 * (c % 5) / 4, 2)), label=name, zorder=2, **style)


@torch.inference_mode()
def prompt_cosines(runs: pd.DataFrame, folder: Path) -> None:
    """Cosine of every prompt with every other before and after the text adaptor (joint, first seed)."""
    run = pick(runs, **SCENARIOS["joint"])["run"].iloc[0]
    _, data, _, bank, model = load_run(folder / "runs" / run)
    size = min(7.5, max(4.5, 0.13 * len(bank.group) + 1.5))
    figure, axes = new_figure(2, 1, size, 0.85 * size)
    finding = bank.group.numpy() // 2
    edges = np.flatnonzero(np.diff(finding)) + 0.5
    middles = [float(np.flatnonzero(finding == c).mean()) for c in range(len(data.class_names))]
    stages = {
        "before: frozen encoder": bank.embeddings,
        "after: text adaptor": model.text_adaptor(bank.embeddings),
    }
    for ax, (title, t) in zip(axes, stages.items()):
        t = F.normalize(t, dim=-1)
        picture = ax.imshow((t @ t.T).numpy(), cmap="Greys", vmin=-1, vmax=1)
        for edge in edges:
            ax.axhline(edge, color="white", linewidth=1.5)
            ax.axvline(edge, color="white", linewidth=1.5)
        ax.set(title=title, xticks=[])
        ax.set_yticks(middles, data.class_names if ax is axes[0] else [""] * len(middles))
    axes[0].set_xlabel("within each class: positive prompts, then negative ones")
    figure.colorbar(picture, ax=axes, label="cosine similarity")
    save_figure(folder / "prompts.png", figure)


def draw_figures(runs: pd.DataFrame, folder: Path) -> None:
    """Draw every figure from the runs in `folder`/runs; InputError when that folder is not there."""
    if not (folder / "runs").is_dir():
        raise retune.InputError(
            f"{folder / 'runs'}: figures need the runs themselves; run_experiments.sh makes them"
        )
    for draw in (task_heatmaps, auroc_over_tasks, tsne, prompt_cosines):
        draw(runs, folder)
