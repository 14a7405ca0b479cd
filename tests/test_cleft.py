"""CLEFT: formulas against plain versions, pieces and ranks against one process, loaders, refusals, runs."""

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import phantoms
import pytest
import torch
import torch.nn.functional as F
import towers

import cleft
import retune
from cleft import Cleft, Config, settle
from retune import DualEncoder, InputError

CAPTIONS = [
    "no edema",
    "there is a large left pleural effusion",
    "cardiomegaly",
    "a normal chest",
    "edema",
    "mass",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small encoder without batch normalisation in our format: ViT images, GPT-2 texts with dropout off."""
    vit = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32, "image_size": 16, "patch_size": 8}  # fmt: skip
    tokenizer = towers.train_tokenizer(CAPTIONS)
    text = towers.SMALL_TEXT | {"vocab_size": len(tokenizer), "n_embd": 16}
    config = {
        "name": "vit", "dim": 8, "image": {"model": vit, "pool": "pre_norm_mean", "head": towers.head(24, 8)},
        "text": {"model": text, "pool": "last", "head": towers.head(16, 8), "context_length": 40},
        "transform": {"resize": 16, "crop": 16, "interpolation": "bilinear", "mean": [0.5] * 3,
                      "std": [0.5] * 3},
    }  # fmt: skip
    target = tmp_path_factory.mktemp("encoder") / "vit"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DualEncoder(config, tokenizer).save(target)
    return target


def settings(folder, **changes):
    base = {"image": str(folder), "text": str(folder), "dim": 8, "batch_size": 12, "steps": 4,
            "prompt_steps": 4, "prompt_lr": 0.1, "lr": 1e-2, "lora_dropout": 0.0, "truncate": True,
            "demo_images": 200, "device": "cpu"}  # fmt: skip
    return settle(Config(**base | changes))


def make_model(folder, **changes):
    config = settings(folder, **changes)
    return Cleft(cleft.build_encoder(config, CAPTIONS), config), config


def inputs(model, n=6):
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [pixels, *model.encoder.tokenize((CAPTIONS * n)[:n]).values()]


# --------------------------------------------------------------------------------------------------- Formulas


def test_contrastive_loss_is_both_cross_entropies():
    images, texts = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1) for _ in range(2))
    cosines = [[float(10 * (a * b).sum()) for b in texts] for a in images]
    plain = 0.0
    for table in (cosines, list(zip(*cosines, strict=True))):
        for i, row in enumerate(table):
            plain += (np.log(np.exp(row).sum()) - row[i]) / len(table)
    assert abs(cleft.contrastive_loss(images, texts, torch.tensor(10.0)).item() - plain) < 1e-6


def test_text_feature_is_the_last_token_whatever_the_padding(folder):
    encoder = DualEncoder.load(str(folder)).double()
    together = encoder.encode_texts(CAPTIONS)  # float32 from double
    for text, row in zip(CAPTIONS, together, strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            hidden = encoder.text.tower(ids)["last_hidden_state"][0, -1]  # [H]
            alone = hidden @ encoder.text.head[0].weight.T
        assert ids[0, -1] == encoder.tokenizer.eos_token_id
        torch.testing.assert_close(row, alone.float(), atol=1e-6, rtol=0)


def test_image_feature_is_the_mean_before_the_last_norm(folder):
    encoder = DualEncoder.load(str(folder)).double()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        hidden = encoder.image.tower(pixels, output_hidden_states=True)["hidden_states"][-1]  # [2, 5, H]
        plain = hidden.mean(1) @ encoder.image.head[0].weight.T
    torch.testing.assert_close(encoder.encode_images(pixels), plain.float(), atol=1e-6, rtol=0)


def test_lora_sits_on_the_attention_and_adds_a_scaled_product(folder):
    model, config = make_model(folder)
    tuned = [name for name, p in model.encoder.text.tower.named_parameters() if p.requires_grad]
    assert len(tuned) == 4 and all(".attn.c_attn.lora_" in name for name in tuned)  # 2 layers x A, B
    frozen = DualEncoder.load(str(folder)).double()
    model.double().eval()
    tokens, generator = model.encoder.tokenize(CAPTIONS), torch.Generator().manual_seed(0)
    torch.testing.assert_close(model.encoder.text(*tokens.values()), frozen.text(*tokens.values()))
    state = dict(model.encoder.text.tower.named_parameters())
    with torch.no_grad():
        for layer, block in enumerate(frozen.text.tower.h):
            prefix = f"base_model.model.h.{layer}.attn.c_attn.lora_"
            state[f"{prefix}B.default.weight"].normal_(generator=generator)
            product = state[f"{prefix}B.default.weight"] @ state[f"{prefix}A.default.weight"]  # [3H, H]
            block.attn.c_attn.weight += (
                config.lora_alpha / config.lora_rank * product.T
            )  # Conv1D stores [H, 3H]
    torch.testing.assert_close(
        model.encoder.text(*tokens.values()), frozen.text(*tokens.values()), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix", "none"])
def test_each_peft_kind_trains_its_own_weights_only(folder, kind):
    model, _ = make_model(folder, peft=kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cleft.contrastive_step(model, [inputs(model)], 0, lambda: torch.autocast("cpu", enabled=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    text = {name for name in moved if name.startswith("encoder.text.tower")}
    assert "log_scale" in moved and any(name.startswith("encoder.image.tower") for name in moved)
    assert text and all(
        p in str(text) for p in ({"lora": ["lora_B"], "ia3": ["ia3_l"], "prefix": ["prompt"]}.get(kind, []))
    )
    assert kind == "none" or all(dict(model.named_parameters())[name].requires_grad for name in text)


def test_captions_name_positives_and_on_request_negatives():
    config = Config()
    row, names = [1, 0, float("nan"), 1], ["edema", "mass", "hernia", "nodule"]
    assert cleft.caption(row, names, config) == "a chest X-ray of a patient with edema, nodule"
    assert cleft.caption([0, 0], names[:2], config) == "a chest X-ray of a patient with no finding"
    negative = dataclasses.replace(config, negative_captions=True)
    assert cleft.caption(row, names, negative) == "a chest X-ray of a patient with edema, nodule, no mass"


def test_learning_rate_rises_then_follows_a_cosine():
    rates = [towers.learning_rate(step, 110, 1.0, 10, 0.1) for step in range(110)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5) and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_batches_are_permutations_of_each_epoch():
    rows = np.arange(100, 111)
    batches = list(cleft.batch_rows(rows, 5, 0, 4, 3))  # two epochs of two batches; one row is left over
    assert all(len(set(np.concatenate(epoch))) == 10 for epoch in (batches[:2], batches[2:]))
    assert not np.array_equal(batches[0], batches[2])
    resumed = list(cleft.batch_rows(rows, 5, 3, 4, 3))  # from the middle of an epoch
    assert len(resumed) == 1 and np.array_equal(resumed[0], batches[3])


def test_context_stands_before_the_class_name(folder):
    model, config = make_model(folder)
    model.eval()
    prompt = cleft.Prompt(model, ["Edema", "Pleural Effusion"], dataclasses.replace(config, context_tokens=7))
    encoder, table = model.encoder, model.encoder.text.tower.get_input_embeddings().weight
    words = encoder.tokenizer(config.base_caption, add_special_tokens=False)["input_ids"]
    assert torch.equal(prompt.context, table[(words * 7)[:7]])
    for name, row in zip(("edema", "pleural effusion"), prompt(), strict=True):
        ids = encoder.tokenizer(name)["input_ids"]  # class name, end token
        whole = torch.cat([prompt.context, table[ids]])[None]
        hidden = encoder.text.tower(inputs_embeds=whole)["last_hidden_state"][0, -1]
        torch.testing.assert_close(row, F.normalize(encoder.text.head(hidden), dim=0), atol=1e-6, rtol=0)


def test_stage_2_trains_the_context_by_plain_binary_cross_entropy(folder, tmp_path):
    model, config = make_model(folder, output=str(tmp_path), prompt_steps=1, batch_size=140)
    model.eval().requires_grad_(False)
    data = retune.load_radiographs(retune.Config(demo_images=200))
    config = dataclasses.replace(config, batch_size=len(data.where("train")))
    embeddings = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    plain = cleft.Prompt(model, data.class_names, config)
    x, y = (
        torch.from_numpy(embeddings[data.where("train")]).double(),
        torch.from_numpy(data.labels[data.where("train")]),
    )
    logits = model.scale.double() * F.normalize(x, dim=1) @ plain().double().T
    loss = -(y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)).mean()
    loss.backward()
    rate = towers.learning_rate(0, 1, config.prompt_lr, 0, config.prompt_lr / 10)
    expected = plain.context - rate * (plain.context.grad + 1e-3 * plain.context)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    tuned = cleft.tune_prompt(model, data, embeddings, config)
    torch.testing.assert_close(tuned.context, expected.detach(), atol=1e-6, rtol=0)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


# -------------------------------------------------------------------------------------- Pieces, ranks, resume


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(folder, **changes):
    """Gradients of the whole batch's loss by one backward pass."""
    model, _ = make_model(folder, **changes)
    loss = cleft.contrastive_loss(*model(*inputs(model, 12)), model.scale)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("pieces", [1, 3])
def test_pieces_leave_loss_and_gradients_as_they_are(folder, pieces):
    expected_loss, expected = plain_gradients(folder)
    model, _ = make_model(folder)
    parts = list(zip(*(tensor.split(12 // pieces) for tensor in inputs(model, 12)), strict=True))
    loss = cleft.contrastive_step(model, parts, 0, lambda: torch.autocast("cpu", enabled=False))
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


RANK = """
import sys, torch, test_cleft, cleft, retune
retune.join_ranks()
torch.set_num_threads(1)
rank, world = retune.ranks()
model, _ = test_cleft.make_model(sys.argv[1])
part = [tensor.chunk(world)[rank] for tensor in test_cleft.inputs(model, 12)]
loss = cleft.contrastive_step(model, [part], 0, lambda: torch.autocast("cpu", enabled=False))
retune.sum_gradients([p for p in model.parameters() if p.grad is not None])
torch.save((loss.item(), test_cleft.gradients(model)), f"{sys.argv[2]}/{rank}.pt")
"""


def test_two_ranks_take_the_step_of_one(folder, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = {"PYTHONPATH": str(Path(cleft.__file__).parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, script, folder, tmp_path], check=True, env=os.environ | here, capture_output=True
    )
    expected_loss, expected = plain_gradients(folder)
    for rank in range(2):
        loss, found = torch.load(tmp_path / f"{rank}.pt")
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    data = retune.load_radiographs(retune.Config(demo_images=200))
    options = {"save_every": 2, "lora_dropout": 0.1, "accumulate": 2}
    whole = cleft.pretrain(settings(folder, output=str(make(tmp_path / "whole")), **options), data)
    broken = settings(folder, output=str(make(tmp_path / "broken")), **options)
    step = cleft.contrastive_step

    def dies(*arguments):
        if (Path(broken.output) / "stage1.pt").exists():
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(cleft, "contrastive_step", dies)
    with pytest.raises(KeyboardInterrupt):
        cleft.pretrain(broken, data)
    monkeypatch.setattr(cleft, "contrastive_step", step)
    resumed = cleft.pretrain(broken, data)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def make(path):
    path.mkdir()
    return path


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"checkpointing": True, "peft": "lora"}])
def test_bf16_and_checkpointing_stay_close_to_plain_training(folder, tmp_path, options):
    data = retune.load_radiographs(retune.Config(demo_images=200))
    plain = cleft.pretrain(settings(folder, output=str(make(tmp_path / "plain"))), data)
    other = cleft.pretrain(settings(folder, output=str(make(tmp_path / "other")), **options), data)
    tolerance = 0.2 if "precision" in options else 1e-5
    for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        assert (a - b).abs().max() < tolerance


# ------------------------------------------------------------------------------------------------- Evaluation


def test_balanced_rows_have_one_finding_each():
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 1], [1, 0], [0, 0], [np.nan, 1]], np.float32)
    n = len(labels)
    data = retune.Radiographs(
        [Path(str(i)) for i in range(n)], labels, ("A", "B"), [str(i) for i in range(n)], ["test"] * n
    )
    rows = cleft.balanced_rows(data, np.arange(n), 200, 0)
    assert set(rows[:2]) == {0, 4} and len(rows) == 4 and set(rows[2:]) <= {2, 3, 6}
    measured = cleft.measure_balanced(np.array([[2.0, 0], [2, 0], [0, 2], [2, 0]], np.float32), data, rows)
    assert measured["accuracy"] == 0.75 and measured["n"] == 4
    with pytest.raises(InputError, match="B as its only finding"):
        cleft.balanced_rows(data, np.array([0, 4]), 2, 0)


def test_every_stage_runs_from_the_command_line(folder, tmp_path, capsys):
    base = ["--image", str(folder), "--text", str(folder), "--dim", "8", "--batch-size", "12", "--steps", "3",
            "--prompt-steps", "3", "--demo-images", "500", "--output", str(tmp_path / "run"),
            "--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--truncate",
            "--finetune-epochs", "1"]  # fmt: skip
    assert cleft.main(["all", *base]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"zero-shot", "zero-shot, learned context", "linear probe", "full fine-tuning"} < set(results)
    assert "linear probe" in (tmp_path / "run" / "evaluation.md").read_text()
    lines = (tmp_path / "run" / "balanced.csv").read_text().splitlines()
    assert lines[0] == "image,class" and len(lines) == 1 + results["balanced, zero-shot"]["n"]
    assert cleft.main(["export", *base, "--to", str(tmp_path / "exported")]) == 0
    exported = DualEncoder.load(str(tmp_path / "exported"))
    config = cleft.settle(retune.build_configs(Config, parse(["all", *base]))[0])
    data = retune.load_radiographs(retune.Config(demo_images=500))
    model = cleft.stage1(config, data)
    with torch.inference_mode():
        tuned = model.encoder.text(*model.encoder.tokenize(CAPTIONS).values())
    torch.testing.assert_close(exported.encode_texts(CAPTIONS), tuned, atol=1e-5, rtol=1e-5)
    assert cleft.main(["evaluate", *base[:-1], "2", "--lr", "0.5"]) == 2
    assert "(lr 4e-05, now 0.5)" in capsys.readouterr().err


def parse(argv):
    parser = retune.build_parser(Config, "")
    parser.add_argument("command")
    return parser.parse_args(argv)


def test_count_gives_the_two_claims():
    table = cleft.count(Config())
    assert "2,621,440" in table and "3.6%" in table and "39.6%" in table
    lora = 32 * 8 * (2560 + 3 * 2560)  # layers x rank x (in + out) of c_attn
    assert lora == 2_621_440


# ---------------------------------------------------------------------------------------------------- Loaders


def write_embed(root):
    header = "empi_anon,acc_anon,anon_dicom_path,ImageLateralityFinal,ViewPosition,FinalImageType"
    exams, rows = [], []
    for i in range(30):
        for side, view in (("L", "CC"), ("R", "MLO")):
            path = f"/mnt/NAS2/mammo/anon_dicom/cohort_1/{i}/{side}.dcm"
            rows.append(f"{100 + i},{i},{path},{side},{view},2D")
        rows.append(f"{100 + i},{i},/mnt/NAS2/mammo/anon_dicom/cohort_1/{i}/C.dcm,L,CC,cview")
        exams += [
            f"{100 + i},{i},L,{'NBAPSMK'[i % 7]},{1 + i % 4}.0",
            f"{100 + i},{i},L,N,{1 + i % 4}.0",
            f"{100 + i},{i},,B,",
        ]
    (root / "EMBED_OpenData_metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    (root / "EMBED_OpenData_clinical.csv").write_text(
        "\n".join(["empi_anon,acc_anon,side,asses,tissueden", *exams]) + "\n"
    )


def test_embed_joins_images_and_exams(tmp_path):
    write_embed(tmp_path)
    data = cleft.load_embed(retune.Config(data="embed", data_dir=str(tmp_path)))
    assert len(data.images) == 60 and len(set(data.patients)) == 30  # synthetic 2D views are left out
    assert data.names[0] == "cohort_1/0/L.dcm" and data.images[0] == tmp_path / "cohort_1/0/L.dcm"
    left, right = data.labels[8], data.labels[9]  # exam 4: S on the left, B on both
    classes = list(data.class_names)
    assert (
        classes[int(left[:7].argmax())] == "BI-RADS 4" and classes[7 + int(left[7:].argmax())] == "Density A"
    )
    assert classes[int(right[:7].argmax())] == "BI-RADS 2" and np.isnan(right[7:]).all()
    assert (
        data.reports[8]
        == "a left CC mammogram with BI-RADS 4, suspicious, breast density almost entirely fatty"
    )
    assert data.reports[9] == "a right MLO mammogram with BI-RADS 2, benign"


# --------------------------------------------------------------------------------------------------- Refusals


def test_rsna_is_a_choice_of_two_classes(folder, tmp_path):
    from torchvision.io import write_png

    root = make(tmp_path / "rsna")
    boxes = ["patientId,x,y,width,height,Target"]
    for i in range(60):
        write_png(torch.full((1, 16, 16), 4 * i, dtype=torch.uint8), str(root / f"p{i}.png"))
        boxes += [f"p{i},1,2,3,4,1", f"p{i},5,5,3,3,1"] if i % 2 else [f"p{i},,,,,0"]
    (root / "stage_2_train_labels.csv").write_text("\n".join(boxes) + "\n")
    base = ["--image", str(folder), "--text", str(folder), "--dim", "8", "--batch-size", "12", "--steps", "2",
            "--prompt-steps", "2", "--data", "rsna", "--data-dir", str(root), "--output", str(tmp_path / "run"),
            "--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--truncate"]  # fmt: skip
    assert cleft.main(["all", *base]) == 0
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(results["zero-shot"]["auroc"]) == {"Pneumonia", "No Finding"}
    assert 0 <= results["balanced, zero-shot"]["accuracy"] <= 1
    labels = np.array([[1], [0], [np.nan]], np.float32)
    data = retune.Radiographs([Path("a"), Path("b"), Path("c")], labels, ("Mass",), list("abc"), ["test"] * 3)
    names = [name.lower() for name in cleft.two_classes(data).class_names]
    config = Config(negative_captions=True)
    told = [cleft.caption(row, names, config) for row in cleft.two_classes(data).labels]
    assert told[0].endswith("with mass") and told[1].endswith("with no finding, no mass")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path, monkeypatch):
    data, step = retune.load_radiographs(retune.Config(demo_images=200)), cleft.contrastive_step
    config = settings(folder, output=str(tmp_path), save_every=1)

    def explodes(model, pieces, seed, autocast):
        loss = step(model, pieces, seed, autocast)
        return loss * math.nan if (tmp_path / "stage1.pt").exists() else loss

    monkeypatch.setattr(cleft, "contrastive_step", explodes)
    with pytest.raises(InputError, match="step 2: the loss is nan"):
        cleft.pretrain(config, data)
    assert torch.load(tmp_path / "stage1.pt")["step"] == 1


def test_a_tokenizer_without_padding_is_refused_with_the_remedy(tmp_path):
    from transformers import GPT2Config, GPT2Model

    GPT2Model(
        GPT2Config(**{k: v for k, v in towers.SMALL_TEXT.items() if k != "model_type"}, vocab_size=1100)
    ).save_pretrained(tmp_path)
    tokenizer = towers.train_tokenizer(CAPTIONS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="--pad-token"):
        towers.text_part(settle(Config(text=str(tmp_path))), CAPTIONS)
    config = settle(Config(image="small", text=str(tmp_path), pad_token="<end>"))
    encoder = cleft.build_encoder(config, CAPTIONS)
    for name, weight in GPT2Model.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(encoder.text.tower.state_dict()[name], weight)


def test_wrong_input_is_named(folder, tmp_path):
    model, config = make_model(folder)
    with pytest.raises(InputError, match="has no tokens"):
        cleft.Prompt(model, [""], config)
    with pytest.raises(InputError, match="the text tower reads 64"):
        cleft.Prompt(model, ["Edema"], dataclasses.replace(config, context_tokens=80))
    with pytest.raises(InputError, match="tokens"):
        model.encoder.tokenize(["edema " * 60])
    with pytest.raises(InputError, match="--peft ia3"):
        cleft.add_peft(torch.nn.Linear(2, 2), dataclasses.replace(config, peft="ia3"))
    with pytest.raises(InputError, match="--captions reports"):
        data = retune.Radiographs([Path("a")], np.ones((1, 1)), ("A",), ["p"], ["train"])
        cleft.captions(data, dataclasses.replace(config, captions="reports"))
    with pytest.raises(InputError, match="--batch-size"):
        next(cleft.batch_rows(np.arange(3), 4, 0, 1, 0))
    with pytest.raises(InputError, match="--lr"):
        Config(lr=-1.0)
    for name, value in {"seed": 2**32, "warmup": math.inf, "weight_decay": math.nan}.items():
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value} must be <"):
            Config(**{name: value})
    for name in ("image", "text"):
        with pytest.raises(InputError, match="no transformers model"):
            cleft.build_encoder(settings(folder, **{name: str(tmp_path / "nothing")}), CAPTIONS)
    with pytest.raises(InputError, match="not finished"):
        cleft.stage1(
            dataclasses.replace(config, output=str(tmp_path)),
            retune.load_radiographs(retune.Config(demo_images=200)),
        )
    (tmp_path / "stage1.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="damaged"):
        cleft.restore(tmp_path / "stage1.pt", model)


@pytest.mark.parametrize("argv", [["export"], ["all", "--to", "elsewhere"]])
def test_export_alone_needs_a_target(argv, capsys):
    assert cleft.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: export needs --to, a new folder")


def test_the_shipped_encoder_is_small_and_knows_its_words():
    tiny = Path(cleft.__file__).parent / "tiny"
    assert sum(file.stat().st_size for file in tiny.iterdir()) < 3e6
    encoder = DualEncoder.load("tiny")
    prompts = retune.load_prompts(Path(cleft.__file__).parent / "prompts.json", ["Edema", "Cardiomegaly"])
    words = {
        word
        for entry in prompts.values()
        for texts in entry.values()
        for text in texts
        for word in text.split()
    }
    assert all(len(encoder.tokenizer(word)["input_ids"]) == 2 for word in words)  # one token and the end
    assert encoder.encode_texts(["edema"]).shape == (1, encoder.dim)


def test_the_shipped_encoder_leaves_the_demo_something_to_learn(tmp_path):
    """Zero-shot like a real encoder on real X-rays (0.60 to 0.75), a linear probe far above it."""
    data, encoder = retune.load_radiographs(retune.Config(demo_images=1500)), DualEncoder.load("tiny")
    embeddings = retune.embed(encoder, data, tmp_path, batch_size=250)
    prompts = retune.load_prompts(Path(cleft.__file__).parent / "prompts.json", data.class_names)
    bank, everything = retune.embed_prompts(encoder, prompts), np.arange(len(data.images))
    images = F.normalize(torch.from_numpy(np.array(embeddings)), dim=1)
    means = torch.stack([bank.embeddings[bank.group == g].mean(0) for g in range(10)])
    cosines = (images @ F.normalize(means, dim=1).T).numpy()  # columns: positive, negative of each class
    zero = cleft.measure(cosines[:, 0::2] - cosines[:, 1::2], data, everything)["auroc_macro"]
    probe = cleft.linear_probe(embeddings, data, data.where("train"), data.where("test"))
    assert 0.6 < zero < 0.75
    assert cleft.measure(probe, data, data.where("test"))["auroc_macro"] > 0.82


# --------------------------------------------------------------------------------------------------- Phantoms


def test_phantoms_are_the_same_for_the_same_seed_in_any_order_and_process():
    first, second = (phantoms.make_phantoms(40, seed=3) for _ in range(2))
    pickled = pickle.loads(pickle.dumps(second))  # what a DataLoader's worker gets
    assert first.reports == second.reports and first.patients == second.patients
    for i in (39, 0, 17):
        assert np.array_equal(first.images[i], pickled.images[i])
    assert not np.array_equal(first.images[0], phantoms.make_phantoms(40, seed=4).images[0])
    with pytest.raises(IndexError):
        first.images[40]
    with pytest.raises(ValueError, match="0 images"):
        phantoms.make_phantoms(0, seed=1)


@pytest.mark.parametrize("domain", list(phantoms.DOMAINS))
def test_phantoms_have_findings_masks_patients_and_reports(domain):
    drawn = phantoms.make_phantoms(400, seed=5, size=32, domain=domain)
    prevalence = drawn.labels.mean(0)
    assert (prevalence > 0.15).all() and (prevalence < 0.35).all()
    assert 2 < len(drawn) / len(set(drawn.patients)) < 5
    assert np.corrcoef(drawn.labels.T)[1, 3] > 0.1  # cardiomegaly comes with edema
    for i in range(0, 400, 7):
        image, masks = drawn.draw(i)
        assert image.dtype == np.uint8 and image.shape == (32, 32) and masks.shape == (5, 32, 32)
        assert np.array_equal(masks.any((1, 2)), drawn.labels[i] == 1)
    assert all(drawn.reports) and len(set(drawn.reports)) > 200
    assert set(drawn.patients).isdisjoint(phantoms.make_phantoms(400, seed=6, domain=domain).patients)


def test_a_mask_covers_what_its_finding_changes():
    """The same film with and without a finding differs inside the mask far more than elsewhere."""
    drawn = phantoms.make_phantoms(300, seed=7, size=64)
    for c in (0, 2, 3, 4):
        i = int(np.flatnonzero((drawn.labels[:, c] == 1) & (drawn.labels.sum(1) == 1))[0])
        image, masks = drawn.draw(i)
        without = dataclasses.replace(drawn, severity=np.zeros_like(drawn.severity)).images[i]
        change = np.abs(image.astype(float) - without)
        assert change[masks[c]].mean() > 2 * change[~masks[c]].mean()
