"""All image encoders with all text encoders, and the paper's ablations: tables and a figure, resumable.

    python -m adaptor grid                     # demo: its own towers, and published ones if installed
    python -m adaptor grid --data mimic ... --image-encoders facebook/dinov2-small facebook/dinov2-base
Every other option is one of `python -m adaptor`. What is finished is not run again.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import retune
from adaptor.classification import mean_and_deviation
from adaptor.config import Config
from adaptor.encoders import is_installed
from adaptor.figures import draw_scores
from adaptor.model import FEATURES
from adaptor.run import run
from retune import log

ABLATIONS = {  # what differs from the first pair's run
    "as published": {}, "0 layers": {"layers": 0}, "1 layer": {"layers": 1},
    "loss weight 0.5": {"text_to_image": 0.5}, "loss weight 0.25": {"text_to_image": 0.25},
    "dummy text": {"dummy_text": True}, "towers trained too": {"unfreeze": True},
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """The command `python -m adaptor grid`."""
    parser = retune.build_parser(Config, __doc__)
    parser.add_argument("--image-encoders", nargs="+", default=["demo", "efficientnet-lite0"])
    parser.add_argument("--text-encoders", nargs="+", default=["demo", "minilm"])
    parser.set_defaults(output="runs/adaptor-grid-{data}", stages=["classification"], demo_images=2000)
    arguments = parser.parse_args(argv)
    base = retune.parse_config(Config, arguments)
    chosen = [(i, t) for i in arguments.image_encoders for t in arguments.text_encoders]
    pairs = {f"{short(i)} + {short(t)}": {"image_encoder": i, "text_encoder": t} for i, t in chosen
             if is_installed(i) and is_installed(t)}  # fmt: skip
    log(f"pairs: {', '.join(pairs)}; {len(chosen) - len(pairs)} left out: packages are not installed")
    title, first = next(iter(pairs.items()))
    ablations = {name: first | change for name, change in ABLATIONS.items()}
    tables = {"encoders": run_all(base, pairs), f"ablations, {title}": run_all(base, ablations)}
    root = base.folder
    retune.write_json(root / "grid.json", tables)
    text = "\n\n".join(grid_table(name, rows) for name, rows in tables.items())
    retune.write_text(root / "grid.md", text + "\n")
    draw_scores(root / "parameters.png", tables["encoders"])
    log(f"\n{text}\n\nwritten to {root}")


def short(encoder: str) -> str:
    """A name that fits a table and a folder."""
    return Path(encoder.split("=")[0]).name.replace(":", "-")


def run_all(base: Config, variants: dict[str, dict]) -> list[dict]:
    """One row per variant: scores, parameters and seconds; `mean` is at the middle labelled share."""
    rows = []
    for name, change in variants.items():
        folder = "-".join(short(str(v)) if "encoder" in key else f"{key}-{v}" for key, v in change.items())
        log(f"\n--- {name}")
        metrics = run(dataclasses.replace(base, **change, output=str(base.folder / folder)))
        config = metrics["config"]
        found = metrics["retrieval"]["test"]
        key, words = ("accuracy", "accuracy") if config["multiclass"] else ("auroc_macro", "macro AUROC")
        scores = {f"{f:.0%}": {kind: [] for kind in FEATURES} for f in sorted(config["fractions"])}
        for result in metrics["classification"]:
            scores[f"{result['fraction']:.0%}"][result["features"]].append(result["test"][key])
        middle = list(scores)[len(scores) // 2]
        values = np.array(scores[middle][FEATURES[0]], float)
        rows.append({
            "name": name, "score": f"test {words}, {middle} of the labels", "mean": float(values.mean()),
            "deviation": float(values.std(ddof=min(1, len(values) - 1))), "scores": scores,
            "recall": [found[way]["recall_5"] for way in ("image_to_text", "text_to_image")],
            "parameters": metrics["cost"]["trainable_parameters"], "seconds": metrics["cost"]["seconds"],
        })  # fmt: skip
    return rows


def grid_table(title: str, rows: Sequence[dict]) -> str:
    """Markdown: recall at 5 both ways, the score at every labelled share, parameters, seconds."""
    shares = list(rows[0]["scores"])
    header = [title, "text R@5", "image R@5", *(f"{share} of labels" for share in shares), "bare, all labels"]
    lines = []
    for row in rows:
        cells = [mean_and_deviation(np.array(row["scores"][share]["adaptor"], float)) for share in shares]
        bare = mean_and_deviation(np.array(row["scores"][shares[-1]]["bare backbone"], float))
        trained = f"{row['parameters']:,}"
        lines.append([row["name"], *row["recall"], *cells, bare, trained, f"{row['seconds']:.0f}"])
    return retune.markdown_table([*header, "trained", "seconds"], lines)
