"""dictionary-learning: dense activations throughout."""

from functools import partial
from typing import Any

from task import FEW, Arrays, Inputs, Task, read_dense, read_step, unshifted
from torch import Tensor

LACKS = {
    "attribute": "no attribution (feature-circuits is a repository of its own)",
    "statistics": "only counts of firing, inside its trainer",
}

LATE = 2000
"""A step at which its trainer does everything it ever does."""


def _with_weights(trainer: Any, inputs: Inputs, bias: Tensor) -> Any:
    ae = trainer.ae
    ae.encoder.weight.data, ae.encoder.bias.data = inputs["W_enc"].T.contiguous(), bias.clone()
    # An nn.Linear from latents to activations.
    ae.decoder.weight.data, ae.b_dec.data = inputs["W_dec"].T.contiguous(), inputs["b_dec"].clone()
    return trainer


def _topk(inputs: Inputs, bias: Tensor) -> Any:
    from dictionary_learning.trainers.top_k import TopKTrainer

    width, latents = inputs["W_enc"].shape
    trainer = TopKTrainer(2 * LATE, width, latents, inputs.k, layer=0, lm_name="none", device="cpu")
    return _with_weights(trainer, inputs, bias)


def encode_topk(inputs: Inputs) -> Task:
    ae = _topk(inputs, inputs.shifted).ae
    return Task(lambda: ae.encode(inputs["x"]), read_dense, "dense")


def encode_jumprelu(inputs: Inputs) -> Task:
    from dictionary_learning import JumpReluAutoEncoder

    ae = JumpReluAutoEncoder(*inputs["W_enc"].shape)
    own = {"W_enc": inputs["W_enc"], "b_enc": inputs["b_enc"], "threshold": inputs["threshold"]}
    for name, array in own.items():
        getattr(ae, name).data = array.clone()
    return Task(lambda: ae.encode(inputs["x"]), read_dense, "dense")


def decode(inputs: Inputs) -> Task:
    ae, acts = _topk(inputs, inputs.shifted).ae, inputs.dense("acts")
    return Task(lambda: ae.decode(acts), lambda out: {"reconstruction": out}, "dense")


def train(inputs: Inputs, few: bool = False) -> Task:
    x = inputs["x"][:FEW] if few else inputs["x"]
    trainer = _topk(inputs, inputs.shifted + (inputs["b_enc_few"] - inputs["b_enc"] if few else 0))
    ae = trainer.ae

    def run() -> Tensor:
        trainer.loss(x, step=LATE).backward()
        return x

    def read(out: Tensor) -> Arrays:
        weight, bias = ae.encoder.weight.grad.T, ae.encoder.bias.grad
        gradients = read_step(out, unshifted(weight, bias, inputs["b_dec"]), bias, ae.decoder.weight.grad.T)
        # Its loss keeps the reconstruction to itself.
        return {name: array for name, array in gradients.items() if name != "reconstruction"}

    return Task(run, read, "gradients", [*ae.parameters()], grad=True)


TASKS = {
    "encode_topk": {"": encode_topk},
    "encode_jumprelu": {"": encode_jumprelu},
    "decode": {"": decode},
    "train": {"": train},
    "train_few": {"": partial(train, few=True)},
}
