"""Inputs of ``kernels_gpu.py``, drawn on the card, and what ours must make of them.

Against plain torch in float32 on the first tokens, since float64 of everything would take longer than the measurements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, JumpReLU, attribute, decode, encode
from heredity.kernels import statistics as statistics_of
from heredity.kernels.ops.backward import run as backward_op

TOLERANCE = 2e-2
"""‖got − plain‖ / ‖plain‖ of bfloat16 results."""


@dataclass(frozen=True)
class Shape:
    """Tokens, width, latents, active per token."""

    name: str
    width: int
    latents: int
    k: int
    tokens: int = 8192

    def __str__(self) -> str:
        return f"{self.name}: {self.tokens} tokens, d {self.width}, {self.latents} latents, {self.k} active"


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor


def draw(shape: Shape, device: str) -> Inputs:
    """Tokens made of latents whose frequencies fall off like Zipf's law; the encoder is the decoder's transpose."""
    decoder = torch.nn.functional.normalize(torch.randn(shape.latents, shape.width, device=device))
    # The inverse of the distribution function of 1/rank.
    causes = (shape.latents ** torch.rand(shape.tokens, shape.k, device=device)).long() - 1
    causes = torch.randperm(shape.latents, device=device)[causes.clamp(0, shape.latents - 1)]
    strength = 0.5 + torch.empty(shape.tokens, shape.k, device=device).exponential_()
    x = torch.nn.functional.embedding_bag(causes, decoder, per_sample_weights=strength, mode="sum")
    x *= torch.randn(shape.tokens, 1, device=device).mul_(0.1).exp_()
    b_enc = 0.02 * torch.randn(shape.latents, device=device) - 0.05
    some = x[:256] @ decoder.T + b_enc
    level = some.flatten().topk(len(some) * shape.k).values[-1]
    threshold = level * (0.9 + 0.2 * torch.rand(shape.latents, device=device))
    b_dec = torch.zeros(shape.width, device=device)
    arrays = (x, decoder.T, b_enc, decoder.clone(), b_dec, threshold)
    return Inputs(*(array.bfloat16() for array in arrays))


def random_features(shape: Shape, share: float, device: str) -> FeatureCSR:
    """About this share of latents active on every token, in bfloat16."""
    parts = [
        FeatureCSR.from_dense(
            (torch.rand(min(512, shape.tokens - first), shape.latents, device=device) < share).bfloat16()
        )
        for first in range(0, shape.tokens, 512)
    ]
    return FeatureCSR.concatenate(parts)


def faults(shape: Shape, given: Inputs, features: FeatureCSR) -> list[str]:
    """What is wrong with ours on the first tokens, against plain torch in float32 on the same inputs."""
    few = features[: min(256, shape.tokens)]
    x = given.x[: few.n_tokens]
    pre = torch.addmm(given.b_enc.float(), x.float(), given.W_enc.float())
    found = []
    expected = pre[few.tokens, few.indices.long()]
    found += compared("values of encode", few.values, expected)
    # The k-th value kept must be the k-th largest, though rounding may choose among its neighbours.
    kept = torch.zeros_like(pre).index_put((few.tokens, few.indices.long()), expected)
    found += compared(
        "selection of encode", kept.sort(1).values, pre.topk(shape.k).values.relu().sort(1).values, shape.k
    )
    acts = few.to_dense().float()
    found += compared("decode", decode(few, given.W_dec, given.b_dec), acts @ given.W_dec.float() + given.b_dec.float())
    gradients = torch.randn(4, few.n_tokens, shape.width, device=x.device, dtype=torch.bfloat16)
    scores = (gradients.float() @ given.W_dec.float().T)[:, few.tokens, few.indices.long()]
    found += compared("attribute", attribute(gradients, few, given.W_dec), scores)
    gradient = gradients[0]
    back = backward_op(fresh(few), None, [gradient], [x], [given.W_enc], [given.W_dec], None, False)
    inner = (gradient.float() @ given.W_dec.float().T) * (acts > 0)
    found += compared("gradient of the decoder", back.decoders[0], acts.T @ gradient.float())
    found += compared("gradient of the encoder", back.weights[0], x.float().T @ inner)
    found += compared("gradient of the bias", back.bias, inner.sum(0))
    # How many, since rounding decides about those at the threshold.
    n_above = (pre > given.threshold.float()).sum().float()
    jump = encode(x, given.W_enc, given.b_enc, JumpReLU(given.threshold))
    found += compared("number active under JumpReLU", torch.tensor(jump.nnz), n_above.cpu())
    counted = statistics_of(few)
    if not torch.equal(counted.count, (acts > 0).sum(0)):
        found.append("counts of statistics differ")
    found += compared("sums of statistics", counted.sum, acts.sum(0))
    return found


def compared(name: str, got: Tensor, expected: Tensor, last: int | None = None) -> list[str]:
    got = got if last is None else got[:, -last:]
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    return [] if error <= TOLERANCE else [f"{name} is off by {error:.1e}"]


def fresh(features: FeatureCSR) -> FeatureCSR:
    """A new object, or the second run would find caches that the first has filled."""
    return FeatureCSR(features.indptr, features.indices, features.values, features.n_latents)
