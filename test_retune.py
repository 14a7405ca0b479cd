"""Tests of retune.py, in its order, without network or data: every formula against plain float64 code.
More in tests/: data sets and image files, encoders, trust, copies, the README."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from sklearn import metrics as sklearn_metrics

import retune
from tests.conftest import *
from tests.conftest import (
    ROOT,
    load_csv,
    metrics_of,
    model_bytes,
    noise_images,
    read_failure,
    read_metrics,
    save_random_encoder,
    write_rows,
)

NAMES = ("Edema", "Mass", "Nodule", "Hernia", "Fibrosis", "Pneumonia")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
NAN = float("nan")

pytestmark = [pytest.mark.usefixtures("in_empty_folder"), pytest.mark.filterwarnings("ignore:.*all alike")]
quick = settings(max_examples=50, deadline=None)


# ------------------------------------------------------------------------------------------------ 1. Settings


def parse(words: str) -> retune.Config:
    parser = retune.build_parser(retune.Config, "")
    return retune.parse_config(retune.Config, parser.parse_args(words.split()))


def test_the_command_line_is_made_from_config():
    assert parse("") == retune.Config()
    changed = parse("--scenario class --parts 3 --classes Mass Edema --lr 0.5 --no-negatives")
    assert (changed.scenario, changed.parts, changed.classes) == ("class", 3, ("Mass", "Edema"))
    assert changed.lr == 0.5 and not changed.negatives
    text = retune.build_parser(retune.Config, "").format_help()
    for name, item in retune.Config.__dataclass_fields__.items():
        assert item.metadata["help"] and item.metadata.get("flag", f"--{name.replace('_', '-')}") in text


def test_defaults_follow_the_size_of_the_training_set():
    def resolved(n: int) -> tuple:
        split = ["train"] * n + ["val", "test"]
        data = retune.Radiographs(np.zeros((n + 2, 1, 1)), np.zeros((n + 2, 1)), "A", split, split)
        config = retune.resolve_defaults(retune.Config(epochs=3), data)
        return config.epochs, config.lr, config.batch_size

    assert resolved(retune.SMALL_SET - 1) == (3, 1e-3, 64)
    assert resolved(retune.SMALL_SET) == (3, 1e-4, 6144)  # the authors'


# ------------------------------------------------------------------------------------------------- 2. Prompts


def test_prompts_fill_templates_follow_synonyms_and_prefer_their_own(tmp_path):
    path = tmp_path / "prompts.json"
    own = {"positive": ["wet lungs"], "negative": ["dry lungs", "clear"]}
    default = {"positive": ["there is {finding}"], "negative": ["no {finding}", "{finding} is absent"]}
    path.write_text(json.dumps({"default": default, "edema": own, "Effusion": "Edema"}))
    found = retune.load_prompts(path, ["Edema", "EFFUSION", "Pleural_Thickening"])
    negative = ["no pleural thickening", "pleural thickening is absent"]
    filled = {"positive": ["there is pleural thickening"], "negative": negative}
    assert found == {"Edema": own, "EFFUSION": own, "Pleural_Thickening": filled}
    assert retune.load_prompts(path, ["Edema"], wording="generic")["Edema"]["positive"] == ["there is edema"]


@pytest.mark.parametrize("content, named", [
    ('{"default": {"positive": ["a"]', "JSON"), ("[1]", "object"), (None, "no such file"),
    ('{"Mass": {"positive": ["a"], "negative": ["b"]}}', "'Edema'"), ('{"Edema": "Nowhere"}', "'Edema'"),
    ('{"Edema": {"positive": [], "negative": ["b"]}}', "'positive'"),
    ('{"Edema": {"positive": ["a"], "negative": "b"}}', "'negative'"),
    ('{"Edema": {"positive": ["a"]}}', "'negative'"),
    ('{"Edema": {"positive": ["a", 3], "negative": ["b"]}}', "'positive'"),
    ('{"Edema": {"positive": ["a", " "], "negative": ["b"]}}', "'positive'")])  # fmt: skip
def test_unusable_prompts_are_refused_by_file_and_finding(tmp_path, content, named):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(retune.InputError, match="p.json") as error:
        retune.load_prompts(path, ["Edema"])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_prompts_are_distinct_within_every_finding():
    names = sorted({*retune.CHEXPERT_FINDINGS, *retune.NIH_FINDINGS})
    for name, pair in retune.load_prompts(ROOT / "prompts.json", names).items():
        texts = pair["positive"] + pair["negative"]
        assert len(set(texts)) == len(texts) >= 2, name
        assert not any("{" in text for text in texts), name


# --------------------------------------------------------------------------------------------- 3. Radiographs


@quick
@given(st.lists(st.text(max_size=8), min_size=1, max_size=30), st.lists(st.text(max_size=8), max_size=30))
def test_new_patients_never_move_the_old_ones(old, new):
    before, after = retune.patient_split(old, SHARES), retune.patient_split(new + old, SHARES)
    assert after[len(new) :].tolist() == before.tolist()
    assert len({*zip(new + old, after.tolist())}) == len({*new, *old})


def test_patient_split_is_the_documented_hash():
    ids = [f"patient{i:05d}" for i in range(20000)]
    split = retune.patient_split(ids, SHARES)
    for name, share in SHARES.items():
        assert abs((split == name).mean() - share) < 4 * math.sqrt(share * (1 - share) / 20000)
    for i in range(100):
        position = int(hashlib.sha256(ids[i].encode()).hexdigest()[:16], 16) / 2**64
        assert split[i] == ("train" if position < 0.7 else "val" if position < 0.8 else "test")


def test_read_table_reads_quotes_byte_order_marks_and_gzip(tmp_path):
    text = '\ufeffpath, Mass\r\n"a, b.png",1\r\n c.png ,\r\n007,nan\r\n\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("t.csv", "t.csv.gz"):
        table = retune.read_table(tmp_path / name, ["path"])
        assert table.to_dict("list") == {"path": ["a, b.png", " c.png ", "007"], "Mass": ["1", "", "nan"]}


@pytest.mark.parametrize("name, content, named", [
    ("t.csv", b"", ["empty"]), ("t.csv", b"path,Mass\n", ["no rows"]), ("t.csv", None, ["no such file"]),
    ("t.csv", b"Path,Mass\na.png,1\n", ["'path'", "Path, Mass"]),
    ("t.csv", b"path,Mass,Mass\na.png,1,0\n", ["'Mass'", "duplicated"]),
    ("t.csv", b"path,Mass\na.png,1,0\n", ["row 2"]), ("t.csv", b"path,Mass\na.png,1\nb.png,1,0\n", ["row 3"]),
    ("t.csv", b"path,Mass\na.png,1\nb.png\n", ["row 3"]),
    ("t.csv", b"path,Mass\na.png,1\n\nb.png,1\n", ["row 3"]), ("t.csv", b"path;Mass\na.png;1\n", ["';'"]),
    ("t.csv", b"path\tMass\na.png\t1\n", ["'\\t'"]), ("t.csv", b"path,Mass\n\xff\xfe.png,1\n", ["CSV"]),
    ("t.csv.gz", b"path,Mass\na.png,1\n", ["CSV"]),
    ("t.csv.gz", gzip.compress(b"path,Mass\na.png,1\n")[:-12], ["CSV"])])  # fmt: skip
def test_unusable_tables_are_refused_by_file_row_and_column(tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(retune.InputError, match=name) as error:
        retune.read_table(tmp_path / name, ["path"])
    assert all(text in str(error.value) for text in named) and "\n" not in str(error.value)


@pytest.mark.parametrize("uncertain, minus_one", [("ones", 1), ("zeros", 0), ("ignore", NAN)])
@pytest.mark.parametrize("blank, empty", [("zero", 0), ("ignore", NAN)])
def test_labels_follow_the_policies_and_are_counted(uncertain, minus_one, blank, empty):
    columns = {"A": ["1", "0", "-1", "", "nan"], "B": ["1.0", "0.00", "-1.0", "NaN", "1"]}
    table = pandas.DataFrame(columns | {"C": ["TRUE", "false", "yes", "No", "1"]})
    labels, note = retune.parse_labels(table, ["B", "A", "C"], uncertain, blank)
    wanted = [[1, 1, 1], [0, 0, 0], [minus_one, minus_one, 1], [empty, empty, 0], [1, empty, 1]]
    np.testing.assert_array_equal(labels, np.array(wanted, np.float32))
    assert labels.dtype == np.float32 and "2 uncertain" in note and "3 blank" in note


@pytest.mark.parametrize("value", ["2", "maybe", "1.5", "1.0.0", "--1", "inf", "0.5", "٣"])
def test_other_labels_are_refused_by_file_row_column_and_value(value):
    rows = [f"labels.csv row {i}" for i in (2, 3, 4)]
    table = pandas.DataFrame({"A": ["1", "0", "1"], "B": ["0", value, value]}, rows)
    with pytest.raises(retune.InputError, match=f"labels.csv row 3: B {re.escape(repr(value))}"):
        retune.parse_labels(table, ["A", "B"], "ignore", "ignore")


@pytest.mark.parametrize("change", [
    {"labels": [[0.0]]}, {"labels": [[0.5], [1]]}, {"labels": [[0, 1], [1, 0]]}, {"patients": ["p"]},
    {"split": ["val"] * 3}])  # fmt: skip
def test_radiographs_refuse_columns_of_other_lengths_and_other_labels(change):
    good = {"labels": [[0], [1]], "class_names": "A", "patients": ["p", "q"], "split": ["train", "test"]}
    assert len(retune.Radiographs(np.zeros((2, 4, 4)), **good).images) == 2
    with pytest.raises(retune.InputError):
        retune.Radiographs(np.zeros((2, 4, 4)), **good | change)


# ----------------------------------------------------------------------------------------- 5. Embedding cache


@pytest.fixture
def encoded(monkeypatch):
    """The sizes of all image batches encoded from now on."""
    sizes, encode = [], retune.DualEncoder.encode_images

    def counting(self, pixels, *precision):
        sizes.append(len(pixels))
        return encode(self, pixels, *precision)

    monkeypatch.setattr(retune.DualEncoder, "encode_images", counting)
    return sizes


def test_embeddings_are_the_encoders_of_the_transformed_images(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(retune, "CHUNK", 32)
    data = noise_images()
    embeddings = retune.embed(encoder, data, tmp_path, batch_size=8)
    assert not embeddings.flags.writeable and embeddings.dtype == np.float32
    for image, found in zip(data.images, embeddings):
        pixels = torch.from_numpy(image)[None].float()
        resized = torch.nn.functional.interpolate(pixels[None], (35, 32), mode="bilinear", antialias=True)[0]
        cropped = resized[:, 2:34].round().repeat(3, 1, 1)
        alone = encoder.encode_images(((cropped / 255 - 0.5) / 0.25)[None])[0]
        np.testing.assert_allclose(found, alone.numpy(), atol=2e-2 * alone.abs().max().item())
    np.testing.assert_array_equal(
        retune.embed(encoder, data, tmp_path / "b", batch_size=8, workers=2), embeddings
    )


def test_a_cache_hit_encodes_nothing_and_any_change_of_input_misses(encoder, encoded, tmp_path):
    first = np.array(retune.embed(encoder, noise_images(), tmp_path))
    np.testing.assert_array_equal(retune.embed(encoder, noise_images(), tmp_path), first)
    assert sum(encoded) == 70
    retune.embed(encoder, noise_images(seed=1), tmp_path)
    assert sum(encoded) == 140
    retune.embed(encoder, noise_images(), tmp_path, precision="bf16")
    assert sum(encoded) == 210


def write_grey(path: Path, value: int, time: int) -> None:
    """An uncompressed image of one grey level: every such file has the same size."""
    Image.fromarray(np.full((40, 36), value, np.uint8)).save(path, "TIFF")
    os.utime(path, ns=(time, time))


def test_only_the_same_file_of_the_same_time_shares_a_cache(encoder, encoded, csv_set):
    root, rows, _ = csv_set
    other = root.parent / "other"
    shutil.copytree(root, other)
    for folder, sign in ((root, 1), (other, -1)):
        for i, row in enumerate(rows):
            write_grey(folder / row["path"], 128 + sign * 5 * i, time=1000)

    def embedded(folder):
        return np.array(retune.embed(encoder, load_csv(folder), root.parent / "cache"))

    first, second = embedded(root), embedded(other)
    assert np.flatnonzero(np.abs(first - second).max(1)).tolist() == list(range(1, 24)) and sum(encoded) == 48
    rows[0], rows[1] = rows[1], rows[0]
    write_rows(root / "labels.csv", rows)
    order = [1, 0, *range(2, 24)]
    np.testing.assert_array_equal(embedded(root), first[order])
    write_grey(root / rows[3]["path"], 250, time=1001)
    assert np.flatnonzero(np.abs(embedded(root) - first[order]).max(1)).tolist() == [3]


def test_embedding_goes_on_with_the_chunks_that_a_failure_left(encoder, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(retune, "CHUNK", 16)
    encode = retune.DualEncoder.encode_images
    failing = lambda self, pixels, *precision: encode(self, pixels, *precision) if len(encoded) < 7 else 1 / 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(retune.DualEncoder, "encode_images", failing)
        retune.embed(encoder, noise_images(), tmp_path, batch_size=8)
    encoded.clear()
    again = retune.embed(encoder, noise_images(), tmp_path, batch_size=8)
    assert sum(encoded) == 70 - 48
    np.testing.assert_array_equal(again, retune.embed(encoder, noise_images(), tmp_path / "b", batch_size=8))


# --------------------------------------------------------------- 6. Model and loss, against loops in float64


def plain_adaptor(x, weights, kind):
    """One embedding [D] through an adaptor's weights in the order of its parameters; None leaves it alone."""
    if weights is None:
        return x
    if kind == "linear":
        return weights[0] @ x + weights[1]
    if kind == "residual":
        x = x / (x @ x).sqrt()
    y = weights[2] @ torch.clamp(weights[0] @ x + weights[1], min=0) + weights[3]
    return x + y if kind == "residual" else y


def plain_cosine(a, b):
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def plain_model(images, bank, image_weights, text_weights, kind="mlp", pool="mean"):
    """Cosines of every image [D] with every group of prompts, [B][2C], in float64."""
    group = bank.group.tolist()
    texts = [plain_adaptor(p, text_weights, kind) for p in bank.embeddings.double()]
    members = [[t for t, g in zip(texts, group) if g == wanted] for wanted in range(max(group) + 1)]
    cosines = []
    for x in images:
        v = plain_adaptor(x.double(), image_weights, kind)
        row = []
        for texts in members:
            if pool == "max":
                row.append(max((plain_cosine(v, t) for t in texts), key=lambda cosine: cosine.item()))
            else:
                row.append(plain_cosine(v, texts[0] if pool == "single" else sum(texts) / len(texts)))
        cosines.append(row)
    return cosines


def plain_loss(logits, labels):
    """Mean of -y log p - (1 - y) log(1 - p) over the labels that are known."""
    terms = []
    for row, wanted in zip(logits, labels):
        for z, y in zip(row, wanted):
            if not math.isnan(y):
                p = 1 / (1 + torch.exp(-z))
                terms.append(-torch.log(p if y == 1 else 1 - p))
    return sum(terms) / len(terms)


def small_bank(dim=6, sizes=(2, 1, 3, 2, 1, 1), seed=5, dtype=torch.float32):
    """Prompts of three classes in groups of different sizes and lengths."""
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    embeddings = torch.randn(len(group), dim, generator=torch.Generator().manual_seed(seed))
    lengths = torch.arange(1, len(group) + 1)[:, None] ** 0.5
    return retune.PromptBank((embeddings * lengths).to(dtype), torch.tensor(group))


def random_weights(model, seed=6):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("pool", ["mean", "single", "max"])
@pytest.mark.parametrize("kind, adapt", [
    ("mlp", "both"), ("mlp", "shared"), ("mlp", "image"), ("linear", "both"), ("linear", "text"),
    ("residual", "both")])  # fmt: skip
def test_logits_scores_loss_and_gradients_are_the_plain_float64_ones(kind, adapt, pool, negatives):
    bank = small_bank()
    images = torch.randn(5, 6, generator=torch.Generator().manual_seed(7)) * 3
    labels = torch.tensor([[1, 0, NAN], [0, 1, 1], [NAN, NAN, NAN], [1, 1, 0], [0, NAN, 0]])
    model = random_weights(retune.RETune(6, kind, adapt, pool, negatives, logit_scale=2.5))
    logits = model.logits(images, bank)
    loss = retune.prompt_contrastive_loss(logits, labels)
    loss.backward()

    exact = {p: p.detach().double().requires_grad_() for p in model.parameters()}
    image_weights = [exact[p] for p in model.image_adaptor.parameters()] or None
    text_weights = [exact[p] for p in model.text_adaptor.parameters()] or None
    assert (image_weights is None, text_weights is None) == (adapt == "text", adapt == "image")
    cosines = plain_model(images, bank, image_weights, text_weights, kind, pool)
    plain = [[2.5 * (row[2 * c] - negatives * row[2 * c + 1]) for c in range(3)] for row in cosines]
    plain_loss(plain, labels.tolist()).backward()
    wanted = torch.tensor([[z.item() for z in row] for row in plain], dtype=torch.float64)
    torch.testing.assert_close(logits.double(), wanted, atol=1e-6, rtol=0)
    assert abs(loss.item() - plain_loss(plain, labels.tolist()).item()) <= 1e-6
    for p, wanted in exact.items():
        torch.testing.assert_close(p.grad.double(), wanted.grad, atol=1e-6, rtol=0)
        assert wanted.grad.abs().max() > 1e-3

    for rule in ("diff", "pos"):
        scores, decisions = model.scores(images, bank, rule)
        for i, row in enumerate(cosines):
            for c in range(3):
                positive, negative = row[2 * c].item(), row[2 * c + 1].item()
                difference = rule == "diff" and negatives
                wanted = (positive - negative + 2) / 4 if difference else (positive + 1) / 2
                assert abs(scores[i, c].item() - wanted) <= 1e-6
                assert decisions[i, c].item() == (positive > (negative if negatives else 0))


def test_the_gradient_of_max_pooling_is_the_same_every_time():
    bank, images = small_bank(), torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    model, gradients = random_weights(retune.RETune(6, "linear", "image", "max")), []
    for _ in range(100):
        model.zero_grad()
        model.logits(images, bank).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_prompts_are_averaged_after_the_adaptor_and_before_normalisation():
    """By hand: the mean of (3, 0) and (0, 1) is (1.5, 0.5), of cosine 0.9487 with (1, 0)."""
    bank = retune.PromptBank(torch.tensor([[3.0, 0], [0, 1], [0, -2]]), torch.tensor([0, 0, 1]))
    image = torch.tensor([[2.0, 0.0]])
    for pool, wanted in (("mean", 1.5 / math.sqrt(2.5)), ("single", 1.0), ("max", 1.0)):
        positive, negative = retune.RETune(2, adapt="none", pool=pool)(image, bank)
        assert positive.item() == pytest.approx(wanted, abs=1e-6) and negative.item() == 0
    scores, decisions = retune.RETune(2, adapt="none").scores(image, bank)
    assert scores.item() == pytest.approx((1.5 / math.sqrt(2.5) + 2) / 4, abs=1e-6) and decisions.item() == 1


def test_the_loss_masks_unknown_labels_and_is_zero_when_all_are_unknown():
    logits = torch.tensor([[0.0, 3.0], [50.0, -50.0]], requires_grad=True)
    labels = torch.tensor([[1, NAN], [1, 0]])
    loss = retune.prompt_contrastive_loss(logits, labels)
    assert loss.item() == pytest.approx(math.log(2) / 3, abs=1e-6)
    loss.backward()
    np.testing.assert_allclose(logits.grad, [[-0.5 / 3, 0], [0, 0]], atol=1e-7)
    logits.grad = None
    unknown = retune.prompt_contrastive_loss(logits, torch.full((2, 2), NAN))
    unknown.backward()
    assert unknown.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 2))


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.bfloat16, torch.int64, torch.bool, np.float32, np.int64]
)
def test_the_loss_takes_labels_of_every_kind(kind):
    logits, labels = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9, 3))
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    labels = labels.to(kind) if isinstance(kind, torch.dtype) else labels.numpy().astype(kind)
    found = retune.prompt_contrastive_loss(logits, labels)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_a_bank_cast_to_another_dtype_keeps_its_groups_and_needs_such_a_model():
    bank = retune.PromptBank(torch.randn(400, 3), torch.arange(400))
    cast = bank.to(torch.bfloat16)
    assert cast.embeddings.dtype == torch.bfloat16 and cast.group.dtype == torch.int64
    assert torch.equal(cast.group, bank.group)
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        retune.RETune(3).logits(torch.randn(2, 3), cast)


@pytest.mark.parametrize("group", [[0, 1, 2], [0, 2, 3], [1, 2, 3]])
def test_a_bank_with_an_odd_or_a_missing_group_is_refused(group):
    with pytest.raises(ValueError, match=re.escape(str(group)) + ".*0 to 2C - 1, all used"):
        retune.PromptBank(torch.randn(3, 4), torch.tensor(group))


def test_the_residual_adaptor_starts_at_zero_shot_of_normalised_embeddings():
    bank, images = small_bank(), torch.randn(5, 6) * 4
    unit = torch.nn.functional.normalize(bank.embeddings, dim=1)
    start = retune.RETune(6, "residual").scores(images, bank)
    zero = retune.RETune(6, adapt="none").scores(images, retune.PromptBank(unit, bank.group))
    torch.testing.assert_close(start[0], zero[0], atol=1e-6, rtol=0)
    assert torch.equal(start[1], zero[1])


@pytest.mark.parametrize("kind, adapt, count", [
    ("mlp", "both", 2 * (128 * 256 + 256 + 256 * 128 + 128)),
    ("mlp", "shared", 128 * 256 + 256 + 256 * 128 + 128), ("linear", "image", 128 * 128 + 128),
    ("mlp", "none", 0)])  # fmt: skip
def test_adaptors_have_the_papers_sizes(kind, adapt, count):
    model = retune.RETune(128, kind, adapt)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.image_adaptor is model.text_adaptor) == (adapt == "shared")


def test_whitening_is_its_formula_in_float64():
    x = np.random.default_rng(0).normal(size=(200, 6)) * [9, 3, 1, 1, 0.1, 0.01] + [5, 0, 1, 0, 0, 0]
    whitening = retune.experiment("whitening").Whitening(6)
    whitening.estimate(x.astype(np.float32), np.arange(50, 200))
    unit = x[50:] / np.linalg.norm(x[50:], axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T, bias=True))
    softened = values + values.mean()
    wanted = (unit - unit.mean(0)) @ vectors / np.sqrt(softened) * np.sqrt(6 / (values / softened).sum())
    found = whitening(torch.from_numpy(x[50:]).float()).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-4)
    assert (found**2).sum(1).mean() == pytest.approx(6, abs=1e-3) and abs(found.mean(0)).max() < 1e-4


def test_unknown_kinds_of_model_are_refused():
    for options in ({"adaptor": "lora"}, {"adapt": "neither"}, {"pool": "median"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            retune.RETune(4, **options)


def test_prompts_are_embedded_in_groups_of_class_and_polarity(encoder):
    prompts = {
        "A": {"positive": ["edema", "there is edema"], "negative": ["no edema"]},
        "B": {"positive": ["mass"], "negative": ["no mass", "mass is absent", "no nodule or mass"]},
    }
    bank = retune.embed_prompts(encoder, prompts)
    assert bank.group.tolist() == [0, 0, 1, 2, 3, 3, 3]
    texts = ["edema", "there is edema", "no edema", "mass", "no mass", "mass is absent", "no nodule or mass"]
    torch.testing.assert_close(bank.embeddings, encoder.encode_texts(texts).clone(), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- 7. Scenarios


@st.composite
def training_sets(draw):
    """(labels [N, C] with unknown ones, class names, patients [N], number of different patients)."""
    n, c, patients = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = generator.choice([0, 1, NAN], (n, c), p=[0.5, 0.3, 0.2]).astype(np.float32)
    owners = [f"patient {i}" for i in generator.integers(0, patients, n)]
    return labels, NAMES[:c], owners, len(set(owners))


def assert_parts(tasks, n, owners):
    """Disjoint, complete, in file order, and no patient in two parts."""
    rows = np.concatenate([task.rows for task in tasks])
    assert sorted(rows.tolist()) == list(range(n))
    assert all((np.diff(task.rows) > 0).all() for task in tasks)
    held = [{owners[i] for i in task.rows} for task in tasks]
    assert sum(map(len, held)) == len(set(owners))
    assert max(map(len, held)) - min(map(len, held)) <= 1


@quick
@given(training_sets(), st.integers(1, 25), st.integers(0, 5))
def test_data_incremental_parts_share_no_patient(data, parts, seed):
    labels, names, owners, patients = data
    if parts > patients:
        with pytest.raises(ValueError, match=f"--parts {parts}.* 1 to {patients} parts"):
            retune.make_tasks("data", labels, names, parts, seed, owners)
        return
    tasks = retune.make_tasks("data", labels, names, parts, seed, owners)
    assert len(tasks) == parts and all(task.classes == tuple(range(len(names))) for task in tasks)
    assert_parts(tasks, len(labels), owners)
    again = retune.make_tasks("data", labels, names, parts, seed, owners)
    assert [t.rows.tolist() for t in again] == [t.rows.tolist() for t in tasks]


@quick
@given(training_sets(), st.randoms(use_true_random=False), st.sampled_from(["class", "label"]), st.data())
def test_class_and_label_incremental_tasks_train_the_right_columns(data, rng, scenario, draws):
    labels, names, owners, patients = data
    order = rng.sample(names, len(names))
    parts = draws.draw(st.none() | st.integers(1, len(names)))
    count = parts or len(names)
    if count > patients:
        with pytest.raises(ValueError, match=rf"--parts {count}"):
            retune.make_tasks(scenario, labels, names, parts, 3, owners, order)
        return
    tasks = retune.make_tasks(scenario, labels, names, parts, 3, owners, order)
    assert_parts(tasks, len(labels), owners)
    assert len(tasks) == count
    arrived = []
    for task in tasks:
        new = [c for c in task.classes if c not in arrived]
        assert new and list(task.classes) == (new if scenario == "class" else arrived + new)
        arrived += new
    assert [names[c] for c in arrived] == list(order)
    sizes = [len(task.classes) for task in tasks]
    assert scenario == "label" or max(sizes) - min(sizes) <= 1


@quick
@given(st.integers(1, 60), st.integers(1, 12))
def test_contiguous_parts_are_the_authors_cut_of_ceil_n_over_parts(n, parts):
    labels, size = np.zeros((n, 1), np.float32), math.ceil(n / parts)
    wanted = [list(range(n))[k * size : (k + 1) * size] for k in range(parts)]
    if not all(wanted):
        with pytest.raises(ValueError, match=f"--parts {parts}"):
            retune.make_tasks("data", labels, ["A"], parts, 0, contiguous=True)
        return
    tasks = retune.make_tasks("data", labels, ["A"], parts, 0, contiguous=True)
    assert [task.rows.tolist() for task in tasks] == wanted


@quick
@given(training_sets(), st.sampled_from(["class", "label"]))
def test_positives_only_tasks_hold_all_positives_of_their_new_class(data, scenario):
    labels, names, owners, _ = data
    empty = [name for name, column in zip(names, labels.T) if not (column == 1).any()]
    if empty:
        with pytest.raises(ValueError, match="--parts"):
            retune.make_tasks(scenario, labels, names, None, 0, owners, positives_only=True)
        return
    tasks = retune.make_tasks(scenario, labels, names, None, 0, owners, positives_only=True)
    for c, task in enumerate(tasks):
        assert task.classes == ((c,) if scenario == "class" else tuple(range(c + 1)))
        assert task.rows.tolist() == [i for i in range(len(labels)) if labels[i, c] == 1]


@pytest.mark.parametrize("scenario, options, named", [
    ("sideways", {}, "'sideways' is not data, class, label"), ("data", {"parts": 0}, "--parts 0"),
    ("class", {"parts": 0}, "--parts 0"), ("data", {"positives_only": True}, "--positives-only"),
    ("joint", {"positives_only": True}, "--positives-only"),
    ("class", {"parts": 3}, "--parts 3.* 1 to 2 parts"), ("class", {"order": ["A", "C"]}, "A C .*: A, B"),
    ("class", {"order": ["A"]}, "A, B")])  # fmt: skip
def test_unusable_scenarios_are_refused(scenario, options, named):
    with pytest.raises(ValueError, match=named):
        retune.make_tasks(scenario, np.ones((9, 2)), ["A", "B"], **{"parts": 2, "seed": 0} | options)


def test_the_bounds_and_the_default_cut():
    labels = np.zeros((200, 2), np.float32)
    (joint,) = retune.make_tasks("joint", labels, "AB", 5, 0, range(200))
    assert joint.rows.tolist() == list(range(200)) and joint.classes == (0, 1)
    assert retune.make_tasks("zero", labels, "AB", 5, 0, range(200)) == []
    cuts = [retune.make_tasks("data", labels, "AB", None, seed, range(200)) for seed in range(3)]
    assert {len(tasks) for tasks in cuts} == {5} and {len(t.rows) for tasks in cuts for t in tasks} == {40}
    assert len({tuple(tasks[0].rows) for tasks in cuts}) == 3


# ------------------------------------------------------------------------------------------------- 8. Metrics


def random_results(seed, n=60, c=4, unknown=0.0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, c)) < generator.uniform(0.2, 0.7, c)).astype(np.float32)
    scores = np.round(generator.random((n, c)) + 0.3 * labels, 1 if seed % 2 else 6)
    decisions = (scores > generator.uniform(0.3, 0.9, c)).astype(np.float32)
    labels[generator.random((n, c)) < unknown] = NAN
    return scores, decisions, labels


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_complete_labels_are_scikit_learns(seed):
    scores, decisions, labels = random_results(seed)
    found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    wanted = {"accuracy": sklearn_metrics.accuracy_score(labels, decisions)}
    wanted["ap_macro"] = sklearn_metrics.average_precision_score(labels, scores, average="macro")
    for average in ("macro", "weighted"):
        wanted[f"auroc_{average}"] = sklearn_metrics.roc_auc_score(labels, scores, average=average)
    for name, averages in {
        "f1": ("macro", "weighted"),
        "precision": ("weighted",),
        "recall": ("weighted",),
    }.items():
        for average in averages:
            score = getattr(sklearn_metrics, f"{name}_score")
            wanted[f"{name}_{average}"] = score(labels, decisions, average=average, zero_division=0)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
    assert found["n"] == 60 and list(found["auroc"]) == list(found["f1"]) == list(found["ap"]) == list(
        NAMES[:4]
    )


@pytest.mark.parametrize("seed", range(2))
def test_unknown_labels_are_left_out_class_by_class(seed):
    scores, decisions, labels = random_results(seed, unknown=0.3)
    labels[:5] = NAN
    found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    for c, name in enumerate(NAMES[:4]):
        known = ~np.isnan(labels[:, c])
        y, s, d = labels[known, c], scores[known, c], decisions[known, c]
        assert found["auroc"][name] == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
        assert found["ap"][name] == pytest.approx(sklearn_metrics.average_precision_score(y, s), abs=1e-12)
        assert found["f1"][name] == pytest.approx(sklearn_metrics.f1_score(y, d, zero_division=0), abs=1e-12)
    weights = [np.nansum(labels[:, c]) for c in range(4)]
    wanted = np.average(list(found["auroc"].values()), weights=weights)
    assert found["auroc_weighted"] == pytest.approx(wanted, abs=1e-12)
    whole = ~np.isnan(labels).any(1)
    assert found["accuracy"] == pytest.approx((decisions == labels)[whole].all(1).mean(), abs=1e-12)
    assert found["n"] == (~np.isnan(labels).all(1)).sum() <= 55  # an image without any label is not counted


def test_metrics_of_a_case_counted_by_hand():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], np.float32)
    scores = np.array([[0.9, 0.1], [0.4, 0.5], [0.4, 0.5], [0.1, 0.9]])
    decisions = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    for kind in (np.float32, np.int64, bool):
        found = retune.evaluate(scores, decisions.astype(kind), labels.astype(kind), ["A", "B"])
        assert found["auroc"] == {"A": 3.5 / 4, "B": 3.5 / 4}
        assert found["f1"] == {"A": 0.5, "B": 1.0} and found["f1_macro"] == found["f1_weighted"] == 0.75
        assert found["accuracy"] == 0.5 and found["precision_weighted"] == found["recall_weighted"] == 0.75
        assert found["ap"]["A"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


def test_a_class_of_one_value_is_named_in_a_warning_and_left_out_of_means():
    scores, decisions, labels = random_results(2)
    labels[:, 1], labels[:, 2] = 0, NAN
    with pytest.warns(UserWarning) as caught:
        found = retune.evaluate(scores, decisions, labels, NAMES[:4])
    text = " ".join(str(w.message) for w in caught)
    assert "Mass" in text and "Nodule" in text and "Edema" not in text and "Hernia" not in text
    rest = [0, 3]
    assert all(math.isnan(found[key][name]) for key in ("auroc", "f1", "ap") for name in ("Mass", "Nodule"))
    wanted = sklearn_metrics.roc_auc_score(labels[:, rest], scores[:, rest])
    assert found["auroc_macro"] == pytest.approx(wanted, abs=1e-12)
    with pytest.warns(UserWarning):
        found = retune.evaluate(np.ones((3, 2)), np.ones((3, 2)), np.full((3, 2), NAN), ["A", "B"])
    assert all(math.isnan(found[key]) for key in found if key.endswith(("macro", "weighted", "accuracy")))
    assert all(map(math.isnan, retune.bootstrap_ci(np.ones((3, 2)), np.full((3, 2), NAN), ["p", "q", "q"])))
    assert all(map(math.isnan, retune.bootstrap_ci(np.ones((3, 2)), np.ones((3, 2)), ["p", "q", "q"])))


@pytest.mark.filterwarnings("ignore:Only one class")
def test_the_bootstrap_is_scikit_learns_auroc_over_the_same_patients():
    scores, _, labels = random_results(1, n=50, c=3, unknown=0.2)
    labels[:, 2] = np.where(np.arange(50) < 2, 1, 0)
    patients = np.random.default_rng(9).integers(0, 12, 50).astype(str)
    ids = np.unique(patients).tolist()
    values = []
    for draw in np.random.default_rng(4).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), 40):
        weight, aurocs = np.array([draw[ids.index(p)] for p in patients]), []
        for c in range(3):
            rows = np.flatnonzero(~np.isnan(labels[:, c]) & (weight > 0))
            if len(np.unique(labels[rows, c])) == 2:
                one = sklearn_metrics.roc_auc_score(
                    labels[rows, c], scores[rows, c], sample_weight=weight[rows]
                )
                aurocs.append(one)
        values.append(np.mean(aurocs))
    found = retune.bootstrap_ci(scores, labels, patients, resamples=40, seed=4)
    np.testing.assert_allclose(found, np.percentile(values, [2.5, 97.5]), atol=1e-12)
    assert found[0] < found[1]


def tasks_of(*classes):
    return [retune.Task(f"task {t}", np.arange(3), c) for t, c in enumerate(classes, 1)]


KEYS = ("average_auroc", "forgetting", "backward_transfer", "forward_transfer")
BY_HAND = {  # tasks, A[1..T], A[0], the four measures
    "class": (tasks_of((0,), (1,), (2,)),
              [[0.9, 0.5, 0.5], [0.8, 0.8, 0.6], [0.7, 0.85, 0.9]], [0.6, 0.55, 0.5],
              (2.45 / 3, (0.2 - 0.05) / 2, (-0.2 + 0.05) / 2, ((0.5 - 0.55) + (0.6 - 0.5)) / 2)),
    "data": (tasks_of((0, 1), (0, 1), (0, 1)), [[0.7, 0.6], [0.9, 0.65], [0.8, 0.7]], [0.5, 0.5],
             (0.75, (0.1 - 0.05) / 2, (0.1 + 0.1) / 2, NAN)),
    "label": (tasks_of((1,), (1, 0)), [[0.6, 0.9], [0.8, 0.7]], [0.5, 0.4], (0.75, 0.2, -0.2, 0.1)),
    "unscored": (tasks_of((0,), (1,), (2,)), [[0.9, NAN, 0.5], [0.8, NAN, 0.6], [0.7, NAN, 0.9]],
                 [0.6, NAN, 0.5], (0.8, 0.2, -0.2, 0.1)),
    "joint": (tasks_of((0, 1)), [[0.7, 0.9]], [0.5, 0.5], (0.8, NAN, NAN, NAN)),
    "zero": ([], np.empty((0, 2)), [0.5, 0.7], (0.6, NAN, NAN, NAN)),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_continual_metrics_of_matrices_worked_out_by_hand(name):
    tasks, auroc, zero, wanted = BY_HAND[name]
    found = retune.continual_metrics(np.array(auroc), tasks, np.array(zero))
    assert set(found) == set(KEYS)
    np.testing.assert_allclose([found[key] for key in KEYS], wanted, atol=1e-12)


@quick
@given(st.integers(0, 10000), st.integers(1, 6), st.integers(1, 5))
def test_continual_metrics_follow_their_definitions(seed, n_tasks, n_classes):
    generator = np.random.default_rng(seed)
    grid = generator.random((n_tasks + 1, n_classes))
    first = generator.integers(1, n_tasks + 1, n_classes)
    tasks = tasks_of(*(tuple(np.flatnonzero(first <= t)) for t in range(1, n_tasks + 1)))
    found = retune.continual_metrics(grid[1:], tasks, grid[0])
    last, early = n_tasks, [(c, k) for c, k in enumerate(first) if k < n_tasks]
    values = {
        "average_auroc": list(grid[-1]),
        "forgetting": [max(grid[t, c] for t in range(k, last)) - grid[last, c] for c, k in early],
        "backward_transfer": [grid[last, c] - grid[k, c] for c, k in early],
        "forward_transfer": [grid[k - 1, c] - grid[0, c] for c, k in enumerate(first) if k > 1],
    }
    wanted = [np.mean(values[key]) if values[key] else NAN for key in KEYS]
    np.testing.assert_allclose([found[key] for key in KEYS], wanted, atol=1e-12)


# ------------------------------------------------------------------------------------------------ 9. Training


def train(model, embeddings, labels, tasks, bank=None, **options):
    """The weights after fitting tasks one after the other with one optimiser, as a run does."""
    options = {"epochs": 3, "batch_size": 8, "generator": torch.Generator().manual_seed(11)} | options
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for task in tasks:
        retune.fit(model, bank or small_bank(), embeddings, labels, task, optimizer, **options)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def score(model, embeddings, rows, bank=None):
    return retune.score_rows(model, bank or small_bank(), embeddings, np.asarray(rows), "diff")


def training_data(n=30, dim=6, seed=8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n, 3), generator=generator).float()
    labels[labels == 2] = NAN
    return torch.randn(n, dim, generator=generator).numpy() * 2, labels


def assert_same(first: dict, second: dict, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0, msg=name)


def test_full_batch_training_of_two_tasks_is_plain_adam_in_float64():
    embeddings, labels = training_data()
    model = random_weights(retune.RETune(6))
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]
    tasks = [retune.Task("a", np.arange(0, 20), (0, 2)), retune.Task("b", np.arange(15, 30), (1,))]
    trained = train(model, embeddings, labels, tasks, batch_size=50)

    bank = small_bank()
    first, second = [0.0] * 8, [0.0] * 8
    for step, task in enumerate([tasks[0]] * 3 + [tasks[1]] * 3, 1):
        y = labels[task.rows][:, task.classes].tolist()
        cosines = plain_model(torch.tensor(embeddings[task.rows]), bank, weights[:4], weights[4:])
        loss = plain_loss([[row[2 * c] - row[2 * c + 1] for c in task.classes] for row in cosines], y)
        for i, (w, g) in enumerate(zip(weights, torch.autograd.grad(loss, weights))):
            first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
            mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            w.data -= 1e-2 * mean / (square.sqrt() + 1e-8)
    for found, wanted in zip(trained.values(), weights):
        torch.testing.assert_close(found.double(), wanted.detach(), atol=2e-5, rtol=0)


def test_training_reads_only_the_rows_and_label_columns_of_its_task():
    embeddings, labels = training_data()
    task = retune.Task("t", np.arange(5, 25), (1,))
    wanted = train(random_weights(retune.RETune(6)), embeddings, labels, [task])
    other, wrong = np.full_like(embeddings, NAN), 1 - labels
    other[5:25], wrong[5:25, 1] = embeddings[5:25], labels[5:25, 1]
    assert_same(train(random_weights(retune.RETune(6)), other, wrong, [task]), wanted)


def test_every_epoch_sees_each_row_once_in_a_fresh_order_of_all(tmp_path, monkeypatch):
    embeddings, labels = training_data(n=700)
    embeddings[:, 0] = np.arange(700)
    np.save(tmp_path / "x.npy", embeddings.astype(np.float16))
    model, seen = random_weights(retune.RETune(6)), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x, bank: seen.append(x[:, 0].tolist()) or logits(x, bank))
    task = retune.Task("t", np.arange(0, 700, 2), (0, 1, 2))
    train(model, np.load(tmp_path / "x.npy", mmap_mode="r"), labels, [task], epochs=2, batch_size=50)
    rows = [int(value) for batch in seen for value in batch]
    assert max(map(len, seen)) == 50 and rows[:350] != rows[350:]
    assert sorted(rows[:350]) == sorted(rows[350:]) == list(range(0, 700, 2))
    assert np.mean([np.mean(batch) for batch in seen[:7]]) == pytest.approx(349, abs=1)
    assert np.std([np.mean(batch) for batch in seen[:7]]) < 70, "batches are drawn from the whole task"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pool", ["mean", "single", "max"])
def test_models_of_other_dtypes_train_and_score(dtype, pool):
    embeddings, labels = training_data()
    task, bank = retune.Task("t", np.arange(30), (0, 1, 2)), small_bank(dtype=dtype)
    single, model = (random_weights(retune.RETune(6, "linear", pool=pool)) for _ in range(2))
    train(single, embeddings, labels, [task])
    trained = train(model.to(dtype), embeddings, labels, [task], bank)
    assert {value.dtype for value in trained.values()} == {dtype}
    scores, decisions = score(model, embeddings, range(30), bank)
    assert scores.dtype == decisions.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    np.testing.assert_allclose(scores, score(single, embeddings, range(30))[0], atol=tolerance)


@pytest.mark.parametrize("kind", [torch.float64, torch.int64, torch.bool, np.float32, np.int64, bool])
def test_training_takes_labels_of_every_kind(kind):
    embeddings, labels = training_data()
    labels, tasks = labels.nan_to_num(), [retune.Task("t", np.arange(30), (0, 2))]
    wanted = train(random_weights(retune.RETune(6)), embeddings, labels, tasks)
    labels = labels.to(kind) if isinstance(kind, torch.dtype) else labels.numpy().astype(kind)
    assert_same(train(random_weights(retune.RETune(6)), embeddings, labels, tasks), wanted, 1e-6)


def test_a_boolean_mask_as_rows_is_refused():
    embeddings, labels = training_data()
    mask = np.arange(30) < 10
    with pytest.raises(ValueError, match="rows must be row numbers.*flatnonzero"):
        train(retune.RETune(6), embeddings, labels, [retune.Task("t", mask, (0, 1, 2))])
    with pytest.raises(ValueError, match="rows must be row numbers.*flatnonzero"):
        score(retune.RETune(6), embeddings, mask)


def test_a_task_without_a_known_label_leaves_the_weights():
    embeddings, labels = training_data()
    labels[20:, 1] = NAN
    model = random_weights(retune.RETune(6))
    first, empty = retune.Task("a", np.arange(20), (0,)), retune.Task("b", np.arange(20, 30), (1,))
    wanted = train(random_weights(retune.RETune(6)), embeddings, labels, [first])
    assert_same(train(model, embeddings, labels, [first, empty]), wanted)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights():
    embeddings, labels = training_data()
    embeddings[20] = NAN
    model = random_weights(retune.RETune(6))
    with pytest.raises(retune.InputError, match=r"'Edema', step [1-3]\b.*nan.*--lr"):
        train(model, embeddings, labels, [retune.Task("Edema", np.arange(24), (0,))], epochs=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_models_of_one_seed_are_alike_and_leave_the_global_generator():
    before = torch.get_rng_state()
    models = [retune.build_model(retune.Config(seed=seed), 6, 3).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(models[0], models[1])
    assert not torch.equal(*(next(iter(m.values())) for m in models[1:]))


def test_a_run_repeats_itself_bit_by_bit_and_leaves_global_state_alone(demo_arguments, finished, tmp_path):
    def state():
        generators = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
        return *generators, torch.get_num_threads(), list(warnings.filters), torch.is_grad_enabled()

    before = state()
    cache = ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "again")]
    assert retune.main([*demo_arguments, *cache]) == 0
    assert state() == before
    assert metrics_of(tmp_path / "again") == metrics_of(finished)
    for name in ("splits.csv", "table.md", "auroc.png", "f1.png", *model_bytes(finished)):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_training_leaves_the_encoder_as_it_was(demo_arguments, encoder_folder, tmp_path, monkeypatch):
    encoder, load = retune.DualEncoder.load(str(encoder_folder)), retune.DualEncoder.load
    monkeypatch.setattr(retune.DualEncoder, "load", lambda *_: encoder)
    assert retune.main([*demo_arguments, "--lr", "0.1", "--output", str(tmp_path / "run")]) == 0
    assert_same(encoder.state_dict(), load(str(encoder_folder)).state_dict())
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    saved, _ = retune.load_tensors(tmp_path / "run/adaptors.safetensors")
    start = retune.build_model(retune.Config(), 16, 5).state_dict()
    assert all(not torch.equal(saved[name], value) for name, value in start.items())


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(demo_arguments, finished, monkeypatch, capsys):
    arguments, trained, fit = [*demo_arguments, "--output", "run"], [], retune.fit

    def interrupted(*positional, **options):
        trained.append(positional[4].name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return fit(*positional, **options)

    monkeypatch.setattr(retune, "fit", interrupted)
    assert retune.main(arguments) == 130 and not Path("run/metrics.json").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "same command" in error and "Traceback" not in error
    assert retune.main(arguments) == 0 and len(trained) == 4, "the first two tasks are not trained again"
    assert metrics_of(Path("run")) == metrics_of(finished)
    assert model_bytes(Path("run")) == model_bytes(finished)
    assert retune.main(arguments) == 0 and len(trained) == 4


def test_a_folder_of_another_run_says_what_differs(csv_set, tmp_path, capsys):
    root, rows, arguments = csv_set
    prompts = tmp_path / "prompts.json"
    shutil.copy(ROOT / "prompts.json", prompts)
    arguments += ["--prompts", str(prompts)]
    assert retune.main(arguments) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = save_random_encoder(tmp_path / "other", seed=1)
    for options, named in (
        (["--epochs", "3"], ["epochs 1", "now 3"]), (["--seed", "28"], ["seed 27", "now 28"]),
        (["--lr", "0.5", "--pool", "max"], ["lr 0.001", "0.5", "pool mean", "max"]),
        (["--encoder", other], ["encoder"])):  # fmt: skip
        line = read_failure(capsys, [*arguments, *options])
        assert all(text in line for text in [str(tmp_path / "run"), "another run", *named]), line
    prompts.write_text(prompts.read_text().replace("pulmonary edema", "edema of the lungs"))
    line = read_failure(capsys, arguments)
    assert "prompt_texts" in line and "ulmonary edema" in line and "edema of the lungs" in line
    shutil.copy(ROOT / "prompts.json", prompts)
    rows[2]["Mass"] = str(1 - int(rows[2]["Mass"]))
    write_rows(root / "labels.csv", rows)
    assert "labels changed" in read_failure(capsys, arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def saved_weights(folder, kind, n_classes):
    """The image and the text adaptor of a run, each as float64 weights in the order of its parameters."""
    tensors, _ = retune.load_tensors(folder / "adaptors.safetensors")
    names = list(retune.build_model(retune.Config(adaptor=kind), 16, n_classes).state_dict())
    assert sorted(names) == sorted(tensors)
    return [[tensors[n].double() for n in names if n.startswith(tower)] for tower in ("image", "text")]


@pytest.mark.parametrize("scenario, adaptor, rule", [("class", "residual", "pos"), ("zero", "mlp", "diff")])
def test_predict_gives_the_runs_own_scores(csv_set, encoder, capsys, scenario, adaptor, rule):
    """A `zero` run has trained nothing: it predicts zero-shot."""
    root, rows, arguments = csv_set
    run, rows = root.parent / "run", [row for row in rows if row["split"] == "test"]
    options = ["--scenario", scenario, "--adaptor", adaptor, "--score", rule, "--lr", "0.05"]
    assert retune.main([*arguments, *options]) == 0
    images = [str(root / row["path"]) for row in rows]
    capsys.readouterr()
    assert retune.main(["--predict", *images, "--run", str(run), "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [p["image"] for p in predictions] == images
    weights = saved_weights(run, adaptor, 2) if scenario == "class" else (None, None)
    bank = retune.embed_prompts(encoder, retune.load_prompts(ROOT / "prompts.json", ["Edema", "Mass"]))
    pixels = torch.stack([encoder.transform(retune.read_image(Path(image))) for image in images])
    cosines = np.array(plain_model(encoder.encode_images(pixels), bank, *weights, adaptor))
    positive, negative = cosines[:, 0::2], cosines[:, 1::2]
    wanted = (positive + 1) / 2 if rule == "pos" else (positive - negative + 2) / 4
    found = [list(p["findings"].values()) for p in predictions]
    scores = np.array([[finding["score"] for finding in row] for row in found])
    np.testing.assert_allclose(scores, wanted, atol=2e-6)
    assert [[finding["present"] for finding in row] for row in found] == (positive > negative).tolist()
    measured = [read_metrics(run)["zero_shot"], *read_metrics(run)["after_task"]][-1]["test"]
    labels = np.array([[int(row["Edema"]), int(row["Mass"])] for row in rows])
    assert measured["auroc_macro"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=0.05)
    assert retune.main(["--predict", *images, "--run", str(run)]) == 0
    table = capsys.readouterr().out
    shown = [finding.get("probability", finding["score"]) for row in found for finding in row]
    assert all(f"{value:.3f}" in table for value in shown)


def test_predict_refuses_what_does_not_fit_and_skips_bad_images_if_asked(csv_set, tmp_path, capsys):
    root, rows, arguments = csv_set
    assert retune.main(arguments) == 0
    good, bad, run = str(root / rows[0]["path"]), tmp_path / "bad.png", root.parent / "run"
    bad.write_bytes(b"nothing")
    other = save_random_encoder(tmp_path / "other", seed=2)
    for words, named in (
        ([good, "--run", run, "--encoder", other], "encoder"), ([good, "--run", "nowhere"], "nowhere"),
        ([good, "none.png", "--run", run], "none.png"), ([good, bad, "--run", run], "bad.png"),
    ):  # fmt: skip
        assert named in read_failure(capsys, ["--predict", *words])
    capsys.readouterr()
    assert retune.main(["--predict", str(bad), good, "--run", str(run), "--json", "--skip-bad-images"]) == 0
    unread, read = json.loads(capsys.readouterr().out)
    assert unread["image"] == str(bad) and "bad.png" in unread["error"] and read["image"] == good
    path = run / "adaptors.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    assert "adaptors.safetensors" in read_failure(capsys, ["--predict", good, "--run", run])


# ------------------------------------------------------------------------------------------------- 10. Report


def test_metrics_json_follows_from_the_saved_adaptors(demo_arguments, finished, encoder):
    """Everything recomputed from the files in plain float64: adaptors, cached embeddings, prompts."""
    metrics = read_metrics(finished)
    cache = Path(demo_arguments[demo_arguments.index("--cache-dir") + 1])
    data = retune.load_radiographs(retune.Config(demo_images=240))
    embeddings = retune.embed(encoder, data, cache)
    bank = retune.embed_prompts(
        encoder, retune.load_prompts(ROOT / "prompts.json", retune.COMPETITION_FINDINGS)
    )
    rows = data.where("test")
    for weights, stage in (
        ((None, None), metrics["zero_shot"]), (saved_weights(finished, "mlp", 5), metrics["after_task"][-1]),
    ):  # fmt: skip
        cosines = plain_model(torch.tensor(embeddings[rows]), bank, *weights)
        scores = np.array([[row[2 * c].item() - row[2 * c + 1].item() for c in range(5)] for row in cosines])
        assert stage["test"]["n"] == len(rows)
        low, high = stage["test"]["auroc_macro_ci"]
        assert low < stage["test"]["auroc_macro"] < high
        for c, name in enumerate(retune.COMPETITION_FINDINGS):
            auroc = sklearn_metrics.roc_auc_score(data.labels[rows, c], scores[:, c])
            assert stage["test"]["auroc"][name] == pytest.approx(auroc, abs=2e-3), name
            f1 = sklearn_metrics.f1_score(data.labels[rows, c], scores[:, c] > 0, zero_division=0)
            assert stage["test"]["f1"][name] == pytest.approx(f1, abs=2e-2), name
    stages = [metrics["zero_shot"], *metrics["after_task"]]
    grid = np.array([list(stage["test"]["auroc"].values()) for stage in stages])
    tasks = tasks_of(
        *(tuple(retune.COMPETITION_FINDINGS.index(c) for c in task["classes"]) for task in metrics["tasks"])
    )
    wanted = retune.continual_metrics(grid[1:], tasks, grid[0])
    assert metrics["continual"] == pytest.approx(wanted, abs=1e-12) and len(tasks) == 3
    assert metrics["cost"]["trainable_parameters"] == 2 * (16 * 32 + 32 + 32 * 16 + 16)


def test_splits_csv_gives_every_image_its_patient_split_and_task(finished):
    data = retune.load_radiographs(retune.Config(demo_images=240))
    table = retune.read_table(finished / "splits.csv", ["image", "patient", "split", "task"])
    assert list(table["image"]) == list(data.names) and list(table["patient"]) == list(data.patients)
    homes = {}
    for patient, split, task in zip(table["patient"], table["split"], table["task"]):
        assert homes.setdefault(patient, (split, task)) == (split, task)
        assert (task in ("1", "2", "3")) == (split == "train")
    counts = [list(table["task"]).count(str(k)) for k in (1, 2, 3)]
    assert counts == [task["n_train"] for task in read_metrics(finished)["tasks"]]
    assert sum(counts) == len(data.where("train"))


def test_table_and_heatmap_hold_the_numbers_of_metrics_json(finished, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    metrics, table, texts = read_metrics(finished), (finished / "table.md").read_text(), {}
    draw = Axes.text

    def remember(self, x, y, text, **options):
        texts[round(y), round(x)] = text
        return draw(self, x, y, text, **options)

    monkeypatch.setattr(Axes, "text", remember)
    retune.heatmap(tmp_path / "a.png", metrics, "auroc", "test AUROC", 0.5)
    for t, stage in enumerate((metrics["zero_shot"], *metrics["after_task"])):
        row = [f"{value:.3f}" for value in stage["test"]["auroc"].values()]
        assert " | ".join([*row, f"{stage['test']['auroc_macro']:.3f}"]) in " ".join(table.split()), row
        assert [texts[t, c] for c in range(5)] == row
    low, high = metrics["after_task"][-1]["test"]["auroc_macro_ci"]
    for value in (low, high, *(v for v in metrics["continual"].values() if v is not None)):
        assert f"{value:.3f}" in table
    assert "not clinical" in table
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 10


def test_several_seeds_give_mean_and_deviation_of_their_runs(demo_arguments, tmp_path, capsys):
    seeds = [*demo_arguments, "--seed", "1", "2", "3", "--scenario", "joint", "--no-figures", "--output"]
    assert "{seed}" in read_failure(capsys, [*seeds, tmp_path / "runs"])
    assert retune.main([*seeds, str(tmp_path / "runs" / "{seed}")]) == 0
    last_lines = capsys.readouterr().out.strip().splitlines()[-6:]
    runs = [read_metrics(tmp_path / "runs" / str(seed)) for seed in (1, 2, 3)]
    assert [m["config"]["seed"] for m in runs] == [1, 2, 3]
    for key in ("auroc_macro", "f1_macro", "accuracy"):
        values = np.array([m["after_task"][-1]["test"][key] for m in runs])
        assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in "\n".join(last_lines)
    assert len({m["after_task"][-1]["test"]["auroc_macro"] for m in runs}) == 3


# ------------------------------------------------------------------------------------------- 11. Command line


@pytest.mark.parametrize("options, named", [
    ("--data-dir nowhere", "--data-dir nowhere"), ("--labels-csv none.csv", "none.csv"),
    ("--data demo", "--data-dir"), ("--classes Edema Mas", "'Mas': did you mean 'Mass'"),
    ("--classes Edema Edema", "--classes"), ("--class-order Mass", "--class-order"),
    ("--class-order Mass Edemaa", "--class-order Mass Edemaa"), ("--scenario data --parts 7", "--parts 7"),
    ("--parts 0", "--parts 0"), ("--scenario data --positives-only", "only"), ("--lr -1", "--lr"),
    ("--lr nan", "--lr nan"), ("--epochs 0", "--epochs 0"), ("--batch-size 0", "--batch-size 0"),
    ("--seed -1", "--seed -1"), ("--workers -1", "--workers -1"), ("--device abacus", "--device abacus"),
    ("--encoder nowhere/encoder", "nowhere/encoder"), ("--prompts none.json", "none.json"),
    ("--view pa", "--view pa"), ("--output labels.txt/run", "--output labels.txt/run"),
    ("--scenario data --class-order Mass Edema", "is for"), ("--part-order a", "--part-order a goes with"),
    ("--output runs/{nonsense}", "--output runs/{nonsense}"), ("--method nonsense", "--method 'nonsense'"),
    ("--method nonsense:Class", "nonsense:Class"), ("--method pathlib:Path", "--method pathlib:Path"),
    ("--set memory=5", "--set memory=5")])  # fmt: skip
def test_bad_options_exit_2_with_the_option_and_the_value(csv_set, capsys, options, named):
    Path("labels.txt").write_text("a file where a folder should be")
    assert named in read_failure(capsys, [*csv_set[2], *options.split()])


@pytest.mark.parametrize(
    "words", ["--scenario sideways", "--predict a.png", "--epochs ten", "--run x", "--convert a"]
)
def test_argparse_errors_exit_2_too(words):
    with pytest.raises(SystemExit, match="2"):
        retune.main(words.split())


def test_warnings_are_one_line_without_source_code(csv_set, capsys):
    root, rows, arguments = csv_set
    for row in rows:
        row["Mass"] = "1" if row["split"] == "test" else row["Mass"]
    write_rows(root / "labels.csv", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert retune.main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "warn" in line]
    (line,) = lines
    assert line.startswith("warning: Mass") and ".py" not in line


@pytest.mark.parametrize("options, tasks", [
    ("--scenario data --parts 4 --adapt shared", 4), ("--scenario zero", 0),
    ("--scenario label --pool max --class-order random --whiten", 5),
    ("--scenario joint --no-negatives --score pos --optimizer sgd", 1),
    ("--scenario class --positives-only --parts 5 --adaptor linear --adapt image", 5),
    ("--scenario data --contiguous --parts 3 --pool single --adapt text", 3),
    ("--scenario joint --adaptor residual --logit-scale 10 --classes Edema --wording generic", 1),
])  # fmt: skip
def test_every_switch_runs_end_to_end(demo_arguments, tmp_path, options, tasks):
    arguments = [*demo_arguments[: demo_arguments.index("--scenario")], "--no-figures", "--epochs", "1"]
    assert retune.main([*arguments, *options.split(), "--output", str(tmp_path / "run")]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics["after_task"]) == len(metrics["tasks"]) == tasks
    last = [metrics["zero_shot"], *metrics["after_task"]][-1]
    assert all(0 <= value <= 1 for value in last["test"]["auroc"].values())
    assert len(list((tmp_path / "run").glob("task_*.safetensors"))) == tasks


def test_bf16_without_the_instructions_is_said_in_one_line(csv_set, capsys, monkeypatch):
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *_, read=Path.read_text, **o: (
            "flags: fpu" if str(self) == "/proc/cpuinfo" else read(self, **o)
        ),
    )
    assert retune.main([*csv_set[2], "--precision", "bf16", "--scenario", "zero"]) == 0
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if "bf16" in line and "fp32" in line]
    assert "several times" in line


# ------------------------------------------------------------------------------------------------ 12. Helpers


def test_atomic_leaves_nothing_behind_when_the_disk_is_full(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(OSError), retune.atomic(target) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]
    with pytest.raises(KeyError), retune.atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        raise KeyError
    assert os.listdir(tmp_path) == ["file.json"], "a folder appears whole or not at all"


def test_written_json_is_strict_and_keeps_every_number(tmp_path):
    value = {"a": [1, 0.1, NAN, math.inf], "b": {"c": np.float64(2.5), "d": np.int64(3)}, 4: ("x", None)}
    retune.write_json(tmp_path / "metrics.json", value)
    wanted = {"a": [1, 0.1, None, None], "b": {"c": 2.5, "d": 3}, "4": ["x", None]}
    assert read_metrics(tmp_path) == retune.read_json(tmp_path / "metrics.json") == wanted


def test_a_second_process_on_one_output_folder_is_refused(demo_arguments, tmp_path, capsys):
    arguments = [*demo_arguments, "--output", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with retune.locked(tmp_path / "run", wait=False):
        assert "another process" in read_failure(capsys, arguments)
