"""Encoders that `retune.py` does not read itself: anything of open_clip, CheXzero's `.pt`, BioViL-T (single image).

`retune.read_encoder` comes here with a folder it does not know, and `retune.Tower` with the library "open_clip".
No network, and no code of a checkpoint: weights are safetensors or `torch.load(weights_only=True)`. The towers, the
tokenizer and the preprocessing are those of open_clip (`pip install open_clip_torch`); docs/encoders.md has a table.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import retune

CONFIG = "open_clip_config.json"
WEIGHTS = (
    *retune.OPEN_CLIP_WEIGHTS,
    "model.safetensors",
    "pytorch_model.bin",
    "*.safetensors",
    "*.pt",
    "*.pth",
)
OPENAI_NORMALISE = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
# CheXzero scales grey values 0..255 by the mean and deviation of its own training images (its zero_shot.py)
CHEXZERO_NORMALISE = {"mean": [101.48761 / 255] * 3, "std": [83.43944 / 255] * 3}
BIOVIL_T_IMAGE = "biovil_t_image_model_proj_size_128.pt"


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, tensors under our names, tokenizer) of a folder; InputError says what is missing and where it is."""
    if (folder / BIOVIL_T_IMAGE).is_file():
        return read_biovil_t(folder)
    if (folder / CONFIG).is_file():
        return read_open_clip(folder)
    if list(folder.glob("*.pt")):
        return read_openai(folder)
    raise retune.InputError(
        f"no config.json of a CLIP or SigLIP, no {CONFIG}, no {BIOVIL_T_IMAGE} and no .pt file"
    )


# ------------------------------------------------------------------------------------------------ open_clip


def import_open_clip():
    """The optional dependency."""
    try:
        import open_clip
    except ImportError:
        raise retune.InputError("this encoder is read by open_clip: pip install open_clip_torch") from None
    return open_clip


class OpenClipTower(nn.Module):
    """One tower of open_clip with its projection: pixels [B,3,H,W] or tokens [M,T] -> {"pooler_output": [.., D]}."""

    def __init__(self, settings: dict):
        super().__init__()
        open_clip = import_open_clip()
        settings = copy.deepcopy(settings)  # open_clip changes what it is given
        shape = (settings["embed_dim"], settings["cfg"], settings["quick_gelu"])
        if settings["side"] == "image":
            self.model = open_clip.model._build_vision_tower(*shape)
        elif "hf_config" in settings:
            self.model = build_hf_text(open_clip, settings)
        else:
            self.model = open_clip.model._build_text_tower(*shape)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict:
        return {"pooler_output": self.model(inputs)}  # open_clip makes its own mask from the padding


def build_hf_text(open_clip, settings: dict) -> nn.Module:
    """open_clip's text tower around a transformers model whose config is known: nothing is looked up."""
    from transformers import AutoConfig

    cfg = settings["cfg"]
    config = AutoConfig.for_model(**settings["hf_config"])
    options = {"proj_type": cfg.get("hf_proj_type", "mlp"), "pooler_type": cfg.get("hf_pooler_type")}
    options["pooler_type"] = options["pooler_type"] or "mean_pooler"
    text = open_clip.hf_model.HFTextEncoder("", settings["embed_dim"], config, **options)
    if getattr(config, "is_encoder_decoder", False):
        text.transformer = text.transformer.encoder
    elif options["pooler_type"] != "cls_pooler" and hasattr(text.transformer, "pooler"):
        text.transformer.pooler = None
    return text


TOWERS = {
    "open_clip": OpenClipTower
}  # what "library" in an encoder's config may name, beside retune.py's own


class OpenClipTokenizer:
    """open_clip's tokenizer in the form that `retune.DualEncoder.tokenize` calls."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], return_tensors: str | None = None, **options) -> dict:
        if return_tensors is None:
            return {"input_ids": [self.ids(text) for text in texts]}  # whole, so that a long text is noticed
        ids = self.tokenizer(list(texts))  # [M, T], padded to the context
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ids(self, text: str) -> list[int]:
        """A text's token ids with the special ones, not cut."""
        if hasattr(self.tokenizer, "encode"):
            return [self.tokenizer.sot_token_id, *self.tokenizer.encode(text), self.tokenizer.eot_token_id]
        return self.tokenizer.tokenizer(self.tokenizer.clean_fn(text), verbose=False)["input_ids"]

    def save_pretrained(self, folder) -> None:
        raise retune.InputError("an encoder of open_clip is used from its own folder; it is not converted")


def read_open_clip(folder: Path) -> tuple:
    """A folder as open_clip publishes it: its config, weights and, unless the BPE of CLIP is used, tokenizer."""
    open_clip = import_open_clip()
    published = retune.read_json(folder / CONFIG)
    model = published["model_cfg"]
    if "multimodal_cfg" in model:
        raise retune.InputError("CoCa has a third tower; only models of two towers are read")
    text = dict(model["text_cfg"])
    if text.get("hf_tokenizer_name") and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        source = f"https://huggingface.co/{text['hf_tokenizer_name']}"
        raise retune.InputError(
            f"no tokenizer: download {' or '.join(TOKENIZER_FILES)} from {source} into it"
        )
    config = towers_config(model, text, hf_config(folder, text))
    config["transform"] = transform_of(model["vision_cfg"], published.get("preprocess_cfg") or {})
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder.resolve()}")
    return config, read_weights(folder), OpenClipTokenizer(tokenizer)


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "vocab.json", "sentencepiece.bpe.model")


def towers_config(model: dict, text: dict, hf: dict | None) -> dict:
    """Our config of the two towers of an open_clip `model_cfg`, its `text_cfg` and a transformers text config."""
    shared = {"embed_dim": model["embed_dim"], "quick_gelu": model.get("quick_gelu", False)}
    vision = model["vision_cfg"] | {"timm_model_pretrained": False}
    towers = {"image": {"side": "image", "cfg": vision}, "text": {"side": "text", "cfg": text}}
    if hf:
        towers["text"]["hf_config"] = hf
    config = {"dim": model["embed_dim"]}
    for side, settings in towers.items():
        config[side] = {"library": "open_clip", "model": shared | settings, "pool": "pooler", "head": []}
    config["text"] |= {"context_length": text.get("context_length", 77), "padding": "max_length"}
    return config


def hf_config(folder: Path, text: dict) -> dict | None:
    """The transformers config of the text tower, from the folder or from the hub's cache; None if it has none."""
    name = text.get("hf_model_name")
    if not name:
        return None
    from transformers import AutoConfig

    own = retune.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if own.get("model_type"):
        return own.get("text_config") or own
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True).to_dict()
    except Exception:
        source = f"https://huggingface.co/{name}"
        raise retune.InputError(
            f"its text tower is {name}: download config.json from {source} into it"
        ) from None


def transform_of(vision: dict, preprocess: dict) -> dict:
    """Our transform for open_clip's `preprocess_cfg`; InputError for the modes that are not read."""
    size = vision.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    mode = preprocess.get("resize_mode") or "shortest"
    if mode == "longest" or (mode == "shortest" and height != width):
        raise retune.InputError(
            f"resize_mode {mode!r} to {height} x {width} is not read: squash, shortest (square)"
        )
    normalise = {key: preprocess.get(key) or default for key, default in OPENAI_NORMALISE.items()}
    shape = (
        {"resize": height, "crop": height}
        if mode == "shortest"
        else {"resize": [height, width], "crop": None}
    )
    return shape | {"interpolation": preprocess.get("interpolation") or "bicubic"} | normalise


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the only weights in a folder under our names; runs no pickled code."""
    from safetensors.torch import load_file

    files = next((found for found in (sorted(folder.glob(pattern)) for pattern in WEIGHTS) if found), [])
    if len(files) != 1:
        raise retune.InputError(f"{len(files)} files of weights; one of {', '.join(WEIGHTS)} must lie there")
    file = files[0]
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    except Exception as error:
        reason = f"{retune.one_line(error)}; if it is a TorchScript archive, save its state_dict() instead"
        raise retune.InputError(f"{file.name}: {reason}") from None
    state = state.get("state_dict", state)
    return {our_name(key): tensor.detach() for key, tensor in state.items() if our_name(key)}


def our_name(key: str) -> str:
    """A key of CLIP's or CustomTextCLIP's state dict under our name; "" for what belongs to no embedding."""
    key = key.removeprefix("module.")
    if re.match(r"logit_|input_resolution$|context_length$|vocab_size$|attn_mask$", key):
        return ""
    if key.startswith("visual."):
        return "image.tower.model." + key.removeprefix("visual.")
    return "text.tower.model." + key.removeprefix("text.")


def read_openai(folder: Path) -> tuple:
    """A state dict of OpenAI's CLIP class with a ViT, as CheXzero's `.pt` is; sizes follow from the tensors."""
    open_clip = import_open_clip()
    state = read_weights(folder)
    image, text = ({key.removeprefix(f"{side}.tower.model."): value for key, value in state.items()
                    if key.startswith(side)} for side in ("image", "text"))  # fmt: skip
    if "conv1.weight" not in image or "proj" not in image:
        raise retune.InputError("its .pt file is not a state dict of OpenAI's CLIP with a vision transformer")
    width, _, patch, _ = image["conv1.weight"].shape
    side = round((len(image["positional_embedding"]) - 1) ** 0.5)

    def count_layers(tensors):
        return len({key.split(".")[2] for key in tensors if key.startswith("transformer.resblocks.")})

    vision = {"width": width, "patch_size": patch, "image_size": side * patch, "layers": count_layers(image)}
    context, text_width = text["positional_embedding"].shape
    text_cfg = {"context_length": context, "vocab_size": len(text["token_embedding.weight"]), "width": text_width,
                "heads": text_width // 64, "layers": count_layers(text)}  # fmt: skip
    model = {"embed_dim": image["proj"].shape[1], "quick_gelu": True, "vision_cfg": vision}
    config = towers_config(model, text_cfg, None)
    config["transform"] = transform_of(vision, CHEXZERO_NORMALISE)
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    return config, state, OpenClipTokenizer(tokenizer)


# ------------------------------------------------------------------------------------------------ BioViL-T


def read_biovil_t(folder: Path) -> tuple:
    """BioViL-T for one image: without an earlier image its image model needs no transformer.

    Its projection reads 256 channels of the image and 256 of the difference to the earlier one, for which a learned
    constant stands when there is none: with a 1 x 1 convolution that constant is a bias.
    """
    state = retune.read_weights(folder, BIOVIL_T_IMAGE) | retune.read_weights(folder, *retune.WEIGHTS)
    own = ("encoder.backbone_to_vit.weight", "encoder.missing_previous_emb", "image.head.0.weight")
    if missing := [key for key in own if key not in state]:
        raise retune.InputError(f"{BIOVIL_T_IMAGE}: no tensor {missing[0]}")
    reduce, absent, project = (state.pop(key) for key in own)  # [256,2048,1,1], [1,256,1,1], [128,512,1,1]
    static, change = project.chunk(2, dim=1)
    head = {"0.weight": reduce, "1.weight": static, "1.bias": torch.einsum("ocxy,ncxy->o", change, absent)}
    shifted = {}
    for key, tensor in state.items():
        if found := re.fullmatch(r"image\.head\.(\d+)\.(.+)", key):
            key = f"image.head.{int(found[1]) + 1}.{found[2]}"
        if not key.startswith("encoder.vit_pooler."):
            shifted[key] = tensor
    shifted |= {f"image.head.{key}": tensor for key, tensor in head.items()}
    return biovil_t_config(), shifted, retune.read_tokenizer(folder, bert=True)


def biovil_t_config() -> dict:
    """BioViL's config with BioViL-T's name, crop (448) and two convolutions before the rest of the head."""
    config = copy.deepcopy(retune.BIOVIL)
    (_, first), *rest = config["image"]["head"]
    middle = 2 * first["out_channels"]
    reduce = ["Conv2d", first | {"out_channels": middle}]
    project = ["Conv2d", first | {"in_channels": middle, "bias": True}]
    config["image"]["head"] = [reduce, project, *rest]
    config["transform"]["crop"] = 448
    return config | {"name": "biovil-t"}
