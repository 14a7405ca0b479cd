"""Every setting of CLEFT with the source of its default; the command line is made from it."""

import dataclasses
import math
from pathlib import Path

import retune
from retune import InputError, setting

CHEXPERT = ("chexpert", "mimic", "chexpert-5x200")  # data sets with CheXpert's 14 findings
DATA_SETS = ("demo", "pretrain", "embed", "rsna", *CHEXPERT, "csv", "nih", "chestmnist")
ON = ("on", "off")
STYLES = ("simple", "natural", "structural")
IMAGE_TOWERS = ("pretrained", "random", "frozen")
PEFT = ("lora", "ia3", "prefix", "adalora", "frozen", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """None is filled by `resolve_defaults`: the authors' value, or the demo's for the small towers."""

    # fmt: off
    data: str = setting("demo", "data set", choices=DATA_SETS, group="data")
    data_dir: str | None = setting(None, "folder of the data set")
    labels_csv: str | None = setting(None, "label file instead of the data set's; chexpert-5x200: its list")
    classes: tuple[str, ...] | None = setting(None, "findings to evaluate (captions name all)", nargs="+")
    view: str = setting("all", "views to use", choices=("all", "frontal", "lateral", "pa", "ap"))
    uncertain: str = setting("ignore", "what a label of -1 becomes", choices=("ones", "zeros", "ignore"))
    blank: str | None = setting(None, "what a blank label becomes (csv: ignore)", choices=("zero", "ignore"))
    size: int = setting(224, "image side, for chestmnist", choices=(28, 64, 128, 224))
    demo_images: int = setting(6000, "number of phantoms in the demo")
    image: str = setting("tiny", "small, tiny, our or a transformers folder, an id", group="towers")
    image_tower: str = setting("pretrained", "published weights, random, or frozen", choices=IMAGE_TOWERS)
    text: str = setting("tiny", "likewise; a causal language model")
    dim: int | None = setting(None, "joint dimension (authors: 512; small and tiny: 128)", type=int)
    projection_bias: bool = setting(True, "projections without bias", flag="--no-projection-bias")
    context_length: int | None = setting(None, "longest text (authors: 72, long captions 144)", type=int)
    truncate: bool = setting(False, "cut longer texts instead of refusing them")
    pad_token: str | None = setting(None, "padding token (the tokenizer's, else its end-of-text)")
    peft: str = setting("lora", "tuning of the text tower; none: all of it", choices=PEFT)
    lora_rank: int = setting(8, "rank of LoRA, and what AdaLoRA ends with")
    lora_alpha: int = setting(32, "scale of LoRA")
    lora_dropout: float = setting(0.1, "dropout of LoRA")
    prefix_tokens: int = setting(20, "virtual tokens of prefix tuning")
    base_caption: str | None = setting(None, "beginning of captions and prompts", group="captions")
    captions: str = setting("auto", "auto: reports if there are any", choices=("auto", "labels", "reports"))
    negative_captions: bool = setting(False, "captions name the absent findings too")
    caption_style: str = setting("simple", "wording of EMBED's captions and prompts", choices=STYLES)
    foreground: str | None = setting(None, "crop to Otsu's foreground (authors: on)", choices=ON,
                                     group="images")
    augment: str | None = setting(None, "augmentation in training (authors: on)", choices=ON)
    steps: int | None = setting(None, "steps (authors: 40,000; demo: 200)", type=int, group="stage 1")
    lr: float | None = setting(None, "learning rate (authors: 4e-5; demo: 1e-3)", type=float)
    batch_size: int | None = setting(None, "pairs a step, all ranks (authors: 4 x 72; demo: 128)", type=int)
    local_negatives: bool = setting(False, "negatives of a rank's own pairs, the authors'; else all (ours)")
    weight_decay: float = setting(0.1, "weight decay of AdamW")
    decay_all: bool = setting(False, "weight decay on one-dimensional parameters too (authors: none)")
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises")
    temperature: float = setting(0.07, "initial temperature of the contrastive loss")
    checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    precision: str = setting("fp32", "arithmetic of the towers", choices=("fp32", "bf16"))
    save_every: int | None = setting(None, "steps between checkpoints (500; demo: 50)", type=int)
    select: str = setting("best", "weights kept: of the lowest validation loss, or last",
                          choices=("best", "last"))
    context_tokens: int = setting(30, "learned context tokens", group="stage 2")
    prompt_steps: int | None = setting(None, "steps (authors: 8,000; demo: 300)", type=int)
    prompt_lr: float | None = setting(None, "learning rate (authors: 1e-4; demo: 0.1)", type=float)
    model: str | None = setting(None, "folder of a trained model (evaluate, export)", group="evaluation")
    balanced: int = setting(200, "images a class in balanced tests (density: 2.5 times as many); 0: none")
    fractions: tuple[float, ...] = setting((0.01, 0.1, 1.0), "shares of the patients", nargs="+", type=float)
    finetune_epochs: int = setting(0, "epochs of full fine-tuning; 0: none")
    seed: int = setting(42, "seed", group="run")
    output: str = setting("runs/cleft", "folder of the run; any setting in braces is filled in")
    cache_dir: str = setting("runs/cache", "folder of the embedding cache")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = setting(0, "processes that decode images")
    # fmt: on

    def __post_init__(self):
        positive = "steps lr batch_size dim temperature save_every context_tokens prompt_steps prompt_lr "
        positive += "demo_images lora_rank lora_alpha context_length"
        others = "workers seed prefix_tokens weight_decay warmup lora_dropout balanced finetune_epochs"
        retune.check_values(self, positive, lambda value: 0 < value < math.inf, "be positive")
        retune.check_values(self, others, lambda value: 0 <= value < 2**32, "be from 0 to 4294967295")
        if not all(0 < share <= 1 for share in self.fractions):
            raise InputError(f"--fractions {self.fractions}: shares are above 0 and at most 1")

    @property
    def public(self) -> retune.Config:
        """The data settings as retune's loaders take them, with all findings: captions name them all."""
        settings = {name: getattr(self, name) for name in (*DATA_SETTINGS, "cache_dir")}
        settings["classes"] = retune.CHEXPERT_FINDINGS if self.data in CHEXPERT else None
        return retune.Config(**settings)

    folder = property(retune.output_folder, doc="The run's folder.")


# fmt: off
AUTHORS = {"steps": 40_000, "lr": 4e-5, "batch_size": 288, "dim": 512, "prompt_steps": 8000,
           "prompt_lr": 1e-4, "save_every": 500, "foreground": "on", "augment": "on", "context_length": 72}
SMALL = {"steps": 200, "lr": 1e-3, "batch_size": 128, "dim": 128, "prompt_steps": 300, "prompt_lr": 0.1,
         "save_every": 50, "foreground": "off", "augment": "off", "context_length": 64}  # (ours)
TINY = {"data": "pretrain", "image": "small", "text": "small", "peft": "none", "demo_images": 12_000,
        "steps": 900, "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.03, "captions": "reports", "seed": 0,
        "save_every": 500, "projection_bias": False, "decay_all": True, "select": "last"}  # demo/tiny (ours)
DATA_SETTINGS = ("data", "data_dir", "labels_csv", "classes", "view", "uncertain", "blank", "size",
                 "demo_images")
EVALUATION = ("model", "balanced", "fractions", "finetune_epochs", "save_every")
RUN_SETTINGS = ("output", "cache_dir", "device", "workers", "precision")
# fmt: on


def resolve_defaults(config: Config) -> Config:
    """Fill what the user left open: the authors' values, or the demo's when its small towers are used."""
    preset = dict(SMALL if config.image in ("small", "tiny") else AUTHORS)
    preset["base_caption"] = f"a {'mammogram' if config.data == 'embed' else 'chest X-ray of a patient'} with"
    if config.caption_style != "simple":
        preset["context_length"] = 144
    return dataclasses.replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})


def model_config(config: Config) -> Config:
    """The settings of --model, with `config`'s data, evaluation and run; no other may differ."""
    saved = retune.read_json(Path(config.model) / "config.json")
    chosen = {name: getattr(config, name) for name in (*DATA_SETTINGS, *EVALUATION, *RUN_SETTINGS)}
    for item in dataclasses.fields(Config):
        given = getattr(config, item.name)
        known = saved.get(item.name, item.default)
        if item.name not in chosen and given not in (item.default, known):
            flag = item.name.replace("_", "-")
            raise InputError(f"--{flag} {given}: the model in {config.model} has {known}; leave it out")
        chosen.setdefault(item.name, known)
    return resolve_defaults(Config(**chosen))
