"""The method: projections, shared transformer layers, contrastive loss; saving, loading, export, counts."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import retune
from retune import DualEncoder, InputError

FEATURES = ("adaptor", "bare backbone")  # what downstream tasks compare


class Layer(nn.TransformerEncoderLayer):
    """torch's post-norm encoder layer (ReLU) with a query from elsewhere; all else is of `src`."""

    def forward(self, src: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """src [B, T, P], query [B, T, P] (src itself when None) -> [B, T, P]."""
        query = src if query is None else query
        if query.shape != src.shape:
            raise ValueError(f"query {tuple(query.shape)} must have the shape of src {tuple(src.shape)}")
        x = self.norm1(src + self.dropout1(self.self_attn(query, src, src, need_weights=False)[0]))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Adaptor(nn.Module):
    """Projections and L transformer layers, whose weights serve both directions: image <- layer(image,
    query=text), then text <- layer(text, query=new image). With one token a modality the query cannot matter:
    nothing leaks from one half of a pair into the other. Outputs are not normalised."""

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
        image = self.project("image", images)
        text = self.project("text", texts)
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

    @torch.no_grad()
    def features(self, images: torch.Tensor, kind: str = "adaptor") -> torch.Tensor:
        """Downstream features of images [B, d] or tokens [B, T, d]: adapted and L2-normalised, or bare."""
        if kind == "bare backbone":
            return self.centre("image", images)
        return F.normalize(self.alone("image", images), dim=-1)

    def project(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, d] or [B, T, d] -> L2-normalised tokens [B, 1 or T, P]."""
        x = F.normalize(getattr(self, f"{side}_projection")(self.centre(side, embeddings)), dim=-1)
        return x if x.ndim == 3 else x[:, None]

    def centre(self, side: str, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings [.., d] in the scale of `standardise`; unchanged without it."""
        return (embeddings - getattr(self, f"{side}_mean")) / getattr(self, f"{side}_deviation")

    def standardise(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        """Take mean and deviation of the training embeddings [n, d] of both sides (ours): many towers' are
        nearly parallel, and the projection's normalisation would lose what tells them apart."""
        for side, embeddings in (("image", images), ("text", texts)):
            getattr(self, f"{side}_mean").copy_(embeddings.mean(0))
            getattr(self, f"{side}_deviation").copy_(embeddings.std(0).clamp_min(1e-6))


def contrastive_loss(image, text, log_scale: torch.Tensor, text_to_image: float = 0.75) -> torch.Tensor:
    """Contrastive loss of pairs [B, P], normalised here; `text_to_image` weighs the texts' choice."""
    logits = log_scale.exp() * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T  # [B texts, B images]
    pair = torch.arange(len(logits), device=logits.device)
    texts_choose = F.cross_entropy(logits, pair)
    images_choose = F.cross_entropy(logits.T, pair)
    return text_to_image * texts_choose + (1 - text_to_image) * images_choose


def load_adaptor(folder: str | Path, encoder) -> Adaptor:
    """A run's adaptor; InputError when its towers had other weights or pooling. The image size may differ."""
    tensors, known = retune.load_tensors(Path(folder) / "adaptor.safetensors")
    if known["towers"] != encoder.tower_ids:
        raise InputError(f"{folder}: its adaptor was trained on other encoders, {known['name']}; name them")
    model = Adaptor(**known["model"])
    retune.load_weights(model, tensors, folder)
    return model.eval()


def export_pair(model: Adaptor, encoder: DualEncoder, directory: str) -> None:
    """Write the aligned pair for retune (ours): a lone token attends to itself, so a side is a plain head."""
    if "last_stride" in encoder.config["image"]:
        raise InputError("--export: retune.py has no setting for the stride of torchxrayvision's autoencoder")
    names = {"d_model": "width", "nhead": "heads", "dropout": "dropout", "dim_feedforward": "feedforward"}
    layer = {name: model.settings[ours] for name, ours in names.items()} | {"batch_first": True}
    width = model.settings["width"]
    config = copy.deepcopy(encoder.config) | {"dim": width}
    state = encoder.state_dict()
    for side in ("image", "text"):
        mean = getattr(model, f"{side}_mean")
        deviation = getattr(model, f"{side}_deviation")
        weight = getattr(model, f"{side}_projection").weight.detach() / deviation  # the mean becomes a bias
        config[side]["head"] = [
            ["Linear", {"in_features": len(mean), "out_features": width}],
            ["Normalize", {}], ["Unflatten", {"dim": 1, "unflattened_size": [1, width]}],
            *[["TransformerEncoderLayer", layer]] * len(model.layers), ["Flatten", {}],
        ]  # fmt: skip
        state |= {f"{side}.head.0.weight": weight, f"{side}.head.0.bias": -weight @ mean}
        for i, module in enumerate(model.layers, 3):
            state |= {f"{side}.head.{i}.{key}": value for key, value in module.state_dict().items()}
    with retune.seeded(0):
        pair = DualEncoder(config, encoder.tokenizer)
    retune.load_weights(pair, {key: value.cpu() for key, value in state.items()}, "the aligned pair")
    pair.save(directory)


def count_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
