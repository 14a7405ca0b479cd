"""The encoder that is trained: both towers, published or small, their tokenizer, PEFT and counts."""

import dataclasses
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import retune
from cleft.config import PEFT, Config
from retune import HERE, DualEncoder, InputError

SMALL_IMAGE = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128],
               "depths": [1, 1, 1, 1], "layer_type": "basic"}  # fmt: skip
SMALL_TEXT = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None,
              "eos_token_id": None}  # fmt: skip
COMMON = 10  # texts that a word must be in to be learnt: a name in a report must not become part of a model
# The published architectures, from their configs
REAL = {
    "image": {"model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12,
              "num_attention_heads": 12, "patch_size": 14, "image_size": 518},
    "text": {"model_type": "gpt2", "n_embd": 2560, "n_layer": 32, "n_head": 20, "n_positions": 1024,
             "vocab_size": 28896, "bos_token_id": None, "eos_token_id": None},
    "BERT-base": {"model_type": "bert"},
    "CLIP's text transformer": {"model_type": "clip_text_model"},
}  # fmt: skip


def build_encoder(config: Config, texts: list[str] | tuple = (), words: Path | None = None) -> DualEncoder:
    """An encoder of the two towers; `texts`, or `words` of an earlier run, teach a small text tower."""
    image, transform, image_weights = image_part(config)
    text, tokenizer, text_weights = text_part(config, texts, words)
    parts = {"image": image, "text": text, "transform": transform}
    with retune.seeded(config.seed):
        encoder = DualEncoder({"name": "cleft", "dim": config.dim, **parts}, tokenizer)
    if config.image_tower == "random":
        image_weights = {}
    for part, weights in ((encoder.image, image_weights), (encoder.text, text_weights)):
        own = part.state_dict()
        fits = {k: value for k, value in weights.items() if k in own and value.shape == own[k].shape}
        part.load_state_dict(fits, strict=False)
    return encoder


def projection(width: int, config: Config) -> list:
    """A tower's head: one linear layer to the joint dimension."""
    return [retune.linear(width, config.dim, config.projection_bias)]


def image_part(config: Config) -> tuple[dict, dict, dict]:
    """config.json's "image" and "transform", and the tower's published weights."""
    half = [0.5] * 3
    if config.image == "small":
        transform = {"resize": 64, "crop": 64, "interpolation": "bilinear", "mean": half, "std": [0.25] * 3}
        return {"model": SMALL_IMAGE, "pool": "mean", "head": projection(128, config)}, transform, {}
    if own := read_own_part(config.image, "image", config):
        return own
    tower, model, weights = read_published_tower(config.image)
    side = getattr(tower, "image_size", 224)
    side = side if side % getattr(tower, "patch_size", 1) == 0 and side < 512 else 224
    larger = [round(side * 256 / 224)] * 2
    transform = {"resize": larger, "crop": side, "interpolation": "bilinear", "mean": half, "std": half}
    # The mean before the last norm; a convolutional tower has no such tokens
    pool = "pre_norm_mean" if hasattr(tower, "num_hidden_layers") else "mean"
    width = getattr(tower, "hidden_size", None) or tower.hidden_sizes[-1]
    return {"model": model, "pool": pool, "head": projection(width, config)}, transform, weights


def text_part(config: Config, texts: list[str], words: Path | None = None) -> tuple[dict, object, dict]:
    """config.json's "text", its tokenizer, and the tower's published weights."""
    reading = {"pool": "last", "context_length": config.context_length, "padding": "longest"}
    if config.text == "small":
        tokenizer = train_tokenizer(texts, words)
        model = SMALL_TEXT | {"vocab_size": len(tokenizer), "n_positions": config.context_length}
        return {"model": model, "head": projection(64, config), **reading}, tokenizer, {}
    if own := read_own_part(config.text, "text", config):
        return own
    tower, model, weights = read_published_tower(config.text)
    tokenizer = read_tokenizer(config)
    if len(tokenizer) > tower.vocab_size:
        raise InputError(f"--text {config.text}: {len(tokenizer)} tokens for {tower.vocab_size} embeddings")
    return {"model": model, "head": projection(tower.hidden_size, config), **reading}, tokenizer, weights


def read_own_part(name: str, part: str, config: Config) -> tuple[dict, object, dict] | None:
    """What `image_part` or `text_part` returns, from a folder of ours, with a head for --dim; else None."""
    folder = HERE / "demo" / "tiny" if name == "tiny" else Path(name)
    path = folder / "config.json"
    if not path.is_file() or "dim" not in retune.read_json(path):
        return None
    whole, state, tokenizer = retune.read_encoder(folder)
    own = whole[part]
    if config.dim != whole["dim"] or not own["head"]:
        width = own["head"][0][1]["in_features"] if own["head"] else whole["dim"]
        own = own | {"head": projection(width, config)}
    start = f"{part}."
    weights = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    return own, whole["transform"] if part == "image" else tokenizer, weights


def read_published_tower(source: str):
    """A transformers model's config, the part of it that rebuilds the model, and its weights."""
    from transformers import AutoModel

    with retune.input_errors(source, "no transformers model"):
        tower = AutoModel.from_pretrained(source, dtype=torch.float32)
    dropped = ("transformers_version", "architectures", "dtype", "_name_or_path")
    model = {key: value for key, value in tower.config.to_diff_dict().items() if key not in dropped}
    return tower.config, model, {f"tower.{key}": value for key, value in tower.state_dict().items()}


def read_tokenizer(config: Config):
    """The tokenizer of --text with padding, and an end-of-text token after every text: the text feature's."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    with retune.input_errors(f"--text {config.text}", "no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.text)
    end = tokenizer.eos_token
    tokenizer.pad_token = config.pad_token or tokenizer.pad_token or end
    ended = tokenizer("a")["input_ids"][-1] in tokenizer.all_special_ids
    if tokenizer.pad_token_id is None or not (ended or (end and tokenizer.is_fast)):
        raise InputError(f"--text {config.text}: its tokenizer lacks an end-of-text token, or a --pad-token")
    if not ended:
        template = processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def train_tokenizer(texts: list[str], trained: Path | None = None):
    """Byte-level BPE in lower case without a final full stop, an end token after every text; common words of
    `texts` and those of prompts.json are tokens. `trained` is read instead."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    wrapped = {"pad_token": "<pad>", "eos_token": "<end>"}
    if trained is not None:
        return PreTrainedTokenizerFast(tokenizer_file=str(trained), **wrapped)
    tokenizer = Tokenizer(models.BPE())
    endings = normalizers.Replace(Regex(r"[.\s]+$"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), endings])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"vocab_size": 2048, "show_progress": False, "initial_alphabet": sorted(ByteLevel.alphabet())}
    trainer = trainers.BpeTrainer(special_tokens=list(wrapped.values()), **options)

    def plain(word: str) -> str:
        return word.lower().strip(".,:;()")

    count = Counter(word for text in texts for word in {plain(word) for word in text.split()})
    texts = [" ".join(word for word in text.split() if count[plain(word)] >= COMMON) for text in texts]
    words = set(texts) | set(re.findall(r'"([^"]+)"', (HERE / "prompts.json").read_text(encoding="utf-8")))
    tokenizer.train_from_iterator(sorted(words), trainer)
    end = ("<end>", tokenizer.token_to_id("<end>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **wrapped)


def add_peft(tower: nn.Module, config: Config) -> nn.Module:
    """`tower`, trainable by --peft: PEFT's weights, nothing (frozen) or all (none). InputError if unfit."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model

    if config.peft in ("frozen", "none"):
        return tower.requires_grad_(config.peft == "none")
    transposed = any(type(layer).__name__ == "Conv1D" for layer in tower.modules())  # GPT-2's linear layers
    rank = config.lora_rank
    options = {"task_type": "FEATURE_EXTRACTION"}
    if config.peft != "prefix":
        options["fan_in_fan_out"] = transposed
    if config.peft in ("lora", "adalora"):
        options |= {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    own = {
        "lora": (LoraConfig, {"r": rank}), "ia3": (IA3Config, {}),
        "adalora": (AdaLoraConfig, {"init_r": rank * 3 // 2, "target_r": rank, "total_step": config.steps}),
        "prefix": (PrefixTuningConfig, {"num_virtual_tokens": config.prefix_tokens}),
    }  # fmt: skip
    kind, settings = own[config.peft]
    trouble = f"the text tower ({type(tower).__name__}) does not support it"
    with retune.input_errors(f"--peft {config.peft}", trouble), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries deprecate in each other
        return get_peft_model(tower, kind(**settings, **options))


def trainable(module: nn.Module) -> int:
    """How many parameters of a module are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count_published(config: Config) -> str:
    """A table of trainable parameters: CLEFT with every --peft, and other text towers trained whole."""
    from transformers import AutoConfig, AutoModel

    def build(name: str) -> nn.Module:
        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.for_model(**REAL[name]))

    bert = trainable(build("BERT-base"))
    image = trainable(build("image")) + 769 * 512
    kinds = {}  # the text tower's trainable parameters, and those of its projection to 512
    for peft in dict.fromkeys((config.peft, *PEFT)):
        with torch.device("meta"):
            tower = add_peft(build("text").requires_grad_(False), dataclasses.replace(config, peft=peft))
        kinds[f"CLEFT: GPT-2 architecture of 2.59 B, {peft}"] = trainable(tower), 2561 * 512
    kinds |= {"BERT-base, all of it": (bert, 769 * 512)}
    kinds |= {"CLIP's text transformer, all of it": (trainable(build("CLIP's text transformer")), 513 * 512)}
    first = image + sum(kinds[next(iter(kinds))])
    rows = []
    for name, (text, head) in kinds.items():
        whole = image + text + head
        counts = [f"{number:,}" for number in (image, text, head, whole)]
        rows.append([name, *counts, f"{(text + head) / bert:.1%}", f"{1 - first / whole:.1%}"])
    header = ["text tower", "image and head", "text", "text head", "total", "text and head / BERT"]
    return retune.markdown_table([*header, f"{config.peft} trains fewer by"], rows)
