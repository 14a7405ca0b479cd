"""Image-report pairs: where texts come from, their frozen embeddings, the rows of a pair."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import retune
from adaptor.encoders import Side, embed
from retune import DualEncoder, InputError, Radiographs, gather, log


def read_report(path: Path) -> str:
    """A MIMIC-CXR report as the authors read it: impression, then findings (else everything), lower-case words.

    "" when the file is missing.
    """
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    _, *parts = retune.SECTION.split(text)  # title, text, title, text, ...
    sections = dict(zip(parts[::2], parts[1::2]))
    chosen = [sections[title] for title in ("IMPRESSION", "FINDINGS") if title in sections]
    return " ".join(re.findall(r"\w+", " ".join(chosen or [text]).lower()))


def caption(labels: Sequence[float], names: Sequence[str]) -> str:
    """A text from labels [C] for sets without reports; unknown labels are not mentioned (ours)."""
    found = [name.replace("_", " ").lower() for name, label in zip(names, labels, strict=True) if label == 1]
    return f"a chest X-ray of a patient with {', '.join(found) or 'no finding'}."


def find_reports(config, data: Radiographs) -> list[str] | None:
    """Each image's report in one line, "" where there is none; None when the data set has no reports."""
    if config.data == "mimic":
        root = Path(config.reports_dir or config.data_dir)
        reports = [read_report((root / name).parent.with_suffix(".txt")) for name in data.names]
        return reports if config.reports_dir or any(reports) else None
    if data.reports is None:
        return None
    return [" ".join(data.reports[i].split()) for i in range(len(data.images))]


def make_texts(config, data: Radiographs) -> tuple[list[str], str]:
    """(one text per image, "" where there is none and --skip-unpaired allows it; where they come from)."""
    reports = None if config.texts == "labels" else find_reports(config, data)
    if reports is None:
        if config.texts == "reports":
            raise InputError(
                f"--texts reports: the data set {config.data} has no reports; use --texts labels"
            )
        return [caption(row, data.class_names) for row in data.labels], "captions made from the labels"
    if "" in reports and not config.skip_unpaired:
        row = data.rows[reports.index("")]
        missing = f"no report ({reports.count('')} images have none)"
        raise InputError(f"{row}: {missing}; --skip-unpaired leaves them out of the pairs")
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

    def read(self, split: str, chosen: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the chosen pairs of a split, [B, d_image] and [B, d_text], as `like` is."""
        image_rows, text_rows = self.rows[split]
        return gather(self.images, image_rows[chosen], like), gather(self.texts, text_rows[chosen], like)


def make_pairs(config, data: Radiographs, texts, encoder: DualEncoder, images, device: str) -> Pairs:
    """Embed the texts of the images that have one, and pair the rows of each split."""
    paired = np.array([i for i, text in enumerate(texts) if text])
    log(f"{len(paired):,} pairs; {len(texts) - len(paired):,} images without a text")
    if not len(paired):
        raise InputError(f"--data {config.data}: no image has a report; use --texts labels")
    words = [texts[i] for i in paired]
    rows = {split: np.flatnonzero(data.split[paired] == split) for split in ("train", "val", "test")}
    if empty := [split for split, chosen in rows.items() if not len(chosen)]:
        raise InputError(f"--data {config.data}: the {empty[0]} split has no pair with a report")
    rows = {split: (torch.from_numpy(paired[r]), torch.from_numpy(r)) for split, r in rows.items()}
    return Pairs(images, embed_texts(encoder, words, config, device), rows, words)
