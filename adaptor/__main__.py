"""Aligns a frozen image encoder with a frozen text encoder, and measures what that is worth downstream.

    python -m adaptor                                                    # embedded demo, nothing to download
    python -m adaptor --data mimic --data-dir MIMIC-CXR-JPG --view frontal --image-encoder facebook/dinov2-base \\
                      --text-encoder emilyalsentzer/Bio_ClinicalBERT     # your data, any encoders
    python -m adaptor --export pair && python retune.py --encoder pair --scenario class
    python -m adaptor grid                                               # all pairs of encoders, ablations
    python -m adaptor xrays --nih DIR                                    # real X-rays through the whole chain
"""

import sys
from collections.abc import Sequence

import retune
from adaptor import grid, xrays
from adaptor.config import Config
from adaptor.run import run, summary
from retune import InputError

COMMANDS = {"grid": grid.main, "xrays": xrays.main}


def align(argv: Sequence[str]) -> None:
    """One run: pre-training, downstream tasks, export."""
    config = retune.parse_config(Config, retune.build_parser(Config, __doc__).parse_args(argv))
    retune.join_ranks()
    metrics = run(config)
    if metrics:
        retune.log(f"\n{summary(metrics)}\n\nwritten to {config.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 with one line on standard error for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            align(argv)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
