"""Pre-training on image-report pairs, epochs that resume, and retrieval, which says what was learned."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.config import Config
from adaptor.data import load_images
from adaptor.model import Adaptor, contrastive_loss
from adaptor.pairs import Pairs
from retune import InputError


class Resumable(nn.ModuleDict):
    """What retune's checkpoints take: a module, with nothing to remember beside its weights."""

    def memory(self) -> dict:
        return {}

    def load_memory(self, tensors: dict) -> None:
        pass


def train_epochs(
    folder: Path, model, optimizer, seed: int, epochs: int, patience: int, one_epoch: Callable
) -> list:
    """Call `one_epoch(k)` for each epoch that `folder` does not hold yet; the results of all, in order.

    Each result has a "score" on validation data. The model ends with the weights of the best one; `patience`
    epochs without a better one end the training. Each epoch draws from a seed of its own and ends on disk: a
    killed process goes on with the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    resumable = Resumable({"model": model})
    done, _ = retune.load_checkpoint(folder, resumable, optimizer)
    history = retune.read_json(folder / "history.json")[:done] if done else []
    bar = retune.progress(range(done, epochs), initial=done, total=epochs, desc=folder.name, unit="epoch")
    for k in bar:
        if k - best_epoch(history) > patience:
            break
        with retune.seeded(seed * 10_007 + k):
            history.append(one_epoch(k))
        retune.write_json(folder / "history.json", history)
        if best_epoch(history) == k:
            retune.save_tensors(folder / "best.safetensors", model.state_dict(), {"epoch": k})
        retune.save_checkpoint(folder, resumable, optimizer, k + 1, 0.0)
    retune.load_weights(model, retune.load_tensors(folder / "best.safetensors")[0], folder)
    return history


def best_epoch(history: Sequence[dict]) -> int:
    """The first epoch with the highest score; 0 before the first."""
    scores = [epoch["score"] for epoch in history]
    return scores.index(max(scores)) if scores else 0


def step_factor(step: int, steps: int, warmup: float = 0.02) -> float:
    """Share of the peak learning rate: linear up over the first 2% of the steps, then down to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


class LivePairs(Pairs):
    """Pairs read through towers that are trained too (ablation): `images` are files, `texts` the towers."""

    def read(self, split: str, chosen: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Pairs.read`, with a graph to the towers' weights."""
        image_rows, text_rows = (rows[chosen].tolist() for rows in self.rows[split])
        pixels = torch.stack(load_images(self.images, image_rows, self.texts.transform))
        tokens = self.texts.tokenize([self.words[i] for i in text_rows], truncate=True).values()
        return self.texts.image(pixels.to(like.device)), self.texts.text(*(t.to(like.device) for t in tokens))


def pretrain(model: Adaptor, pairs: Pairs, config: Config) -> list[dict]:
    """Align the two sides on the training pairs; one dict of losses and validation retrieval per epoch.

    The best epoch by validation loss is kept. With `LivePairs` the towers are trained too.
    """
    trained = nn.ModuleList([model])
    if isinstance(pairs, LivePairs):
        trained.append(pairs.texts.requires_grad_(True))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    n = len(pairs.rows["train"][0])
    if n < 2:
        raise InputError(f"--data {config.data}: {n} training pairs with a report; contrast needs at least 2")
    per_epoch = math.ceil(n / config.batch_size)

    def one_epoch(k: int) -> dict:
        trained.train()
        losses = []
        for i, batch in enumerate(torch.randperm(n).split(config.batch_size)):
            if len(batch) == 1:
                continue  # one pair alone has nothing to be told from
            factor = step_factor(k * per_epoch + i, config.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            image, text = model(*pairs.read("train", batch, model.log_scale))
            loss = contrastive_loss(image, text, model.log_scale, config.text_to_image)
            if not math.isfinite(loss.item()):
                raise InputError(f"pre-training epoch {k + 1}: the loss is {loss.item()}; lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found = validate(trained.eval()[0], pairs, "val", config)
        return {"train_loss": float(np.mean(losses)), "score": -found["loss"], **found}

    place = config.folder / "pretraining"
    history = train_epochs(place, trained, optimizer, config.seed, config.epochs, config.patience, one_epoch)
    trained.eval()
    return history


@torch.no_grad()
def validate(model: Adaptor, pairs: Pairs, split: str, config: Config) -> dict:
    """Contrastive loss in batches of the training size, and retrieval over the whole split."""
    model.eval()
    chosen = torch.arange(len(pairs.rows[split][0])).split(config.batch_size)
    sides = [model(*pairs.read(split, batch, model.log_scale)) for batch in chosen]
    losses = [contrastive_loss(i, t, model.log_scale, config.text_to_image).item() for i, t in sides]
    image, text = (F.normalize(torch.cat(side), dim=-1).cpu() for side in zip(*sides))
    words = [pairs.words[row] for row in pairs.rows[split][1].tolist()]
    return {"loss": float(np.mean(losses)), **retrieval(image, text, words)}


def retrieval(image: torch.Tensor, text: torch.Tensor, words: Sequence[str]) -> dict:
    """Recall at 1, 5, 10 and median rank over n pairs, both ways, from normalised [n, P] each.

    Each image asks for its report among the distinct reports, each distinct report for the best-ranked of its
    images. A wrong candidate with the same score counts as ranked before the right one, so that constant
    embeddings find nothing. `chance` is what a random order recalls.
    """
    _, first, group = np.unique(np.asarray(words), return_index=True, return_inverse=True)
    group, distinct = torch.from_numpy(group), torch.arange(len(first))
    return {
        "n": len(words), "distinct_reports": len(first),
        "image_to_text": recall(image, group, text[first], distinct),
        "text_to_image": recall(text[first], distinct, image, group),
    }  # fmt: skip


def recall(query: torch.Tensor, asked: torch.Tensor, candidates: torch.Tensor, offered: torch.Tensor) -> dict:
    """Recalls of queries [q, P] that ask for the group asked [q] among candidates [c, P] of groups offered [c]."""
    rank, wrong = [], []
    for part, wanted in zip(query.split(1024), asked.split(1024)):
        scores, right = part @ candidates.T, wanted[:, None] == offered  # [b, c]
        best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        rank.append(1 + ((scores >= best) & ~right).sum(1))
        wrong.append((~right).sum(1))
    rank, wrong = torch.cat(rank), torch.cat(wrong).double()
    values = {"median_rank": rank.double().quantile(0.5).item(), "chance": {}}
    missed = 1.0
    for k in range(1, 11):
        missed = missed * (wrong - k + 1).clamp_min(0) / max(1, len(candidates) - k + 1)  # place k too
        if k in (1, 5, 10):
            values[f"recall_{k}"] = (rank <= k).double().mean().item()
            values["chance"][f"recall_{k}"] = 1 - missed.mean().item()
    return values


def retrieval_table(found: dict) -> str:
    """Recall and median rank on the test pairs, both ways: by chance, before and after pre-training."""
    ways = {"image_to_text": "text of image", "text_to_image": "image of text"}
    stages = {"chance": {way: found["test"][way]["chance"] for way in ways}}
    stages |= {"before pre-training": found["before"]} if "before" in found else {}
    stages |= {"adaptor": found["test"]}
    columns = {f"recall_{k}": f"R@{k}" for k in (1, 5, 10)} | {"median_rank": "median rank"}
    header = [f"{ways[way]}, {short}" for way in ways for short in columns.values()]
    rows = [[name, *(m[way].get(key) for way in ways for key in columns)] for name, m in stages.items()]
    return retune.markdown_table([f"retrieval, {found['test']['n']:,} test pairs", *header], rows)
