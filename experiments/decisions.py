"""Usable decisions (ours): per finding a temperature and a threshold, fitted on validation images alone.

`retune.run` calls `measure` at the end of a run. A finding's probability is sigmoid(logit / temperature); at
or above the threshold it is called present. F1 and exact match keep the paper's rule (cos+ > cos-).
"""

import numpy as np
from sklearn.metrics import roc_curve

import retune
from experiments.scores import fit_temperature, logits_of, resampled_rate


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
