"""CLEFT's tables and figures from many runs; finished runs are skipped, interrupted ones resume."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch.nn.functional as F

import retune
from cleft.config import PEFT, STYLES, Config, resolve_defaults
from cleft.data import load_pairs
from cleft.pipeline import run
from cleft.testsets import make_test_sets
from cleft.training import embed_features, load_model, project

FINETUNE_EPOCHS = 3  # of the main runs, where --finetune-epochs says none


def make_tables(config: Config, seeds: Sequence[int]) -> None:
    """Main runs for every seed, ablations for the first one, then tables and figures in --output."""
    folder = config.folder
    whole = dataclasses.replace(config, finetune_epochs=config.finetune_epochs or FINETUNE_EPOCHS)
    runs = [("main", dataclasses.replace(whole, seed=s, output=f"{folder}/main-seed{s}")) for s in seeds]
    for name, change in list_ablations(config).items():
        output = f"{folder}/{name.replace(': ', '-').replace(' ', '_')}"
        ablation = dataclasses.replace(config, seed=seeds[0], output=output, **change)
        runs.append((name, ablation if change else runs[0][1]))  # without a change it is the main run
    for _, chosen in runs:
        if not (chosen.folder / "evaluation.json").exists():
            retune.log(f"\n{describe(chosen)}")
            run("all", chosen)
    if retune.ranks()[0] > 0:
        return
    retune.write_text(folder / "commands.txt", "\n".join(dict.fromkeys(describe(c) for _, c in runs)) + "\n")
    results = collect(runs)
    retune.write_text(folder / "results.csv", results.to_csv(index=False))
    main = results[results["run"] == "main"]
    write_table(folder / "main", main_table(main))
    write_table(folder / "ablations", ablation_table(results[results["run"] != "main"]))
    try:
        draw_fractions(folder / "fractions.png", main)
        draw_towers(folder / "towers.png", resolve_defaults(runs[0][1]))
    except ImportError:
        retune.log("no figures: they need matplotlib (pip install matplotlib)")


def list_ablations(config: Config) -> dict[str, dict]:
    """{name: settings that differ from the main run's, if any}."""
    found = {f"text tower: {kind}": {"peft": kind} for kind in PEFT}
    found |= {f"image tower: {kind}": {"image_tower": kind} for kind in ("pretrained", "random", "frozen")}
    if config.data == "embed":
        found |= {f"captions: {style}": {"caption_style": style} for style in STYLES}
    else:
        found |= {"captions: reports": {"captions": "auto"}} if config.data in ("demo", "mimic") else {}
        found["captions: labels"] = {"captions": "labels"}
        found["captions: labels and absent"] = {"captions": "labels", "negative_captions": True}
    return {
        name: {key: value for key, value in change.items() if getattr(config, key) != value}
        for name, change in found.items()
    }


def describe(config: Config) -> str:
    """The command line of a run."""
    words = ["python", "-m", "cleft", "all"]
    for item in dataclasses.fields(Config):
        value = getattr(config, item.name)
        if value != item.default:
            words.append(item.metadata.get("flag", f"--{item.name.replace('_', '-')}"))
            words += (
                [] if isinstance(value, bool) else map(str, value if isinstance(value, tuple) else [value])
            )
    return shlex.join(words)


def collect(runs: Sequence[tuple[str, Config]]) -> pd.DataFrame:
    """A row for each measure of each run, with the parameters that its model trained."""
    rows = []
    for name, config in runs:
        trained = retune.read_json(config.folder / "parameters.json")
        for result in retune.read_json(config.folder / "evaluation.json").values():
            low, high = result.pop("auroc_macro_ci")
            del result["auroc"]  # of each class
            rows.append({"run": name, "seed": config.seed, **result, "low": low, "high": high, **trained})
    return pd.DataFrame(rows)


def main_table(results: pd.DataFrame) -> pd.DataFrame:
    """Methods x tests: mean AUROC ± deviation over seeds, the mean of the 95% intervals' ends, accuracy."""
    rows: dict[str, dict] = {}
    for (test, method, share), found in results.groupby(
        ["test", "method", "fraction"], dropna=False, sort=False
    ):
        row = rows.setdefault(method if pd.isna(share) else f"{method}, {share * 100:g}% of the labels", {})
        mean = found[["auroc_macro", "low", "high"]].mean()
        row[f"{test} AUROC"] = f"{mean['auroc_macro']:.3f} ± {found['auroc_macro'].std(ddof=0):.3f}"
        row["95%" if test == "multi-label" else f"{test} 95%"] = f"{mean['low']:.3f}-{mean['high']:.3f}"
        if test != "multi-label":
            row[f"{test} accuracy"] = f"{found['accuracy'].mean():.3f} ± {found['accuracy'].std(ddof=0):.3f}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").reset_index()


def ablation_table(results: pd.DataFrame) -> pd.DataFrame:
    """What each ablation trains and reaches on the first test set, with the 95% interval."""
    rows: dict[str, dict] = {}
    results = results[results["test"] == results["test"].iloc[0]]
    results = results[results["fraction"].isna() | (results["fraction"] == results["fraction"].max())]
    for _, result in results[results["method"] != "full fine-tuning"].iterrows():
        parts = {part: f"{result[part]:,}" for part in ("image tower", "text tower", "projections")}
        row = rows.setdefault(result["run"], {f"{part}, trained": count for part, count in parts.items()})
        row[result["method"]] = f"{result['auroc_macro']:.3f} ({result['low']:.3f}-{result['high']:.3f})"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("ablation").reset_index()


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A table as Markdown, CSV and LaTeX; the first is printed."""
    text = retune.markdown_table(table.columns, table.to_numpy().tolist())
    retune.write_text(path.with_suffix(".md"), text + "\n")
    retune.write_text(path.with_suffix(".csv"), table.to_csv(index=False))
    retune.write_text(path.with_suffix(".tex"), table.to_latex(index=False, escape=True))
    retune.log(f"\n{text}")


def draw_fractions(path: Path, results: pd.DataFrame) -> None:
    """AUROC against the share of the labels: mean and deviation over seeds; zero-shot as horizontal lines."""
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(results["test"]))
    figure = Figure(figsize=(4.6 * len(tests), 3.6), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(tests), sharey=True))
    for axes, test in zip(panels, tests, strict=True):
        for number, (method, found) in enumerate(
            results[results["test"] == test].groupby("method", sort=False)
        ):
            style = {"color": f"C{number}", "label": method}
            if found["fraction"].isna().all():
                axes.axhline(found["auroc_macro"].mean(), linestyle="--", **style)
                continue
            grouped = found.groupby("fraction")["auroc_macro"]
            mean = grouped.mean()
            axes.errorbar(mean.index * 100, mean, grouped.std(ddof=0), marker="o", capsize=3, **style)
        axes.set(xscale="log", xlabel="% of the training patients", title=test)
    panels[0].set_ylabel("test AUROC")
    panels[0].legend(fontsize=8)
    save_figure(path, figure)


def draw_towers(path: Path, config: Config) -> None:
    """t-SNE of what both towers make of the same exclusive test pairs, coloured by class."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    data = load_pairs(config)
    chosen = make_test_sets(data, config)[-1]
    if not chosen.exclusive:
        return retune.log(f"{path.name} is not drawn: no test set has exactly one finding an image")
    model = load_model(config.folder, config)
    images = project(model, embed_features(model, data, config), chosen.rows)
    texts = model.encoder.encode_texts([data.reports[row] for row in chosen.rows], config.truncate)
    label = data.labels[np.ix_(chosen.rows, chosen.columns)].argmax(1)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = {"image tower: test images": images, "text tower: their captions": F.normalize(texts, dim=1)}
    for axes, (title, vectors) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        tsne = TSNE(init="pca", random_state=0, perplexity=min(30, len(vectors) - 1))
        points = tsne.fit_transform(vectors.cpu().numpy())
        for c, column in enumerate(chosen.columns):
            axes.scatter(*points[label == c].T, s=8, label=data.class_names[column])
        axes.set(title=title, xticks=[], yticks=[])
    figure.axes[0].legend(fontsize=8, markerscale=2)
    save_figure(path, figure)


def save_figure(path: Path, figure) -> None:
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
