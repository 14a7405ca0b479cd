"""What an evaluation measures and learns from: test sets, nested shares of the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import retune
from cleft.captions import MAMMOGRAM_CLASSES
from cleft.config import Config
from retune import InputError, Radiographs


@dataclass(frozen=True)
class TestSet:
    """Test `rows`, training rows `learn` for each share of the labels, label `columns`; exclusive: one is positive."""

    name: str
    columns: list[int]
    exclusive: bool
    rows: np.ndarray
    learn: dict[float, np.ndarray]


def make_test_sets(data: Radiographs, config: Config) -> list[TestSet]:
    """The test sets of a data set; InputError when one lacks a class, or a share of the labels does.

    multi-label: the whole test split. balanced: --balanced images a class with exactly one positive. EMBED has two
    balanced sets, BI-RADS and density; CheXpert-5x200 is the published one.
    """
    names, everything = list(data.class_names), list(range(len(data.class_names)))
    groups, exclusive = {"multi-label": everything, "balanced": everything}, {"balanced"}
    if config.data == "chexpert-5x200":
        groups, exclusive = {"5x200": everything}, {"5x200"}
    if config.data == "embed":
        density = [c for c in everything if "density" in MAMMOGRAM_CLASSES[names[c]]]
        groups = {"BI-RADS": [c for c in everything if c not in density], "density": density}
        exclusive = set(groups)
    shares, sets = fraction_rows(data, config.fractions, config.seed), []
    for name, columns in groups.items():
        if name in exclusive and (len(columns) < 2 or not config.balanced):
            continue
        rows = learnable(data, data.where("test"), columns, name in exclusive)
        if name in exclusive and name != "5x200":
            size = config.balanced * 5 // 2 if name == "density" else config.balanced
            rows = balanced_rows(data, rows, columns, size, config.seed)
        learn = {share: learnable(data, rows, columns, name in exclusive) for share, rows in shares.items()}
        for share, chosen in learn.items():
            labels = data.labels[np.ix_(chosen, columns)]
            varied = ((labels == 1).any(0) & (labels == 0).any(0)).sum()  # classes with both labels
            if varied < (len(columns) if name in exclusive else 1):
                problem = (
                    f"{len(chosen)} training images lack a class of the {name} test; leave that share out"
                )
                raise InputError(f"--fractions {share:g}: {problem}")
        sets.append(TestSet(name, columns, name in exclusive, rows, learn))
    return sets


def learnable(data: Radiographs, rows: np.ndarray, columns: list[int], exclusive: bool) -> np.ndarray:
    """Those of some rows that have a known label; exclusive: all labels known and exactly one positive."""
    labels = data.labels[np.ix_(rows, columns)]
    return rows[labels.sum(1) == 1 if exclusive else ~np.isnan(labels).all(1)]  # nan sums to nan


def balanced_rows(
    data: Radiographs, rows: np.ndarray, columns: list[int], size: int, seed: int
) -> np.ndarray:
    """`size` of some exclusive rows a class, or as many as the rarest class has."""
    label = data.labels[np.ix_(rows, columns)].argmax(1)
    counts = np.bincount(label, minlength=len(columns))
    if counts.min() == 0:
        name = data.class_names[columns[int(counts.argmin())]]
        raise InputError(f"no test image has {name} as its only finding; --balanced 0 leaves that test out")
    generator, size = np.random.default_rng(seed), min(size, int(counts.min()))
    return np.concatenate([generator.permutation(rows[label == c])[:size] for c in range(len(counts))])


def fraction_rows(data: Radiographs, fractions: Sequence[float], seed: int) -> dict[float, np.ndarray]:
    """Training rows of each share of the training patients, nested: a smaller share lies in every larger one.

    Patients are drawn by `seed`; the first patient of each class is moved to the front (ours), so that no share with
    as many patients as classes lacks a class.
    """
    rows = data.where("train")
    patients, owner = np.unique(data.patients[rows], return_inverse=True)
    order = np.random.default_rng((seed, 1)).permutation(len(patients))
    labels = data.labels[rows]
    alone = (labels == 1) & (labels.sum(1) == 1)[
        :, None
    ]  # as the only finding, which exclusive tests learn from
    held = np.where(alone.any(0), alone, labels == 1)
    place = np.argsort(order)[owner]  # of each row's patient
    front = [order[place[column].min()] for column in held.T if column.any()]
    place = np.argsort(list(dict.fromkeys([*front, *order])))[owner]
    return {share: rows[place < math.ceil(share * len(patients))] for share in sorted(fractions)}


def write_splits(config: Config, data: Radiographs, sets: list[TestSet]) -> None:
    """splits.csv: of each image its patient, its split, the smallest share that holds it or the test sets that do."""
    use: list[list[str]] = [[] for _ in data.names]
    for share, rows in fraction_rows(data, config.fractions, config.seed).items():
        for row in rows:
            use[row] = use[row] or [f"{share:g}"]
    for test_set in sets:
        for row in test_set.rows:
            use[row].append(test_set.name)
    retune.write_splits(config.folder / "splits.csv", data, "fraction or tests", map("; ".join, use))
