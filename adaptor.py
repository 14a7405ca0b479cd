"""Adaptor: aligns two frozen encoders that never met, an image encoder and a text encoder, with one light
module.

The method is here: settings, the module and its loss, pre-training and retrieval, export, the run. The frozen
towers are in `unimodal.py`, texts in `reports.py`, the downstream tasks in `classification.py` and
`segmentation.py`; data, embedding, metrics and files come from `retune.py`.

    python adaptor.py                                                    # embedded demo, no download
    python adaptor.py --data mimic --data-dir MIMIC-CXR-JPG --image-encoder facebook/dinov2-base \\
                      --text-encoder emilyalsentzer/Bio_ClinicalBERT      # your data, any encoders
    python adaptor.py --export pair && python retune.py --encoder pair --scenario class

Reference: "Freeze the backbones: A Parameter-Efficient Contrastive Approach to Robust Medical Vision-Language
Pre-training", arXiv 2401.01179, ICASSP 2024. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from reports import embed_texts, make_texts
from retune import DualEncoder, InputError, Radiographs, markdown_table, ranks, read_rows, say, setting
from unimodal import Side, embed, load_backbones

# ------------------------------------------------------------------------------------------------ 1. Settings


def same(name: str):
    """A field that is retune's, with its default, help and choices."""
    original = retune.Config.__dataclass_fields__[name]
    return field(default=original.default, metadata=original.metadata)


DATA = ("data", "data_dir", "labels_csv", "classes", "view", "uncertain", "blank", "size", "demo_images")
MASKED = ("siim", "rsna")  # data sets that bring masks; read by segmentation.py


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from it. What is None here is settled by the data."""

    # fmt: off
    data: str = setting("demo", "data set", choices=(*retune.DATASETS, *MASKED), group="data")
    data_dir: str | None = same("data_dir")
    labels_csv: str | None = same("labels_csv")
    classes: tuple[str, ...] | None = same("classes")
    view: str = same("view")
    uncertain: str = same("uncertain")
    blank: str | None = same("blank")
    size: int = same("size")
    demo_images: int = setting(12000, "number of phantoms in the demo")
    skip_bad_images: bool = same("skip_bad_images")
    texts: str = setting("auto", "reports, or captions from labels", choices=("auto", "reports", "labels"))
    reports_dir: str | None = setting(None, "folder of MIMIC-CXR's reports (default: --data-dir)")
    skip_unpaired: bool = setting(False, "leave images without a report out of the pairs")

    image_encoder: str = setting("demo", "demo, folder, hub id, torchvision:NAME[=FILE]", group="encoders")
    text_encoder: str = setting("demo", "demo, a folder, a transformers id")
    image_pool: str | None = setting(None, "tokens: cls; maps: mean", choices=("cls", "mean", "pooler"))
    text_pool: str | None = setting(None, "authors: cls", choices=("cls", "mean", "last", "pooler"))
    precision: str = same("precision")
    store: str = same("store")
    encode_batch: int = same("encode_batch")
    workers: int = same("workers")
    cache_dir: str = same("cache_dir")

    width: int | None = setting(None, "width (authors: 768; small sets: 256)", type=int, group="pre-training")
    layers: int = setting(2, "transformer layers")
    standardise: str | None = setting(None, "by training mean and deviation (authors: no; small sets: yes)",
                                      choices=("yes", "no"))
    heads: int | None = setting(None, "attention heads (authors: 12; small sets: 8)", type=int)
    feedforward: int | None = setting(None, "feed-forward width (authors: 2048; small sets: 512)", type=int)
    dropout: float = setting(0.1, "dropout")
    image_weight: float = setting(0.75, "weight of the image-to-text loss; the other way has the rest")
    epochs: int | None = setting(None, "epochs (authors: 50; small sets: 20)", type=int)
    lr: float | None = setting(None, "learning rate (authors: 2e-5; small sets: 5e-4)", type=float)
    batch_size: int | None = setting(None, "batch size (authors: 1024; small sets: 256)", type=int)
    weight_decay: float = setting(0.01, "weight decay")
    pretrained: str | None = setting(None, "an earlier run's folder: its adaptor instead of pre-training")

    stages: tuple[str, ...] | None = setting(None, "what to measure (all the data allow)", nargs="+",
                                             choices=("retrieval", "classification", "segmentation"),
                                             group="downstream")
    fractions: tuple[float, ...] | None = setting(None, "labelled shares (0.01 0.1 1)", nargs="+", type=float)
    repeats: int = setting(3, "labelled subsets per share, for mean and standard deviation")
    multiclass: bool = setting(False, "each image has exactly one class (COVIDx): softmax and accuracy")
    head_steps: int = setting(400, "training steps of a classification head")
    mask_epochs: int = setting(16, "training epochs of a segmentation decoder")
    mask_images: int | None = setting(None, "most images to segment (demo: 1000)", type=int)
    decoder_width: int | None = setting(None, "decoder channels (authors: 512; small sets: 64)", type=int)

    export: str | None = setting(None, "new folder for the aligned pair (retune.py --encoder)", group="run")
    seed: int = setting(42, "seed")
    device: str = same("device")
    output: str | None = setting(None, "folder of the run (default: runs/adaptor-DATA-ENCODERS-seedSEED)")
    # fmt: on

    def __post_init__(self):
        positive = (
            "epochs batch_size width heads feedforward layers demo_images repeats head_steps mask_epochs"
        )
        for name in f"{positive} mask_images decoder_width encode_batch lr".split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value} must be positive")
        if self.workers < 0:
            raise InputError(f"--workers {self.workers} must not be negative")
        if self.seed < 0 or not 0 <= self.image_weight <= 1 or not 0 <= self.dropout < 1:
            raise InputError("--seed must not be negative; --image-weight must be in 0..1, --dropout in 0..1")
        if bad := [f for f in self.fractions or () if not 0 < f <= 1]:
            raise InputError(f"--fractions {bad[0]} must be above 0 and at most 1")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        names = [Path(name.split("=")[0]).name for name in (self.image_encoder, self.text_encoder)]
        name = f"adaptor-{self.data}-{'-'.join(names)}-seed{self.seed}".replace(":", "-")
        return Path(self.output or f"runs/{name}")


# arXiv 2401.01179; (ours) SMALL, for sets on which the authors' schedule would take a few hundred steps
AUTHORS = {"epochs": 50, "lr": 2e-5, "batch_size": 1024, "width": 768, "heads": 12, "feedforward": 2048,
           "standardise": "no"}  # fmt: skip
SMALL = {"epochs": 20, "lr": 5e-4, "batch_size": 256, "width": 256, "heads": 8, "feedforward": 512,
         "standardise": "yes"}  # fmt: skip


def settle(config: Config, n_train: int) -> Config:
    """Fill in what the data decide: the authors' hyperparameters, or a small set's."""
    small = n_train < retune.SMALL_SET
    preset = (SMALL if small else AUTHORS) | {
        "decoder_width": 64 if small else 512,
        "fractions": (0.01, 0.1, 1.0),
    }
    preset |= {"mask_images": 1000} if config.data == "demo" else {}
    config = dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})
    if config.width % config.heads:
        raise InputError(f"--width {config.width} must be a multiple of --heads {config.heads}")
    return config


def load_data(config: Config) -> Radiographs:
    """retune's data sets, and SIIM's and RSNA's with their masks."""
    if config.data in MASKED:
        import segmentation

        return segmentation.load_masked(config)
    return retune.load_radiographs(retune.Config(**{name: getattr(config, name) for name in DATA}))


# --------------------------------------------------------------------------------------------------- 2. Model


class Layer(nn.TransformerEncoderLayer):
    """torch's post-norm encoder layer (ReLU), with the query from elsewhere: keys, values and residual are
    `src`'s.

    Its parameters have torch's names, so that an exported pair runs on torch's own module.
    """

    def forward(self, src: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """src [B, T, P], query [B, T, P] (src itself when None) -> [B, T, P]."""
        query = src if query is None else query
        if query.shape != src.shape:
            raise ValueError(f"query {tuple(query.shape)} must have the shape of src {tuple(src.shape)}")
        x = self.norm1(src + self.dropout1(self.self_attn(query, src, src, need_weights=False)[0]))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Adaptor(nn.Module):
    """Projections and L shared transformer layers on frozen embeddings.

    Each layer's weights serve both directions: image <- layer(image, query=text), then text <- layer(text,
    query=new image). With one token a modality the attention weight is 1 and the query cannot matter: no
    information leaks from a pair's one half into the other. Outputs are not normalised.
    """

    def __init__(
        self, image_dim: int, text_dim: int, width: int = 768, layers: int = 2, heads: int = 12,
        feedforward: int = 2048, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        for side, dim in (
            ("image", image_dim),
            ("text", text_dim),
        ):  # see `standardise`; as they are here: the paper's
            self.register_buffer(f"{side}_mean", torch.zeros(dim))
            self.register_buffer(f"{side}_deviation", torch.ones(dim))
        self.image_projection = nn.Linear(image_dim, width, bias=False)
        self.text_projection = nn.Linear(text_dim, width, bias=False)
        self.layers = nn.ModuleList(
            Layer(width, heads, feedforward, dropout, batch_first=True) for _ in range(layers)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), CLIP's

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paired embeddings [B, d_image], [B, d_text] (or tokens [B, T, d]) -> both [B, P] (or [B, T, P])."""
        image, text = self.project("image", images), self.project("text", texts)
        for layer in self.layers:
            image = layer(image, text)
            text = layer(text, image)
        return image.reshape(*images.shape[:-1], -1), text.reshape(*texts.shape[:-1], -1)

    def alone(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """One side by itself, through self-attention: [B, d] -> [B, P], or tokens [B, T, d] -> [B, T, P]."""
        x = self.project(side, embeddings)
        for layer in self.layers:
            x = layer(x)
        return x.reshape(*embeddings.shape[:-1], -1)

    def project(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, d] or [B, T, d] -> L2-normalised tokens [B, 1 or T, P]."""
        x = F.normalize(getattr(self, f"{side}_projection")(self.centre(side, embeddings)), dim=-1)
        return x if x.ndim == 3 else x[:, None]

    def centre(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [.., d] in the scale of `standardise`; unchanged without it."""
        return (embeddings - getattr(self, f"{side}_mean")) / getattr(self, f"{side}_deviation")

    def standardise(self, side: str, embeddings: torch.Tensor) -> None:
        """Take each dimension's mean and deviation over the training embeddings [n, d] (ours).

        Embeddings of many towers are nearly parallel (the demo's autoencoder: mean cosine 0.99), and what
        tells them apart would be lost in the projection's normalisation until long training finds it.
        """
        getattr(self, f"{side}_mean").copy_(embeddings.mean(0))
        getattr(self, f"{side}_deviation").copy_(embeddings.std(0).clamp_min(1e-6))


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, image_weight: float = 0.75
) -> torch.Tensor:
    """Weighted symmetric contrastive loss of pairs [B, P], normalised here."""
    logits = log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T  # [B images, B texts]
    pair = torch.arange(len(logits), device=logits.device)
    return image_weight * F.cross_entropy(logits, pair) + (1 - image_weight) * F.cross_entropy(logits.T, pair)


# -------------------------------------------------------------------------------------------- 3. Pre-training


@dataclass
class Pairs:
    """Image-report pairs: rows of the image embeddings [N, d_image] and of the text embeddings [n, d_text].

    split -> (image rows, text rows), both int64 [n of the split]; texts: what each text row says.
    """

    images: np.ndarray
    texts: np.ndarray
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]]
    words: Sequence[str]

    def read(self, split: str, chosen: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        image_rows, text_rows = self.rows[split]
        images, texts = read_rows(self.images, image_rows[chosen]), read_rows(self.texts, text_rows[chosen])
        return images.to(device), texts.to(device)


def train_epochs(folder: Path, model, optimizer, epochs: int, seed: int, one_epoch: Callable) -> list[dict]:
    """Call `one_epoch(k)` for each epoch that `folder` does not hold yet; its results, in order.

    Every epoch draws from a seed of its own and ends on disk, so that a killed process goes on with the same
    bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, _ = retune.restore(folder, model, optimizer)
    history = retune.read_json(folder / "history.json")[:done] if done else []
    for k in retune.progress(range(done, epochs), initial=done, total=epochs, desc=folder.name, unit="epoch"):
        with retune.seeded(seed * 10_007 + k):
            history.append(one_epoch(k))
        retune.write_json(folder / "history.json", history)
        retune.keep(folder, model, optimizer, k + 1, 0.0)
    return history


def step_factor(step: int, steps: int, warmup: float = 0.02) -> float:
    """Share of the peak learning rate: linear up over the first 2% of the steps, then down to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def pretrain(model: Adaptor, pairs: Pairs, config: Config, folder: Path, device: str) -> list[dict]:
    """Align the two sides on the training pairs; one dict of losses and validation retrieval per epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    n = len(pairs.rows["train"][0])
    if n < 2:
        raise InputError(f"--data {config.data}: {n} training pairs with a report; contrast needs at least 2")
    per_epoch = math.ceil(n / config.batch_size)

    def one_epoch(k: int) -> dict:
        model.train()
        losses = []
        for i, batch in enumerate(torch.randperm(n).split(config.batch_size)):
            if len(batch) == 1:
                continue  # one pair alone has nothing to be told from
            factor = step_factor(k * per_epoch + i, config.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            image, text = model(*pairs.read("train", batch, device))
            loss = contrastive_loss(image, text, model.log_scale, config.image_weight)
            if not math.isfinite(loss.item()):
                raise InputError(f"pre-training epoch {k + 1}: the loss is {loss.item()}; lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"train_loss": float(np.mean(losses)), **validate(model, pairs, "val", config, device)}

    return train_epochs(folder / "pretraining", model, optimizer, config.epochs, config.seed, one_epoch)


@torch.no_grad()
def validate(model: Adaptor, pairs: Pairs, split: str, config: Config, device: str) -> dict:
    """Contrastive loss in batches of the training size, and retrieval over the whole split."""
    model.eval()
    chosen = torch.arange(len(pairs.rows[split][0])).split(config.batch_size)
    sides = [model(*pairs.read(split, batch, device)) for batch in chosen]
    losses = [contrastive_loss(i, t, model.log_scale, config.image_weight).item() for i, t in sides]
    image, text = (F.normalize(torch.cat(side), dim=-1).cpu() for side in zip(*sides))
    words = [pairs.words[row] for row in pairs.rows[split][1].tolist()]
    return {"loss": float(np.mean(losses)), **retrieval(image, text, words)}


def retrieval(image: torch.Tensor, text: torch.Tensor, words: Sequence[str]) -> dict:
    """Recall at 1, 5, 10 and median rank over n pairs, both ways, from normalised [n, P] each.

    Each image asks for its report among the distinct reports, each distinct report for the best-ranked of its
    images. A wrong candidate with the same score counts as ranked before the right one, so that constant
    embeddings find nothing. `chance` is what a random order recalls.
    """
    _, first, group = np.unique(np.asarray(words), return_index=True, return_inverse=True)
    group, distinct = torch.from_numpy(group), torch.arange(len(first))
    sides = {
        "image_to_text": (image, group, text[first], distinct),
        "text_to_image": (text[first], distinct, image, group),
    }
    result = {"n": len(words), "distinct_reports": len(first)}
    for way, (query, asked, candidates, offered) in sides.items():
        rank, miss = [], []
        for q, a in zip(query.split(1024), asked.split(1024)):
            scores, right = q @ candidates.T, a[:, None] == offered  # [b, candidates]
            best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
            rank.append(1 + ((scores >= best) & ~right).sum(1))
            miss.append((~right).sum(1))
        rank, wrong, missed = torch.cat(rank), torch.cat(miss).double(), 1.0
        values = {"median_rank": rank.double().quantile(0.5).item(), "chance": {}}
        for k in range(1, 11):
            # place k is wrong too
            missed = missed * (wrong - k + 1).clamp_min(0) / max(1, len(candidates) - k + 1)
            if k in (1, 5, 10):
                values[f"recall_{k}"] = (rank <= k).double().mean().item()
                values["chance"][f"recall_{k}"] = 1 - missed.mean().item()
        result[way] = values
    return result


# ----------------------------------------------------------------------------------- 4. Export and parameters


def export_pair(model: Adaptor, encoder: DualEncoder, directory: str) -> None:
    """Write backbones, projections and adaptor as one encoder in retune's folder format (ours): the bridge to
    RE-tune.

    One token attends to itself alone, so that each side is a plain head of torch's modules with the shared
    weights.
    """
    width, first = model.image_projection.out_features, model.layers[0]
    layer = {"d_model": width, "nhead": first.self_attn.num_heads, "dropout": first.dropout.p}
    layer |= {"dim_feedforward": first.linear1.out_features, "batch_first": True}
    config, state = copy.deepcopy(encoder.config) | {"dim": width}, encoder.state_dict()
    for side in ("image", "text"):
        mean, deviation = getattr(model, f"{side}_mean"), getattr(model, f"{side}_deviation")
        # standardising becomes a bias
        weight = getattr(model, f"{side}_projection").weight.detach() / deviation
        config[side]["head"] = [
            ["Linear", {"in_features": len(mean), "out_features": width}],
            ["Normalize", {}], ["Unflatten", {"dim": 1, "unflattened_size": [1, width]}],
            *[["TransformerEncoderLayer", layer]] * len(model.layers), ["Flatten", {}],
        ]  # fmt: skip
        state |= {f"{side}.head.0.weight": weight, f"{side}.head.0.bias": -weight @ mean}
        for i, module in enumerate(model.layers, 3):
            state |= {f"{side}.head.{i}.{key}": value for key, value in module.state_dict().items()}
    with retune.seeded(0):
        pair = DualEncoder(config, encoder.tokenizer)
    pair.load_weights({k: v.cpu() for k, v in state.items()}, "the aligned pair")
    pair.save(directory)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


PAPERS_ENCODERS = {  # arXiv 2401.01179; BERT-base is the size of BioBERT and ClinicalBERT
    "DINOv2-S + BERT": {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6},
    "DINOv2-B + BERT": {"model_type": "dinov2"},
    "Swin-B + BERT": {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2],
                      "num_heads": [4, 8, 16, 32]},
}  # fmt: skip


def parameter_table(model: Adaptor, encoder: DualEncoder) -> list[list]:
    """Rows (pair, frozen, trained here, end-to-end, share saved): this run's pair, and the paper's at its
    widths.

    End-to-end is what contrastive pre-training without freezing trains: both towers and the two projections.
    """

    def row(name: str, frozen: int, adaptor: Adaptor) -> list:
        projections = count(adaptor.image_projection) + count(adaptor.text_projection)
        whole = frozen + projections
        return [name, f"{frozen:,}", f"{count(adaptor):,}", f"{whole:,}", f"{1 - count(adaptor) / whole:.1%}"]

    rows = [row("this run", count(encoder), model)]
    with torch.device("meta"):  # sizes without weights
        text = retune.Tower({"model": {"model_type": "bert"}, "pool": "cls", "head": []})
        for name, settings in PAPERS_ENCODERS.items():
            image = retune.Tower({"model": settings, "pool": "cls", "head": []})
            adaptor = Adaptor(image.tower.config.hidden_size, 768)
            rows.append(row(f"{name}, the paper's widths", count(image) + count(text), adaptor))
    return rows


# ------------------------------------------------------------------------------------------ 5. Run and report


def build_adaptor(encoder: DualEncoder, config: Config) -> Adaptor:
    with retune.seeded(config.seed):
        return Adaptor(encoder.dim, encoder.text_dim, config.width, config.layers, config.heads,
        config.feedforward, config.dropout)  # fmt: skip


def load_adaptor(folder: Path, encoder: DualEncoder) -> Adaptor:
    """The adaptor of a finished pre-training; InputError when it was trained on other towers."""
    tensors, known = retune.load_tensors(Path(folder) / "adaptor.safetensors")
    if known["encoder"] != encoder.fingerprint():
        raise InputError(f"{folder}: its adaptor was trained on other encoders ({known['name']}); name them")
    model = Adaptor(**known["model"])
    retune.load_weights(model, tensors, folder)
    return model.eval()


def make_pairs(config: Config, data: Radiographs, texts, encoder: DualEncoder, images, device: str) -> Pairs:
    """Embed the texts of the images that have one, and pair the rows of each split."""
    paired = np.array([i for i, text in enumerate(texts) if text])
    say(f"{len(paired):,} pairs; {len(texts) - len(paired):,} images without a text")
    if not len(paired):
        raise InputError(f"--data {config.data}: no image has a report; use --texts labels")
    words = [texts[i] for i in paired]
    rows = {split: np.flatnonzero(data.split[paired] == split) for split in ("train", "val", "test")}
    if empty := [split for split, chosen in rows.items() if not len(chosen)]:
        raise InputError(f"--data {config.data}: the {empty[0]} split has no pair with a report")
    rows = {split: (torch.from_numpy(paired[r]), torch.from_numpy(r)) for split, r in rows.items()}
    return Pairs(images, embed_texts(encoder, words, config, device), rows, words)


def align(config: Config, encoder: DualEncoder, pairs: Pairs | None, device: str) -> dict:
    """Pre-train the adaptor, or take an earlier run's; save it and write retrieval.json."""
    folder, file = config.folder, config.folder / "retrieval.json"
    if file.exists():
        return retune.read_json(file)
    model = load_adaptor(config.pretrained, encoder) if config.pretrained else build_adaptor(encoder, config)
    model, result = model.to(device), {"history": []}
    if not config.pretrained:
        if config.standardise == "yes":
            for side, store, rows in zip(("image", "text"), (pairs.images, pairs.texts), pairs.rows["train"]):
                model.standardise(side, read_rows(store, rows).to(device))
        result["before"] = validate(model, pairs, "test", config, device)
        result["history"] = pretrain(model, pairs, config, folder, device)
        draw_curves(folder / "loss.png", result["history"])
    if pairs is not None:
        result["test"] = validate(model, pairs, "test", config, device)
    metadata = {"encoder": encoder.fingerprint(), "name": encoder.config["name"], "model": {
        "image_dim": encoder.dim, "text_dim": encoder.text_dim, "width": model.image_projection.out_features,
        "layers": len(model.layers), "heads": model.layers[0].self_attn.num_heads,
        "feedforward": model.layers[0].linear1.out_features, "dropout": model.layers[0].dropout.p}}  # fmt: skip
    retune.save_tensors(folder / "adaptor.safetensors", model.state_dict(), metadata)
    retune.write_json(file, result)
    return retune.read_json(file)


def draw_curves(path: Path, history: Sequence[dict]) -> None:
    """Losses and recall at 5 over the epochs."""
    from matplotlib.figure import Figure

    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name, style in (("train_loss", "training", "-"), ("loss", "validation", "--")):
        left.plot(epochs, [e[key] for e in history], style, color="black", label=name)
    left.set(xlabel="epoch", ylabel="contrastive loss")
    for key, style in (("image_to_text", "-"), ("text_to_image", "--")):
        recall, name = [e[key]["recall_5"] for e in history], key.replace("_", " ")
        right.plot(epochs, recall, style, color="black", label=name)
    right.axhline(
        history[0]["image_to_text"]["chance"]["recall_5"], color="grey", linestyle=":", label="chance"
    )
    right.set(xlabel="epoch", ylabel="validation recall at 5", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
    with retune.atomic(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def retrieval_table(found: dict) -> str:
    """Recall and median rank on the test pairs, both ways: by chance, before and after pre-training."""
    ways = ("image_to_text", "text_to_image")
    stages = {"chance": {way: found["test"][way]["chance"] for way in ways}}
    stages |= {"before pre-training": found["before"]} if "before" in found else {}
    stages |= {"adaptor": found["test"]}
    columns = {f"recall_{k}": f"R@{k}" for k in (1, 5, 10)} | {"median_rank": "median rank"}
    header = [f"{way.replace('_', ' ')} {short}" for way in ways for short in columns.values()]
    rows = [[name, *(m[way].get(key) for way in ways for key in columns)] for name, m in stages.items()]
    return markdown_table([f"retrieval, {found['test']['n']:,} test pairs", *header], rows)


def summary(metrics: dict) -> str:
    """The run's tables in Markdown."""
    parts = [retrieval_table(metrics["retrieval"])] if "test" in metrics["retrieval"] else []
    if "classification" in metrics:
        from classification import classification_table

        parts.append(classification_table(metrics["classification"], metrics["config"]["multiclass"]))
    if "segmentation" in metrics:
        from segmentation import segmentation_table

        parts.append(segmentation_table(metrics["segmentation"]))
    header = ["parameters", "frozen", "trained here", "end-to-end", "fewer"]
    parts.append(markdown_table(header, metrics["parameters"]))
    if metrics["config"]["data"] == "demo":
        parts.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(parts)


NOT_IDENTITY = (
    "export",
    "skip_bad_images",
    "reports_dir",
)  # a folder's run may differ in these; texts are compared


def run(config: Config) -> dict:
    """Everything the configuration asks for; what its folder already holds is not done again."""
    data, rank = load_data(config), ranks()[0]
    config, device = settle(config, len(data.where("train"))), retune.pick_device(config.device)
    encoder, folder = load_backbones(config), config.folder
    # an earlier adaptor is measured on reports alone: with captions, the wording would be what is measured
    texts, source = make_texts(config, data) if not config.pretrained or data.reports else ([], "not used")
    n, towers = (
        len(data.images),
        f"{config.image_encoder} ({encoder.dim}), {config.text_encoder} ({encoder.text_dim})",
    )
    say(
        f"{data.note}\n{config.data}: {n:,} images of {len(set(data.patients)):,} patients; texts: {source}".strip()
    )
    say(f"frozen towers: {towers}; adaptor: {config.layers} layers of width {config.width}, {device}")
    content = (data.names, data.patients.tolist(), data.split.tolist(), data.labels.tolist(), data.key, texts)
    identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    identity["encoder_fingerprint"] = encoder.fingerprint()
    identity["data_fingerprint"] = hashlib.sha256(repr(content).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with retune.locked(folder, wait=False) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            retune.claim(folder, identity)
        if (folder / "metrics.json").exists():
            say(f"{folder}: finished before; delete it to run again")
            metrics = retune.read_json(folder / "metrics.json")
        else:
            metrics = run_stages(config, data, texts, encoder, device)
        if config.export and rank == 0:
            export_pair(load_adaptor(folder, encoder), encoder, config.export)
            say(
                f"aligned pair: {config.export}; next: python retune.py --encoder {config.export} --scenario class"
            )
    return metrics


def run_stages(
    config: Config, data: Radiographs, texts: Sequence[str], encoder: DualEncoder, device: str
) -> dict:
    """Embed, align, classify, segment, report; under torchrun all ranks embed and the first does the rest."""
    import classification
    import segmentation

    wanted, masks = config.stages or ("classification", "segmentation"), None
    if "segmentation" in wanted:
        masks = segmentation.find_masks(config, data)
        if masks is None and config.stages:
            raise InputError(
                f"--stages segmentation: {config.data} has no masks; demo, {', '.join(MASKED)} have"
            )
    start = time.perf_counter()
    images = embed(Side(encoder, "image", encoder.dim), data, config, device)
    if bad := retune.embedding_facts(images)["unreadable"]:
        say(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
        split = ["unreadable" if i in bad else s for i, s in enumerate(data.split)]
        data = dataclasses.replace(data, split=split)
    pairs = make_pairs(config, data, texts, encoder, images, device) if texts else None
    if ranks()[1] > 1:
        first = ranks()[0] == 0
        torch.distributed.destroy_process_group()
        if not first:
            return {}
    metrics = {"config": dataclasses.asdict(config), "classes": list(data.class_names)}
    metrics["retrieval"] = align(config, encoder, pairs, device)
    model = load_adaptor(config.folder, encoder).to(device)
    if "classification" in wanted:
        metrics["classification"] = classification.classify(model, images, data, config, device)
    if masks is not None:
        metrics["segmentation"] = segmentation.segment(model, encoder, data, masks, config, device)
    metrics["parameters"] = parameter_table(model, encoder)
    metrics["cost"] = {"seconds": time.perf_counter() - start, "peak_memory_mb": retune.peak_memory_mb(),
                       "trainable_parameters": count(model)}  # fmt: skip
    report(config, metrics, data)
    return metrics


def report(config: Config, metrics: dict, data: Radiographs) -> None:
    """splits.csv (with the least labelled share an image is in, first repeat), table.md and, last, metrics.json.

    The stages' working folders go before it, all here: a kill between a stage's result and its clearing up left them.
    """
    from classification import nested_subsets

    folder, train, share = config.folder, data.where("train"), [""] * len(data.images)
    fractions = sorted(config.fractions, reverse=True)
    for fraction, subset in zip(fractions, nested_subsets(data.patients[train], fractions, config.seed)):
        for row in train[subset]:
            share[row] = f"{fraction:g}"
    with (
        retune.atomic(folder / "splits.csv") as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        lines = zip(data.names, data.patients, data.split, share)
        csv.writer(file).writerows([("image", "patient", "split", "labelled share"), *lines])
    with retune.atomic(folder / "table.md") as partial:
        partial.write_text(summary(metrics) + "\n", encoding="utf-8")
    for name in (
        "pretraining",
        "segmentation-adaptor",
        "segmentation-bare",
    ):  # what a killed stage goes on from
        shutil.rmtree(folder / name, ignore_errors=True)
    retune.write_json(folder / "metrics.json", metrics)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on standard error for bad input."""
    arguments = retune.build_parser(Config, __doc__).parse_args(argv)
    try:
        (config,) = retune.build_configs(Config, arguments)
        retune.join_ranks()
        metrics = run(config)
        if metrics:
            say(f"\n{summary(metrics)}\n\nwritten to {config.folder}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.modules["adaptor"] = sys.modules[__name__]  # what imports adaptor gets this module, not a second copy
    sys.exit(main())
