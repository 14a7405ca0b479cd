"""Encoders of open_clip and BioViL-T, hospitals as parts, decisions, subgroups, export, heat maps."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

import retune
from demo.hospitals import draw_hospitals
from experiments import decisions, deploy, subgroups, sweep
from experiments.decisions import logits_of
from experiments.runs import load_run
from tests.conftest import read_failure, write_rows
from tests.test_encoders import difference, peers_of_biovil, randomise, write_vocabulary

pytestmark = pytest.mark.usefixtures("no_network")
PROMPTS = ["edema", "no evidence of acute cardiomegaly", "Small left pleural effusion, with atelectasis."]
SMALL = {"width": 64, "layers": 2}
OPEN_CLIP = {  # the options of each architecture, with few layers; the full ones are open_clip's own configs
    "ViT-B-32-quickgelu": {
        "embed_dim": 32, "quick_gelu": True, "vision_cfg": {"image_size": 64, "patch_size": 32, **SMALL},
        "text_cfg": {"vocab_size": 49408, "heads": 1, **SMALL},
    },
    "ViT-L-14": {
        "embed_dim": 32, "custom_text": True, "vision_cfg": {"image_size": 56, "patch_size": 14, **SMALL},
        "text_cfg": {"vocab_size": 49408, "heads": 2, "proj_bias": True, **SMALL},
    },
    "ViT-B-16-SigLIP": {
        "embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map",
                       "timm_proj": "none"},
        "text_cfg": {"context_length": 64, "vocab_size": 600, "no_causal_mask": True, "heads": 2,
                     "hf_tokenizer_name": "owner/t5", "tokenizer_kwargs": {"clean": "canonicalize"},
                     "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, **SMALL},
    },
}  # fmt: skip


def write_open_clip(folder, config, **preprocess):
    """A folder as open_clip publishes it, with random weights."""
    import open_clip

    published = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(published))
    if config["text_cfg"].get("hf_tokenizer_name"):
        write_vocabulary(folder, 600)
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    built = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if built.pop("custom_text", False) else open_clip.CLIP
    state = randomise(kind(**built)).state_dict()
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_folder_gives_open_clips_embeddings(name, tmp_path):
    """RETUNE_FULL_SIZE=1 takes the published architectures whole: two minutes and several GB."""
    open_clip = pytest.importorskip("open_clip")
    config = OPEN_CLIP[name]
    if os.environ.get("RETUNE_FULL_SIZE"):
        config = open_clip.get_model_config(name) | ({"custom_text": True} if name == "ViT-L-14" else {})
    squash = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_open_clip(tmp_path, config, **(squash if "SigLIP" in name else {}))
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(PROMPTS)
    encoder = retune.DualEncoder.load(f"open_clip:{tmp_path}")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8))
    film = noise.resize((400, 300), Image.Resampling.BICUBIC)  # smooth, as films are
    theirs = preprocess(film)[None]
    with torch.inference_mode():
        assert difference(encoder.encode_images(theirs), peer.eval().encode_image(theirs)) <= 1e-4
        assert difference(encoder.encode_texts(PROMPTS), peer.encode_text(tokens)) <= 1e-4
    ours = encoder.transform(torch.from_numpy(np.array(film))[None])
    assert difference(ours, theirs[0]) <= 0.02  # one grey level of 255
    with pytest.raises(retune.InputError, match="tokens, the encoder reads"):
        retune.DualEncoder.load(str(tmp_path)).encode_texts(["edema " * 200])
    with pytest.raises(retune.InputError, match="leave --crop out"):
        retune.DualEncoder.load(str(tmp_path), crop=64)


def test_chexzero_state_dict_is_read_through_open_clip(tmp_path, monkeypatch):
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
        texts = peer.encode_text(open_clip.tokenize(PROMPTS))
        assert difference(encoder.encode_texts(PROMPTS), texts) <= 1e-4
    grey = encoder.transform(torch.full((1, 80, 80), 150, dtype=torch.uint8))
    torch.testing.assert_close(grey, torch.full((3, 64, 64), (150 - 101.48761) / 83.43944))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biovil_t_equals_hi_ml_on_a_single_image(tmp_path, monkeypatch):
    ImageModel, text = peers_of_biovil(monkeypatch)
    image = randomise(ImageModel("resnet50_multi_image", 128))
    text = randomise(text)
    torch.save(image.state_dict(), tmp_path / "biovil_t_image_model_proj_size_128.pt")
    torch.save(text.state_dict(), tmp_path / "pytorch_model.bin")
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cxr-bert"}))
    encoder = retune.DualEncoder.load("biovil-t", tmp_path)
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenizer([prompt.rstrip(".") for prompt in PROMPTS], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = text.get_projected_text_embeddings(tokens["input_ids"], tokens["attention_mask"], False)
        assert difference(encoder.encode_images(pixels), image(pixels).projected_global_embedding) <= 1e-4
        assert difference(encoder.encode_texts(PROMPTS), expected) <= 1e-4
    assert encoder.config["transform"]["crop"] == 448
    encoder.save(tmp_path / "converted")
    assert retune.DualEncoder.load(str(tmp_path / "converted")).fingerprint() == encoder.fingerprint()


def test_what_an_encoder_folder_lacks_is_named_with_its_source(tmp_path):
    pytest.importorskip("open_clip")
    text = {"hf_model_name": "some/bert", "hf_tokenizer_name": "some/bert"}
    config = OPEN_CLIP["ViT-L-14"] | {"text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    source = "https://huggingface.co/some/bert into it"
    with pytest.raises(retune.InputError, match=f"no tokenizer: download tokenizer.json .*{source}"):
        retune.DualEncoder.load(str(tmp_path))
    write_vocabulary(tmp_path, 600)
    with pytest.raises(retune.InputError, match=f"no config.json: download it from {source}"):
        retune.DualEncoder.load(str(tmp_path))
    where = "https://huggingface.co/owner/gated .*; --encoder-dir FOLDER"
    with pytest.raises(retune.InputError, match=f"get .* at {where}"):
        retune.DualEncoder.load("open_clip:owner/gated")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    """A folder of three hospitals' phantoms, with the patients' sex and an age in the CSV."""
    folder = tmp_path_factory.mktemp("hospitals") / "data"
    table = retune.read_table(draw_hospitals(folder, 150))
    table["sex"] = ["FM"[int(patient[-1]) % 2] for patient in table["patient"].tolist()]
    table["age"] = [f"0{30 + i % 60}Y" for i in range(len(table))]
    table["split"] = retune.patient_split(table["patient"], {"train": 0.5, "val": 0.2, "test": 0.3})
    table.to_csv(folder / "hospitals.csv", index=False)
    return folder


def configure(folder, output, **options):
    settings = {"data": "csv", "data_dir": str(folder), "scenario": "data", "parts": "column", "epochs": 3,
                "threshold": "sensitivity=0.95", "cache_dir": str(folder.parent / "cache"), "workers": 0,
                "output": str(output), "device": "cpu"}  # fmt: skip
    return retune.Config(**(settings | options))


@pytest.fixture(scope="module")
def finished(hospitals, tmp_path_factory):
    """(folder, metrics) of a run over the hospitals."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, retune.run(configure(hospitals, folder))


def test_matrix_is_auroc_after_each_part_on_each_parts_test_images(finished):
    folder, metrics = finished
    block = metrics["hospitals"]
    _, data, embeddings, bank, _ = load_run(folder)
    assert block["parts"] == ["hospital-a", "hospital-b", "hospital-c"]
    auroc = np.array(block["auroc"])
    for t, u in np.ndindex(3, 3):
        model = retune.load_model(folder / f"task_{t + 1}.safetensors", retune.Config())[0]
        rows = np.flatnonzero((np.array(data.part) == block["parts"][u]) & (data.split == "test"))
        scores, _ = retune.score_rows(model, bank, embeddings, rows, "diff")
        expected = roc_auc_score(data.labels[rows], scores)
        assert auroc[t + 1, u] == pytest.approx(expected, abs=1e-12)
    drops = [auroc[1:3, 0].max() - auroc[3, 0], auroc[2, 1] - auroc[3, 1]]
    assert block["forgetting"] == [*map(pytest.approx, drops), None]
    assert "| after hospital-c" in (folder / "table.md").read_text()
    assert (folder / "parts.png").stat().st_size > 5000


def test_parts_come_in_the_order_that_is_asked_for_and_share_no_patient(hospitals, tmp_path):
    data = retune.load_radiographs(configure(hospitals, tmp_path))
    order = ("hospital-c", "hospital-a", "hospital-b")
    tasks = retune.scenario_tasks(configure(hospitals, tmp_path, part_order=order), data)
    assert [task.name for task in tasks] == list(order)
    assert all({data.part[row] for row in task.rows} == {task.name} for task in tasks)
    assert sorted(row for task in tasks for row in task.rows) == data.where("train").tolist()
    with pytest.raises(retune.InputError, match="--part-order hospital-c .*each part once"):
        retune.scenario_tasks(configure(hospitals, tmp_path, part_order=order[:1]), data)
    with pytest.raises(retune.InputError, match="needs --scenario data"):
        retune.scenario_tasks(configure(hospitals, tmp_path, scenario="class"), data)
    whole = retune.data_fingerprint(data)
    assert whole == retune.data_fingerprint(dataclasses.replace(data, part=list(data.part)))
    assert whole != retune.data_fingerprint(dataclasses.replace(data, part=list(data.part)[::-1]))
    data.patients[200] = data.patients[3]
    with pytest.raises(retune.InputError, match=r"csv row 202: patient hospital-a-.*parts share no patient"):
        retune.scenario_tasks(configure(hospitals, tmp_path), data)


def test_thresholds_follow_their_rules():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300).astype(float)
    probabilities = np.round(0.3 * labels + 0.7 * generator.random(300), 2)  # with ties
    cuts = np.unique(probabilities)

    def rates(rule):
        fitted = isinstance(rule, str)
        threshold = decisions.choose_threshold(probabilities, labels, rule) if fitted else rule
        present = probabilities >= threshold
        return present[labels == 1].mean(), (~present)[labels == 0].mean(), labels[present].mean(), threshold

    assert sum(rates("youden")[:2]) == pytest.approx(max(sum(rates(cut)[:2]) for cut in cuts))
    f1 = [2 * p * r / (p + r) for r, _, p, _ in map(rates, ["f1", *cuts])]
    assert f1[0] == pytest.approx(max(f1))
    reached, _, _, threshold = rates("sensitivity=0.95")
    assert reached >= 0.95 > rates(cuts[cuts > threshold][1])[0]
    assert decisions.fit_decision(probabilities, np.ones(300), "youden") == (None, None)
    found = {"Edema": {}}  # below the threshold, and at it if rounded first
    decisions.add_decisions(found, [1.0], {"temperature": {"Edema": 1.0}, "threshold": {"Edema": 0.7310588}})
    assert found == {"Edema": {"probability": 0.731059, "decision": False}}


def test_thresholds_never_see_the_test_labels(hospitals, finished, tmp_path):
    def poison(config):
        data = retune.load_radiographs(config)
        data.labels[data.where("test")] = 1 - data.labels[data.where("test")]
        return data

    config = configure(hospitals, tmp_path / "poisoned", figures=False)
    theirs = retune.run(config, load_data=poison)["decisions"]
    ours = finished[1]["decisions"]
    assert all(theirs[key] == ours[key] for key in ("rule", "temperature", "threshold", "val"))
    assert theirs["test"] != ours["test"]


def test_decisions_are_saved_printed_and_measured(hospitals, finished, tmp_path, capsys):
    folder, metrics = finished
    block = metrics["decisions"]
    assert retune.load_tensors(folder / "adaptors.safetensors")[1]["decisions"] == block
    files = ["--output", str(tmp_path / "new/scores.csv"), "--json"]
    assert retune.main(["--predict", str(hospitals / "hospitals.csv"), "--run", str(folder), *files]) == 0
    predictions = json.loads(capsys.readouterr().out.rpartition("written to")[0])
    assert set(predictions[0]["findings"]["Edema"]) == {"score", "present", "probability", "decision"}
    table = retune.read_table(hospitals / "hospitals.csv")
    written = pd.read_csv(tmp_path / "new/scores.csv")
    for name in metrics["classes"]:
        present = np.array([p["findings"][name]["decision"] for p in predictions])
        assert present.tolist() == (written[f"{name} decision"] == 1).tolist()
        found = block["test"][name]
        for measure, value in (("sensitivity", True), ("specificity", False)):
            of = (table["split"] == "test") & ((table[name] == "1") == value)
            assert found[measure] == pytest.approx((present[of] == value).mean(), abs=0.03)  # one at the edge
        low, high = found["sensitivity_ci"]
        assert low <= found["sensitivity"] <= high and block["val"][name]["sensitivity"] >= 0.95


def test_images_of_folders_and_below_are_found(tmp_path):
    for path in ("b/x.PNG", "a.dcm", "notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c").symlink_to(tmp_path / "b")
    found = [f"{tmp_path}/a.dcm", f"{tmp_path}/b/x.PNG", f"{tmp_path}/linked/c/x.PNG", "c.png"]
    assert retune.list_images([str(tmp_path), "c.png"]) == found
    (tmp_path / "images.csv").write_text("path,age\nb/x.PNG,50\n,60\n")
    with pytest.raises(retune.InputError, match="images.csv row 3: path '' is blank"):
        retune.list_images([str(tmp_path / "images.csv")])
    with pytest.raises(retune.InputError, match="empty: no images"):
        (tmp_path / "empty").mkdir()
        retune.list_images([str(tmp_path / "empty")])


def test_subgroups_equal_measures_of_the_groups_alone(finished, capsys):
    folder, metrics = finished
    assert retune.main([str(folder)], subgroups.execute) == 0
    assert "| age: 60 to 79" in capsys.readouterr().out and (folder / "subgroups.png").stat().st_size > 5000
    table = pd.read_csv(folder / "subgroups.csv").set_index(["by", "group", "measure", "finding"])["value"]
    _, data, embeddings, bank, model = load_run(folder)
    test = data.where("test")
    logits = logits_of(model, bank, embeddings, test)
    chosen = {key: metrics["decisions"][key]["Edema"] for key in ("temperature", "threshold")}
    present = 1 / (1 + np.exp(-logits[:, 3] / chosen["temperature"])) >= chosen["threshold"]
    labels = data.labels[test]
    values = []
    for sex in "FM":
        mine = np.array(data.sex)[test] == sex
        values.append(roc_auc_score(labels[mine], logits[mine]))
        assert table["sex", sex, "AUROC", "mean"] == pytest.approx(values[-1], abs=1e-6)
        expected = present[mine & (labels[:, 3] == 1)].mean()
        assert table["sex", sex, "sensitivity", "Edema"] == pytest.approx(expected, abs=1e-6)
    assert table["sex", "gap", "AUROC", "mean"] == pytest.approx(abs(values[0] - values[1]), abs=1e-6)


def test_a_measure_without_a_gap_keeps_its_column(finished, monkeypatch, capsys):
    settings, data, *rest = load_run(finished[0])
    labels = np.where((np.array(data.sex) == "M")[:, None], 1, data.labels)
    data = dataclasses.replace(data, labels=labels, view=None, age=None, part=None)
    monkeypatch.setattr(subgroups, "load_run", lambda _: (settings, data, *rest))
    assert retune.main([str(finished[0])], subgroups.execute) == 0
    said = capsys.readouterr()
    gap = re.search(r"sex: gap.*", said.out)[0].split("|")[2:-1]
    assert [len(cell.strip()) > 1 for cell in gap] == [False, True, False]  # men have no negatives
    assert "warning: Edema: known labels" in said.err and "0: known" not in said.err


def test_ages_have_units():
    ages = ["58", "058Y", "41 Y", "480M", "479M", "060M", "099W", "090D", ""]
    bands = [*["40 to 59"] * 4, *["under 40"] * 4, ""]
    assert subgroups.group_names(ages, "age").tolist() == bands


def test_a_run_is_loaded_with_the_data_and_the_encoder_that_it_had(csv_set, tmp_path, capsys):
    root, rows, arguments = csv_set
    (root / rows[3]["path"]).write_bytes(b"")
    arguments += ["--skip-bad-images", "--cache-dir", str(tmp_path / "cache")]
    assert retune.main(arguments) == 0
    assert load_run(tmp_path / "run")[1].where("unreadable").tolist() == [3]
    assert retune.main(["--grid", "seed=27", "--", *arguments], sweep.sweep) == 0
    assert "finished before" in capsys.readouterr().out
    config = retune.read_json(tmp_path / "run/config.json")
    rows[0]["Edema"] = "1"
    other = {"labels_csv": str(write_rows(tmp_path / "other.csv", rows))}
    for change, named in ((other, "data"), ({"encoder": "tiny"}, "encoder, embeddings")):
        retune.write_json(tmp_path / "run/config.json", config | change)
        with pytest.raises(retune.InputError, match=f"run: changed since the run: {named};"):
            load_run(tmp_path / "run")


@pytest.mark.slow
def test_onnx_file_equals_predict_and_holds_the_adaptors_alone(hospitals, finished, tmp_path):
    onnx = pytest.importorskip("onnx")
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder, _ = finished
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/adaptors.safetensors").write_bytes((folder / "adaptors.safetensors").read_bytes())
    files = [tmp_path / "new/a.onnx", tmp_path / "new/b.onnx"]
    for run, file in zip((folder, tmp_path / "alone"), files):
        assert retune.main(["--export", str(file), "--run", str(run)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()  # made without anything else of the run
    held = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(files[0]).graph.initializer)
    parts = (retune.DualEncoder.load("tiny").image, retune.Adaptor(128))
    assert held < sum(p.numel() for part in parts for p in part.parameters()) + 10 * 128 + 5000
    images = [str(hospitals / f"hospital-b/0000{i}.png") for i in range(7)]
    script = re.search(r"```python\n(.*?)```", (retune.HERE / "docs/deploy.md").read_text(), re.DOTALL)[1]
    command = [sys.executable, "-c", script, str(files[0]), *images]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, found in zip(lines, retune.predict(images, folder, retune.Config()), strict=True):
        for name, values in found["findings"].items():
            probability, decision = re.search(rf"'{name}', ([\d.]+), (\w+)", line).groups()
            assert float(probability) == pytest.approx(values["probability"], abs=1e-4)
            assert decision == str(values["decision"])


@pytest.mark.slow
def test_onnx_needs_no_solve_and_what_it_lacks_is_one_line(hospitals, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    options = {"method": "ranpac", "set": ("features=20", "zero_shot=1"), "whiten": True, "figures": False}
    retune.run(configure(hospitals, tmp_path / "run", **options))
    command = ["--export", tmp_path / "a.onnx", "--run", tmp_path / "run"]
    assert retune.main([*map(str, command)]) == 0
    monkeypatch.setattr(deploy, "SolvedBank", lambda bank, _: bank)
    assert "--export: RanPAC cannot be written as ONNX (" in read_failure(capsys, command)


CARDS = {  # options, what the card calls the method, the settings that it used
    "retune": ({}, "RE-tune", "seed 27, adaptor mlp, adapt both, lr 0.001, batch_size 64, epochs 3"),
    "linear": ({"whiten": True}, "linear head, whitened", "seed 27, lr 0.001, batch_size 64, epochs 3"),
    "joint": ({}, "MLP head, all data", "seed 27, lr 0.001, batch_size 64"),
    "ncm": ({}, "NCM", "seed 27"),
    "lwf": ({"scenario": "zero", "parts": None, "whiten": True}, "zero-shot", "seed 27"),
}


@pytest.mark.parametrize("method", CARDS)
def test_model_card_is_true_of_its_run_and_has_no_blank(hospitals, tmp_path, method):
    options, name, settings = CARDS[method]
    retune.run(configure(hospitals, tmp_path, method=method, figures=False, **options))
    assert retune.main(["--export-card", "--run", str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "table.md").read_text().strip() in card and card.startswith("---\nlicense: other")
    assert "{" not in card and f"| method | {name} |\n| settings | {settings} |\n" in card


SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "image_size": 48, "patch_size": 16}  # fmt: skip
HEAD = [retune.linear(32, 8)]
TOWERS = {
    "tiny": retune.read_json(retune.HERE / "demo/tiny/config.json")["image"],
    "biovil": retune.BIOVIL["image"],
    "cls": {"model": {"model_type": "vit"} | SMALL_VIT, "pool": "cls", "head": HEAD},
    "clip": {"model": {"model_type": "clip_vision_model"} | SMALL_VIT, "pool": "pooler", "head": HEAD},
}


@pytest.mark.parametrize("name", TOWERS)
def test_positions_go_through_the_embeddings_own_head(name):
    tower = randomise(retune.Tower(TOWERS[name]))
    encoder = types.SimpleNamespace(image=tower, config={"name": name, "image": TOWERS[name]})
    side = 96 if name in ("tiny", "biovil") else 48
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        positions, size = deploy.embed_positions(encoder, pixels)
        # a mean, or the CLS token
        pooled = positions.mean(1) if name in ("tiny", "biovil") else positions[:, 0]
        torch.testing.assert_close(pooled, tower(pixels), rtol=1e-4, atol=1e-5)
    assert positions.shape[1] - size[0] * size[1] == (name in ("cls", "clip"))


def test_heatmaps_are_drawn_or_refused_with_a_reason(hospitals, finished, tmp_path, capsys):
    for option in (["--heatmap", "maps"], ["--json"]):
        with pytest.raises(SystemExit):
            retune.main(option)
        assert "go with --predict" in capsys.readouterr().err
    image = str(hospitals / "hospital-a/00000.png")
    command = ["--predict", image, "--run", str(finished[0]), "--heatmap", str(tmp_path / "new/maps")]
    assert retune.main(command) == 0
    assert (tmp_path / "new/maps/0000-00000.png").stat().st_size > 10_000
    encoder = retune.DualEncoder.load("tiny")
    bank = retune.PromptBank(torch.randn(4, encoder.dim), torch.arange(4))
    model = retune.RETune(encoder.dim, adapt="none", negatives=False)
    before, after = deploy.similarity_maps(encoder, model, bank, torch.rand(3, 64, 64)).values()
    torch.testing.assert_close(before, after)  # both are cos+ alone
    encoder.image.pool = "pooler"
    with pytest.raises(retune.InputError, match="--heatmap: tiny pools its map by a layer of its own"):
        deploy.embed_positions(encoder, torch.zeros(1, 3, 64, 64))
