"""Finished runs as a pandas table, a row per run with settings and metrics; and how tables choose from it.

What only a run's scores tell, intervals by patient and calibration, is computed once from its saved adaptors.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pandas as pd

import retune
from experiments.decisions import calibration
from retune import InputError, read_json, write_text

STEP = 1e-4  # resampled AUROCs are stored as whole multiples of it
DATA_AND_ENCODER = (
    "data", "data_dir", "labels_csv", "classes", "view", "uncertain", "blank", "size", "demo_images",
    "skip_bad_images", "encoder", "encoder_dir", "crop", "precision", "encode_batch", "workers", "cache_dir",
    "device")  # fmt: skip
# Settings that tables vary, as the paper has them.
REFERENCE = {
    "method": "retune", "set": "", "whiten": False, "adaptor": "mlp", "adapt": "both", "pool": "mean",
    "negatives": True, "score": "diff", "wording": "specific", "logit_scale": 1.0, "order": ""}  # fmt: skip
SCENARIOS = {
    "class-incremental": {"scenario": "class"},
    "label-incremental": {"scenario": "label"},
    "data, 5 parts": {"scenario": "data", "parts": 5},
    "data, 10 parts": {"scenario": "data", "parts": 10},
    "data, 20 parts": {"scenario": "data", "parts": 20},
    "joint": {"scenario": "joint"},
}
BASIC = ("joint", "class-incremental", "label-incremental", "data, 5 parts")
NAMES = {  # of a method with what --set gave it
    "retune": "RE-tune",
    "distil": "RE-tune, residual, distilled (ours)",
    "analytic": "closed-form RE-tune (ours), M = 300",
    "analytic features=1000": "closed-form RE-tune (ours), M = 1,000",
    "analytic features=1000 shared=0": "closed-form RE-tune (ours), M = 1,000, lambda per finding",
    "analytic features=0": "closed-form RE-tune (ours), linear",
    "analytic related=1": "closed-form RE-tune (ours), M = 300, related findings",
    "linear": "linear head", "mlp": "MLP head", "ewc": "MLP head, EWC", "lwf": "MLP head, LwF",
    "replay": "MLP head, replay of 500 images", "joint": "MLP head, all data", "ncm": "NCM", "slda": "SLDA",
    "l3a": "L3A", "l3a features=1000": "L3A, M = 1,000", "ranpac": "RanPAC",
    "ranpac zero_shot=1": "RanPAC, zero-shot for unseen",
    "ranpac features=1000 zero_shot=1": "RanPAC, M = 1,000, zero-shot for unseen"}  # fmt: skip
BOUND = "joint"  # keeps the data of every patient
OPPONENTS = [{"method": method, "set": "", "whiten": True} for method in ("lwf", "ewc")]  # chosen beforehand
METHOD = ("method", "set", "whiten")  # the settings that make a method
QUALITY = {
    "auroc_macro": "AUROC macro", "auroc_weighted": "AUROC weighted", "f1_macro": "F1 macro",
    "f1_weighted": "F1 weighted", "precision_weighted": "precision", "recall_weighted": "recall",
    "accuracy": "exact match", "ap_macro": "average precision"}  # fmt: skip
LAST = "last.auroc_macro"


def load_inputs(settings: dict) -> tuple:
    """(data, encoder, embeddings [N, D]) of a run with these settings; the last ones stay in memory."""
    shared = {key: settings[key] for key in DATA_AND_ENCODER}
    shared = {key: tuple(value) if isinstance(value, list) else value for key, value in shared.items()}
    return embed_once(retune.Config(**shared))


@functools.lru_cache(maxsize=1)
def embed_once(config: retune.Config) -> tuple:
    data = retune.load_radiographs(config)
    encoder = retune.DualEncoder.load(config.encoder, config.encoder_dir, config.crop)
    embeddings = retune.embed(
        encoder, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
        precision=config.precision, device=retune.pick_device(config.device),
        skip_bad_images=config.skip_bad_images)  # fmt: skip
    return data, encoder, embeddings


def load_run(folder: Path) -> tuple:
    """(settings, data, embeddings [N, D], prompt bank, model) of a finished run, on the CPU.

    InputError when its data, encoder or embeddings are no longer those that it was trained on.
    """
    settings = read_json(folder / "config.json")
    data, encoder, embeddings = load_inputs(settings)
    facts = retune.embedding_facts(embeddings)
    today = {"data_fingerprint": retune.data_fingerprint(data), "encoder_fingerprint": encoder.fingerprint()}
    today["embeddings_sha256"] = facts["sha256"]
    if changed := [key.partition("_")[0] for key, value in today.items() if settings.get(key) != value]:
        raise InputError(f"{folder}: changed since the run: {', '.join(changed)}; restore or run again")
    data = dataclasses.replace(data, split=data.split.copy())  # other runs share `data`
    data.split[list(facts["unreadable"])] = "unreadable"
    bank = retune.embed_prompts(encoder, settings["prompt_texts"])
    model, _ = retune.load_model(folder / "adaptors.safetensors", retune.Config(method=settings["method"]))
    return settings, data, embeddings, bank, model


def score_facts(folder: Path) -> dict:
    """{"resampled": [R] macro AUROC on test, in STEPs, "calibration": {...}}; stored in the run's folder.

    Every run of a data set has the same resamples, so that differences between runs are paired.
    """
    path = folder / "scores.json"
    if path.exists() and path.stat().st_mtime >= (folder / "metrics.json").stat().st_mtime:
        return read_json(path)
    settings, data, embeddings, bank, model = load_run(folder)
    test = data.where("test")
    scores, _ = retune.score_rows(model, bank, embeddings, test, settings["score"])
    auroc = retune.bootstrap_auroc(scores, data.labels[test], data.patients[test])
    plain = {"adapt": "none", "pool": settings["pool"], "negatives": settings["negatives"]}
    models = {"model": model, "zero_shot": retune.RETune(embeddings.shape[1], **plain)}
    measured = {name: calibration(scorer, data, embeddings, bank) for name, scorer in models.items()}
    facts = {"resampled": np.round(auroc / STEP).astype(int).tolist(), "calibration": measured}
    retune.write_json(path, facts)
    return facts


def collect(folder: Path) -> pd.DataFrame:
    """A row for every finished run below `folder`: settings, facts, metrics and the resampled AUROC.

    InputError when there is none, or when they differ in data or encoder, whose numbers no table may mix.
    """
    paths = sorted(folder.rglob("metrics.json"))
    if not paths:
        raise InputError(f"{folder}: no finished run (no metrics.json); start them with run_experiments.sh")
    runs = pd.DataFrame([run_row(path, folder) for path in retune.progress(paths, desc="runs")])
    for kind in ("data_fingerprint", "encoder_fingerprint"):
        if runs[kind].nunique() > 1:
            raise InputError(f"{folder}: its runs differ in {kind}; use one folder for each")
    return runs


def run_row(path: Path, folder: Path) -> dict:
    """The row of the run whose metrics.json is at `path`."""
    metrics = read_json(path)
    config = metrics["config"]
    settings = (*REFERENCE, "scenario", "seed", "lr", "data", "data_fingerprint", "encoder_fingerprint")
    row = {"run": path.parent.relative_to(folder).as_posix()} | {key: config.get(key) for key in settings}
    row |= {
        "set": " ".join(config["set"] or ()), "order": " > ".join(config["class_order"] or ()),
        "parts": len(metrics["tasks"]), "encoder": Path(config["encoder"]).name,
        "classes": ", ".join(metrics["classes"]),
        "train_n": sum(task["n_train"] for task in metrics["tasks"]),
        "val_n": metrics["zero_shot"]["val"]["n"], "test_n": metrics["zero_shot"]["test"]["n"]}  # fmt: skip
    scores = score_facts(path.parent)
    last = [metrics["zero_shot"], *metrics["after_task"]][-1]
    stages = {"zero": metrics["zero_shot"]["test"], "last": last["test"]}
    measured = {stage: {key: found[key] for key in QUALITY} for stage, found in stages.items()}
    measured["last"]["val_auroc_macro"] = last["val"]["auroc_macro"]
    measured |= {kind: metrics[kind] for kind in ("continual", "cost")} | scores["calibration"]
    row |= {f"{kind}.{key}": value for kind, found in measured.items() for key, value in found.items()}
    row["cost.share_of_encoder"] = row["cost.trainable_parameters"] / row["cost.encoder_parameters"]
    row["cost.stored_a_patient"] = row["cost.stored_bytes"] / row["cost.train_patients"]
    return row | {"resampled": np.array(scores["resampled"], np.uint16)}


def write_runs(runs: pd.DataFrame, folder: Path) -> None:
    """Write `runs.csv`, and `bootstrap.npz`: "auroc", uint16 [runs, resamples], in STEPs."""
    write_text(folder / "runs.csv", runs.drop(columns="resampled").to_csv(index=False, float_format="%.9g"))
    with retune.atomic(folder / "bootstrap.npz") as partial, open(partial, "wb") as file:
        np.savez_compressed(file, auroc=np.stack(runs["resampled"]))


def read_runs(folder: Path) -> pd.DataFrame:
    """What `write_runs` wrote; numbers have nine digits."""
    runs = pd.read_csv(folder / "runs.csv", dtype={"set": str, "order": str})
    resampled = np.load(folder / "bootstrap.npz", allow_pickle=False)["auroc"]
    return runs.assign(**runs[["set", "order"]].fillna(""), resampled=list(resampled))


def pick(runs: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The runs with the wanted settings, else those of REFERENCE; `order=None` is any random order."""
    for key, value in (REFERENCE | wanted).items():
        runs = runs[runs[key] != "" if value is None else runs[key] == value]
    return runs


def scenarios(runs: pd.DataFrame) -> dict[str, dict]:
    """Those of SCENARIOS that RE-tune was run in."""
    return {name: where for name, where in SCENARIOS.items() if len(pick(runs, **where))}


def lead(first: pd.DataFrame, second: pd.DataFrame | None = None) -> tuple[float, float, float]:
    """(difference, low, high) of mean macro AUROC, two sets of runs or one alone: 95%, resampled in pairs."""
    value = first[LAST].mean()
    resampled = np.stack(first["resampled"]).mean(0) * STEP
    if second is not None:
        value -= second[LAST].mean()
        resampled = resampled - np.stack(second["resampled"]).mean(0) * STEP
    return value, *np.percentile(resampled, [2.5, 97.5])


def variants(runs: pd.DataFrame) -> list[dict]:
    """Every method with its options, whitened and not, by class-incremental AUROC; the bound last."""
    rest = {key: value for key, value in REFERENCE.items() if key not in METHOD} | {"scenario": "class"}
    chosen = runs[(runs[list(rest)] == pd.Series(rest)).all(axis=1)]
    means = chosen.groupby(list(METHOD))[LAST].mean().sort_values(ascending=False)
    return sorted((dict(zip(METHOD, key)) for key in means.index), key=lambda v: v["method"] == BOUND)


def labels_of(variant: dict) -> tuple[str, str]:
    """(name, whitened?) of a method, as tables call it."""
    key = f"{variant['method']} {variant['set']}".strip()
    built_in = variant["method"] in ("distil", "analytic")
    return NAMES.get(key, key), "built in" if built_in else "yes" if variant["whiten"] else "no"


def full_name(variant: dict) -> str:
    name, whitened = labels_of(variant)
    return f"{name}, whitened" if whitened == "yes" else name
