"""The method's equations: the model of stage 1, its contrastive loss, the learned prompt of stage 2."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retune
from cleft.captions import class_phrase
from cleft.config import Config
from cleft.towers import add_peft
from retune import DualEncoder, InputError


class Cleft(nn.Module):
    """An encoder in training and its temperature; projections train whole, the text tower by --peft."""

    def __init__(self, encoder: DualEncoder, config: Config):
        super().__init__()
        self.encoder = encoder
        self.frozen_image = config.image_tower == "frozen"
        encoder.requires_grad_(True)
        encoder.image.tower.requires_grad_(not self.frozen_image)
        with retune.seeded(config.seed):
            encoder.text.tower = add_peft(encoder.text.tower, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        if config.checkpointing:
            for tower in (encoder.image.tower, encoder.text.tower):
                tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train()

    def train(self, mode: bool = True):
        """As for every module, but a frozen image tower stays in evaluation mode."""
        super().train(mode)
        self.encoder.image.tower.train(mode and not self.frozen_image)
        return self

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W], tokens [B, T], their mask -> unit vectors [B, D] of images and of texts."""
        dtype = self.log_scale.dtype
        images = self.encoder.image(pixels).to(dtype)  # [B, D]
        texts = self.encoder.text(input_ids, attention_mask).to(dtype)  # [B, D], at the end-of-text token
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


def contrastive_step(scale: Tensor, images: Tensor, texts: Tensor, local_negatives: bool = False) -> Tensor:
    """Gradients of the batch's loss from this rank's unit vectors [B, D], to be summed over ranks; returns
    the loss. Negatives are all other pairs of the global batch (ours: ranks do not change the loss), or with
    `local_negatives` this rank's. Batch normalisation always sees only this rank's images."""
    rank, world = retune.ranks()
    own = (images, texts)
    whole = world > 1 and not local_negatives
    leaves = []  # [world * B, D] of all ranks, or [B, D]
    for vectors in own:
        parts = [vectors.detach()]
        if whole:
            parts = [torch.empty_like(vectors) for _ in range(world)]
            torch.distributed.all_gather(parts, vectors.detach().contiguous())
        leaves.append(torch.cat(parts).requires_grad_())
    loss = contrastive_loss(*leaves, scale) / world
    loss.backward()
    gradients = [leaf.grad.split(len(images))[rank if whole else 0] for leaf in leaves]
    # Every rank holds the whole gradient of the global batch's loss; the division above left a share of it
    torch.autograd.backward(own, [world * gradient if whole else gradient for gradient in gradients])
    loss = loss.detach()
    if world > 1:
        torch.distributed.all_reduce(loss)
    return loss


class Prompt(nn.Module):
    """Stage 2: learned context tokens [n, H] before the phrase of each class, for the frozen text tower."""

    def __init__(self, model: Cleft, class_names: list[str], config: Config):
        super().__init__()
        encoder = model.encoder
        n = config.context_tokens
        self.text = [encoder.text]  # in a list: not a part of this module
        self.scale = model.scale.detach()
        embedding = encoder.text.tower.get_input_embeddings()
        phrases = [f" {class_phrase(name)}" for name in class_names]
        self.phrases = [split_tokens(encoder.tokenizer, phrase, embedding) for phrase in phrases]
        words = split_tokens(encoder.tokenizer, config.base_caption, embedding)[1]
        self.context = nn.Parameter(words.repeat(math.ceil(n / len(words)), 1)[:n].clone())
        longest = n + max(sum(map(len, parts)) for parts in self.phrases)
        limit = getattr(encoder.text.tower.config, "max_position_embeddings", longest)
        if longest > limit:
            raise InputError(f"--context-tokens {n}: {longest} tokens, the text tower reads {limit}")

    def forward(self) -> Tensor:
        """Unit vectors [C, D] of the texts [start tokens] [context] [phrase] [end tokens], at their ends."""
        rows = [torch.cat([start, self.context, phrase, end]) for start, phrase, end in self.phrases]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [C, T, H]
        lengths = torch.tensor([len(row) for row in rows], device=inputs.device)
        mask = (torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]).long()  # [C, T]
        hidden = self.text[0].tower(inputs_embeds=inputs, attention_mask=mask)["last_hidden_state"]
        last = hidden[torch.arange(len(rows), device=inputs.device), lengths - 1]  # [C, H]
        return F.normalize(self.text[0].head(last), dim=1)


def split_tokens(tokenizer, text: str, embedding: nn.Module) -> list[Tensor]:
    """Token embeddings [t, H] of a text: what the tokenizer puts before it, the text, what comes after."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    if not plain:
        raise InputError(f"the class name or caption {text!r} has no tokens; rename it")
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    parts = whole[:start], plain, whole[start + len(plain) :]
    return [embedding(torch.tensor(ids).long().to(embedding.weight.device)).detach() for ids in parts]
