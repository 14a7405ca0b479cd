"""What `cleft.py` is evaluated on, and how.

Data sets that only CLEFT reads (EMBED mammograms with their captions, RSNA pneumonia, phantoms of another
domain), multi-label and balanced single-label tests, the linear probe, full fine-tuning, their table.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import retune
from cleft.towers import load_pixels
from retune import DualEncoder, InputError, Radiographs

if TYPE_CHECKING:
    from cleft.__main__ import Config

# -------------------------------------------------------------------------------------------------- Data sets

# The assessment letters of EMBED's clinical table and their BI-RADS categories, mildest first.
# fmt: off
BI_RADS = {"N": "BI-RADS 1", "B": "BI-RADS 2", "A": "BI-RADS 0", "P": "BI-RADS 3", "S": "BI-RADS 4",
           "M": "BI-RADS 5", "K": "BI-RADS 6"}
MEANING = {"N": "negative", "B": "benign", "A": "incomplete", "P": "probably benign", "S": "suspicious",
           "M": "highly suggestive of malignancy", "K": "known malignancy"}
DENSITY = {"1": "almost entirely fatty", "2": "scattered fibroglandular densities",
           "3": "heterogeneously dense", "4": "extremely dense"}
# fmt: on


def load_embed(config: retune.Config) -> Radiographs:
    """EMBED mammography: *metadata*.csv (a row an image) joined with *clinical*.csv (a row a finding).

    Labels: seven BI-RADS categories, then four densities, one-hot; nan where the exam has none. A breast's
    assessment is the most serious among the findings of its side (a blank side or B is both). Only 2D images.
    """
    root = config.root
    images_csv = retune.one_file(root, ["*metadata*.csv", "tables/*metadata*.csv"])
    clinical_csv = retune.one_file(root, ["*clinical*.csv", "tables/*clinical*.csv"])
    needed = ["empi_anon", "acc_anon", "anon_dicom_path"]
    needed += ["ImageLateralityFinal", "ViewPosition", "FinalImageType"]
    table = retune.read_table(images_csv, needed)
    exams = read_exams(clinical_csv)
    names, labels, patients, reports, rows = [], [], [], [], []
    for i in range(len(table["acc_anon"])):
        image = {key: table[key][i] for key in needed}
        letter, density = exams.get((image["acc_anon"], image["ImageLateralityFinal"]), ("", ""))
        if image["FinalImageType"] != "2D" or not (letter or density):
            continue
        path = image["anon_dicom_path"]
        names.append(path[max(0, path.find("images/"), path.find("cohort_")) :])
        known = [[float(key == value) if value else math.nan for key in keys]
                 for keys, value in ((BI_RADS, letter), (DENSITY, density))]  # fmt: skip
        labels.append(known[0] + known[1])
        patients.append(image["empi_anon"])
        side, view = image["ImageLateralityFinal"], image["ViewPosition"]
        reports.append(mammogram_caption(side, view, letter, density))
        rows.append(f"{images_csv} row {i + 2}")
    if not names:
        raise InputError(f"{images_csv}: no 2D image belongs to an exam with an assessment in {clinical_csv}")
    split = retune.patient_split(patients, retune.SHARES)
    paths = [retune.safe_path(root, name, row) for name, row in zip(names, rows, strict=True)]
    classes = (*BI_RADS.values(), *(f"Density {letter}" for letter in "ABCD"))
    note = f"EMBED: {len(names)} 2D images; captions name side, view, assessment and density"
    return Radiographs(paths, np.array(labels), classes, patients, split, names, rows, reports, note)


def read_exams(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(exam, side) -> (most serious assessment letter, density digit), "" where unknown."""
    columns = ("acc_anon", "side", "asses", "tissueden")
    table, serious = retune.read_table(path, columns), ["", *BI_RADS]
    exams: dict[tuple[str, str], tuple[str, str]] = {}
    for exam, side, letter, density in zip(*(table[name] for name in columns), strict=True):
        letter, density = (letter if letter in BI_RADS else ""), density.split(".")[0]
        for breast in side if side in ("L", "R") else "LR":
            before = exams.get((exam, breast), ("", ""))
            worst = max(letter, before[0], key=serious.index)
            exams[exam, breast] = worst, density if density in DENSITY else before[1]
    return exams


def mammogram_caption(side: str, view: str, letter: str, density: str) -> str:
    breast = {"L": "left", "R": "right"}.get(side, "")
    text = f"a {breast} {view} mammogram".replace("  ", " ")
    text += f" with {BI_RADS[letter]}, {MEANING[letter]}" if letter else ""
    return text + (f", breast density {DENSITY[density]}" if density else "")


def load_pretrain(config: retune.Config) -> Radiographs:
    """Phantoms of other patients, films and reporting habits than the demo's: what `tiny` is trained on."""
    from demo import phantoms

    data = phantoms.make_phantoms(config.demo_images, seed=1000, domain="pretrain")
    split = retune.patient_split(data.patients, {"train": 0.98, "val": 0.01, "test": 0.01})
    return Radiographs(
        data.images, data.labels, data.class_names, data.patients, split, reports=data.reports,
        note="PHANTOMS: synthetic films of the pre-training domain.", key=f"pretrain {config.demo_images}",
    )  # fmt: skip


def load_rsna(config: retune.Config) -> Radiographs:
    """RSNA pneumonia, as adaptor.py reads it."""
    from adaptor.segmentation import load_masked

    return load_masked(config)


def two_classes(data: Radiographs) -> Radiographs:
    """A single finding as a choice of two classes, as the paper evaluates RSNA: it, or no finding."""
    if len(data.class_names) > 1:
        return data
    labels = np.concatenate([data.labels, 1 - data.labels], axis=1)  # nan stays nan
    return dataclasses.replace(data, labels=labels, class_names=(*data.class_names, "No Finding"))


# ------------------------------------------------------------------------------------------- Tests and probes


def embed_images(encoder: DualEncoder, data: Radiographs, config: Config) -> np.ndarray:
    """Stored image embeddings [N,D] of the tuned image tower."""
    device = retune.pick_device(config.device)
    options = {"batch_size": 64, "workers": config.workers, "precision": config.precision, "device": device}
    return retune.embed(encoder, data, Path(config.cache_dir), **options)


def measure(scores: np.ndarray, data: Radiographs, rows: np.ndarray) -> dict:
    """Multi-label AUROC and average precision of scores [n,C] on `rows`, with a patient-level interval."""
    labels = data.labels[rows]
    found = retune.evaluate(scores, np.zeros_like(scores), labels, data.class_names)
    low, high = retune.bootstrap_ci(scores, labels, data.patients[rows])
    kept = ("auroc_macro", "ap_macro", "auroc", "n")
    return {key: found[key] for key in kept} | {"auroc_macro_ci": [low, high]}


def balanced_rows(data: Radiographs, rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k rows a class (fewer if the rarest class has fewer) among those with exactly one positive finding."""
    single = rows[np.nansum(data.labels[rows], axis=1) == 1]
    label = np.nanargmax(data.labels[single], axis=1) if len(single) else np.zeros(0, int)
    counts = np.bincount(label, minlength=len(data.class_names))
    if counts.min() == 0:
        name = data.class_names[int(counts.argmin())]
        raise InputError(f"no test image has {name} as its only finding; --balanced 0 leaves that test out")
    generator, k = np.random.default_rng(seed), min(k, int(counts.min()))
    return np.concatenate([generator.permutation(single[label == c])[:k] for c in range(len(counts))])


def measure_balanced(logits: np.ndarray, data: Radiographs, rows: np.ndarray) -> dict:
    """Accuracy and macro one-vs-rest AUROC of softmax(logits [n,C]) on single-label rows."""
    labels = (np.nan_to_num(data.labels[rows]) == 1).astype(np.float32)
    share = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    low, high = retune.bootstrap_ci(share, labels, data.patients[rows])
    accuracy = float((share.argmax(1) == labels.argmax(1)).mean())
    auroc = retune.evaluate(share, np.zeros_like(share), labels, data.class_names)["auroc_macro"]
    return {"accuracy": accuracy, "auroc_macro": auroc, "auroc_macro_ci": [low, high], "n": len(rows)}


def write_rows(path: Path, data: Radiographs, rows: np.ndarray) -> None:
    """A file of the images of a balanced test and the class of each."""
    chosen = [(data.names[r], data.class_names[int(np.nanargmax(data.labels[r]))]) for r in rows]
    with retune.atomic(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "class"), *chosen])


def linear_probe(
    embeddings: np.ndarray, data: Radiographs, train_rows: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Scores [n,C] of one logistic regression a class on standardised frozen embeddings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros((len(rows), len(data.class_names)))
    for c in range(scores.shape[1]):
        known = train_rows[~np.isnan(data.labels[train_rows, c])]
        if len(np.unique(data.labels[known, c])) == 2:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            probe.fit(embeddings[known], data.labels[known, c])
            scores[:, c] = probe.decision_function(embeddings[rows])
    return scores


def finetune(
    encoder: DualEncoder, data: Radiographs, batches: Iterable[np.ndarray], rows: np.ndarray, config: Config
) -> np.ndarray:
    """Scores [n,C] on `rows` of a copy of the image tower with a linear classifier, trained whole.

    batches: rows of the data set, one array a step.
    """
    device = retune.pick_device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        last = nn.Linear(config.dim, len(data.class_names))
    classifier = nn.Sequential(copy.deepcopy(encoder.image), last)
    classifier.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), config.lr, weight_decay=config.weight_decay)
    options = {"images": data.images, "transform": encoder.transform, "workers": config.workers}
    steps = load_pixels(batches=[batch.tolist() for batch in batches], **options)
    for batch, images, _ in retune.progress(steps, desc="fine-tuning", unit="step"):
        logits = classifier(images.to(device))
        loss = retune.prompt_contrastive_loss(logits, torch.from_numpy(data.labels[batch]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval()
    with torch.inference_mode():
        blocks = load_pixels(batches=np.array_split(rows, len(rows) // 64 + 1), **options)
        parts = [classifier(images.to(device)).cpu() for _, images, _ in blocks]
    return torch.cat(parts).numpy()


def report(folder: Path, results: dict[str, dict]) -> None:
    """evaluation.json and evaluation.md in `folder`; the table is printed too."""
    retune.write_json(folder / "evaluation.json", results)
    header = ["test", "AUROC", "95% interval", "accuracy", "images"]
    rows = [[name, r["auroc_macro"], "{:.3f}-{:.3f}".format(*r["auroc_macro_ci"]), r.get("accuracy"), r["n"]]
            for name, r in results.items()]  # fmt: skip
    table = retune.markdown_table(header, rows)
    retune.write_text(folder / "evaluation.md", table + "\n")
    retune.say(f"{table}\n\nwritten to {folder}")
