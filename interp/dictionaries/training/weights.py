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

from .recipe import Recipe

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


def begin(recipe: Recipe, layout: Layout, reads: int, writes: int, like: Tensor) -> Weights:
    """Weights to start from: decoder rows of one length in random directions, each read as it is written."""
    generator = torch.Generator().manual_seed(recipe.seed)
    rows = torch.randn(recipe.latents, writes, generator=generator, dtype=torch.float64)
    for columns in layout.columns[1:]:
        if layout.shared:
            rows[: layout.shared, columns] = rows[: layout.shared, layout.columns[0]]
    for columns in layout.columns:
        rows[:, columns] = torch.nn.functional.normalize(rows[:, columns], dim=1)
    for latents, columns in layout.forbidden:
        rows[latents, columns] = 0
    # A latent of several models reads as much as one of a single model.
    readers = (rows.square().sum(1, keepdim=True)).clamp_min(1)
    read = rows / readers if reads == writes else rows

    def to(value: Tensor) -> Tensor:
        return value.to(like.device, like.dtype).contiguous().requires_grad_()

    zeros = torch.zeros(recipe.latents), torch.zeros(writes)
    return Weights(
        W_enc=to(read.clone()),
        b_enc=to(zeros[0]),
        W_dec=to(rows),
        b_dec=to(zeros[1]),
        log_threshold=to(torch.zeros(recipe.latents)) if recipe.activation == "jumprelu" else None,
        W_skip=to(torch.zeros(reads, writes)) if recipe.skip else None,
    )


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
    """After a step: shared rows are one row to the last bit; forbidden blocks of ``tensors`` (weights and moments) are 0.

    Raises:
        AssertionError: a forbidden block is not.
    """
    for columns in layout.columns[1:] if layout.shared else ():
        # Equal numbers at different places of a vector may have been rounded differently.
        W_dec[: layout.shared, columns] = W_dec[: layout.shared, layout.columns[0]]
    for block in layout.forbidden:
        assert not any(bool(tensor[block].any()) for tensor in tensors), "a dedicated latent leaked into another model"
