"""Methods against plain versions: baselines, streaming rivals, the closed form, and a user's own plug-in."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils import parameters_to_vector

import retune
from experiments import METHODS, baselines
from experiments.analytic import LAMBDAS, Analytic
from experiments.baselines import EWC, MLP, Distil, LwF, Replay, fisher_diagonal
from experiments.common import Grams, SolvedBank, zero_shot_logits
from experiments.streaming import L3A, NCM, SLDA, RanPAC
from experiments.whitening import Whitening
from retune import Config, InputError, PromptBank, RETune, Task
from tests.conftest import ROOT

DIM, CLASSES, N = 6, 3, 120
PARTS = list(enumerate(np.arange(90).reshape(3, 30)))
CLASS_TASKS = [Task(f"class {t}", rows, (t,)) for t, rows in PARTS]
DATA_TASKS = [Task(f"part {t}", rows, (0, 1, 2)) for t, rows in PARTS]
LABEL_TASKS = [Task(f"label {t}", rows, tuple(range(t + 1))) for t, rows in PARTS]
TASKS = {"class": CLASS_TASKS, "data": DATA_TASKS, "label": LABEL_TASKS}
EMBEDDINGS = np.random.default_rng(0).normal(0.7, 1, size=(N, DIM)).astype(np.float32)
X = torch.from_numpy(EMBEDDINGS)
NOISE = np.random.default_rng(1).normal(size=(N, CLASSES))
LABELS = torch.from_numpy((EMBEDDINGS[:, :CLASSES] - 0.7 + NOISE > 0).astype(np.float32))
LABELS[[3, 12, 40, 70], [1, 1, 0, 2]] = torch.nan
PROMPTS = torch.from_numpy(np.random.default_rng(2).normal(size=(4 * CLASSES, DIM)).astype(np.float32))
BANK = PromptBank(PROMPTS, torch.arange(2 * CLASSES).repeat_interleave(2))
COSINES = RETune(DIM, adapt="none").logits(X, BANK)  # zero-shot


def make(method, whiten=False, **options):
    """A method, whitened by the first 30 embeddings if asked."""
    torch.manual_seed(0)
    model = method(DIM, CLASSES, **options)
    if whiten:
        model.whitening = Whitening(DIM)
        model.whitening.estimate(EMBEDDINGS, np.arange(30))
    return model


def learn(model, tasks, labels=LABELS):
    """Every hook around the training of each task, as a run does it."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1) if parameters else None
    for task in tasks:
        seen, known = model.before_task(task, labels, BANK)
        if optimizer:
            options = {"epochs": 2, "batch_size": 8, "generator": torch.Generator().manual_seed(0)}
            retune.fit(model, BANK, EMBEDDINGS, known, seen, optimizer, **options)
        model.after_task(EMBEDDINGS, labels, task, BANK)
    return model


def known_rows(tasks, c):
    """Rows [n] of a finding with a known label, in the order of arrival."""
    rows = np.concatenate([task.rows for task in tasks if c in task.classes])
    return rows[~LABELS[rows, c].isnan().numpy()]


FEW = {"ranpac": {"features": 20}, "l3a": {"features": 20}, "analytic": {"features": 20}}


def make_named(name):
    """A method by name, whitened; `joint` learns as fast as a test wants it."""
    model = make(retune.load_method(name)[0], True, **FEW.get(name, {}))
    model.settings = {"lr": 0.02, "batch_size": 16}
    return model


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_state_dict_predicts(name):
    model = make_named(name)
    images = model.whitening(X)
    before = model.logits(images, BANK)
    learn(model, CLASS_TASKS)
    scores, decisions = model.scores(images, BANK, "diff")
    assert scores.shape == decisions.shape == (N, CLASSES)
    assert ((scores >= 0) & (scores <= 1)).all() and set(decisions.unique().tolist()) <= {0.0, 1.0}
    assert (model.logits(images, BANK) - before).abs().max() > 1e-3
    copy = make_named(name)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.logits(images, BANK), model.logits(images, BANK))


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_all_that_learning_on_needs(name):
    whole = learn(make_named(name), LABEL_TASKS[:2])
    resumed = make_named(name)
    resumed.load_state_dict(whole.state_dict())
    resumed.load_memory({key: tensor.clone() for key, tensor in whole.memory().items()})
    for model in (whole, resumed):
        learn(model, LABEL_TASKS[2:])
    expected = dict(whole.state_dict()) | whole.memory()
    found = dict(resumed.state_dict()) | resumed.memory()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_scoring_switches_dropout_off():
    model = make(MLP)
    model.network.append(torch.nn.Dropout(0.5))
    first, second = (retune.score_rows(model.train(), BANK, EMBEDDINGS, np.arange(N), "diff") for _ in "ab")
    assert np.array_equal(first, second)


def test_fisher_is_the_expected_squared_gradient():
    model = make(MLP)
    expected = torch.zeros(sum(p.numel() for p in model.parameters()))
    for row, c, y in np.ndindex(15, 2, 2):  # the expectation over LABELS, written out
        if not LABELS[row, c].isnan():
            logit = model.logits(X[row])[c]
            weight = torch.sigmoid(logit if y else -logit).item()
            loss = F.binary_cross_entropy_with_logits(logit, torch.tensor(float(y)))
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            expected += weight * parameters_to_vector(gradients).square()
    fisher = fisher_diagonal(model.network, X[:15].clone(), ~LABELS[:15].isnan(), (0, 1))
    torch.testing.assert_close(fisher, expected, rtol=1e-4, atol=1e-9)


def test_ewc_penalty_is_a_parabola_around_the_last_task():
    model = learn(make(EWC), CLASS_TASKS[:1])
    model.before_task(CLASS_TASKS[1], LABELS, BANK)
    assert model.penalty(None, None) == 0 and model.fisher.sum() > 0
    with torch.no_grad():
        model.network[1].bias[0] += 0.5
    position = DIM * 2 * DIM * 2 + 3 * DIM + CLASSES * DIM  # of that bias among all parameters
    assert parameters_to_vector(model.parameters())[position] == model.network[1].bias[0]
    torch.testing.assert_close(model.penalty(None, None), 50.0 * model.fisher[position] * 0.25)


def test_lwf_pulls_towards_the_old_model_on_old_findings_alone():
    model, x = make(LwF), X
    model.before_task(CLASS_TASKS[0], LABELS, BANK)
    assert model.penalty(x, model.logits(x)) == 0.0
    learn(model, CLASS_TASKS[:1])
    model.before_task(CLASS_TASKS[1], LABELS, BANK)
    old = model.logits(x).detach()
    logits = old.clone().requires_grad_()
    model.penalty(x, logits).backward()  # lowest at the old model
    torch.testing.assert_close(logits.grad, torch.zeros_like(old), atol=1e-7, rtol=0)
    with torch.no_grad():
        model.network[1].bias += 1.0
    p = torch.sigmoid(old[:, 0] / 2)
    q = torch.sigmoid((old[:, 0] + 1) / 2)
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(model.penalty(x, model.logits(x)), expected)


def test_remembered_images_keep_the_labels_they_came_with():
    model = make(Replay, memory=7)
    for task in CLASS_TASKS[:2]:
        model.after_task(EMBEDDINGS, LABELS, task, BANK)
    seen, known = model.before_task(CLASS_TASKS[2], LABELS, BANK)
    kept = seen.rows[seen.rows < 60]
    assert len(kept) == 7 and set(CLASS_TASKS[2].rows) < set(seen.rows)
    brought = torch.zeros(N, CLASSES, dtype=torch.bool)
    brought[seen.rows, seen.rows // 30] = True
    torch.testing.assert_close(known, torch.where(brought, LABELS, torch.nan), equal_nan=True)
    assert model.stored_bytes() == len(kept) * 4 * (DIM + CLASSES)
    assert set(model.memory()) == {"rows"} and model.memory()["rows"].dtype == torch.int64


def test_replay_memory_is_one_sample_for_any_number_of_tasks():
    stepwise, at_once = make(Replay, memory=9), make(Replay, memory=9)
    for task in CLASS_TASKS:
        stepwise.after_task(EMBEDDINGS, LABELS, task, BANK)
    at_once.after_task(EMBEDDINGS, LABELS, Task("all", np.arange(90), (0,)), BANK)
    assert torch.equal(stepwise.rows[:, 0], at_once.rows[:, 0])
    with pytest.raises(InputError, match="memory=0"):
        make(Replay, memory=0)


def test_bound_stops_without_a_positive(monkeypatch):
    """The loss of a held-out tenth whose labels are all 0 falls for ever."""
    fits = []
    monkeypatch.setattr(baselines, "fit", lambda *_, **__: fits.append(len(fits)))
    monkeypatch.setattr(baselines, "prompt_contrastive_loss", lambda *_: torch.tensor(1 / (1 + len(fits))))
    model = baselines.Joint(4, 1, seed=0)
    model.settings = {"lr": 1e-3, "batch_size": 8}
    task = Task("all", np.arange(40), (0,))
    bank = type("Bank", (), {"embeddings": torch.zeros(1, 4)})()
    model.after_task(np.zeros((40, 4), np.float32), torch.zeros(40, 1), task, bank)
    assert len(fits) == 2 * baselines.Joint.MOST_EPOCHS


def test_distil_holds_untrained_findings_to_the_old_model():
    model = learn(make(Distil, True), CLASS_TASKS[:1])
    model.before_task(CLASS_TASKS[1], LABELS, BANK)
    x = model.whitening(X)
    old = model.logits(x, BANK).detach()
    with torch.no_grad():
        model.image_adaptor.layers[2].bias += 0.3
    new = model.logits(x, BANK)
    p, q = old[:, [0, 2]].sigmoid(), new[:, [0, 2]].sigmoid()
    expected = -3 * (p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(model.penalty(x, new), expected)
    model.before_task(Task("all", np.arange(9), (0, 1, 2)), LABELS, BANK)
    assert model.penalty(x, new) == 0.0


def test_gram_per_pattern_equals_one_per_finding():
    rng = np.random.default_rng(0)
    f, w = torch.from_numpy(rng.normal(size=(90, 4))), torch.from_numpy(rng.random(90))
    y = torch.from_numpy(rng.integers(0, 2, (90, 3))).double()
    y[torch.from_numpy(rng.random(90) < 0.3), :2] = torch.nan
    grams = Grams.zeros(4, 3)
    for part in torch.arange(90).split(25):
        grams.add(f[part], y[part], w[part])
    assert len(grams.gram) == 2  # findings 0 and 1 are always known together
    for c in range(3):
        k = ~y[:, c].isnan()
        expected = f[k].T @ (w[k, None] * f[k])
        torch.testing.assert_close(grams.gram[grams.group[c]], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scenario", TASKS)
def test_ncm_is_the_difference_of_two_cosines(scenario):
    model = learn(make(NCM), TASKS[scenario])
    x = X.double()
    for c in range(CLASSES):
        rows = known_rows(TASKS[scenario], c)
        y = LABELS[rows, c].numpy()
        means = [x[rows[y == value]].mean(0) for value in (0, 1)]
        negative, positive = (F.cosine_similarity(x, mean[None]) for mean in means)
        found = model.logits(X)[:, c].double()
        torch.testing.assert_close(found, positive - negative, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scenario", TASKS)
def test_slda_is_its_recursion_image_by_image(scenario):
    model = learn(make(SLDA), TASKS[scenario])
    x = X.double()
    for c in range(CLASSES):
        S, mean, count = torch.zeros(DIM, DIM).double(), torch.zeros(2, DIM).double(), [0, 0]
        for row in known_rows(TASKS[scenario], c):
            y, n = int(LABELS[row, c]), sum(count)
            d = x[row] - mean[y] if count[y] else torch.zeros(DIM).double()
            S = (n * S + n / (n + 1) * d.outer(d)) / (n + 1)
            mean[y] = (count[y] * mean[y] + x[row]) / (count[y] + 1)
            count[y] += 1
        P = torch.linalg.pinv((1 - 1e-5) * S + 1e-5 * torch.eye(DIM))
        constant = (mean[1] @ P @ mean[1] - mean[0] @ P @ mean[0]) / 2
        expected = x @ P @ (mean[1] - mean[0]) - constant + math.log(count[1] / count[0])
        found = model.logits(X)[:, c].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scenario", TASKS)
def test_ranpac_is_ridge_on_random_features(scenario):
    model = learn(make(RanPAC, features=20), TASKS[scenario])
    x = X.double()
    h = torch.cat([(x @ model.projection.double()).relu(), torch.ones(N, 1)], 1)
    fold = torch.from_numpy(np.random.default_rng(0).random(N) < 0.2)
    for c in range(CLASSES):
        rows = torch.from_numpy(known_rows(TASKS[scenario], c))
        last = [task for task in TASKS[scenario] if c in task.classes][-1]
        out = rows[fold[rows] & torch.isin(rows, torch.from_numpy(last.rows))]
        others = rows[~torch.isin(rows, out)]
        y = LABELS[:, c].double()
        ridges = [10.0**k for k in range(-8, 9)]
        errors = [(h[out] @ plain_ridge(h[others], y[others], r) - y[out]).square().sum() for r in ridges]
        ridge = ridges[int(torch.stack(errors).argmin())]
        assert model.ridges[c] == pytest.approx(ridge)
        expected = 4 * (h @ plain_ridge(h[rows], y[rows], ridge) - 0.5)
        found = model.logits(X)[:, c].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def plain_ridge(f, y, ridge, centre=0.0):
    """argmin |y - F w|^2 + ridge |w - centre|^2 as least squares on stacked rows."""
    eye = ridge**0.5 * torch.eye(f.shape[1]).double()
    target = torch.cat([y, eye @ (centre * torch.ones(f.shape[1]).double())])
    return torch.linalg.lstsq(torch.cat([f, eye]), target[:, None], driver="gelsd").solution[:, 0]


def test_ranpac_with_zero_shot_for_unseen_findings():
    for whiten in (False, True):
        model = make(RanPAC, whiten, features=20, zero_shot=1)
        learn(model, CLASS_TASKS[:1])
        images = model.whitening(X)
        torch.testing.assert_close(model.logits(images, BANK)[:, 1:], COSINES[:, 1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(zero_shot_logits(model, images, BANK), COSINES, atol=1e-5, rtol=0)
        solved = SolvedBank(BANK, model.whitening) if whiten else BANK
        assert torch.equal(model.logits(images, solved), model.logits(images, BANK))
        assert (model.logits(images, BANK)[:, 0] - COSINES[:, 0]).abs().max() > 0.1


def test_l3a_is_weighted_ridge_with_pseudo_labels():
    model = make(L3A, features=20, ridge=0.1)
    x = X.double()
    h = torch.cat([(x @ model.projection.double()).relu(), torch.ones(N, 1)], 1)
    W, positives, seen = torch.zeros(CLASSES, 21).double(), torch.zeros(CLASSES).double(), []
    G = torch.zeros(CLASSES, 21, 21).double()
    b = torch.zeros(CLASSES, 21).double()
    for task in CLASS_TASKS:
        (new,) = task.classes
        positives[new] += float((LABELS[task.rows, new] == 1).sum())
        rarity = [positives[c] ** -0.5 if c in (*seen, new) else torch.tensor(0.0) for c in range(CLASSES)]
        rarity = [r * (len(seen) + 1) / sum(rarity) for r in rarity]
        for row in task.rows:
            y = {c: float(torch.sigmoid(h[row] @ W[c]) > 0.7) for c in seen}
            if not LABELS[row, new].isnan():
                y[new] = float(LABELS[row, new])
            found = [c for c in y if y[c] == 1]
            weight = sum(rarity[c] for c in found) / len(found) if found else 1.0
            for c, value in y.items():
                G[c] += weight * h[row].outer(h[row])
                b[c] += weight * value * h[row]
        seen.append(new)
        W = torch.stack([torch.linalg.solve(G[c] + 0.1 * torch.eye(21), b[c]) for c in range(CLASSES)])
        learn(model, [task])
        torch.testing.assert_close(model.weights.double(), W, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ closed form
def plain_posterior(f, y, centres, lam):
    """(weights, log evidence, a) of centres [R, P] with matrices of n x n, in float64."""
    n = len(y)
    C = torch.eye(n).double() + f @ f.T / (n * lam)
    u = f @ centres.T
    a = torch.linalg.solve(u.T @ torch.linalg.solve(C, u), u.T @ torch.linalg.solve(C, y)).clamp_min(0)
    r = y - u @ a
    evidence = -n / 2 * (r @ torch.linalg.solve(C, r) / n).log() - torch.linalg.slogdet(C)[1] / 2
    return plain_ridge(f, y, n * lam, a @ centres), evidence, a


@pytest.mark.parametrize("features", [0, 8, 200])
def test_weights_and_evidence_equal_plain_ridge(features):
    model = learn(make(Analytic, True, features=features), CLASS_TASKS)
    related = learn(make(Analytic, True, features=features, related=1), CLASS_TASKS)
    x = F.normalize(X.double(), dim=-1)
    f = model.features((x - model.whitening.mean.double()) @ model.whitening.matrix.double())
    prior = model.zero_shot(BANK)
    prior[:, -1] = 0
    chosen = int(sum(model.solved[c][0] for c in range(CLASSES)).argmax())
    second = []
    for c in range(CLASSES):
        rows = known_rows(CLASS_TASKS, c)
        y = 2 * LABELS[rows, c].double() - 1
        plain = [plain_posterior(f[rows], y, prior[c, None], float(lam)) for lam in LAMBDAS]
        evidence, weights = model.solved[c]
        torch.testing.assert_close(evidence, torch.stack([p[1] for p in plain]), atol=1e-8, rtol=1e-9)
        for i in range(0, len(LAMBDAS), 6):
            torch.testing.assert_close(weights[i], plain[i][0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(model.weights[c].double(), plain[chosen][0], atol=1e-6, rtol=1e-5)
        others = sum(model.solved[k][1][chosen] for k in range(CLASSES) if k != c) / (CLASSES - 1)
        centres = torch.stack([prior[c], others])
        second.append([plain_posterior(f[rows], y, centres, float(lam)) for lam in LAMBDAS])
    chosen = int(torch.stack([torch.stack([p[1] for p in path]) for path in second]).sum(0).argmax())
    for found, path in zip(related.weights.double(), second):
        torch.testing.assert_close(found, path[chosen][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scenario", TASKS)
@pytest.mark.parametrize("shared", [0, 1])
def test_order_and_number_of_parts_do_not_matter(scenario, shared):
    tasks = TASKS[scenario]

    def weights(tasks):
        return learn(make(Analytic, True, shared=shared), tasks)

    stepwise, reversed_order = weights(tasks), weights(tasks[::-1])
    for c in range(CLASSES):
        for found, expected in zip(reversed_order.solved[c], stepwise.solved[c]):
            torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(reversed_order.weights, stepwise.weights, atol=1e-6, rtol=1e-6)
    if scenario == "data":
        at_once = weights([Task("all", np.arange(90), (0, 1, 2))])
        for c in range(CLASSES):
            torch.testing.assert_close(at_once.solved[c][1], stepwise.solved[c][1], atol=1e-8, rtol=1e-8)


def test_zero_forgetting_and_zero_shot_until_learned():
    model = make(Analytic, True, shared=0)
    x = model.whitening(X)
    learn(model, CLASS_TASKS[:1])
    first = model.weights[0].clone()
    torch.testing.assert_close(model.logits(x)[:, 1:] / 2, COSINES[:, 1:], atol=1e-5, rtol=0)
    learn(model, CLASS_TASKS[1:])
    assert torch.equal(model.weights[0], first)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_labels_all_alike_keep_zero_shot_and_harm_nothing(value):
    expected = learn(make(Analytic, True), CLASS_TASKS[:1]).weights[0]
    labels = torch.where(torch.arange(CLASSES) > 0, value, LABELS)
    model = learn(make(Analytic, True), CLASS_TASKS, labels)
    x = model.whitening(X)
    torch.testing.assert_close(model.logits(x)[:, 1:] / 2, COSINES[:, 1:], atol=1e-5, rtol=0)
    assert torch.equal(model.weights[0], expected)


@pytest.mark.parametrize("name", METHODS)
def test_one_image_and_two_images_are_enough_to_run(name):
    labels = torch.zeros(N, CLASSES)
    labels[2] = 1
    model = make_named(name)
    for row in (2, 0):  # of the fifth that some methods hold out, and of the rest
        learn(model, [Task("one", np.array([row]), (0, 1, 2))], labels)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    positive, negative = model.logits(model.whitening(X[[2, 0]]), BANK)
    assert list(model.parameters()) or (positive > negative).all()  # few steps of gradient may not do


# ------------------------------------------------------------------------------------------ runs and plug-ins

SMALL = {"demo_images": 240, "epochs": 2, "figures": False, "workers": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", ["replay", "analytic", "l3a"])
def test_an_interrupted_run_ends_with_the_same_metrics(name, cache, tmp_path, monkeypatch):
    options = {"replay": ("memory=20",), "l3a": ("features=50",)}.get(name, ())
    settings = SMALL | {"method": name, "set": options, "scenario": "class", "cache_dir": cache}
    whole = retune.run(Config(**settings, output=str(tmp_path / "whole")))
    config = Config(**settings, output=str(tmp_path / "cut"))
    method, _ = retune.load_method(name)
    real = method.after_task

    def killed(model, embeddings, labels, task, bank):
        real(model, embeddings, labels, task, bank)
        if 2 in task.classes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "after_task", killed)
        retune.run(config)
    assert (tmp_path / "cut" / "task_2.safetensors").exists()
    resumed = retune.run(config)
    assert all(resumed[key] == whole[key] for key in ("after_task", "continual"))
    saved = retune.load_tensors(tmp_path / "cut" / "adaptors.safetensors")[0]
    statistics = retune.load_tensors(tmp_path / "cut" / "statistics.safetensors")[0]
    assert statistics and not set(saved) & set(statistics)


def test_the_method_in_docs_runs_and_predicts(cache, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# prototypes\.py.*?)```", text, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 25
    (tmp_path / "prototypes.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    method = ["--method", "prototypes:Prototypes"]
    demo = f"--demo-images 240 --no-figures --workers 0 --cache-dir {cache} --set power=0.5".split()
    for scenario in ("class", "label", "data", "joint"):
        assert retune.main([*method, *demo, "--scenario", scenario, "--output", scenario]) == 0
    measures = json.loads(Path("class/metrics.json").read_text())["continual"]
    assert measures["forgetting"] == 0 and measures["average_auroc"] > 0.55
    Image.fromarray(np.asarray(retune.load_radiographs(Config(demo_images=240)).images[0])).save("a.png")
    capsys.readouterr()
    predict = ["--predict", "a.png", "--run", "class", "--json"]
    assert retune.main([*predict, *method]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["findings"]) == 5
    assert retune.main(predict) == 2 and "name it again" in capsys.readouterr().err


def test_help_of_a_method_lists_what_set_takes(capsys):
    with pytest.raises(SystemExit, match="0"):
        retune.main(["--method", "analytic", "--help"])
    said = capsys.readouterr().out
    assert "--set features=300" in said and "--scenario" in said
