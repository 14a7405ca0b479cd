"""A run as a file that needs no PyTorch, its model card, scores as CSV, heat maps (ours; docs/deploy.md).

The ONNX file goes from pixels to probabilities: image tower, image adaptor, the prompts' adapted vectors,
temperatures, thresholds. It is made of `adaptors.safetensors` and the encoder, which hold no patient's data.

A heat map shows cos+ - cos- (cos+ with --no-negatives) of each patch, or position of the last map, before
and after the adaptors, over the image that the encoder saw: what the score is made of, not why a finding is
there. It needs a tower whose positions go through its embedding's head.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import retune
from experiments.common import SolvedBank
from experiments.figures import new_figure
from experiments.runs import full_name


class Deployed(nn.Module):
    """uint8 pixels [B, h, w, 3], resized and cropped -> probabilities [B, C] and decisions, bool [B, C]."""

    def __init__(self, encoder, model, bank, facts: dict):
        super().__init__()
        self.image = encoder.image
        self.model, self.bank = freeze_prompts(model, bank)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(encoder.config["transform"][name]).view(3, 1, 1))
        for name in ("temperature", "threshold"):
            self.register_buffer(name, torch.tensor(facts[name]))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits = self.model.logits(self.model.whitening(self.image(x)), self.bank)
        probability = (logits / self.temperature).sigmoid()
        return probability, probability >= self.threshold


@torch.no_grad()
def freeze_prompts(model, bank) -> tuple:
    """The model without its text adaptor, and the bank of prompts that have been through it."""
    if not isinstance(model, retune.RETune):
        plain = isinstance(model.whitening, nn.Identity)
        return model, bank if plain else SolvedBank(bank, model.whitening)
    vectors = model.text_adaptor(bank.embeddings)
    group = bank.group
    if model.pool != "max":
        vectors = bank.pooling(model.pool) @ vectors  # [2C, D]
        group = torch.arange(bank.groups)
    model = copy.deepcopy(model)
    model.text_adaptor = nn.Identity()
    return model, retune.PromptBank(vectors, group)


def export(path: Path, run: Path, config) -> None:
    """Write a run as ONNX; what a program must know of it is JSON in its metadata, under `retune`."""
    with retune.input_errors("--export", "needs pip install onnx onnxscript"):
        import onnx
        import onnxscript  # noqa: F401, the exporter's
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder, model, bank, known = retune.load_predictor(run, config)
    facts = {"findings": known["classes"]}
    facts |= {key: encoder.config["transform"][key] for key in ("resize", "crop", "interpolation")}
    for key, default in (("temperature", 1.0), ("threshold", 0.5)):  # where none was fitted: the paper's rule
        fitted = known.get("decisions", {}).get(key, {})
        facts[key] = [fitted.get(name) or default for name in known["classes"]]
    height, width = encoder.transform(torch.zeros(1, 300, 300, dtype=torch.uint8)).shape[1:]
    module = Deployed(encoder, model, bank, facts).eval().requires_grad_(False)
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    options = {"input_names": ["pixels"], "output_names": ["probability", "decision"], "verbose": False}
    options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    with retune.input_errors("--export", f"{type(model).__name__} cannot be written as ONNX"):
        graph = torch.onnx.export(module, (example,), dynamo=True, **options).model_proto
    if not graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise retune.InputError(f"--export: {type(model).__name__} works on a fixed batch alone here")
    for node in graph.graph.node:  # notes of the exporter on the source files
        del node.metadata_props[:]
    onnx.helper.set_model_props(graph, {"retune": json.dumps(facts)})
    with retune.atomic(path) as partial:
        partial.write_bytes(graph.SerializeToString(deterministic=True))
    print(f"written to {path}: {path.stat().st_size / 1e6:.1f} MB, opset {graph.opset_import[0].version}")


def write_card(run: Path) -> None:
    """Write the card of docs/model_card.md, filled in with a run, into the run's folder as README.md."""
    metrics = retune.read_json(run / "metrics.json")
    config = metrics["config"]
    card = (retune.HERE / "docs" / "model_card.md").read_text(encoding="utf-8").split("<!-- card -->\n")[1]
    used = ["seed"]
    if metrics["tasks"] and config["method"] == "retune":
        used += ["adaptor", "adapt"]
    if metrics["cost"]["trainable_parameters"]:
        used += ["lr", "batch_size", *(["epochs"] if config["method"] != "joint" else [])]  # it converges
    method = full_name(config | {"set": " ".join(config["set"])}) if metrics["tasks"] else "zero-shot"
    values = config | {"name": run.resolve().name, "findings": ", ".join(metrics["classes"])}
    values |= {"encoder": Path(config["encoder"]).name, "patients": metrics["cost"]["train_patients"]}
    values |= {"method": method, "settings": ", ".join(f"{name} {config[name]}" for name in used)}
    values["table"] = (run / "table.md").read_text(encoding="utf-8").strip()
    for key, value in values.items():
        card = card.replace(f"{{{key}}}", str(value))
    retune.write_text(run / "README.md", card)
    print(f"written to {run / 'README.md'}; read it before you publish it")


@torch.inference_mode()
def embed_positions(encoder, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels [B,3,H,W] -> embeddings [B,T,D] of positions, after the CLS token if there is one, and (h, w).

    InputError for towers that pool by more than a choice or a mean, or whose last map is not available.
    """
    image = encoder.image
    pool = getattr(image, "pool", "")  # open_clip's towers have none to name
    by_norm = pool == "pooler" and encoder.config["image"]["model"]["model_type"] == "clip_vision_model"
    if not by_norm and pool not in ("cls", "mean", "none"):
        raise retune.InputError(f"--heatmap: {encoder.config['name']} pools its map by a layer of its own")
    x = image.tower(pixels)["last_hidden_state"]
    if x.ndim == 4:
        x = image.head[:-2](x) if pool == "none" else x  # BioViL's head ends with the mean over the map
        size = tuple(x.shape[2:])
        x = x.flatten(2).mT  # [B,D,h,w] -> [B,T,D]
        return x if pool == "none" else image.head(x), size
    side = int(x.shape[1] ** 0.5)
    return image.head(image.tower.post_layernorm(x) if by_norm else x), (side, side)


@torch.inference_mode()
def similarity_maps(encoder, model, bank, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """cos+ - cos-, or cos+ without negatives, of pixels [3,H,W] before and after: [C,h,w] each."""
    positions, size = embed_positions(encoder, pixels[None])
    x = positions[0, -size[0] * size[1] :]  # [h*w,D]
    before = retune.RETune(encoder.dim, adapt="none", pool=model.pool, negatives=model.negatives)
    after = model.logits(model.whitening(x), bank) / model.logit_scale
    maps = {"before: frozen encoder": before.logits(x, bank).T, "after: adaptors": after.T}
    return {title: values.unflatten(1, size) for title, values in maps.items()}


def draw_heatmaps(images: Sequence[str], run: Path, folder: Path, config) -> None:
    """A PNG per image in `folder`: the image, and the maps of every finding before and after the adaptors.

    A column per finding; red is for the finding, blue against it; each row has its own scale.
    """
    encoder, model, bank, known = retune.load_predictor(run, config)
    if not isinstance(model, retune.RETune):
        raise retune.InputError(f"--heatmap: {type(model).__name__} compares no image with prompts")
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(retune.progress(images, desc="drawing", unit="image")):
        pixels = encoder.transform(retune.read_image(image))
        maps = similarity_maps(encoder, model, bank, pixels)
        grey = pixels.mean(0).numpy()
        extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
        path = folder / f"{i:04d}-{Path(image).stem}.png"
        with new_figure(path, len(known["classes"]) + 1, 2, 1.9, 2.2) as (figure, axes):
            for axis in axes:
                axis.imshow(grey, cmap="gray")
                axis.set_axis_off()
            for (first, *row), (title, values) in zip(axes.reshape(2, -1), maps.items()):
                first.set_title(title, fontsize=9)
                limit = values.abs().max().item()
                style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.55, "extent": extent}
                for axis, name, overlay in zip(row, known["classes"], values.numpy()):
                    axis.set_title(name, fontsize=9)
                    picture = axis.imshow(overlay, interpolation="bilinear", **style)
                label = "cos+ - cos-" if model.negatives else "cos+"
                figure.colorbar(picture, ax=[first, *row], label=label)
    print(f"written to {folder}: {len(images)} figures")


def write_scores(path: Path, predictions: list[dict]) -> None:
    """Predictions as CSV: per image and finding score, present (the paper's), probability and decision."""
    rows = [{"image": p["image"], **p.get("findings", {}), "error": p.get("error", "")} for p in predictions]
    table = pd.json_normalize(rows, sep=" ")
    table["error"] = table.pop("error")  # last
    flags = table.filter(regex=" (present|decision)$").columns
    table[flags] = table[flags].astype("Int64")  # 1 and 0; blank where the image was unreadable
    path.parent.mkdir(parents=True, exist_ok=True)
    retune.write_text(path, table.to_csv(index=False))
    print(f"written to {path}: {len(table)} images")


def execute(arguments, config, predictions: list[dict]) -> None:
    """What the command line asks for as files."""
    if arguments.export:
        export(arguments.export, arguments.run, config)
    if arguments.export_card:
        write_card(arguments.run)
    if predictions and arguments.output != retune.Config.output:
        write_scores(Path(arguments.output), predictions)
    if arguments.heatmap:
        images = [p["image"] for p in predictions if "findings" in p]
        draw_heatmaps(images, arguments.run, arguments.heatmap, config)
