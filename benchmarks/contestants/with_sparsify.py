"""eai-sparsify: values and indices of k latents; without Triton it decodes by ``embedding_bag``."""

import os
from functools import partial
from typing import Any

import torch
from task import FEW, Arrays, Inputs, Task, read_step, read_top, unshifted
from torch import Tensor

LACKS = {
    "encode_jumprelu": "TopK and GroupMax only",
    "attribute": "no attribution (a repository of its own)",
    "statistics": "only counts of firing, inside its trainer",
}


def _coder(inputs: Inputs, bias: Tensor) -> Any:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    width, latents = inputs["W_enc"].shape
    coder = SparseCoder(width, SparseCoderConfig(num_latents=latents, k=inputs.k), dtype=torch.float32)
    coder.encoder.weight.data = inputs["W_enc"].T.contiguous()
    coder.encoder.bias.data = bias.clone()
    coder.W_dec.data, coder.b_dec.data = inputs["W_dec"].clone(), inputs["b_dec"].clone()
    return coder


def encode_topk(inputs: Inputs) -> Task:
    coder = _coder(inputs, inputs.shifted)
    return Task(lambda: coder.encode(inputs["x"]), lambda out: read_top(*out[:2]), "values, indices, pre-activations")


def decode(inputs: Inputs) -> Task:
    coder = _coder(inputs, inputs.shifted)
    values = inputs.values("acts").view(-1, inputs.k)
    indices = inputs.at("acts")[1].view(-1, inputs.k)
    return Task(lambda: coder.decode(values, indices), lambda out: {"reconstruction": out}, "dense, from indices")


def train(inputs: Inputs, few: bool = False) -> Task:
    x = inputs["x"][:FEW] if few else inputs["x"]
    coder = _coder(inputs, inputs.shifted + (inputs["b_enc_few"] - inputs["b_enc"] if few else 0))
    # It divides the squared error by this, so it is where the mean over tokens goes in.
    tokens = torch.tensor(float(len(x)))

    def run() -> Tensor:
        out = coder(x, total_variance=tokens)
        out.fvu.backward()
        return out.sae_out

    def read(out: Tensor) -> Arrays:
        weight, bias = coder.encoder.weight.grad.T, coder.encoder.bias.grad
        return read_step(out, unshifted(weight, bias, inputs["b_dec"]), bias, coder.W_dec.grad)

    return Task(run, read, "gradients", [*coder.parameters()], grad=True)


TASKS = {
    "encode_topk": {"": encode_topk},
    "decode": {"": decode},
    "train": {"": train},
    "train_few": {"": partial(train, few=True)},
}
