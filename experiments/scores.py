"""What only a run's scores tell: intervals by patient and calibration, computed once from saved adaptors."""

import functools
import math
from pathlib import Path

import numpy as np
import torch

import retune

STEP = 1e-4  # resampled AUROCs are stored as whole multiples of it
DATA_AND_ENCODER = (
    "data", "data_dir", "labels_csv", "classes", "view", "uncertain", "blank", "size", "demo_images",
    "skip_bad_images", "encoder", "encoder_dir", "crop", "precision", "encode_batch", "workers", "cache_dir",
    "device")  # fmt: skip


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
    data.split[list(retune.embedding_facts(embeddings)["unreadable"])] = "unreadable"
    return data, encoder, embeddings


def load_run(folder: Path) -> tuple:
    """(settings, data, embeddings [N, D], prompt bank, model) of a finished run, on the CPU."""
    settings = retune.read_json(folder / "metrics.json")["config"]
    data, encoder, embeddings = load_inputs(settings)
    bank = retune.embed_prompts(encoder, settings["prompt_texts"])
    named = retune.Config(method=settings["method"])
    model, _ = retune.load_model(folder / "adaptors.safetensors", named)
    return settings, data, embeddings, bank, model


def score_facts(folder: Path) -> dict:
    """{"resampled": [R] macro AUROC on test, in STEPs, "calibration": {...}}; stored in the run's folder.

    Every run of a data set has the same resamples, so that differences between runs are paired.
    """
    path = folder / "scores.json"
    if path.exists() and path.stat().st_mtime >= (folder / "metrics.json").stat().st_mtime:
        return retune.read_json(path)
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


def resampled_rate(hit: np.ndarray, of: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The share of the images `of` [N, C] that are `hit` [N, C]: [1 + R, C], as it is and on each resample.

    nan where there is no such image.
    """
    ids, patient = np.unique(patients, return_inverse=True)
    counts = np.zeros((2, len(ids), hit.shape[1]))
    np.add.at(counts, (slice(None), patient), np.stack([hit & of, of]))
    weight = np.vstack([np.ones(len(ids)), retune.draw_patients(len(ids))])
    hits, total = weight @ counts
    return np.where(total > 0, hits / np.maximum(total, 1), np.nan)


@torch.inference_mode()
def logits_of(model, bank, embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits [n, C], float64, of rows [n] of the embeddings [N, D]."""
    pieces = torch.from_numpy(rows).split(8192)
    images = (model.whitening(retune.gather(embeddings, piece, bank.embeddings)) for piece in pieces)
    return np.concatenate([retune.to_numpy(model.logits(x, bank)) for x in images]).astype(np.float64)


def calibration(model: torch.nn.Module, data, embeddings: np.ndarray, bank) -> dict[str, float]:
    """Temperature fitted on validation; ECE and Brier score on test before and after it."""
    rows = {split: data.where(split) for split in ("val", "test")}
    logits = {split: logits_of(model, bank, embeddings, chosen) for split, chosen in rows.items()}
    facts = {"temperature": fit_temperature(logits["val"], data.labels[rows["val"]])}
    for when, temperature in (("before", 1.0), ("after", facts["temperature"])):
        found = reliability(logits["test"], data.labels[rows["test"]], temperature)
        facts |= {f"{name}_{when}": value for name, value in found.items()}
    return facts


def reliability(
    logits: np.ndarray, labels: np.ndarray, temperature: float, bins: int = 15
) -> dict[str, float]:
    """Expected calibration error and Brier score of sigmoid(logits / temperature), mean over classes.

    logits, labels: [N, C]. ECE: over bins of equal width, the share of images times |mean probability - share
    of positives| (Guo et al. 2017, for the finding's probability). nan labels are left out; so is a class
    without a known label.
    """
    measured = []
    for logit, label in zip(logits.T, labels.T.astype(np.float64)):
        y = label[~np.isnan(label)]
        p = 1 / (1 + np.exp(-logit[~np.isnan(label)] / temperature))
        if len(y):
            index = np.minimum((p * bins).astype(int), bins - 1)
            gaps = np.bincount(index, p - y, bins)
            measured.append([np.abs(gaps).sum() / len(y), np.mean((p - y) ** 2)])
    return dict(zip(("ece", "brier"), np.mean(measured, axis=0).tolist()))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in [1e-3, 1e3] with the lowest cross-entropy; found to 1e-3 of its logarithm."""
    from scipy.optimize import minimize_scalar

    known = ~np.isnan(labels)

    def loss(log_temperature: float) -> float:
        x = logits[known] / math.exp(log_temperature)
        return np.mean(np.logaddexp(0, x) - labels[known] * x)

    return math.exp(minimize_scalar(loss, bounds=(-6.9, 6.9), method="bounded", options={"xatol": 1e-3}).x)
