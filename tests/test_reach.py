"""Encoders of open_clip and BioViL-T, hospitals as parts, decisions, subgroups, export, heat maps, DICOM."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import retune

PROMPTS = ["edema", "there is no evidence of acute cardiomegaly", "Small left pleural effusion, with atelectasis."]
FULL = pytest.mark.skipif(not os.environ.get("RETUNE_FULL_SIZE"), reason="a minute and several GB")


@pytest.fixture
def no_network(monkeypatch):
    """Opening a connection, or looking a name up, fails."""

    def refuse(*arguments, **options):
        raise AssertionError(f"network touched: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@torch.no_grad()
def randomise(module, seed=0):
    """Random weights, none at a value (0, 1) that would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
            noise = torch.empty_like(tensor).uniform_(-1, 1, generator=generator) * (3 / fan_in) ** 0.5
            positive = tensor.ndim < 2 and name.endswith(("weight", "running_var"))
            tensor.copy_(1 + noise / 4 if positive else noise)
    return module.eval()


def difference(ours, theirs):
    return (ours - theirs).abs().max().item()


# ------------------------------------------------------------------------------------------------ encoders

SMALL = {"width": 64, "layers": 2}
OPEN_CLIP = {  # the architectures' options, small; the full ones are open_clip's own configs
    "ViT-B-32-quickgelu": {"embed_dim": 32, "quick_gelu": True,
                           "vision_cfg": {"image_size": 64, "patch_size": 32, **SMALL},
                           "text_cfg": {"vocab_size": 49408, "heads": 1, **SMALL}},
    "ViT-L-14": {"embed_dim": 32, "custom_text": True,
                 "vision_cfg": {"image_size": 56, "patch_size": 14, **SMALL},
                 "text_cfg": {"vocab_size": 49408, "heads": 2, "proj_bias": True, **SMALL}},
    "ViT-B-16-SigLIP": {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
                        "vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224",
                                       "timm_pool": "map", "timm_proj": "none"},
                        "text_cfg": {"context_length": 64, "vocab_size": 600, "no_causal_mask": True, "heads": 2,
                                     "hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"},
                                     "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
                                     **SMALL}},
}  # fmt: skip


def write_tokenizer(folder, size=600):
    """A T5 tokenizer of pieces seen in the prompts, as a SigLIP folder brings one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sorted({piece for prompt in PROMPTS for piece in "▁".join(["", *prompt.lower().split()])})
    words = sorted({f"▁{word.strip(',.')}" for prompt in PROMPTS for word in prompt.lower().split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((piece, -5.0) for piece in pieces)]
    vocabulary += [(word, -3.0) for word in words if word not in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary[:size], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_open_clip(folder, config, preprocess=None):
    """A folder as open_clip publishes it, with random weights."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    preprocess = preprocess or {}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if config["text_cfg"].get("hf_tokenizer_name"):
        write_tokenizer(folder)
    built = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if built.pop("custom_text", False) else open_clip.CLIP
    state = randomise(kind(**built)).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def compare_with_open_clip(folder, name):
    """Largest differences (images, texts, pixels) between a folder through retune and through open_clip."""
    import open_clip

    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    encoder = retune.DualEncoder.load(name)
    film = np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8)
    film = np.asarray(Image.fromarray(film).resize((400, 300), Image.Resampling.BICUBIC))  # smooth, as films are
    pixels = encoder.transform(torch.from_numpy(film.copy())[None])[None]
    theirs = preprocess(Image.fromarray(film))[None]
    with torch.inference_mode():
        images = difference(encoder.encode_images(theirs), peer.eval().encode_image(theirs))
        texts = difference(encoder.encode_texts(PROMPTS), peer.encode_text(tokens))
    print(f"{name}: images {images:.1e}, texts {texts:.1e}, pixels {difference(pixels, theirs):.1e}")
    return images, texts, difference(pixels, theirs)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_folder_gives_open_clips_embeddings(name, tmp_path, no_network):
    pytest.importorskip("open_clip")
    squash = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    folder = write_open_clip(tmp_path / name, OPEN_CLIP[name], squash if "SigLIP" in name else None)
    images, texts, pixels = compare_with_open_clip(folder, f"open_clip:{folder}")
    assert images <= 1e-4 and texts <= 1e-4
    assert pixels <= 0.02  # one grey level of 255
    with pytest.raises(retune.InputError, match="tokens, the encoder reads"):
        retune.DualEncoder.load(str(folder)).encode_texts(["edema " * 200])


@FULL
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_folder_at_full_size(name, tmp_path, no_network):
    import open_clip

    config = open_clip.get_model_config(name) | ({"custom_text": True} if name == "ViT-L-14" else {})
    folder = write_open_clip(tmp_path / name, config)
    assert max(compare_with_open_clip(folder, str(folder))[:2]) <= 1e-4


def test_chexzero_state_dict_is_read_through_open_clip(tmp_path, no_network):
    open_clip = pytest.importorskip("open_clip")
    peer = randomise(open_clip.CLIP(**OPEN_CLIP["ViT-B-32-quickgelu"]))
    torch.save(peer.state_dict(), tmp_path / "best.pt")
    encoder = retune.DualEncoder.load(str(tmp_path))
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert difference(encoder.encode_images(pixels), peer.encode_image(pixels)) <= 1e-4
        assert difference(encoder.encode_texts(PROMPTS), peer.encode_text(open_clip.tokenize(PROMPTS))) <= 1e-4
    grey = encoder.transform(torch.full((1, 80, 80), 150, dtype=torch.uint8))
    torch.testing.assert_close(grey, torch.full((3, 64, 64), (150 - 101.48761) / 83.43944))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biovil_t_equals_hi_ml_on_a_single_image(tmp_path, monkeypatch, no_network):
    for name in ("pydicom", "SimpleITK", "skimage", "skimage.io"):  # imported by readers that are not used here
        module = types.ModuleType(name)
        module.io = module
        monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("health_multimodal")
    from health_multimodal.image.model.model import ImageModel
    from health_multimodal.text.model import CXRBertConfig, CXRBertModel

    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
    config = copy.deepcopy(retune.BIOVIL)
    config["text"]["model"] |= small
    config["text"]["head"][0] = retune.linear(48, 128)
    monkeypatch.setattr(retune, "BIOVIL", config)
    image = randomise(ImageModel("resnet50_multi_image", 128))
    text = randomise(CXRBertModel(CXRBertConfig(**small)))
    torch.save(image.state_dict(), tmp_path / "biovil_t_image_model_proj_size_128.pt")
    torch.save(text.state_dict(), tmp_path / "pytorch_model.bin")
    words = [word.lower().strip(",.") for prompt in PROMPTS for word in prompt.split()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary + [f"[unused{i}]" for i in range(30522 - len(vocabulary))]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cxr-bert"}))
    encoder = retune.DualEncoder.load("biovil-t", tmp_path)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenizer([prompt.rstrip(".") for prompt in PROMPTS], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = text.get_projected_text_embeddings(tokens["input_ids"], tokens["attention_mask"], False)
        error = difference(encoder.encode_images(pixels), image(pixels).projected_global_embedding)
        assert error <= 1e-4 and difference(encoder.encode_texts(PROMPTS), expected) <= 1e-4
    assert encoder.config["transform"]["crop"] == 448
    encoder.save(tmp_path / "converted")
    assert retune.DualEncoder.load(str(tmp_path / "converted")).fingerprint() == encoder.fingerprint()


def test_what_an_encoder_folder_lacks_is_named_with_its_source(tmp_path, no_network):
    pytest.importorskip("open_clip")
    config = copy.deepcopy(OPEN_CLIP["ViT-L-14"])
    config["text_cfg"] = {"hf_model_name": "some/bert", "hf_tokenizer_name": "some/bert", "hf_proj_type": "linear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(retune.InputError, match="tokenizer.json .*https://huggingface.co/some/bert into it"):
        retune.DualEncoder.load(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nedema\n")
    with pytest.raises(retune.InputError, match="config.json from https://huggingface.co/some/bert into it"):
        retune.DualEncoder.load(str(tmp_path))
    with pytest.raises(retune.InputError, match="https://huggingface.co/owner/gated into a folder .*--encoder-dir"):
        retune.DualEncoder.load("open_clip:owner/gated")
