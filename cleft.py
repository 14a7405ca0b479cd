"""CLEFT: contrastive pre-training with a parameter-efficient language model, then prompt fine-tuning.

    python cleft.py all                                      # offline demo: every stage on phantoms
    python cleft.py pretrain --data chexpert --data-dir CheXpert --image facebook/dinov2-with-registers-base \
        --text stanford-crfm/BioMedLM --pad-token "<|endoftext|>"
    python cleft.py prompt ..., evaluate ..., export ... --to FOLDER     # the same options: the same --output
    python cleft.py count                                    # trainable parameters of the real architectures
    python cleft.py make-tiny                                # trains the encoder that is shipped in tiny/

Reference: Du, Chang & Dvornek, "CLEFT: Language-Image Contrastive Learning with Efficient Large Language
Model and Prompt Fine-Tuning", arXiv 2407.21011. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import HERE, DualEncoder, InputError, Radiographs, setting

# --------------------------------------------------------------------------------------------------- Settings


POSITIVE = (
    "steps", "lr", "batch_size", "accumulate", "dim", "temperature", "save_every", "context_tokens",
    "prompt_steps", "prompt_lr", "demo_images", "lora_rank", "lora_alpha", "context_length",
)  # fmt: skip
PEFT = ("lora", "ia3", "prefix", "none")
DATA_SETS = ("demo", "pretrain", "embed", "rsna", *[name for name in retune.DATASETS if name != "demo"])


@dataclass(frozen=True)
class Config:
    """Every setting; the command line is made from it. None is filled by the authors' value or the demo's."""

    # fmt: off
    data: str = setting("demo", "data set", choices=DATA_SETS)
    data_dir: str | None = setting(None, "folder of the data set")
    labels_csv: str | None = setting(None, "label file instead of the data set's own")
    classes: tuple[str, ...] | None = setting(None, "findings to use, in this order", nargs="+")
    view: str = setting("all", "views to use", choices=("all", "frontal", "lateral"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(None, "what a blank label becomes", choices=("zero", "ignore"))
    size: int = setting(224, "image side of ChestMNIST", choices=(28, 64, 128, 224))
    demo_images: int = setting(6000, "number of phantoms in the demo")

    image: str = setting("tiny", "image tower: small, tiny, our or a transformers folder, an id")
    text: str = setting("tiny", "text tower, likewise: a causal language model")
    dim: int | None = setting(None, "joint dimension (authors: 512; small and tiny: 128)", type=int)
    context_length: int = setting(64, "tokens of a text at most")
    truncate: bool = setting(False, "cut longer texts instead of refusing them")
    pad_token: str | None = setting(None, "padding token for a tokenizer that has none")
    peft: str = setting("lora", "tuning of the text tower; none: all of it", choices=PEFT)
    lora_rank: int = setting(8, "rank of LoRA")
    lora_alpha: int = setting(32, "scale of LoRA")
    lora_dropout: float = setting(0.1, "dropout of LoRA")
    prefix_tokens: int = setting(30, "virtual tokens of prefix tuning")

    captions: str = setting("auto", "auto: reports if there are any", choices=("auto", "labels", "reports"))
    base_caption: str = setting("a chest X-ray of a patient with", "beginning of captions from labels")
    negative_captions: bool = setting(False, "captions name the absent findings too")

    steps: int | None = setting(None, "steps of stage 1 (authors: 40,000; demo: 200)", type=int)
    lr: float | None = setting(None, "learning rate of stage 1 (authors: 4e-5; demo: 1e-3)", type=float)
    batch_size: int | None = setting(None, "pairs a step over all ranks (authors: 288; demo: 128)", type=int)
    weight_decay: float = setting(0.1, "of AdamW in stage 1")
    warmup: float = setting(0.1, "share of stage 1's steps in which the learning rate rises")
    temperature: float = setting(0.07, "initial temperature of the contrastive loss")
    accumulate: int = setting(1, "pieces of a rank's batch; the loss stays that of the whole")
    checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    precision: str = setting("fp32", "arithmetic of the towers", choices=("fp32", "bf16"))
    save_every: int = setting(500, "steps between checkpoints")

    context_tokens: int = setting(30, "learned context tokens of stage 2")
    prompt_steps: int | None = setting(None, "steps of stage 2 (authors: 8,000; demo: 300)", type=int)
    prompt_lr: float | None = setting(None, "learning rate of stage 2 (authors: 1e-4; demo: 0.1)", type=float)

    balanced: int = setting(200, "images a class in the single-label test, at most; 0 for none")
    finetune_epochs: int = setting(0, "epochs of full fine-tuning in the evaluation; 0 leaves it out")

    seed: int = setting(42, "seed")
    output: str = setting("runs/cleft", "folder of the run")
    cache_dir: str = setting("runs/cache", "folder of cached embeddings")
    device: str = setting("auto", "auto, cpu, cuda, cuda:0")
    workers: int = setting(0, "processes that decode images")
    # fmt: on

    def __post_init__(self):
        optional = ("prefix_tokens", "weight_decay", "warmup", "lora_dropout", "balanced", "finetune_epochs")
        for name in ("seed", "workers", *optional):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"--{name.replace('_', '-')} {value} must be positive")


# fmt: off
# The published setting (arXiv 2407.21011)
AUTHORS = {"steps": 40_000, "lr": 4e-5, "batch_size": 288, "dim": 512, "prompt_steps": 8000,
           "prompt_lr": 1e-4}
# (ours)
SMALL = {"steps": 200, "lr": 1e-3, "batch_size": 128, "dim": 128, "prompt_steps": 300, "prompt_lr": 0.1}
TINY = {"data": "pretrain", "image": "small", "text": "small", "peft": "none", "demo_images": 12_000,
        "steps": 900, "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.03, "captions": "reports", "seed": 0}
# fmt: on


def settle(config: Config) -> Config:
    """Fill what the user left open: the authors' values, or the demo's when its small towers are used."""
    preset = SMALL if config.image in ("small", "tiny") else AUTHORS
    return dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


# ------------------------------------------------------------------------------------------------------- Data


def load_pretrain(config: retune.Config) -> Radiographs:
    """Phantoms of other patients, films and reporting habits than the demo's: what `tiny` is trained on."""
    import phantoms

    data = phantoms.make_phantoms(config.demo_images, seed=1000, domain="pretrain")
    split = retune.patient_split(data.patients, {"train": 0.98, "val": 0.01, "test": 0.01})
    return Radiographs(
        data.images, data.labels, data.class_names, data.patients, split, reports=data.reports,
        note="PHANTOMS: synthetic films of the pre-training domain.", key=f"pretrain {config.demo_images}",
    )  # fmt: skip


def load_rsna(config: retune.Config) -> Radiographs:
    """RSNA pneumonia, as adaptor.py reads it."""
    return importlib.import_module("segmentation").load_masked(config)


# The assessment letters of EMBED's clinical table and their BI-RADS categories, mildest first.
# fmt: off
BI_RADS = {"N": "BI-RADS 1", "B": "BI-RADS 2", "A": "BI-RADS 0", "P": "BI-RADS 3", "S": "BI-RADS 4",
           "M": "BI-RADS 5", "K": "BI-RADS 6"}
MEANING = {"N": "negative", "B": "benign", "A": "incomplete", "P": "probably benign", "S": "suspicious",
           "M": "highly suggestive of malignancy", "K": "known malignancy"}
DENSITY = {"1": "almost entirely fatty", "2": "scattered fibroglandular densities",
           "3": "heterogeneously dense", "4": "extremely dense"}
# fmt: on


def load_embed(config: retune.Config) -> Radiographs:
    """EMBED mammography: *metadata*.csv (a row an image) joined with *clinical*.csv (a row a finding).

    Labels: seven BI-RADS categories, then four densities, one-hot; nan where the exam has none. A breast's
    assessment is the most serious among the findings of its side (a blank side or B is both). Only 2D images.
    """
    root = config.root
    images_csv = retune.one_file(root, ["*metadata*.csv", "tables/*metadata*.csv"])
    clinical_csv = retune.one_file(root, ["*clinical*.csv", "tables/*clinical*.csv"])
    needed = ["empi_anon", "acc_anon", "anon_dicom_path"]
    needed += ["ImageLateralityFinal", "ViewPosition", "FinalImageType"]
    table = retune.read_table(images_csv, needed)
    exams = read_exams(clinical_csv)
    names, labels, patients, reports, rows = [], [], [], [], []
    for i in range(len(table["acc_anon"])):
        image = {key: table[key][i] for key in needed}
        letter, density = exams.get((image["acc_anon"], image["ImageLateralityFinal"]), ("", ""))
        if image["FinalImageType"] != "2D" or not (letter or density):
            continue
        path = image["anon_dicom_path"]
        names.append(path[max(0, path.find("images/"), path.find("cohort_")) :])
        known = [[float(key == value) if value else math.nan for key in keys]
                 for keys, value in ((BI_RADS, letter), (DENSITY, density))]  # fmt: skip
        labels.append(known[0] + known[1])
        patients.append(image["empi_anon"])
        side, view = image["ImageLateralityFinal"], image["ViewPosition"]
        reports.append(mammogram_caption(side, view, letter, density))
        rows.append(f"{images_csv} row {i + 2}")
    if not names:
        raise InputError(f"{images_csv}: no 2D image belongs to an exam with an assessment in {clinical_csv}")
    split = retune.patient_split(patients, retune.SHARES)
    paths = [retune.safe_path(root, name, row) for name, row in zip(names, rows, strict=True)]
    classes = (*BI_RADS.values(), *(f"Density {letter}" for letter in "ABCD"))
    note = f"EMBED: {len(names)} 2D images; captions name side, view, assessment and density"
    return Radiographs(paths, np.array(labels), classes, patients, split, names, rows, reports, note)


def read_exams(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(exam, side) -> (most serious assessment letter, density digit), "" where unknown."""
    columns = ("acc_anon", "side", "asses", "tissueden")
    table, serious = retune.read_table(path, columns), ["", *BI_RADS]
    exams: dict[tuple[str, str], tuple[str, str]] = {}
    for exam, side, letter, density in zip(*(table[name] for name in columns), strict=True):
        letter, density = (letter if letter in BI_RADS else ""), density.split(".")[0]
        for breast in side if side in ("L", "R") else "LR":
            before = exams.get((exam, breast), ("", ""))
            worst = max(letter, before[0], key=serious.index)
            exams[exam, breast] = worst, density if density in DENSITY else before[1]
    return exams


def mammogram_caption(side: str, view: str, letter: str, density: str) -> str:
    breast = {"L": "left", "R": "right"}.get(side, "")
    text = f"a {breast} {view} mammogram".replace("  ", " ")
    text += f" with {BI_RADS[letter]}, {MEANING[letter]}" if letter else ""
    return text + (f", breast density {DENSITY[density]}" if density else "")


def two_classes(data: Radiographs) -> Radiographs:
    """A single finding as a choice of two classes, as the paper evaluates RSNA: it, or no finding."""
    if len(data.class_names) > 1:
        return data
    labels = np.concatenate([data.labels, 1 - data.labels], axis=1)  # nan stays nan
    return dataclasses.replace(data, labels=labels, class_names=(*data.class_names, "No Finding"))


def captions(data: Radiographs, config: Config) -> list[str]:
    """One text per image: its report, or the base caption and the names of its findings."""
    if config.captions == "reports" and data.reports is None:
        raise InputError(f"--captions reports: the data set {config.data} has no reports; use labels")
    if data.reports is not None and config.captions != "labels":
        return list(data.reports)
    names = [name.lower() for name in data.class_names]
    return [caption(row, names, config) for row in data.labels]


NONE = "no finding"


def caption(labels: Sequence[float], names: Sequence[str], config: Config) -> str:
    """The caption of one image from its labels [C]; unknown labels are not mentioned."""
    present = [name for name, label in zip(names, labels, strict=True) if label == 1]
    absent = [f"no {name}" for name, label in zip(names, labels, strict=True) if label == 0 and name != NONE]
    found = present + (absent if config.negative_captions else [])
    return f"{config.base_caption} {', '.join(found or [NONE])}"


# ----------------------------------------------------------------------------------------------------- Towers

SMALL_IMAGE = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128],
               "depths": [1, 1, 1, 1], "layer_type": "basic"}  # fmt: skip
SMALL_TEXT = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None,
              "eos_token_id": None}  # fmt: skip
VOCABULARY = 2048
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def build_encoder(config: Config, texts: Sequence[str]) -> DualEncoder:
    """An encoder of the two towers that `config` names; `texts` teach a small text tower its words."""
    image, transform, image_weights = image_part(config)
    text, tokenizer, text_weights = text_part(config, texts)
    parts = {"image": image, "text": text, "transform": transform}
    with torch.random.fork_rng():  # new weights by the seed, the caller's random numbers untouched
        torch.manual_seed(config.seed)
        encoder = DualEncoder({"name": "cleft", "dim": config.dim, **parts}, tokenizer)
    for part, weights in ((encoder.image, image_weights), (encoder.text, text_weights)):
        own = part.state_dict()
        fitting = {
            key: value for key, value in weights.items() if key in own and value.shape == own[key].shape
        }
        part.load_state_dict(fitting, strict=False)
    return encoder


def head(width: int, dim: int) -> list:
    return [["Linear", {"in_features": width, "out_features": dim, "bias": False}]]


def image_part(config: Config) -> tuple[dict, dict, dict]:
    """config.json's "image" and "transform", and the tower's published weights."""
    if config.image == "small":
        transform = {
            "resize": 64,
            "crop": 64,
            "interpolation": "bilinear",
            "mean": [0.5] * 3,
            "std": [0.25] * 3,
        }
        return {"model": SMALL_IMAGE, "pool": "mean", "head": head(128, config.dim)}, transform, {}
    if (ours := our_part(config.image, "image", config.dim)) is not None:
        return ours[0], ours[1]["transform"], ours[2]
    tower, model = published(config.image)
    side = getattr(tower.config, "image_size", 224)
    side = side if side % getattr(tower.config, "patch_size", 1) == 0 and side < 512 else 224
    transform = {"resize": side, "crop": side, "interpolation": "bicubic", **IMAGENET}
    # The mean before the last norm; a convolutional tower has no such tokens
    pool = "pre_norm_mean" if hasattr(tower.config, "num_hidden_layers") else "mean"
    width = getattr(tower.config, "hidden_size", None) or tower.config.hidden_sizes[-1]
    return {"model": model, "pool": pool, "head": head(width, config.dim)}, transform, prefixed(tower)


def text_part(config: Config, texts: Sequence[str]) -> tuple[dict, object, dict]:
    """config.json's "text", its tokenizer, and the tower's published weights."""
    from transformers import AutoTokenizer

    reading = {"pool": "last", "context_length": config.context_length, "padding": "longest"}
    if config.text == "small":
        tokenizer = train_tokenizer(common_words(texts))
        model = SMALL_TEXT | {"vocab_size": len(tokenizer), "n_positions": config.context_length}
        return {"model": model, "head": head(64, config.dim), **reading}, tokenizer, {}
    if (ours := our_part(config.text, "text", config.dim)) is not None:
        return ours[0], ours[3], ours[2]
    tower, model = published(config.text)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--text {config.text}: no tokenizer ({' '.join(str(error).split())[:200]})"
        ) from None
    if config.pad_token is not None:
        tokenizer.pad_token = config.pad_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"--text {config.text}: its tokenizer has no padding token; name one with --pad-token"
        )
    if len(tokenizer) > tower.config.vocab_size:
        sizes = f"{len(tokenizer)} tokens for {tower.config.vocab_size} embeddings"
        raise InputError(
            f"--text {config.text}: {sizes}; use its own tokenizer and a --pad-token that it knows"
        )
    part = {"model": model, "head": head(tower.config.hidden_size, config.dim), **reading}
    return part, tokenizer, prefixed(tower)


def our_part(name: str, part: str, dim: int):
    """(tower's config with a head for `dim`, config, weights, tokenizer) of our folder `name`, or None."""
    folder = HERE / "tiny" if name == "tiny" else Path(name)
    if not retune.is_ours(folder):
        return None
    config, state, tokenizer = retune.read_folder(folder)
    own = config[part]
    if dim != config["dim"]:
        own = own | {"head": head(next(iter(own["head"]))[1]["in_features"], dim)}
    state = {
        key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")
    }
    return own, config, state, tokenizer


def published(source: str):
    """A transformers model and what its config needs to be built again, from a hub id or a folder."""
    from transformers import AutoModel

    try:
        tower = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no transformers model ({' '.join(str(error).split())[:200]})") from None
    dropped = ("transformers_version", "architectures", "dtype", "_name_or_path")
    return tower, {k: v for k, v in tower.config.to_diff_dict().items() if k not in dropped}


def prefixed(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {f"tower.{key}": value for key, value in tower.state_dict().items()}


COMMON = 10  # texts that a word must be in for the tokenizer to learn it


def common_words(texts: Sequence[str]) -> list[str]:
    """The texts without words that few of them share: a name in a report must not become part of a model."""

    def plain(word: str) -> str:
        return word.lower().strip(".,:;()")

    count = Counter(word for text in texts for word in {plain(word) for word in text.split()})
    return [" ".join(word for word in text.split() if count[plain(word)] >= COMMON) for text in texts]


def train_tokenizer(texts: Sequence[str]):
    """Byte-level BPE in lower case: any text has tokens; words of `texts` and prompts.json have one each.

    The final full stop goes and an end token comes: the last token, which is pooled, is the same everywhere.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[.\s]+$"), "")]
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )  # fmt: skip
    words = set(texts) | set(strings(retune.read_json(HERE / "prompts.json")))
    tokenizer.train_from_iterator(sorted(words), trainer)
    end = ("<end>", tokenizer.token_to_id("<end>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def strings(value) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
        return
    for item in [*value, *value.values()] if isinstance(value, dict) else value:
        yield from strings(item)


def add_peft(tower: nn.Module, config: Config) -> nn.Module:
    """`tower`, frozen but for LoRA, IA3 or prefix weights; `none`: trained whole. InputError if unfit."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model

    task = {"task_type": "FEATURE_EXTRACTION"}
    transposed = any(type(layer).__name__ == "Conv1D" for layer in tower.modules())  # GPT-2's linear layers
    dropout = {"lora_dropout": config.lora_dropout, "fan_in_fan_out": transposed}
    kinds = {
        "lora": lambda: LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, **dropout, **task),
        "ia3": lambda: IA3Config(fan_in_fan_out=transposed, **task),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=config.prefix_tokens, **task),
    }
    if config.peft == "none":
        return tower.requires_grad_(True)
    try:
        return get_peft_model(tower, kinds[config.peft]())
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        kind, reason = type(tower).__name__, " ".join(str(error).split())[:200]
        raise InputError(
            f"--peft {config.peft}: the text tower ({kind}) does not support it ({reason})"
        ) from None


# ---------------------------------------------------------------------------------------------------- Stage 1


class Cleft(nn.Module):
    """An encoder in training and its learnable temperature; the image tower and both heads train whole."""

    def __init__(self, encoder: DualEncoder, config: Config):
        super().__init__()
        self.encoder = encoder.train()
        encoder.image.requires_grad_(True)
        encoder.text.head.requires_grad_(True)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            encoder.text.tower = add_peft(encoder.text.tower, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """Pixels [B,3,H,W], tokens [B,T], their mask -> unit vectors [B,D] of the images and of the texts."""
        images, texts = self.encoder.image(pixels), self.encoder.text(input_ids, attention_mask)
        return F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)

    @property
    def scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=100)

    def learned(self) -> dict[str, torch.Tensor]:
        """What training changes: trainable weights and buffers, not a frozen language model."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad} | dict(self.named_buffers())


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric CLIP loss of N pairs of unit vectors [N,D]: the sum of both cross-entropies."""
    logits = scale * images @ texts.T  # [N,N]
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def gather(own: torch.Tensor) -> torch.Tensor:
    """[B,D] of every rank -> the global batch [world * B, D], in rank order, without gradient."""
    parts = [torch.empty_like(own) for _ in range(retune.ranks()[1])]
    if len(parts) > 1:
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)
    return own


def contrastive_step(model: Cleft, pieces: Sequence[tuple], seed: int, autocast: Callable) -> torch.Tensor:
    """Gradients of the global batch's loss from this rank's pieces (pixels, ids, mask); returns the loss.

    The loss needs all embeddings at once, a tower's backward pass only one piece (ours): embed all pieces
    without a graph, differentiate the loss by the embeddings, then embed each piece again, with the same
    dropout, and go on backwards from its part. So neither pieces nor ranks change the loss, except that batch
    normalisation sees one piece at a time. The gradients of the ranks are still to be summed.
    """
    rank, world = retune.ranks()

    def embed(number: int):
        with torch.random.fork_rng(), autocast():
            torch.manual_seed((seed * world + rank) * len(pieces) + number)
            return model(*pieces[number])

    with torch.set_grad_enabled(len(pieces) == 1):  # a single piece keeps its graph and is not embedded again
        parts = [embed(number) for number in range(len(pieces))]
    leaves = [gather(torch.cat(part).detach()).requires_grad_() for part in zip(*parts, strict=True)]
    loss = contrastive_loss(*leaves, model.scale)
    loss.backward()
    model.log_scale.grad /= world  # every rank holds the whole gradient of the temperature
    sizes = [len(part[0]) for part in parts]
    own = [leaf.grad[rank * sum(sizes) : (rank + 1) * sum(sizes)].split(sizes) for leaf in leaves]
    for number, gradients in enumerate(zip(*own, strict=True)):
        outputs = parts[number] if len(pieces) == 1 else embed(number)
        torch.autograd.backward(outputs, gradients)
    return loss.detach()


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch_rows(rows: np.ndarray, size: int, first: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of batches `first` to `steps`; an epoch is a permutation by (seed, epoch) without its rest."""
    if len(rows) < size:
        raise InputError(f"--batch-size {size} is more than the {len(rows)} training images; lower it")
    a_epoch, order = len(rows) // size, None
    for step in range(first, steps):
        epoch, place = divmod(step, a_epoch)
        if order is None or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(rows)
        yield order[place * size : (place + 1) * size]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, compute: Callable, batches: Callable, rate: Callable,
    steps: int, path: Path, save_every: int, name: str,
) -> None:  # fmt: skip
    """The loop of both stages. Resumes from checkpoint `path` exactly: all randomness depends on the step.

    compute(step, batch) leaves gradients and returns the loss; batches(first) yields from step `first` on;
    rate(step) is the learning rate. InputError when the loss is not finite; the last checkpoint stays.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    first = restore(path, model, optimizer)
    bar = retune.progress(batches(first), desc=name, unit="step", total=steps, initial=first)
    for step, batch in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss = compute(step, batch)
        if not math.isfinite(loss.item()):
            raise InputError(f"{name}, step {step + 1}: the loss is {loss.item()}; lower the learning rate")
        retune.sum_gradients([p for p in trained if p.grad is not None])
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if ((step + 1) % save_every == 0 or step + 1 == steps) and retune.ranks()[0] == 0:
            state, buffer = {"step": step + 1, "model": model.learned()}, io.BytesIO()
            torch.save(state | {"optimizer": optimizer.state_dict()}, buffer)
            with retune.atomic(path) as partial:
                partial.write_bytes(buffer.getbuffer())  # a full disk is an OSError here, not in torch.save
    retune.barrier()


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Load a checkpoint; returns the steps done, 0 without one. InputError for a damaged or foreign file."""
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if set(state["model"]) != set(model.learned()):
            raise KeyError("it belongs to another model")
        model.load_state_dict(state["model"], strict=False)
        if optimizer is not None:  # the settings of its groups are the configuration's, not the file's
            groups = optimizer.state_dict()["param_groups"]
            known = state["optimizer"]["state"]
            if len({frozenset(values) for values in known.values()}) > 1:
                raise ValueError("the optimiser's state is incomplete")
            if any(float(values.get("step", 0)) < 0 for values in known.values()):
                raise ValueError("a negative number of steps")
            optimizer.load_state_dict({"state": known, "param_groups": groups})
        return state["step"]
    except Exception as error:  # noqa: BLE001, a damaged pickle raises nearly every type
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged or of another configuration ({reason}); delete it") from None


def build(config: Config, data: Radiographs) -> Cleft:
    """The model of stage 1 as it starts, on the device."""
    texts = captions(data, config)
    model = Cleft(build_encoder(config, texts), config)
    if config.checkpointing:
        for tower in (model.encoder.image.tower, model.encoder.text.tower):
            if not getattr(tower, "supports_gradient_checkpointing", True):
                raise InputError(f"--checkpointing: {type(tower).__name__} does not support it; leave it out")
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(retune.pick_device(config.device))


def pretrain(config: Config, data: Radiographs) -> Cleft:
    """Stage 1: both towers on image-text pairs, with the loss of the global batch; resumes a checkpoint."""
    model, texts, device = build(config, data), captions(data, config), retune.pick_device(config.device)
    (rank, world), pieces = retune.ranks(), config.accumulate
    if config.batch_size % (world * pieces):
        raise InputError(
            f"--batch-size {config.batch_size} does not divide by {world} ranks x {pieces} pieces"
        )
    Prompt(model, data.class_names, config)  # what stage 2 would refuse is refused before the training
    rows = data.where("train")
    drawn = hasattr(data.images, "phantoms")  # phantoms are drawn once, not in every epoch
    images = np.stack([data.images[i] for i in range(len(data.images))]) if drawn else data.images
    pixels = retune.Images(images, model.encoder.transform)
    encoder = model.encoder
    parts = {"image": encoder.image, "text tower": encoder.text.tower, "text head": encoder.text.head}
    counts = [
        f"{name} {trainable(m):,} of {sum(p.numel() for p in m.parameters()):,}" for name, m in parts.items()
    ]
    retune.say(f"trainable parameters: {', '.join(counts)}")

    def batches(first: int):
        whole = batch_rows(rows, config.batch_size, first, config.steps, config.seed)
        own = (part for batch in whole for part in np.split(np.split(batch, world)[rank], pieces))
        options = {"collate_fn": retune.collate, "num_workers": config.workers}
        loader = torch.utils.data.DataLoader(pixels, batch_sampler=map(np.ndarray.tolist, own), **options)
        stream = iter(loader)
        for _ in range(first, config.steps):
            yield [next(stream) for _ in range(pieces)]

    def compute(step: int, batch: list) -> torch.Tensor:
        inputs = []
        for readable, images, unreadable in batch:
            for row, reason in unreadable:
                raise InputError(f"{data.rows[row]}: {reason}")
            tokens = model.encoder.tokenize([texts[row] for row in readable], config.truncate)
            inputs.append([tensor.to(device) for tensor in (images, *tokens.values())])
        return contrastive_step(model, inputs, config.seed * 1_000_003 + step, lambda: autocast(config))

    def rate(step: int) -> float:
        return learning_rate(step, config.steps, config.lr, round(config.warmup * config.steps), 1e-8)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay)
    path = Path(config.output) / "stage1.pt"
    train(model, optimizer, compute, batches, rate, config.steps, path, config.save_every, "stage 1")
    return model.eval().requires_grad_(False)


def autocast(config: Config):
    kind = retune.pick_device(config.device).split(":")[0]
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


def stage1(config: Config, data: Radiographs) -> Cleft:
    """The model that `pretrain` left in --output; InputError when it is not finished."""
    model, path = build(config, data), Path(config.output) / "stage1.pt"
    if restore(path, model) < config.steps:
        raise InputError(
            f"{path}: stage 1 is not finished; run `python cleft.py pretrain` with the same options"
        )
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- Stage 2


class Prompt(nn.Module):
    """Learned context tokens [n,H] before each class name, read by the frozen text tower."""

    def __init__(self, model: Cleft, class_names: Sequence[str], config: Config):
        super().__init__()
        encoder = model.encoder
        self.text, self.scale = [encoder.text], model.scale.detach()  # in a list: not a part of this module
        embedding = encoder.text.tower.get_input_embeddings()
        self.names = [split_tokens(encoder.tokenizer, name.lower(), embedding) for name in class_names]
        words = split_tokens(encoder.tokenizer, config.base_caption, embedding)[1]
        repeats = math.ceil(config.context_tokens / len(words))
        self.context = nn.Parameter(words.repeat(repeats, 1)[: config.context_tokens].clone())
        longest = config.context_tokens + max(sum(map(len, parts)) for parts in self.names)
        limit = getattr(encoder.text.tower.config, "max_position_embeddings", longest)
        if longest > limit:
            raise InputError(
                f"--context-tokens {config.context_tokens}: {longest} tokens, the text tower reads {limit}"
            )

    def forward(self) -> torch.Tensor:
        """Unit vectors of the texts [C,D]: [start tokens] [context] [class name] [end tokens], last token."""
        rows = [torch.cat([start, self.context, name, end]) for start, name, end in self.names]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [C,T,H]
        lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
        mask = (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()
        hidden = self.text[0].tower(inputs_embeds=inputs, attention_mask=mask)["last_hidden_state"]
        last = hidden[torch.arange(len(rows), device=inputs.device), lengths - 1]
        return F.normalize(self.text[0].head(last).float(), dim=1)

    def learned(self) -> dict[str, torch.Tensor]:
        return {"context": self.context}


def split_tokens(tokenizer, text: str, embedding: nn.Module) -> list[torch.Tensor]:
    """Token embeddings [t,H] of a text: what the tokenizer puts before it, the text, what comes after."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not plain:
        raise InputError(f"the class name or caption {text!r} has no tokens; rename it")
    whole = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    parts = whole[:start], plain, whole[start + len(plain) :]
    return [
        embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device)).detach()
        for ids in parts
    ]


def tune_prompt(model: Cleft, data: Radiographs, embeddings: np.ndarray, config: Config) -> Prompt:
    """Stage 2: multi-label binary cross-entropy of the scaled cosines; only the context tokens change.

    The image tower is frozen, so its stored embeddings [N,D] serve; class texts are encoded once a step.
    """
    prompt = Prompt(model, data.class_names, config)
    device, labels = prompt.context.device, torch.from_numpy(data.labels)
    known = ~np.isnan(data.labels).all(1) & ~np.isnan(embeddings[:, 0])
    rows, size = np.intersect1d(data.where("train"), np.flatnonzero(known)), config.batch_size

    def compute(step: int, batch: np.ndarray) -> torch.Tensor:
        images = F.normalize(torch.from_numpy(np.array(embeddings[batch], np.float32)).to(device), dim=1)
        loss = retune.prompt_contrastive_loss(prompt.scale * images @ prompt().T, labels[batch].to(device))
        (loss / retune.ranks()[1]).backward()  # every rank computes the whole batch: it is a few cosines
        return loss.detach()

    def batches(first: int):
        return batch_rows(rows, size, first, config.prompt_steps, config.seed + 1)

    def rate(step: int) -> float:
        warmup = min(100, config.prompt_steps // 10)
        return learning_rate(step, config.prompt_steps, config.prompt_lr, warmup, config.prompt_lr / 10)

    optimizer = torch.optim.SGD([prompt.context], config.prompt_lr, momentum=0.9, weight_decay=1e-3)
    path = Path(config.output) / "stage2.pt"
    train(prompt, optimizer, compute, batches, rate, config.prompt_steps, path, config.save_every, "stage 2")
    return prompt.requires_grad_(False)


# ------------------------------------------------------------------------------------------------- Evaluation


def embed_images(model: Cleft, data: Radiographs, config: Config) -> np.ndarray:
    """Stored image embeddings [N,D] of the tuned image tower."""
    device = retune.pick_device(config.device)
    options = {"batch_size": 64, "workers": config.workers, "precision": config.precision, "device": device}
    return retune.embed(model.encoder, data, Path(config.cache_dir), **options)


def class_texts(model: Cleft, data: Radiographs, config: Config) -> torch.Tensor:
    """Unit vectors [C,D] of the base caption followed by each class name: the prompt before stage 2."""
    device = retune.pick_device(config.device)
    texts = [f"{config.base_caption} {name.lower()}" for name in data.class_names]
    tokens = model.encoder.tokenize(texts)
    with torch.inference_mode():
        return F.normalize(model.encoder.text(*(t.to(device) for t in tokens.values())).float(), dim=1)


def measure(scores: np.ndarray, data: Radiographs, rows: np.ndarray) -> dict:
    """Multi-label AUROC and average precision of scores [n,C] on `rows`, with a patient-level interval."""
    labels = data.labels[rows]
    found = retune.evaluate(scores, np.zeros_like(scores), labels, data.class_names)
    low, high = retune.bootstrap_ci(scores, labels, data.patients[rows])
    kept = ("auroc_macro", "ap_macro", "auroc", "n")
    return {key: found[key] for key in kept} | {"auroc_macro_ci": [low, high]}


def balanced_rows(data: Radiographs, rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k rows a class (fewer if the rarest class has fewer) among those with exactly one positive finding."""
    single = rows[np.nansum(data.labels[rows], axis=1) == 1]
    label = np.nanargmax(data.labels[single], axis=1) if len(single) else np.zeros(0, int)
    counts = np.bincount(label, minlength=len(data.class_names))
    if counts.min() == 0:
        name = data.class_names[int(counts.argmin())]
        raise InputError(f"no test image has {name} as its only finding; --balanced 0 leaves that test out")
    generator, k = np.random.default_rng(seed), min(k, int(counts.min()))
    return np.concatenate([generator.permutation(single[label == c])[:k] for c in range(len(counts))])


def measure_balanced(logits: np.ndarray, data: Radiographs, rows: np.ndarray) -> dict:
    """Accuracy and macro one-vs-rest AUROC of softmax(logits [n,C]) on single-label rows."""
    labels = (np.nan_to_num(data.labels[rows]) == 1).astype(np.float32)
    share = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    low, high = retune.bootstrap_ci(share, labels, data.patients[rows])
    accuracy = float((share.argmax(1) == labels.argmax(1)).mean())
    auroc = retune.evaluate(share, np.zeros_like(share), labels, data.class_names)["auroc_macro"]
    return {"accuracy": accuracy, "auroc_macro": auroc, "auroc_macro_ci": [low, high], "n": len(rows)}


def linear_probe(
    embeddings: np.ndarray, data: Radiographs, train_rows: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Scores [n,C] of one logistic regression a class on standardised frozen embeddings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros((len(rows), len(data.class_names)))
    for c in range(scores.shape[1]):
        known = train_rows[~np.isnan(data.labels[train_rows, c])]
        if len(np.unique(data.labels[known, c])) == 2:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            probe.fit(embeddings[known], data.labels[known, c])
            scores[:, c] = probe.decision_function(embeddings[rows])
    return scores


def finetune(model: Cleft, data: Radiographs, rows: np.ndarray, config: Config) -> np.ndarray:
    """Scores [n,C] of a copy of the image tower with a linear classifier, all of it trained on the labels."""
    device, train_rows = retune.pick_device(config.device), data.where("train")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        last = nn.Linear(config.dim, len(data.class_names))
    classifier = nn.Sequential(copy.deepcopy(model.encoder.image), last)
    classifier.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), config.lr, weight_decay=config.weight_decay)
    pixels = retune.Images(data.images, model.encoder.transform)
    size = min(config.batch_size, len(train_rows))

    def loader(batches: list):
        options = {"collate_fn": retune.collate, "num_workers": config.workers}
        return torch.utils.data.DataLoader(pixels, batch_sampler=batches, **options)

    steps = config.finetune_epochs * (len(train_rows) // size)
    batches = [batch.tolist() for batch in batch_rows(train_rows, size, 0, steps, config.seed + 2)]
    for batch, images, _ in retune.progress(loader(batches), desc="fine-tuning", unit="step"):
        logits = classifier(images.to(device))
        loss = retune.prompt_contrastive_loss(logits, torch.from_numpy(data.labels[batch]).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval()
    with torch.inference_mode():
        blocks = loader(np.array_split(rows, len(rows) // 64 + 1))
        parts = [classifier(images.to(device)).cpu() for _, images, _ in blocks]
    return torch.cat(parts).numpy()


def evaluate(config: Config, data: Radiographs) -> dict:
    """Every measure on the test split; writes evaluation.json, evaluation.md and balanced.csv to --output."""
    folder, model = Path(config.output), stage1(config, data)
    embeddings, test = embed_images(model, data, config), data.where("test")  # by all ranks; the rest by one
    if retune.ranks()[0] > 0:
        return {}
    images = F.normalize(torch.from_numpy(np.array(embeddings[test], np.float32)), dim=1)
    texts = {"zero-shot": class_texts(model, data, config)}
    prompt = Prompt(model, data.class_names, config)
    if restore(folder / "stage2.pt", prompt) == config.prompt_steps:
        with torch.inference_mode():
            texts["zero-shot, learned context"] = prompt()
    else:
        retune.say("stage 2 is not finished: no learned context is evaluated")
    results = {name: measure((images @ t.cpu().T).numpy(), data, test) for name, t in texts.items()}
    results["linear probe"] = measure(linear_probe(embeddings, data, data.where("train"), test), data, test)
    if config.finetune_epochs:
        results["full fine-tuning"] = measure(finetune(model, data, test, config), data, test)
    if config.balanced:
        chosen = balanced_rows(data, test, config.balanced, config.seed)
        at = np.searchsorted(test, chosen)
        for name, t in texts.items():
            logits = (model.scale.cpu() * images[at] @ t.cpu().T).numpy()
            results[f"balanced, {name}"] = measure_balanced(logits, data, chosen)
        lines = [f"{data.names[r]},{data.class_names[int(np.nanargmax(data.labels[r]))]}" for r in chosen]
        (folder / "balanced.csv").write_text("\n".join(["image,class", *lines]) + "\n", encoding="utf-8")
    retune.write_json(folder / "evaluation.json", results)
    header = ["test", "AUROC", "95% interval", "accuracy", "images"]
    rows = [[name, r["auroc_macro"], "{:.3f}-{:.3f}".format(*r["auroc_macro_ci"]), r.get("accuracy"), r["n"]]
            for name, r in results.items()]  # fmt: skip
    table = retune.markdown_table(header, rows)
    (folder / "evaluation.md").write_text(table + "\n", encoding="utf-8")
    retune.say(table)
    return results


def export(config: Config, data: Radiographs, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the tuned encoder in retune.py's folder format, LoRA and IA3 merged into the weights."""
    model = stage1(config, data)
    tower = model.encoder.text.tower
    if config.peft == "prefix":
        raise InputError(
            "--peft prefix: virtual tokens cannot be merged into weights; export lora, ia3 or none"
        )
    if config.peft != "none":
        model.encoder.text.tower = tower.merge_and_unload()
    model.encoder.config["name"] = target.name
    if retune.ranks()[0] == 0:
        model.encoder.cpu().save(target, dtype)
    retune.say(f"written to {target}")


# --------------------------------------------------------------------------------------------------- Counting

REAL = {  # the published architectures, from their configs
    "image": {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "patch_size": 14, "image_size": 518},
    "text": {"model_type": "gpt2", "n_embd": 2560, "n_layer": 32, "n_head": 20, "n_positions": 1024,
             "vocab_size": 28896, "bos_token_id": None, "eos_token_id": None},
    "bert": {"model_type": "bert"},
    "clip": {"model_type": "clip_text_model"},
}  # fmt: skip


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count(config: Config) -> str:
    """A table of trainable parameters on meta tensors: CLEFT's towers against fully trained text towers."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        towers = {name: AutoModel.from_config(AutoConfig.for_model(**model)) for name, model in REAL.items()}
        total = sum(p.numel() for p in towers["text"].parameters())
        tuned = add_peft(towers["text"].requires_grad_(False), config)
    dim, bert = 512, trainable(towers["bert"])
    image = trainable(towers["image"]) + 768 * dim
    kinds = {  # the text tower's trainable parameters and width
        f"CLEFT: GPT-2 architecture of {total / 1e9:.2f} B, {config.peft}": (trainable(tuned), 2560),
        "BERT-base, all of it": (bert, 768),
        "CLIP's text transformer, all of it": (trainable(towers["clip"]), 512),
    }
    rows, ours = [], None
    for name, (text, width) in kinds.items():
        heads = width * dim
        whole = image + text + heads
        ours = ours or whole
        counts = [f"{number:,}" for number in (image, text, heads, whole)]
        rows.append([name, *counts, f"{(text + heads) / bert:.1%}", f"{1 - ours / whole:.1%}"])
    header = [
        "text tower",
        "image and head",
        "text",
        "text head",
        "total",
        "text and head / BERT",
        "CLEFT trains fewer by",
    ]
    return retune.markdown_table(header, rows)


# ----------------------------------------------------------------------------------------------- Command line

EVALUATION = ("balanced", "finetune_epochs", "save_every")  # settings that the stages do not depend on
DATASETS = {"pretrain": load_pretrain, "rsna": load_rsna, "embed": load_embed}


def run(command: str, config: Config, target: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
    """One command, or `all` of them in order; every stage finds in --output what the one before left."""
    data_config = retune.Config(**{key: getattr(config, key) for key in retune.DATA_KEYS})
    data, folder = two_classes(retune.load_radiographs(data_config)), Path(config.output)
    retune.say(data.note)
    folder.mkdir(parents=True, exist_ok=True)
    with retune.locked(folder, wait=False) if retune.ranks()[0] == 0 else contextlib.nullcontext():
        if retune.ranks()[0] == 0:
            retune.claim(folder, {k: v for k, v in dataclasses.asdict(config).items() if k not in EVALUATION})
        retune.barrier()
        if command in ("pretrain", "all"):
            pretrain(config, data)
        if command in ("prompt", "all"):
            model = stage1(config, data)
            tune_prompt(model, data, embed_images(model, data, config), config)
        if command in ("evaluate", "all"):
            evaluate(config, data)
        if command == "export":
            export(config, data, target, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 on success, 2 with one line on standard error for bad input."""
    parser = retune.build_parser(Config, __doc__)
    commands = ("pretrain", "prompt", "evaluate", "all", "export", "count", "make-tiny")
    parser.add_argument("command", choices=commands)
    parser.add_argument("--to", type=Path, help="new folder, for export and make-tiny")
    arguments = parser.parse_args(argv)
    for name, loader in DATASETS.items():
        retune.DATASETS.setdefault(name, loader)
    try:
        config = settle(retune.build_configs(Config, arguments)[0])
        retune.join_ranks()
        if arguments.command == "count":
            print(count(config))
        elif arguments.command == "make-tiny":  # a preset of stage 1, no trainer of its own
            if (target := arguments.to or HERE / "tiny").exists():
                raise InputError(f"{target} exists: move it away, or name another folder with --to")
            folder = "runs/tiny" if arguments.output == Config.output else arguments.output
            config = settle(Config(**TINY, output=folder))
            torch.set_num_threads(1)  # the bytes do not depend on the number of cores
            run("pretrain", config)
            run("export", config, target, torch.float16)
        elif arguments.command == "export" and arguments.to is None:
            raise InputError("export needs --to, a new folder")
        else:
            run(arguments.command, config, arguments.to)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
