"""One run: data, towers, pre-training, downstream tasks, report. Finished stages are not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Sequence

import numpy as np
import torch

import retune
from adaptor.classification import classification_table, classify, labelled_shares
from adaptor.config import Config, resolve_defaults
from adaptor.data import find_masks, load_data
from adaptor.encoders import Side, embed, fingerprint, load_backbones, pooling_note
from adaptor.export import count_parameters, export_pair, parameter_table
from adaptor.figures import can_draw, draw_curves, draw_embeddings, draw_overlay
from adaptor.model import Adaptor, load_adaptor, save_adaptor
from adaptor.pairs import Pairs, make_pairs, make_texts
from adaptor.pretraining import LivePairs, pretrain, retrieval_table, validate
from adaptor.segmentation import adapt, segment, segmentation_table
from retune import DualEncoder, InputError, Radiographs, gather, log, ranks

# settings in which the runs of one folder may differ beside retune's; texts are compared by content
NOT_IDENTITY = ("export", "skip_bad_images", "reports_dir")
TUNED = "towers.safetensors"  # towers of a run that trained them too


def run(config: Config) -> dict:
    """Everything the configuration asks for; what its folder already holds is not done again."""
    if config.export:
        retune.check_new_folder(config.export)  # refused now rather than after hours
    if config.unfreeze and config.pretrained:
        raise InputError("--unfreeze trains, --pretrained does not: give one of the two")
    data, rank = load_data(config), ranks()[0]
    config, preset = resolve_defaults(config, len(data.where("train")))
    device, encoder = retune.pick_device(config.device), load_backbones(config)
    if config.pretrained:
        own = load_adaptor(config.pretrained, encoder).settings
        config = dataclasses.replace(config, **{key: own[key] for key in own if not key.endswith("_dim")})
    # an earlier adaptor is measured on reports alone: with captions, the wording would be what is measured
    texts, source = make_texts(config, data) if not config.pretrained or data.reports else ([], "not used")
    print_summary(config, data, encoder, preset, source, device)
    folder = retune.make_folder(config)
    with retune.locked(folder, wait=False) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            retune.check_same_config(folder, identify(config, data, texts, encoder))
        if (folder / "metrics.json").exists():
            log(f"{folder}: finished before; delete it to run again")
            metrics = retune.read_json(folder / "metrics.json")
        else:
            metrics = run_stages(config, data, texts, encoder, device)
        if config.export and rank == 0:
            load_tuned(config, encoder)
            export_pair(load_adaptor(folder, encoder), encoder, config.export)
            log(
                f"aligned pair: {config.export}; next: python retune.py --encoder {config.export} --scenario class"
            )
    return metrics


def print_summary(config: Config, data, encoder, preset: str, texts: str, device: str) -> None:
    """What the run will do: data, towers and how they are read, the adaptor, the preset."""
    counts = ", ".join(f"{len(data.where(split)):,} {split}" for split in ("train", "val", "test"))
    log(
        f"{data.note}\n{config.data}: {counts} images of {len(set(data.patients)):,} patients; texts: {texts}".strip()
    )
    log(f"towers: {config.image_encoder} ({encoder.dim}), {config.text_encoder} ({encoder.text_dim})")
    log(pooling_note(config, encoder))
    log(f"adaptor: {config.layers} layers of width {config.width}, {config.heads} heads; {device}")
    log(preset)


def identify(config: Config, data: Radiographs, texts: Sequence[str], encoder: DualEncoder) -> dict:
    """What makes a run what it is: settings, towers, data."""
    content = (data.names, data.patients.tolist(), data.split.tolist(), data.labels.tolist(), data.key, texts)
    identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    identity["encoder_fingerprint"] = encoder.fingerprint()
    identity["data_fingerprint"] = hashlib.sha256(repr(content).encode()).hexdigest()
    return identity


def run_stages(config: Config, data: Radiographs, texts, encoder: DualEncoder, device: str) -> dict:
    """Embed, align, classify, segment, report; under torchrun all ranks embed and the first does the rest."""
    masks = None
    if "segmentation" in (config.stages or ("segmentation",)):
        masks = find_masks(config, data)
        if masks is None and config.stages:
            raise InputError(f"--stages segmentation: {config.data} has no masks; demo, siim, rsna have")
    start = time.perf_counter()
    load_tuned(config, encoder)
    images, data = embed_images(encoder, data, config, device)
    pairs = make_pairs(config, data, texts, encoder, images, device) if texts else None
    if ranks()[1] > 1:
        first = ranks()[0] == 0
        torch.distributed.destroy_process_group()
        if not first:
            return {}
    metrics = {"config": dataclasses.asdict(config), "classes": list(data.class_names)}
    metrics["retrieval"] = align(config, encoder, data, pairs, device)
    if config.unfreeze:  # the towers have changed
        images, data = embed_images(encoder, data, config, device)
        pairs = make_pairs(config, data, texts, encoder, images, device)
    model = load_adaptor(config.folder, encoder).to(device)
    if "classification" in (config.stages or ("classification",)):
        dummy = encoder.to(device).encode_texts([""])[0].clone() if config.dummy_text else None
        metrics["classification"] = classify(model, images, data, config, dummy)
    if masks is not None:
        metrics["segmentation"] = segment_and_draw(model, encoder, data, masks, config, device)
    if pairs is not None and can_draw():
        draw_embeddings(config.folder / "embeddings.png", model, pairs, data, config.seed)
    metrics["parameters"] = parameter_table(model, encoder)
    trained = count_parameters(model) + (count_parameters(encoder) if config.unfreeze else 0)
    metrics["cost"] = {"seconds": time.perf_counter() - start, "peak_memory_mb": retune.peak_memory_mb(),
                       "trainable_parameters": trained}  # fmt: skip
    report(config, metrics, data)
    return metrics


def embed_images(
    encoder: DualEncoder, data: Radiographs, config: Config, device: str
) -> tuple[np.memmap, Radiographs]:
    """(image embeddings [N, d_image], the data without the unreadable images)."""
    images = embed(Side(encoder, "image", encoder.dim), data, config, device)
    if bad := retune.embedding_facts(images)["unreadable"]:
        log(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
        data = dataclasses.replace(data, split=data.split.copy())
        data.split[list(bad)] = "unreadable"
        retune.check_splits(data)
    return images, data


def align(config: Config, encoder: DualEncoder, data: Radiographs, pairs: Pairs | None, device: str) -> dict:
    """Pre-train the adaptor, or take an earlier run's; save it and write retrieval.json."""
    folder, file, result = config.folder, config.folder / "retrieval.json", {"history": []}
    if file.exists():
        return retune.read_json(file)
    if config.pretrained:
        model = load_adaptor(config.pretrained, encoder).to(device)
    else:
        with retune.seeded(config.seed):
            model = Adaptor(encoder.dim, encoder.text_dim, config.width, config.layers, config.heads,
                            config.feedforward, config.dropout).to(device)  # fmt: skip
        if config.standardise == "yes":
            for side, store, rows in zip(("image", "text"), (pairs.images, pairs.texts), pairs.rows["train"]):
                model.standardise(side, gather(store, rows, model.log_scale))
        result["before"] = validate(model, pairs, "test", config)
        if config.unfreeze:
            pairs = LivePairs(pairs, encoder.to(device), data, config.workers)
        result["history"] = pretrain(model, pairs, config, folder, encoder if config.unfreeze else None)
        if can_draw():
            draw_curves(folder / "loss.png", result["history"])
    if pairs is not None:
        result["test"] = validate(model, pairs, "test", config)
    if config.unfreeze:
        retune.save_tensors(folder / TUNED, encoder.state_dict(), {"name": encoder.config["name"]})
        load_tuned(config, encoder)
    save_adaptor(folder, model, encoder)
    retune.write_json(file, result)
    return retune.read_json(file)


def load_tuned(config: Config, encoder: DualEncoder) -> None:
    """Give `encoder` the weights of the run's own towers, if it trained them."""
    path = config.folder / TUNED
    if config.unfreeze and path.exists():
        tensors, _ = retune.load_tensors(path)
        retune.load_weights(encoder, tensors, path)
        encoder.requires_grad_(False)
        encoder.tower_ids = {"both": fingerprint(tensors)}


def segment_and_draw(model, encoder, data, masks, config: Config, device: str) -> list[dict]:
    """`segment` with a picture of a few test images."""

    def draw(source, decoder, adaptor, rows) -> None:
        if can_draw():
            draw_overlay(
                config.folder / "overlay.png",
                data,
                source,
                decoder,
                lambda x: adapt(adaptor, x, "adaptor"),
                rows,
            )

    return segment(model, encoder, data, masks, config, device, draw)


def summary(metrics: dict) -> str:
    """The run's tables in Markdown."""
    config, parts = metrics["config"], []
    if "test" in metrics["retrieval"]:
        parts.append(retrieval_table(metrics["retrieval"]))
    if "classification" in metrics:
        parts.append(classification_table(metrics["classification"], config["multiclass"]))
    if "segmentation" in metrics:
        parts.append(segmentation_table(metrics["segmentation"]))
    header = ["parameters", "frozen", "trained here", "end-to-end", "fewer"]
    parts.append(retune.markdown_table(header, metrics["parameters"]))
    if config["data"] == "demo":
        parts.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(parts)


def report(config: Config, metrics: dict, data: Radiographs) -> None:
    """Write splits.csv (with the least labelled share of an image), table.md and, last, metrics.json.

    The stages' checkpoints go just before it: had each stage cleared up, a kill could come in between.
    """
    folder = config.folder
    retune.write_splits(folder / "splits.csv", data, "labelled share", labelled_shares(data, config))
    retune.write_text(folder / "table.md", summary(metrics) + "\n")
    for name in ("pretraining", "segmentation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    retune.write_json(folder / "metrics.json", metrics)
