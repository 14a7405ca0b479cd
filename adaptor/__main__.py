"""Aligns a frozen image encoder with a frozen text encoder, and measures what that is worth downstream.

python -m adaptor                                             # embedded demo, nothing to download
python -m adaptor --data mimic --data-dir DIR --image-encoder facebook/dinov2-base ...  # your data, encoders
python -m adaptor --export pair && python retune.py --encoder pair --scenario class
python -m adaptor grid                                        # all pairs of encoders, ablations
"""

import sys

import retune
from adaptor import grid
from adaptor.config import Config
from adaptor.run import run, summary


def execute(argv: list[str]) -> None:
    """One run, or with `grid` as the first argument the runs of a grid."""
    if argv[:1] == ["grid"]:
        return grid.main(argv[1:])
    config = retune.parse_config(Config, retune.build_parser(Config, __doc__).parse_args(argv))
    retune.join_ranks()
    if metrics := run(config):
        retune.log(f"\n{summary(metrics)}\n\nwritten to {config.folder}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line: 0, or 2 with one line on standard error for bad input."""
    return retune.main(argv, execute)


if __name__ == "__main__":
    sys.exit(main())
