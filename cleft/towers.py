"""The two towers of `cleft.py`: built from published configs and weights, tuned, trained, counted.

An encoder of any image tower and any causal language model, the tokenizer of the small one, PEFT (LoRA, IA3,
prefix tuning), the training loop of both stages with its checkpoints, parameter counts. `config` is
cleft.Config; `retune.py` defines the format of encoders.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import retune
from retune import HERE, DualEncoder, InputError, Radiographs, one_line

if TYPE_CHECKING:
    from cleft.__main__ import Config

# ------------------------------------------------------------------------------------- Encoder of both towers

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
        fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
        part.load_state_dict(fitting, strict=False)
    return encoder


def head(width: int, dim: int) -> list:
    return [["Linear", {"in_features": width, "out_features": dim, "bias": False}]]


def image_part(config: Config) -> tuple[dict, dict, dict]:
    """config.json's "image" and "transform", and the tower's published weights."""
    if config.image == "small":
        transform = {"resize": 64, "crop": 64, "interpolation": "bilinear"}
        transform |= {"mean": [0.5] * 3, "std": [0.25] * 3}
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
    option = f"--text {config.text}"
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
        raise InputError(f"{option}: no tokenizer ({one_line(error)})") from None
    if config.pad_token is not None:
        tokenizer.pad_token = config.pad_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"{option}: its tokenizer has no padding token; name one with --pad-token")
    if len(tokenizer) > tower.config.vocab_size:
        sizes = f"{len(tokenizer)} tokens for {tower.config.vocab_size} embeddings"
        raise InputError(f"{option}: {sizes}; use its own tokenizer and a --pad-token that it knows")
    part = {"model": model, "head": head(tower.config.hidden_size, config.dim), **reading}
    return part, tokenizer, prefixed(tower)


def our_part(name: str, part: str, dim: int):
    """(tower's config with a head for `dim`, config, weights, tokenizer) of our folder `name`, or None."""
    folder = HERE / "tiny" if name == "tiny" else Path(name)
    if not retune.is_ours(folder):
        return None
    config, state, tokenizer = retune.read_folder(folder)
    own, prefix = config[part], f"{part}."
    if dim != config["dim"]:
        own = own | {"head": head(next(iter(own["head"]))[1]["in_features"], dim)}
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return own, config, state, tokenizer


def published(source: str):
    """A transformers model and what its config needs to be built again, from a hub id or a folder."""
    from transformers import AutoModel

    try:
        tower = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: no transformers model ({one_line(error)})") from None
    dropped = ("transformers_version", "architectures", "dtype", "_name_or_path")
    return tower, {k: v for k, v in tower.config.to_diff_dict().items() if k not in dropped}


def prefixed(tower: nn.Module) -> dict[str, torch.Tensor]:
    return {f"tower.{key}": value for key, value in tower.state_dict().items()}


# --------------------------------------------------------------------------------------------------- Language


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


def split_tokens(tokenizer, text: str, embedding: nn.Module) -> list[torch.Tensor]:
    """Token embeddings [t,H] of a text: what the tokenizer puts before it, the text, what comes after."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not plain:
        raise InputError(f"the class name or caption {text!r} has no tokens; rename it")
    whole, device = tokenizer(text)["input_ids"], embedding.weight.device
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    parts = whole[:start], plain, whole[start + len(plain) :]
    return [embedding(torch.tensor(ids, dtype=torch.long, device=device)).detach() for ids in parts]


def recompute(tower: nn.Module) -> None:
    """Save memory: activations are computed again in the backward pass. InputError if unfit."""
    if not getattr(tower, "supports_gradient_checkpointing", True):
        raise InputError(f"--checkpointing: {type(tower).__name__} does not support it; leave it out")
    tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
        problem = f"the text tower ({type(tower).__name__}) does not support it ({one_line(error)})"
        raise InputError(f"--peft {config.peft}: {problem}") from None


# --------------------------------------------------------------------------------------------------- Training


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


def load_pixels(images: Sequence, transform: Callable, batches: Iterable[Sequence[int]], workers: int):
    """For the rows of each batch: (readable rows, their pixels [B,3,h,w], unreadable rows with reasons)."""
    options = {"batch_sampler": batches, "collate_fn": retune.collate, "num_workers": workers}
    return torch.utils.data.DataLoader(retune.Images(images, transform), **options)


def rank_batches(data: Radiographs, transform: Callable, first: int, config: Config) -> Iterator[list]:
    """This rank's share of each of stage 1's batches from `first` on: a list of what `load_pixels` gives."""
    (rank, world), pieces, rows = retune.ranks(), config.accumulate, data.where("train")
    drawn = hasattr(data.images, "phantoms")  # phantoms are drawn once, not in every epoch
    images = np.stack([data.images[i] for i in range(len(data.images))]) if drawn else data.images
    whole = batch_rows(rows, config.batch_size, first, config.steps, config.seed)
    own = (part.tolist() for batch in whole for part in np.split(np.split(batch, world)[rank], pieces))
    stream = iter(load_pixels(images, transform, own, config.workers))
    for _ in range(first, config.steps):
        yield [next(stream) for _ in range(pieces)]


def train(
    stage: int, model: nn.Module, optimizer: torch.optim.Optimizer, compute: Callable, batches: Callable,
    rates: tuple, config: Config,
) -> nn.Module:  # fmt: skip
    """The loop of both stages. Resumes from stage<n>.pt exactly: all randomness depends on the step.

    compute(step, batch) leaves gradients and returns the loss; batches(first) yields from step `first` on;
    rates: learning_rate's peak, warmup, floor. Returns the model, frozen. InputError when the loss is not
    finite; the last checkpoint stays.
    """
    steps, path = (config.steps, config.prompt_steps)[stage - 1], config.folder / f"stage{stage}.pt"
    trained, first = [p for p in model.parameters() if p.requires_grad], restore(path, model, optimizer)
    bar = retune.progress(batches(first), desc=f"stage {stage}", unit="step", total=steps, initial=first)
    for step, batch in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, *rates)
        optimizer.zero_grad(set_to_none=True)
        loss = compute(step, batch).item()
        if not math.isfinite(loss):
            raise InputError(f"stage {stage}, step {step + 1}: the loss is {loss}; lower the learning rate")
        retune.sum_gradients([p for p in trained if p.grad is not None])
        optimizer.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if ((step + 1) % config.save_every == 0 or step + 1 == steps) and retune.ranks()[0] == 0:
            state, buffer = {"step": step + 1, "model": model.learned()}, io.BytesIO()
            torch.save(state | {"optimizer": optimizer.state_dict()}, buffer)
            with retune.atomic(path) as partial:
                partial.write_bytes(buffer.getbuffer())  # a full disk is an OSError here, not in torch.save
    retune.barrier()
    return model.eval().requires_grad_(False)


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
            known, groups = state["optimizer"]["state"], optimizer.state_dict()["param_groups"]
            if len({frozenset(values) for values in known.values()}) > 1:
                raise ValueError("the optimiser's state is incomplete")
            if any(float(values.get("step", 0)) < 0 for values in known.values()):
                raise ValueError("a negative number of steps")
            optimizer.load_state_dict({"state": known, "param_groups": groups})
        return state["step"]
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly every type
        problem = f"damaged or of another configuration ({one_line(error)}); delete it"
        raise InputError(f"{path}: {problem}") from None


# --------------------------------------------------------------------------------------------------- Counting

REAL = {  # the published architectures, from their configs
    "image": {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "patch_size": 14, "image_size": 518},
    "text": {"model_type": "gpt2", "n_embd": 2560, "n_layer": 32, "n_head": 20, "n_positions": 1024,
             "vocab_size": 28896, "bos_token_id": None, "eos_token_id": None},
    "bert": {"model_type": "bert"},
    "clip": {"model_type": "clip_text_model"},
}  # fmt: skip


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def trainable_parts(encoder: DualEncoder) -> str:
    """One line: how many parameters of each part are trained, of how many."""
    parts = {"image": encoder.image, "text tower": encoder.text.tower, "text head": encoder.text.head}
    counts = [f"{name} {trainable(part):,} of {parameters(part):,}" for name, part in parts.items()]
    return f"trainable parameters: {', '.join(counts)}"


def count(config: Config) -> str:
    """A table of trainable parameters on meta tensors: CLEFT's towers against fully trained text towers."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        towers = {name: AutoModel.from_config(AutoConfig.for_model(**model)) for name, model in REAL.items()}
        total = parameters(towers["text"])
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
    header = ["text tower", "image and head", "text", "text head", "total", "text and head / BERT"]
    return retune.markdown_table([*header, "CLEFT trains fewer by"], rows)
