"""What a trained model is worth: zero-shot, linear probe, full fine-tuning, on every test set of a data set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import retune
from cleft.captions import class_prompt
from cleft.config import Config
from cleft.images import Pixels, load_pixels, plain_transform, training_transform
from cleft.model import Cleft
from cleft.testsets import TestSet, make_test_sets, write_splits
from cleft.training import (
    batch_rows,
    class_prompts,
    embed_features,
    load_checkpoint,
    make_adamw,
    project,
    train,
)
from retune import Radiographs


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
    images = Pixels(data, learn, training_transform(model.encoder, config), config)

    def batches(first: int) -> Iterator[tuple[list[int], Tensor]]:
        rows = [batch.tolist() for batch in batch_rows(learn, size, first, steps, config.seed + 2)]
        keys = ([(row, config.seed + step) for row in batch] for step, batch in enumerate(rows, first))
        return zip(rows, load_pixels(images, keys, config.workers), strict=True)

    def compute(step: int, batch: tuple[list[int], Tensor]) -> Tensor:
        logits = classifier(batch[1].to(device))
        labels = torch.from_numpy(data.labels[np.ix_(batch[0], test_set.columns)]).to(device)
        exclusive = test_set.exclusive
        loss = (
            F.cross_entropy(logits, labels) if exclusive else retune.prompt_contrastive_loss(logits, labels)
        )
        loss.backward()
        return loss.detach()

    rates = (config.lr, round(config.warmup * steps), 1e-8)
    optimizer = make_adamw(classifier, config)
    train(classifier, optimizer, compute, batches, path=None, steps=steps, rates=rates, save_every=steps)
    images = Pixels(data, test_set.rows, plain_transform(model.encoder, config), config)
    keys = [
        [(row, 0) for row in part.tolist()]
        for part in np.array_split(test_set.rows, len(test_set.rows) // 64 + 1)
    ]
    with torch.inference_mode():
        return torch.cat(
            [classifier(p.to(device)).cpu() for p in load_pixels(images, keys, config.workers)]
        ).numpy()
