"""Frozen encoders: parity with the peers' own classes and transforms, strict files, no network."""

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

import retune
from demo.phantoms import make_phantoms
from retune import DualEncoder, InputError
from tests.conftest import word_tokenizer

pytestmark = pytest.mark.usefixtures("no_network")
PROMPTS = [
    "edema", "no edema", "Findings consistent with pneumonia", "there is no evidence of acute cardiomegaly",
    "the heart is mildly enlarged", "small left pleural effusion with atelectasis",
    "no signs of consolidation in the right lower lobe or in the left upper lobe today", "lungs are clear",
]  # fmt: skip
WORDS = sorted({word.lower() for prompt in PROMPTS for word in prompt.split()})
SMALL_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
SMALL_TOWER = SMALL_BERT | {"num_attention_heads": 4, "layer_norm_eps": 1e-5}


def peers_of_biovil(monkeypatch):
    """hi-ml-multimodal's image model and, shrunk like `retune.BIOVIL`, its text model; no file readers."""
    for name in ("pydicom", "SimpleITK", "skimage", "skimage.io"):
        module = types.ModuleType(name)
        module.io = module
        monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("health_multimodal")
    from health_multimodal.image.model.model import ImageModel
    from health_multimodal.text.model import CXRBertConfig, CXRBertModel

    config = copy.deepcopy(retune.BIOVIL)
    config["text"]["model"] |= SMALL_BERT
    config["text"]["head"][0] = retune.linear(48, 128)
    monkeypatch.setattr(retune, "BIOVIL", config)
    return ImageModel, CXRBertModel(CXRBertConfig(**SMALL_BERT))


@torch.no_grad()
def randomise(module, seed=0):
    """Random weights, none of them at a value (0, 1) that would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
            noise = torch.empty_like(tensor).uniform_(-1, 1, generator=generator) * (3 / fan_in) ** 0.5
            positive = tensor.ndim < 2 and name.endswith(("weight", "running_var"))
            tensor.copy_(1 + noise / 4 if positive else noise)
    return module.eval()


def write_vocabulary(folder, size=30522):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"[unused{i}]" for i in range(size - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words[:size]) + "\n")


def assert_parity(encoder, pixels, image, texts, text, tolerance=1e-4):
    """Our embeddings of pixels [8, 3, H, H] and texts are the peer's, [8, D] each, normalised by neither."""
    with torch.inference_mode():
        found = encoder.encode_images(pixels), encoder.encode_texts(texts)
    torch.testing.assert_close(found, (image, text), atol=tolerance, rtol=0)


def difference(ours, theirs):
    return (ours - theirs).abs().max().item()


def assert_same_transform(encoder, peer, square=False):
    """Our pixels of phantoms lie within two grey levels of 255 of those of the peer's transform."""
    std, differences = torch.tensor(encoder.config["transform"]["std"]).view(3, 1, 1), []
    for i, film in enumerate(make_phantoms(12, seed=1, size=400).images):
        size = (400, 400) if square else (400 - 7 * (i % 5), 400 - 31 * (i % 3))
        image = Image.fromarray(film).crop((0, 0, *size))
        pixels = encoder.transform(torch.from_numpy(np.array(image))[None])
        differences.append(((pixels - peer(image)) * std).abs() * 255)
    assert torch.stack(differences).max() <= 2.01 and torch.stack(differences).mean() <= 0.1


def images(size):
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_biomedclip_equals_open_clip(tmp_path, monkeypatch):
    """open_clip's own class, its state dict in the published layout, read by us: the same embeddings."""
    open_clip = pytest.importorskip("open_clip")
    name = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    config = {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False,
                       "timm_pool": "", "timm_proj": "linear", "image_size": 224},
        "text_cfg": {"hf_model_name": name, "hf_tokenizer_name": name, "hf_proj_type": "mlp",
                     "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}}  # fmt: skip
    normalise = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    published = {"model_cfg": config, "preprocess_cfg": normalise}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(published))
    config["text_cfg"]["hf_model_pretrained"] = False
    config["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
    ours = copy.deepcopy(retune.BIOMEDCLIP)
    ours["image"]["model"] |= {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    ours["image"]["head"][0][1]["in_features"] = 192
    ours["text"]["model"] |= SMALL_BERT
    ours["text"]["head"][0][1] |= {"in_features": 48, "out_features": 280}
    ours["text"]["head"][2][1]["in_features"] = 280
    monkeypatch.setattr(retune, "BIOMEDCLIP", ours)
    bert = transformers.BertConfig(**SMALL_BERT)
    monkeypatch.setattr("open_clip.hf_model.AutoConfig.from_pretrained", lambda *_, **__: bert)
    peer = open_clip.model.CustomTextCLIP(**config)
    torch.save(randomise(peer).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    write_vocabulary(tmp_path)
    encoder, pixels = DualEncoder.load("biomedclip", tmp_path), images(224)
    assert encoder.dim == 512 and not encoder.training
    tokens = encoder.tokenizer(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    with torch.inference_mode():  # the peer's padding is masked, so its length does not matter
        assert_parity(encoder, pixels, peer.encode_image(pixels), PROMPTS, peer.encode_text(tokens))
    assert_same_transform(encoder, open_clip.image_transform(224, is_train=False, **normalise))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biovil_equals_hi_ml(tmp_path, monkeypatch):
    """hi-ml-multimodal's own classes; the BERT is shrunk, the image tower is the ResNet-50 itself."""
    ImageModel, text = peers_of_biovil(monkeypatch)
    image, file = ImageModel("resnet50", 128), tmp_path / "biovil_image_resnet50_proj_size_128.pt"
    torch.save(randomise(image).state_dict(), file)
    unused = {"bert.pooler.dense.weight": torch.zeros(48, 48)}  # in the published file, not in the class
    torch.save(randomise(text).state_dict() | unused, tmp_path / "pytorch_model.bin")
    # as on the hub: a model type unknown to transformers and references to code that must not be run
    code = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    config = {"model_type": "cxr-bert", "auto_map": code, "projection_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "CXRBertTokenizer", "do_lower_case": True}
    tokenizer["auto_map"] = {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in ("configuration_cxrbert.py", "modeling_cxrbert.py"):
        (tmp_path / name).write_text("raise SystemExit('code from the checkpoint was run')\n")
    write_vocabulary(tmp_path)
    encoder, pixels = DualEncoder.load("biovil", tmp_path), images(128).sigmoid()
    tokens = encoder.tokenizer(PROMPTS, padding="longest", return_tensors="pt")
    tokens = tokens["input_ids"], tokens["attention_mask"]
    with torch.inference_mode():
        expected = text.get_projected_text_embeddings(*tokens, normalize_embeddings=False)
        embedded = image(pixels).projected_global_embedding
    stopped = [f"{prompt}." for prompt in PROMPTS]  # hi-ml's engine cuts the full stops off
    assert_parity(encoder, pixels, embedded, stopped, expected)
    cropped = DualEncoder.load("biovil", tmp_path, crop=480)
    for ours, crop in ((encoder, 512), (cropped, 480)):  # hi-ml composes just these, from torchvision
        steps = [Resize(512), CenterCrop(crop), ToTensor(), lambda image: image.expand(3, -1, -1)]
        assert_same_transform(ours, Compose(steps))
    assert cropped.fingerprint() != encoder.fingerprint() and retune.BIOVIL["transform"]["crop"] == 512
    with pytest.raises(InputError, match="biovil, not biomedclip"):
        DualEncoder.load("biomedclip", tmp_path)
    for path, absent in ((tmp_path / "vocab.txt", "no tokenizer"), (file, "BioViL")):
        path.unlink()
        with pytest.raises(InputError, match=absent):
            DualEncoder.load("biovil", tmp_path)


def published_clip(folder, kind, **text_options):
    """A small CLIP or SigLIP, written by transformers itself."""
    vision, text = SMALL_TOWER | {"image_size": 48, "patch_size": 16}, SMALL_TOWER | {"vocab_size": 64}
    text |= {"bos_token_id": 3, "eos_token_id": 2, "max_position_embeddings": 20} | text_options
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model, processor = transformers.CLIPModel(config), transformers.CLIPImageProcessor()
        processor.size, processor.crop_size = {"shortest_edge": 48}, {"height": 48, "width": 48}
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model, processor = transformers.SiglipModel(config), transformers.SiglipImageProcessor()
        processor.size = {"height": 48, "width": 48}
    for part in (randomise(model), processor, word_tokenizer(WORDS)):
        part.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "end"), [("clip", 2), ("clip", 5), ("siglip", 2)])
def test_clip_and_siglip_equal_transformers(tmp_path, kind, end):
    """End token 2 is CLIP's old rule (the highest id ends the text), any other the new one.

    CLIP's transform on squares: odd margins round down, in OpenAI's to even.
    """
    peer = published_clip(tmp_path, kind, eos_token_id=end)
    ours = DualEncoder.load(str(tmp_path))
    pixels = images(48)
    padding = "longest" if kind == "clip" else "max_length"
    tokens = ours.tokenizer(PROMPTS, padding=padding, max_length=20, return_tensors="pt")
    mask = {"attention_mask": tokens["attention_mask"]} if kind == "clip" else {}
    with torch.inference_mode():
        features = peer.get_image_features(pixels), peer.get_text_features(tokens["input_ids"], **mask)
    image, text = (getattr(output, "pooler_output", output) for output in features)
    assert_parity(ours, pixels, image, PROMPTS, text, 1e-5)
    assert ours.dim == text.shape[1] == (24 if kind == "clip" else 48)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    prepare = lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert_same_transform(ours, prepare, square=kind == "clip")
    ours.save(tmp_path / "converted")
    assert DualEncoder.load(str(tmp_path / "converted")).fingerprint() == ours.fingerprint()


def test_missing_unknown_and_misshaped_keys_are_listed(tmp_path):
    state = published_clip(tmp_path, "clip").state_dict()
    del state["text_model.encoder.layers.1.mlp.fc1.bias"]
    state["text_model.encoder.layers.2.mlp.fc1.bias"] = torch.zeros(64)
    state["text_projection.weight"] = torch.zeros(24, 47)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        DualEncoder.load(str(tmp_path))
    message = str(caught.value)
    assert "Missing key" in message and "text.tower.encoder.layers.1.mlp.fc1.bias" in message
    assert "Unexpected key" in message and "text.tower.encoder.layers.2.mlp.fc1.bias" in message
    assert "size mismatch for text.head.0.weight" in message and "\n" not in message


def test_weights_are_one_or_more_safetensors_or_else_a_pickle(tmp_path):
    state = published_clip(tmp_path, "clip").state_dict()
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"not read")
    whole, keys = DualEncoder.load(str(tmp_path)).fingerprint(), list(state)
    (tmp_path / "model.safetensors").unlink()
    for name, part in (("model-1-of-2", keys[:5]), ("model-2-of-2", keys[5:])):
        save_file({key: state[key] for key in part}, tmp_path / f"{name}.safetensors")
    assert DualEncoder.load(str(tmp_path)).fingerprint() == whole
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    torch.save(state, pickled)
    assert DualEncoder.load(str(tmp_path)).fingerprint() == whole
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        DualEncoder.load(str(tmp_path))
    pickled.write_bytes(pickled.read_bytes()[:20000])
    with pytest.raises(InputError, match="pytorch_model.bin: not readable"):
        DualEncoder.load(str(tmp_path))
    pickled.unlink()
    with pytest.raises(InputError, match="no weights.*pytorch_model"):
        DualEncoder.load(str(tmp_path))


def changed(encoder, **changes):
    """The tests' small encoder with random weights and changes to the parts of its config."""
    config = encoder.config | {part: encoder.config[part] | changes[part] for part in changes}
    return randomise(DualEncoder(config, encoder.tokenizer))


def test_pools(encoder):
    """Each pool against its definition; padding and batches never change a text's embedding."""
    dino = {"model_type": "dinov2_with_registers", "image_size": 28, **SMALL_TOWER}
    head = [retune.linear(48, 16, bias=False), ["Normalize", {}]]
    vision, caught = changed(encoder, image={"model": dino, "pool": "pre_norm_mean", "head": head}), {}
    vision.image.tower.layernorm.register_forward_pre_hook(lambda _, inputs: caught.update(x=inputs[0]))
    embeddings = vision.encode_images(images(28))
    expected = nn.functional.normalize(caught["x"].mean(1) @ vision.image.head[0].weight.T, dim=-1)
    assert difference(embeddings, expected) < 1e-6
    bert = {"model_type": "bert", **SMALL_BERT}
    mean = changed(encoder, text={"model": bert, "pool": "mean", "head": [retune.linear(48, 16)]})
    for ours in (changed(encoder), mean):
        alone = torch.cat([ours.encode_texts([prompt]) for prompt in PROMPTS])
        assert difference(ours.encode_texts(PROMPTS * 9), alone.repeat(9, 1)) < 1e-5
    assert changed(encoder).encode_images(images(28)).shape == (8, 16)  # the mean of a map
    with pytest.raises(InputError, match="'average'"):
        changed(encoder, image={"pool": "average"})
    with pytest.raises(InputError, match="'Module'"):
        changed(encoder, text={"head": [["Module", {}]]})


def test_the_fingerprint_follows_weights_but_not_the_name(encoder):
    same = DualEncoder(encoder.config | {"name": "other"}, encoder.tokenizer)
    same.load_state_dict(encoder.state_dict())
    assert same.fingerprint() == encoder.fingerprint()
    with torch.no_grad():
        same.text.head[0].bias[0] += 1
    assert same.fingerprint() != encoder.fingerprint()


def test_a_text_longer_than_the_context_is_refused_unless_truncation_is_asked_for(encoder):
    text = "edema " * 64
    with pytest.raises(InputError, match="65 tokens.* 64.*'edema edema"):
        encoder.encode_texts(["edema", text])
    assert encoder.encode_texts(["edema", text], truncate=True).shape == (2, 16)


def test_saving_is_whole_or_not_at_all(encoder, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        encoder.save(tmp_path / "full")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(encoder.tokenizer, "save_pretrained", lambda _: 1 / 0)
        encoder.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    encoder.save(tmp_path / "new", dtype=torch.float16)
    assert load_file(tmp_path / "new" / "model.safetensors")["text.head.0.weight"].dtype == torch.float16
    loaded = DualEncoder.load(str(tmp_path / "new"))
    assert loaded.text.head[0].weight.dtype == torch.float32
    assert difference(loaded.encode_images(images(32)), encoder.encode_images(images(32))) < 0.01


def test_names_that_lead_nowhere(encoder_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'biomedclp': use tiny, biomedclip, biovil"):
        DualEncoder.load("biomedclp")
    for name, folder in (("biovil", tmp_path), ("anything", tmp_path / "absent")):
        with pytest.raises(InputError, match=f"{folder}: .*{name}.*config.json"):
            DualEncoder.load(name, folder)
    with pytest.raises(InputError, match="image size of small"):
        DualEncoder.load(str(encoder_folder), crop=20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("biomedclip", "biovil", "openai/clip-vit-base-patch32"):
        with pytest.raises(InputError, match=f"{name}.*--encoder-dir"):
            DualEncoder.load(name)
