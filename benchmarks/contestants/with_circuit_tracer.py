"""circuit-tracer: transcoders at inference, and the step of its attribution that meets the active latents."""

from types import SimpleNamespace
from typing import Any

import torch
from task import Arrays, Inputs, Task, read_dense
from torch import Tensor

LACKS = {
    "train": "inference only",
    "train_few": "inference only",
    "statistics": "none",
}


def _transcoder(inputs: Inputs, activation: Any) -> Any:
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    width, latents = inputs["W_enc"].shape
    out = SingleLayerTranscoder(width, latents, activation, 0, device=torch.device("cpu"), dtype=torch.float32)
    out.W_enc.data, out.b_enc.data = inputs["W_enc"].T.contiguous(), inputs["b_enc"].clone()
    out.W_dec.data, out.b_dec.data = inputs["W_dec"].clone(), inputs["b_dec"].clone()
    return out


def _topk(inputs: Inputs) -> Any:
    from circuit_tracer.transcoder.activation_functions import TopK

    return _transcoder(inputs, TopK(inputs.k))


def _encode(inputs: Inputs, transcoder: Any) -> Task:
    # It drops the first position (a beginning-of-text token) unless told not to.
    def run() -> Any:
        return transcoder.encode_sparse(inputs["x"], zero_positions=slice(0, 0))

    def read(out: Any) -> Arrays:
        return read_dense(out[0].to_dense())

    return Task(run, read, "COO, encoder rows")


def encode_topk(inputs: Inputs) -> Task:
    return _encode(inputs, _topk(inputs))


def encode_jumprelu(inputs: Inputs) -> Task:
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    return _encode(inputs, _transcoder(inputs, JumpReLU(inputs["threshold"].clone())))


def decode(inputs: Inputs) -> Task:
    transcoder, acts = _topk(inputs), inputs.coo("acts")
    return Task(lambda: transcoder.decode_sparse(acts), lambda out: {"reconstruction": out[0]}, "dense, decoder rows")


def attribute(inputs: Inputs) -> Task:
    from circuit_tracer.attribution.context_transformerlens import AttributionContext

    positions, latents = inputs.at("spot")
    # Decoder rows are gathered once for a prompt, so outside of what is timed; its buffer once for a batch.
    owner = _Buffer()
    _, hook = AttributionContext._compute_score_hook(
        owner,  # type: ignore[arg-type]
        "",
        inputs["W_dec"][latents],
        write_index=torch.arange(len(latents)),  # type: ignore[arg-type]
        read_index=(slice(None), positions),  # type: ignore[arg-type]
    )

    def run() -> Tensor:
        owner._batch_buffer = torch.zeros(len(latents), len(inputs["gradients"]))
        hook(inputs["gradients"], None)  # type: ignore[arg-type]
        return owner._batch_buffer.T

    return Task(run, lambda out: {"scores": out}, "scores")


class _Buffer(SimpleNamespace):
    """Stands for the context, of which its hook needs the buffer only."""

    _batch_buffer: Tensor


TASKS = {
    "encode_topk": {"": encode_topk},
    "encode_jumprelu": {"": encode_jumprelu},
    "decode": {"": decode},
    "attribute": {"": attribute},
}
