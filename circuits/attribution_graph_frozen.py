"""Norms and MLPs of one prompt as the linear maps they are once their scales and gates are held fixed.

One letter means one dimension: P positions, D width of the stream, M width inside an MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

TOLERANCE = 1e-4
"""Largest relative difference between what a frozen part computes and what the model computed."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """x ↦ (x − mean) · scale · gain + bias, the mean taken off only if ``centred``.

    Attributes:
        scale: [P], what the norm divided by at each position of the prompt, inverted.
        gain, bias: [D].
        centred: whether it is a LayerNorm rather than an RMS norm.
    """

    scale: Tensor
    gain: Tensor
    bias: Tensor
    centred: bool

    def forward(self, x: Tensor, biases: bool = True) -> Tensor:
        """[P, D] at the output from the input."""
        out = _centre(x, self.centred) * self.scale[:, None] * self.gain
        return out + self.bias if biases else out

    def backward(self, gradient: Tensor, positions: Tensor | slice) -> Tensor:
        """Gradients at the input [..., n, D] of those at the output, which belong to ``positions`` [n]."""
        return _centre(gradient * self.gain, self.centred) * self.scale[positions, None]


@dataclass(frozen=True, eq=False)
class FrozenMLP:
    """y ↦ ((y W_in + b_in) · gate) W_out + b_out, with the gate each unit had at each position of the prompt.

    For a gated MLP the gate is the activated gate projection; for a plain one, the activation over its argument.

    Attributes:
        W_in, b_in: [D, M], [M].
        gate: [P, M].
        W_out, b_out: [M, D], [D].
    """

    W_in: Tensor
    b_in: Tensor
    gate: Tensor
    W_out: Tensor
    b_out: Tensor

    def forward(self, y: Tensor) -> Tensor:
        """[P, D] at the output from the input."""
        return ((y @ self.W_in + self.b_in) * self.gate) @ self.W_out + self.b_out

    def backward(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """Gradients at the input [n, D] of those at the output, which belong to ``positions`` [n]."""
        return ((gradient @ self.W_out.T) * self.gate[positions]) @ self.W_in.T


def freeze_norm(module: nn.Module, x: Tensor, y: Tensor, what: str, model: Model) -> FrozenNorm:
    """The linear map that ``module`` was when it made ``y`` of ``x``, [P, D] both.

    Gain and bias are read off from what the module makes of two vectors, so that it does not matter how it stores
    them (Gemma adds one to its gain).

    Raises:
        ModelError: it is no LayerNorm or RMS norm, or ``y`` is not what it makes of ``x``.
    """
    with torch.no_grad():
        probe = torch.ones_like(x[:1])
        probe[:, 1::2] = -1
        bias, out = module(torch.zeros_like(probe))[0], module(probe)
        centred = bool((module(probe + 3) - out).norm() <= TOLERANCE * (out - bias).norm())
        gain = ((out - bias) / _centre(probe, centred))[0]
        shaped = (_centre(x, centred) * gain).double()
        scale = ((y - bias).double() * shaped).sum(1) / shaped.square().sum(1).clamp_min(1e-300)
    found = FrozenNorm(scale.to(x.dtype), gain, bias, centred)
    agree(found.forward(x), y, what, model)
    return found


def freeze_mlp(model: Model, layer: int, y: Tensor, u: Tensor, hidden: Tensor, out: Tensor) -> FrozenMLP:
    """The linear map that a layer's MLP was.

    Args:
        model, layer: which.
        y, out: its input and output, [P, D].
        u: what ``in`` makes of the input, [P, M].
        hidden: what is given to the last projection, [P, M].

    Raises:
        ModelError: it is neither a gated nor a plain MLP.
    """
    mlp = model.bridge.blocks[layer].mlp
    W_in, b_in = _linear(getattr(mlp, "in").original_component)
    W_out, b_out = _linear(mlp.out.original_component)
    gate = torch.where(u == 0, 0.0, hidden / torch.where(u == 0, 1.0, u))
    found = FrozenMLP(W_in, b_in, gate, W_out, b_out)
    agree(found.forward(y), out, f"MLP of layer {layer}", model)
    return found


def agree(ours: Tensor, theirs: Tensor, what: str, model: Model, size: Tensor | None = None) -> None:
    """Nothing, if ``ours`` is ``theirs`` to :data:`TOLERANCE` of the norm of ``size`` (of ``theirs`` if None).

    Raises:
        ModelError: it is not.
    """
    miss, norm = (ours - theirs).norm(), (theirs if size is None else size).norm()
    if not miss <= TOLERANCE * norm:
        share = float(miss / norm) if norm else float("inf")
        raise ModelError(
            f"the frozen {what} of this {model.shape.architecture} misses what the model computes by {share:.2g} of "
            "its size, so effects through it would be wrong",
            where=model.spec,
            remedy="Attribution graphs need residual blocks with LayerNorm or RMS norm, attention whose pattern is "
            "computed explicitly, and an MLP after it.",
        )


def _linear(module: Any) -> tuple[Tensor, Tensor]:
    """Weight [in, out] and bias [out] of a linear layer."""
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    return weight, module.bias if module.bias is not None else weight.new_zeros(weight.shape[1])


def _centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x
