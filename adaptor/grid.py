"""All image encoders with all text encoders, and the paper's ablations: one table and one figure, resumable.

    python -m adaptor grid                                              # demo: its towers, published ones if there
    python -m adaptor grid --image-encoders facebook/dinov2-small facebook/dinov2-base timm:swin_base_patch4_window7_224 \\
        --text-encoders bert-base-uncased dmis-lab/biobert-v1.1 emilyalsentzer/Bio_ClinicalBERT \\
        --data mimic --data-dir MIMIC-CXR-JPG --view frontal

Every other option is one of `python -m adaptor`. A pair or ablation that is finished is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import retune
from adaptor.classification import mean_and_deviation
from adaptor.config import Config
from adaptor.encoders import has_package
from adaptor.figures import can_draw, draw_scores
from adaptor.run import run
from retune import InputError, log

IMAGE_ENCODERS = ("demo", "efficientnet-lite0")
TEXT_ENCODERS = ("demo", "minilm")
ABLATIONS = {  # FACTS of the paper's thesis: what differs from the first pair's run
    "as published": {},
    "0 layers": {"layers": 0},
    "1 layer": {"layers": 1},
    "loss weight 0.5": {"text_to_image": 0.5},
    "loss weight 0.25": {"text_to_image": 0.25},
    "dummy text": {"dummy_text": True},
    "towers trained too": {"unfreeze": True},
}
DEMO = {"demo_images": 2000, "head_epochs": 30}  # minutes on two cores


def main(argv: Sequence[str]) -> None:
    """The command `python -m adaptor grid`."""
    parser = retune.build_parser(Config, __doc__)
    group = parser.add_argument_group("grid")
    group.add_argument("--image-encoders", nargs="+", default=IMAGE_ENCODERS, help="image encoders")
    group.add_argument("--text-encoders", nargs="+", default=TEXT_ENCODERS, help="text encoders")
    group.add_argument("--no-ablations", action="store_true", help="pairs of encoders alone")
    parser.set_defaults(output="runs/adaptor-grid-{data}", stages=["retrieval", "classification"])
    arguments = parser.parse_args(argv)
    if arguments.data == "demo":
        for key, value in DEMO.items():
            if getattr(arguments, key) in (None, parser.get_default(key)):
                setattr(arguments, key, value)
    run_grid(retune.parse_config(Config, arguments), arguments)


def run_grid(base: Config, arguments: argparse.Namespace) -> None:
    """Run every pair and ablation in a folder of its own, then write grid.md, grid.json and the figure."""
    root = base.folder
    images, texts = (installed(getattr(arguments, f"{side}_encoders"), side) for side in ("image", "text"))
    pairs = {
        f"{short(i)} + {short(t)}": {"image_encoder": i, "text_encoder": t} for i in images for t in texts
    }
    first = next(iter(pairs.values()))
    tables = {"pairs": run_all(base, root, pairs)}
    if not arguments.no_ablations:
        ablations = {name: first | change for name, change in ABLATIONS.items()}
        ablations["as published"] = first  # the folder of the first pair
        tables["ablations"] = run_all(base, root, ablations)
    retune.write_json(root / "grid.json", tables)
    text = "\n\n".join(grid_table(name, rows) for name, rows in tables.items())
    retune.write_text(root / "grid.md", text + "\n")
    if can_draw():
        draw_scores(root / "parameters.png", tables["pairs"], tables["pairs"][0]["score"])
    log(f"\n{text}\n\nwritten to {root}")


def installed(names: Sequence[str], side: str) -> list[str]:
    """The encoders without those whose packages are missing, which are named."""
    found = [name for name in names if has_package(name)]
    for name in names:
        if name not in found:
            log(f"{side} encoder {name} is left out: its package is not installed")
    if not found:
        raise InputError(f"--{side}-encoders: none of {', '.join(names)} is installed")
    return found


def short(encoder: str) -> str:
    """A name that fits a table and a folder."""
    return Path(encoder.split("=")[0]).name.replace(":", "-")


def run_all(base: Config, root: Path, variants: dict[str, dict]) -> list[dict]:
    """One row per variant: what differs from `base`, its scores, parameters and seconds."""
    rows = []
    for name, change in variants.items():
        label = "-".join(
            short(str(value)) if "encoder" in key else f"{key}-{value}" for key, value in change.items()
        )
        log(f"\n--- {name}")
        metrics = run(dataclasses.replace(base, **change, output=str(root / label)))
        rows.append(grid_row(name, metrics))
    return rows


def grid_row(name: str, metrics: dict) -> dict:
    """Retrieval and classification of a run, parameters and seconds; `mean` is at the middle labelled share."""
    fractions = sorted(metrics["config"]["fractions"])
    middle = fractions[len(fractions) // 2]
    key, words = (
        ("accuracy", "accuracy") if metrics["config"]["multiclass"] else ("auroc_macro", "macro AUROC")
    )
    scores = {fraction: {} for fraction in fractions}
    for result in metrics["classification"]:
        scores[result["fraction"]].setdefault(result["features"], []).append(result["test"][key])
    chosen = np.array(scores[middle]["adaptor"], float)
    return {
        "name": name, "score": f"test {words} at {middle:.0%} of the labels", "mean": float(chosen.mean()),
        "deviation": float(chosen.std(ddof=1)) if len(chosen) > 1 else 0.0,
        "recall_5": [metrics["retrieval"]["test"][way]["recall_5"] for way in ("image_to_text", "text_to_image")],
        "scores": scores, "parameters": metrics["cost"]["trainable_parameters"],
        "seconds": metrics["cost"]["seconds"],
    }  # fmt: skip


def grid_table(title: str, rows: Sequence[dict]) -> str:
    """Markdown: recall at 5 both ways, the score at every labelled share, parameters, seconds."""
    fractions = list(rows[0]["scores"])
    header = [title, "recall@5 i-t", "t-i", *(f"{fraction:.0%}" for fraction in fractions),
              f"bare, {fractions[-1]:.0%}", "trained", "seconds"]  # fmt: skip
    lines = []
    for row in rows:
        cells = [mean_and_deviation(np.array(row["scores"][f]["adaptor"], float)) for f in fractions]
        bare = mean_and_deviation(np.array(row["scores"][fractions[-1]]["bare backbone"], float))
        recalls = [float(value) for value in row["recall_5"]]
        lines.append([row["name"], *recalls, *cells, bare, f"{row['parameters']:,}", f"{row['seconds']:.0f}"])
    score = rows[0]["score"].rpartition(" at ")[0]
    return f"{score} at each share of the labels\n\n{retune.markdown_table(header, lines)}"
