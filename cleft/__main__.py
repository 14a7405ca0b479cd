"""CLEFT: contrastive pre-training with a parameter-efficient language model, then prompt fine-tuning.

    python -m cleft all                                # embedded demo: every stage, nothing to download
    python -m cleft pretrain --data chexpert --data-dir CheXpert \\
        --image facebook/dinov2-with-registers-base --text stanford-crfm/BioMedLM --output runs/cleft
    python -m cleft prompt ..., evaluate ...           # with pretrain's options
    python -m cleft evaluate --model runs/cleft --data rsna --data-dir RSNA --output runs/cleft-rsna
    python -m cleft export --model runs/cleft --to FOLDER
    python -m cleft tables --output results/cleft      # every table and figure: many runs; skips finished ones
    python -m cleft count                              # trainable parameters of the real architectures
    python -m cleft make-tiny                          # trains the encoder that is shipped in demo/tiny

Reference: Du, Chang & Dvornek, "CLEFT: Language-Image Contrastive Learning with Efficient Large Language
Model and Prompt Fine-Tuning", arXiv 2407.21011. What is ours and not the paper's says "(ours)".
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import retune
from cleft.config import Config, resolve_defaults
from cleft.stages import export, make_tiny, run
from cleft.tables import make_tables
from cleft.towers import count_published
from retune import InputError


def execute(argv: Sequence[str]) -> None:
    """Do what the command line says."""
    parser = retune.build_parser(Config, __doc__)
    parser.usage = "%(prog)s command [option ...]"
    commands = ("pretrain", "prompt", "evaluate", "all", "export", "tables", "count", "make-tiny")
    parser.add_argument("command", choices=commands, help="a stage, all stages, or another job shown above")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder, for export and make-tiny")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the main runs of tables"
    )
    arguments = parser.parse_args(argv)
    command, target = arguments.command, arguments.to
    config = retune.parse_config(Config, arguments)
    retune.join_ranks()
    if (command == "export" and not target) or (target and command not in ("export", "make-tiny")):
        raise InputError("export needs --to, a new folder; of the others only make-tiny takes one")
    if command == "count":
        print(count_published(resolve_defaults(config)))
    elif command == "make-tiny":
        make_tiny(target, arguments.output)
    elif command == "export":
        export(config, target)
    elif command == "tables":
        make_tables(config, arguments.seeds)
    else:
        run(command, config)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 on success, 2 with one line on standard error for bad input."""
    return retune.main(argv, execute)


if __name__ == "__main__":
    sys.exit(main())
