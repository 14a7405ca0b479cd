"""Frozen unimodal encoders for `adaptor.py`: of transformers, torchvision, a folder, or the demo's own two.

The demo's towers are trained here, each on its own: the image tower learns to clean noisy phantoms (a
convolutional autoencoder, no text), the text tower to fill in masked words of reports (a BERT, no image), on
phantoms of other patients than the demo's. No image and report is ever paired, so whatever alignment the demo
shows was learned by the adaptor. That would not be so for the towers of `tiny`, which were trained together.

Also here is what every stage does with them: embedding, epochs that resume, export with an adaptor, sizes.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import DualEncoder, InputError, Radiographs, locked, one_line, progress, say

# -------------------------------------------------------------------------------------- What every stage uses


class Side:
    """One tower of a pair as retune's `embed` needs an encoder; the cache is keyed by this tower alone."""

    def __init__(self, encoder: DualEncoder, side: str, dim: int):
        self.encoder, self.side, self.dim, self.transform = encoder, side, dim, encoder.transform

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the side's config (the image's with its transform) and of every tensor."""
        config = [type(self).__name__, self.encoder.config[self.side]]
        config += [self.encoder.config["transform"]] if self.side == "image" else []
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for key, tensor in sorted(getattr(self.encoder, self.side).state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
        return digest.hexdigest()

    def to(self, device: str) -> Side:
        self.encoder.to(device)
        return self

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transformed pixels [B, 3, H, W] -> image embeddings [B, d_image], not normalised."""
        return self.encoder.encode_images(pixels)


def embed(side: Side, data: Radiographs, config, device: str, store: str | None = None) -> np.memmap:
    """retune's `embed` with this run's settings: read-only memory map [N, d], not normalised."""
    return retune.embed(
        side, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
        precision=config.precision, store=store or config.store, device=device,
        skip_bad_images=config.skip_bad_images,
    )  # fmt: skip


def train_epochs(folder: Path, model, optimizer, epochs: int, seed: int, one_epoch: Callable) -> list[dict]:
    """Call `one_epoch(k)` for each epoch that `folder` does not hold yet; its results, in order.

    Each draws from a seed of its own and ends on disk: a killed process goes on with the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, _ = retune.restore(folder, model, optimizer)
    history = retune.read_json(folder / "history.json")[:done] if done else []
    for k in progress(range(done, epochs), initial=done, total=epochs, desc=folder.name, unit="epoch"):
        with retune.seeded(seed * 10_007 + k):
            history.append(one_epoch(k))
        retune.write_json(folder / "history.json", history)
        retune.keep(folder, model, optimizer, k + 1, 0.0)
    return history


# ------------------------------------------------------------------------------------------------ Any encoder


def load_backbones(config) -> DualEncoder:
    """The two frozen towers without heads: `encode_images` [B, d_image], `encode_texts` [M, d_text].

    Of an encoder in retune's folder format (`tiny` too) only the tower is used, never its joint projection.
    """
    image, image_state, transform = load_side("image", config.image_encoder, config.image_pool, config)
    text, text_state, tokenizer = load_side("text", config.text_encoder, config.text_pool, config)
    name = f"{config.image_encoder} + {config.text_encoder}"
    with retune.seeded(0):
        parts = {"name": name, "dim": 0, "image": image, "text": text, "transform": transform}
        encoder = DualEncoder(parts, tokenizer)
    expected, given = encoder.state_dict(), image_state | text_state
    state = {k: v for k, v in given.items() if k in expected}  # unused poolers stay behind
    encoder.load_weights(state, name)
    try:
        encoder.config["dim"] = encoder.dim = encoder.encode_images(blank_pixels(encoder)).shape[-1]
    except Exception as error:  # noqa: BLE001, a tower of another kind fails in its own way
        raise no_hidden_states("image", config.image_encoder, error) from None
    try:
        encoder.text_dim = encoder.encode_texts(["no finding"]).shape[-1]
    except Exception as error:  # noqa: BLE001
        raise no_hidden_states("text", config.text_encoder, error) from None
    return encoder


def no_hidden_states(side: str, name: str, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {one_line(error)}"
    return InputError(
        f"--{side}-encoder {name}: gives no hidden states for {side}s ({reason}); name another {side} model"
    )


def blank_pixels(encoder: DualEncoder) -> torch.Tensor:
    """A transformed blank square image [1, 3, H, W]."""
    return encoder.transform(torch.zeros(1, 64, 64, dtype=torch.uint8))[None]


def load_side(side: str, name: str, pool: str | None, config) -> tuple[dict, dict, object]:
    """(part of a DualEncoder's config, tensors, transform or tokenizer) of one unimodal encoder."""
    folder = retune.HERE / name if name == "tiny" else Path(name)
    if name == "demo" or retune.is_ours(folder):
        encoder = demo_encoder(Path(config.cache_dir)) if name == "demo" else DualEncoder.load(str(folder))
        part = copy.deepcopy(encoder.config[side]) | {"head": []}
        part["pool"] = pool or ("mean" if part["pool"] == "none" else part["pool"])
        state = {k: v for k, v in encoder.state_dict().items() if k.startswith(f"{side}.tower.")}
        return part, state, encoder.config["transform"] if side == "image" else encoder.tokenizer
    if name.startswith("torchvision:") and side == "image":
        return load_torchvision(name, pool)
    return load_transformers(side, name, pool)


# of a published config, what does not describe the model
NOT_MODEL = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


def load_transformers(side: str, name: str, pool: str | None) -> tuple[dict, dict, object]:
    """One side from a transformers model: a local folder, which never touches the network, or a hub id."""
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    options = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
    try:
        tower = transformers.AutoModel.from_pretrained(name, **options)
        if side == "text":
            extra = transformers.AutoTokenizer.from_pretrained(name, **options)
        else:
            extra = read_transform(ImageProcessingMixin.get_image_processor_dict(name, **options)[0])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--{side}-encoder {name}: not a transformers {side} model that can be read ({one_line(error)})"
        ) from None
    model = {k: v for k, v in tower.config.to_diff_dict().items() if k not in NOT_MODEL}
    default = "mean" if side == "image" and not hasattr(tower.config, "num_attention_heads") else "cls"
    part = {"model": model, "pool": pool or default, "head": []}
    if side == "text":
        longest = getattr(tower.config, "max_position_embeddings", 512)
        part |= {"context_length": min(extra.model_max_length, longest, 512), "padding": "longest"}
        if extra.pad_token is None:
            extra.pad_token = extra.eos_token
    return part, {f"{side}.tower.{k}": v.float() for k, v in tower.state_dict().items()}, extra


def read_transform(processor: dict) -> dict:
    """retune's transform from a published preprocessor_config.json."""
    size, crop = processor.get("size", 224), processor.get("crop_size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size["height"], size["width"]]
    crop = crop["height"] if isinstance(crop, dict) else crop
    square = size if isinstance(size, int) else size[0]
    return {
        "resize": size,
        "crop": (crop if processor.get("do_center_crop") else square) if isinstance(size, int) else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(processor.get("resample"), "bilinear"),
        "mean": list(processor.get("image_mean", IMAGENET[0])),
        "std": list(processor.get("image_std", IMAGENET[1])),
    }  # fmt: skip


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def load_torchvision(name: str, pool: str | None) -> tuple[dict, dict, dict]:
    """`torchvision:resnet50` with torchvision's own weights, `torchvision:resnet50=FILE` with a file's."""
    from torchvision.models import get_model, list_models
    from torchvision.models.feature_extraction import get_graph_node_names

    model, _, weights = name.removeprefix("torchvision:").partition("=")
    if model not in list_models():
        raise InputError(f"--image-encoder {name}: no such model; {retune.nearest(model, list_models())}")
    try:
        network = get_model(model, weights=None if weights else "DEFAULT")
        if weights:
            network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"--image-encoder {name}: {one_line(error)}") from None
    nodes = get_graph_node_names(network)[1]
    node = next(
        (n for n in ("layer4", "features", "trunk_output") if any(x.split(".")[0] == n for x in nodes)), None
    )
    if node is None:
        raise InputError(
            f"--image-encoder {name}: no feature map is known for it; use a ResNet, ConvNeXt or Swin"
        )
    part = {
        "library": "torchvision", "model": {"name": model, "node": node}, "pool": pool or "mean", "head": [],
    }  # fmt: skip
    mean, std = IMAGENET
    transform = {"resize": 224, "crop": 224, "interpolation": "bilinear", "mean": mean, "std": std}
    return part, {f"image.tower.{k}": v for k, v in network.state_dict().items()}, transform


# -------------------------------------------------------------------------------------- Export and parameters


def export_pair(model: nn.Module, encoder: DualEncoder, directory: str) -> None:
    """Write towers, projections and adaptor as one encoder in retune's folder format, to RE-tune it (ours).

    One token attends to itself alone: each side is a plain head of torch's modules with the shared weights.
    """
    names = {"d_model": "width", "nhead": "heads", "dropout": "dropout", "dim_feedforward": "feedforward"}
    layer = {name: model.settings[ours] for name, ours in names.items()} | {"batch_first": True}
    width = model.settings["width"]
    config, state = copy.deepcopy(encoder.config) | {"dim": width}, encoder.state_dict()
    for side in ("image", "text"):
        mean, deviation = getattr(model, f"{side}_mean"), getattr(model, f"{side}_deviation")
        weight = getattr(model, f"{side}_projection").weight.detach() / deviation  # the mean becomes a bias
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


def parameter_table(model: nn.Module, encoder: DualEncoder) -> list[list]:
    """Rows (pair, frozen, trained here, end-to-end, share saved): this run's pair, and the paper's.

    End-to-end is what contrastive pre-training without freezing trains: both towers and the two projections.
    """

    def row(name: str, frozen: int, adaptor: nn.Module) -> list:
        projections = count(adaptor.image_projection) + count(adaptor.text_projection)
        whole = frozen + projections
        return [name, f"{frozen:,}", f"{count(adaptor):,}", f"{whole:,}", f"{1 - count(adaptor) / whole:.1%}"]

    rows = [row("this run", count(encoder), model)]
    with torch.device("meta"):  # sizes without weights
        text = retune.Tower({"model": {"model_type": "bert"}, "pool": "cls", "head": []})
        for name, settings in PAPERS_ENCODERS.items():
            image = retune.Tower({"model": settings, "pool": "cls", "head": []})
            adaptor = type(model)(image.tower.config.hidden_size, 768)
            rows.append(row(f"{name}, the paper's widths", count(image) + count(text), adaptor))
    return rows


# ------------------------------------------------------------------------------------------- The demo's two

IMAGE = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 128], "depths": [1, 1],
         "layer_type": "basic"}  # fmt: skip
TEXT = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
TRANSFORM = {"resize": 64, "crop": 64, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
CONTEXT = 128  # tokens of the longest report the text tower reads
PHANTOMS = 3000  # images to clean; the reports of as many again are read
STEPS = {"image": 250, "text": 300}
BATCH = 64
VERSION = 1  # raise it when training changes: it is part of the cache key


def demo_encoder(cache_dir: Path, phantoms: int = PHANTOMS, steps: dict[str, int] = STEPS) -> DualEncoder:
    """The two towers side by side in one DualEncoder without heads, trained once and kept in `cache_dir`."""
    source = repr((VERSION, IMAGE, TEXT, TRANSFORM, phantoms, sorted(steps.items()))).encode()
    folder = Path(cache_dir) / f"unimodal-{hashlib.sha256(source).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, wait=True):
        if not folder.exists():
            say("training the demo's two encoders, each alone: an autoencoder, a masked language model")
            train(phantoms, steps).save(folder)
    return DualEncoder.load(str(folder))


def train(n_phantoms: int, steps: dict[str, int]) -> DualEncoder:
    from demo import phantoms

    films = phantoms.make_phantoms(n_phantoms, seed=2000, domain="pretrain")
    reports = phantoms.make_phantoms(n_phantoms, seed=3000, domain="pretrain").reports  # of other patients
    tokenizer = build_tokenizer(reports)
    config = {
        "name": "unimodal",
        "dim": 128,
        "image": {"library": "transformers", "model": IMAGE, "pool": "mean", "head": []},
        "text": {
            "model": TEXT | {"vocab_size": len(tokenizer)}, "pool": "mean", "head": [],
            "context_length": CONTEXT, "padding": "longest",
        },
        "transform": TRANSFORM,
    }  # fmt: skip
    with retune.seeded(7):
        encoder = DualEncoder(config, tokenizer).train().requires_grad_(True)
        train_image(encoder, films.images, steps["image"])
        train_text(encoder, reports, steps["text"])
    return encoder.eval().requires_grad_(False)


def build_tokenizer(reports: Sequence[str]):
    """A fast tokenizer of lower-case words and punctuation: [CLS] text [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(reports, trainers.WordLevelTrainer(special_tokens=list(names.values())))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def one_cycle(parameters, steps: int, peak: float):
    optimizer = torch.optim.AdamW(parameters, lr=peak)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)


def train_image(encoder: DualEncoder, images: Sequence, steps: int) -> None:
    """Denoising autoencoder: from a noisy film's map [B, 128, 8, 8] to the clean film at half size."""
    pixels = torch.stack([encoder.transform(torch.from_numpy(np.asarray(image))[None]) for image in images])
    decoder = nn.Sequential(
        nn.Conv2d(128, 16, 1), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 1, 3, padding=1),
    )  # fmt: skip
    optimizer, schedule = one_cycle([*encoder.image.parameters(), *decoder.parameters()], steps, 4e-3)
    for _ in progress(range(steps), desc="image tower", unit="step"):
        clean = pixels[torch.randint(len(pixels), (BATCH,))]  # [B, 3, 64, 64]
        contrast, brightness = 1 + 0.3 * torch.randn(BATCH, 1, 1, 1), 0.3 * torch.randn(BATCH, 1, 1, 1)
        clean = clean * contrast + brightness
        noisy = clean + 0.3 * torch.randn_like(clean)
        features = encoder.image.tower(noisy).last_hidden_state  # [B, 128, 8, 8]
        loss = F.mse_loss(decoder(features), F.avg_pool2d(clean[:, :1], 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_text(encoder: DualEncoder, reports: Sequence[str], steps: int) -> None:
    """Masked language model: 15% of the words are replaced by [MASK] and have to be named."""
    tokens = encoder.tokenize(list(reports))
    ids, attention = tokens["input_ids"], tokens["attention_mask"]
    mask_id, words = encoder.tokenizer.mask_token_id, len(encoder.tokenizer)
    decoder = nn.Linear(128, words)
    optimizer, schedule = one_cycle([*encoder.text.parameters(), *decoder.parameters()], steps, 2e-3)
    for _ in progress(range(steps), desc="text tower", unit="step"):
        batch = torch.randint(len(ids), (BATCH,))
        longest = int(attention[batch].sum(1).max())
        target, seen = ids[batch, :longest], attention[batch, :longest]
        hidden = (torch.rand(target.shape) < 0.15) & (target > mask_id)  # special tokens have the lowest ids
        masked = target.masked_fill(hidden, mask_id)
        features = encoder.text.tower(masked, attention_mask=seen).last_hidden_state  # [B, L, 128]
        loss = F.cross_entropy(decoder(features[hidden]), target[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
