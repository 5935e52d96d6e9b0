"""What an attribution graph explains: logits, differences of logits, any direction the unembedding could read.

A logit node stands for (W_U[v] − mean W_U) · x, with x what the unembedding reads at the last position: the logit less
the mean over the vocabulary, before logits are soft-capped or scaled (convention of decoderesearch/circuit-tracer).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.interp.model import Model


@dataclass(frozen=True, eq=False)
class Target:
    """One thing to explain, at the last position.

    Attributes:
        label: how it is called.
        direction: [D], in the space the unembedding reads.
        weight: its share of influence at the start (a logit's probability).
        token: token id where it is one logit.
        bias: what is added to the product with the direction.
    """

    label: str
    direction: Tensor
    weight: float = 1.0
    token: int | None = None
    bias: float = 0.0


def salient_logits(model: Model, logits: Tensor, *, mass: float = 0.95, at_most: int = 10) -> list[Target]:
    """The most probable next tokens, as few as reach ``mass`` together and no more than ``at_most``.

    Args:
        model: the model.
        logits: [V], its own.
        mass, at_most: as above; 0.95 and 10 are the published values.
    """
    p = logits.double().softmax(-1)
    best = p.topk(min(at_most, len(p)))
    enough = int((best.values.cumsum(0) < mass).sum()) + 1
    return logit_targets(model, best.indices[:enough].tolist(), p)


def logit_targets(model: Model, tokens: Sequence[int], probabilities: Tensor | None = None) -> list[Target]:
    """The logits of ``tokens``, each less the mean logit; weights from ``probabilities`` [V], else equal."""
    directions, biases = _rows(model, tokens)
    mean, bias_mean = _mean(model)
    return [
        Target(
            model.decode([token]),
            row - mean,
            1.0 / len(tokens) if probabilities is None else float(probabilities[token]),
            token,
            float(bias - bias_mean),
        )
        for token, row, bias in zip(tokens, directions, biases, strict=True)
    ]


def logit_difference(model: Model, right: Sequence[int], wrong: Sequence[int]) -> Target:
    """Mean logit of ``right`` minus mean logit of ``wrong`` (token ids)."""
    (plus, b_plus), (minus, b_minus) = _rows(model, right), _rows(model, wrong)
    names = [" ".join(repr(model.decode([t])) for t in side) for side in (right, wrong)]
    label = f"{names[0]} − {names[1]}"
    return Target(label, plus.mean(0) - minus.mean(0), bias=float(b_plus.mean() - b_minus.mean()))


def _rows(model: Model, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    head = model.bridge.original_model.get_output_embeddings()  # pyright: ignore
    at = torch.tensor(list(tokens), dtype=torch.int64, device=head.weight.device)
    bias = getattr(head, "bias", None)
    return head.weight[at].detach(), head.weight.new_zeros(len(at)) if bias is None else bias[at].detach()


def _mean(model: Model) -> tuple[Tensor, float]:
    head = model.bridge.original_model.get_output_embeddings()  # pyright: ignore
    bias = getattr(head, "bias", None)
    return head.weight.detach().mean(0), 0.0 if bias is None else float(bias.mean())
