"""What one writes in plain torch, and the bare matrix product inside each op, which none can do without."""

from typing import Any

import torch
from task import FEW, Arrays, Inputs, Task, read_dense, read_step, read_top
from torch import Tensor

LACKS: dict[str, str] = {}


def nothing(out: Any) -> Arrays:
    """A matrix product alone computes nothing that could be compared."""
    return {}


def encode_gemm(inputs: Inputs) -> Task:
    return Task(lambda: inputs["x"] @ inputs["W_enc"], nothing, "pre-activations")


def encode_topk(inputs: Inputs) -> Task:
    def run() -> tuple[Tensor, Tensor]:
        values, indices = torch.addmm(inputs["b_enc"], inputs["x"], inputs["W_enc"]).topk(inputs.k, sorted=False)
        return values.relu_(), indices

    return Task(run, lambda out: read_top(*out), "values, indices")


def encode_jumprelu(inputs: Inputs) -> Task:
    return Task(lambda: _jumprelu(inputs), read_dense, "dense")


def encode_jumprelu_csr(inputs: Inputs) -> Task:
    return Task(lambda: _jumprelu(inputs).to_sparse_csr(), lambda out: read_dense(out.to_dense()), "CSR")


def _jumprelu(inputs: Inputs) -> Tensor:
    pre = torch.addmm(inputs["b_enc"], inputs["x"], inputs["W_enc"])
    return pre * (pre > inputs["threshold"])


def decode_gemm(inputs: Inputs) -> Task:
    acts = inputs.dense("acts")
    return Task(lambda: acts @ inputs["W_dec"], nothing, "dense")


def decode(inputs: Inputs) -> Task:
    acts = inputs.dense("acts")
    run = lambda: torch.addmm(inputs["b_dec"], acts, inputs["W_dec"])  # noqa: E731
    return Task(run, lambda out: {"reconstruction": out}, "dense")


def decode_csr(inputs: Inputs) -> Task:
    acts = inputs.coo("acts").to_sparse_csr()
    run = lambda: acts @ inputs["W_dec"] + inputs["b_dec"]  # noqa: E731
    return Task(run, lambda out: {"reconstruction": out}, "dense, from CSR")


def train(inputs: Inputs) -> Task:
    return _train(inputs, inputs["x"], inputs["b_enc"])


def train_few(inputs: Inputs) -> Task:
    return _train(inputs, inputs["x"][:FEW], inputs["b_enc_few"])


def _train(inputs: Inputs, x: Tensor, bias: Tensor) -> Task:
    copies = (inputs["W_enc"].clone(), bias.clone(), inputs["W_dec"].clone(), inputs["b_dec"].clone())
    encoder, b_enc, decoder, b_dec = (array.requires_grad_() for array in copies)

    def run() -> Tensor:
        pre = torch.addmm(b_enc, x, encoder)
        values, indices = pre.topk(inputs.k, sorted=False)
        out = torch.addmm(b_dec, torch.zeros_like(pre).scatter(1, indices, values.relu()), decoder)
        (out - x).square().sum(1).mean().backward()
        return out

    def read(out: Tensor) -> Arrays:
        return read_step(out, encoder.grad, b_enc.grad, decoder.grad)  # type: ignore[arg-type]

    return Task(run, read, "gradients", (encoder, b_enc, decoder, b_dec), grad=True)


def attribute_gemm(inputs: Inputs) -> Task:
    """The products of each position, with gradients and decoder rows already side by side as they are needed."""
    positions, latents = inputs.at("spot")
    # As many rows for every position as the fullest has; all have the same number unless few were above zero.
    count = positions.bincount(minlength=inputs["gradients"].shape[1])
    rows = torch.zeros(len(count), int(count.max()), inputs["W_dec"].shape[1])
    place = torch.arange(len(positions)) - (count.cumsum(0) - count)[positions]
    rows[positions, place] = inputs["W_dec"][latents]
    gradients, rows = inputs["gradients"].transpose(0, 1).contiguous(), rows.transpose(1, 2).contiguous()
    return Task(lambda: torch.bmm(gradients, rows), nothing, "scores")


def attribute(inputs: Inputs) -> Task:
    at = inputs.at("spot")
    run = lambda: (inputs["gradients"] @ inputs["W_dec"].T)[:, at[0], at[1]]  # noqa: E731
    return Task(run, lambda out: {"scores": out}, "scores")


def attribute_gathered(inputs: Inputs) -> Task:
    positions, latents = inputs.at("spot")

    def run() -> Tensor:
        return torch.einsum("bnd,nd->bn", inputs["gradients"][:, positions], inputs["W_dec"][latents])

    return Task(run, lambda out: {"scores": out}, "scores")


def statistics(inputs: Inputs) -> Task:
    acts = inputs.dense("acts")

    def run() -> Arrays:
        return {
            "count": (acts > 0).sum(0),
            "sum": acts.sum(0),
            "sum_of_squares": acts.square().sum(0),
            "max": acts.amax(0),
            "top_values": acts.T.topk(min(16, len(acts))).values,
        }

    return Task(run, lambda out: out, "no histogram")


BARE = "bare matrix product"
TASKS = {
    "encode_topk": {BARE: encode_gemm, "": encode_topk},
    "encode_jumprelu": {BARE: encode_gemm, "": encode_jumprelu, "to_sparse_csr": encode_jumprelu_csr},
    "decode": {BARE: decode_gemm, "": decode, "CSR": decode_csr},
    "train": {BARE: encode_gemm, "": train},
    "train_few": {"": train_few},
    "attribute": {BARE: attribute_gemm, "": attribute, "gather, einsum": attribute_gathered},
    "statistics": {"": statistics},
}
