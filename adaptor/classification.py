"""Classification on frozen embeddings, adapted and bare: the authors' head on 1%, 10%, 100% of the labels."""

import copy
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.config import Config
from adaptor.model import FEATURES, Adaptor
from retune import InputError, Radiographs, markdown_table


def nested_subsets(patients: Sequence[str], fractions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Rows of the first patients in a seeded order, per fraction: a smaller subset lies in every larger."""
    ids, patient = np.unique(np.asarray(patients), return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(ids))
    return [np.flatnonzero(place[patient] < max(1, round(fraction * len(ids)))) for fraction in fractions]


def labelled_rows(data: Radiographs, config: Config, repeat: int) -> dict[float, np.ndarray]:
    """The labelled training rows of each fraction in one repeat, for every downstream task."""
    train = data.where("train")
    subsets = nested_subsets(data.patients[train], config.fractions, config.seed + repeat)
    return {fraction: train[subset] for fraction, subset in zip(config.fractions, subsets)}


def labelled_shares(data: Radiographs, config: Config) -> list[str]:
    """The smallest labelled share that holds each image, first repeat; "" outside the training split."""
    share = np.full(len(data.images), "", object)
    for fraction, rows in sorted(labelled_rows(data, config, 0).items(), reverse=True):
        share[rows] = f"{fraction:g}"
    return share.tolist()


def build_head(dim: int, classes: int) -> nn.Sequential:
    """The authors' classification head. Theirs lets a batch's images attend to each other, an oversight."""
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(dim, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(),
                         nn.Dropout(0.1), nn.Linear(512, classes))  # fmt: skip


def train_head(features: torch.Tensor, labels: torch.Tensor, rows: dict, config: Config, seed: int) -> dict:
    """Train on rows["train"] of features [N, d] and labels [N, C], keep the best epoch on rows["val"],
    measure rows["test"]. AdamW, cosine restarts after 40% of the steps, as the authors."""
    key = "accuracy" if config.multiclass else "auroc_macro"
    best = -math.inf
    train = torch.from_numpy(rows["train"])
    with retune.seeded(seed):
        head = build_head(features.shape[1], labels.shape[1]).to(features.device)
        decay = config.head_weight_decay
        optimizer = torch.optim.AdamW(head.parameters(), config.head_lr, weight_decay=decay)
        period = max(1, int(0.4 * config.head_epochs * math.ceil(len(train) / config.head_batch)))
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, period, eta_min=1e-8)
        for epoch in range(config.head_epochs):
            head.train()
            for batch in train[torch.randperm(len(train))].split(config.head_batch):
                batch = batch.repeat(2) if len(batch) == 1 else batch  # batch norm needs two
                logits = head(features[batch])
                target = labels[batch].to(features.device)
                if config.multiclass:
                    loss = F.cross_entropy(logits, target.argmax(1))
                else:
                    loss = retune.prompt_contrastive_loss(logits, target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            value = measure_head(head, features, labels, rows["val"], config)[key]
            if epoch == 0 or value > best:
                best = value
                best_epoch = epoch
                best_state = copy.deepcopy(head.state_dict())
            if epoch - best_epoch >= config.patience:
                break
    head.load_state_dict(best_state)
    return measure_head(head, features, labels, rows["test"], config)


@torch.inference_mode()
def measure_head(head: nn.Module, features, labels, rows: np.ndarray, config: Config) -> dict:
    """retune's metrics of the head's outputs; multi-class: softmax scores, the largest is the prediction."""
    logits = head.eval()(features[torch.from_numpy(rows)]).cpu()
    scores = logits.softmax(1) if config.multiclass else logits.sigmoid()
    chosen = F.one_hot(scores.argmax(1), scores.shape[1]) if config.multiclass else scores > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without both labels would be named at every measurement
        return retune.evaluate(scores.numpy(), chosen.float().numpy(), labels[rows].numpy())


@torch.no_grad()
def embed_features(model: Adaptor, images: np.ndarray, dummy_text: torch.Tensor | None) -> dict:
    """Features [N, d] of each of FEATURES. dummy_text [d_text]: goes through the adaptor with each image."""
    found = {kind: [] for kind in FEATURES}
    for rows in torch.arange(len(images)).split(4096):
        x = retune.gather(images, rows, model.log_scale)
        for kind in FEATURES:
            found[kind].append(model.features(x, kind))
        if dummy_text is not None:
            found["adaptor"][-1] = F.normalize(model(x, dummy_text.to(x).expand(len(x), -1))[0], dim=-1)
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def classify(model: Adaptor, images: np.ndarray, data: Radiographs, config: Config, dummy_text=None) -> list:
    """The head on the frozen adaptor and on the bare backbone, for each labelled share and repeat."""
    file = config.folder / "classification.json"
    if file.exists():
        return retune.read_json(file)
    wrong = np.flatnonzero(np.nan_to_num(data.labels).sum(1) != 1)
    if config.multiclass and len(wrong):
        raise InputError(f"{data.rows[int(wrong[0])]}: --multiclass needs exactly one class of each image")
    features = embed_features(model.eval(), images, dummy_text)
    labels = torch.from_numpy(data.labels)
    results = []
    for repeat in retune.progress(range(config.repeats), desc="classification", unit="repeat"):
        for fraction, train in labelled_rows(data, config, repeat).items():
            rows = {"train": train, "val": data.where("val"), "test": data.where("test")}
            known = {"fraction": fraction, "repeat": repeat, "n": len(train)}
            for name in FEATURES:
                metrics = train_head(features[name], labels, rows, config, config.seed + repeat)
                results.append(known | {"features": name, "test": metrics})
    retune.write_json(file, results)
    return retune.read_json(file)


def probe(images: np.ndarray, data: Radiographs) -> list[list]:
    """Rows [what, test AUROC, 2.5%, 97.5%] of a linear probe on bare embeddings, and of the view alone."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = data.where("train")
    test = data.where("test")
    linear = LogisticRegressionCV(Cs=np.logspace(-5, 0, 6), scoring="roc_auc", max_iter=2000)
    model = make_pipeline(StandardScaler(), linear)
    probed = np.full((len(test), len(data.class_names)), 0.5)  # stays so where too little is known to learn
    for c, labels in enumerate(data.labels.T):
        known = train[~np.isnan(labels[train])]
        counts = np.bincount(labels[known].astype(int), minlength=2)
        if counts.min() > 0 and counts.max() >= 5:  # else scikit-learn cannot make its five folds
            probed[:, c] = model.fit(images[known], labels[known]).predict_proba(images[test])[:, 1]
    scores = {"linear probe, bare backbone": probed}
    for view in sorted(set(data.view or ()))[:-1]:
        alone = np.array([data.view[row] == view for row in test], float)
        scores[f"view alone ({view})"] = np.tile(alone[:, None], len(data.class_names))
    labels = data.labels[test]
    rows = []
    for name, values in scores.items():
        interval = retune.bootstrap_ci(values, labels, data.patients[test])
        rows.append([name, retune.evaluate(values, values > 0.5, labels)["auroc_macro"], *interval])
    return rows


def classification_table(results: Sequence[dict], multiclass: bool) -> str:
    """Accuracy if multi-class, else macro AUROC, per labelled share."""
    key = "accuracy" if multiclass else "auroc_macro"
    title = f"test {'accuracy' if multiclass else 'macro AUROC'}"
    return table_by_fraction(title, [result | {key: result["test"][key]} for result in results], key)


def table_by_fraction(title: str, results: Sequence[dict], key: str) -> str:
    """A line per labelled share: images, mean ± deviation of each kind of features, their difference."""
    rows = []
    for fraction in dict.fromkeys(r["fraction"] for r in results):
        group = [r for r in results if r["fraction"] == fraction]
        values = [np.array([r[key] for r in group if r["features"] == name], float) for name in FEATURES]
        images = np.mean([r["n"] for r in group])
        cells = map(mean_and_deviation, values)
        gain = (values[0] - values[1]).mean()
        rows.append([f"{fraction:.0%} of the labels", f"{images:,.0f}", *cells, f"{gain:+.3f}"])
    return markdown_table([title, "images", *FEATURES, "difference"], rows)


def mean_and_deviation(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values.mean():.3f}"
