"""CLEFT: contrastive pre-training with a parameter-efficient language model, then prompt fine-tuning.

    python -m cleft all                                # embedded demo: every stage, nothing to download
    python -m cleft pretrain --data chexpert --data-dir CheXpert --output runs/cleft ...
    python -m cleft prompt ..., evaluate ...           # with pretrain's options
    python -m cleft evaluate --model runs/cleft --data rsna --data-dir RSNA --output runs/cleft-rsna
    python -m cleft export --model runs/cleft --to FOLDER
    python -m cleft tables --output results/cleft      # every table and figure; skips finished runs
    python -m cleft count, make-tiny                   # parameters of the real towers; makes demo/tiny

Reference: Du, Chang & Dvornek, arXiv 2407.21011. What is ours and not the paper's says "(ours)".
"""

import contextlib
import dataclasses
import hashlib
import sys
from pathlib import Path

import torch

import retune
from cleft.config import DATA_SETTINGS, EVALUATION, TINY, Config, model_config, resolve_defaults
from cleft.data import load_pairs
from cleft.evaluation import evaluate, make_test_sets
from cleft.tables import make_tables
from cleft.towers import count_published
from cleft.training import embed_features, load_model, pretrain, tune_prompt
from retune import HERE, InputError


def run(command: str, config: Config) -> None:
    """pretrain, prompt, evaluate, or `all` of them, in --output; only one process writes there."""
    if config.model is not None and command != "evaluate":
        raise InputError(f"--model belongs to evaluate and export, not to {command}")
    config = resolve_defaults(config) if config.model is None else model_config(config)
    folder = config.folder
    source = Path(config.model or folder)
    data = load_pairs(config)
    retune.log(data.note)
    if command in ("evaluate", "all"):
        make_test_sets(data, config)  # what would stop the evaluation is refused before the training
    kept = set(dataclasses.asdict(config)) - set(EVALUATION)
    if source.resolve() != folder.resolve():  # this folder belongs to an evaluation
        kept = {*DATA_SETTINGS, *EVALUATION}
    identity = {name: value for name, value in dataclasses.asdict(config).items() if name in kept}
    identity["data_fingerprint"] = retune.data_fingerprint(data)
    identity["captions_sha256"] = hashlib.sha256(repr(data.reports).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with retune.locked(folder, wait=False) if retune.ranks()[0] == 0 else contextlib.nullcontext():
        if retune.ranks()[0] == 0:
            retune.check_same_config(folder, identity)
        retune.barrier()
        if command in ("pretrain", "all"):
            pretrain(config, data)
        if command in ("prompt", "all"):
            model = load_model(folder, config)
            tune_prompt(model, data, embed_features(model, data, config), config)
        if command in ("evaluate", "all"):
            evaluate(load_model(source, config), source, data, config)


def export(config: Config, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the tuned encoder in retune.py's folder format, the weights of --peft merged."""
    config = model_config(dataclasses.replace(config, model=config.model or str(config.folder)))
    if config.peft == "prefix":
        raise InputError("--peft prefix: virtual tokens do not merge into weights; export lora, ia3 or none")
    encoder = load_model(Path(config.model), config).encoder
    if config.peft not in ("none", "frozen"):
        encoder.text.tower = encoder.text.tower.merge_and_unload()
    encoder.config["name"] = target.name
    if retune.ranks()[0] == 0:
        encoder.cpu().save(target, dtype)
    retune.log(f"written to {target}")


def make_tiny(target: Path | None, output: str) -> None:
    """The encoder that is shipped in demo/tiny: a preset of stage 1, stored in half precision."""
    target = retune.check_new_folder(target or HERE / "demo" / "tiny")
    config = Config(**TINY, output="runs/tiny" if output == Config.output else output)
    torch.set_num_threads(1)  # the bytes do not depend on the number of cores
    run("pretrain", config)
    export(Config(output=config.output), target, torch.float16)


def execute(argv: list[str]) -> None:
    """Do what the command line says."""
    parser = retune.build_parser(Config, __doc__)
    parser.usage = "%(prog)s command [option ...]"
    commands = ("pretrain", "prompt", "evaluate", "all", "export", "tables", "count", "make-tiny")
    parser.add_argument("command", choices=commands, help="a stage, all stages, or another job shown above")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder, for export and make-tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the runs of tables")
    arguments = parser.parse_args(argv)
    command = arguments.command
    target = arguments.to
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
        make_tables(config, arguments.seeds, run)
    else:
        run(command, config)


def main(argv: list[str] | None = None) -> int:
    """Run a command line: 0, or 2 with one line on standard error for bad input."""
    return retune.main(argv, execute)


if __name__ == "__main__":
    sys.exit(main())
