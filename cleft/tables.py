"""CLEFT's tables and figure from many runs; finished runs are skipped, interrupted ones resume."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from cleft.config import IMAGE_TOWERS, PEFT, STYLES, Config, resolve_defaults
from cleft.data import load_pairs
from cleft.evaluation import make_test_sets
from cleft.training import embed_features, load_model, project


def make_tables(config: Config, seeds: Sequence[int], run: Callable[[str, Config], None]) -> None:
    """`run` main runs for every seed, ablations for the first one; then tables and figure in --output."""
    folder = config.folder
    whole = dataclasses.replace(config, finetune_epochs=config.finetune_epochs or 3)
    runs = [("main", dataclasses.replace(whole, seed=s, output=f"{folder}/main-seed{s}")) for s in seeds]
    for name, change in list_ablations(config).items():
        output = f"{folder}/{name.replace(': ', '-').replace(' ', '_')}"
        ablation = dataclasses.replace(config, seed=seeds[0], output=output, **change)
        runs.append((name, ablation if change else runs[0][1]))  # without a change it is the main run
    for name, chosen in runs:
        if not (chosen.folder / "evaluation.json").exists():
            retune.log(f"\n{name}: {chosen.folder}")
            run("all", chosen)
    if retune.ranks()[0] == 0:
        results = pd.DataFrame([row for name, chosen in runs for row in read_results(name, chosen)])
        retune.write_text(folder / "results.csv", results.to_csv(index=False))
        write_table(folder / "main", pivot(results[results["run"] == "main"], "method", "test"))
        shown = results["fraction"].isna() | (results["fraction"] == max(config.fractions))
        shown &= (results["run"] != "main") & ~results["method"].str.contains("fine-tuning")
        shown = results[shown & (results["test"] == results["test"].iloc[0])]
        trained = shown.groupby("run", sort=False)["trained parameters"].first()
        write_table(folder / "ablations", pivot(shown, "run", "method").merge(trained, on="run"))
        draw_towers(folder / "towers.png", resolve_defaults(runs[0][1]))


def list_ablations(config: Config) -> dict[str, dict]:
    """{name: settings that differ from the main run's, if any}."""
    found = {f"text tower: {kind}": {"peft": kind} for kind in PEFT}
    found |= {f"image tower: {kind}": {"image_tower": kind} for kind in IMAGE_TOWERS}
    if config.data == "embed":
        found |= {f"captions: {style}": {"caption_style": style} for style in STYLES}
    else:
        found |= {"captions: reports": {"captions": "auto"}} if config.data in ("demo", "mimic") else {}
        found["captions: labels"] = {"captions": "labels"}
        found["captions: labels and absent"] = {"captions": "labels", "negative_captions": True}
    return {n: {k: v for k, v in change.items() if getattr(config, k) != v} for n, change in found.items()}


def read_results(name: str, config: Config) -> list[dict]:
    """A row for each measure of a run, with the parameters that its model trained."""
    trained = retune.read_json(config.folder / "parameters.json")
    shared = {"run": name, "seed": config.seed, **trained}
    shared["trained parameters"] = " + ".join(f"{number:,} {part}" for part, number in trained.items())
    rows = []
    for method, result in retune.read_json(config.folder / "evaluation.json").items():
        row = {key: result.get(key) for key in ("test", "fraction", "auroc_macro", "accuracy", "n")}
        row["low"], row["high"] = result["auroc_macro_ci"]
        rows.append(shared | row | {"method": method.removeprefix(f"{row['test']}, ")})
    return rows


def pivot(results: pd.DataFrame, row: str, column: str) -> pd.DataFrame:
    """Means over seeds: AUROC ± deviation, the 95% interval's ends, and accuracy where there is one."""

    def describe_cell(found: pd.DataFrame) -> str:
        numbers = found[["auroc_macro", "low", "high", "accuracy"]].astype(float)
        mean = numbers.mean()
        deviation = f" ± {numbers['auroc_macro'].std():.3f}" if len(found) > 1 else ""
        accuracy = "" if np.isnan(mean["accuracy"]) else f"; accuracy {mean['accuracy']:.3f}"
        return f"{mean['auroc_macro']:.3f}{deviation} ({mean['low']:.3f}-{mean['high']:.3f}){accuracy}"

    cells = {key: describe_cell(found) for key, found in results.groupby([row, column], sort=False)}
    table = pd.Series(cells).unstack().rename_axis(row)
    return table.loc[results[row].unique(), results[column].unique()].reset_index()


def write_table(path: Path, table: pd.DataFrame) -> None:
    """A table as Markdown and LaTeX; the first is printed."""
    text = retune.markdown_table(table.columns, table.to_numpy().tolist())
    retune.write_text(path.with_suffix(".md"), text + "\n")
    retune.write_text(path.with_suffix(".tex"), table.to_latex(index=False, escape=True))
    retune.log(f"\n{text}")


def draw_towers(path: Path, config: Config) -> None:
    """t-SNE of what both towers make of the same exclusive test pairs, coloured by class."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return retune.log(f"{path.name} is not drawn: it needs matplotlib (pip install matplotlib)")
    from sklearn.manifold import TSNE

    data = load_pairs(config)
    chosen = make_test_sets(data, config)[-1]
    model = load_model(config.folder, config)
    images = project(model, embed_features(model, data, config), chosen.rows).cpu().numpy()
    reports = [data.reports[row] for row in chosen.rows]
    texts = model.encoder.encode_texts(reports, config.truncate).cpu().numpy()
    label = chosen.data.labels[chosen.rows].argmax(1)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = {"image tower: test images": images, "text tower: their captions": texts}
    for axes, (title, vectors) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        tsne = TSNE(metric="cosine", init="pca", random_state=0, perplexity=min(30, len(vectors) - 1))
        points = tsne.fit_transform(vectors)
        for c, name in enumerate(chosen.data.class_names):
            axes.scatter(*points[label == c].T, s=8, label=name)
        axes.set(title=title, xticks=[], yticks=[])
    figure.axes[0].legend(fontsize=8, markerscale=2)
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
