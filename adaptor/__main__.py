"""Aligns a frozen image encoder with a frozen text encoder, and measures what that is worth downstream.

    python -m adaptor                                                    # embedded demo, nothing to download
    python -m adaptor --data mimic --data-dir MIMIC-CXR-JPG --view frontal --image-encoder facebook/dinov2-base \\
                      --text-encoder emilyalsentzer/Bio_ClinicalBERT     # your data, any encoders
    python -m adaptor --export pair && python retune.py --encoder pair --scenario class
    python -m adaptor grid                                               # all pairs of encoders, ablations
"""

import sys

import retune
from adaptor import grid
from adaptor.config import Config
from adaptor.run import run, summary


def align(argv: list[str]) -> None:
    """One run: pre-training, downstream tasks, export."""
    config = retune.parse_config(Config, retune.build_parser(Config, __doc__).parse_args(argv))
    retune.join_ranks()
    if metrics := run(config):
        retune.log(f"\n{summary(metrics)}\n\nwritten to {config.folder}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on standard error for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        grid.main(argv[1:]) if argv[:1] == ["grid"] else align(argv)
    except (retune.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
