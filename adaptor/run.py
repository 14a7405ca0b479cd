"""One run: data, towers, pre-training, downstream tasks, report. Finished stages are not done again."""

import contextlib
import dataclasses
import hashlib
import shutil
import time
from pathlib import Path

import torch

import retune
from adaptor.classification import classification_table, classify, labelled_shares, probe
from adaptor.config import Config, resolve_defaults
from adaptor.data import find_masks, load_data
from adaptor.encoders import fingerprint, load_backbones, pooling_note
from adaptor.figures import draw_embeddings
from adaptor.model import Adaptor, count_parameters, export_pair, load_adaptor
from adaptor.pretraining import LivePairs, Pairs, make_pairs, make_texts, pretrain, retrieval_table, validate
from adaptor.segmentation import segment, segmentation_table
from retune import DualEncoder, InputError, Radiographs, log

NOT_IDENTITY = ("export", "skip_bad_images", "reports_dir")  # may differ when a run is resumed


def run(config: Config) -> dict:
    """Everything the configuration asks for; what its folder already holds is not done again."""
    if config.export:
        retune.check_new_folder(config.export)  # refused now rather than after hours
    data = load_data(config)
    config, preset = resolve_defaults(config, len(data.where("train")))
    device = retune.pick_device(config.device)
    encoder = load_backbones(config)
    if config.pretrained:
        own = load_adaptor(config.pretrained, encoder).settings
        config = dataclasses.replace(config, **{key: own[key] for key in own if not key.endswith("_dim")})
    texts, source = make_texts(config, data)
    if config.pretrained and source != "reports":  # with captions, their wording would be measured
        texts = []
        source = "not used"
    counts = ", ".join(f"{len(data.where(split)):,} {split}" for split in ("train", "val", "test"))
    patients = len(set(data.patients))
    log(f"{data.note}\n{config.data}: {counts} images of {patients:,} patients; texts: {source}")
    widths = f"widths {encoder.dim} and {encoder.text_dim}"
    log(f"towers: {encoder.config['name']}, {widths}; {pooling_note(encoder)}")
    log(f"adaptor: {config.layers} layers of width {config.width}, {config.heads} heads; {device}; {preset}")
    folder = config.folder
    first = retune.ranks()[0] == 0
    folder.mkdir(parents=True, exist_ok=True)
    with retune.locked(folder, wait=False) if first else contextlib.nullcontext():
        if first:
            columns = (data.patients, data.split, data.labels)
            content = (data.names, *(column.tolist() for column in columns), data.key, texts)
            identity = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
            identity |= {"encoder_fingerprint": encoder.fingerprint(), "towers": encoder.tower_ids}
            identity["data_fingerprint"] = hashlib.sha256(repr(content).encode()).hexdigest()
            retune.check_same_config(folder, identity)
        if (folder / "metrics.json").exists():
            log(f"{folder}: finished before; delete it to run again")
            metrics = retune.read_json(folder / "metrics.json")
        else:
            metrics = run_stages(config, data, texts, encoder, device)
        if config.export and first:
            load_tuned(config, encoder)
            export_pair(load_adaptor(folder, encoder), encoder.cpu(), config.export)
            log(f"next: python retune.py --encoder {config.export} --scenario class")
    return metrics


def run_stages(config: Config, data: Radiographs, texts, encoder: DualEncoder, device: str) -> dict:
    """Embed, align, classify, segment, report; under torchrun all ranks embed and the first does the rest."""
    folder = config.folder
    stages = config.stages or ("classification", "segmentation")
    masks = find_masks(config, data) if "segmentation" in stages else None
    if masks is None and "segmentation" in (config.stages or ()):
        raise InputError(f"--stages segmentation: {config.data} has no masks; demo, siim, rsna have")
    start = time.perf_counter()
    load_tuned(config, encoder)
    images, data = embed_readable(encoder, data, config, device)
    if retune.ranks()[0] > 0:
        return {}
    pairs = make_pairs(config, data, texts, encoder, images) if texts else None
    metrics = {"config": dataclasses.asdict(config), "classes": list(data.class_names)}
    metrics["retrieval"] = align(config, encoder, data, pairs, device)
    if config.unfreeze:  # the towers have changed
        images, data = embed_readable(encoder, data, config, device)
        pairs = make_pairs(config, data, texts, encoder, images)
    model = load_adaptor(folder, encoder).to(device)
    if "classification" in stages:
        with retune.input_errors("--dummy-text", "the tokenizer makes no token of an empty report"):
            dummy = encoder.to(device).encode_texts([""])[0].clone() if config.dummy_text else None
        metrics["classification"] = classify(model, images, data, config, dummy)
        metrics["probe"] = probe(images, data) if config.probe else []
    if masks is not None:
        metrics["segmentation"] = segment(model, encoder, data, masks, config, device)
    if pairs is not None:
        draw_embeddings(folder / "embeddings.png", model, pairs, data, config.seed)
    trained = count_parameters(model, encoder) if config.unfreeze else count_parameters(model)
    whole = count_parameters(encoder, model.image_projection, model.text_projection)  # without freezing
    metrics["cost"] = {"seconds": time.perf_counter() - start, "peak_memory_mb": retune.peak_memory_mb(),
                       "trainable_parameters": trained, "end_to_end_parameters": whole}  # fmt: skip
    retune.write_splits(folder / "splits.csv", data, "labelled share", labelled_shares(data, config))
    retune.write_text(folder / "table.md", summary(metrics) + "\n")
    for name in ("pretraining", "segmentation"):  # just before the end, in case of a kill in between
        shutil.rmtree(folder / name, ignore_errors=True)
    retune.write_json(folder / "metrics.json", metrics)
    return metrics


def embed_readable(encoder: DualEncoder, data: Radiographs, config: Config, device: str) -> tuple:
    """(image embeddings [N, d_image], the data without the unreadable images)."""
    options = {name: getattr(config, name) for name in ("workers", "precision", "skip_bad_images")}
    options |= {"batch_size": config.encode_batch, "device": device}
    images = retune.embed(encoder, data, Path(config.cache_dir), **options)
    if bad := retune.embedding_facts(images)["unreadable"]:
        log(f"left out {len(bad)} unreadable images, the first: {next(iter(bad.values()))}")
        data = dataclasses.replace(data, split=data.split.copy())
        data.split[list(bad)] = "unreadable"
        retune.check_splits(data)
    return images, data


def align(config: Config, encoder: DualEncoder, data: Radiographs, pairs: Pairs | None, device: str) -> dict:
    """Pre-train the adaptor, or take an earlier run's; save it and write retrieval.json."""
    folder = config.folder
    file = folder / "retrieval.json"
    if file.exists():
        return retune.read_json(file)
    result = {"history": []}
    if config.pretrained:
        model = load_adaptor(config.pretrained, encoder).to(device)
    else:
        shape = (config.width, config.layers, config.heads, config.feedforward, config.dropout)
        with retune.seeded(config.seed):
            model = Adaptor(encoder.dim, encoder.text_dim, *shape).to(device)
        if config.standardise == "yes":
            every = torch.arange(len(pairs.rows["train"][0]))
            model.standardise(*pairs.read("train", every, model.log_scale))
        result["before"] = validate(model, pairs, "test", config)
        if config.unfreeze:
            pairs = LivePairs(data.images, encoder.to(device), pairs.rows, pairs.words)
        result["history"] = pretrain(model, pairs, config)
    if pairs is not None:
        result["test"] = validate(model, pairs, "test", config)
    if config.unfreeze:
        retune.save_tensors(folder / "towers.safetensors", encoder.state_dict(), {})
        load_tuned(config, encoder)
    known = {"towers": encoder.tower_ids, "name": encoder.config["name"], "model": model.settings}
    retune.save_tensors(folder / "adaptor.safetensors", model.state_dict(), known)
    retune.write_json(file, result)
    return retune.read_json(file)


def load_tuned(config: Config, encoder: DualEncoder) -> None:
    """Give `encoder` the weights of the run's own towers, if it has trained them."""
    path = config.folder / "towers.safetensors"
    if config.unfreeze and path.exists():
        tensors, _ = retune.load_tensors(path)
        retune.load_weights(encoder, tensors, path)
        encoder.requires_grad_(False)
        encoder.tower_ids = {"both": fingerprint(tensors, "trained")}


def summary(metrics: dict) -> str:
    """The run's tables in Markdown."""
    parts = [retrieval_table(metrics["retrieval"])] if "test" in metrics["retrieval"] else []
    if "classification" in metrics:
        parts.append(classification_table(metrics["classification"], metrics["config"]["multiclass"]))
    if metrics.get("probe"):
        parts.append(retune.markdown_table(["test macro AUROC", "AUROC", "2.5%", "97.5%"], metrics["probe"]))
    if "segmentation" in metrics:
        parts.append(segmentation_table(metrics["segmentation"]))
    trained, whole = (metrics["cost"][f"{kind}_parameters"] for kind in ("trainable", "end_to_end"))
    parts.append(f"{trained:,} parameters trained, {trained / whole - 1:+.1%} against {whole:,} end-to-end")
    if metrics["config"]["data"] == "demo":
        parts.append("Demo on synthetic phantoms: not clinical numbers.")
    return "\n\n".join(parts)
