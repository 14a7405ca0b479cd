"""experiments/folds.py on real X-rays of 64 and of 320 pixels: the folds, the tables, the view as a score."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import retune
from experiments import folds, runs


@pytest.fixture(scope="module", params=["RETUNE_NIH_DIR", "RETUNE_NIH320_DIR"])
def nih(request) -> str:
    return os.environ.get(request.param) or pytest.skip(f"{request.param} is not set")


@pytest.fixture(scope="module")
def tables(nih, tmp_path_factory) -> list[pd.DataFrame]:
    paths = folds.write_folds(nih, tmp_path_factory.mktemp("folds"))
    return [pd.read_csv(path, dtype={"patient": str}) for path in paths]


def test_folds_share_rows_and_test_every_image_once(nih, tables):
    assert len(tables) == 5
    for table in tables:
        pd.testing.assert_frame_equal(table.drop(columns="split"), tables[0].drop(columns="split"))
        assert (table.groupby("patient")["split"].nunique() == 1).all()
        assert set(table["split"]) == {"train", "val", "test"}
    assert (sum((table["split"] == "test").astype(int) for table in tables) == 1).all()
    data = retune.load_radiographs(retune.Config(data="nih", data_dir=nih))
    listed = Path(nih, "test_list.txt").read_text().split()
    assert sorted(np.array(data.names)[data.where("test")]) == sorted(listed)
    assert tables[0]["patient"].tolist() == data.patients.tolist()
    findings = dict(zip(data.class_names, data.labels.T))
    chosen = [name for name in tables[0] if name in findings]
    assert all((tables[0][name] == findings[name]).all() for name in chosen)
    most = sorted(int(labels.sum()) for labels in findings.values())[-5:]
    assert sorted(tables[0][chosen].sum()) == most


@pytest.mark.slow
def test_small_run_gives_the_tables(tmp_path, encoder_folder, nih, tables):
    arguments = ["--data-dir", nih, "--folds", tmp_path / "private", "--results", tmp_path / "tables"]
    arguments += ["--scenarios", "class", "--grids", "method=retune", "method=lwf whiten=no,yes"]
    arguments += ["--", "--encoder", encoder_folder, "--epochs", 1, "--workers", 0]
    assert retune.main([str(argument) for argument in arguments], folds.folds) == 0
    assert len(list((tmp_path / "private" / "cache").glob("*/embeddings.npy"))) == 1
    found = runs.read_runs(tmp_path / "tables")
    assert found.groupby(["method", "whiten"])["seed"].apply(sorted).tolist() == [[27, 28, 29, 30, 31]] * 3
    assert found.groupby("seed")["test_n"].first().sum() == len(tables[0])
    chosen = runs.pick(found, method="lwf", scenario="class")
    assert runs.lead(chosen, chosen) == (0, 0, 0)
    assert f"{chosen[runs.LAST].mean():.3f} [" in (tmp_path / "tables" / "intervals.md").read_text()
    within = pd.read_csv(tmp_path / "tables" / "within-view.csv")
    assert within["method"].tolist() == ["zero-shot", "RE-tune", "MLP head, LwF, whitened"]
    written = "".join(path.read_text() for path in (tmp_path / "tables").glob("*.[mc]*"))
    assert not any(name in written for name in tables[0]["path"])
    view = pd.read_csv(tmp_path / "tables" / "view.csv", index_col="finding")["AP before PA"]
    tested = [table[table["split"] == "test"] for table in tables]
    for name in view.index[:-1]:
        auroc = np.mean([roc_auc_score(table[name], table["view"] == "AP") for table in tested])
        assert view[name].startswith(f"{auroc:.3f} [")
