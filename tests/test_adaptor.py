"""adaptor/: the method against plain constructions, results by hand, the whole chain, bad input."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import retune
from adaptor import classification, encoders, pretraining, segmentation
from adaptor.__main__ import main
from adaptor.config import Config, resolve_defaults
from adaptor.demo_encoders import build_tokenizer
from adaptor.model import Adaptor, Layer, contrastive_loss, count_parameters, load_adaptor
from retune import DualEncoder
from tests.fixtures import assert_same_run, read_failure, read_metrics, write_rows

QUICK = "--demo-images 240 --epochs 3 --batch-size 32 --width 16 --heads 2 --feedforward 32 --lr 1e-3"
QUICK += " --repeats 1 --head-epochs 2 --mask-images 40 --mask-epochs 2 --mask-batch 16 --decoder-width 16 --workers 0 --device cpu"


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> Path:
    """An encoder folder with two small random towers of different widths."""
    from demo import phantoms

    tokenizer = build_tokenizer(phantoms.make_phantoms(60, seed=1).reports)
    image = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1],
             "layer_type": "basic"}  # fmt: skip
    text = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": len(tokenizer)}  # fmt: skip
    whole = {"pool": "mean", "head": []}
    transform = {"resize": 32, "crop": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"name": "random", "dim": 32, "image": {"model": image} | whole, "transform": transform,
              "text": {"model": text, "context_length": 128, "padding": "longest"} | whole}  # fmt: skip
    folder = tmp_path_factory.mktemp("towers") / "random"
    with retune.seeded(0):
        DualEncoder(config, tokenizer).save(folder)
    return folder


def options(towers: Path, folder: Path, *more) -> list[str]:
    """A small run of all stages; of an option that is given twice, the last counts."""
    names = f"--image-encoder {towers} --text-encoder {towers}"
    argv = f"{QUICK} {names} --cache-dir {folder / 'cache'} --output {folder / 'run'}"
    return [*argv.split(), *map(str, more)]


@pytest.fixture(scope="session")
def finished(towers, tmp_path_factory) -> Path:
    """The folder of one whole run of all stages with an export."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(options(towers, folder, "--export", folder / "pair")) == 0
    return folder


def plain_layer(layer: Layer, src: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
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
     195_634_872, 12_404_225, 0.937),
])  # fmt: skip
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


def labelled_set(n: int = 300, positive: float = 0.3) -> retune.Radiographs:
    draw = np.random.default_rng(0)
    labels = (draw.random((n, 1)) < positive).astype(np.float32)
    patients = [f"p{i // 3}" for i in range(n)]
    split = ["train" if i < 0.8 * n else "val" if i < 0.9 * n else "test" for i in range(n)]
    return retune.Radiographs(np.zeros((n, 4, 4), np.uint8), labels, ["a"], patients, split)


def test_subsets_are_nested_by_patient_and_seeded():
    patients = [f"p{i // 3}" for i in range(300)]
    small, middle, whole = classification.nested_subsets(patients, (0.01, 0.1, 1.0), seed=1)
    assert (len(small), len(middle), len(whole)) == (3, 30, 300)
    assert set(small) < set(middle) < set(whole)
    assert len({patients[i] for i in middle}) == 10  # whole patients
    again = classification.nested_subsets(patients, (0.1,), seed=1)[0]
    assert np.array_equal(middle, again)
    assert not np.array_equal(middle, classification.nested_subsets(patients, (0.1,), seed=2)[0])


def test_segmentation_has_classifications_subsets():
    data, config = labelled_set(), Config(fractions=(0.01, 0.1, 1.0))
    for repeat in (0, 1):
        expected = classification.labelled_rows(data, config, repeat)
        found = segmentation.training_rows(data, config, repeat)
        assert all(np.array_equal(found[f], np.sort(expected[f])) for f in expected)
    assert len(expected[0.1]) == 24 and len(expected[1.0]) == 240
    capped = segmentation.training_rows(data, Config(fractions=(0.01, 0.1, 1.0), mask_images=50), 1)
    assert np.array_equal(capped[0.1], found[0.1]) and len(capped[1.0]) == 50
    assert set(capped[0.01]) < set(capped[0.1]) < set(capped[1.0])
    rows = segmentation.training_rows(data, Config(fractions=(0.1, 1.0), balance="yes"), 0)
    positive = data.labels[rows[1.0], 0] == 1
    assert positive.sum() == (data.labels[data.where("train")] == 1).sum() == len(positive) / 2


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


def test_a_run_writes_its_results(finished, towers):
    run = finished / "run"
    metrics = read_metrics(run)
    files = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    assert files == {
        "config.json", "metrics.json", "table.md", "splits.csv", "embeddings.png", "overlay.png", "adaptor.safetensors",
        "retrieval.json", "classification.json", "segmentation.json"}  # fmt: skip
    assert len(metrics["retrieval"]["history"]) == 3 and metrics["retrieval"]["test"]["n"] > 20
    for stage in ("classification", "segmentation"):
        assert [r["fraction"] for r in metrics[stage]] == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0]
    sizes = [[r["n"] for r in metrics[stage]] for stage in ("classification", "segmentation")]
    assert sizes[0][:4] == sizes[1][:4] and sizes[1][4] == 40  # all labels: --mask-images
    assert "not clinical" in (run / "table.md").read_text()
    before, after = DualEncoder.load(str(towers)), DualEncoder.load(str(finished / "pair"))
    for key, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[key]), key  # frozen
    shares = [line.split(",")[2:] for line in (run / "splits.csv").read_text().splitlines()[1:]]
    assert {share for split, share in shares if split == "train"} == {"0.01", "0.1", "1"}
    assert {share for split, share in shares if split != "train"} == {""}


def test_exported_pair_is_the_adaptors(finished, towers):
    pair = DualEncoder.load(str(finished / "pair"))
    backbones = encoders.load_backbones(Config(image_encoder=str(towers), text_encoder=str(towers)))
    model = load_adaptor(finished / "run", backbones)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["no edema.", "there is a small pleural effusion on the left."]
    found = pair.encode_images(pixels), pair.encode_texts(texts)
    embeddings = {"image": backbones.encode_images(pixels), "text": backbones.encode_texts(texts)}
    with torch.no_grad():
        wanted = tuple(model.alone(side, x) for side, x in embeddings.items())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["pretraining", "adaptor-0.1-0", "bare-1-0"])
def test_a_stopped_run_goes_on_to_the_same_bytes(finished, towers, stop, monkeypatch, tmp_path):
    original = retune.save_checkpoint

    def stopping(folder, model, optimizer, epoch, seconds):
        original(folder, model, optimizer, epoch, seconds)
        if folder.name == stop and epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(retune, "save_checkpoint", stopping)
    argv = options(towers, finished, "--output", tmp_path / "run")
    assert main(argv) == 130
    monkeypatch.undo()
    assert main(argv) == 0
    assert_same_run(tmp_path / "run", finished / "run")


def test_an_earlier_adaptor_serves_other_data_and_resolutions(finished, towers, tmp_path, capsys):
    more = ["--stages", "segmentation", "--image-size", 64, "--fractions", 1, "--demo-images", 200]
    more += ["--width", 64]  # the adaptor's own width counts
    assert main(options(towers, tmp_path, "--pretrained", finished / "run", *more)) == 0
    assert "2 layers of width 16, 2 heads" in capsys.readouterr().out
    old, new = (load_file(f / "run/adaptor.safetensors") for f in (finished, tmp_path))
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert read_metrics(tmp_path / "run")["retrieval"]["history"] == []


@pytest.mark.slow
def test_grid_has_every_pair_and_ablation_and_resumes(towers, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(towers, other)
    argv = ["grid", *options(towers, tmp_path, "--image-encoders", towers, "--text-encoders", towers, other)]
    assert main(argv) == 0
    tables = json.loads((tmp_path / "run/grid.json").read_text())
    assert [row["name"] for row in tables["encoders"]] == ["random + random", "random + other"]
    rows = {row["name"]: row for row in tables["ablations, random + random"]}
    assert len(rows) == 7 and rows["as published"]["scores"] == tables["encoders"][0]["scores"]
    assert rows["dummy text"]["scores"] == rows["as published"]["scores"]
    assert rows["0 layers"]["parameters"] == (32 + 24) * 16 + 1
    assert rows["towers trained too"]["parameters"] > rows["as published"]["parameters"]
    assert rows["towers trained too"]["scores"] != rows["as published"]["scores"]
    assert (tmp_path / "run/parameters.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr().out.count("finished before") == 9


def test_texts_are_reports_or_captions_and_it_says_so(towers, csv_set, tmp_path, capsys):
    root, rows, _ = csv_set
    argv = options(towers, tmp_path, "--data", "csv", "--data-dir", root, "--stages", "retrieval")
    assert "--texts reports" in read_failure(capsys, [*argv, "--texts", "reports"], main)
    assert main([*argv, "--output", str(tmp_path / "other")]) == 0
    assert "captions made from the labels" in capsys.readouterr().out
    for i, row in enumerate(rows):
        row["report"] = "" if i == 2 else f"number {i}"
    write_rows(root / "labels.csv", rows)
    argv += ["--output", str(tmp_path / "reports")]
    line = read_failure(capsys, argv, main)
    assert "labels.csv row 4" in line and "--skip-unpaired" in line
    assert main([*argv, "--skip-unpaired"]) == 0
    assert "23 pairs; 1 images without a text" in capsys.readouterr().out
    names = ["Edema", "Pleural_Effusion"]
    assert pretraining.caption([1, 1], names) == "a chest X-ray of a patient with edema, pleural effusion."
    assert pretraining.caption([0, math.nan], names) == "a chest X-ray of a patient with no finding."


@pytest.mark.parametrize("more, named", [
    ("--width 15", "--width 15"), ("--fractions 2", "--fractions (2.0,)"), ("--epochs 0", "--epochs 0"),
    ("--layers -1", "--layers -1"), ("--text-to-image 1.5", "--text-to-image 1.5"), ("--dropout 1", "--dropout 1.0"),
    ("--unfreeze --pretrained x", "--unfreeze"), ("--pretrained none", "none/adaptor"), ("--export images", "images"),
    ("--data siim --data-dir none", "none"), ("--data csv --data-dir . --stages segmentation", "masks"),
])  # fmt: skip
def test_bad_options_exit_2_with_the_option_and_the_value(
    towers, csv_set, tmp_path, capsys, monkeypatch, more, named
):
    monkeypatch.chdir(csv_set[0])
    assert named in read_failure(capsys, options(towers, tmp_path, *more.split()), main)
    assert "--export" not in more or not (tmp_path / "run").exists()
