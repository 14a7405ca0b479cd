"""The demo's two towers, each trained alone: an autoencoder of images, a masked language model of reports.
They see phantoms of other patients than the demo's, and no image and report is ever paired, so whatever
alignment the demo shows was learned by the adaptor. That would not be so for the towers of `tiny`."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import DualEncoder

IMAGE = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 128], "depths": [1, 1],
         "layer_type": "basic"}  # fmt: skip
TEXT = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
TRANSFORM = {"resize": 64, "crop": 64, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
PHANTOMS = 3000  # images to denoise; as many other phantoms give the reports
STEPS = {"image": 250, "text": 300}
BATCH = 64


def demo_encoder(cache_dir: Path) -> DualEncoder:
    """The two towers side by side in one DualEncoder without heads, trained once and kept in `cache_dir`."""
    source = repr((1, IMAGE, TEXT, TRANSFORM, PHANTOMS, sorted(STEPS.items()))).encode()
    folder = cache_dir / f"unimodal-{hashlib.sha256(source).hexdigest()[:12]}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with retune.locked(cache_dir, wait=True):
        if not folder.exists():
            retune.log("training the demo's two encoders, each alone: autoencoder, masked language model")
            train_towers().save(folder)
    return DualEncoder.load(str(folder))


def train_towers() -> DualEncoder:
    from demo.phantoms import make_phantoms

    films = make_phantoms(PHANTOMS, seed=2000, domain="pretrain").images
    reports = make_phantoms(PHANTOMS, seed=3000, domain="pretrain").reports  # of other patients
    tokenizer = build_tokenizer(reports)
    text = {"model": TEXT | {"vocab_size": len(tokenizer)}, "context_length": 128, "pool": "mean", "head": []}
    image = {"model": IMAGE, "pool": "mean", "head": []}
    parts = {"name": "unimodal", "dim": 128, "image": image, "text": text, "transform": TRANSFORM}
    with retune.seeded(7):
        encoder = DualEncoder(parts, tokenizer).train().requires_grad_(True)
        train_image(encoder, films, STEPS["image"])
        train_text(encoder, reports, STEPS["text"])
    return encoder.eval().requires_grad_(False)


def build_tokenizer(reports: Sequence[str]):
    """A fast tokenizer of lower-case words and punctuation: [CLS] text [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(reports, trainers.WordLevelTrainer(special_tokens=list(names.values())))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def minimise(loss: Callable[[], torch.Tensor], modules: Sequence[nn.Module], steps: int, peak: float) -> None:
    """AdamW with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(nn.ModuleList(modules).parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps)
    for _ in retune.progress(range(steps), desc="demo's towers", unit="step"):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def train_image(encoder: DualEncoder, images: Sequence, steps: int) -> None:
    """Denoising autoencoder: from a noisy film's map [B, 128, 8, 8] to the clean film at half size."""
    pixels = torch.stack([encoder.transform(torch.from_numpy(np.asarray(image))[None]) for image in images])
    decoder = nn.Sequential(nn.Conv2d(128, 16, 1), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(),
                            nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(),
                            nn.Upsample(scale_factor=2), nn.Conv2d(32, 1, 3, padding=1))  # fmt: skip

    def loss() -> torch.Tensor:
        clean = pixels[torch.randint(len(pixels), (BATCH,))]  # [B, 3, 64, 64]
        contrast = 1 + 0.3 * torch.randn(BATCH, 1, 1, 1)
        clean = clean * contrast + 0.3 * torch.randn(BATCH, 1, 1, 1)
        features = encoder.image.tower(clean + 0.3 * torch.randn_like(clean)).last_hidden_state
        return F.mse_loss(decoder(features), F.avg_pool2d(clean[:, :1], 2))

    minimise(loss, [encoder.image, decoder], steps, 4e-3)


def train_text(encoder: DualEncoder, reports: Sequence[str], steps: int) -> None:
    """Masked language model: 15% of the words are replaced by [MASK] and have to be predicted."""
    ids, attention = encoder.tokenize(list(reports)).values()
    mask_id = encoder.tokenizer.mask_token_id
    decoder = nn.Linear(128, len(encoder.tokenizer))

    def loss() -> torch.Tensor:
        batch = torch.randint(len(ids), (BATCH,))
        longest = int(attention[batch].sum(1).max())
        target = ids[batch, :longest]
        hidden = (torch.rand(target.shape) < 0.15) & (target > mask_id)  # special tokens have the lowest ids
        seen = target.masked_fill(hidden, mask_id)
        features = encoder.text.tower(seen, attention_mask=attention[batch, :longest])
        return F.cross_entropy(decoder(features.last_hidden_state[hidden]), target[hidden])

    minimise(loss, [encoder.text, decoder], steps, 2e-3)
