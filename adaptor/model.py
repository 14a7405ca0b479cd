"""The method: projections, shared transformer layers, and the contrastive loss."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import InputError


class Layer(nn.TransformerEncoderLayer):
    """torch's post-norm encoder layer (ReLU) with a query from elsewhere; keys, values, residual are `src`'s.

    Its parameters have torch's names, so that an exported pair runs on torch's own module.
    """

    def forward(self, src: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """src [B, T, P], query [B, T, P] (src itself when None) -> [B, T, P]."""
        query = src if query is None else query
        if query.shape != src.shape:
            raise ValueError(f"query {tuple(query.shape)} must have the shape of src {tuple(src.shape)}")
        x = self.norm1(src + self.dropout1(self.self_attn(query, src, src, need_weights=False)[0]))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Adaptor(nn.Module):
    """Projections and L shared transformer layers on frozen embeddings.

    Each layer's weights serve both directions: image <- layer(image, query=text), then text <- layer(text,
    query=new image). With one token a modality the attention weight is 1 and the query cannot matter: no
    information leaks from a pair's one half into the other. Outputs are not normalised.
    """

    def __init__(
        self, image_dim: int, text_dim: int, width: int = 768, layers: int = 2, heads: int = 12,
        feedforward: int = 2048, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.settings = {"image_dim": image_dim, "text_dim": text_dim, "width": width, "layers": layers,
                         "heads": heads, "feedforward": feedforward, "dropout": dropout}  # fmt: skip
        for side, dim in (("image", image_dim), ("text", text_dim)):  # change nothing until `standardise`
            self.register_buffer(f"{side}_mean", torch.zeros(dim))
            self.register_buffer(f"{side}_deviation", torch.ones(dim))
        self.image_projection = nn.Linear(image_dim, width, bias=False)
        self.text_projection = nn.Linear(text_dim, width, bias=False)
        sizes = (width, heads, feedforward, dropout)
        self.layers = nn.ModuleList(Layer(*sizes, batch_first=True) for _ in range(layers))
        self.log_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), CLIP's

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paired embeddings [B, d_image], [B, d_text] (or tokens [B, T, d]) -> both [B, P] (or [B, T, P])."""
        image, text = self.project("image", images), self.project("text", texts)
        for layer in self.layers:
            image = layer(image, text)
            text = layer(text, image)
        return image.reshape(*images.shape[:-1], -1), text.reshape(*texts.shape[:-1], -1)

    def alone(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """One side by itself, through self-attention: [B, d] -> [B, P], or tokens [B, T, d] -> [B, T, P]."""
        x = self.project(side, embeddings)
        for layer in self.layers:
            x = layer(x)
        return x.reshape(*embeddings.shape[:-1], -1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What downstream tasks get: `alone` of images [B, d] or tokens [B, T, d], L2-normalised."""
        return F.normalize(self.alone("image", images), dim=-1)

    def project(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, d] or [B, T, d] -> L2-normalised tokens [B, 1 or T, P]."""
        x = F.normalize(getattr(self, f"{side}_projection")(self.centre(side, embeddings)), dim=-1)
        return x if x.ndim == 3 else x[:, None]

    def centre(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [.., d] in the scale of `standardise`; unchanged without it."""
        return (embeddings - getattr(self, f"{side}_mean")) / getattr(self, f"{side}_deviation")

    def standardise(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        """Take each dimension's mean and deviation over the training embeddings [n, d] of both sides (ours).

        Embeddings of many towers are nearly parallel (the demo's autoencoder: mean cosine 0.99), and what
        tells them apart would be lost in the projection's normalisation until long training finds it.
        """
        for side, embeddings in (("image", images), ("text", texts)):
            getattr(self, f"{side}_mean").copy_(embeddings.mean(0))
            getattr(self, f"{side}_deviation").copy_(embeddings.std(0).clamp_min(1e-6))


def contrastive_loss(
    image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, text_to_image: float = 0.75
) -> torch.Tensor:
    """Weighted contrastive loss of pairs [B, P], normalised here: each text among images has `text_to_image`.

    The authors hand the matrix with texts as rows to a loss whose first term has the weight 0.75.
    """
    logits = log_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T  # [B texts, B images]
    pair = torch.arange(len(logits), device=logits.device)
    texts_choose, images_choose = F.cross_entropy(logits, pair), F.cross_entropy(logits.T, pair)
    return text_to_image * texts_choose + (1 - text_to_image) * images_choose


def save_adaptor(folder: Path, model: Adaptor, encoder) -> None:
    """Write `adaptor.safetensors`: weights, and which towers they fit (`encoder.tower_ids`)."""
    known = {"towers": encoder.tower_ids, "name": encoder.config["name"], "model": model.settings}
    retune.save_tensors(folder / "adaptor.safetensors", model.state_dict(), known)


def load_adaptor(folder: str | Path, encoder) -> Adaptor:
    """A finished run's adaptor; InputError when it was trained on towers of other weights.

    The transform may differ: pre-training at one resolution and segmenting at another is what the paper does.
    """
    tensors, known = retune.load_tensors(Path(folder) / "adaptor.safetensors")
    if known["towers"] != encoder.tower_ids:
        raise InputError(f"{folder}: its adaptor was trained on other encoders ({known['name']}); name them")
    model = Adaptor(**known["model"])
    retune.load_weights(model, tensors, folder)
    return model.eval()
