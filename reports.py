"""The texts of image-report pairs for `adaptor.py`: where they come from, and their frozen embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from retune import DualEncoder, InputError, Radiographs
from unimodal import Side, embed


def read_sections(text: str) -> str:
    """The findings and impression of a MIMIC-CXR report in one line; empty when it has neither.

    A section runs from its upper-case heading to the next; the blanks left by de-identification (___) go.
    """
    pieces = re.split(r"(?m)^[ \t]*([A-Z][A-Z /,()]*[A-Z)])[ \t]*:", text)[1:]  # heading, body, heading, ...
    sections = zip(pieces[::2], pieces[1::2])
    wanted = [body for heading, body in sections if "FINDINGS" in heading or "IMPRESSION" in heading]
    return " ".join(re.sub(r"_{2,}", " ", " ".join(wanted)).split())


def caption(labels: Sequence[float], names: Sequence[str]) -> str:
    """A text from labels [C] for sets without reports; unknown labels are not mentioned (ours)."""
    found = [name.replace("_", " ").lower() for name, label in zip(names, labels, strict=True) if label == 1]
    return f"a chest X-ray of a patient with {', '.join(found) or 'no finding'}."


def make_texts(config, data: Radiographs) -> tuple[list[str], str]:
    """(one text per image, "" where there is none and --skip-unpaired allows it; where they come from)."""
    reports = data.reports
    if config.data == "mimic" and config.texts != "labels":
        root = Path(config.reports_dir or config.data_dir)
        files = [root / Path(name).parent.with_suffix(".txt") for name in data.names]
        found = {
            file: file.read_text(encoding="utf-8", errors="replace") for file in set(files) if file.is_file()
        }
        if found or config.texts == "reports" or config.reports_dir:
            reports = [read_sections(found.get(file, "")) for file in files]
    if config.texts == "labels" or (reports is None and config.texts == "auto"):
        return [caption(row, data.class_names) for row in data.labels], "captions made from the labels"
    if reports is None:
        raise InputError(f"--texts reports: the data set {config.data} has no reports; use --texts labels")
    reports = [" ".join(text.split()) for text in reports]
    if "" in reports and not config.skip_unpaired:
        row, missing = data.rows[reports.index("")], reports.count("")
        raise InputError(
            f"{row}: no report ({missing} images have none); --skip-unpaired leaves them out of the pairs"
        )
    return reports, "reports"


class TokenRows:
    """Reports as rows of token ids and their mask, int64 [2, L], so that retune's `embed` can read them by index."""

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
