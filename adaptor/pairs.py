"""Image-report pairs: where texts come from, their frozen embeddings, the rows of a pair."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import retune
from adaptor.encoders import fingerprint
from retune import DualEncoder, InputError, Radiographs


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
    return None if data.reports is None else [" ".join(report.split()) for report in data.reports]


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
        missing = f"no report ({reports.count('')} images have none)"
        where = data.rows[reports.index("")]
        raise InputError(f"{where}: {missing}; --skip-unpaired leaves them out of the pairs")
    return reports, "reports"


def embed_texts(encoder: DualEncoder, texts: Sequence[str], cache_dir: str) -> torch.Tensor:
    """Every text's embedding [n, d_text], not normalised, made once; what exceeds the tower's context is cut."""
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
    """Image-report pairs: rows of the image embeddings [N, d_image] and of the text embeddings [n, d_text].

    split -> (image rows, text rows), both int64 [n of the split]; words: what each text row says.
    """

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
