"""Decisions one can use (ours): per finding a temperature and a threshold, fitted on validation images alone.

`retune.run` calls `measure` at the end of a run. The probability of a finding is sigmoid(logit / temperature), and
the finding is called present from the threshold on. Sensitivity and specificity on the test images tell what that is
worth; the paper's own rule (cos+ > cos-) stays the one of F1 and exact match.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import retune

RESAMPLES = 1000


def measure(config, data, tasks, embeddings, bank, model) -> dict:
    """{"rule", "temperature", "threshold", "val", "test"}, each of the last four by finding.

    A finding whose known validation labels are all alike gets null: nothing can be fitted.
    """
    rows = {split: data.where(split) for split in ("val", "test")}
    logits = {split: logits_of(model, bank, embeddings, rows[split]) for split in rows}
    block = {"rule": config.threshold, "temperature": {}, "threshold": {}, "val": {}, "test": {}}
    for c, name in enumerate(data.class_names):
        labels = data.labels[rows["val"], c]
        temperature, threshold = fit_decision(logits["val"][:, c], labels, config.threshold)
        block["temperature"][name] = temperature
        block["threshold"][name] = threshold
        for split in rows:
            block[split][name] = None
            if threshold is not None:
                present = sigmoid(logits[split][:, c] / temperature) >= threshold
                patients = data.patients[rows[split]]
                block[split][name] = rates(present, data.labels[rows[split], c], patients)
    return block


@torch.inference_mode()
def logits_of(model, bank, embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits [n, C], float64, of rows [n] of the embeddings [N, D]."""
    pieces = torch.from_numpy(rows).split(8192)
    images = (model.whitening(retune.gather(embeddings, piece, bank.embeddings)) for piece in pieces)
    return np.concatenate([retune.to_numpy(model.logits(x, bank)) for x in images]).astype(np.float64)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def fit_decision(logits: np.ndarray, labels: np.ndarray, rule: str) -> tuple[float | None, float | None]:
    """(temperature, threshold on the probability) from one finding's validation logits and labels, [n] each."""
    known = ~np.isnan(labels)
    logits = logits[known]
    labels = labels[known]
    if len(np.unique(labels)) < 2:
        return None, None
    temperature = fit_temperature(logits, labels)
    return temperature, choose_threshold(sigmoid(logits / temperature), labels, rule)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature from 0.001 to 1000 with the least cross-entropy; Guo et al., arXiv 1706.04599."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        z = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, z) - labels * z))

    bounds = (np.log(1e-3), np.log(1e3))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray, rule: str) -> float:
    """The threshold by a rule, half way between two values that occur; of equals the highest.

    youden: largest sensitivity + specificity - 1. f1: largest F1. sensitivity=S: the highest that reaches S.
    """
    values, place = np.unique(-probabilities, return_inverse=True)  # descending probabilities
    positives = np.cumsum(np.bincount(place, labels))  # true positives when cut below the k-th value
    negatives = np.cumsum(np.bincount(place, 1 - labels))
    sensitivity = positives / positives[-1]
    if rule == "youden":
        best = np.argmax(sensitivity - negatives / negatives[-1])
    elif rule == "f1":
        best = np.argmax(2 * positives / (positives + negatives + positives[-1]))
    else:
        best = np.argmax(sensitivity >= float(rule.removeprefix("sensitivity=")) - 1e-12)
    below = -values[best + 1] if best + 1 < len(values) else 0.0
    return float((-values[best] + below) / 2)


def rates(present: np.ndarray, labels: np.ndarray, patients: Sequence[str]) -> dict:
    """Sensitivity and specificity of decisions [n] with 95% intervals over patients, and the counts behind them."""
    known = ~np.isnan(labels)
    counts = count_patients(present[known], labels[known], np.asarray(patients)[known])
    drawn = resample(len(counts)) @ counts  # [R, 4]
    total = counts.sum(0)
    result = {"positives": int(total[1]), "negatives": int(total[3])}
    for name, hit, all_ in (("sensitivity", 0, 1), ("specificity", 2, 3)):
        result[name] = float(total[hit] / total[all_]) if total[all_] else None
        result[f"{name}_ci"] = interval(drawn[:, hit], drawn[:, all_])
    return result


def count_patients(present: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Per patient [P, 4]: true positives, positives, true negatives, negatives."""
    ids, patient = np.unique(patients, return_inverse=True)
    columns = (present & (labels == 1), labels == 1, ~present & (labels == 0), labels == 0)
    return np.stack([np.bincount(patient, column, len(ids)) for column in columns], axis=1)


def resample(n: int, seed: int = 0) -> np.ndarray:
    """How often each of n patients is drawn in each of the bootstrap's resamples, [R, n]."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / max(1, n)), RESAMPLES) if n else []
    return np.asarray(drawn, np.float64).reshape(RESAMPLES, n)


def interval(hits: np.ndarray, total: np.ndarray) -> list[float] | None:
    """95% interval of hits / total over the resamples [R] that have any."""
    if not (total > 0).any():
        return None
    return np.percentile(hits[total > 0] / total[total > 0], [2.5, 97.5]).tolist()


def summary(block: dict) -> str:
    """The decisions in a table of text."""
    rows = []
    for name, test in block["test"].items():
        cells = ["-"] * 4
        if test:
            cells = [f"{block['temperature'][name]:.3g}", f"{block['threshold'][name]:.3f}"]
            cells += [with_interval(test, key) for key in ("sensitivity", "specificity")]
        rows.append([name, *cells])
    header = [f"decisions ({block['rule']} on validation, ours)", "temperature", "threshold"]
    return retune.markdown_table([*header, "test sensitivity", "test specificity"], rows)


def with_interval(values: dict, name: str) -> str:
    """ "0.812 (0.745-0.866)"."""
    if values[name] is None:
        return "-"
    low, high = values[f"{name}_ci"]
    return f"{values[name]:.3f} ({low:.3f}-{high:.3f})"
