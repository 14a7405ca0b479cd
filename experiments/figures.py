"""Figures of finished runs, in greys and with a line style each, so that any printer will do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import retune
from experiments.runs import BASIC, SCENARIOS, labels_of, load_run, pick, variants


@contextlib.contextmanager
def new_figure(path: Path, columns: int, rows: int, width: float, height: float, **options) -> Iterator:
    """Yields (figure, axes [rows * columns]), each width x height inches, and saves the figure as PNG.

    Without pyplot, which would keep every figure in memory.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    yield figure, figure.subplots(rows, columns, squeeze=False, **options).ravel()
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})


def measured_over_tasks(runs: pd.DataFrame, folder: Path, key: str) -> list[list]:
    """A test measure at every stage of each run: zero-shot, then after every task."""
    found = (retune.read_json(folder / "runs" / run / "metrics.json") for run in runs["run"])
    return [[measured[key] for _, measured in retune.stages(metrics)] for metrics in found]


def task_heatmaps(runs: pd.DataFrame, folder: Path) -> None:
    """Task x class AUROC and F1 of RE-tune, mean over seeds, for each scenario with several tasks."""
    for chosen in (pick(runs, **SCENARIOS[scenario]) for scenario in BASIC[1:]):
        metrics = retune.read_json(folder / "runs" / chosen["run"].iloc[0] / "metrics.json")
        for key, title, low in (("auroc", "test AUROC", 0.5), ("f1", "test F1", 0.0)):
            values = [pd.DataFrame(run, dtype=float) for run in measured_over_tasks(chosen, folder, key)]
            mean = sum(values) / len(values)  # [T + 1, C]
            zero, *after = [{"test": {key: row}} for row in mean.to_dict("records")]
            shown = metrics | {"zero_shot": zero, "after_task": after}
            path = folder / f"{key}-{metrics['config']['scenario']}.png"
            retune.heatmap(path, shown, key, f"{title}, mean of {len(values)} seeds", low)


def auroc_over_tasks(runs: pd.DataFrame, folder: Path) -> None:
    """Macro AUROC after every task, a line per method: as published above, with whitened embeddings below."""
    methods = sorted({labels_of(v)[0] for v in variants(runs)})
    with new_figure(folder / "auroc-over-tasks.png", 3, 2, 4.6, 3.9, sharey=True) as (figure, axes):
        for ax, (whitened, scenario) in zip(axes, [(w, s) for w in ("no", "yes") for s in BASIC[1:]]):
            for v in variants(runs):
                name, kind = labels_of(v)
                if kind in (whitened, "built in"):
                    found = measured_over_tasks(pick(runs, **SCENARIOS[scenario], **v), folder, "auroc_macro")
                    zero, *auroc = np.array(found, float).mean(0)
                    style = line_style(methods.index(name), v["method"] == "retune")
                    ax.plot(np.arange(1, len(auroc) + 1), auroc, label=name, **style)
            ax.axhline(zero, color="0.6", linewidth=1, zorder=0)
            ax.text(len(auroc), zero, "zero-shot", color="0.4", fontsize=8, ha="right", va="top")
            ax.set_title(f"{scenario}{', whitened' if whitened == 'yes' else ''}")
            ax.set_xticks(range(1, len(auroc) + 1))
            ax.grid(color="0.9")
        axes[0].set_ylim(bottom=max(0.4, axes[0].get_ylim()[0]))
        for ax in axes[::3]:
            ax.set_ylabel("macro AUROC, test")
        for ax in axes[3:]:
            ax.set_xlabel("tasks trained")
        handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels())}
        place = {"loc": "outside lower center", "ncols": 4, "handlelength": 5, "fontsize": 9}
        figure.legend(handles.values(), handles.keys(), **place)


def line_style(index: int, heavy: bool) -> dict:
    """A grey, a line style and a marker of its own for each method."""
    return {
        "color": ("0.0", "0.3", "0.5", "0.65")[0 if heavy else index % 4], "linewidth": 2.8 if heavy else 1.3,
        "linestyle": "-" if heavy else ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")[index % 5],
        "marker": "os^vDP*X<>phd"[index % 13], "markersize": 5,
    }  # fmt: skip


@torch.inference_mode()
def tsne(data, embeddings: np.ndarray, bank, model, path: Path, images: int = 600) -> None:
    """t-SNE of test images with at most one finding, before and after the image adaptor."""
    from sklearn.manifold import TSNE

    rows = data.where("test")
    rows = rows[np.nansum(data.labels[rows], axis=1) <= 1]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:images])
    labels = np.nan_to_num(data.labels[rows])
    before = retune.gather(embeddings, torch.from_numpy(rows), bank.embeddings)
    after = model.image_adaptor(model.whitening(before))
    with new_figure(path, 2, 1, 5.2, 5.0) as (figure, axes):
        for ax, title, x in zip(axes, ("before: frozen encoder", "after: image adaptor"), (before, after)):
            perplexity = min(30, (len(rows) - 1) / 3)
            chart = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine")
            points = chart.fit_transform(x.numpy())
            ax.scatter(*points[labels.sum(1) == 0].T, s=8, color="0.8", label="no finding", zorder=1)
            style = {"s": 26, "linewidths": 0.7, "edgecolors": "black", "zorder": 2}
            for c, name in enumerate(data.class_names):
                kind = {"marker": "osD^vP*Xp<>hd8"[c % 14], "color": str(round(0.9 * (c % 5) / 4, 2))}
                ax.scatter(*points[labels[:, c] == 1].T, label=name, **kind, **style)
            ax.set(title=title, xticks=[], yticks=[])
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)


@torch.inference_mode()
def prompt_cosines(data, bank, model, path: Path) -> None:
    """Cosine of every prompt with every other before and after the text adaptor."""
    size = min(7.5, max(4.5, 0.13 * len(bank.group) + 1.5))
    finding = bank.group.numpy() // 2
    middles = [float(np.flatnonzero(finding == c).mean()) for c in range(len(data.class_names))]
    stages = (bank.embeddings, model.text_adaptor(bank.embeddings))
    with new_figure(path, 2, 1, size, 0.85 * size) as (figure, axes):
        for ax, title, t in zip(axes, ("before: frozen encoder", "after: text adaptor"), stages):
            t = F.normalize(t, dim=-1)
            picture = ax.imshow((t @ t.T).numpy(), cmap="Greys", vmin=-1, vmax=1)
            for edge in np.flatnonzero(np.diff(finding)) + 0.5:
                ax.axhline(edge, color="white", linewidth=1.5)
                ax.axvline(edge, color="white", linewidth=1.5)
            ax.set(title=title, xticks=[])
            ax.set_yticks(middles, data.class_names if ax is axes[0] else [""] * len(middles))
        axes[0].set_xlabel("within each class: positive prompts, then negative ones")
        figure.colorbar(picture, ax=axes, label="cosine similarity")


def draw_figures(runs: pd.DataFrame, folder: Path) -> None:
    """Draw every figure from the runs in `folder`/runs; InputError when that folder is not there."""
    if not (folder / "runs").is_dir():
        raise retune.InputError(f"{folder / 'runs'}: figures need the runs; run_experiments.sh makes them")
    task_heatmaps(runs, folder)
    auroc_over_tasks(runs, folder)
    joint = pick(runs, **SCENARIOS["joint"])["run"].iloc[0]
    _, data, embeddings, bank, model = load_run(folder / "runs" / joint)
    tsne(data, embeddings, bank, model, folder / "tsne.png")
    prompt_cosines(data, bank, model, folder / "prompts.png")
