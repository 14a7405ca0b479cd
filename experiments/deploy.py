"""A run as one file that needs no PyTorch (ours): `retune.py --export model.onnx --run FOLDER`; its model card; scores.

The file goes from pixels to probabilities: image tower, image adaptor, the prompts' adapted vectors, temperatures and
thresholds. It is made from `adaptors.safetensors` and the encoder alone, which hold nothing of a patient.
"""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import torch
from torch import nn

import retune


class Deployed(nn.Module):
    """uint8 pixels [B, h, w, 3], resized and cropped -> probabilities [B, C] and decisions, bool [B, C]."""

    def __init__(self, encoder, model, bank, temperature, threshold):
        super().__init__()
        self.image = encoder.image
        self.model, self.bank = freeze_prompts(model, bank)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(encoder.config["transform"][name]).view(3, 1, 1))
        self.register_buffer("temperature", torch.tensor(temperature))
        self.register_buffer("threshold", torch.tensor(threshold))

    def forward(self, pixels):
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits = self.model.logits(self.model.whitening(self.image(x)), self.bank)
        probability = (logits / self.temperature).sigmoid()
        return probability, probability >= self.threshold


def freeze_prompts(model, bank) -> tuple:
    """The model without its text adaptor, and the bank of prompts that have been through it."""
    if not isinstance(model, retune.RETune):
        return model, bank
    model = copy.deepcopy(model)
    with torch.inference_mode():
        vectors = model.text_adaptor(bank.embeddings)
        group = bank.group
        if model.pool != "max":
            vectors = bank.pooling(model.pool) @ vectors  # [2C, D]
            group = torch.arange(bank.groups)
    model.text_adaptor = nn.Identity()
    return model, retune.PromptBank(vectors.clone(), group)


def load_deployed(run: Path, config) -> tuple[Deployed, dict, object]:
    """(the module, what is to be known of it, encoder) of a run's folder."""
    path = run / "adaptors.safetensors"
    model, known = retune.load_model(path, config)
    name = known["encoder"] if config.encoder == "tiny" else config.encoder
    encoder = retune.DualEncoder.load(name, config.encoder_dir, known["crop"])
    if encoder.fingerprint() != known["encoder_fingerprint"]:
        raise retune.InputError(
            f"{path}: trained on another encoder than {name}; name the right one with --encoder"
        )
    bank = retune.embed_prompts(encoder, known["prompts"])
    chosen = known.get("decisions", {})
    facts = {"findings": known["classes"]}
    for key, default in (("temperature", 1.0), ("threshold", 0.5)):  # where none was fitted: the paper's rule
        values = chosen.get(key, {})
        facts[key] = [values.get(finding) or default for finding in known["classes"]]
    facts |= {key: encoder.config["transform"][key] for key in ("resize", "crop", "interpolation")}
    return Deployed(encoder, model, bank, facts["temperature"], facts["threshold"]).eval(), facts, encoder


def export(path: Path, run: Path, config) -> None:
    """Write a run as ONNX, atomically; what a program must know of it is JSON in its metadata, `retune`."""
    try:
        import onnx
        import onnxscript  # noqa: F401, the exporter's
    except ImportError:
        raise retune.InputError("--export needs: pip install onnx onnxscript") from None
    module, facts, encoder = load_deployed(run, config)
    size = encoder.transform(torch.zeros(1, 300, 300, dtype=torch.uint8)).shape[1:]
    pixels = torch.zeros(2, *size, 3, dtype=torch.uint8)
    options = {"input_names": ["pixels"], "output_names": ["probability", "decision"], "dynamo": True}
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(module, (pixels,), dynamic_shapes=shapes, verbose=False, **options)
    model = program.model_proto
    for node in model.graph.node:  # the exporter's notes of this machine's source files
        del node.metadata_props[:]
        node.doc_string = ""
    entry = model.metadata_props.add()
    entry.key = "retune"
    entry.value = json.dumps(facts)
    onnx.checker.check_model(model)
    with retune.atomic(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
    print(f"written to {path}: {path.stat().st_size / 1e6:.1f} MB, opset {model.opset_import[0].version}")


def write_card(run: Path) -> None:
    """Fill docs/model_card.md in with a run and write it into the run's folder as README.md."""
    metrics = retune.read_json(run / "metrics.json")
    config = metrics["config"]
    template = (
        (retune.HERE / "docs" / "model_card.md").read_text(encoding="utf-8").split("<!-- card -->\n", 1)[1]
    )
    name = run.resolve().name
    values = {key: str(config[key]) for key in ("encoder", "data", "scenario", "method", "seed")}
    values["encoder"] = Path(config["encoder"]).name
    values |= {
        "name": name,
        "findings": ", ".join(metrics["classes"]),
        "table": (run / "table.md").read_text(),
    }
    values["patients"] = f"{metrics['cost']['train_patients']:,}"
    values["images"] = f"{sum(task['n_train'] for task in metrics['tasks'])}"
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    retune.write_text(run / "README.md", template)
    print(f"written to {run / 'README.md'}; read it before you publish it")


def write_scores(path: Path, predictions: list[dict]) -> None:
    """Write predictions as CSV: per finding probability, decision, and the paper's raw score."""
    findings = next((list(p["findings"]) for p in predictions if "findings" in p), [])
    keys = ("probability", "decision", "score")
    with retune.atomic(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", *(f"{finding} {key}" for finding in findings for key in keys), "error"])
        for p in predictions:
            found = p.get("findings", {})
            cells = [found.get(finding, {}).get(key, "") for finding in findings for key in keys]
            table.writerow(
                [p["image"], *(int(c) if isinstance(c, bool) else c for c in cells), p.get("error", "")]
            )
    print(f"written to {path}: {len(predictions)} images")


def execute(arguments, config) -> None:
    """--export and --export-card."""
    if arguments.export:
        export(arguments.export, arguments.run, config)
    if arguments.export_card:
        write_card(arguments.run)
