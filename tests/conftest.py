"""The fixtures of `tests/` are those of `tests/fixtures.py`, which `test_retune.py` uses too."""

pytest_plugins = ["tests.fixtures"]
