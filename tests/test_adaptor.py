"""Tests of adaptor.py and its modules: the method against plain constructions, results by hand, the whole
chain.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import classification
import numpy as np
import pytest
import reports
import segmentation
import torch
import torch.nn.functional as F
import unimodal
from safetensors.torch import load_file
from torch import nn

import adaptor
import retune
from adaptor import Adaptor, Config
from retune import DualEncoder, InputError

HERE = Path(__file__).resolve().parent
QUICK = [
    "--demo-images", "240", "--epochs", "3", "--batch-size", "32", "--width", "16", "--heads", "2", "--feedforward", "32",
    "--repeats", "1", "--head-steps", "8", "--mask-images", "40", "--mask-epochs", "2", "--decoder-width", "16",
    "--workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> Path:
    """An encoder folder with two small random towers of different widths."""
    import phantoms

    tokenizer = unimodal.build_tokenizer(phantoms.make_phantoms(60, seed=1).reports)
    config = {
        "name": "random", "dim": 32,
        "image": {"library": "transformers", "pool": "mean", "head": [], "model": {
            "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1], "layer_type": "basic"}},
        "text": {"pool": "mean", "head": [], "context_length": 128, "padding": "longest", "model": {
            "model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": len(tokenizer)}},
        "transform": {"resize": 32, "crop": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("towers") / "random"
    with retune.seeded(0):
        DualEncoder(config, tokenizer).save(folder)
    return folder


def options(towers: Path, folder: Path, *more: str) -> list[str]:
    encoders = ["--image-encoder", str(towers), "--text-encoder", str(towers)]
    return [*QUICK, *encoders, "--cache-dir", str(folder / "cache"), "--output", str(folder / "run"), *more]


@pytest.fixture(scope="session")
def finished(towers, tmp_path_factory) -> Path:
    """The folder of one whole run of all stages with an export."""
    folder = tmp_path_factory.mktemp("finished")
    assert adaptor.main(options(towers, folder, "--export", str(folder / "pair"))) == 0
    return folder


def fails(capsys, *argv: str) -> str:
    """The one line on standard error of a run that must end with exit code 2."""
    assert adaptor.main(list(argv)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


# ----------------------------------------------------------------------------------------------------- Module


def plain_layer(layer: adaptor.Layer, src: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The layer of the paper from torch's own attention and norms, with the same weights."""
    width = src.shape[-1]
    attention = nn.MultiheadAttention(width, layer.self_attn.num_heads, batch_first=True, dtype=src.dtype)
    attention.load_state_dict(layer.self_attn.state_dict())
    norms = [nn.LayerNorm(width, dtype=src.dtype) for _ in range(2)]
    for norm, source in zip(norms, (layer.norm1, layer.norm2)):
        norm.load_state_dict(source.state_dict())
    x = norms[0](src + attention(query, src, src)[0])
    hidden = torch.relu(x @ layer.linear1.weight.T + layer.linear1.bias)
    return norms[1](x + hidden @ layer.linear2.weight.T + layer.linear2.bias)


def plain_adaptor(model: Adaptor, images: torch.Tensor, texts: torch.Tensor):
    image = F.normalize(images @ model.image_projection.weight.T, dim=-1)
    text = F.normalize(texts @ model.text_projection.weight.T, dim=-1)
    for layer in model.layers:
        image = plain_layer(layer, image, text)
        text = plain_layer(layer, text, image)
    return image, text


def small_adaptor(dtype=torch.float32, **changes) -> Adaptor:
    with retune.seeded(3):
        return Adaptor(
            **{"image_dim": 7, "text_dim": 5, "width": 24, "heads": 4, "feedforward": 32} | changes
        ).to(dtype)


@pytest.mark.parametrize("tokens", [1, 6])
def test_module_equals_torchs_attention_and_norms_with_shared_weights(tokens):
    model = small_adaptor(torch.float64, layers=3).eval()
    with retune.seeded(4):
        images, texts = (torch.randn(9, tokens, d, dtype=torch.float64, requires_grad=True) for d in (7, 5))
    expected, found = plain_adaptor(model, images, texts), model(images, texts)
    for a, b in zip(expected, found):
        assert (a - b).abs().max() <= 1e-6
    gradients = [
        torch.autograd.grad(sum(o.pow(3).sum() for o in out), (images, texts)) for out in (expected, found)
    ]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_with_one_token_an_image_does_not_depend_on_its_text(training):
    model = small_adaptor().train(training)
    with retune.seeded(5):
        images, texts, others = torch.randn(9, 7), torch.randn(9, 5), torch.randn(9, 5)
    outputs = []
    for text in (texts, others):
        with retune.seeded(6):  # the same dropout
            outputs.append(model(images, text)[0])
    assert outputs[0].shape == (9, 24) and torch.equal(*outputs)
    if not training:
        image, text = model(images, texts)
        torch.testing.assert_close(image, model.alone("image", images), rtol=0, atol=1e-6)
        torch.testing.assert_close(text, model.alone("text", texts), rtol=0, atol=1e-6)


def test_with_several_tokens_it_does():
    model = small_adaptor().eval()
    with retune.seeded(5):
        images, texts, others = torch.randn(9, 6, 7), torch.randn(9, 6, 5), torch.randn(9, 6, 5)
    assert (model(images, texts)[0] - model(images, others)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"query \(9, 3, 24\) must have the shape of src \(9, 6, 24\)"):
        model(images, texts[:, :3])


def test_loss_by_hand():
    with retune.seeded(7):
        image, text = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    cosine = np.array([[float(a @ b / a.norm() / b.norm()) for b in text] for a in image]) * math.exp(2.6592)
    rows = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(cosine)])
    columns = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(cosine.T)])
    found = adaptor.contrastive_loss(image, text, torch.tensor(2.6592, dtype=torch.float64))
    assert math.isclose(float(found), 0.75 * rows + 0.25 * columns, rel_tol=1e-9)


def test_defaults_are_the_papers():
    model, config = Adaptor(768, 768), adaptor.settle(Config(), 200_000)
    assert len(model.layers) == 2 and model.layers[0].self_attn.num_heads == 12
    assert model.layers[0].linear1.weight.shape == (2048, 768) and math.isclose(
        model.log_scale.item(), 2.6592, rel_tol=1e-6
    )
    assert (config.lr, config.batch_size, config.epochs, config.width) == (2e-5, 1024, 50, 768)
    assert [adaptor.step_factor(s, 100) for s in (0, 1, 51, 99)] == [0.5, 1.0, 0.5, 1 / 98]


# -------------------------------------------------------------------------------------------------- Retrieval


def test_retrieval_by_hand():
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]]), dim=-1)
    found = adaptor.retrieval(image, text, ["a", "b", "c"])
    # image to text: ranks 1, 2, 3; text to image: 2 (the third image is nearer), 1, 3
    assert (
        found["image_to_text"]["recall_1"] == pytest.approx(1 / 3)
        and found["image_to_text"]["median_rank"] == 2
    )
    assert found["text_to_image"]["recall_1"] == pytest.approx(1 / 3)
    assert found["image_to_text"]["chance"]["recall_1"] == pytest.approx(1 / 3)
    same = adaptor.retrieval(
        image, text[[0, 1, 1]], ["a", "b", "b"]
    )  # two reports, one of them of two images
    assert same["distinct_reports"] == 2 and same["image_to_text"]["recall_1"] == pytest.approx(2 / 3)
    assert same["text_to_image"]["recall_1"] == pytest.approx(1 / 2)
    assert same["text_to_image"]["chance"]["recall_1"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert same["text_to_image"]["chance"]["recall_5"] == 1


def test_constant_embeddings_find_nothing():
    constant = torch.ones(40, 3) / math.sqrt(3)
    found = adaptor.retrieval(constant, constant, [str(i) for i in range(40)])
    for way in ("image_to_text", "text_to_image"):
        assert found[way]["recall_10"] == 0 and found[way]["median_rank"] == 40
        assert found[way]["chance"]["recall_5"] == pytest.approx(5 / 40)


# ------------------------------------------------------------------------------------------------------ Texts

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // ?pneumonia

 FINDINGS:

 The lungs are clear.  No effusion; since ___, the
 heart: normal.

 IMPRESSION:

 No acute process.

 RECOMMENDATION(S):  none
"""


def test_captions_from_labels():
    names = ["Edema", "Pleural_Effusion", "Mass"]
    assert reports.caption([1, 1, 0], names) == "a chest X-ray of a patient with edema, pleural effusion."
    assert reports.caption([0, math.nan, 0], names) == "a chest X-ray of a patient with no finding."


def test_mimic_reports_are_found_by_study(tmp_path):
    names = [f"files/p10/p1000003{i}/s5041426{i}/a{i}.jpg" for i in range(3)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).parent.with_suffix(".txt").write_text(REPORT)
    data = retune.Radiographs(names, np.zeros((3, 1)), ["Edema"], names, ["train", "val", "test"], names)
    texts, source = reports.make_texts(Config(data="mimic", reports_dir=str(tmp_path)), data)
    assert source == "reports" and len(set(texts)) == 1
    assert "The lungs are clear." in texts[0] and "No acute process." in texts[0]
    assert "cough" not in texts[0] and "none" not in texts[0] and "\n" not in texts[0]
    (tmp_path / "files/p10/p10000031/s50414261.txt").unlink()
    with pytest.raises(InputError, match="row 3: no report .1 images have none.; --skip-unpaired"):
        reports.make_texts(Config(data="mimic", reports_dir=str(tmp_path)), data)
    skip = Config(data="mimic", reports_dir=str(tmp_path), skip_unpaired=True)
    assert [bool(text) for text in reports.make_texts(skip, data)[0]] == [True, False, True]


# --------------------------------------------------------------------------------------------- Masks and Dice


def mask_to_rle(mask: np.ndarray) -> str:
    """SIIM's format, the slow way: walk down the columns."""
    pixels, runs, gap = mask.T.flatten().tolist(), [], 0
    for value, group in itertools.groupby(pixels):
        length = len(list(group))
        if value:
            runs += [gap, length]
            gap = 0
        else:
            gap = length
    return " ".join(map(str, runs)) or "-1"


def test_run_lengths():
    expected = np.zeros((3, 4), bool)
    expected[1:, 0] = expected[0, 1] = expected[2, 3] = True  # pixels 1, 2, 3 and 11 down the columns
    assert np.array_equal(segmentation.rle_to_mask("1 3 7 1", 3, 4), expected)
    assert mask_to_rle(expected) == "1 3 7 1"
    draw = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 3), (16, 16), (7, 31)):
        mask = draw.random((height, width)) < 0.4
        assert np.array_equal(segmentation.rle_to_mask(mask_to_rle(mask), height, width), mask)
    for empty in ("-1", ""):
        assert not segmentation.rle_to_mask(empty, 2, 2).any()


@pytest.mark.parametrize("text", ["1", "1 2 3", "1 x", "-1 2", "0 13", "12 1"])
def test_bad_run_lengths_are_named(text):
    with pytest.raises(InputError, match="labels.csv row 7: run"):
        segmentation.rle_to_mask(text, 3, 4, "labels.csv row 7")


def test_boxes():
    mask = segmentation.box_to_mask(["1.0", "2", "3", "1"], 4, 6)
    assert mask.sum() == 3 and mask[2, 1:4].all()
    assert not segmentation.box_to_mask(["", "", "", ""], 4, 6).any()
    for box in (
        ["4", "0", "3", "1"],
        ["0", "0", "0", "1"],
        ["-1", "0", "2", "2"],
        ["a", "0", "2", "2"],
        ["nan", "0", "2", "2"],
    ):
        with pytest.raises(InputError, match="row 9: box"):
            segmentation.box_to_mask(box, 4, 6, "row 9")


def test_dice_by_hand():
    truth, guess = torch.zeros(4, 1, 4, 4, dtype=torch.bool), torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    truth[0, 0, 0, :3] = guess[0, 0, 0, 1:] = True  # two of three each: 2 * 2 / (3 + 3)
    guess[1, 0, 0, 0] = True  # something where nothing is: 0
    truth[2, 0, 1] = True  # nothing where something is: 0; the last: nothing where nothing is: 1
    assert torch.allclose(segmentation.dice(guess, truth)[:, 0], torch.tensor([2 / 3, 0.0, 0.0, 1.0]))


def test_masks_follow_their_image_through_resize_and_crop():
    mask = np.zeros((1, 60, 90), bool)
    mask[0, 20:40, 50:70] = True
    image = torch.from_numpy(mask.astype(np.uint8) * 255)
    options = {"resize": 40, "crop": 32}
    pixels = retune.transform_image(image, **options, interpolation="bilinear", mean=[0.0] * 3, std=[1.0] * 3)
    moved = segmentation.transform_mask(mask, **options)
    assert moved.shape == (1, 32, 32) and ((pixels[0] > 0.5) == moved[0]).float().mean() > 0.98


def write_masked(root: Path, name: str, n: int = 12) -> None:
    from PIL import Image

    (root / "images").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((20, 24), i, np.uint8)).save(root / "images" / f"id{i}.png")
    if name == "siim":
        lines = [
            "ImageId, EncodedPixels",
            *(f"id{i},{'0 5 15 5' if i % 2 else '-1'}" for i in range(n)),
            "id1, 100 3",
        ]
        (root / "train-rle.csv").write_text("\n".join(lines))
    else:
        boxes = ["2,3,4,5,1" if i % 2 else ",,,,0" for i in range(n)]
        lines = [
            "patientId,x,y,width,height,Target",
            *(f"id{i},{box}" for i, box in enumerate(boxes)),
            "id1,0,0,1,1,1",
        ]
        (root / "stage_2_train_labels.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("name, area", [("siim", 13), ("rsna", 21)])
def test_siim_and_rsna_readers(tmp_path, name, area, monkeypatch):
    write_masked(tmp_path, name)
    monkeypatch.setattr(retune, "patient_split", lambda ids, shares: ["train", "val", "test"] * 4)
    config = Config(data=name, data_dir=str(tmp_path))
    data = adaptor.load_data(config)
    assert len(data.images) == 12 and data.labels[:, 0].tolist() == [0, 1] * 6
    masks = segmentation.find_masks(config, data)
    assert (
        not masks(0).any() and masks(1).shape == (1, 20, 24) and masks(1).sum() == area
    )  # two lines of one image
    (tmp_path / "images/id3.png").unlink()
    with pytest.raises(InputError, match="row 5: no image id3.dcm"):
        adaptor.load_data(config)


def test_a_mask_of_another_size_is_refused(tmp_path, monkeypatch):
    write_masked(tmp_path, "siim")
    path = tmp_path / "train-rle.csv"
    path.write_text(path.read_text().replace("0 5 15 5", "0 5 1000 5", 1))
    monkeypatch.setattr(retune, "patient_split", lambda ids, shares: ["train", "val", "test"] * 4)
    config = Config(data="siim", data_dir=str(tmp_path))
    with pytest.raises(
        InputError, match="row 3: runs end at pixel 1,010 of a 20 x 24 image: another size's mask"
    ):
        segmentation.find_masks(config, adaptor.load_data(config))(1)


# --------------------------------------------------------------------------------------------- Classification


def test_subsets_are_nested_by_patient_and_seeded():
    patients = [f"p{i // 3}" for i in range(300)]
    small, middle, whole = classification.nested_subsets(patients, (0.01, 0.1, 1.0), seed=1)
    assert (len(small), len(middle), len(whole)) == (3, 30, 300)
    assert set(small) < set(middle) < set(whole)
    assert len({patients[i] for i in middle}) == 10  # whole patients
    again = classification.nested_subsets(patients, (0.1,), seed=1)[0]
    assert np.array_equal(middle, again)
    assert not np.array_equal(middle, classification.nested_subsets(patients, (0.1,), seed=2)[0])


@pytest.mark.parametrize("multiclass", [False, True])
def test_the_head_learns_and_is_measured_on_test(multiclass):
    draw = np.random.default_rng(0)
    kind = draw.integers(0, 3, 300)
    features = torch.from_numpy((np.eye(3)[kind] + 0.1 * draw.standard_normal((300, 3))).astype(np.float32))
    labels = torch.from_numpy(np.eye(3, dtype=np.float32)[kind])
    if not multiclass:
        labels[:40, 1] = math.nan
    rows = dict(zip(("train", "val", "test"), np.split(np.arange(300), [200, 250])))
    config = Config(multiclass=multiclass, head_steps=60)
    metrics = classification.train_head(lambda rows: features[rows], labels, rows, config, seed=0)
    assert metrics["auroc_macro"] > 0.99 and metrics["n"] == 50
    assert metrics["accuracy"] > 0.9


def test_multiclass_refuses_two_classes_of_one_image(tmp_path):
    data = retune.Radiographs(
        np.zeros((2, 4, 4), np.uint8), [[1, 0], [1, 1]], ["a", "b"], ["1", "2"], ["train", "test"]
    )
    with pytest.raises(InputError, match="row 3: --multiclass needs exactly one class"):
        classification.classify(
            small_adaptor(), None, data, Config(multiclass=True, output=str(tmp_path)), "cpu"
        )


# ------------------------------------------------------------------------------------------------ Any encoder


@pytest.fixture(scope="session")
def published(towers, tmp_path_factory) -> Path:
    """Folders as transformers publishes them: a DINOv2 with registers, and a BERT with its pooler and
    tokenizer.
    """
    import transformers

    root = tmp_path_factory.mktemp("published")
    with retune.seeded(1):
        image = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=7,
                num_register_tokens=4,
            )
        )
        text = transformers.BertModel(transformers.BertConfig(
            vocab_size=400, hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))  # fmt: skip
    image.save_pretrained(root / "image")
    settings = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28},
                "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}  # fmt: skip
    (root / "image/preprocessor_config.json").write_text(json.dumps(settings))
    text.save_pretrained(root / "text")
    DualEncoder.load(str(towers)).tokenizer.save_pretrained(root / "text")
    return root


def test_transformers_folders_load_with_their_weights_and_transform(published, monkeypatch):
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = Config(image_encoder=str(published / "image"), text_encoder=str(published / "text"))
    encoder = unimodal.load_backbones(config)
    assert (encoder.dim, encoder.text_dim) == (24, 20)
    assert encoder.config["transform"] == {"resize": 32, "crop": 28, "interpolation": "bicubic",
                                           "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}  # fmt: skip
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tower = transformers.AutoModel.from_pretrained(published / "image").eval()
    with torch.no_grad():
        states = tower(pixels).last_hidden_state  # class token, 4 registers, 4 x 4 patches
    torch.testing.assert_close(encoder.encode_images(pixels), states[:, 0], rtol=0, atol=1e-5)
    side = segmentation.PatchSide(encoder)
    assert side.grid == (4, 4) and side.dim == 16 * 24
    torch.testing.assert_close(side.tokens(pixels), states[:, 5:], rtol=0, atol=1e-5)
    text = transformers.AutoModel.from_pretrained(published / "text").eval()
    tokens = encoder.tokenize(["no edema.", "the lungs are clear and there is no effusion."])
    with torch.no_grad():
        expected = text(**tokens).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.text(*tokens.values()), expected, rtol=0, atol=1e-5)


def test_text_embeddings_do_not_depend_on_the_batch(towers, tmp_path):
    config = Config(
        image_encoder=str(towers),
        text_encoder=str(towers),
        cache_dir=str(tmp_path),
        workers=0,
        encode_batch=3,
    )
    encoder = unimodal.load_backbones(config)
    texts = [
        "no edema.",
        "the heart is enlarged. no pneumothorax is seen. " * 40,
        "effusion",
        "clear lungs.",
        "edema",
    ]
    found = reports.embed_texts(encoder, texts, config, "cpu")
    for row, text in zip(found, texts):
        torch.testing.assert_close(
            torch.from_numpy(row.copy()), encoder.encode_texts([text], truncate=True)[0], rtol=0, atol=1e-5
        )


def test_torchvision_with_a_weights_file(towers, tmp_path):
    from torchvision.models import resnet18

    with retune.seeded(2):
        network = resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    name = f"torchvision:resnet18={tmp_path / 'w.pth'}"
    encoder = unimodal.load_backbones(Config(image_encoder=name, text_encoder=str(towers)))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(pixels), network(pixels), rtol=0, atol=1e-4)


def test_the_demos_towers_train_apart_and_the_same_twice(tmp_path, capsys):
    steps = {"image": 2, "text": 2}
    first, second = (unimodal.demo_encoder(tmp_path / name, phantoms=24, steps=steps) for name in "ab")
    assert (
        first.fingerprint() == second.fingerprint() and "two encoders, each alone" in capsys.readouterr().out
    )
    assert first.config["image"]["head"] == first.config["text"]["head"] == []


# -------------------------------------------------------------------------------------------- The whole chain


def test_a_run_writes_its_results(finished, towers):
    run = finished / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {p.name for p in run.iterdir()} == {
        "config.json", "metrics.json", "table.md", "splits.csv", "loss.png", "overlay.png", "adaptor.safetensors",
        "retrieval.json", "classification.json", "segmentation.json"}  # fmt: skip
    assert len(metrics["retrieval"]["history"]) == 3 and metrics["retrieval"]["test"]["n"] > 20
    assert metrics["segmentation"][0]["finding"] == "mean" and len(metrics["classification"]) == 6
    assert "not clinical" in (run / "table.md").read_text()
    for row in metrics["parameters"][1:]:
        assert float(row[-1].rstrip("%")) > 90, row  # the paper's claim, with its encoders and widths
    before, after = DualEncoder.load(str(towers)), DualEncoder.load(str(finished / "pair"))
    for key, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]), key  # frozen


def test_splits_tell_the_labelled_shares(finished):
    rows = [line.split(",") for line in (finished / "run/splits.csv").read_text().splitlines()[1:]]
    assert {split for _, _, split, _ in rows} == {"train", "val", "test"}
    assert {share for _, _, split, share in rows if split == "train"} == {"0.01", "0.1", "1"}
    assert {share for _, _, split, share in rows if split != "train"} == {""}


def test_the_exported_pair_is_the_adaptors(finished, towers):
    pair, backbones = DualEncoder.load(str(finished / "pair")), DualEncoder.load(str(towers))
    model = adaptor.load_adaptor(finished / "run", unimodal.load_backbones(
        Config(image_encoder=str(towers), text_encoder=str(towers))))  # fmt: skip
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["no edema.", "there is a small pleural effusion on the left."]
    with torch.no_grad():
        image, text = (
            model.alone("image", backbones.encode_images(pixels)),
            model.alone("text", backbones.encode_texts(texts)),
        )
    torch.testing.assert_close(pair.encode_images(pixels), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair.encode_texts(texts), text, rtol=0, atol=1e-5)


def test_the_chain_to_retune(finished, capsys):
    argv = ["--encoder", str(finished / "pair"), "--scenario", "class", "--demo-images", "240", "--epochs", "1",
            "--workers", "0", "--cache-dir", str(finished / "cache"), "--output", str(finished / "retuned")]  # fmt: skip
    assert retune.main(argv) == 0
    metrics = json.loads((finished / "retuned/metrics.json").read_text())
    assert len(metrics["after_task"]) == 5 and metrics["zero_shot"]["test"]["auroc_macro"] is not None


def test_no_patient_is_in_a_saved_model(finished):
    content = (finished / "run/adaptor.safetensors").read_bytes()
    assert b"phantom" not in content and b"demo-" not in content
    widths = {tuple(v.shape) for v in load_file(finished / "run/adaptor.safetensors").values()}
    assert all(240 not in shape and 168 not in shape for shape in widths)


def results(run: Path) -> dict:
    """Every result of a run that must not change: bytes of all files, metrics without its clock."""
    files = {p.name: p.read_bytes() for p in run.iterdir() if p.suffix not in (".png", ".json")}
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["cost"], metrics["config"]
    return files | {"metrics": metrics}


@pytest.mark.parametrize("stop", ["pretraining", "segmentation-adaptor", "segmentation-bare"])
def test_a_stopped_run_goes_on_to_the_same_bytes(finished, towers, stop, monkeypatch, tmp_path):
    original = retune.keep

    def stopping(folder, model, optimizer, epoch, seconds):
        original(folder, model, optimizer, epoch, seconds)
        if folder.name == stop and epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(retune, "keep", stopping)
    argv = options(towers, finished)
    argv[argv.index("--output") + 1] = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        adaptor.main(argv)
    monkeypatch.undo()
    assert adaptor.main(argv) == 0
    assert results(tmp_path / "run") == results(finished / "run")


def test_a_killed_process_goes_on_to_the_same_bytes(finished, towers, tmp_path):
    argv = options(towers, finished, "--stages", "retrieval", "--epochs", "12")
    command = [sys.executable, str(HERE / "adaptor.py"), *argv]
    place = command.index("--output") + 1
    folders = [tmp_path / "killed", tmp_path / "whole"]
    command[place] = str(folders[0])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.time() + 60
    while not (folders[0] / "pretraining/resume.safetensors").exists() and process.poll() is None:
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for folder in folders:
        command[place] = str(folder)
        assert adaptor.main(command[2:]) == 0
    assert results(folders[0]) == results(folders[1])
    assert not list(tmp_path.rglob("*.partial*")) and not (folders[0] / "pretraining").exists()


def test_a_finished_run_is_not_repeated_and_can_still_be_exported(finished, towers, tmp_path, capsys):
    assert adaptor.main(options(towers, finished, "--export", str(tmp_path / "later"))) == 0
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "later/model.safetensors").read_bytes() == (
        finished / "pair/model.safetensors"
    ).read_bytes()


def test_an_earlier_adaptor_serves_other_data(finished, towers, tmp_path, capsys):
    argv = options(towers, tmp_path, "--pretrained", str(finished / "run"), "--stages", "classification")
    argv[argv.index("--demo-images") + 1] = "200"
    assert adaptor.main(argv) == 0
    old, new = (load_file(f / "run/adaptor.safetensors") for f in (finished, tmp_path))
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["retrieval"]["history"] == []


# -------------------------------------------------------------------------------------------------- Bad input


def write_csv(root: Path, change=lambda lines: lines) -> Path:
    from PIL import Image

    root.mkdir(exist_ok=True)
    lines = ["path,Edema,patient,split,report"]
    for i in range(12):
        Image.fromarray(np.full((40, 40), 20 * i, np.uint8)).save(root / f"{i}.png")
        lines.append(
            f"{i}.png,{i % 2},p{i},{('train', 'val', 'test')[i // 2 % 3]},{'edema' if i % 2 else 'clear'} number {i}"
        )
    (root / "data.csv").write_text("\n".join(change(lines)))
    return root


def test_csv_with_reports(towers, tmp_path, capsys):
    root = write_csv(tmp_path / "data")
    argv = options(towers, tmp_path, "--data", "csv", "--data-dir", str(root), "--stages", "retrieval")
    assert adaptor.main(argv) == 0
    assert "texts: reports" in capsys.readouterr().out


def test_an_image_without_a_report(towers, tmp_path, capsys):
    root = write_csv(
        tmp_path / "data", lambda lines: [*lines[:4], lines[4].rsplit(",", 1)[0] + ", ", *lines[5:]]
    )
    argv = options(towers, tmp_path, "--data", "csv", "--data-dir", str(root), "--stages", "retrieval")
    assert "data.csv row 5: no report (1 images have none); --skip-unpaired" in fails(capsys, *argv)
    assert adaptor.main([*argv, "--skip-unpaired"]) == 0
    assert "11 pairs; 1 images without a text" in capsys.readouterr().out


def test_labels_become_captions_and_it_says_so(towers, tmp_path, capsys):
    root = write_csv(tmp_path / "data", lambda lines: [line.rsplit(",", 1)[0] for line in lines])
    argv = options(towers, tmp_path, "--data", "csv", "--data-dir", str(root), "--stages", "retrieval")
    assert "--texts reports: the data set csv has no reports" in fails(capsys, *argv, "--texts", "reports")
    argv[argv.index("--output") + 1] = str(tmp_path / "other")
    assert adaptor.main(argv) == 0
    assert "captions made from the labels" in capsys.readouterr().out


def test_bad_options_end_with_one_line(towers, published, finished, tmp_path, capsys):
    def error(*more: str) -> str:
        return fails(capsys, *options(towers, tmp_path), *more)

    assert "--width 15 must be a multiple of --heads 2" in error("--width", "15")
    assert "--fractions 2.0" in error("--fractions", "2")
    assert "--epochs 0 must be positive" in error("--epochs", "0")
    assert "--weight-decay -1.0 must not be negative" in error("--weight-decay", "-1")
    assert "--image-weight 1.5 must be from 0 to 1" in error("--image-weight", "1.5")
    assert "--dropout 1.0 must be at least 0 and below 1" in error("--dropout", "1")
    assert "--seed -1 must be from 0 to 4294967295" in error("--seed", "-1")
    assert "--image-encoder" in error("--image-encoder", str(tmp_path / "none"))
    assert "not a transformers image model that can be read" in error(
        "--image-encoder", str(published / "text")
    )
    shutil.copytree(published / "text", tmp_path / "text")
    shutil.copy(published / "image/preprocessor_config.json", tmp_path / "text")
    assert "gives no hidden states for images" in error("--image-encoder", str(tmp_path / "text"))
    assert "no such model; did you mean" in error("--image-encoder", "torchvision:resnet5")
    assert "adaptor was trained on other encoders" in error(
        "--pretrained", str(finished / "run"), "--text-encoder", str(published / "text"))  # fmt: skip
    assert "no such file" in error("--pretrained", str(tmp_path / "none"), "--output", str(tmp_path / "o2"))
    assert "needs its folder" in error("--data", "siim")
    assert "--data-dir" in error("--data", "csv")
    root = write_csv(tmp_path / "data")
    assert "csv has no masks" in error("--data", "csv", "--data-dir", str(root), "--stages", "segmentation",
                                       "--output", str(tmp_path / "o3"))  # fmt: skip
    assert "is not an empty folder" in error(
        "--export", str(finished / "pair"), "--output", str(tmp_path / "o4")
    )
    assert not (tmp_path / "o4").exists()  # refused before anything was trained
