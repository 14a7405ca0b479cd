"""Real X-rays through the whole chain: published encoders, aligned on captions, exported, RE-tuned.

    python -m adaptor xrays --nih DIR [DIR ...]

Each DIR has the layout of NIH ChestX-ray14. Beside RE-tune's scores stand those of a linear probe on the bare
backbone, and of what needs no image: how it was taken (AP or PA), and which folder it is from. Every other option
is one of `python -m adaptor`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from adaptor.config import Config
from adaptor.encoders import Side, embed, load_backbones
from adaptor.pairs import caption
from adaptor.run import run, summary
from retune import Radiographs

FINDINGS = [
    "Atelectasis",
    "Effusion",
    "Infiltration",
    "Pneumonia",
    "Edema",
]  # 27 or more positives to test on
SCENARIOS = ("zero", "joint", "data", "label", "class")
SHARED = ("data", "data_dir", "labels_csv", "classes", "cache_dir", "workers", "device")


def main(argv: Sequence[str]) -> None:
    """The command `python -m adaptor xrays`."""
    parser = retune.build_parser(Config, __doc__)
    parser.add_argument("--nih", nargs="+", required=True, metavar="DIR", help="folders of NIH ChestX-ray14")
    parser.set_defaults(image_encoder="efficientnet-lite0", text_encoder="minilm", data="csv", texts="labels",
                        classes=FINDINGS, stages=["classification"], output="runs/adaptor-xrays")  # fmt: skip
    arguments = parser.parse_args(argv)
    root = Path(arguments.output)
    root.mkdir(parents=True, exist_ok=True)
    arguments.data_dir, arguments.labels_csv = str(root), str(root / "xrays.csv")
    write_table(arguments.nih, root / "xrays.csv", arguments.classes)
    texts = {name: [caption([1], [name]), caption([0], [name])] for name in arguments.classes}
    prompts = {name: {"positive": [yes], "negative": [no]} for name, (yes, no) in texts.items()}
    retune.write_json(root / "captions.json", prompts)
    text = measure_chain(retune.parse_config(Config, arguments), root)
    retune.write_text(root / "xrays.md", text + "\n")
    retune.log(f"\n{text}\n\nwritten to {root}")


def write_table(folders: Sequence[str], path: Path, classes: Sequence[str]) -> None:
    """One CSV of all folders, with absolute paths; a patient in any test list is a test patient everywhere."""
    tables = []
    for folder in folders:
        data = retune.load_radiographs(retune.Config(data="nih", data_dir=folder, classes=tuple(classes)))
        table = pd.DataFrame(data.labels.astype(int), columns=list(data.class_names))
        known = {"patient": data.patients, "split": data.split, "view": data.view, "part": Path(folder).name}
        tables.append(table.assign(path=[str(Path(image).resolve()) for image in data.images], **known))
    table = pd.concat(tables, ignore_index=True)
    rank = table["split"].map({"train": 0, "val": 1, "test": 2}).groupby(table["patient"]).transform("max")
    table["split"] = rank.map({0: "train", 1: "val", 2: "test"})
    with retune.atomic(path) as partial:
        table.to_csv(partial, index=False)


def measure_chain(base: Config, root: Path) -> str:
    """Align, export, RE-tune in every scenario; a table of test AUROC with 95% intervals over the patients."""
    pair = root / "pair"
    metrics = run(
        dataclasses.replace(base, output=str(root / "adaptor"), export=None if pair.exists() else str(pair))
    )
    shared = {key: getattr(base, key) for key in SHARED}
    jobs = {f"retune.py, {scenario}": {"scenario": scenario} for scenario in SCENARIOS}
    jobs["zero, the captions as prompts"] = {"scenario": "zero", "prompts": str(root / "captions.json")}
    rows = []
    for i, (name, settings) in enumerate(jobs.items()):
        output = str(root / f"retune-{i}-{settings['scenario']}")
        found = retune.run(retune.Config(encoder=str(pair), output=output, **settings, **shared)).metrics
        last = [found["zero_shot"], *found["after_task"]][-1]["test"]
        rows.append([name, last["auroc_macro"], *last["auroc_macro_ci"]])
    data = retune.load_radiographs(retune.Config(**shared))
    scores = {"linear probe, bare backbone": probe(base, data), "view alone (AP)": is_value(data.view, "AP"),
              "folder alone": is_value(data.part, data.part[-1])}  # fmt: skip
    test = data.where("test")
    for name, values in scores.items():
        values = np.broadcast_to(values, data.labels.shape)[test]
        auroc = retune.evaluate(values, values > 0.5, data.labels[test])["auroc_macro"]
        rows.append([name, auroc, *retune.bootstrap_ci(values, data.labels[test], data.patients[test])])
    retune.write_json(root / "xrays.json", rows)
    counts = f"{len(data.where('train')):,} training, {len(test):,} test images"
    table = retune.markdown_table([f"test macro AUROC, {counts}", "AUROC", "2.5%", "97.5%"], rows)
    return f"{table}\n\n{summary(metrics)}"


def is_value(column: Sequence[str], value: str) -> np.ndarray:
    """A score [N, 1] that knows one thing of an image."""
    return np.array([[entry == value] for entry in column], float)


def probe(base: Config, data: Radiographs) -> np.ndarray:
    """Probabilities [N, C] of a logistic regression per finding on the bare image embeddings; C by validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    images = np.array(embed(Side(load_backbones(base)), data, base, retune.pick_device(base.device)))
    train, val = data.where("train"), data.where("val")
    x = StandardScaler().fit(images[train]).transform(images)
    found = {}
    for strength in 10.0 ** np.arange(-5, 1):
        models = [
            LogisticRegression(C=strength, max_iter=2000).fit(x[train], y) for y in data.labels[train].T
        ]
        scores = np.stack([model.predict_proba(x)[:, 1] for model in models], 1)
        found[retune.evaluate(scores[val], scores[val] > 0.5, data.labels[val])["auroc_macro"]] = scores
    return found[max(found)]
