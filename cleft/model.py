"""The method's equations: the model of stage 1, its contrastive loss, the learned prompt of stage 2."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retune
from cleft.config import Config
from cleft.towers import add_peft
from retune import DualEncoder, InputError


class Cleft(nn.Module):
    """An encoder in training and its learnable temperature; projections train whole, the text tower by --peft."""

    def __init__(self, encoder: DualEncoder, config: Config):
        super().__init__()
        self.encoder, self.frozen_image = encoder, config.image_tower == "frozen"
        encoder.requires_grad_(True)
        encoder.image.tower.requires_grad_(not self.frozen_image)
        with retune.seeded(config.seed):
            encoder.text.tower = add_peft(encoder.text.tower, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        for tower in (encoder.image.tower, encoder.text.tower) if config.checkpointing else ():
            if not getattr(tower, "supports_gradient_checkpointing", True):
                raise InputError(f"--checkpointing: {type(tower).__name__} does not support it; leave it out")
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train()

    def train(self, mode: bool = True):
        """Training mode, but for a frozen image tower: its normalisation keeps its statistics."""
        super().train(mode)
        self.encoder.image.tower.train(mode and not self.frozen_image)
        return self

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W], tokens [B, T], their mask -> unit vectors [B, D] of the images and of the texts."""
        images = self.encoder.image(pixels).to(self.log_scale.dtype)  # [B, D]
        texts = self.encoder.text(input_ids, attention_mask).to(
            self.log_scale.dtype
        )  # at the end-of-text token
        return F.normalize(images, dim=1), F.normalize(texts, dim=1)

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines."""
        return self.log_scale.exp().clamp(max=100)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric CLIP loss of N pairs of unit vectors [N, D]: the sum of both cross-entropies."""
    logits = scale * images @ texts.T  # [N, N]
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def gather_ranks(own: Tensor) -> Tensor:
    """[B, D] of every rank -> the global batch [world * B, D], in rank order, without gradient."""
    parts = [torch.empty_like(own) for _ in range(retune.ranks()[1])]
    torch.distributed.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def contrastive_step(
    model: Cleft, pieces: Sequence[tuple], seed: int, autocast: Callable, local_negatives: bool = False
) -> Tensor:
    """Gradients of the batch's loss from this rank's pieces (pixels, ids, mask), to be summed over ranks; the loss.

    Negatives (ours): all other pairs of the global batch; local, the authors': those of this rank, and the loss is
    the mean over ranks. The loss needs all embeddings at once, a tower's backward pass only one piece (ours): embed
    all without a graph, differentiate the loss by the embeddings, embed each piece again, with the same dropout, and
    go on backwards. Neither pieces nor ranks change the loss; batch normalisation alone sees one piece at a time.
    """
    rank, world = retune.ranks()

    def embed(number: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(), autocast():
            torch.manual_seed((seed * world + rank) * len(pieces) + number)
            return model(*pieces[number])

    with torch.set_grad_enabled(len(pieces) == 1):  # a single piece keeps its graph and is not embedded again
        parts = [embed(number) for number in range(len(pieces))]
    batch = [torch.cat(part).detach() for part in zip(*parts, strict=True)]  # [B, D] of images and of texts
    sizes, first, factor = [len(part[0]) for part in parts], 0, 1
    if world > 1 and not local_negatives:  # every rank holds the whole gradient of the global batch's loss
        batch, first, factor = [gather_ranks(part) for part in batch], rank * sum(sizes), world
    leaves = [part.requires_grad_() for part in batch]
    loss = contrastive_loss(*leaves, model.scale) / world
    loss.backward()
    gradients = [(factor * leaf.grad[first : first + sum(sizes)]).split(sizes) for leaf in leaves]
    for number, gradient in enumerate(zip(*gradients, strict=True)):
        torch.autograd.backward(parts[number] if len(pieces) == 1 else embed(number), gradient)
    if world > 1:
        torch.distributed.all_reduce(loss := loss.detach())
    return loss.detach()


class Prompt(nn.Module):
    """Stage 2: learned context tokens [n, H] before the phrase of each class, read by the frozen text tower."""

    def __init__(self, model: Cleft, phrases: Sequence[str], config: Config):
        super().__init__()
        encoder, n = model.encoder, config.context_tokens
        self.text, self.scale = [encoder.text], model.scale.detach()  # in a list: not a part of this module
        embedding = encoder.text.tower.get_input_embeddings()
        self.phrases = [split_tokens(encoder.tokenizer, f" {phrase}", embedding) for phrase in phrases]
        words = split_tokens(encoder.tokenizer, config.base_caption, embedding)[1]
        self.context = nn.Parameter(words.repeat(math.ceil(n / len(words)), 1)[:n].clone())
        longest = n + max(sum(map(len, parts)) for parts in self.phrases)
        limit = getattr(encoder.text.tower.config, "max_position_embeddings", longest)
        if longest > limit:
            raise InputError(f"--context-tokens {n}: {longest} tokens, the text tower reads {limit}")

    def forward(self) -> Tensor:
        """Unit vectors [C, D] of the texts [start tokens] [context] [phrase] [end tokens], read at the last token."""
        rows = [torch.cat([start, self.context, phrase, end]) for start, phrase, end in self.phrases]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [C, T, H]
        lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
        mask = (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()  # [C, T]
        hidden = self.text[0].tower(inputs_embeds=inputs, attention_mask=mask)["last_hidden_state"]
        last = hidden[torch.arange(len(rows), device=inputs.device), lengths - 1]  # [C, H]
        return F.normalize(self.text[0].head(last), dim=1)


def split_tokens(tokenizer, text: str, embedding: nn.Module) -> list[Tensor]:
    """Token embeddings [t, H] of a text: what the tokenizer puts before it, the text, what comes after."""
    plain, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    if not plain:
        raise InputError(f"the class name or caption {text!r} has no tokens; rename it")
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    parts = whole[:start], plain, whole[start + len(plain) :]
    return [embedding(torch.tensor(ids).long().to(embedding.weight.device)).detach() for ids in parts]


def image_features(
    encoder: DualEncoder, transform: Callable[[Tensor], Tensor], config: Config
) -> DualEncoder:
    """The encoder without its image projection: what probes are trained on, [N, W] of `retune.embed`."""
    width = encoder.image.head[0].in_features
    settings = encoder.config | {"image": encoder.config["image"] | {"head": []}, "dim": width}
    with torch.device("meta"):
        features = DualEncoder(settings | {"foreground": config.foreground}, encoder.tokenizer)
    features.image.tower, features.text, features.transform = encoder.image.tower, nn.Identity(), transform
    return features.eval()
