"""Settings of a run, and the presets that fill in what the command line leaves open."""

import dataclasses
import math
from dataclasses import dataclass

import retune
from retune import InputError, check_values, setting

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from it. The data set decides what is None here."""

    # fmt: off
    data: str = setting("demo", "data set", choices=(*retune.DATASETS, "siim", "rsna", "covidx"),
                        group="data")
    data_dir: str | None = setting(None, "folder of the data set")
    labels_csv: str | None = setting(None, "label file instead of the data set's own")
    classes: tuple[str, ...] | None = setting(None, "findings, in order", nargs="+")
    view: str = setting("all", "views (authors: frontal)", choices=("all", "frontal", "lateral"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(None, "what a blank label becomes", choices=("zero", "ignore"))
    demo_images: int = setting(6000, "number of phantoms in the demo")
    skip_bad_images: bool = setting(False, "leave out unreadable images, and count them, instead of stopping")
    texts: str = setting("auto", "reports, or captions from labels", choices=("auto", "reports", "labels"))
    reports_dir: str | None = setting(None, "folder of MIMIC-CXR's reports (default: --data-dir)")
    skip_unpaired: bool = setting(False, "leave images without a report out of the pairs")
    text_tokens: int | None = setting(None, "most tokens of a text (MIMIC, authors: 112)", type=int)
    image_encoder: str = setting("demo", "demo, efficientnet-lite0, folder, hub id, timm:NAME[=FILE], "
                                 "torchxrayvision:101-elastic=FILE", group="encoders")
    text_encoder: str = setting("demo", "demo, minilm, folder, hub id")
    image_pool: str | None = setting(None, "image embedding", choices=("cls", "token0", "mean", "pooler"))
    text_pool: str | None = setting(None, "text embedding", choices=("cls", "mean", "last", "pooler"))
    image_size: int | None = setting(None, "side of the images (the encoder's; SIIM, authors: 896)", type=int)
    precision: str = setting("fp32", "arithmetic of the encoders", choices=("fp32", "bf16", "fp16"))
    encode_batch: int = setting(32, "images a batch of the encoder")
    workers: int = setting(retune.Config.workers, "processes that decode images")
    cache_dir: str = setting("runs/cache", "folder of the embedding cache")
    width: int | None = setting(None, "width (authors: 768; small: 256)", type=int, group="pre-training")
    layers: int = setting(2, "transformer layers; 0 leaves the projections alone")
    heads: int | None = setting(None, "attention heads (authors: 12; small: 8)", type=int)
    feedforward: int | None = setting(None, "feed-forward width (authors: 2048; small: 512)", type=int)
    dropout: float = setting(0.1, "dropout")
    standardise: str | None = setting(None, "scale by training mean and deviation (ours)", choices=YES_NO)
    text_to_image: float = setting(0.75, "weight of the text-to-image loss; the other way has the rest")
    epochs: int | None = setting(None, "epochs (authors: 50; small: 20)", type=int)
    lr: float | None = setting(None, "learning rate (authors: 2e-5; small: 5e-4)", type=float)
    batch_size: int | None = setting(None, "batch size (authors: 1024; small: 256)", type=int)
    weight_decay: float = setting(0.01, "weight decay")
    patience: int | None = setting(None, "epochs without a better validation (authors: 10)", type=int)
    unfreeze: bool = setting(False, "ablation: train the towers too")
    pretrained: str | None = setting(None, "an earlier run's folder: its adaptor instead of pre-training")
    stages: tuple[str, ...] | None = setting(None, "what to measure (all the data allow)", nargs="+",
        choices=("retrieval", "classification", "segmentation"), group="downstream")
    fractions: tuple[float, ...] | None = setting(None, "labelled shares (0.01 0.1 1)", nargs="+", type=float)
    repeats: int = setting(3, "labelled subsets per share, for mean and standard deviation")
    multiclass: bool = setting(False, "each image has exactly one class (always so in COVIDx)")
    dummy_text: bool = setting(False, "ablation: classify images together with an empty report")
    probe: bool = setting(False, "also a linear probe on the bare backbone, and the view alone (ours)")
    head_lr: float | None = setting(None, "classification: learning rate", type=float)
    head_weight_decay: float | None = setting(None, "classification: weight decay", type=float)
    head_batch: int | None = setting(None, "classification: batch size", type=int)
    head_epochs: int | None = setting(None, "classification: epochs", type=int)
    mask_lr: float | None = setting(None, "segmentation: learning rate", type=float)
    mask_weight_decay: float | None = setting(None, "segmentation: weight decay", type=float)
    mask_batch: int | None = setting(None, "segmentation: batch size", type=int)
    mask_epochs: int | None = setting(None, "segmentation: epochs", type=int)
    mask_loss: str = setting("log", "loss (ablation: modified Dice)", choices=("log", "dice", "squares"))
    mask_images: int | None = setting(None, "most images to segment; to choose and test, a quarter", type=int)
    decoder_width: int | None = setting(None, "its first channels (authors: 512; small: 64)", type=int)
    augment: str | None = setting(None, "turn and scale training images (authors: yes)", choices=YES_NO)
    balance: str | None = setting(None, "as many empty training masks as others (SIIM: yes)", choices=YES_NO)
    export: str | None = setting(None, "new folder for the aligned pair (retune.py --encoder)", group="run")
    seed: int = setting(42, "seed")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    output: str = setting("runs/adaptor-{data}-{image_encoder}-{text_encoder}-seed{seed}",
                          "folder of the run")
    # fmt: on

    def __post_init__(self):
        counts = "demo_images text_tokens image_size encode_batch width heads feedforward epochs batch_size"
        counts += " patience repeats head_batch head_epochs mask_batch mask_epochs mask_images decoder_width"
        check_values(self, f"{counts} lr head_lr mask_lr", lambda value: 0 < value < math.inf, "be positive")
        decays = "weight_decay head_weight_decay mask_weight_decay layers"
        check_values(self, decays, lambda value: 0 <= value < math.inf, "not be negative")
        check_values(self, "seed workers", lambda value: 0 <= value < 2**32, "be from 0 to 4294967295")
        check_values(self, "text_to_image", lambda value: 0 <= value <= 1, "be from 0 to 1")
        check_values(self, "unfreeze", lambda value: not (value and self.pretrained), "train, not reuse")
        check_values(self, "dropout", lambda value: 0 <= value < 1, "be at least 0 and below 1")
        check_values(self, "fractions", lambda shares: all(0 < f <= 1 for f in shares), "lie in (0, 1]")

    folder = property(retune.output_folder, doc="The run's folder.")


# arXiv 2401.01179 and the authors' scripts
AUTHORS = {
    "epochs": 50, "lr": 2e-5, "batch_size": 1024, "patience": 10, "width": 768, "heads": 12,
    "feedforward": 2048, "standardise": "no", "head_lr": 5e-4, "head_weight_decay": 0.05, "head_batch": 128,
    "head_epochs": 50, "mask_lr": 5e-4, "mask_weight_decay": 1e-4, "mask_batch": 4, "mask_epochs": 50,
    "decoder_width": 512, "augment": "yes", "balance": "no", "fractions": (0.01, 0.1, 1.0),
}  # fmt: skip
PUBLISHED = {  # what differs from them for a data set; MIMIC-CXR is where they pre-train
    "mimic": {"text_tokens": 112}, "chexpert": {}, "covidx": {"patience": 5},
    "siim": {"mask_epochs": 100, "image_size": 896, "balance": "yes"},
    "rsna": {"head_lr": 5e-5, "head_weight_decay": 1e-4, "head_batch": 512, "head_epochs": 100,
             "image_size": 224},
}  # fmt: skip
# (ours) for sets on which the authors' schedule would take a few hundred steps
SMALL = AUTHORS | {
    "epochs": 20, "lr": 5e-4, "batch_size": 256, "width": 256, "heads": 8, "feedforward": 512,
    "standardise": "yes", "head_batch": 64, "head_epochs": 30, "mask_batch": 8, "mask_lr": 1e-3,
    "mask_epochs": 10, "decoder_width": 64, "augment": "no",
}  # fmt: skip


def resolve_defaults(config: Config, n_train: int) -> tuple[Config, str]:
    """(config without open settings, what filled them in): a published data set has its authors' settings."""
    name = "authors"
    preset = AUTHORS
    if config.data in PUBLISHED:
        name = f"authors, {config.data}"
        preset = AUTHORS | PUBLISHED[config.data]
    elif n_train < retune.SMALL_SET:
        name = "small set (ours)"
        preset = SMALL | ({"mask_images": 600} if config.data == "demo" else {})
    chosen = {key: value for key, value in preset.items() if getattr(config, key) is None}
    if config.data == "covidx":
        chosen["multiclass"] = True
    config = dataclasses.replace(config, **chosen)
    if config.width % config.heads:
        raise InputError(f"--width {config.width} must be a multiple of --heads {config.heads}")
    return config, f"preset {name}: {', '.join(f'{key} {value}' for key, value in chosen.items())}"
