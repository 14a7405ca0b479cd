"""Usable decisions and calibration (ours): temperatures and thresholds, fitted on validation images alone.

A run ends with `measure`; `--predict` calls `add_decisions`. A finding's probability is
sigmoid(logit / temperature); at or above the threshold it is called present. F1 and exact match keep the
paper's rule (cos+ > cos-).
"""

import math

import numpy as np
import torch
from sklearn.metrics import roc_curve

import retune


def measure(config, folder, data, tasks, embeddings, bank, model) -> dict:
    """{"rule", "temperature", "threshold", "val", "test"}, each of the last four by finding.

    A finding whose known validation labels are all alike gets None: nothing can be fitted.
    """
    rows = {split: data.where(split) for split in ("val", "test")}
    logits = {split: logits_of(model, bank, embeddings, rows[split]) for split in rows}
    block = {"rule": config.threshold, "temperature": {}, "threshold": {}}
    for name, logit, label in zip(data.class_names, logits["val"].T, data.labels[rows["val"]].T):
        block["temperature"][name], block["threshold"][name] = fit_decision(logit, label, config.threshold)
    for split, chosen in rows.items():
        measured = rates(decide(logits[split], block), data.labels[chosen], data.patients[chosen])
        pairs = zip(block["threshold"].items(), measured)
        block[split] = {name: found for (name, threshold), found in pairs if threshold is not None}
    return block


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def fit_decision(logits: np.ndarray, labels: np.ndarray, rule: str) -> tuple[float | None, float | None]:
    """(temperature, threshold of the probability) from a finding's validation logits and labels, [n] each."""
    known = ~np.isnan(labels)
    if len(np.unique(labels[known])) < 2:
        return None, None
    temperature = fit_temperature(logits[known], labels[known])
    return temperature, choose_threshold(sigmoid(logits[known] / temperature), labels[known], rule)


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray, rule: str) -> float:
    """The threshold by a rule, half way between two values that occur; of equals the highest.

    youden: largest sensitivity + specificity - 1. f1: largest F1. sensitivity=S: the highest that reaches S.
    """
    false, sensitivity, cuts = roc_curve(labels, probabilities, drop_intermediate=False)
    positives = np.rint(sensitivity * labels.sum())
    negatives = np.rint(false * (1 - labels).sum())
    if rule == "youden":
        best = np.argmax(sensitivity[1:] - false[1:])
    elif rule == "f1":
        best = np.argmax(positives[1:] / (positives + negatives + labels.sum())[1:])
    else:
        best = np.argmax(sensitivity[1:] >= float(rule.removeprefix("sensitivity=")) - 1e-12)
    return float(np.append(cuts[1:], 0.0)[best : best + 2].mean())


def decide(logits: np.ndarray, block: dict) -> np.ndarray:
    """Decisions [n, C], bool, of logits [n, C]; where nothing was fitted, the threshold is one half."""
    defaults = {"temperature": 1.0, "threshold": 0.5}
    fitted = {key: [value or default for value in block[key].values()] for key, default in defaults.items()}
    return sigmoid(logits / fitted["temperature"]) >= fitted["threshold"]


def add_decisions(findings: dict[str, dict], logits: list[float], block: dict) -> None:
    """Add "probability" and "decision" to each finding [C] of a prediction, if they could be fitted."""
    for (name, finding), logit in zip(findings.items(), logits):
        if block["threshold"][name] is not None:
            probability = float(sigmoid(logit / block["temperature"][name]))
            finding["probability"] = round(probability, 6)
            finding["decision"] = probability >= block["threshold"][name]


def rates(present: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> list[dict]:
    """Sensitivity, specificity of decisions [n, C], with 95% intervals over patients; None if undefined."""
    results = [{} for _ in labels.T]
    for name, value in (("sensitivity", 1), ("specificity", 0)):
        for result, share in zip(results, resampled_rate(present == value, labels == value, patients).T):
            unknown = np.isnan(share[0])
            result[name] = None if unknown else share[0]
            result[f"{name}_ci"] = None if unknown else np.nanpercentile(share[1:], [2.5, 97.5]).tolist()
    return results


def summary(block: dict) -> str:
    """The decisions in a table of text."""
    rows = []
    for name, test in block["test"].items():
        cells = ["-" if test[key] is None
                 else "{:.3f} ({:.3f} to {:.3f})".format(test[key], *test[f"{key}_ci"])
                 for key in ("sensitivity", "specificity")]  # fmt: skip
        rows.append([name, f"{block['temperature'][name]:.3g}", block["threshold"][name], *cells])
    header = [f"{block['rule']} on validation (ours)", "temperature", "threshold"]
    return retune.markdown_table([*header, "test sensitivity", "test specificity"], rows)


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


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    """Expected calibration error and Brier score of sigmoid(logits / temperature), mean over classes.

    logits, labels: [N, C]. ECE: over 15 bins of equal width, the share of images times |mean probability -
    share of positives| (Guo et al. 2017, for the finding's probability). nan labels are left out; so is a
    class without a known label.
    """
    measured = []
    for logit, label in zip(logits.T, labels.T.astype(np.float64)):
        y = label[~np.isnan(label)]
        p = sigmoid(logit[~np.isnan(label)] / temperature)
        if len(y):
            gaps = np.bincount(np.minimum((p * 15).astype(int), 14), p - y, 15)
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
