"""heredity.kernels, with the encoder kept as [F, D]."""

from typing import Any

import torch
from task import FEW, Arrays, Inputs, Task, read_step

LACKS: dict[str, str] = {}


def encode_topk(inputs: Inputs) -> Task:
    from heredity.kernels import TopK

    return _encode(inputs, TopK(inputs.k))


def encode_jumprelu(inputs: Inputs) -> Task:
    from heredity.kernels import JumpReLU

    return _encode(inputs, JumpReLU(inputs["threshold"]))


def _encode(inputs: Inputs, activation: Any) -> Task:
    from heredity.kernels import encode

    weight = inputs["W_enc"].T.contiguous()

    def read(features: Any) -> Arrays:
        return {"tokens": features.tokens, "latents": features.indices.long(), "values": features.values}

    return Task(lambda: encode(inputs["x"], weight.T, inputs["b_enc"], activation), read, "CSR")


def features_of(inputs: Inputs, name: str) -> Any:
    from heredity.kernels import FeatureCSR

    indptr, indices, values = (inputs[f"{name}_{part}"] for part in ("indptr", "indices", "values"))
    return FeatureCSR(indptr, indices, values, len(inputs["W_dec"]))


def decode(inputs: Inputs) -> Task:
    from heredity.kernels import decode

    # A new object each time: what it caches would be a gift to the second run.
    def run() -> Any:
        return decode(features_of(inputs, "acts"), inputs["W_dec"], inputs["b_dec"])

    return Task(run, lambda out: {"reconstruction": out}, "dense, from CSR")


def train(inputs: Inputs) -> Task:
    return _train(inputs, inputs["x"], inputs["b_enc"])


def train_few(inputs: Inputs) -> Task:
    return _train(inputs, inputs["x"][:FEW], inputs["b_enc_few"])


def _train(inputs: Inputs, x: torch.Tensor, bias: torch.Tensor) -> Task:
    from heredity.kernels import TopK, autoencode

    copies = (inputs["W_enc"].T.contiguous(), bias.clone(), inputs["W_dec"].clone(), inputs["b_dec"].clone())
    encoder, b_enc, decoder, b_dec = (array.requires_grad_() for array in copies)

    def run() -> Any:
        out = autoencode(x, encoder.T, b_enc, decoder, b_dec, TopK(inputs.k)).reconstruction
        (out - x).square().sum(1).mean().backward()
        return out

    def read(out: torch.Tensor) -> Arrays:
        return read_step(out, encoder.grad.T, b_enc.grad, decoder.grad)  # type: ignore[union-attr, arg-type]

    return Task(run, read, "gradients", (encoder, b_enc, decoder, b_dec), grad=True)


def attribute(inputs: Inputs) -> Task:
    from heredity.kernels import attribute

    def run() -> Any:
        return attribute(inputs["gradients"], features_of(inputs, "spot"), inputs["W_dec"])

    return Task(run, lambda out: {"scores": out}, "scores")


def statistics(inputs: Inputs) -> Task:
    from heredity.kernels import statistics

    def read(out: Any) -> Arrays:
        largest, top = out.max.clamp(min=0), out.top_values.clamp(min=0)
        names = ("count", "sum", "sum_of_squares")
        return {name: getattr(out, name) for name in names} | {"max": largest, "top_values": top[:, : len(inputs["x"])]}

    run = lambda: statistics(features_of(inputs, "acts"))  # noqa: E731
    return Task(run, read, "also histogram, tokens of top 16")


TASKS = {
    "encode_topk": {"": encode_topk},
    "encode_jumprelu": {"": encode_jumprelu},
    "decode": {"": decode},
    "train": {"": train},
    "train_few": {"": train_few},
    "attribute": {"": attribute},
    "statistics": {"": statistics},
}
