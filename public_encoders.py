"""Published vision-language encoders (BiomedCLIP, BioViL, transformers' CLIP and SigLIP), read as published.

`read_published` returns what a `retune.DualEncoder` is built from: our config, tensors under our names, a
tokenizer. No checkpoint is executed: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from encoders import is_ours, one_line, read_folder
from retune import InputError, read_json


def linear(inputs: int, outputs: int, bias: bool = True) -> list:
    return ["Linear", {"in_features": inputs, "out_features": outputs, "bias": bias}]


def convolution(inputs: int, outputs: int, bias: bool = True) -> list:
    return ["Conv2d", {"in_channels": inputs, "out_channels": outputs, "kernel_size": 1, "bias": bias}]


# The published encoders in our format, their tensors' names (regular expressions) and their files.
# fmt: off
BIOMEDCLIP = {
    "name": "biomedclip", "dim": 512,
    "image": {"model": {"model_type": "vit", "layer_norm_eps": 1e-6}, "pool": "cls",
              "head": [linear(768, 512, False)]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 256,
             "head": [linear(768, 640, False), ["GELU", {}], linear(640, 512, False)]},
    "transform": {"resize": 224, "crop": 224, "interpolation": "bicubic",
                  "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}
BIOVIL = {  # its projection comes before the spatial mean; "strip" is what its own inference does to a prompt
    "name": "biovil", "dim": 128,
    "image": {"library": "torchvision", "model": {"name": "resnet50", "node": "layer4"}, "pool": "none",
              "head": [convolution(2048, 128, False), ["BatchNorm2d", {"num_features": 128}], ["ReLU", {}],
                       convolution(128, 128), ["AdaptiveAvgPool2d", {"output_size": 1}], ["Flatten", {}]]},
    "text": {"model": {"model_type": "bert"}, "pool": "cls", "context_length": 512, "strip": "!?.",
             "head": [linear(768, 128), ["GELU", {}], ["LayerNorm", {"normalized_shape": 128, "eps": 1e-12}],
                      linear(128, 128)]},
    "transform": {"resize": 512, "crop": 512, "interpolation": "bilinear", "mean": [0.0] * 3,
                  "std": [1.0] * 3},
}
KEYS = {  # BiomedCLIP; BioViL; CLIP and SigLIP
    "visual.trunk.(cls_token)": r"image.tower.embeddings.\1", "visual.trunk.norm": "image.tower.layernorm",
    "visual.trunk.pos_embed": "image.tower.embeddings.position_embeddings",
    "visual.trunk.patch_embed.proj": "image.tower.embeddings.patch_embeddings.projection",
    r"visual.trunk.blocks.(\d+).norm1": r"image.tower.layers.\1.layernorm_before",
    r"visual.trunk.blocks.(\d+).norm2": r"image.tower.layers.\1.layernorm_after",
    r"visual.trunk.blocks.(\d+).attn.proj": r"image.tower.layers.\1.attention.o_proj",
    r"visual.trunk.blocks.(\d+).attn.qkv": r"image.tower.layers.\1.attention.qkv",
    r"visual.trunk.blocks.(\d+).mlp": r"image.tower.layers.\1.mlp", "visual.head.proj": "image.head.0",
    "text.transformer": "text.tower", "text.proj": "text.head",
    "encoder.encoder": "image.tower", "projector.model": "image.head", "bert": "text.tower",
    "cls_projection_head.dense_to_hidden": "text.head.0", "cls_projection_head.LayerNorm": "text.head.2",
    "cls_projection_head.dense_to_output": "text.head.3",
    "vision_model": "image.tower", "text_model": "text.tower",
    "visual_projection": "image.head.0", "text_projection": "text.head.0",
}
# fmt: on
BIOVIL_IMAGE = "biovil_image_resnet50_proj_size_128.pt"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB = {  # name: repository, revision, alternatives for the weights, the best first
    "biomedclip": ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", None, OPEN_CLIP_WEIGHTS),
    "biovil": ("microsoft/BiomedVLP-CXR-BERT-specialized", "v1.1", WEIGHTS),
}


def read_published(name: str, directory: str | Path | None) -> tuple[dict, dict[str, Tensor], object]:
    """(config, tensors, tokenizer) of the encoder `name`, from `directory` alone if it is given."""
    folder = Path(directory or name)
    if directory is None and (name in HUB or not folder.is_dir()):
        folder = download(name)
    try:
        config, state, tokenizer = read_encoder(folder)
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{folder}: no encoder as published ({reason})") from error
    if config["name"] == folder.name and not Path(name).is_dir():
        config["name"] = name  # a hub id rather than the folder with its files
    return config, state, tokenizer


def download(name: str) -> Path:
    """The folder in the hub's cache with the published files of the encoder `name`, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if name not in HUB and "/" not in name:
        known = f"tiny, {', '.join(HUB)}, a folder, or a hub id OWNER/NAME"
        raise InputError(f"unknown encoder {name!r}: use {known}")
    repository, revision, weights = HUB.get(name, (name, None, WEIGHTS))
    try:
        for pattern in weights:
            patterns = ["*.json", "*.txt", "*.model", BIOVIL_IMAGE, pattern]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
            if any(folder.glob(pattern)):
                break
        return folder
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"encoder {name!r} is neither a folder nor in the hub's cache, {repository} cannot be downloaded: "
            f"fetch its files elsewhere and name their folder with --encoder-dir ({reason})"
        ) from error


def read_weights(folder: Path, *patterns: str) -> dict[str, Tensor]:
    """The tensors in the files of the first pattern that fits any, under our names; runs no pickled code."""
    from safetensors.torch import load_file

    files = next((found for found in (sorted(folder.glob(pattern)) for pattern in patterns) if found), [])
    if not files:
        raise InputError(f"{folder} holds no weights: {' or '.join(patterns)} is missing")
    state = {}
    for file in files:
        try:
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            state |= renamed({key: tensor.detach() for key, tensor in found.items()})
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{file} is damaged or holds more than tensors: {reason}") from error
    return state


def renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names."""
    state = {}
    for key, tensor in found.items():
        for pattern, replacement in KEYS.items():
            key = re.sub(rf"^{pattern}(?=\.|$)", replacement, key)
        thirds = zip("qkv", tensor.chunk(3)) if ".attention.qkv." in key else ()  # timm's are one tensor
        state |= {key.replace("qkv", f"{part}_proj"): third for part, third in thirds} or {key: tensor}
    return state


def read_tokenizer(folder: Path, bert: bool = False):
    from transformers import AutoTokenizer, BertTokenizer

    names = ("vocab.txt", "tokenizer.json", "vocab.json", "spiece.model")
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} holds no tokenizer: one of {', '.join(names)} is missing")
    try:
        if bert:  # by hand: BioViL's config asks AutoTokenizer to run code from the hub
            vocabulary = str(files[0])
            if files[0].suffix == ".json":
                vocabulary = json.loads(files[0].read_text(encoding="utf-8"))["model"]["vocab"]
            return BertTokenizer(vocab=vocabulary)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from error


def read_encoder(folder: Path) -> tuple[dict, dict[str, Tensor], object]:
    """(config, tensors, tokenizer) of a folder in our format or as published; InputError on anything else."""
    names = ("config.json", "open_clip_config.json")
    config, open_clip = (read_json(folder / name) if (folder / name).is_file() else {} for name in names)
    if is_ours(folder):
        return read_folder(folder)
    if config.get("model_type") in ("clip", "siglip"):
        return read_transformers(folder, config), read_weights(folder, *WEIGHTS), read_tokenizer(folder)
    if open_clip:
        normalise = {key: open_clip["preprocess_cfg"][key] for key in ("mean", "std")}
        config = BIOMEDCLIP | {"transform": BIOMEDCLIP["transform"] | normalise}
        return config, read_weights(folder, *OPEN_CLIP_WEIGHTS), read_tokenizer(folder, bert=True)
    if (folder / BIOVIL_IMAGE).is_file():
        state = read_weights(folder, BIOVIL_IMAGE) | read_weights(folder, *WEIGHTS)
        return BIOVIL, state, read_tokenizer(folder, bert=True)
    raise InputError(f"{folder} holds no encoder: no known {' nor '.join(names)}, and no {BIOVIL_IMAGE}")


def read_transformers(folder: Path, published: dict) -> dict:
    """Our config for a transformers CLIP or SigLIP; its image processor's settings become the transform."""
    from transformers import AutoImageProcessor

    kind, towers = published["model_type"], {}
    wanted = "hidden_act|layer_norm_eps|num_.*|.*_size|.*_token_id|max_position_embeddings"  # shape a tower
    for part in ("vision", "text"):
        found = (published.get(f"{part}_config") or {}) | (published.get(f"{part}_config_dict") or {})
        model = {key: value for key, value in found.items() if re.fullmatch(wanted, key)}
        towers[part] = {"model": {"model_type": f"{kind}_{part}_model"} | model, "pool": "pooler", "head": []}
    vision, text = towers["vision"], towers["text"]
    text["context_length"] = text["model"].get("max_position_embeddings", 77 if kind == "clip" else 64)
    if kind == "clip":
        dim = published.get("projection_dim", 512)
        vision["head"] = [linear(vision["model"].get("hidden_size", 768), dim, bias=False)]
        text["head"] = [linear(text["model"].get("hidden_size", 512), dim, bias=False)]
    else:
        dim, text["padding"] = vision["model"].get("hidden_size", 768), "max_length"
        # the text tower uses neither, and transformers' defaults for them lie outside its vocabulary
        text["model"] |= {"bos_token_id": None, "eos_token_id": None}
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    transform = {
        "resize": processor.size.shortest_edge or [processor.size.height, processor.size.width],
        "crop": processor.crop_size.height if processor.do_center_crop else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}[processor.resample],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
    return {"name": folder.name, "dim": dim, "image": vision, "text": text, "transform": transform}
