"""Hospitals as parts (ours): a task per value of the table's column `part`, and what is forgotten of each.

    python -m experiments.hospitals FOLDER      # draw phantoms of three hospitals and their CSV; then
    python retune.py --data csv --data-dir FOLDER --scenario data --parts column

`retune.run` calls `column_tasks` for the tasks and `measure` at the end: AUROC after part t on the test images of
part u. A part is a hospital, a scanner, a year: whatever the column says. No patient may be in two.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import retune

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")  # domains of demo/phantoms.py


def column_tasks(config, data) -> list[retune.Task]:
    """A data-incremental task per part, in the order of the training rows or of --part-order."""
    if config.scenario != "data" or config.contiguous:
        raise retune.InputError("--parts column needs --scenario data, without --contiguous")
    if data.part is None:
        raise retune.InputError(f"--parts column: {config.data} has no column `part`")
    part = np.asarray(data.part, str)
    refuse_shared_patients(part, data)
    train = data.where("train")
    found = list(dict.fromkeys(part[train].tolist()))
    order = list(config.part_order or found)
    if sorted(order) != sorted(found):
        raise retune.InputError(
            f"--part-order {' '.join(order)} must name each part once: {', '.join(found)}"
        )
    everything = tuple(range(len(data.class_names)))
    return [retune.Task(name, train[part[train] == name], everything) for name in order]


def refuse_shared_patients(part: np.ndarray, data) -> None:
    """InputError for the first row without a part, or whose patient is in another part too."""
    home: dict[str, int] = {}
    rows = zip(part.tolist(), data.patients.tolist())
    for i, (name, patient) in enumerate(rows):
        if not name.strip():
            raise retune.InputError(f"{data.rows[i]}: `part` is blank")
        first = home.setdefault(patient, i)
        if part[first] != name:
            where = f"part {part[first]!r} ({data.rows[first]}) and in part {name!r}"
            raise retune.InputError(
                f"{data.rows[i]}: patient {patient!r} is in {where}; parts share no patient"
            )


def measure(config, data, tasks, embeddings, bank, model) -> dict:
    """{"parts", "auroc" [T + 1, U], "auroc_ci", "forgetting" [U]} of the test images of each part u.

    Row 0 is zero-shot, row t the adaptors after the t-th part; columns are the parts in the order of training, then
    those that have test images alone. forgetting: the most a part reached since its own task, minus its last.
    """
    test = data.where("test")
    part = np.asarray(data.part, str)[test]
    names = [task.name for task in tasks]
    names += [name for name in dict.fromkeys(part.tolist()) if name not in names]
    zero = retune.RETune(bank.embeddings.shape[1], adapt="none", pool=config.pool, negatives=config.negatives)
    stages = [zero.to(bank.embeddings.device)]
    for k in range(1, len(tasks) + 1):
        saved = retune.load_model(config.folder / f"task_{k}.safetensors", config)[0]
        stages.append(saved.to(bank.embeddings.device))
    auroc = np.full((len(stages), len(names)), math.nan)
    intervals = [[None] * len(names) for _ in stages]
    for t, stage in enumerate(stages):
        scores, decisions = retune.score_rows(stage, bank, embeddings, test, config.score)
        for u, name in enumerate(names):
            mine = part == name
            if mine.any():
                rows = test[mine]
                found = retune.evaluate(scores[mine], decisions[mine], data.labels[rows], data.class_names)
                auroc[t, u] = found["auroc_macro"]
                intervals[t][u] = retune.bootstrap_ci(scores[mine], data.labels[rows], data.patients[rows])
    block = {"parts": names, "trained": len(tasks), "auroc": auroc.tolist(), "auroc_ci": intervals}
    block["forgetting"] = forgetting(auroc, len(tasks))
    if config.figures:
        draw(config.folder / "parts.png", block)
    return block


def forgetting(auroc: np.ndarray, trained: int) -> list[float | None]:
    """Per part [U]: max of A[t, u] over t = u..T-1 minus A[T, u]; None for the last part and untrained ones."""
    last = len(auroc) - 1
    drops = [
        float(auroc[u:last, u - 1].max() - auroc[last, u - 1]) for u in range(1, min(trained, last - 1) + 1)
    ]
    return [*drops, *[None] * (auroc.shape[1] - len(drops))]


def stage_names(block: dict) -> list[str]:
    """zero-shot, then "after" each trained part."""
    return ["zero-shot", *(f"after {name}" for name in block["parts"][: block["trained"]])]


def summary(block: dict) -> str:
    """The matrix and what is forgotten, as text."""
    rows = [[name, *values] for name, values in zip(stage_names(block), block["auroc"])]
    rows.append(["forgetting", *block["forgetting"]])
    return retune.markdown_table(["test macro AUROC by part (ours)", *block["parts"]], rows)


def draw(path: Path, block: dict) -> None:
    """The matrix as a picture; a part's own task, and the stages since, are framed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        return retune.log(f"{path.name} is not drawn: it needs matplotlib (pip install matplotlib)")
    grid = np.array(block["auroc"], float)  # [T + 1, U]
    size = (3.4 + 1.1 * grid.shape[1], 1.9 + 0.45 * len(grid))  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(grid, cmap="Greys", vmin=0.5, vmax=1, aspect="auto")
    for (t, u), value in np.ndenumerate(grid):
        color = "white" if value > 0.8 else "black"
        axes.text(u, t, "-" if math.isnan(value) else f"{value:.3f}", ha="center", va="center", color=color)
    for u in range(block["trained"]):
        axes.add_patch(Rectangle((u - 0.47, u + 0.53), 0.94, len(grid) - u - 1.06, fill=False, lw=2))
    axes.set_xticks(range(grid.shape[1]), block["parts"])
    axes.set_yticks(range(len(grid)), stage_names(block))
    axes.set_xlabel("test images of")
    axes.set_title("macro AUROC; framed: since the part was trained on", fontsize=10)
    figure.colorbar(picture, ax=axes)
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})


def draw_hospitals(folder: Path, images: int, seed: int = 0) -> Path:
    """Write PNGs of `images` phantoms of each hospital and hospitals.csv into a new folder; its path."""
    from PIL import Image

    from demo import phantoms

    with retune.atomic(retune.check_new_folder(folder)) as partial:
        partial.mkdir(parents=True)
        with open(partial / "hospitals.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "patient", "part", *phantoms.FINDINGS])
            for number, name in enumerate(HOSPITALS):
                drawn = phantoms.make_phantoms(images, seed + number, domain=name)
                (partial / name).mkdir()
                for i in range(images):
                    path = f"{name}/{i:05d}.png"
                    Image.fromarray(drawn.images[i]).save(partial / path)
                    table.writerow([path, drawn.patients[i], name, *drawn.labels[i].astype(int)])
    return folder / "hospitals.csv"


def execute(argv: Sequence[str]) -> None:
    """Draw the demo's hospitals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=2000, help="phantoms of each hospital (default: 2000)")
    arguments = parser.parse_args(argv)
    table = draw_hospitals(arguments.folder, arguments.images)
    print(f"written to {table}: phantoms, not patients; nothing measured on them is clinical")


if __name__ == "__main__":
    sys.exit(retune.main(None, execute))
