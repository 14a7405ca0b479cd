"""Image-report pairs for `adaptor.py`: where texts come from, their frozen embeddings, the rows of a pair."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adaptor.unimodal import Side, embed
from retune import DualEncoder, InputError, Radiographs, read_rows, say


def read_or_blank(texts: Sequence[str], i: int) -> str:
    """Text i on one line, "" when its file is missing."""
    try:
        return " ".join(texts[i].split())
    except FileNotFoundError:
        return ""


def caption(labels: Sequence[float], names: Sequence[str]) -> str:
    """A text from labels [C] for sets without reports; unknown labels are not mentioned (ours)."""
    found = [name.replace("_", " ").lower() for name, label in zip(names, labels, strict=True) if label == 1]
    return f"a chest X-ray of a patient with {', '.join(found) or 'no finding'}."


def make_texts(config, data: Radiographs) -> tuple[list[str], str]:
    """(one text per image, "" where there is none and --skip-unpaired allows it; where they come from)."""
    reports = data.reports
    if config.reports_dir:
        from public_data import MimicReports

        reports = MimicReports([Path(config.reports_dir) / name for name in data.names])
    if config.texts == "labels" or (reports is None and config.texts == "auto"):
        return [caption(row, data.class_names) for row in data.labels], "captions made from the labels"
    if reports is None:
        raise InputError(f"--texts reports: the data set {config.data} has no reports; use --texts labels")
    reports = [read_or_blank(reports, i) for i in range(len(data.images))]
    if "" in reports and not config.skip_unpaired:
        row, missing = data.rows[reports.index("")], reports.count("")
        raise InputError(
            f"{row}: no report ({missing} images have none); --skip-unpaired leaves them out of the pairs"
        )
    return reports, "reports"


class TokenRows:
    """Reports as rows of token ids and mask, int64 [2, L], which retune's `embed` can read by index."""

    def __init__(self, encoder: DualEncoder, texts: Sequence[str]):
        self.tokenize, self.texts = encoder.tokenize, texts
        self.length = encoder.config["text"]["context_length"]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, row: int) -> np.ndarray:
        tokens = self.tokenize([self.texts[row]], truncate=True)
        ids, mask = tokens["input_ids"][0], tokens["attention_mask"][0]
        return F.pad(torch.stack([ids, mask]), (0, self.length - len(ids))).numpy()


class TextSide(Side):
    """The text tower for retune's `embed`, over TokenRows."""

    def __init__(self, encoder: DualEncoder):
        super().__init__(encoder, "text", encoder.text_dim)
        self.transform = itemgetter(0)  # [1, 2, L] -> [2, L]

    @torch.inference_mode()
    def encode_images(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of TokenRows [B, 2, L] -> text embeddings [B, d_text]."""
        tokens = tokens[..., : int(tokens[:, 1].sum(1).max())]
        return self.encoder.text(tokens[:, 0], tokens[:, 1]).float()


def embed_texts(encoder: DualEncoder, texts: Sequence[str], config, device: str) -> np.memmap:
    """Embed every text once: [n, d_text], not normalised; what exceeds the tower's context is cut."""
    n, digest = len(texts), hashlib.sha256("\0".join(texts).encode()).hexdigest()
    rows = Radiographs(TokenRows(encoder, texts), np.zeros((n, 0)), (), [""] * n, ["train"] * n, key=digest)
    return embed(TextSide(encoder), rows, config, device)


@dataclass
class Pairs:
    """Image-report pairs: rows of the image embeddings [N, d_image] and of the text embeddings [n, d_text].

    split -> (image rows, text rows), both int64 [n of the split]; words: what each text row says.
    """

    images: np.ndarray
    texts: np.ndarray
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]]
    words: Sequence[str]

    def read(self, split: str, chosen: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        image_rows, text_rows = self.rows[split]
        images, texts = read_rows(self.images, image_rows[chosen]), read_rows(self.texts, text_rows[chosen])
        return images.to(device), texts.to(device)


def make_pairs(config, data: Radiographs, texts, encoder: DualEncoder, images, device: str) -> Pairs:
    """Embed the texts of the images that have one, and pair the rows of each split."""
    paired = np.array([i for i, text in enumerate(texts) if text])
    say(f"{len(paired):,} pairs; {len(texts) - len(paired):,} images without a text")
    if not len(paired):
        raise InputError(f"--data {config.data}: no image has a report; use --texts labels")
    words = [texts[i] for i in paired]
    rows = {split: np.flatnonzero(data.split[paired] == split) for split in ("train", "val", "test")}
    if empty := [split for split, chosen in rows.items() if not len(chosen)]:
        raise InputError(f"--data {config.data}: the {empty[0]} split has no pair with a report")
    rows = {split: (torch.from_numpy(paired[r]), torch.from_numpy(r)) for split, r in rows.items()}
    return Pairs(images, embed_texts(encoder, words, config, device), rows, words)
