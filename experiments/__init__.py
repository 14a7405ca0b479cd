"""Methods beside RE-tune, and what retune.py asks this folder for; a module is imported when it is needed."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Sequence

import retune

METHODS = {
    "linear": "experiments.baselines:Linear",
    "mlp": "experiments.baselines:MLP",
    "ewc": "experiments.baselines:EWC",
    "lwf": "experiments.baselines:LwF",
    "replay": "experiments.baselines:Replay",
    "joint": "experiments.baselines:Joint",
    "ncm": "experiments.streaming:NCM",
    "slda": "experiments.streaming:SLDA",
    "ranpac": "experiments.streaming:RanPAC",
    "l3a": "experiments.streaming:L3A",
    "distil": "experiments.baselines:Distil",
    "analytic": "experiments.analytic:Analytic",
}


def find_method(name: str, given: Iterable[str]) -> tuple[type[retune.Method], dict]:
    """The class of METHODS, or your own MODULE:CLASS, that `--method` names, and its `method_options`."""
    if ":" not in name and name not in METHODS:
        known = retune.suggest(name, ["retune", *METHODS])
        raise retune.InputError(f"--method {name!r}: {known}; or MODULE:CLASS")
    module, _, attribute = METHODS.get(name, name).partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with retune.input_errors(f"--method {name}", "is not a subclass of retune.Method that can be imported"):
        method = getattr(importlib.import_module(module), attribute)
        if not issubclass(method, retune.Method):
            raise TypeError(f"{attribute} is another class")
    return method, method_options(method, given)


def method_options(method: type[retune.Method], given: Iterable[str]) -> dict[str, object]:
    """A method's keyword parameters: their defaults, or `--set NAME=VALUE` typed as the default is."""
    parameters = inspect.signature(method.__init__).parameters
    options = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    for name, _, value in (pair.partition("=") for pair in given):
        try:
            kind = type(options[name])
            options[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, TypeError, ValueError):
            takes = ", ".join(f"{key}={default}" for key, default in options.items()) or "no --set"
            raise retune.InputError(f"--set {name}={value}: {method.__name__} takes {takes}") from None
    return options


def describe(argv: Sequence[str]) -> str | None:
    """What --help says of the method that a command line names, and what --set takes; None for RE-tune."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="retune")
    name = parser.parse_known_args(argv)[0].method
    if name == "retune":
        return None
    method, options = find_method(name, ())
    takes = (f"\n  --set {option}={value}" for option, value in options.items())
    return inspect.getdoc(method) + "".join(takes)


def measure(config, *measured) -> dict:
    """What ends a run: {"decisions": thresholds, "hospitals": AUROC by part, with --parts column}."""
    names = ("decisions", "hospitals") if config.parts == "column" else ("decisions",)
    return {name: retune.experiment(name).measure(config, *measured) for name in names}


def summaries(metrics: dict) -> list[str]:
    """What `measure` gave a run, in tables of text."""
    names = (name for name in ("decisions", "hospitals") if name in metrics)
    return [retune.experiment(name).summary(metrics[name]) for name in names]
