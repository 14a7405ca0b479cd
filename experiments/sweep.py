"""Grids of retune.py's options, in one process that shares data, encoder and embeddings.

    python -m experiments.sweep --grid method=linear,lwf whiten=no,yes scenario=class,data \
        -- --seed 27 28 29 --output "runs/{method}-{whiten}/{scenario}-seed{seed}"

Every combination runs with every seed. `yes` sets an option without a value and `no` leaves it out; blanks
separate several values of one option ("set=features=1000 shared=0"). What follows `--` goes to retune.py as
it is; braces in --output name settings, in which the runs must differ. Finished runs are skipped.
"""

import dataclasses
import itertools
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence

import numpy as np

import retune
from experiments.runs import load_inputs
from retune import Config


def combinations(grid: Sequence[str]) -> Iterator[list[str]]:
    """Command-line options of every combination of a grid ["name=value,value", ...]."""
    names, values = zip(*(item.partition("=")[::2] for item in grid))
    for choice in itertools.product(*(value.split(",") for value in values)):
        options = []
        for name, value in zip(names, choice):
            if value != "no":
                options += [f"--{name}", *([] if value == "yes" else value.split())]
        yield options


def make_configs(grid: Sequence[str], shared: Sequence[str]) -> list[Config]:
    """A configuration for every combination and seed."""
    parser = retune.build_parser(Config, __doc__)
    configs = []
    for options in combinations(grid):
        arguments = parser.parse_args([*shared, *options])
        seeds = np.atleast_1d(arguments.seed).tolist()
        arguments.seed = seeds[0]
        config = retune.parse_config(Config, arguments)
        configs += [dataclasses.replace(config, seed=seed) for seed in seeds]
    return configs


def sweep(argv: Sequence[str]) -> None:
    """Run what a command line says."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs="+", required=True, metavar="OPTION=VALUE,VALUE")
    parser.add_argument("shared", nargs="*", help="options of retune.py for all runs, after --")
    arguments = parser.parse_args(argv)
    configs = make_configs(arguments.grid, arguments.shared)
    for i, config in enumerate(configs, 1):
        data, encoder, _ = load_inputs(dataclasses.asdict(config))
        retune.run(config, lambda _, data=data: data, lambda *_, encoder=encoder: encoder)
        print(f"{i} of {len(configs)}: {retune.output_folder(config)}", flush=True)


if __name__ == "__main__":
    sys.exit(retune.main(action=sweep))
