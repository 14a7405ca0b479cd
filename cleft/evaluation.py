"""What a trained model is worth: zero-shot, linear probe, fine-tuning with nested shares of the labels."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import retune
from cleft import training
from cleft.captions import MAMMOGRAM_CLASSES, class_prompt
from cleft.config import Config
from cleft.data import load_batches, make_transform
from cleft.model import Cleft, Prompt
from retune import InputError, Radiographs


@dataclasses.dataclass(frozen=True)
class TestSet:
    """`data` with labels of some classes (exclusive: one is positive); test rows; training rows by share."""

    name: str
    data: Radiographs
    exclusive: bool
    rows: np.ndarray
    learn: dict[float, np.ndarray]


def make_test_sets(data: Radiographs, config: Config) -> list[TestSet]:
    """The test sets of a data set: multi-label, the whole test split; balanced, --balanced images a class
    with exactly one positive (EMBED: BI-RADS and density); 5x200. InputError when one lacks a class."""
    names = list(data.class_names)
    sets = []
    if config.data == "embed":
        density = [name for name in names if "density" in MAMMOGRAM_CLASSES[name]]
        groups = {"BI-RADS": [name for name in names if name not in density], "density": density}
    elif config.data == "chexpert-5x200":
        groups = {"5x200": names}
    else:
        groups = {"balanced": names}
        sets.append(make_test_set("multi-label", data, names, config))
    groups = {name: chosen for name, chosen in groups.items() if len(chosen) > 1 and config.balanced}
    return sets + [make_test_set(name, data, chosen, config) for name, chosen in groups.items()]


def make_test_set(name: str, whole: Radiographs, class_names: list[str], config: Config) -> TestSet:
    """One test set, exclusive unless it is the multi-label one."""
    exclusive = name != "multi-label"
    columns = [list(whole.class_names).index(class_name) for class_name in class_names]
    data = dataclasses.replace(whole, labels=whole.labels[:, columns], class_names=class_names)
    fit = data.labels.sum(1) == 1 if exclusive else ~np.isnan(data.labels).all(1)  # nan sums to nan
    rows = data.where("test")
    rows = rows[fit[rows]]
    if exclusive and name != "5x200":
        classes = [rows[data.labels[rows, c] == 1] for c in range(len(columns))]
        size = min(config.balanced * 5 // 2 if name == "density" else config.balanced, *map(len, classes))
        if size == 0:
            missing = class_names[list(map(len, classes)).index(0)]
            raise InputError(f"no test image has {missing} as its only finding; --balanced 0 skips that test")
        generator = np.random.default_rng(config.seed)
        rows = np.concatenate([generator.permutation(chosen)[:size] for chosen in classes])
    learn = {share: chosen[fit[chosen]] for share, chosen in fraction_rows(whole, config).items()}
    for share, chosen in learn.items():
        labels = data.labels[chosen]
        varied = ((labels == 1).any(0) & (labels == 0).any(0)).sum()  # classes with both labels
        if varied < (len(columns) if exclusive else 1):
            problem = f"{len(chosen)} training images lack a class of the {name} test; leave that share out"
            raise InputError(f"--fractions {share:g}: {problem}")
    return TestSet(name, data, exclusive, rows, learn)


def fraction_rows(data: Radiographs, config: Config) -> dict[float, np.ndarray]:
    """Training rows of each share of the training patients, nested and drawn by --seed. The first patient of
    each class comes first (ours): no share with as many patients as classes lacks a class."""
    rows = data.where("train")
    patients, owner = np.unique(data.patients[rows], return_inverse=True)
    order = np.random.default_rng((config.seed, 1)).permutation(len(patients))
    positive = data.labels[rows] == 1
    alone = positive & (data.labels[rows].sum(1) == 1)[:, None]  # which exclusive tests learn from
    place = np.argsort(order)[owner]  # of each row's patient
    held = np.where(alone.any(0), alone, positive).T
    front = [order[place[of_class].min()] for of_class in held if of_class.any()]
    place = np.argsort(list(dict.fromkeys([*front, *order])))[owner]
    return {share: rows[place < math.ceil(share * len(patients))] for share in sorted(config.fractions)}


def evaluate(model: Cleft, source: Path, data: Radiographs, config: Config) -> dict[str, dict]:
    """Every measure on every test set, written to --output; `source` (the model) may hold a context."""
    features = training.embed_features(model, data, config)  # by all ranks; the rest by one
    if retune.ranks()[0] > 0:
        return {}
    sets = make_test_sets(data, config)
    results = {}
    for test_set in sets:
        prefix = f"{test_set.name}, " if test_set.exclusive else ""
        for method, share, scores in score(model, source, features, test_set, config):
            name = f"{prefix}{method}" + ("" if share is None else f", {share * 100:g}% of the labels")
            results[name] = {"test": test_set.name, "fraction": share} | measure(scores, test_set)
    use = np.full(len(data.names), "", object)  # smallest share of the labels, or test sets
    for share, rows in reversed(fraction_rows(data, config).items()):
        use[rows] = f"{share:g}"
    for test_set in sets:
        use[test_set.rows] += f"{test_set.name} "
    retune.write_splits(config.folder / "splits.csv", data, "fraction or tests", map(str.strip, use))
    retune.write_json(config.folder / "evaluation.json", results)
    rows = []
    for name, found in results.items():
        rows.append([name, found["auroc_macro"], *found["auroc_macro_ci"], found.get("accuracy"), found["n"]])
    table = retune.markdown_table(["test", "AUROC", "from", "to (95%)", "accuracy", "images"], rows)
    retune.write_text(config.folder / "evaluation.md", table + "\n")
    retune.log(f"{table}\n\nwritten to {config.folder}")
    return results


def score(model: Cleft, source: Path, features: np.ndarray, test_set: TestSet, config: Config) -> Iterator:
    """(method, share of the labels or None, scores [n, C]) of every method on a test set."""
    images = model.scale * training.project(model, features, test_set.rows)  # [n, D]
    texts = model.encoder.encode_texts([class_prompt(name, config) for name in test_set.data.class_names])
    yield "zero-shot", None, (images @ nn.functional.normalize(texts, dim=1).T).cpu().numpy()
    prompt = Prompt(model, test_set.data.class_names, config)
    if training.load_checkpoint(source / "stage2.pt", prompt)["step"] == config.prompt_steps:
        yield "zero-shot, learned context", None, (images @ prompt().T).detach().cpu().numpy()
    for share, learn in test_set.learn.items():
        yield "linear probe", share, linear_probe(features, test_set, learn)
        if config.finetune_epochs:
            yield "full fine-tuning", share, finetune(model, test_set, learn, config)


def measure(scores: np.ndarray, test_set: TestSet) -> dict:
    """Measures of scores [n, C], with a patient-level interval of the macro AUROC: AUROC and average
    precision of each class; exclusive: of the softmax, and accuracy."""
    data = test_set.data
    labels = data.labels[test_set.rows]
    extra = {}
    if test_set.exclusive:
        scores = torch.from_numpy(scores).double().softmax(1).numpy()
        extra["accuracy"] = float((scores.argmax(1) == labels.argmax(1)).mean())
    extra["auroc_macro_ci"] = list(retune.bootstrap_ci(scores, labels, data.patients[test_set.rows]))
    found = retune.evaluate(scores, np.zeros_like(scores), labels, data.class_names)
    return {key: found[key] for key in ("auroc_macro", "ap_macro", "auroc", "n")} | extra


def linear_probe(features: np.ndarray, test_set: TestSet, learn: np.ndarray) -> np.ndarray:
    """Scores [n, C] of logistic regression on standardised features [N, W], multinomial or one a class."""
    labels = test_set.data.labels
    tested = np.array(features[test_set.rows])

    def fit(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return probe.fit(np.array(features[rows]), targets).decision_function(tested)

    if test_set.exclusive:
        scores = fit(learn, labels[learn].argmax(1))
        return np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores
    scores = np.zeros((len(tested), labels.shape[1]))
    for c, label in enumerate(labels.T):
        known = learn[~np.isnan(label[learn])]
        if len(np.unique(label[known])) == 2:
            scores[:, c] = fit(known, label[known])
    return scores


def finetune(model: Cleft, test_set: TestSet, learn: np.ndarray, config: Config) -> np.ndarray:
    """Scores [n, C] of a copy of the image tower with a linear classifier on its features, trained whole:
    softmax cross-entropy on exclusive sets, else binary. A share takes as many steps as all labels (ours)."""
    data = test_set.data
    device = model.log_scale.device
    classifier = copy.deepcopy(model.encoder.image)
    with retune.seeded(config.seed):
        classifier.head = nn.Linear(classifier.head[0].in_features, len(data.class_names))
    classifier.to(device).train().requires_grad_(True)
    size = min(config.batch_size, len(learn))
    steps = config.finetune_epochs * max(1, len(test_set.learn[max(test_set.learn)]) // config.batch_size)
    plain, varied = (make_transform(model.encoder, config, training=flag) for flag in (False, True))
    drawn = enumerate(training.batch_rows(learn, size, 0, steps, config.seed + 2), config.seed)
    batches = ((draw, batch.tolist()) for draw, batch in drawn)
    optimizer = training.make_adamw(classifier, config)
    stream = load_batches(data, varied, batches, config.workers)
    for step, (batch, pixels) in enumerate(retune.progress(stream, total=steps, desc="fine-tuning")):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, steps, config.lr, round(config.warmup * steps), 1e-8)
        labels = torch.from_numpy(data.labels[batch]).to(device)
        loss = nn.functional.cross_entropy if test_set.exclusive else retune.prompt_contrastive_loss
        optimizer.zero_grad()
        loss(classifier(pixels.to(device)), labels).backward()
        optimizer.step()
    tested = [(0, part.tolist()) for part in np.array_split(test_set.rows, len(test_set.rows) // 64 + 1)]
    stream = load_batches(data, plain, tested, config.workers)
    classifier.eval()
    with torch.inference_mode():
        return torch.cat([classifier(pixels.to(device)).cpu() for _, pixels in stream]).numpy()
