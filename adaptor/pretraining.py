"""Image-report pairs, pre-training on them in resumable epochs, and retrieval to measure what was learned."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from adaptor.config import Config
from adaptor.data import load_images
from adaptor.encoders import fingerprint
from adaptor.model import Adaptor, contrastive_loss
from retune import DualEncoder, InputError, Radiographs

SECTION = re.compile(r"^[ \t]*([A-Z][A-Z /,()]+):", re.MULTILINE)  # a title in a report


def read_report(path: Path) -> str:
    """A MIMIC-CXR report as the authors read it: words of impression and findings, or all; "" if missing."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    _, *parts = SECTION.split(text)  # title, text, title, text, ...
    sections = dict(zip(parts[::2], parts[1::2]))
    chosen = [sections[title] for title in ("IMPRESSION", "FINDINGS") if title in sections]
    return " ".join(re.findall(r"\w+", " ".join(chosen or [text]).lower()))


def caption(labels: Sequence[float], names: Sequence[str]) -> str:
    """A text from labels [C] for sets without reports; unknown labels are not mentioned (ours)."""
    found = [name.replace("_", " ").lower() for name, label in zip(names, labels, strict=True) if label == 1]
    return f"a chest X-ray of a patient with {', '.join(found) or 'no finding'}."


def make_texts(config, data: Radiographs) -> tuple[list[str], str]:
    """(one text per image, "" where there is none and --skip-unpaired allows it; where they come from)."""
    reports = None if data.reports is None else [" ".join(report.split()) for report in data.reports]
    if config.data == "mimic":
        root = Path(config.reports_dir or config.data_dir)
        reports = [read_report((root / name).parent.with_suffix(".txt")) for name in data.names]
        reports = reports if config.reports_dir or any(reports) else None
    if config.texts == "labels" or (reports is None and config.texts == "auto"):
        return [caption(row, data.class_names) for row in data.labels], "captions made from the labels"
    if reports is None:
        raise InputError(f"--texts reports: the data set {config.data} has no reports; use --texts labels")
    if "" in reports and not config.skip_unpaired:
        problem = f"no report ({reports.count('')} images have none); --skip-unpaired leaves them out"
        raise InputError(f"{data.rows[reports.index('')]}: {problem}")
    return reports, "reports"


def embed_texts(encoder: DualEncoder, texts: Sequence[str], cache_dir: str) -> torch.Tensor:
    """Every text's embedding [n, d_text], not normalised, cached; what exceeds the tower's context is cut."""
    key = fingerprint(encoder.text.state_dict(), [encoder.config["text"], list(texts)])[:20]
    file = Path(cache_dir) / f"texts-{key}.safetensors"
    if not file.exists():
        parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        bar = retune.progress(parts, desc="texts", unit="batch")
        embeddings = torch.cat([encoder.encode_texts(part, truncate=True) for part in bar])
        retune.save_tensors(file, {"texts": embeddings}, {})
    return retune.load_tensors(file)[0]["texts"]


@dataclass
class Pairs:
    """Embeddings [N, d_image], [n, d_text], words of pairs; split -> (image rows, text rows), both int64."""

    images: np.ndarray
    texts: torch.Tensor
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]]
    words: Sequence[str]

    def read(self, split: str, chosen: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the chosen pairs of a split, [B, d_image] and [B, d_text], as `like` is."""
        image_rows, text_rows = self.rows[split]
        return retune.gather(self.images, image_rows[chosen], like), self.texts[text_rows[chosen]].to(like)


def make_pairs(config, data: Radiographs, texts: Sequence[str], encoder: DualEncoder, images) -> Pairs:
    """Embed the texts of the images that have one, and pair the rows of each split."""
    paired = np.array([i for i, text in enumerate(texts) if text], int)
    retune.log(f"{len(paired):,} pairs; {len(texts) - len(paired):,} images without a text")
    rows = {split: np.flatnonzero(data.split[paired] == split) for split in ("train", "val", "test")}
    if empty := [split for split, chosen in rows.items() if not len(chosen)]:
        raise InputError(f"--data {config.data}: the {empty[0]} split has no pair with a report")
    rows = {split: (torch.from_numpy(paired[r]), torch.from_numpy(r)) for split, r in rows.items()}
    words = [texts[i] for i in paired]
    return Pairs(images, embed_texts(encoder, words, config.cache_dir), rows, words)


def train_epochs(folder: Path, model, optimizer, seed: int, epochs: int, patience: int, one_epoch) -> list:
    """Call `one_epoch(k)` for each epoch that `folder` does not hold yet; the results of all, each with a
    validation "score". The model ends with the best epoch's weights; `patience` epochs without a better one
    end the training. Each epoch has its own seed and ends on disk: a killed run resumes bit for bit."""
    folder.mkdir(parents=True, exist_ok=True)
    resumable = retune.Method()  # what retune's checkpoints take
    resumable.trained = model
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
    """Align both sides on the training pairs, towers of `LivePairs` too; losses and retrieval per epoch."""
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
                continue  # a lone pair has no negatives
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
    """Recall at 1, 5, 10 and median rank of n pairs, normalised [n, P] each: an image asks for its report
    among the distinct reports, a distinct report for the best of its images. Ties count against the model."""
    _, first, group = np.unique(np.asarray(words), return_index=True, return_inverse=True)
    group = torch.from_numpy(group)
    return {
        "n": len(words), "distinct_reports": len(first),
        "image_to_text": recall(image, group, text[first], group[first]),
        "text_to_image": recall(text[first], group[first], image, group),
    }  # fmt: skip


def recall(query: torch.Tensor, asked: torch.Tensor, candidates: torch.Tensor, offered: torch.Tensor) -> dict:
    """Recalls of queries [q, P] for groups asked [q] among candidates [c, P] of groups offered [c]."""
    ranks = []
    for part, wanted in zip(query.split(1024), asked.split(1024)):
        scores = part @ candidates.T  # [b, c]
        right = wanted[:, None] == offered  # [b, c]
        best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(1))
    rank = torch.cat(ranks)
    wrong = (len(candidates) - offered.bincount()[asked]).double()
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
