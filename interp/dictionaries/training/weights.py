"""The arrays that are trained, and what must hold of them at every step.

A crosscoder is kept as one autoencoder of its models' activations side by side: the same arithmetic in one product.
Designated *shared* latents have one decoder row for all models. *Dedicated* ones have zeros in the encoder and the
decoder of all models but theirs. Both are kept through the gradients: what the loss of dead latents sends into a
forbidden block would otherwise stay in Adam's moments.

F latents, D the widths of all places side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from heredity.kernels import BatchTopK, decode, encode

from .recipe import Recipe
from .streams import Streams

NOISE = 3.0
"""Length of the random part of a row at the start, that of the token's being 1: with less of it more variance is
explained early, and more latents are dead (of 4096 on SmolLM2 after 64 steps: 0.80 and 9 % at 0.1, 0.77 and 0 at 3)."""
DAMPED = 1.0
"""Power of its standard deviation by which a principal component is divided."""

Block = tuple[slice, slice]


@dataclass(frozen=True)
class Layout:
    """Which latents belong to which models.

    Attributes:
        columns: of each place written, in ``W_dec``.
        shared: the first so many latents have one decoder row.
        forbidden: blocks of ``W_enc`` and ``W_dec`` that are zero.
        price: what a shared latent costs over any other.
    """

    columns: tuple[slice, ...]
    shared: int
    forbidden: tuple[Block, ...]
    price: float

    @classmethod
    def of(cls, recipe: Recipe, writes: Sequence[int]) -> "Layout":
        """The layout of a recipe for places of these widths."""
        columns = tuple(slice(a, b) for a, b in pairwise([0, *accumulate(writes)]))
        shared, own = recipe.blocks(len(writes))
        first = recipe.latents - own * len(writes)
        rows = [slice(first + m * own, first + (m + 1) * own) for m in range(len(writes))] if own else []
        forbidden = [(mine, of) for m, mine in enumerate(rows) for n, of in enumerate(columns) if n != m]
        return cls(columns, shared, tuple(forbidden), recipe.shared_penalty if shared else 1.0)

    def score_per_activation(self, W_dec: Tensor) -> Tensor:
        """[F], what an activation is multiplied by before it is selected: Σ‖d‖ over the places written.

        Selecting on activations alone would let latents win by long encoder and short decoder rows.
        """
        norm = W_dec[:, self.columns[0]].norm(dim=1)
        for columns in self.columns[1:]:
            norm = norm + W_dec[:, columns].norm(dim=1)
        if self.shared:
            norm[: self.shared] /= self.price
        return norm


@dataclass
class Weights:
    """The trained arrays, in training's units.

    Attributes:
        W_enc: [F, D read]; its transpose encodes.
        b_enc: [F].
        W_dec: [F, D written].
        b_dec: [D written].
        log_threshold: [F], of JumpReLU.
        W_skip: [D read, D written], of a skip transcoder.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    log_threshold: Tensor | None = None
    W_skip: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def empty(recipe: Recipe, reads: int, writes: int, like: Tensor) -> Weights:
    """Weights that are zero, of the shapes of ``recipe``."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=like.dtype, device=like.device, requires_grad=True)

    return Weights(
        W_enc=zeros(recipe.latents, reads),
        b_enc=zeros(recipe.latents),
        W_dec=zeros(recipe.latents, writes),
        b_dec=zeros(writes),
        log_threshold=zeros(recipe.latents) if recipe.activation == "jumprelu" else None,
        W_skip=zeros(reads, writes) if recipe.skip else None,
    )


@torch.no_grad()
def begin(recipe: Recipe, layout: Layout, weights: Weights, seen: Streams, first: Streams, k: int) -> None:
    """Fill ``weights`` with what training starts from.

    Each latent starts as a random direction with a token's activation in it, of unit length at every place, read as it
    is written (by a transcoder, as it was read). Random directions alone take longer to become anything. In an
    activation the few directions of large variance drown all others, so each principal component is first divided by
    its standard deviation. The encoder's length is the one at which the first batch is reconstructed best.

    Args:
        recipe, layout: of the training.
        weights: see :func:`empty`.
        seen: tokens to choose from, in training's units.
        first: a batch, in the same units.
        k: active latents per token at the start.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    # All different as far as there are as many.
    chosen = [torch.randperm(len(seen.x), generator=generator) for _ in range(-(-recipe.latents // len(seen.x)))]
    tokens = torch.cat(chosen)[: recipe.latents].to(seen.x.device)
    written = _rows(seen.y, tokens, layout.columns, generator)
    if layout.shared:
        mean = sum(written[: layout.shared, columns] for columns in layout.columns)
        for columns in layout.columns:
            written[: layout.shared, columns] = torch.nn.functional.normalize(mean, dim=1)  # pyright: ignore[reportArgumentType]
    read = written
    if seen.y is not seen.x:
        read = _rows(seen.x, tokens, [slice(0, seen.x.shape[1])], generator)
    weights.W_enc.copy_(read)
    weights.W_dec.copy_(written)
    for block in layout.forbidden:
        weights.W_enc[block] = 0
        weights.W_dec[block] = 0
    norm = layout.score_per_activation(weights.W_dec)
    features = encode(first.x, weights.W_enc.T, None, BatchTopK(k=k), norm=norm)
    made = decode(features, weights.W_dec)
    size = made.square().sum()
    weights.W_enc *= torch.where(size > 0, (made * first.y).sum() / size, 1.0).clamp_min(1e-3)
    if weights.log_threshold is not None:
        features = encode(first.x, weights.W_enc.T, None, BatchTopK(k=k))
        lowest = features.values.min() if features.nnz else torch.ones(())
        weights.log_threshold.fill_(float(lowest.log()))


def _rows(values: Tensor, tokens: Tensor, places: Sequence[slice], generator: torch.Generator) -> Tensor:
    """The values of ``tokens``, large directions damped, of length 1 at each place, [F, D]."""
    out = torch.empty(len(tokens), values.shape[1], dtype=values.dtype, device=values.device)
    for columns in places:
        part = values[:, columns]
        variance, basis = torch.linalg.eigh(part.T @ part / len(part))
        damped = (variance / variance.max().clamp_min(1e-30)).clamp_min(1e-6) ** (-DAMPED / 2)
        rows = torch.nn.functional.normalize(part[tokens] @ basis * damped @ basis.T, dim=1)
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
        rows += NOISE * torch.nn.functional.normalize(noise, dim=1)
        out[:, columns] = torch.nn.functional.normalize(rows, dim=1)
    return out


@torch.no_grad()
def confine(layout: Layout, weights: Weights) -> None:
    """Gradients such that a step leaves shared rows equal and forbidden blocks zero."""
    encoder, decoder = weights.W_enc.grad, weights.W_dec.grad
    assert encoder is not None and decoder is not None
    for block in layout.forbidden:
        encoder[block] = 0
        decoder[block] = 0
    if layout.shared:
        rows = slice(layout.shared)
        total = sum(
            (decoder[rows, columns] for columns in layout.columns[1:]), decoder[rows, layout.columns[0]].clone()
        )
        for columns in layout.columns:
            decoder[rows, columns] = total


@torch.no_grad()
def settle(layout: Layout, tensors: Sequence[Tensor], W_dec: Tensor) -> None:
    """After a step: shared rows are one row to the last bit; forbidden blocks of ``tensors`` (and moments) are zero.

    Raises:
        AssertionError: a forbidden block is not.
    """
    for columns in layout.columns[1:] if layout.shared else ():
        # Equal numbers at different places of a vector may have been rounded differently.
        W_dec[: layout.shared, columns] = W_dec[: layout.shared, layout.columns[0]]
    for block in layout.forbidden:
        assert not any(bool(tensor[block].any()) for tensor in tensors), "a dedicated latent leaked into another model"
