"""Frozen pairs of encoders, and the embeddings of images that they are run for once.

`DualEncoder` is an image tower and a text tower of one dimension, built from transformers and torchvision;
`public_encoders.py` reads the published ones. `embed` runs the image tower over a data set into a cache on
disk: resumable, checked, shared by ranks under torchrun.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import re
import time
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from radiographs import Radiographs, read_image
from retune import (
    HERE,
    InputError,
    atomic,
    barrier,
    locked,
    progress,
    ranks,
    read_json,
    release,
    save_tensors,
    write_json,
)  # fmt: skip

# -------------------------------------------------------------------------------------------- Frozen encoders


def one_line(error: BaseException) -> str:
    """The first 200 characters of what another library says of an error, in one line."""
    return " ".join(str(error).split())[:200]


def transform_image(image: torch.Tensor, resize, crop, interpolation, mean, std) -> torch.Tensor:
    """uint8 image [1 or 3,H,W] -> normalised float pixels [3,h,w]; a single channel is repeated to three.

    `resize`: length of the shorter side, or [height, width]; `crop`: side of the central square, or None. The
    resizing is antialiased and rounds to uint8, as PIL's does.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = [resize] if isinstance(resize, int) else list(resize)
    image = functional.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    if crop is not None:
        image = functional.center_crop(image, [crop, crop])
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (image / 255 - mean) / std  # [1 or 3,h,w] - [3,1,1] -> [3,h,w]


class Normalize(nn.Module):
    """Scale the last dimension to unit length."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=-1)


POOLS = ("cls", "mean", "last", "pooler", "pre_norm_mean", "none")
LAYERS = ["Linear", "Conv2d", "BatchNorm2d", "LayerNorm", "ReLU", "GELU", "AdaptiveAvgPool2d", "Flatten"]
LAYERS = [*LAYERS, "Unflatten", "TransformerEncoderLayer"]
LAYERS = {name: getattr(nn, name) for name in LAYERS} | {"Normalize": Normalize}


class Tower(nn.Module):
    """Pixels [B,3,H,W], or tokens and their mask [M,T], -> embeddings [B or M,D]: a tower, a pool and a head.

    `config`: config.json's "image" or "text". Pools: the CLS token, the mean of the tokens or of the map, the
    last token, the model's own, CLEFT's mean before the last norm, or none: the head sees it all.
    """

    def __init__(self, config: dict):
        super().__init__()
        model, self.pool, head = config["model"], config["pool"], config["head"]
        if unknown := {name for name, _ in head} - set(LAYERS) | {self.pool} - set(POOLS):
            raise InputError(f"encoder config: unknown {unknown}; pools: {POOLS}, head layers: {[*LAYERS]}")
        self.head = nn.Sequential(*(LAYERS[name](**options) for name, options in head))
        if config.get("library") == "torchvision":
            from torchvision.models import get_model
            from torchvision.models.feature_extraction import create_feature_extractor

            nodes = {model["node"]: "last_hidden_state"}
            self.tower = create_feature_extractor(get_model(model["name"]), nodes)
            return
        import transformers

        settings = transformers.AutoConfig.for_model(**model)
        self.tower = getattr(transformers, type(settings).__name__.removesuffix("Config") + "Model")(settings)
        if self.pool != "pooler" and "pooler.dense.weight" in self.tower.state_dict():
            self.tower.pooler = None  # BERT's and ViT's: not used, and the published checkpoints lack it

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        if self.pool == "pre_norm_mean":
            options["output_hidden_states"] = True
        output = self.tower(inputs, **options)
        if self.pool == "pooler":
            return self.head(output["pooler_output"])
        # tokens [B,T,H], or the map [B,H,h,w] of a convolutional tower
        x = output["hidden_states"][-1] if self.pool == "pre_norm_mean" else output["last_hidden_state"]
        if self.pool == "cls":
            x = x[:, 0]
        elif self.pool == "last":
            x = x[torch.arange(len(x), device=x.device), attention_mask.sum(1) - 1]
        elif self.pool == "mean" and attention_mask is not None:
            x = (x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)
        elif self.pool != "none":
            x = x.mean(1) if x.ndim == 3 else x.mean((2, 3))
        return self.head(x)


def new_folder(directory: str | Path) -> Path:
    """The path of a folder that is to be written; InputError when something is there."""
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: choose another")
    return target


# in some published files, but part of neither embedding
UNUSED_KEYS = r"^logit_|position_ids$|num_batches_tracked$|^text\.tower\.pooler\.|^cls\.|^image\.tower\.fc\."


class DualEncoder(nn.Module):
    """A frozen image tower and text tower of one dimension, with their tokenizer and image transform."""

    def __init__(self, config: dict, tokenizer):
        super().__init__()
        self.config, self.tokenizer, self.dim = config, tokenizer, config["dim"]
        self.image, self.text = Tower(config["image"]), Tower(config["text"])
        self.transform = functools.partial(transform_image, **config["transform"])
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transformed pixels [B,3,H,W] on the encoder's device -> float32 embeddings [B,D], unnormalised."""
        return self.image(pixels).float()

    @torch.inference_mode()
    def encode_texts(
        self, texts: Sequence[str], truncate: bool = False, batch_size: int = 64
    ) -> torch.Tensor:
        """M texts -> float32 embeddings [M,D], unnormalised; a text beyond the context is an InputError."""
        device, embeddings = next(self.parameters()).device, []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenize(texts[start : start + batch_size], truncate)
            embeddings.append(self.text(*(tensor.to(device) for tensor in tokens.values())).float())
        return torch.cat(embeddings)

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> dict[str, torch.Tensor]:
        """M texts -> {"input_ids": [M,T], "attention_mask": [M,T]}, padded on the right.

        Padding "longest" is masked; "max_length" fills the context and is attended to, as SigLIP was trained.
        """
        config = self.config["text"]
        length, padding = config["context_length"], config.get("padding", "longest")
        texts = [text.rstrip(config.get("strip", "")) for text in texts]
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            if len(ids) > length and not truncate:
                raise InputError(f"{len(ids)} tokens, the encoder reads {length}; shorten the text {text!r}")
        options = {"padding": padding, "padding_side": "right", "truncation": True, "max_length": length}
        tokens = self.tokenizer(texts, return_tensors="pt", return_attention_mask=True, **options)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask if padding == "longest" else torch.ones_like(mask)}

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the config without its name and of every tensor as float32; computed once."""
        if not hasattr(self, "_fingerprint"):
            config = {key: value for key, value in self.config.items() if key != "name"}
            digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
            for key, tensor in sorted(self.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors (as `dtype`) and the tokenizer into a new or empty folder."""
        with atomic(new_folder(directory)) as partial:
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            state = self.state_dict()
            state |= {key: value.to(dtype) for key, value in state.items() if value.is_floating_point()}
            save_tensors(partial / "model.safetensors", state, {})
            self.tokenizer.save_pretrained(partial)

    def load_weights(self, state: dict[str, torch.Tensor], source: str | Path) -> None:
        """Copy `state` into the towers; InputError lists the keys that are missing, unknown or mis-shaped."""
        wanted, found = ({k: tuple(v.shape) for k, v in x.items()} for x in (self.state_dict(), state))
        missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
        unknown = [key for key in found if key not in wanted and not re.search(UNUSED_KEYS, key)]
        differ = [key for key in wanted if key in found and found[key] != wanted[key]]
        misshaped = [f"{key} {found[key]} for {wanted[key]}" for key in differ]
        kinds = {"missing": missing, "unknown": unknown, "mis-shaped": misshaped}
        if wrong := [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in kinds.items() if keys]:
            raise InputError(f"{source} does not fit the encoder {self.config['name']}: {'; '.join(wrong)}")
        self.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)

    @classmethod
    def load(cls, name: str, directory: str | Path | None = None, crop: int | None = None) -> DualEncoder:
        """The encoder `name`: tiny, biomedclip, biovil, a folder, or a hub id of a transformers CLIP/SigLIP.

        `directory` holds its files exactly as published, or as `save` wrote them, and rules out the network;
        without it they come from the hub's cache or are downloaded. `crop` replaces a convolutional tower's
        (BioViL: RE-tune's 512; its own is 480). InputError if a file is missing or unfit.
        """
        folder = Path(directory or (HERE / "tiny" if name == "tiny" else name))
        if is_ours(folder):
            config, state, tokenizer = read_folder(folder)
        else:
            published = importlib.import_module("public_encoders")
            config, state, tokenizer = published.read_published(name, directory)
        if name in ("biomedclip", "biovil") and config.get("name") != name:
            raise InputError(f"{folder} holds the encoder {config.get('name')}, not {name}")
        if crop is not None:
            if config["image"].get("library") != "torchvision":
                raise InputError(f"crop {crop}: the image size of {config['name']} is fixed, leave crop out")
            config = config | {"transform": config["transform"] | {"crop": crop}}
        try:
            with torch.random.fork_rng(devices=[]), WithoutRandomWeights():
                encoder = cls({"name": folder.name} | config, tokenizer)
            encoder.load_weights(state, folder)
            # A tokenizer or a transform that does not fit the towers fails here and not in the middle of a run.
            encoder.encode_texts(["", "no finding"])
            encoder.encode_images(encoder.transform(torch.zeros(1, 40, 60, dtype=torch.uint8))[None])
        except (InputError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - layers' complaints; tokenizers' panic is no Exception
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"{folder}: config or tokenizer describe no encoder ({reason})") from None
        return encoder


class WithoutRandomWeights(TorchFunctionMode):
    """Build modules with zeros for the weights that a file is about to replace: ten times faster.

    Zeros and not what memory held: torch's truncated normal draws until every value lies in its interval.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in ("normal_", "uniform_", "kaiming_uniform_"):
            return function(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        tensor.detach().zero_()
        return tensor


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an encoder as `DualEncoder.save` writes it."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return isinstance(config, dict) and {"dim", "image", "text", "transform"} <= set(config)


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor], object]:
    """(config, tensors, tokenizer) of an encoder as `DualEncoder.save` writes it, without network."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    try:
        state = load_file(folder / "model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raise nearly every type on a damaged file
        raise InputError(f"{folder}: not a whole encoder folder ({one_line(error)})") from None
    return read_json(folder / "config.json"), state, tokenizer


# ------------------------------------------------------------------------------------------------- Embeddings


CHUNK = 1024  # images a chunk: the most that a killed process loses; batches never straddle chunks
# What numpy raises on a damaged file, whose header it reads as Python text.
DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, SyntaxError, tokenize.TokenError,
    OverflowError, MemoryError, IndexError,
)  # fmt: skip


class Images(torch.utils.data.Dataset):
    """(row, transformed pixels [3, h, w], "") of image `row`; (row, None, reason) of an unreadable one."""

    def __init__(self, images: Sequence, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None, str]:
        image = self.images[row]
        try:
            pixels = read_image(image) if isinstance(image, Path) else torch.from_numpy(np.array(image))[None]
            return row, self.transform(pixels), ""
        except InputError as error:
            return row, None, str(error)


def collate(items: list) -> tuple[list[int], torch.Tensor | None, list[tuple[int, str]]]:
    """Readable rows, their pixels [B, 3, h, w], and unreadable rows with reasons."""
    good = [(row, pixels) for row, pixels, _ in items if pixels is not None]
    bad = [(row, reason) for row, pixels, reason in items if pixels is None]
    return [row for row, _ in good], torch.stack([pixels for _, pixels in good]) if good else None, bad


def embedding_key(encoder: DualEncoder, data: Radiographs, precision: str, store: str) -> str:
    """A hash of all that shapes the embeddings: encoder with transform, image names and sizes, precision."""
    settings = f"{encoder.fingerprint()} {precision} {store} {len(data.images)} {data.key}"
    digest = hashlib.sha256(settings.encode())
    if data.key is None and isinstance(data.images, np.ndarray):
        digest.update(np.ascontiguousarray(data.images).data)
    elif data.key is None:
        for name, path in zip(data.names, data.images):
            digest.update(f"{name}\0{os.stat(path).st_size if os.path.isfile(path) else None}\0".encode())
    return digest.hexdigest()[:20]


def embed(
    encoder: DualEncoder, data: Radiographs, cache_dir: Path, *, batch_size: int = 32, workers: int = 0,
    precision: str = "fp32", store: str = "fp32", device: str = "cpu", skip_bad_images: bool = False,
) -> np.memmap:  # fmt: skip
    """Embed every image once: a read-only memory map [N, D], float32 or float16 (`store`), not normalised.

    The rows are cut into chunks, each written whole into the cache key's folder; ranks take chunks in turn,
    a restarted process skips finished ones, and the first rank joins them. An unreadable image raises
    InputError, or with `skip_bad_images` is a row of nan, listed by `embedding_facts`.
    """
    folder = Path(cache_dir) / embedding_key(encoder, data, precision, store)
    folder.mkdir(parents=True, exist_ok=True)
    (rank, world), n = ranks(), len(data.images)
    shape, dtype = (n, encoder.dim), np.dtype(np.float16 if store == "fp16" else np.float32)
    chunks = {folder / f"chunk-{i:09d}.npy": range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)}
    with locked(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        barrier()  # the other ranks start when the first one holds the folder
        if not (folder / "facts.json").exists():
            mine = dict(list(chunks.items())[rank::world])
            todo = {file: rows for file, rows in mine.items() if not file.exists()}
            embed_chunks(encoder, data, todo, dtype, batch_size, workers, precision, device, skip_bad_images)
            barrier()
            if rank == 0:
                assemble(folder, data, chunks, shape, dtype)
        barrier()
        for chunk in chunks if rank == 0 else ():
            chunk.unlink(missing_ok=True)
    embeddings = open_embeddings(folder, shape, dtype)
    bad = embedding_facts(embeddings)["unreadable"]
    if bad and not skip_bad_images:
        raise InputError(f"{next(iter(bad.values()))}; --skip-bad-images leaves such out")
    return embeddings


def embed_chunks(encoder, data, chunks, dtype, batch_size, workers, precision, device, skip_bad) -> None:
    """Run the encoder over {file: rows} and write each chunk, followed by the seconds that it took."""
    pieces = [rows[i : i + batch_size] for rows in chunks.values() for i in range(0, len(rows), batch_size)]
    stream = iter(torch.utils.data.DataLoader(
        Images(data.images, encoder.transform), batch_sampler=pieces, num_workers=min(workers, len(pieces)),
        collate_fn=collate, pin_memory=device.startswith("cuda"), generator=torch.Generator(),
    ))  # fmt: skip
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    encoder.to(device)
    with progress(total=sum(map(len, chunks.values())), desc="embedding", unit="image") as bar:
        for file, rows in chunks.items():
            block, start = np.full((len(rows), encoder.dim), np.nan, dtype), time.perf_counter()
            for _ in range(0, len(rows), batch_size):
                good, pixels, bad = next(stream)
                for row, reason in [] if skip_bad else bad:
                    raise InputError(f"{data.rows[row]}: {reason}; --skip-bad-images leaves such out")
                if good:
                    with torch.autocast(device.split(":")[0], low, enabled=low is not None):
                        features = encoder.encode_images(pixels.to(device, non_blocking=True))
                    block[np.array(good) - rows.start] = features.cpu().numpy()
                    norms = np.linalg.norm(block[np.array(good) - rows.start].astype(np.float32), axis=1)
                    if not np.isfinite(norms).all():  # of numbers above 1e19 the cosines would all be 0
                        where = data.rows[good[0]]
                        raise InputError(f"{where}: its batch embeds to nan or huge numbers; use fp32")
                bar.update(len(good) + len(bad))
            with atomic(file) as partial, open(partial, "wb") as output:
                np.save(output, block)
                np.save(output, np.float64(time.perf_counter() - start))
                np.save(output, np.array(hashlib.sha256(block.data).hexdigest()))


def assemble(folder: Path, data: Radiographs, chunks: dict[Path, range], shape, dtype) -> None:
    """Join the chunks into embeddings.npy, then write facts.json, whose presence says that it is whole."""
    seconds, unreadable, digest = 0.0, {}, hashlib.sha256()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    # Written, not mapped: a full disk is an error here, and a killed process under a memory map.
    with atomic(folder / "embeddings.npy") as partial, open(partial, "wb") as whole:
        np.lib.format.write_array_header_1_0(whole, header)
        for chunk, rows in chunks.items():
            try:
                with open(chunk, "rb") as file:
                    block, took, checksum = (np.load(file, allow_pickle=False) for _ in range(3))
                if (block.shape, block.dtype) != ((len(rows), shape[1]), dtype):
                    raise ValueError(f"it holds {block.dtype} {block.shape}")
                if hashlib.sha256(block.data).hexdigest() != str(checksum) or not 0 < float(took) < math.inf:
                    raise ValueError("its checksum differs")
            except DAMAGED as error:
                chunk.unlink(missing_ok=True)
                raise InputError(f"{chunk}: damaged ({error}), so it was removed; run again") from None
            whole.write(block.data)
            digest.update(block.data)
            seconds += float(took)
            for row in np.flatnonzero(np.isnan(block[:, 0])) + rows.start:
                reason = Images(data.images, lambda pixels: pixels)[row][2]
                unreadable[int(row)] = f"{data.rows[row]}: {reason}"
    facts = {"sha256": digest.hexdigest(), "seconds": seconds, "unreadable": unreadable}
    write_json(folder / "facts.json", facts)


def embedding_facts(embeddings: np.memmap) -> dict:
    """{"sha256", "seconds" spent, "unreadable": {row: reason}} of what `embed` returned."""
    facts = read_json(Path(embeddings.filename).with_name("facts.json"))
    return facts | {"unreadable": {int(row): reason for row, reason in facts["unreadable"].items()}}


def open_embeddings(folder: Path, shape: tuple[int, int], dtype: np.dtype) -> np.memmap:
    """Open the finished array after checking its shape and checksum; InputError when it is damaged."""
    try:
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        digest = hashlib.sha256()
        for i in range(0, len(embeddings), 8192):
            digest.update(embeddings[i : i + 8192])
            release(embeddings)
        if (embeddings.shape, embeddings.dtype) != (shape, dtype):
            raise ValueError(f"it holds {embeddings.dtype} {embeddings.shape}")
        if digest.hexdigest() != embedding_facts(embeddings)["sha256"]:
            raise ValueError("its checksum differs")
    except DAMAGED as error:
        raise InputError(f"{folder}: damaged cache ({error}); delete this folder to embed again") from None
    return embeddings
