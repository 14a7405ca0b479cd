"""CLEFT: contrastive pre-training with a parameter-efficient language model, then prompt fine-tuning.

The method is in this file, in the order of its use. `towers` builds the two towers and has the training
loop, `downstream` the data sets and measures of the evaluation, `retune` what all programs share.

    python cleft.py all                                # embedded demo: every stage, nothing to download
    python cleft.py pretrain --data chexpert --data-dir CheXpert --pad-token "<|endoftext|>" \\
        --image facebook/dinov2-with-registers-base --text stanford-crfm/BioMedLM
    python cleft.py prompt ..., evaluate ..., export ... --to FOLDER     # with pretrain's options
    python cleft.py count                              # trainable parameters of the real architectures
    python cleft.py make-tiny                          # trains the encoder that is shipped in tiny/

Reference: Du, Chang & Dvornek, "CLEFT: Language-Image Contrastive Learning with Efficient Large Language
Model and Prompt Fine-Tuning", arXiv 2407.21011. What is ours and not the paper's says "(ours)".
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from cleft import downstream, towers
from cleft.downstream import balanced_rows, linear_probe, load_embed, measure, measure_balanced, two_classes
from cleft.towers import add_peft, batch_rows, build_encoder, count, restore, split_tokens, train
from retune import HERE, DualEncoder, InputError, Radiographs, same, setting

# --------------------------------------------------------------------------------------------------- Settings

DATASETS = {"pretrain": downstream.load_pretrain, "embed": load_embed, "rsna": downstream.load_rsna}
DATA_SETS = tuple(dict.fromkeys(["demo", *DATASETS, *retune.DATASETS]))
POSITIVE = "steps lr batch_size accumulate dim temperature save_every context_tokens prompt_steps prompt_lr"
POSITIVE += " demo_images lora_rank lora_alpha context_length"
NOT_NEGATIVE = "seed workers prefix_tokens weight_decay warmup lora_dropout balanced finetune_epochs"


@dataclasses.dataclass(frozen=True)
class Config(retune.DataConfig):
    """Every setting; the command line is made from it. None is filled by the authors' value or the demo's."""

    # fmt: off
    data: str = setting("demo", "data set", choices=DATA_SETS, group="data")

    image: str = setting("tiny", "small, tiny, our or a transformers folder, an id", group="towers")
    text: str = setting("tiny", "likewise; a causal language model")
    dim: int | None = setting(None, "joint dimension (authors: 512; small and tiny: 128)", type=int)
    context_length: int = setting(64, "tokens of a text at most")
    truncate: bool = setting(False, "cut longer texts instead of refusing them")
    pad_token: str | None = setting(None, "padding token for a tokenizer that has none")
    peft: str = setting("lora", "tuning of the text tower; none: all of it",
                        choices=("lora", "ia3", "prefix", "none"))
    lora_rank: int = setting(8, "rank of LoRA")
    lora_alpha: int = setting(32, "scale of LoRA")
    lora_dropout: float = setting(0.1, "dropout of LoRA")
    prefix_tokens: int = setting(30, "virtual tokens of prefix tuning")

    captions: str = setting("auto", "auto: reports if there are any", choices=("auto", "labels", "reports"),
                            group="captions")
    base_caption: str = setting("a chest X-ray of a patient with", "beginning of captions from labels")
    negative_captions: bool = setting(False, "captions name the absent findings too")

    steps: int | None = setting(None, "steps (authors: 40,000; demo: 200)", type=int, group="stage 1")
    lr: float | None = setting(None, "learning rate (authors: 4e-5; demo: 1e-3)", type=float)
    batch_size: int | None = setting(None, "pairs a step over all ranks (authors: 288; demo: 128)", type=int)
    weight_decay: float = setting(0.1, "weight decay of AdamW")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises")
    temperature: float = setting(0.07, "initial temperature of the contrastive loss")
    accumulate: int = setting(1, "pieces of a rank's batch; the loss stays that of the whole")
    checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    precision: str = setting("fp32", "arithmetic of the towers", choices=("fp32", "bf16"))
    save_every: int = setting(500, "steps between checkpoints")

    context_tokens: int = setting(30, "learned context tokens", group="stage 2")
    prompt_steps: int | None = setting(None, "steps (authors: 8,000; demo: 300)", type=int)
    prompt_lr: float | None = setting(None, "learning rate (authors: 1e-4; demo: 0.1)", type=float)

    balanced: int = setting(200, "images a class in the balanced test, at most; 0: none", group="evaluation")
    finetune_epochs: int = setting(0, "epochs of full fine-tuning; 0: none")

    seed: int = setting(42, "seed", group="run")
    output: str = setting("runs/cleft", "folder of the run; any setting in braces is filled in")
    cache_dir: str = same("cache_dir")
    device: str = same("device")
    workers: int = setting(0, "processes that decode images")
    # fmt: on

    def __post_init__(self):
        retune.refuse_values(
            self, (POSITIVE, *retune.POSITIVE), (NOT_NEGATIVE, lambda value: not value < 0, "not be negative"),
            (NOT_NEGATIVE, lambda value: value < 2**32, "be < 2**32"),
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return retune.fill_in(self)


# The published setting; the demo's and tiny's (ours)
AUTHORS = {"steps": 40_000, "lr": 4e-5, "batch_size": 288, "dim": 512, "prompt_steps": 8000,
           "prompt_lr": 1e-4}  # fmt: skip
SMALL = {"steps": 200, "lr": 1e-3, "batch_size": 128, "dim": 128, "prompt_steps": 300, "prompt_lr": 0.1}
TINY = {"data": "pretrain", "image": "small", "text": "small", "peft": "none", "demo_images": 12_000,
        "steps": 900, "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.03, "captions": "reports",
        "seed": 0}  # fmt: skip


def settle(config: Config) -> Config:
    """Fill what the user left open: the authors' values, or the demo's when its small towers are used."""
    preset = SMALL if config.image in ("small", "tiny") else AUTHORS
    return dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


# --------------------------------------------------------------------------------------------------- Captions

NONE = "no finding"


def captions(data: Radiographs, config: Config) -> list[str]:
    """One text per image: its report, or the base caption and the names of its findings."""
    if config.captions == "reports" and data.reports is None:
        raise InputError(f"--captions reports: the data set {config.data} has no reports; use labels")
    if data.reports is not None and config.captions != "labels":
        return list(data.reports)
    names = [name.lower() for name in data.class_names]
    return [caption(row, names, config) for row in data.labels]


def caption(labels: Sequence[float], names: Sequence[str], config: Config) -> str:
    """The caption of one image from its labels [C]; unknown labels are not mentioned."""
    present = [name for name, label in zip(names, labels, strict=True) if label == 1]
    absent = [f"no {name}" for name, label in zip(names, labels, strict=True) if label == 0 and name != NONE]
    found = present + (absent if config.negative_captions else [])
    return f"{config.base_caption} {', '.join(found or [NONE])}"


# ------------------------------------------------------------------------------------------------------ Model


class Cleft(nn.Module):
    """An encoder in training and its learnable temperature; the image tower and both heads train whole."""

    def __init__(self, encoder: DualEncoder, config: Config):
        super().__init__()
        self.encoder = encoder.train()
        encoder.image.requires_grad_(True)
        encoder.text.head.requires_grad_(True)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            encoder.text.tower = add_peft(encoder.text.tower, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        """Pixels [B,3,H,W], tokens [B,T], their mask -> unit vectors [B,D] of the images and of the texts."""
        images, texts = self.encoder.image(pixels), self.encoder.text(input_ids, attention_mask)
        return F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)

    @property
    def scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=100)

    def learned(self) -> dict[str, torch.Tensor]:
        """What training changes: trainable weights and buffers, not a frozen language model."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad} | dict(self.named_buffers())


def build(config: Config, data: Radiographs) -> Cleft:
    """The model of stage 1 as it starts, on the device."""
    model = Cleft(build_encoder(config, captions(data, config)), config)
    if config.checkpointing:
        towers.recompute(model.encoder.image.tower)
        towers.recompute(model.encoder.text.tower)
    return model.to(retune.pick_device(config.device))


# ------------------------------------------------------------------------------------------- Contrastive loss


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric CLIP loss of N pairs of unit vectors [N,D]: the sum of both cross-entropies."""
    logits = scale * images @ texts.T  # [N,N]
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def gather(own: torch.Tensor) -> torch.Tensor:
    """[B,D] of every rank -> the global batch [world * B, D], in rank order, without gradient."""
    parts = [torch.empty_like(own) for _ in range(retune.ranks()[1])]
    if len(parts) > 1:
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)
    return own


def contrastive_step(model: Cleft, pieces: Sequence[tuple], seed: int, autocast: Callable) -> torch.Tensor:
    """Gradients of the global batch's loss from this rank's pieces (pixels, ids, mask); returns the loss.

    The loss needs all embeddings at once, a tower's backward pass only one piece (ours): embed all pieces
    without a graph, differentiate the loss by the embeddings, then embed each piece again, with the same
    dropout, and go on backwards from its part. So neither pieces nor ranks change the loss, except that batch
    normalisation sees one piece at a time. The gradients of the ranks are still to be summed.
    """
    rank, world = retune.ranks()

    def embed(number: int):
        with torch.random.fork_rng(), autocast():
            torch.manual_seed((seed * world + rank) * len(pieces) + number)
            return model(*pieces[number])

    with torch.set_grad_enabled(len(pieces) == 1):  # a single piece keeps its graph and is not embedded again
        parts = [embed(number) for number in range(len(pieces))]
    leaves = [gather(torch.cat(part).detach()).requires_grad_() for part in zip(*parts, strict=True)]
    loss = contrastive_loss(*leaves, model.scale)
    loss.backward()
    model.log_scale.grad /= world  # every rank holds the whole gradient of the temperature
    sizes = [len(part[0]) for part in parts]
    own = [leaf.grad[rank * sum(sizes) : (rank + 1) * sum(sizes)].split(sizes) for leaf in leaves]
    for number, gradients in enumerate(zip(*own, strict=True)):
        outputs = parts[number] if len(pieces) == 1 else embed(number)
        torch.autograd.backward(outputs, gradients)
    return loss.detach()


# ---------------------------------------------------------------------------------------------------- Stage 1


def pretrain(config: Config, data: Radiographs) -> Cleft:
    """Stage 1: both towers on image-text pairs, with the loss of the global batch; resumes a checkpoint."""
    model, texts, world = build(config, data), captions(data, config), retune.ranks()[1]
    device, size, pieces = model.log_scale.device, config.batch_size, config.accumulate
    if size % (world * pieces):
        raise InputError(f"--batch-size {size} does not divide by {world} ranks x {pieces} pieces")
    Prompt(model, data.class_names, config)  # what stage 2 would refuse is refused before the training
    retune.say(towers.trainable_parts(model.encoder))

    def batches(first: int):
        return towers.rank_batches(data, model.encoder.transform, first, config)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def compute(step: int, batch: list) -> torch.Tensor:
        inputs = []
        for readable, images, unreadable in batch:
            for row, reason in unreadable:
                raise InputError(f"{data.rows[row]}: {reason}")
            tokens = model.encoder.tokenize([texts[row] for row in readable], config.truncate)
            inputs.append([tensor.to(device) for tensor in (images, *tokens.values())])
        return contrastive_step(model, inputs, config.seed * 1_000_003 + step, autocast)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay)
    rates = (config.lr, round(config.warmup * config.steps), 1e-8)
    return train(1, model, optimizer, compute, batches, rates, config)


def stage1(config: Config, data: Radiographs) -> Cleft:
    """The model that `pretrain` left in --output; InputError when it is not finished."""
    model, path = build(config, data), config.folder / "stage1.pt"
    if restore(path, model) < config.steps:
        raise InputError(f"{path}: stage 1 is not finished; run cleft.py pretrain with the same options")
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- Stage 2


class Prompt(nn.Module):
    """Learned context tokens [n,H] before each class name, read by the frozen text tower."""

    def __init__(self, model: Cleft, class_names: Sequence[str], config: Config):
        super().__init__()
        encoder, n = model.encoder, config.context_tokens
        self.text, self.scale = [encoder.text], model.scale.detach()  # in a list: not a part of this module
        embedding = encoder.text.tower.get_input_embeddings()
        self.names = [split_tokens(encoder.tokenizer, name.lower(), embedding) for name in class_names]
        words = split_tokens(encoder.tokenizer, config.base_caption, embedding)[1]
        self.context = nn.Parameter(words.repeat(math.ceil(n / len(words)), 1)[:n].clone())
        longest = n + max(sum(map(len, parts)) for parts in self.names)
        limit = getattr(encoder.text.tower.config, "max_position_embeddings", longest)
        if longest > limit:
            raise InputError(f"--context-tokens {n}: {longest} tokens, the text tower reads {limit}")

    def forward(self) -> torch.Tensor:
        """Unit vectors of the texts [C,D]: [start tokens] [context] [class name] [end tokens], last token."""
        rows = [torch.cat([start, self.context, name, end]) for start, name, end in self.names]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [C,T,H]
        lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
        mask = (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()
        hidden = self.text[0].tower(inputs_embeds=inputs, attention_mask=mask)["last_hidden_state"]
        last = hidden[torch.arange(len(rows), device=inputs.device), lengths - 1]
        return F.normalize(self.text[0].head(last).float(), dim=1)

    def learned(self) -> dict[str, torch.Tensor]:
        return {"context": self.context}


def tune_prompt(model: Cleft, data: Radiographs, embeddings: np.ndarray, config: Config) -> Prompt:
    """Stage 2: multi-label binary cross-entropy of the scaled cosines; only the context tokens change.

    The image tower is frozen, so its stored embeddings [N,D] serve; class texts are encoded once a step.
    """
    prompt, steps = Prompt(model, data.class_names, config), config.prompt_steps
    device, labels = prompt.context.device, torch.from_numpy(data.labels)
    known = ~np.isnan(data.labels).all(1) & ~np.isnan(embeddings[:, 0])
    rows = np.intersect1d(data.where("train"), np.flatnonzero(known))

    def compute(step: int, batch: np.ndarray) -> torch.Tensor:
        images = F.normalize(torch.from_numpy(np.array(embeddings[batch], np.float32)).to(device), dim=1)
        loss = retune.prompt_contrastive_loss(prompt.scale * images @ prompt().T, labels[batch].to(device))
        (loss / retune.ranks()[1]).backward()  # every rank computes the whole batch: it is a few cosines
        return loss.detach()

    def batches(first: int):
        return batch_rows(rows, config.batch_size, first, steps, config.seed + 1)

    optimizer = torch.optim.SGD([prompt.context], config.prompt_lr, momentum=0.9, weight_decay=1e-3)
    rates = (config.prompt_lr, min(100, steps // 10), config.prompt_lr / 10)
    return train(2, prompt, optimizer, compute, batches, rates, config)


# ------------------------------------------------------------------------------------------------- Evaluation


def class_texts(model: Cleft, data: Radiographs, config: Config) -> torch.Tensor:
    """Unit vectors [C,D] of the base caption followed by each class name: the prompt before stage 2."""
    tokens = model.encoder.tokenize([f"{config.base_caption} {name.lower()}" for name in data.class_names])
    with torch.inference_mode():
        texts = model.encoder.text(*(t.to(model.log_scale.device) for t in tokens.values()))
        return F.normalize(texts.float(), dim=1)


def evaluate(config: Config, data: Radiographs) -> dict:
    """Every measure on the test split; writes evaluation.json, evaluation.md and balanced.csv to --output."""
    model, learn, test = stage1(config, data), data.where("train"), data.where("test")
    embeddings = downstream.embed_images(model.encoder, data, config)  # by all ranks; the rest by one
    if retune.ranks()[0] > 0:
        return {}
    images = F.normalize(torch.from_numpy(np.array(embeddings[test], np.float32)), dim=1)
    texts = {"zero-shot": class_texts(model, data, config)}
    prompt = Prompt(model, data.class_names, config)
    if restore(config.folder / "stage2.pt", prompt) == config.prompt_steps:
        with torch.inference_mode():
            texts["zero-shot, learned context"] = prompt()
    else:
        retune.say("stage 2 is not finished: no learned context is evaluated")
    results = {name: measure((images @ t.cpu().T).numpy(), data, test) for name, t in texts.items()}
    results["linear probe"] = measure(linear_probe(embeddings, data, learn, test), data, test)
    if config.finetune_epochs:
        size = min(config.batch_size, len(learn))
        steps = config.finetune_epochs * (len(learn) // size)
        batches = batch_rows(learn, size, 0, steps, config.seed + 2)
        scores = downstream.finetune(model.encoder, data, batches, test, config)
        results["full fine-tuning"] = measure(scores, data, test)
    if config.balanced:
        chosen = balanced_rows(data, test, config.balanced, config.seed)
        at = np.searchsorted(test, chosen)
        for name, t in texts.items():
            logits = (model.scale.cpu() * images[at] @ t.cpu().T).numpy()
            results[f"balanced, {name}"] = measure_balanced(logits, data, chosen)
        downstream.write_rows(config.folder / "balanced.csv", data, chosen)
    downstream.report(config.folder, results)
    return results


def export(config: Config, data: Radiographs, target: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the tuned encoder in retune.py's folder format, LoRA and IA3 merged into the weights."""
    encoder = stage1(config, data).encoder
    if config.peft == "prefix":
        raise InputError("--peft prefix: virtual tokens do not merge into weights; export lora, ia3 or none")
    if config.peft != "none":
        encoder.text.tower = encoder.text.tower.merge_and_unload()
    encoder.config["name"] = target.name
    if retune.ranks()[0] == 0:
        encoder.cpu().save(target, dtype)
    retune.say(f"written to {target}")


# ----------------------------------------------------------------------------------------------- Command line

EVALUATION = ("balanced", "finetune_epochs", "save_every")  # settings that the stages do not depend on


def run(command: str, config: Config, target: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
    """One command, or `all` of them in order; every stage finds in --output what the one before left."""
    data_config = retune.Config(**{key: getattr(config, key) for key in retune.DATA_KEYS})
    data, folder = two_classes(retune.load_radiographs(data_config)), config.folder
    retune.say(data.note)
    folder.mkdir(parents=True, exist_ok=True)
    with retune.locked(folder, wait=False) if retune.ranks()[0] == 0 else contextlib.nullcontext():
        if retune.ranks()[0] == 0:
            retune.claim(folder, {k: v for k, v in dataclasses.asdict(config).items() if k not in EVALUATION})
        retune.barrier()
        if command in ("pretrain", "all"):
            pretrain(config, data)
        if command in ("prompt", "all"):
            model = stage1(config, data)
            tune_prompt(model, data, downstream.embed_images(model.encoder, data, config), config)
        if command in ("evaluate", "all"):
            evaluate(config, data)
        if command == "export":
            export(config, data, target, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 on success, 2 with one line on standard error for bad input."""
    parser = retune.build_parser(Config, __doc__)
    parser.usage = "%(prog)s command [option ...]"
    commands = ("pretrain", "prompt", "evaluate", "all", "export", "count", "make-tiny")
    parser.add_argument("command", choices=commands, help="a stage, all stages, or another job shown above")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder, for export and make-tiny")
    arguments = parser.parse_args(argv)
    for name, loader in DATASETS.items():
        retune.DATASETS.setdefault(name, loader)
    try:
        config = settle(retune.build_configs(Config, arguments)[0])
        retune.join_ranks()
        if arguments.command == "count":
            print(count(config))
        elif arguments.command == "make-tiny":  # a preset of stage 1, no trainer of its own
            if (target := arguments.to or HERE / "tiny").exists():
                raise InputError(f"{target} exists: move it away, or name another folder with --to")
            folder = "runs/tiny" if arguments.output == Config.output else arguments.output
            config = settle(Config(**TINY, output=folder))
            torch.set_num_threads(1)  # the bytes do not depend on the number of cores
            run("pretrain", config)
            run("export", config, target, torch.float16)
        elif (arguments.command == "export") != bool(arguments.to):
            raise InputError("export needs --to, a new folder; of the others only make-tiny takes one")
        else:
            run(arguments.command, config, arguments.to)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
