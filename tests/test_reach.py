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

PROMPTS = [
    "edema",
    "there is no evidence of acute cardiomegaly",
    "Small left pleural effusion, with atelectasis.",
]
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
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    if config["text_cfg"].get("hf_tokenizer_name"):
        write_tokenizer(folder)
    built = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if built.pop("custom_text", False) else open_clip.CLIP
    state = randomise(kind(**built)).state_dict()
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def compare_with_open_clip(folder, name):
    """Largest differences (images, texts, pixels) between a folder through retune and through open_clip."""
    import open_clip

    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    encoder = retune.DualEncoder.load(name)
    film = np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8)
    film = np.asarray(
        Image.fromarray(film).resize((400, 300), Image.Resampling.BICUBIC)
    )  # smooth, as films are
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


def test_chexzero_state_dict_is_read_through_open_clip(tmp_path, monkeypatch, no_network):
    open_clip = pytest.importorskip("open_clip")
    from experiments import encoders

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", OPEN_CLIP["ViT-B-32-quickgelu"])
    monkeypatch.setattr(encoders, "CHEXZERO", "small")  # 150 million parameters otherwise
    peer = randomise(open_clip.CLIP(**OPEN_CLIP["ViT-B-32-quickgelu"]))
    torch.save(peer.state_dict(), tmp_path / "best.pt")
    encoder = retune.DualEncoder.load(str(tmp_path))
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert difference(encoder.encode_images(pixels), peer.encode_image(pixels)) <= 1e-4
        assert (
            difference(encoder.encode_texts(PROMPTS), peer.encode_text(open_clip.tokenize(PROMPTS))) <= 1e-4
        )
    grey = encoder.transform(torch.full((1, 80, 80), 150, dtype=torch.uint8))
    torch.testing.assert_close(grey, torch.full((3, 64, 64), (150 - 101.48761) / 83.43944))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biovil_t_equals_hi_ml_on_a_single_image(tmp_path, monkeypatch, no_network):
    for name in (
        "pydicom",
        "SimpleITK",
        "skimage",
        "skimage.io",
    ):  # imported by readers that are not used here
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
    (tmp_path / "vocab.txt").write_text(
        "\n".join(vocabulary + [f"[unused{i}]" for i in range(30522 - len(vocabulary))])
    )
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
    config["text_cfg"] = {
        "hf_model_name": "some/bert",
        "hf_tokenizer_name": "some/bert",
        "hf_proj_type": "linear",
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(retune.InputError, match="tokenizer.json .*https://huggingface.co/some/bert into it"):
        retune.DualEncoder.load(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nedema\n")
    with pytest.raises(
        retune.InputError, match="config.json: download it from https://huggingface.co/some/bert into it"
    ):
        retune.DualEncoder.load(str(tmp_path))
    with pytest.raises(
        retune.InputError, match="https://huggingface.co/owner/gated into a folder .*--encoder-dir"
    ):
        retune.DualEncoder.load("open_clip:owner/gated")


# ------------------------------------------------------------------------------------------------ a run of hospitals


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    """A folder of three hospitals' phantoms with sex, age and view, and the CSV's lines."""
    from demo.hospitals import draw_hospitals

    folder = tmp_path_factory.mktemp("hospitals") / "data"
    table = retune.read_table(draw_hospitals(folder, 150))
    sex = {patient: "FM"[i % 2] for i, patient in enumerate(dict.fromkeys(table["patient"]))}
    table["sex"] = table["patient"].map(sex)
    table["age"] = [str(30 + i % 60) for i in range(len(table))]
    table["split"] = retune.patient_split(table["patient"], {"train": 0.5, "val": 0.2, "test": 0.3})
    table.to_csv(folder / "hospitals.csv", index=False)
    return folder


def configuration(folder, output, **options):
    defaults = {"data": "csv", "data_dir": str(folder), "scenario": "data", "parts": "column", "epochs": 3,
                "cache_dir": str(folder.parent / "cache"), "workers": 0, "device": "cpu"}  # fmt: skip
    return retune.Config(**(defaults | {"output": str(output)} | options))


@pytest.fixture(scope="module")
def finished(hospitals, tmp_path_factory):
    """(folder, metrics) of a run over the hospitals."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, retune.run(configuration(hospitals, folder, threshold="sensitivity=0.95"))


def test_matrix_is_auroc_after_each_part_on_each_parts_test_images(hospitals, finished):
    from sklearn.metrics import roc_auc_score

    from experiments.scores import load_inputs

    folder, metrics = finished
    block = metrics["hospitals"]
    data, encoder, embeddings = load_inputs(metrics["config"])
    bank = retune.embed_prompts(encoder, metrics["config"]["prompt_texts"])
    assert block["parts"] == ["hospital-a", "hospital-b", "hospital-c"]
    part = np.array(data.part)
    for t in (1, 2, 3):
        model = retune.load_model(folder / f"task_{t}.safetensors", retune.Config())[0]
        for u, name in enumerate(block["parts"]):
            rows = np.flatnonzero((part == name) & (data.split == "test"))
            scores, _ = retune.score_rows(model, bank, embeddings, rows, "diff")
            expected = np.mean([roc_auc_score(data.labels[rows, c], scores[:, c]) for c in range(5)])
            assert block["auroc"][t][u] == pytest.approx(expected, abs=1e-12)
    auroc = np.array(block["auroc"])
    assert block["forgetting"][0] == pytest.approx(auroc[1:3, 0].max() - auroc[3, 0])
    assert block["forgetting"][1:] == [pytest.approx(auroc[2, 1] - auroc[3, 1]), None]
    assert (
        "| after hospital-c" in (folder / "table.md").read_text()
        and (folder / "parts.png").stat().st_size > 5000
    )


def test_parts_come_in_the_order_that_is_asked_for(hospitals, tmp_path):
    data = retune.load_radiographs(configuration(hospitals, tmp_path))
    order = ("hospital-c", "hospital-a", "hospital-b")
    tasks = retune.scenario_tasks(configuration(hospitals, tmp_path, part_order=order), data)
    assert [task.name for task in tasks] == list(order)
    for task in tasks:
        assert {data.part[row] for row in task.rows} == {task.name}
    assert sorted(row for task in tasks for row in task.rows) == data.where("train").tolist()
    with pytest.raises(retune.InputError, match="--part-order hospital-a .*each part once"):
        retune.scenario_tasks(configuration(hospitals, tmp_path, part_order=("hospital-a",)), data)
    with pytest.raises(retune.InputError, match="needs --scenario data"):
        retune.scenario_tasks(configuration(hospitals, tmp_path, scenario="class"), data)


def test_parts_share_no_patient(hospitals, tmp_path):
    data = retune.load_radiographs(configuration(hospitals, tmp_path))
    data.patients[200] = data.patients[3]
    with pytest.raises(
        retune.InputError, match=r"hospitals.csv row 202: patient hospital-a.*parts share no patient"
    ):
        retune.scenario_tasks(configuration(hospitals, tmp_path), data)


# ------------------------------------------------------------------------------------------------ decisions


def test_thresholds_follow_their_rules():
    from experiments.decisions import choose_threshold

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300).astype(float)
    probabilities = np.round(np.clip(0.3 * labels + generator.random(300) * 0.7, 0, 1), 2)  # with ties
    cuts = np.unique(probabilities)

    def rates(threshold):
        present = probabilities >= threshold
        precision = labels[present].mean() if present.any() else 0
        return present[labels == 1].mean(), (~present)[labels == 0].mean(), precision

    youden = rates(choose_threshold(probabilities, labels, "youden"))
    assert youden[0] + youden[1] == pytest.approx(max(sum(rates(cut)[:2]) for cut in cuts))
    recall, _, precision = rates(choose_threshold(probabilities, labels, "f1"))
    scores = [2 * p * r / (p + r) for r, _, p in map(rates, cuts)]
    assert 2 * precision * recall / (precision + recall) == pytest.approx(max(scores))
    reached = choose_threshold(probabilities, labels, "sensitivity=0.95")
    assert rates(reached)[0] >= 0.95 > rates(cuts[cuts > reached][1])[0]


def test_temperature_minimises_cross_entropy():
    from experiments.decisions import fit_decision

    logits = np.random.default_rng(0).normal(size=4000)
    labels = (np.random.default_rng(1).random(4000) < 1 / (1 + np.exp(-logits / 0.4))).astype(float)
    labels[::7] = np.nan
    assert fit_decision(logits, labels, "youden")[0] == pytest.approx(0.4, rel=0.1)
    assert fit_decision(logits, np.ones(4000), "youden") == (None, None)


def test_thresholds_never_see_the_test_labels(hospitals, finished, tmp_path):
    def poisoned(config):
        data = retune.load_radiographs(config)
        test = data.where("test")
        data.labels[test] = 1 - data.labels[test]
        return data

    config = configuration(hospitals, tmp_path / "poisoned", threshold="sensitivity=0.95", figures=False)
    theirs = retune.run(config, load_data=poisoned)["decisions"]
    ours = finished[1]["decisions"]
    assert all(theirs[key] == ours[key] for key in ("rule", "temperature", "threshold", "val"))
    assert theirs["test"] != ours["test"]


def test_decisions_are_saved_and_measured(hospitals, finished):
    folder, metrics = finished
    block = metrics["decisions"]
    known = retune.load_tensors(folder / "adaptors.safetensors")[1]
    assert known["decisions"] == {key: block[key] for key in ("rule", "temperature", "threshold")}
    table = retune.read_table(hospitals / "hospitals.csv")
    test = table[table["split"] == "test"]
    files = [str(hospitals / path) for path in test["path"]]
    predictions = retune.predict(files, folder, retune.Config())
    for name in metrics["classes"]:
        present = np.array([p["findings"][name]["decision"] for p in predictions])
        label = test[name].to_numpy() == "1"
        found = block["test"][name]
        assert found["sensitivity"] == pytest.approx(
            present[label].mean(), abs=0.03
        )  # one image near the threshold
        assert found["specificity"] == pytest.approx((~present)[~label].mean(), abs=0.03)
        low, high = found["sensitivity_ci"]
        assert low <= found["sensitivity"] <= high and block["val"][name]["sensitivity"] >= 0.95


def test_predict_takes_folders_and_csvs_and_writes_csv(hospitals, finished, tmp_path, capsys):
    folder, _ = finished
    assert retune.main(["--predict", str(hospitals / "hospitals.csv"), "--run", str(folder), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert len(predictions) == 450 and {"score", "present", "probability", "decision"} == set(
        predictions[0]["findings"]["Edema"]
    )
    for i in range(3):
        (tmp_path / f"in/{i}").mkdir(parents=True)
        os.link(hospitals / f"hospital-a/0000{i}.png", tmp_path / f"in/{i}/x.PNG")
    output = tmp_path / "scores.csv"
    command = ["--predict", str(tmp_path / "in"), "--run", str(folder), "--output", str(output)]
    assert retune.main(command) == 0
    table = retune.read_table(output, ["image", "Edema probability", "Edema decision", "Edema score"])
    assert len(table) == 3
    assert float(table["Edema probability"].iloc[1]) == predictions[1]["findings"]["Edema"]["probability"]


# ------------------------------------------------------------------------------------------------ subgroups


def test_subgroups_equal_measures_of_the_groups_alone(hospitals, finished, capsys):
    from sklearn.metrics import roc_auc_score

    from experiments import subgroups
    from experiments.scores import load_run

    folder, metrics = finished
    assert retune.main([str(folder)], subgroups.execute) == 0
    assert "| sex: F" in capsys.readouterr().out
    import pandas

    table = pandas.read_csv(folder / "subgroups.csv").set_index(["by", "group", "measure", "finding"])[
        "value"
    ]
    _, data, embeddings, bank, model = load_run(folder)
    test = data.where("test")
    logits = subgroups.logits_of(model, bank, embeddings, test)
    values = {}
    for sex in "FM":
        mine = np.array(data.sex)[test] == sex
        aurocs = [roc_auc_score(data.labels[test][mine, c], logits[mine, c]) for c in range(5)]
        values[sex] = np.mean(aurocs)
        assert table["sex", sex, "AUROC", "mean"] == pytest.approx(values[sex], abs=1e-6)
        cut = metrics["decisions"]["threshold"]["Edema"]
        present = 1 / (1 + np.exp(-logits[:, 3] / metrics["decisions"]["temperature"]["Edema"])) >= cut
        expected = present[mine & (data.labels[test][:, 3] == 1)].mean()
        assert table["sex", sex, "sensitivity", "Edema"] == pytest.approx(expected, abs=1e-6)
    assert table["sex", "gap", "AUROC", "mean"] == pytest.approx(abs(values["F"] - values["M"]), abs=1e-6)
    assert (folder / "subgroups.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------ export


def test_onnx_file_equals_predict_and_holds_the_adaptors_alone(hospitals, finished, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, metrics = finished
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/adaptors.safetensors").write_bytes((folder / "adaptors.safetensors").read_bytes())
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for run, file in zip((folder, tmp_path / "alone"), files):
        assert retune.main(["--export", str(file), "--run", str(run)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()  # made without anything else of the run
    held = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(files[0]).graph.initializer)
    image, text = (
        sum(p.numel() for p in part.parameters())
        for part in (retune.DualEncoder.load("tiny").image, retune.Adaptor(128))
    )
    assert held < image + text + 10 * 128 + 5000  # the image tower, one adaptor, ten vectors, small change
    assert not any(patient.encode() in files[0].read_bytes() for patient in ("hospital-a", "hospitals.csv"))
    session = onnxruntime.InferenceSession(files[0])
    images = [str(hospitals / f"hospital-b/0000{i}.png") for i in range(7)]
    pixels = np.stack([np.asarray(Image.open(image).convert("RGB")) for image in images])
    probability, decision = session.run(None, {"pixels": pixels})
    for row, found in enumerate(retune.predict(images, folder, retune.Config())):
        for c, name in enumerate(metrics["classes"]):
            assert probability[row, c] == pytest.approx(found["findings"][name]["probability"], abs=1e-4)
    assert session.run(None, {"pixels": pixels[:1]})[0] == pytest.approx(probability[:1], abs=1e-6)
    assert decision.dtype == bool and decision.shape == (7, 5)


# ------------------------------------------------------------------------------------------------ heat maps, DICOM

SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "image_size": 48, "patch_size": 16}  # fmt: skip
TOWERS = {
    "tiny": None,
    "biovil": retune.BIOVIL["image"] | {"model": {"name": "resnet50", "node": "layer4"}},
    "cls": {"model": {"model_type": "vit"} | SMALL_VIT, "pool": "cls", "head": [retune.linear(32, 8)]},
    "clip": {
        "model": {"model_type": "clip_vision_model"} | SMALL_VIT,
        "pool": "pooler",
        "head": [retune.linear(32, 8)],
    },
}


@pytest.mark.parametrize("name", TOWERS)
def test_positions_go_through_the_embeddings_own_head(name):
    from experiments.heatmaps import embed_positions

    encoder = retune.DualEncoder.load("tiny")
    if TOWERS[name]:
        encoder.config = encoder.config | {"image": TOWERS[name]}
        encoder.image = randomise(retune.Tower(TOWERS[name]))
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    positions, size = embed_positions(encoder, pixels)
    pooled = positions.mean(1) if name in ("tiny", "biovil") else positions[:, 0]  # a mean, or the CLS token
    torch.testing.assert_close(pooled, encoder.encode_images(pixels), rtol=1e-4, atol=1e-5)
    assert positions.shape[1] - size[0] * size[1] == (name in ("cls", "clip"))


def test_heatmaps_are_drawn_or_refused_with_a_reason(hospitals, finished, tmp_path):
    from experiments.heatmaps import similarity_maps

    image = str(hospitals / "hospital-a/00000.png")
    command = ["--predict", image, "--run", str(finished[0]), "--heatmap", str(tmp_path / "maps")]
    assert retune.main(command) == 0
    assert (tmp_path / "maps/0000-00000.png").stat().st_size > 10_000
    encoder = retune.DualEncoder.load("tiny")
    bank = retune.embed_prompts(encoder, retune.load_prompts(retune.HERE / "prompts.json", ["Edema"]))
    encoder.image.pool = "pooler"
    with pytest.raises(retune.InputError, match="--heatmap: tiny pools its map by a layer of its own"):
        similarity_maps(encoder, retune.RETune(128), bank, torch.zeros(3, 64, 64))


def write_dicom(path, pixels, **fields):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
    dataset.PhotometricInterpretation = fields.pop("photometric", "MONOCHROME2")
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def lookup_table(pydicom):
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [4096, 0, 16]
    lut.LUTData = (np.sqrt(np.arange(4096) / 4095) * 4095).astype("<u2").tobytes()
    lut["LUTData"].VR = "OW"
    return pydicom.Sequence([lut])


@pytest.mark.parametrize("kind", ["window", "lut", "plain"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_is_read_as_pydicom_defines_it(tmp_path, kind, photometric):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    pixels = np.random.default_rng(0).integers(0, 4096, (40, 30))
    fields = {"window": {"WindowCenter": 900, "WindowWidth": 800, "RescaleSlope": 0.5, "RescaleIntercept": 100},
              "lut": {"VOILUTSequence": lookup_table(pydicom)}, "plain": {}}[kind]  # fmt: skip
    dataset = write_dicom(tmp_path / "film.dcm", pixels, photometric=photometric, **fields)
    values = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(float)
    if kind == "window":  # PS3.3, C.11.2.1.2.1, by hand
        by_hand = np.clip((0.5 * pixels + 100 - 899.5) / 799 + 0.5, 0, 1)
        np.testing.assert_allclose((values - values.min()) / np.ptp(values), by_hand, atol=1e-9)
    values = -values if photometric == "MONOCHROME1" else values
    expected = (values - values.min()) / np.ptp(values) * 255
    found = retune.read_image(tmp_path / "film.dcm")
    assert found.dtype == torch.uint8 and found.shape == (1, 40, 30)
    assert np.abs(found[0].numpy() - expected).max() <= 0.51


def test_dicom_of_several_frames_is_refused(tmp_path):
    write_dicom(tmp_path / "cine.dcm", np.zeros((3, 8, 8)), NumberOfFrames=3)
    with pytest.raises(retune.InputError, match="cine.dcm.*3 frames .*one grey frame is read"):
        retune.read_image(tmp_path / "cine.dcm")
