"""Encoders that `retune.py` does not read itself: open_clip's, CheXzero, BioViL-T (docs/encoders.md).

No network for a folder, and no code of a checkpoint is run.
"""

import copy
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import retune

CONFIG = "open_clip_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "vocab.json", "sentencepiece.bpe.model")
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
CHEXZERO = "ViT-B-32-quickgelu"  # open_clip's name of OpenAI's ViT-B/32
CHEXZERO_GREY = {"mean": [101.48761 / 255] * 3, "std": [83.43944 / 255] * 3}  # in CheXzero's zero_shot.py
BIOVIL_T_IMAGE = "biovil_t_image_model_proj_size_128.pt"


class TextTower(nn.Module):
    """Tokens [M,T] -> embeddings [M,D]; open_clip makes its own mask from the padding."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens)


class Tokenizer:
    """open_clip's tokenizer in the form that `retune.DualEncoder.tokenize` calls."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], return_tensors: str | None = None, **options) -> dict:
        if return_tensors is None:  # every token, so that a text that is too long is noticed
            if hasattr(self.tokenizer, "encode"):
                return {"input_ids": [[0, *self.tokenizer.encode(text), 0] for text in texts]}
            return self.tokenizer.tokenizer([self.tokenizer.clean_fn(text) for text in texts], **options)
        tokens = self.tokenizer(list(texts))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def save_pretrained(self, folder) -> None:
        raise retune.InputError("an encoder of open_clip is used from its own folder; there is no conversion")


class OpenClipEncoder(retune.DualEncoder):
    """A model of open_clip with its tokenizer and preprocessing in the form of a `retune.DualEncoder`."""

    def __init__(self, name: str, model: nn.Module, model_config: dict, transform: dict, tokenizer):
        nn.Module.__init__(self)
        self.dim = model_config["embed_dim"]
        text = {"context_length": tokenizer.context_length, "padding": "max_length"}
        self.config = {"name": name, "dim": self.dim, "image": {"library": "open_clip"}, "text": text,
                       "transform": transform, "model": model_config}  # fmt: skip
        self.tokenizer = Tokenizer(tokenizer)
        self.image = model.visual
        model.visual = nn.Identity()
        self.text = TextTower(model)
        self.transform = functools.partial(retune.transform_image, **transform)
        self.float().eval().requires_grad_(False)


def read(folder: Path) -> OpenClipEncoder | tuple:
    """The encoder in a folder that only open_clip reads; of BioViL-T, (config, tensors, tokenizer)."""
    if (folder / BIOVIL_T_IMAGE).is_file():
        return read_biovil_t(folder)
    with retune.input_errors("open_clip", "needed to read it: pip install open_clip_torch"):
        import open_clip
    if (folder / CONFIG).is_file():  # as open_clip publishes it
        published = retune.read_json(folder / CONFIG)
        config = published["model_cfg"]
        transform = read_transform(config["vision_cfg"], published.get("preprocess_cfg") or {})
        place = f"local-dir:{folder.resolve()}"
        options = read_text_config(folder, config["text_cfg"])
        model = open_clip.create_model(place, require_pretrained=True, **options)
        return OpenClipEncoder(folder.name, model, config, transform, open_clip.get_tokenizer(place))
    if len(files := list(folder.glob("*.pt"))) == 1 and not (folder / "config.json").is_file():
        config = open_clip.get_model_config(CHEXZERO)  # a state dict of OpenAI's ViT-B/32
        model = open_clip.create_model(CHEXZERO, pretrained=str(files[0]))
        transform = read_transform(config["vision_cfg"], CHEXZERO_GREY)
        return OpenClipEncoder(folder.name, model, config, transform, open_clip.get_tokenizer(CHEXZERO))
    raise retune.InputError(f"no config.json of a CLIP or SigLIP, no {CONFIG}, no .pt of BioViL or CheXzero")


def read_text_config(folder: Path, text: dict) -> dict:
    """Keywords for open_clip that keep it from looking its text tower up; InputError for a file to fetch."""
    source = "https://huggingface.co"
    wanted = text.get("hf_tokenizer_name")
    if wanted and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        files = " or ".join(TOKENIZER_FILES[:2])
        raise retune.InputError(f"no tokenizer: download {files} from {source}/{wanted} into it")
    if not (wanted := text.get("hf_model_name")):
        return {}
    if not (folder / "config.json").is_file():
        raise retune.InputError(f"no config.json: download it from {source}/{wanted} into it")
    return {"text_cfg": text | {"hf_model_name": str(folder), "hf_model_pretrained": False}}


def read_transform(vision: dict, preprocess: dict) -> dict:
    """`retune.transform_image`'s settings for open_clip's `preprocess_cfg`."""
    size = vision.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    mode = preprocess.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise retune.InputError(f"resize_mode {mode!r} to {height} x {width} is not read")
    resize, crop = (height, height) if mode == "shortest" else ([height, width], None)
    shape = {"resize": resize, "crop": crop, "interpolation": preprocess.get("interpolation") or "bicubic"}
    return shape | {key: preprocess.get(key) or default for key, default in OPENAI.items()}


def read_biovil_t(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, tensors under our names, tokenizer) of BioViL-T for one image, which needs no transformer.

    Its projection reads 256 channels of the image and 256 of the change since an earlier one, replaced by a
    learned constant when there is none: before a 1 x 1 convolution that constant is a bias.
    """
    state = retune.read_weights(folder, BIOVIL_T_IMAGE) | retune.read_weights(folder, *retune.WEIGHTS)
    own = ("encoder.backbone_to_vit.weight", "encoder.missing_previous_emb", "image.head.0.weight")
    reduce, absent, project = (state.pop(key) for key in own)  # [256,2048,1,1], [1,256,1,1], [128,512,1,1]
    static, change = project.chunk(2, dim=1)
    state = {re.sub(r"(?<=^image\.head\.)\d", lambda n: str(int(n[0]) + 1), key): tensor
             for key, tensor in state.items() if not key.startswith("encoder.vit_pooler.")}  # fmt: skip
    bias = torch.einsum("ocxy,ncxy->o", change, absent)
    state |= {"image.head.0.weight": reduce, "image.head.1.weight": static, "image.head.1.bias": bias}
    config = copy.deepcopy(retune.BIOVIL) | {"name": "biovil-t"}
    config["transform"]["crop"] = 448
    (_, first), *rest = config["image"]["head"]
    middle = len(reduce)
    reduced = ["Conv2d", first | {"out_channels": middle}]
    config["image"]["head"] = [reduced, ["Conv2d", first | {"in_channels": middle, "bias": True}], *rest]
    return config, state, retune.read_tokenizer(folder, bert=True)
