"""Adaptor: aligns two frozen encoders that never met, one of images and one of texts, with one light module.

The method is here, top to bottom: settings, the module and its loss, pre-training, the run. Frozen towers are
in `unimodal.py`, image-report pairs in `reports.py`, what is measured in `retrieval.py`, `classification.py`,
`segmentation.py`; data, embedding, metrics and files come from `retune.py`.

    python adaptor.py                                                    # embedded demo, nothing to download
    python adaptor.py --data mimic --data-dir MIMIC-CXR-JPG --image-encoder facebook/dinov2-base \\
                      --text-encoder emilyalsentzer/Bio_ClinicalBERT     # your data, any encoders
    python adaptor.py --export pair && python retune.py --encoder pair --scenario class

Reference: "Freeze the backbones: A Parameter-Efficient Contrastive Approach to Robust Medical Vision-Language
Pre-training", arXiv 2401.01179, ICASSP 2024. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.classification import classification_table, classify, labelled_shares
from adaptor.reports import Pairs, make_pairs, make_texts
from adaptor.retrieval import draw_curves, retrieval, retrieval_table
from adaptor.segmentation import find_masks, load_masked, segment, segmentation_table
from adaptor.unimodal import Side, count, embed, export_pair, load_backbones, parameter_table, train_epochs
from retune import DualEncoder, InputError, Radiographs, ranks, read_rows, same, say, setting

# ------------------------------------------------------------------------------------------------ 1. Settings


MASKED = ("siim", "rsna")  # data sets that bring masks; read by segmentation.py


@dataclass(frozen=True)
class Config(retune.DataConfig):
    """Every setting of a run; the command line is made from it. What is None here is settled by the data."""

    # fmt: off
    data: str = setting("demo", "data set", choices=(*retune.DATASETS, *MASKED), group="data")
    demo_images: int = setting(12000, "number of phantoms in the demo")
    skip_bad_images: bool = same("skip_bad_images")
    texts: str = setting("auto", "reports, or captions from labels", choices=("auto", "reports", "labels"))
    reports_dir: str | None = setting(None, "folder of MIMIC-CXR's reports (default: --data-dir)")
    skip_unpaired: bool = setting(False, "leave images without a report out of the pairs")

    image_encoder: str = setting("demo", "demo, folder, hub id, torchvision:NAME[=FILE]", group="encoders")
    text_encoder: str = setting("demo", "demo, folder, hub id")
    image_pool: str | None = setting(None, "pooling (cls; of maps: mean)", choices=("cls", "mean", "pooler"))
    text_pool: str | None = setting(None, "pooling (authors: cls)", choices=("cls", "mean", "last", "pooler"))
    precision: str = same("precision")
    store: str = same("store")
    encode_batch: int = same("encode_batch")
    workers: int = same("workers")
    cache_dir: str = same("cache_dir")

    width: int | None = setting(None, "width (authors: 768; small sets: 256)", type=int, group="pre-training")
    layers: int = setting(2, "transformer layers")
    standardise: str | None = setting(None, "scale by training mean and deviation (authors: no; small: yes)",
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
    output: str = setting("runs/adaptor-{data}-{image_encoder}-{text_encoder}-seed{seed}",
                          retune.Config.__dataclass_fields__["output"].metadata["help"])
    # fmt: on

    def __post_init__(self):
        counts = "demo_images width layers heads feedforward epochs batch_size repeats head_steps mask_epochs"
        counts += " mask_images decoder_width encode_batch"
        retune.refuse_values(
            self, (f"{counts} lr", *retune.POSITIVE), ("seed workers", *retune.SEED),
            ("weight_decay", lambda value: 0 <= value < math.inf, "not be negative"),
            ("image_weight", lambda value: 0 <= value <= 1, "be from 0 to 1"),
            ("dropout", lambda value: 0 <= value < 1, "be at least 0 and below 1"),
        )  # fmt: skip
        if bad := [f for f in self.fractions or () if not 0 < f <= 1]:
            raise InputError(f"--fractions {bad[0]} must be above 0 and at most 1")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return retune.fill_in(self)


# arXiv 2401.01179; (ours) SMALL, for sets on which the authors' schedule would take a few hundred steps
AUTHORS = {"epochs": 50, "lr": 2e-5, "batch_size": 1024, "width": 768, "heads": 12, "feedforward": 2048,
           "standardise": "no", "decoder_width": 512}  # fmt: skip
SMALL = {"epochs": 20, "lr": 5e-4, "batch_size": 256, "width": 256, "heads": 8, "feedforward": 512,
         "standardise": "yes", "decoder_width": 64}  # fmt: skip


def settle(config: Config, n_train: int) -> Config:
    """Fill in what the data decide: the authors' hyperparameters, or a small set's."""
    preset = (SMALL if n_train < retune.SMALL_SET else AUTHORS) | {"fractions": (0.01, 0.1, 1.0)}
    preset |= {"mask_images": 1000} if config.data == "demo" else {}
    config = dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})
    if config.width % config.heads:
        raise InputError(f"--width {config.width} must be a multiple of --heads {config.heads}")
    return config


def load_data(config: Config) -> Radiographs:
    """retune's data sets, and SIIM's and RSNA's with their masks."""
    if config.data in MASKED:
        return load_masked(config)
    return retune.load_radiographs(retune.Config(**{key: getattr(config, key) for key in retune.DATA_KEYS}))


# --------------------------------------------------------------------------------------------------- 2. Model


class Layer(nn.TransformerEncoderLayer):
    """torch's post-norm encoder layer (ReLU) with a query from elsewhere; keys, values, residual are `src`'s.

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
        self.settings = {"image_dim": image_dim, "text_dim": text_dim, "width": width, "layers": layers,
                         "heads": heads, "feedforward": feedforward, "dropout": dropout}  # fmt: skip
        for side, dim in (("image", image_dim), ("text", text_dim)):  # change nothing until `standardise`
            self.register_buffer(f"{side}_mean", torch.zeros(dim))
            self.register_buffer(f"{side}_deviation", torch.ones(dim))
        self.image_projection = nn.Linear(image_dim, width, bias=False)
        self.text_projection = nn.Linear(text_dim, width, bias=False)
        sizes = (width, heads, feedforward, dropout)
        self.layers = nn.ModuleList(Layer(*sizes, batch_first=True) for _ in range(layers))
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


# ------------------------------------------------------------------------------------------ 4. Run and report


def load_adaptor(folder: Path, encoder: DualEncoder) -> Adaptor:
    """The adaptor of a finished pre-training; InputError when it was trained on other towers."""
    tensors, known = retune.load_tensors(Path(folder) / "adaptor.safetensors")
    if known["encoder"] != encoder.fingerprint():
        raise InputError(f"{folder}: its adaptor was trained on other encoders ({known['name']}); name them")
    model = Adaptor(**known["model"])
    retune.load_weights(model, tensors, folder)
    return model.eval()


def align(config: Config, encoder: DualEncoder, pairs: Pairs | None, device: str) -> dict:
    """Pre-train the adaptor, or take an earlier run's; save it and write retrieval.json."""
    folder, file, result = config.folder, config.folder / "retrieval.json", {"history": []}
    if file.exists():
        return retune.read_json(file)
    if config.pretrained:
        model = load_adaptor(config.pretrained, encoder).to(device)
    else:
        with retune.seeded(config.seed):
            model = Adaptor(encoder.dim, encoder.text_dim, config.width, config.layers, config.heads,
                            config.feedforward, config.dropout).to(device)  # fmt: skip
        if config.standardise == "yes":
            for side, store, rows in zip(("image", "text"), (pairs.images, pairs.texts), pairs.rows["train"]):
                model.standardise(side, read_rows(store, rows).to(device))
        result["before"] = validate(model, pairs, "test", config, device)
        result["history"] = pretrain(model, pairs, config, folder, device)
        draw_curves(folder / "loss.png", result["history"])
    if pairs is not None:
        result["test"] = validate(model, pairs, "test", config, device)
    known = {"encoder": encoder.fingerprint(), "name": encoder.config["name"], "model": model.settings}
    retune.save_tensors(folder / "adaptor.safetensors", model.state_dict(), known)
    retune.write_json(file, result)
    return retune.read_json(file)


def summary(metrics: dict) -> str:
    """The run's tables in Markdown."""
    config, parts = metrics["config"], []
    if "test" in metrics["retrieval"]:
        parts.append(retrieval_table(metrics["retrieval"]))
    if "classification" in metrics:
        parts.append(classification_table(metrics["classification"], config["multiclass"]))
    if "segmentation" in metrics:
        parts.append(segmentation_table(metrics["segmentation"]))
    header = ["parameters", "frozen", "trained here", "end-to-end", "fewer"]
    parts.append(retune.markdown_table(header, metrics["parameters"]))
    if config["data"] == "demo":
        parts.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(parts)


# settings in which the runs of one folder may differ beside retune's; texts are compared by content
NOT_IDENTITY = ("export", "skip_bad_images", "reports_dir")


def run(config: Config) -> dict:
    """Everything the configuration asks for; what its folder already holds is not done again."""
    if config.export:
        retune.new_folder(config.export)  # refused now rather than after hours
    data, rank = load_data(config), ranks()[0]
    config, device = settle(config, len(data.where("train"))), retune.pick_device(config.device)
    encoder, folder = load_backbones(config), config.folder
    # an earlier adaptor is measured on reports alone: with captions, the wording would be what is measured
    texts, source = make_texts(config, data) if not config.pretrained or data.reports else ([], "not used")
    n, patients = len(data.images), len(set(data.patients))
    say(f"{data.note}\n{config.data}: {n:,} images of {patients:,} patients; texts: {source}".strip())
    towers = f"{config.image_encoder} ({encoder.dim}), {config.text_encoder} ({encoder.text_dim})"
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
            command = f"python retune.py --encoder {config.export} --scenario class"
            say(f"aligned pair: {config.export}; next: {command}")
    return metrics


def run_stages(
    config: Config, data: Radiographs, texts: Sequence[str], encoder: DualEncoder, device: str
) -> dict:
    """Embed, align, classify, segment, report; under torchrun all ranks embed and the first does the rest."""
    wanted, masks = config.stages or ("classification", "segmentation"), None
    if "segmentation" in wanted:
        masks = find_masks(config, data)
        if masks is None and config.stages:
            have = ", ".join(("demo", *MASKED))
            raise InputError(f"--stages segmentation: {config.data} has no masks; {have} have")
    start = time.perf_counter()
    images = embed(Side(encoder, "image", encoder.dim), data, config, device)
    if bad := retune.embedding_facts(images)["unreadable"]:
        say(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
        data = dataclasses.replace(data, split=data.split.copy())
        data.split[list(bad)] = "unreadable"
        retune.refuse_empty_splits(data)
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
        metrics["classification"] = classify(model, images, data, config, device)
    if masks is not None:
        metrics["segmentation"] = segment(model, encoder, data, masks, config, device)
    metrics["parameters"] = parameter_table(model, encoder)
    metrics["cost"] = {"seconds": time.perf_counter() - start, "peak_memory_mb": retune.peak_memory_mb(),
                       "trainable_parameters": count(model)}  # fmt: skip
    report(config, metrics, data)
    return metrics


def report(config: Config, metrics: dict, data: Radiographs) -> None:
    """Write splits.csv (with the least labelled share of an image), table.md and, last, metrics.json.

    The stages' checkpoints go just before it: had each stage cleared up, a kill could come in between.
    """
    folder, share = config.folder, labelled_shares(data, config.fractions, config.seed)
    retune.write_splits(folder / "splits.csv", data, "labelled share", share)
    retune.write_text(folder / "table.md", summary(metrics) + "\n")
    for name in ("pretraining", "segmentation-adaptor", "segmentation-bare"):
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
    sys.exit(main())
