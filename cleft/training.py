"""Both stages of the training: schedule, batches, the loop with its checkpoints."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import retune
from cleft.config import Config
from cleft.data import load_batches, make_transform
from cleft.model import Cleft, Prompt, contrastive_loss, contrastive_step
from cleft.towers import build_encoder, trainable
from retune import DualEncoder, InputError, Radiographs


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch_rows(rows: np.ndarray, size: int, first: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of batches `first` to `steps`; an epoch permutes by (seed, epoch) and drops its remainder."""
    if len(rows) < size:
        raise InputError(f"--batch-size {size} is more than the {len(rows)} training images; lower it")
    per_epoch = len(rows) // size
    order = None
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(rows)
        yield order[place * size : (place + 1) * size]


def make_adamw(module: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW without weight decay on one-dimensional parameters, as published, unless --decay-all."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim > 1 or config.decay_all]}
    plain = {"params": [p for p in trained if p.ndim <= 1 and not config.decay_all], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, plain], config.lr, weight_decay=config.weight_decay)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, compute: Callable, batches: Callable, *,
    path: Path, steps: int, rates: tuple, save_every: int,
    after_step: Callable | None = None, validate: Callable | None = None,
) -> nn.Module:  # fmt: skip
    """The loop of both stages; resumes from `path` exactly, as all randomness depends on the step.
    compute(step, batch) leaves gradients and returns the loss; batches(first) yields from step `first` on;
    rates: learning_rate's peak, warmup, floor. Returns the model, frozen, with the last weights or those of
    the lowest `validate`, measured at every checkpoint. InputError when the loss is not finite."""
    trained = [p for p in model.parameters() if p.requires_grad]
    state = load_checkpoint(path, model, optimizer)
    first = state["step"]
    bar = retune.progress(batches(first), desc=path.stem, unit="step", total=steps, initial=first)
    for step, batch in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, *rates)
        optimizer.zero_grad(set_to_none=True)
        loss = compute(step, batch).item()
        if not math.isfinite(loss):
            raise InputError(f"{path.stem}, step {step + 1}: the loss is {loss}; lower the learning rate")
        if retune.ranks()[1] > 1:
            for p in trained:
                torch.distributed.all_reduce(p.grad if p.grad is not None else torch.zeros_like(p))
        optimizer.step()
        if after_step is not None:
            after_step(step)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state["step"] = step + 1
            save_checkpoint(path, model, optimizer, state, validate() if validate else -step)
    retune.barrier()
    model.load_state_dict(state.get("best", {}), strict=False)
    return model.eval().requires_grad_(False)


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable weights and buffers, not a frozen language model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


def save_checkpoint(path: Path, model: nn.Module, optimizer, state: dict, loss: float) -> None:
    """Write all that is needed to resume, and the weights of the lowest loss so far; `state` is updated."""
    if loss < state["lowest"]:
        best = {name: tensor.detach().cpu().clone() for name, tensor in learned(model).items()}
        state |= {"lowest": loss, "best": best}
    state |= {"model": learned(model), "optimizer": optimizer.state_dict()}
    if retune.ranks()[0] == 0:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with retune.atomic(path) as partial:  # a full disk is an OSError here, not in torch.save
            partial.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """What `save_checkpoint` wrote, or step 0 without a file; into the model go the last weights, to resume
    with `optimizer`, else the best ones. InputError for a damaged file or another model's."""
    if not path.exists():
        return {"step": 0, "lowest": math.inf}
    with retune.input_errors(path, "damaged or of another configuration; delete it"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = state["model" if optimizer else "best"]
        if set(weights) != set(learned(model)):
            raise KeyError("it belongs to another model")
        model.load_state_dict(weights, strict=False)
        if optimizer is not None:  # the settings of its groups are the configuration's, not the file's
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        return state


def pretrain(config: Config, data: Radiographs) -> Cleft:
    """Stage 1: both towers on image-text pairs; leaves a model in the run's folder, and resumes there."""
    rank, world = retune.ranks()
    if config.batch_size % world:
        raise InputError(f"--batch-size {config.batch_size} does not divide by {world} ranks")
    told = np.array([bool(text) for text in data.reports])
    rows, held_out = (np.flatnonzero(told & (data.split == part)) for part in ("train", "val"))
    silent = (~told[data.where("train")]).sum()
    retune.log(f"left out, as nothing is known to say: {silent:,} training images")
    encoder = build_encoder(config, list(data.reports) if config.text == "small" else ())
    model = Cleft(encoder, config).to(retune.pick_device(config.device))
    Prompt(model, data.class_names, config)  # what it refuses is refused before the training
    counts = {"image tower": trainable(encoder.image.tower), "text tower": trainable(encoder.text.tower)}
    counts["projections"] = trainable(encoder.image.head) + trainable(encoder.text.head)
    retune.log("trainable parameters: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))
    if rank == 0:
        encoder.tokenizer.backend_tokenizer.save(str(config.folder / "tokenizer.json"))
        retune.write_json(config.folder / "parameters.json", counts)
    first_draw = config.seed * 1_000_003  # numbers the random draws of a run

    def batches(first: int) -> Iterator[tuple[list[int], Tensor]]:
        whole = batch_rows(rows, config.batch_size, first, config.steps, config.seed)
        drawn = enumerate(whole, first_draw + first)
        own = ((draw, np.split(batch, world)[rank].tolist()) for draw, batch in drawn)
        return load_batches(data, make_transform(encoder, config, training=True), own, config.workers)

    def compute(step: int, batch: tuple[list[int], Tensor]) -> Tensor:
        with retune.seeded((first_draw + step) * world + rank):  # dropout
            vectors = embed_pairs(model, data, batch, config)
        return contrastive_step(model.scale, *vectors, config.local_negatives)

    def allocate_ranks(step: int) -> None:  # its statistics start afresh in a resumed run
        encoder.text.tower.base_model.update_and_allocate(step + 1)

    return train(
        model, make_adamw(model, config), compute, batches, path=config.folder / "stage1.pt",
        steps=config.steps, rates=(config.lr, round(config.warmup * config.steps), 1e-8),
        save_every=config.save_every, after_step=allocate_ranks if config.peft == "adalora" else None,
        validate=(lambda: validation_loss(model, data, held_out, config)) if config.select == "best" else None
    )  # fmt: skip


def embed_pairs(model: Cleft, data: Radiographs, batch: tuple, config: Config) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, D] of a batch's pixels [B, 3, H, W] and of the captions of its rows."""
    tokens = model.encoder.tokenize([data.reports[row] for row in batch[0]], config.truncate)
    device = model.log_scale.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return model(*(tensor.to(device) for tensor in (batch[1], *tokens.values())))


@torch.no_grad()
def validation_loss(model: Cleft, data: Radiographs, rows: np.ndarray, config: Config) -> float:
    """The mean contrastive loss of whole validation batches, without augmentation and dropout."""
    if not len(rows):
        raise InputError("no validation image has a caption; keep the last weights with --select last")
    rows = np.random.default_rng(config.seed).permutation(rows)[:1024]
    size = min(len(rows), config.batch_size)
    batches = [(0, rows[i : i + size].tolist()) for i in range(0, len(rows) - size + 1, size)]
    transform = make_transform(model.encoder, config, training=False)
    model.eval()
    losses = []
    for batch in load_batches(data, transform, batches, config.workers):
        losses.append(contrastive_loss(*embed_pairs(model, data, batch, config), model.scale).item())
    model.train()
    return sum(losses) / len(losses)


def load_model(folder: Path, config: Config) -> Cleft:
    """The model that `pretrain` left in `folder`; InputError when it is not finished."""
    path = folder / "stage1.pt"
    if path.exists():
        model = Cleft(build_encoder(config, words=folder / "tokenizer.json"), config)
        if load_checkpoint(path, model)["step"] == config.steps:
            return model.to(retune.pick_device(config.device)).eval().requires_grad_(False)
    raise InputError(f"{path}: stage 1 is not finished; run pretrain with the same options")


def embed_features(model: Cleft, data: Radiographs, config: Config) -> np.ndarray:
    """Stored features [N, W] of the image tower without its projection: what probes are trained on."""
    encoder = model.encoder
    width = encoder.image.head[0].in_features
    settings = encoder.config | {"image": encoder.config["image"] | {"head": []}, "dim": width}
    with torch.device("meta"):
        features = DualEncoder(settings | {"foreground": config.foreground}, encoder.tokenizer)
    features.image.tower = encoder.image.tower
    features.text = nn.Identity()
    features.transform = make_transform(encoder, config, training=False)
    options = {"workers": config.workers, "precision": config.precision, "batch_size": 64}
    options["device"] = str(model.log_scale.device)
    return retune.embed(features.eval(), data, Path(config.cache_dir), **options)


def project(model: Cleft, features: np.ndarray, rows: np.ndarray) -> Tensor:
    """Unit vectors [n, D] of rows [n] of the features [N, W]."""
    head = model.encoder.image.head
    chosen = retune.gather(features, torch.from_numpy(rows), head[0].weight)  # [n, W]
    return nn.functional.normalize(head(chosen), dim=1)


def tune_prompt(model: Cleft, data: Radiographs, features: np.ndarray, config: Config) -> Prompt:
    """Stage 2: multi-label binary cross-entropy of the scaled cosines; only the context tokens change. The
    image tower is frozen, so its stored features [N, W] serve; class texts are encoded once a step."""
    prompt = Prompt(model, data.class_names, config)
    steps = config.prompt_steps
    labels = torch.from_numpy(data.labels)
    rows = data.where("train")
    rows = rows[~np.isnan(data.labels[rows]).all(1)]

    def compute(step: int, batch: np.ndarray) -> Tensor:
        logits = prompt.scale * project(model, features, batch) @ prompt().T  # [B, C]
        loss = retune.prompt_contrastive_loss(logits, labels[batch])
        (loss / retune.ranks()[1]).backward()  # every rank computes the whole batch: it is a few cosines
        return loss.detach()

    return train(
        prompt, torch.optim.SGD([prompt.context], config.prompt_lr, momentum=0.9, weight_decay=1e-3), compute,
        lambda first: batch_rows(rows, config.batch_size, first, steps, config.seed + 1),
        path=config.folder / "stage2.pt", steps=steps, save_every=config.save_every,
        rates=(config.prompt_lr, min(100, steps // 10), config.prompt_lr / 10),
    )  # fmt: skip
