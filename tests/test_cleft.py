"""CLEFT: formulae against float64 versions, ranks, resumption, layouts of the data sets, every experiment."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import retune
from cleft import __main__ as program
from cleft import captions, config, data, evaluation, model, tables, towers, training
from cleft.__main__ import main
from cleft.config import Config, resolve_defaults
from retune import DualEncoder, InputError
from tests.conftest import ROOT, read_failure, write_masked, write_rows

TEXTS = ["no edema", "a large left pleural effusion", "cardiomegaly", "a normal chest", "edema", "mass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small encoder in our format, without batch normalisation and dropout: ViT images, GPT-2 texts."""
    vit = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32, "image_size": 16, "patch_size": 8}  # fmt: skip
    tokenizer = towers.train_tokenizer(TEXTS)
    text = towers.SMALL_TEXT | {"vocab_size": len(tokenizer), "n_embd": 16, "n_positions": 96}
    settings = {
        "name": "vit", "dim": 8,
        "image": {"model": vit, "pool": "pre_norm_mean", "head": [retune.linear(24, 8)]},
        "text": {"model": text, "pool": "last", "head": [retune.linear(16, 8)], "context_length": 96},
        "transform": {"resize": [18, 18], "crop": 16, "interpolation": "bilinear", "mean": [0.5] * 3,
                      "std": [0.5] * 3}}  # fmt: skip
    target = tmp_path_factory.mktemp("encoder") / "vit"
    with retune.seeded(0):
        DualEncoder(settings, tokenizer).save(target)
    return target


def settings(folder, **changes):
    base = {"image": str(folder), "text": str(folder), "dim": 8, "batch_size": 12, "steps": 4,
            "prompt_steps": 4, "prompt_lr": 0.1, "lr": 1e-2, "lora_dropout": 0.0, "truncate": True,
            "demo_images": 300, "device": "cpu", "foreground": "off", "augment": "off",
            "save_every": 2}  # fmt: skip
    return resolve_defaults(Config(**base | changes))


def make_model(folder, **changes):
    chosen = settings(folder, **changes)
    return model.Cleft(towers.build_encoder(chosen, TEXTS), chosen), chosen


def inputs(built, n=12):
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(built.log_scale.dtype)
    return [pixels, *built.encoder.tokenize((TEXTS * n)[:n]).values()]


def radiographs(labels, names, split="test"):
    ids = [str(i) for i in range(len(labels))]
    return retune.Radiographs(ids, np.array(labels, np.float32), names, ids, [split] * len(ids))


def plain_loss(images, texts, scale):
    """Mean cross-entropy of rows plus that of columns."""
    cosines = scale * images @ texts.T
    both = [*enumerate(cosines), *enumerate(cosines.T)]
    return sum(torch.log(row.exp().sum()) - row[i] for i, row in both) / len(images)


def test_loss_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    vectors = [F.normalize(torch.randn(12, 8, generator=generator).double(), dim=1) for _ in range(2)]
    vectors.append(torch.tensor(5.0, dtype=torch.float64))
    *own, scale = [x.clone().requires_grad_() for x in vectors]
    plain = [x.clone().requires_grad_() for x in vectors]
    wanted = plain_loss(*plain)
    wanted.backward()
    found = model.contrastive_step(scale, *own)
    gradients = [[x.grad for x in side] for side in ([*own, scale], plain)]
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def run_rank(rank, world, folder, local, target):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{target}/store", world_size=world, rank=rank)
    built, _ = make_model(folder)
    built.double()
    vectors = built(*[tensor.chunk(world)[rank] for tensor in inputs(built)])
    loss = model.contrastive_step(built.scale, *vectors, local)
    gradients = {}
    for name, p in built.named_parameters():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            gradients[name] = p.grad
    torch.save((loss, gradients), f"{target}/{rank}.pt")


@pytest.mark.parametrize("local", [False, True])
def test_four_processes_take_the_step_of_one(folder, tmp_path, local):
    arguments = (4, folder, local, tmp_path)
    torch.multiprocessing.start_processes(run_rank, arguments, 4, start_method="fork")
    built, _ = make_model(folder)
    built.double()
    vectors = built(*inputs(built))
    pairs = zip(*(part.split(3) for part in vectors), strict=True) if local else [vectors]
    losses = [model.contrastive_loss(*pair, built.scale) for pair in pairs]
    expected = sum(losses) / len(losses)
    expected.backward()
    gradients = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, (expected.detach(), gradients), rtol=0, atol=1e-9)


def test_text_feature_is_the_end_token_of_a_published_tokenizer_too(tmp_path, folder):
    """GPT-2 as published: byte-level BPE without an end token after a text and without padding."""
    backend = towers.train_tokenizer(TEXTS).backend_tokenizer
    backend.post_processor = tokenizers.processors.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    shape = {k: v for k, v in towers.SMALL_TEXT.items() if k not in ("model_type", "eos_token_id")}
    shape["vocab_size"] = len(tokenizer)
    transformers.GPT2Model(transformers.GPT2Config(**shape)).save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("edema")["input_ids"][-1] != 1
    for text in (tmp_path, folder):
        encoder = towers.build_encoder(settings(folder, text=str(text), context_length=64)).double()
        ids, mask = encoder.tokenize(TEXTS).values()
        with torch.inference_mode():
            for row, length, feature in zip(ids, mask.sum(1), encoder.text(ids, mask), strict=True):
                assert row[length - 1] == encoder.tokenizer.eos_token_id
                hidden = encoder.text.tower(row[None, :length])["last_hidden_state"][0, -1]  # without padding
                plain = encoder.text.head[0].weight @ hidden + encoder.text.head[0].bias
                assert (feature - plain).abs().max() < 1e-9


def test_image_features_are_the_mean_before_the_last_norm(folder, tmp_path):
    built, chosen = make_model(folder, cache_dir=str(tmp_path))
    built.eval()
    pairs = data.load_pairs(chosen)
    features = training.embed_features(built, pairs, chosen)
    built.double()
    pixels = built.encoder.transform(torch.from_numpy(pairs.images[7])[None])[None].double()
    with torch.inference_mode():
        output = built.encoder.image.tower(pixels, output_hidden_states=True)
        hidden = output["hidden_states"][-1][0]  # [5, H]
        head = built.encoder.image.head[0]
        plain = hidden.mean(0)
        assert (torch.from_numpy(features[7]) - plain).abs().max() < 1e-5
        assert (built.encoder.image(pixels)[0] - (head.weight @ plain + head.bias)).abs().max() < 1e-9


def test_schedule_rises_then_follows_a_cosine():
    for step in range(0, 40_000, 1234):
        plain = 4e-5 * (step + 1) / 4000
        if step >= 4000:
            plain = 1e-8 + (4e-5 - 1e-8) * (1 + math.cos(math.pi * (step - 4000) / 36_000)) / 2
        assert abs(training.learning_rate(step, 40_000, 4e-5, 4000, 1e-8) - plain) < 1e-15


def test_context_stands_before_the_class(folder):
    built, chosen = make_model(folder)
    built.double().eval()
    prompt = model.Prompt(built, ["edema", "pleural effusion"], dataclasses.replace(chosen, context_tokens=7))
    encoder, table = built.encoder, built.encoder.text.tower.get_input_embeddings().weight
    words = encoder.tokenizer(chosen.base_caption, add_special_tokens=False)["input_ids"]
    assert torch.equal(prompt.context, table[(words * 7)[:7]])
    for name, row in zip(("edema", "pleural effusion"), prompt(), strict=True):
        ids = encoder.tokenizer(name)["input_ids"]  # class name, end token
        hidden = encoder.text.tower(inputs_embeds=torch.cat([prompt.context, table[ids]])[None])
        feature = encoder.text.head(hidden["last_hidden_state"][0, -1])
        assert (row - feature / feature.norm()).abs().max() < 1e-9


def test_stage_2_takes_the_plain_step(folder, tmp_path):
    built, chosen = make_model(folder, output=str(tmp_path), prompt_steps=1)
    built.double().eval().requires_grad_(False)
    pairs = data.load_pairs(chosen)
    learn = pairs.where("train")
    chosen = dataclasses.replace(chosen, batch_size=len(learn))
    features = np.random.default_rng(0).normal(size=(300, 24))
    plain = model.Prompt(built, pairs.class_names, chosen)
    head = built.encoder.image.head[0]
    x = F.normalize(torch.from_numpy(features[learn]) @ head.weight.T + head.bias, dim=1)
    y = torch.from_numpy(pairs.labels[learn]).double()
    logits = built.scale * x @ plain().T
    loss = -(y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)).mean()
    loss.backward()
    expected = plain.context - chosen.prompt_lr * (plain.context.grad + 1e-3 * plain.context)
    before = {name: p.clone() for name, p in built.state_dict().items()}
    tuned = training.tune_prompt(built, pairs, features, chosen)
    assert (tuned.context - expected).abs().max() < 1e-9
    assert all(torch.equal(p, before[name]) for name, p in built.state_dict().items())


def test_no_decay_on_one_dimensional_parameters(folder):
    built, chosen = make_model(folder)
    decayed, plain = training.make_adamw(built, chosen).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2, 3, 4} and {p.ndim for p in plain["params"]} == {0, 1}
    everything = training.make_adamw(built, dataclasses.replace(chosen, decay_all=True)).param_groups[0]
    assert len(everything["params"]) == len(decayed["params"]) + len(plain["params"])


def test_batches_are_permutations_of_each_epoch():
    rows = np.arange(100, 111)
    batches = list(training.batch_rows(rows, 5, 0, 4, 3))  # two epochs of two batches; one row is left over
    assert all(len(set(np.concatenate(epoch))) == 10 for epoch in (batches[:2], batches[2:]))
    assert not np.array_equal(batches[0], batches[2])
    resumed = list(training.batch_rows(rows, 5, 3, 4, 3))  # from the middle of an epoch
    assert len(resumed) == 1 and np.array_equal(resumed[0], batches[3])


@pytest.mark.parametrize("kind", config.PEFT)
def test_each_tuning_moves_its_own_weights(folder, kind):
    built, _ = make_model(folder, peft=kind)
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    model.contrastive_step(built.scale, *built(*inputs(built)))
    torch.optim.SGD([p for p in built.parameters() if p.requires_grad], 0.1).step()
    moved = {name for name, p in built.named_parameters() if not torch.equal(p, before[name])}
    text = {name for name in moved if name.startswith("encoder.text.tower")}
    mark = {"lora": "lora_B", "adalora": "lora_E", "ia3": "ia3_l", "prefix": "prompt", "none": "wte"}
    assert all(mark.get(kind) in name for name in text if kind != "none") and bool(text) == (kind != "frozen")
    assert "log_scale" in moved and any(name.startswith("encoder.image.tower") for name in moved)
    assert {"encoder.image.head.0.bias", "encoder.text.head.0.bias"} <= moved


def test_image_tower_pretrained_random_frozen(folder):
    name = "encoder.image.tower.embeddings.patch_embeddings.projection.weight"
    built = {kind: make_model(folder, image_tower=kind)[0] for kind in config.IMAGE_TOWERS}
    weights = {kind: each.state_dict()[name] for kind, each in built.items()}
    assert torch.equal(weights["pretrained"], weights["frozen"])
    assert not torch.equal(weights["pretrained"], weights["random"])
    frozen = built["frozen"]
    assert not frozen.encoder.image.tower.training and frozen.encoder.text.training
    trained = {name for name, p in frozen.encoder.image.named_parameters() if p.requires_grad}
    assert trained == {"head.0.weight", "head.0.bias"}
    with torch.no_grad():
        frozen.log_scale.fill_(9)
    assert frozen.scale == 100  # CLIP's bound


def test_count_gives_the_two_claims():
    lora = 32 * 8 * (2560 + 3 * 2560)  # layers x rank x (in + out) of c_attn
    table = towers.count_published(resolve_defaults(Config()))
    assert all(number in table for number in (f"{lora:,}", "3.6%", "39.6%"))


def test_unknown_labels_are_never_no_finding():
    chosen, nan = resolve_defaults(Config()), math.nan
    names = ["No Finding", "Edema", "Mass", "Nodule"]
    base = "a chest X-ray of a patient with"
    told = {(0, 1, 0, 1): f"{base} edema, nodule", (0, 0, 0, 0): f"{base} no finding",
            (0, nan, nan, nan): "", (0, 0, nan, 0): "", (1, nan, 0, 0): f"{base} no finding",
            (nan, 1, nan, nan): f"{base} edema"}  # fmt: skip
    for labels, text in told.items():
        assert captions.chest_caption(labels, names, chosen) == text
    negative = dataclasses.replace(chosen, negative_captions=True)
    assert captions.chest_caption((0, 1, 0, nan), names, negative) == f"{base} edema, no mass"


def test_mammogram_captions_and_prompts_have_one_form():
    facts = {"side": "L", "position": "CC", "assessment": "S", "density": "3", "age": "56", "race": "white"}
    facts["mass"] = "yes"
    simple = captions.mammogram_caption(facts, "simple")
    assert simple == "a left CC mammogram with BI-RADS 4, suspicious, breast density heterogeneously dense"
    chosen = resolve_defaults(Config(data="embed"))
    prompt = captions.class_prompt("BI-RADS 4", chosen)
    assert prompt == "a mammogram with BI-RADS 4, suspicious"
    assert f"{chosen.base_caption} {captions.class_phrase('BI-RADS 4')}" == prompt
    for style in ("natural", "structural"):
        text = captions.mammogram_caption(facts, style)
        chosen = resolve_defaults(Config(data="embed", caption_style=style))
        assert captions.class_prompt("BI-RADS 4", chosen).split("assessment")[1] in text
    assert captions.mammogram_caption(facts, "natural") == (
        "the image is left CC mammogram. the patient is 56 years, white. the breast density is "
        "heterogeneously dense. the finding is mass. the assessment is BI-RADS 4, suspicious")  # fmt: skip


def test_otsu_agrees_with_brute_force():
    grey = np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)
    grey[10:25, 5:20] //= 3
    values = grey.astype(np.float64)
    parts = [(values[values <= t], values[values > t]) for t in range(255)]
    within = [low.var() * low.size + high.var() * high.size for low, high in parts]
    assert data.otsu_threshold(grey) == int(np.argmin(within))
    image = torch.zeros(1, 20, 30, dtype=torch.uint8)
    image[:, 4:9, 10:25] = 200
    assert data.crop_foreground(image).shape == (1, 5, 15)


def test_augmentation_depends_on_the_draw_alone(folder):
    chosen = settings(folder, augment="on", foreground="on")
    encoder = DualEncoder.load(str(folder))
    pairs = radiographs(np.zeros((8, 1)), ["A"])
    pairs.images = np.random.default_rng(0).integers(0, 255, (8, 30, 40)).astype(np.uint8)
    varied, plain = (data.make_transform(encoder, chosen, training=flag) for flag in (True, False))
    (_, first), (_, second) = data.load_batches(pairs, varied, [(1, [0, 1]), (2, [0, 1])], 0)
    ((rows, again),) = data.load_batches(pairs, varied, [(2, [1, 0])], 0)
    assert rows == [1, 0] and torch.equal(again[0], second[1]) and not torch.equal(first, second)
    ((_, test),) = data.load_batches(pairs, plain, [(1, [0])], 0)
    cropped = data.crop_foreground(torch.from_numpy(pairs.images[0])[None])
    assert torch.equal(test[0], encoder.transform(cropped)) and first.shape[1:] == (3, 16, 16)
    pairs.images[:] = np.linspace(250, 10, 40)  # darker to the right
    draws = data.load_batches(pairs, varied, [(draw, range(8)) for draw in range(8)], 0)
    mirrored = [(x[0, :, :8].mean() < x[0, :, 8:].mean()).item() for _, batch in draws for x in batch]
    assert 16 < sum(mirrored) < 48  # of 64


def test_weights_of_the_lowest_validation_loss_are_kept(folder, tmp_path, monkeypatch):
    chosen = settings(folder, output=str(tmp_path), save_every=1)
    losses, scales = iter([3.0, 1.0, 2.0, 4.0]), []
    save = training.save_checkpoint

    def watch(path, built, *more):
        scales.append(built.log_scale.item())
        save(path, built, *more)

    monkeypatch.setattr(training, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(training, "save_checkpoint", watch)
    built = training.pretrain(chosen, data.load_pairs(chosen))
    assert len(set(scales)) == 4
    assert built.log_scale == training.load_model(chosen.folder, chosen).log_scale == scales[1]


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path, monkeypatch):
    chosen, step = settings(folder, output=str(tmp_path), save_every=1), training.contrastive_step

    def explodes(*arguments):
        return step(*arguments) * (math.nan if (tmp_path / "stage1.pt").exists() else 1)

    monkeypatch.setattr(training, "contrastive_step", explodes)
    with pytest.raises(InputError, match="step 2: .*nan"):
        training.pretrain(chosen, data.load_pairs(chosen))
    assert torch.load(tmp_path / "stage1.pt")["step"] == 1


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"checkpointing": True}, {"peft": "adalora"}])
def test_other_arithmetic_trains_too(folder, tmp_path, options):
    chosen = settings(folder, output=str(tmp_path / "plain"))
    other = settings(folder, output=str(tmp_path / "other"), **options)
    results = []
    for each in (chosen, other):
        each.folder.mkdir()
        results.append(training.pretrain(each, data.load_pairs(each)).state_dict())
    tolerance = 1e-5 if "checkpointing" in options else 0.2
    shared = results[0].keys() & results[1].keys()
    assert max((results[0][name] - results[1][name]).abs().max() for name in shared) < tolerance


def test_balanced_sets_have_one_known_finding():
    labels = [[1, 0], [1, 1], [0, 1], [0, 1], [1, 0], [0, 0], [math.nan, 1]]
    pairs = radiographs(labels * 2, ("A", "B"))
    pairs.split[7:] = "train"
    multi, balanced = evaluation.make_test_sets(pairs, Config(fractions=(1.0,)))
    assert set(balanced.rows[:2]) == {0, 4} and set(balanced.rows[2:]) == {2, 3} and len(multi.rows) == 7
    assert set(balanced.learn[1.0]) == {7, 9, 10, 11} and set(multi.learn[1.0]) == set(range(7, 14))
    features = np.random.default_rng(0).normal(size=(14, 3))
    assert evaluation.linear_probe(features, multi, multi.learn[1.0]).all()  # without the unknown label of A
    scores = np.array([[2.0, 0], [2, 0], [0, 2], [2, 0]])
    measured = evaluation.measure(scores, balanced)
    assert measured["accuracy"] == 0.75 and measured["n"] == 4
    pairs.labels[[2, 3, 6]] = math.nan
    with pytest.raises(InputError, match="B as its only finding"):
        evaluation.make_test_sets(pairs, Config(fractions=(1.0,)))


def test_fractions_are_nested_whole_patients():
    pairs = retune.load_radiographs(retune.Config(demo_images=3000))
    chosen = Config(fractions=(1.0, 0.01, 0.1))
    shares = evaluation.fraction_rows(pairs, chosen)
    train = pairs.where("train")
    assert np.array_equal(shares[1.0], train) and set(shares[0.01]) < set(shares[0.1]) < set(train)
    total = len(set(pairs.patients[train]))
    for share, rows in shares.items():
        chosen_patients = set(pairs.patients[rows])
        assert len(chosen_patients) == math.ceil(share * total)
        assert set(train[np.isin(pairs.patients[train], list(chosen_patients))]) == set(rows)
    assert (pairs.labels[shares[0.01]] == 1).any(0).all()
    other = evaluation.fraction_rows(pairs, dataclasses.replace(chosen, seed=1))
    assert set(other[0.1]) != set(shares[0.1])


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 40, (24, 24)) + value % 200
    Image.fromarray(noise.astype(np.uint8)).save(path)


def write_chexpert(root):
    """170 patients: even ones have a competition finding, odd ones Lung Opacity alone."""
    names = retune.CHEXPERT_FINDINGS
    for part, patients in {"train": range(100), "valid": range(100, 130), "test": range(130, 170)}.items():
        rows = []
        for p in patients:
            path = f"{part}/patient{p:05d}/study1/view1_frontal.jpg"
            present = retune.COMPETITION_FINDINGS[p // 2 % 5] if p % 2 == 0 else "Lung Opacity"
            labels = ["-1.0" if p < 3 else "1.0" if name == present else "" for name in names]
            rows.append([f"CheXpert-v1.0-small/{path}", "Male", 50, "Frontal", "AP", *labels])
            write_image(root / path, p)
        file = root / ("test_labels.csv" if part == "test" else f"{part}.csv")
        write_rows(file, rows, ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *names])
    return root


def write_embed(root, images=True):
    metadata = ["empi_anon,acc_anon,anon_dicom_path,ImageLateralityFinal,ViewPosition,FinalImageType"]
    clinical = ["empi_anon,acc_anon,side,asses,tissueden,age_at_study,RACE_DESC,massshape,calcfind"]
    for i in range(140):
        exam, facts = f"{100 + i},{i}", f"{1 + i % 4}.0,{50 + i % 30},White"
        for side, view in (("L", "CC"), ("R", "MLO")):
            path = f"images/cohort_1/{i}/{side}.png"
            metadata.append(f"{exam},/mnt/NAS2/mammo/anon_dicom/{path},{side},{view},2D")
            if images:
                write_image(root / path, i)
        metadata.append(f"{exam},/mnt/images/C.dcm,L,CC,cview")
        clinical.append(f"{exam},L,{'NBAPSMK'[i % 7]},{facts},R,")
        clinical.append(f"{exam},L,N,{facts},,")
        clinical.append(f"{exam},{'' if i % 7 else 'R'},B,,,,,A")
    (root / "tables").mkdir(parents=True)
    for name, lines in (("metadata", metadata), ("clinical", clinical)):
        (root / f"tables/EMBED_OpenData_{name}.csv").write_text("\n".join(lines))
    return root


def command(folder, tmp_path, *argv):
    """The command line of the docs with towers and numbers of steps small enough for a test."""
    small = f"""--image {folder} --text {folder} --dim 8 --batch-size 12 --steps 3 --prompt-steps 3 --truncate
        --context-length 96 --device cpu --cache-dir {tmp_path}/cache --fractions 0.5 1""".split()
    return main([*map(str, argv), *small])


def test_chexpert_then_rsna_with_one_model(folder, tmp_path, capsys):
    """CheXpert by rule; with the same model 5x200, RSNA, probe and fine-tuning, other classes."""
    chexpert, output = write_chexpert(tmp_path / "CheXpert"), tmp_path / "run"
    here = ["--data-dir", chexpert]
    assert command(folder, tmp_path, "all", "--data", "chexpert", *here, "--output", output) == 0
    assert "left out, as nothing is known to say: 3 " in capsys.readouterr().out
    found = retune.read_json(output / "evaluation.json")
    assert set(found["zero-shot"]["auroc"]) == set(retune.COMPETITION_FINDINGS)
    assert found["balanced, zero-shot, learned context"]["n"] == 20
    splits = pd.read_csv(output / "splits.csv", keep_default_na=False)["fraction or tests"]
    assert set(splits) == {"0.5", "1", "", "multi-label", "multi-label balanced"}
    listed = pd.read_csv(chexpert / "train.csv").iloc[[4, 6, 8, 10, 12]]
    listed[["Path", *retune.COMPETITION_FINDINGS]].fillna(0).to_csv(tmp_path / "5x200.csv", index=False)

    def evaluate(name, *options):
        argv = ["evaluate", "--model", output, "--output", tmp_path / name, "--cache-dir", tmp_path / "cache"]
        argv += ["--device", "cpu", "--fractions", 0.5, 1, "--finetune-epochs", 1]
        assert main([*map(str, argv), *map(str, options)]) == 0, capsys.readouterr().err
        return retune.read_json(tmp_path / name / "evaluation.json")

    found = evaluate("five", "--data", "chexpert-5x200", *here, "--labels-csv", tmp_path / "5x200.csv")
    assert found["5x200, zero-shot"]["n"] == 5 and "5x200, full fine-tuning, 50% of the labels" in found
    found = evaluate("rsna", "--data", "rsna", "--data-dir", write_masked(tmp_path / "RSNA", "rsna", 60))
    assert set(found["zero-shot"]["auroc"]) == {"Pneumonia", "No Finding"}
    methods = [f"balanced, {m}, {s}%" for m in ("linear probe", "full fine-tuning") for s in (50, 100)]
    assert {f"{method} of the labels" for method in methods} < set(found)
    found = evaluate("one", "--data", "chexpert", *here, "--classes", "Edema")
    assert set(found["zero-shot"]["auroc"]) == {"Edema"}
    assert main(["evaluate", "--model", str(output), "--lr", "0.5"]) == 2
    assert "--lr 0.5: the model in" in capsys.readouterr().err


def test_captions_name_all_fourteen_findings_and_lists_set_patients_apart(tmp_path):
    root = write_chexpert(tmp_path)
    chosen = resolve_defaults(Config(data="chexpert", data_dir=str(root)))
    pairs = data.load_pairs(chosen)
    assert tuple(pairs.class_names) == retune.COMPETITION_FINDINGS
    told = dict(zip(pairs.names, pairs.reports, strict=True))
    assert told["train/patient00011/study1/view1_frontal.jpg"] == f"{chosen.base_caption} lung opacity"
    assert told["train/patient00002/study1/view1_frontal.jpg"] == ""
    assert sum(bool(pairs.reports[row]) for row in pairs.where("train")) == 97
    assert not any("no finding" in text for text in pairs.reports)
    table = pd.read_csv(root / "train.csv")
    listed = table.iloc[[4, 6]][["Path", *retune.COMPETITION_FINDINGS]].fillna(0)
    listed.to_csv(tmp_path / "list.csv", index=False)
    other = table.iloc[[4]].replace("view1_frontal", "view2_lateral", regex=True)  # not listed: left out
    pd.concat([table, other]).to_csv(root / "train.csv", index=False)
    chosen = dataclasses.replace(chosen, data="chexpert-5x200", labels_csv=str(tmp_path / "list.csv"))
    pairs = data.load_pairs(chosen)
    assert list(pairs.patients[pairs.where("test")]) == ["patient00004", "patient00006"]
    assert len(pairs.where("train")) == 98 and len(pairs.where("val")) == 30
    with pytest.raises(InputError, match="--labels-csv"):
        data.load_pairs(dataclasses.replace(chosen, labels_csv=None))


def test_embed_joins_images_and_exams(tmp_path):
    root = str(write_embed(tmp_path, images=False))
    chosen = Config(data="embed", data_dir=root, caption_style="structural")
    pairs = data.load_pairs(resolve_defaults(chosen))
    assert len(pairs.images) == 280 and len(set(pairs.patients)) == 140  # synthetic 2D views are left out
    assert pairs.names[0] == "images/cohort_1/0/L.png" and pairs.images[0] == f"{root}/{pairs.names[0]}"
    left, right = pairs.labels[8], pairs.labels[9]  # exam 4: S on the left, B on both
    classes = list(pairs.class_names)
    assert classes[left[:7].argmax()] == "BI-RADS 4" and classes[7 + left[7:].argmax()] == "Density A"
    assert classes[right[:7].argmax()] == "BI-RADS 2" and np.isnan(right[7:]).all()
    assert pairs.reports[8] == (
        "image: left CC mammogram; patient: 54 years, white; breast density: almost entirely fatty; "
        "finding: mass and calcification; assessment: BI-RADS 4, suspicious"
    )


@pytest.mark.parametrize("style", config.STYLES)
def test_embed_gives_both_balanced_sets(folder, tmp_path, capsys, style):
    root, output = write_embed(tmp_path / "EMBED"), tmp_path / "run"
    options = ["--data", "embed", "--data-dir", root, "--output", output, "--caption-style", style]
    assert command(folder, tmp_path, "all", *options) == 0, capsys.readouterr().err
    found = retune.read_json(output / "evaluation.json")
    assert len(found["BI-RADS, zero-shot"]["auroc"]) == 7 and len(found["density, zero-shot"]["auroc"]) == 4
    assert "density, linear probe, 50% of the labels" in found and "zero-shot" not in found


def test_evaluation_is_checked_before_the_training(folder, tmp_path, capsys):
    root = write_embed(tmp_path / "EMBED", images=False)
    clinical = root / "tables/EMBED_OpenData_clinical.csv"
    clinical.write_text(clinical.read_text().replace(",K,", ",,"))
    options = ["--data", "embed", "--data-dir", root, "--output", tmp_path / "run"]
    assert command(folder, tmp_path, "all", *options) == 2
    assert "no test image has BI-RADS 6" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stage1.pt").exists()


def test_a_folder_keeps_to_its_labels_split_patients_and_reports(folder, csv_set, tmp_path, capsys):
    root, rows, _ = csv_set
    rows = [row | {"report": f"number {i}"} for i, row in enumerate(rows)]
    argv = ["--data", "csv", "--data-dir", root, "--balanced", 0, "--output", tmp_path / "run"]
    write_rows(root / "labels.csv", rows)
    assert command(folder, tmp_path, "pretrain", *argv) == 0
    for name, value in {"split": "train", "Mass": "", "patient": "another", "report": "edema"}.items():
        write_rows(root / "labels.csv", [*rows[:-1], rows[-1] | {name: value}])
        for stage in ("pretrain", "all", "evaluate"):
            line = read_failure(capsys, [stage, *argv], lambda words: command(folder, tmp_path, *words))
            assert "another run" in line and ("captions" if name == "report" else "labels changed") in line
    write_rows(root / "labels.csv", rows)
    assert command(folder, tmp_path, "all", *argv) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_tables_skip_finished_runs(folder, tmp_path, capsys, monkeypatch):
    kinds = {"text tower: lora": {}, "text tower: ia3": {"peft": "ia3"}}
    monkeypatch.setattr(tables, "list_ablations", lambda chosen: kinds)
    options = ["--demo-images", 600, "--output", tmp_path / "out", "--finetune-epochs", 1, "--seeds", 1, 2]
    assert command(folder, tmp_path, "tables", *options) == 0, capsys.readouterr().err
    main_table, ablations = ((tmp_path / "out" / f"{name}.md").read_text() for name in ("main", "ablations"))
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    chosen = results.query("run == 'main' and test == 'multi-label' and method == 'zero-shot'")
    assert f"{chosen['auroc_macro'].mean():.3f} ± {chosen['auroc_macro'].std():.3f}" in main_table
    assert "full fine-tuning, 50% of the labels" in main_table and "text tower: ia3" in ablations
    assert (tmp_path / "out" / "towers.png").stat().st_size > 5000
    capsys.readouterr()
    monkeypatch.setattr(program, "run", None)
    assert command(folder, tmp_path, "tables", *options) == 0
    assert (tmp_path / "out" / "main.md").read_text() == main_table


def test_an_exported_encoder_is_the_tuned_model(folder, tmp_path, capsys):
    assert command(folder, tmp_path, "pretrain", "--demo-images", 600, "--output", tmp_path / "run") == 0
    assert main(["export", "--model", str(tmp_path / "run"), "--to", str(tmp_path / "encoder")]) == 0
    encoder = DualEncoder.load(str(tmp_path / "encoder"))
    built = training.load_model(tmp_path / "run", config.model_config(Config(model=str(tmp_path / "run"))))
    pixels, *tokens = inputs(built)
    with torch.inference_mode():
        images, texts = built.encoder.image(pixels), built.encoder.text(*tokens)
    torch.testing.assert_close(encoder.encode_images(pixels), images, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_texts((TEXTS * 12)[:12]), texts, atol=1e-5, rtol=1e-5)


def test_wrong_input_is_named(folder, tmp_path):
    built, chosen = make_model(folder)
    with pytest.raises(InputError, match="has no tokens"):
        model.split_tokens(built.encoder.tokenizer, "", built.encoder.text.tower.get_input_embeddings())
    with pytest.raises(InputError, match="the text tower reads 96"):
        model.Prompt(built, ["edema"], dataclasses.replace(chosen, context_tokens=120))
    with pytest.raises(InputError, match="--peft ia3"):
        towers.add_peft(torch.nn.Linear(2, 2), dataclasses.replace(chosen, peft="ia3"))
    with pytest.raises(InputError, match="--captions reports"):
        write_masked(tmp_path / "RSNA", "rsna", 60)
        place = {"data": "rsna", "data_dir": str(tmp_path / "RSNA")}
        data.load_pairs(dataclasses.replace(chosen, captions="reports", **place))
    with pytest.raises(InputError, match="--batch-size"):
        next(training.batch_rows(np.arange(3), 4, 0, 1, 0))
    for name in ("image", "text"):
        with pytest.raises(InputError, match="no transformers model"):
            towers.build_encoder(settings(folder, **{name: str(tmp_path / "nothing")}), TEXTS)
    with pytest.raises(InputError, match="not finished"):
        training.load_model(tmp_path, chosen)
    (tmp_path / "stage1.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match="damaged"):
        training.load_checkpoint(tmp_path / "stage1.pt", built)


@pytest.mark.parametrize("argv, named", [
    (["export"], "--to"), (["all", "--to", "elsewhere"], "--to"), (["all", "--lr", "-1"], "--lr -1.0"),
    (["all", "--seed", 2**32], "--seed 4294967296"), (["all", "--warmup", "inf"], "--warmup inf"),
])  # fmt: skip
def test_bad_options_exit_2_with_the_option_and_the_value(argv, named, capsys):
    assert named in read_failure(capsys, argv, main)


@pytest.mark.parametrize("old, new, named", [
    ("id2,,,,,0", "id2,,,,,7", "row 4: Target '7'"),
    ("id2,,,,,0", "missing,,,,,0", "row 4: patientId 'missing'")])  # fmt: skip
def test_rsna_marks_pneumonia_and_names_rows_that_do_not_fit(tmp_path, old, new, named):
    root = write_masked(tmp_path, "rsna")
    chosen = resolve_defaults(Config(data="rsna", data_dir=str(root)))
    assert data.load_pairs(chosen).labels.tolist() == [[0, 1], [1, 0]] * 12
    path = root / "stage_2_train_labels.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=named):
        data.load_pairs(chosen)


def test_shipped_encoder_is_small_and_what_make_tiny_makes(monkeypatch, tmp_path):
    places = (ROOT / "demo" / "tiny", tmp_path / "tiny")
    assert sum(file.stat().st_size for file in places[0].iterdir()) < 3e6
    prompts = retune.load_prompts(ROOT / "prompts.json", ["Edema", "Cardiomegaly"])
    words = " ".join(text for pair in prompts.values() for part in pair.values() for text in part).split()
    tokenizer = DualEncoder.load("tiny").tokenizer
    assert all(len(tokenizer(word)["input_ids"]) == 2 for word in words)  # one token and the end
    small = {"demo_images": 400, "steps": 2, "batch_size": 16, "lr": 1e-3}
    monkeypatch.setattr(program, "TINY", config.TINY | small)
    threads = torch.get_num_threads()
    assert main(["make-tiny", "--to", str(places[1]), "--output", str(tmp_path / "run")]) == 0
    torch.set_num_threads(threads)
    shipped, made = (retune.read_json(path / "config.json") for path in places)
    for each in (shipped, made):
        del each["text"]["model"]["vocab_size"]  # fewer phantoms, fewer words
    assert shipped == made
    files = [(path / "tokenizer_config.json").read_bytes() for path in places]
    assert files[0] == files[1]
