"""What a trained model is worth: zero-shot, linear probe and full fine-tuning with nested shares of the labels."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import retune
from cleft.captions import MAMMOGRAM_CLASSES, class_prompt
from cleft.config import Config
from cleft.data import load_batches, make_transform
from cleft.model import Cleft
from cleft.training import (
    batch_rows,
    class_prompts,
    embed_features,
    load_checkpoint,
    make_adamw,
    project,
    train,
)
from retune import InputError, Radiographs


@dataclass(frozen=True)
class TestSet:
    """Test `rows`, training rows `learn` for each share of the labels, label `columns`; exclusive: one is positive."""

    name: str
    columns: list[int]
    exclusive: bool
    rows: np.ndarray
    learn: dict[float, np.ndarray]


def make_test_sets(data: Radiographs, config: Config) -> list[TestSet]:
    """The test sets of a data set; InputError when one lacks a class, or a share of the labels does.

    multi-label: the whole test split. balanced: --balanced images a class with exactly one positive. EMBED has two
    balanced sets, BI-RADS and density; CheXpert-5x200 is the published one.
    """
    names, everything = list(data.class_names), list(range(len(data.class_names)))
    groups, exclusive = {"multi-label": everything, "balanced": everything}, {"balanced"}
    if config.data == "chexpert-5x200":
        groups, exclusive = {"5x200": everything}, {"5x200"}
    if config.data == "embed":
        density = [c for c in everything if "density" in MAMMOGRAM_CLASSES[names[c]]]
        groups = {"BI-RADS": [c for c in everything if c not in density], "density": density}
        exclusive = set(groups)
    shares, sets = fraction_rows(data, config.fractions, config.seed), []
    for name, columns in groups.items():
        if name in exclusive and (len(columns) < 2 or not config.balanced):
            continue
        rows = learnable(data, data.where("test"), columns, name in exclusive)
        if name in exclusive and name != "5x200":
            size = config.balanced * 5 // 2 if name == "density" else config.balanced
            rows = balanced_rows(data, rows, columns, size, config.seed)
        learn = {share: learnable(data, rows, columns, name in exclusive) for share, rows in shares.items()}
        for share, chosen in learn.items():
            labels = data.labels[np.ix_(chosen, columns)]
            varied = ((labels == 1).any(0) & (labels == 0).any(0)).sum()  # classes with both labels
            if varied < (len(columns) if name in exclusive else 1):
                problem = (
                    f"{len(chosen)} training images lack a class of the {name} test; leave that share out"
                )
                raise InputError(f"--fractions {share:g}: {problem}")
        sets.append(TestSet(name, columns, name in exclusive, rows, learn))
    return sets


def learnable(data: Radiographs, rows: np.ndarray, columns: list[int], exclusive: bool) -> np.ndarray:
    """Those of some rows that have a known label; exclusive: all labels known and exactly one positive."""
    labels = data.labels[np.ix_(rows, columns)]
    return rows[labels.sum(1) == 1 if exclusive else ~np.isnan(labels).all(1)]  # nan sums to nan


def balanced_rows(
    data: Radiographs, rows: np.ndarray, columns: list[int], size: int, seed: int
) -> np.ndarray:
    """`size` of some exclusive rows a class, or as many as the rarest class has."""
    label = data.labels[np.ix_(rows, columns)].argmax(1)
    counts = np.bincount(label, minlength=len(columns))
    if counts.min() == 0:
        name = data.class_names[columns[int(counts.argmin())]]
        raise InputError(f"no test image has {name} as its only finding; --balanced 0 leaves that test out")
    generator, size = np.random.default_rng(seed), min(size, int(counts.min()))
    return np.concatenate([generator.permutation(rows[label == c])[:size] for c in range(len(counts))])


def fraction_rows(data: Radiographs, fractions: Sequence[float], seed: int) -> dict[float, np.ndarray]:
    """Training rows of each share of the training patients, nested: a smaller share lies in every larger one.

    Patients are drawn by `seed`; the first patient of each class is moved to the front (ours), so that no share with
    as many patients as classes lacks a class.
    """
    rows = data.where("train")
    patients, owner = np.unique(data.patients[rows], return_inverse=True)
    order = np.random.default_rng((seed, 1)).permutation(len(patients))
    labels = data.labels[rows]
    alone = (labels == 1) & (labels.sum(1) == 1)[
        :, None
    ]  # as the only finding, which exclusive tests learn from
    held = np.where(alone.any(0), alone, labels == 1)
    place = np.argsort(order)[owner]  # of each row's patient
    front = [order[place[column].min()] for column in held.T if column.any()]
    place = np.argsort(list(dict.fromkeys([*front, *order])))[owner]
    return {share: rows[place < math.ceil(share * len(patients))] for share in sorted(fractions)}


def write_splits(config: Config, data: Radiographs, sets: list[TestSet]) -> None:
    """splits.csv: of each image its patient, its split, the smallest share that holds it or the test sets that do."""
    use: list[list[str]] = [[] for _ in data.names]
    for share, rows in fraction_rows(data, config.fractions, config.seed).items():
        for row in rows:
            use[row] = use[row] or [f"{share:g}"]
    for test_set in sets:
        for row in test_set.rows:
            use[row].append(test_set.name)
    retune.write_splits(config.folder / "splits.csv", data, "fraction or tests", map("; ".join, use))


def evaluate(model: Cleft, source: Path, data: Radiographs, config: Config) -> dict[str, dict]:
    """Every measure on every test set; writes evaluation.json and .md, splits.csv and balanced.csv to --output."""
    features = embed_features(model, data, config)  # by all ranks; the rest by one
    if retune.ranks()[0] > 0:
        return {}
    texts = class_texts(model, source, data, config)
    sets, results = make_test_sets(data, config), {}
    for test_set in sets:
        prefix = "" if test_set.name == "multi-label" else f"{test_set.name}, "
        for method, share, scores in score(model, texts, features, data, test_set, config):
            name = f"{prefix}{method}" + ("" if share is None else f", {share * 100:g}% of the labels")
            about = {"test": test_set.name, "method": method, "fraction": share}
            results[name] = about | measure(scores, data, test_set)
    write_splits(config, data, sets)
    retune.write_json(config.folder / "evaluation.json", results)
    header = ["test", "AUROC", "95% interval", "accuracy", "images"]
    table = []
    for name, r in results.items():
        interval = "-".join("-" if value is None else f"{value:.3f}" for value in r["auroc_macro_ci"])
        table.append([name, r["auroc_macro"], interval, r.get("accuracy"), r["n"]])
    table = retune.markdown_table(header, table)
    retune.write_text(config.folder / "evaluation.md", table + "\n")
    retune.log(f"{table}\n\nwritten to {config.folder}")
    return results


def class_texts(model: Cleft, source: Path, data: Radiographs, config: Config) -> dict[str, Tensor]:
    """Unit vectors [C, D] of the class prompts, and of the context that stage 2 learned if it is finished."""
    texts = model.encoder.encode_texts([class_prompt(name, config) for name in data.class_names])
    found = {"zero-shot": F.normalize(texts, dim=1).to(model.log_scale.device)}
    prompt = class_prompts(model, data, config)
    if load_checkpoint(source / "stage2.pt", prompt)["step"] == config.prompt_steps:
        with torch.inference_mode():
            found["zero-shot, learned context"] = prompt()
    else:
        retune.log("stage 2 is not finished: no learned context is evaluated")
    return found


def score(
    model: Cleft, texts: dict[str, Tensor], features: np.ndarray, data: Radiographs, test_set: TestSet, config: Config
) -> Iterator[tuple[str, float | None, np.ndarray]]:  # fmt: skip
    """(method, share of the labels or None, scores [n, C]) of every method on a test set."""
    images = project(model, features, test_set.rows)
    for name, vectors in texts.items():
        yield name, None, (model.scale * images @ vectors[test_set.columns].T).cpu().numpy()
    for share, learn in test_set.learn.items():
        yield "linear probe", share, linear_probe(features, data, test_set, learn)
        if config.finetune_epochs:
            yield "full fine-tuning", share, finetune(model, data, test_set, learn, config)


def measure(scores: np.ndarray, data: Radiographs, test_set: TestSet) -> dict:
    """Measures of scores [n, C] on a test set, with a patient-level interval of the macro AUROC.

    multi-label: AUROC and average precision of each class. exclusive: of the softmax, accuracy and one-vs-rest AUROC.
    """
    labels, extra = data.labels[np.ix_(test_set.rows, test_set.columns)], {}
    if test_set.exclusive:
        scores = torch.from_numpy(scores).double().softmax(1).numpy()
        extra = {"accuracy": float((scores.argmax(1) == labels.argmax(1)).mean())}
    found = retune.evaluate(
        scores, np.zeros_like(scores), labels, [data.class_names[c] for c in test_set.columns]
    )
    interval = retune.bootstrap_ci(scores, labels, data.patients[test_set.rows])
    kept = {key: found[key] for key in ("auroc_macro", "ap_macro", "auroc", "n")}
    return kept | extra | {"auroc_macro_ci": list(interval)}


def linear_probe(features: np.ndarray, data: Radiographs, test_set: TestSet, learn: np.ndarray) -> np.ndarray:
    """Scores [n, C] of logistic regression on standardised frozen features [N, W], learned on rows `learn`.

    exclusive: one multinomial regression; multi-label: one regression a class.
    """
    labels, tested = data.labels[np.ix_(learn, test_set.columns)], np.array(features[test_set.rows])

    def fit(known: np.ndarray, targets: np.ndarray) -> np.ndarray:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return probe.fit(np.array(features[learn[known]]), targets[known]).decision_function(tested)

    if test_set.exclusive:
        scores = fit(np.full(len(learn), True), labels.argmax(1))
        return np.stack([np.zeros_like(scores), scores], axis=1) if scores.ndim == 1 else scores
    scores = np.zeros((len(test_set.rows), len(test_set.columns)))
    for c, column in enumerate(labels.T):
        known = ~np.isnan(column)
        if len(np.unique(column[known])) == 2:
            scores[:, c] = fit(known, column)
    return scores


def finetune(
    model: Cleft, data: Radiographs, test_set: TestSet, learn: np.ndarray, config: Config
) -> np.ndarray:
    """Scores [n, C] of a copy of the image tower with a linear classifier on its features, trained whole.

    Softmax cross-entropy on exclusive sets, else binary cross-entropy. A share of the labels takes as many steps as
    all of them (ours), so that shares differ in their images alone.
    """
    classifier, device = copy.deepcopy(model.encoder.image), model.log_scale.device
    with retune.seeded(config.seed):
        classifier.head = nn.Linear(classifier.head[0].in_features, len(test_set.columns))
    classifier.to(device).train().requires_grad_(True)
    size = min(config.batch_size, len(learn))
    steps = config.finetune_epochs * max(1, len(test_set.learn[max(test_set.learn)]) // config.batch_size)

    def batches(first: int) -> Iterator[tuple[list[int], Tensor]]:
        rows = enumerate(batch_rows(learn, size, first, steps, config.seed + 2), first)
        draws = ((config.seed + step, batch.tolist()) for step, batch in rows)
        return load_batches(data, make_transform(model.encoder, config, training=True), draws, config.workers)

    def compute(step: int, batch: tuple[list[int], Tensor]) -> Tensor:
        logits = classifier(batch[1].to(device))
        labels = torch.from_numpy(data.labels[np.ix_(batch[0], test_set.columns)]).to(device)
        measure = F.cross_entropy if test_set.exclusive else retune.prompt_contrastive_loss
        loss = measure(logits, labels)
        loss.backward()
        return loss.detach()

    rates = (config.lr, round(config.warmup * steps), 1e-8)
    optimizer = make_adamw(classifier, config)
    train(classifier, optimizer, compute, batches, path=None, steps=steps, rates=rates, save_every=steps)
    tested = [(0, part.tolist()) for part in np.array_split(test_set.rows, len(test_set.rows) // 64 + 1)]
    stream = load_batches(data, make_transform(model.encoder, config, training=False), tested, config.workers)
    with torch.inference_mode():
        return torch.cat([classifier(pixels.to(device)).cpu() for _, pixels in stream]).numpy()
