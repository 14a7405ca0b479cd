"""The aligned pair as one encoder for `retune.py`, and how many parameters were trained."""

import copy

import torch
from torch import nn

import retune
from adaptor.model import Adaptor
from retune import DualEncoder, InputError

PAPERS_ENCODERS = {  # arXiv 2401.01179; BERT-base is the size of BioBERT and ClinicalBERT
    "DINOv2-S + BERT": {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6},
    "DINOv2-B + BERT": {"model_type": "dinov2"},
    "Swin-B + BERT": {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2],
                      "num_heads": [4, 8, 16, 32]},
}  # fmt: skip


def export_pair(model: Adaptor, encoder: DualEncoder, directory: str) -> None:
    """Write towers, projections and adaptor as one encoder in retune's folder format, to RE-tune it (ours).

    One token attends to itself alone: each side is a plain head of torch's modules with the shared weights.
    """
    if "last_stride" in encoder.config["image"]:
        raise InputError("--export: retune.py has no setting for the stride of torchxrayvision's autoencoder")
    names = {"d_model": "width", "nhead": "heads", "dropout": "dropout", "dim_feedforward": "feedforward"}
    layer = {name: model.settings[ours] for name, ours in names.items()} | {"batch_first": True}
    width = model.settings["width"]
    config, state = copy.deepcopy(encoder.config) | {"dim": width}, encoder.state_dict()
    for side in ("image", "text"):
        mean, deviation = getattr(model, f"{side}_mean"), getattr(model, f"{side}_deviation")
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


def parameter_table(model: Adaptor, encoder: DualEncoder) -> str:
    """This run's pair and the paper's: parameters frozen, trained here, trained end-to-end, and the share saved.

    End-to-end is what contrastive pre-training without freezing trains: both towers and the two projections.
    """
    pairs = [("this run", count_parameters(encoder), model)]
    with torch.device("meta"):  # sizes without weights
        text = retune.Tower({"model": {"model_type": "bert"}, "pool": "cls", "head": []})
        for name, settings in PAPERS_ENCODERS.items():
            image = retune.Tower({"model": settings, "pool": "cls", "head": []})
            adaptor = Adaptor(image.tower.config.hidden_size, 768)
            pairs.append((f"{name}, the paper's widths", count_parameters(image, text), adaptor))
    rows = []
    for name, frozen, adaptor in pairs:
        trained = count_parameters(adaptor)
        whole = frozen + count_parameters(adaptor.image_projection, adaptor.text_projection)
        rows.append([name, f"{frozen:,}", f"{trained:,}", f"{whole:,}", f"{1 - trained / whole:.1%}"])
    return retune.markdown_table(["parameters", "frozen", "trained here", "end-to-end", "fewer"], rows)
