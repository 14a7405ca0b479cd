"""The demo's phantoms: the same everywhere, whole, and their masks true."""

import dataclasses
import pickle

import numpy as np
import pytest

from demo import phantoms


def test_same_seed_same_phantoms():
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
def test_phantoms_are_whole(domain):
    drawn = phantoms.make_phantoms(400, seed=5, size=32, domain=domain)
    prevalence = drawn.labels.mean(0)
    assert (prevalence > 0.05).all() and (prevalence < 0.55).all()
    assert 2 < len(drawn) / len(set(drawn.patients)) < 5
    assert np.corrcoef(drawn.labels.T)[1, 3] > 0.1  # cardiomegaly comes with edema
    for i in range(0, 400, 7):
        image, masks = drawn.draw(i)
        assert image.dtype == np.uint8 and image.shape == (32, 32) and masks.shape == (5, 32, 32)
        assert np.array_equal(masks.any((1, 2)), drawn.labels[i] == 1)
    assert all(drawn.reports) and len(set(drawn.reports)) > 200
    assert set(drawn.patients).isdisjoint(phantoms.make_phantoms(400, seed=6, domain=domain).patients)


def test_mask_covers_its_finding():
    """The same film with and without a finding differs inside the mask far more than elsewhere."""
    drawn = phantoms.make_phantoms(300, seed=7, size=64)
    for c in (0, 2, 3, 4):
        i = int(np.flatnonzero((drawn.labels[:, c] == 1) & (drawn.labels.sum(1) == 1))[0])
        image, masks = drawn.draw(i)
        without = dataclasses.replace(drawn, severity=np.zeros_like(drawn.severity)).images[i]
        change = np.abs(image.astype(float) - without)
        assert change[masks[c]].mean() > 2 * change[~masks[c]].mean()
