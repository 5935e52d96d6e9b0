"""sae-lens: dense activations, or a sparse COO tensor where its training class is told ``use_sparse_activations``."""

from functools import partial
from typing import Any

from task import FEW, Arrays, Inputs, Task, read_dense, read_step
from torch import Tensor

LACKS = {
    "attribute": "no attribution",
    "statistics": "only counts of firing, inside its trainer",
}


def _with_weights(sae: Any, inputs: Inputs, bias: Tensor | None = None) -> Any:
    own = {"W_enc": inputs["W_enc"], "b_enc": inputs["b_enc"] if bias is None else bias}
    own |= {"W_dec": inputs["W_dec"], "b_dec": inputs["b_dec"]}
    for name, array in own.items():
        getattr(sae, name).data = array.clone()
    return sae


def _sizes(inputs: Inputs) -> dict[str, Any]:
    d_in, d_sae = inputs["W_enc"].shape
    return {"d_in": d_in, "d_sae": d_sae, "device": "cpu", "dtype": "float32", "apply_b_dec_to_input": False}


def _topk(inputs: Inputs) -> Any:
    from sae_lens import TopKSAE, TopKSAEConfig

    return _with_weights(TopKSAE(TopKSAEConfig(**_sizes(inputs), k=inputs.k)), inputs)


def _training(inputs: Inputs, sparse: bool, bias: Tensor | None = None) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    options = {"k": inputs.k, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
    return _with_weights(TopKTrainingSAE(TopKTrainingSAEConfig(**_sizes(inputs), **options)), inputs, bias)


def encode_topk(inputs: Inputs) -> Task:
    sae = _topk(inputs)
    return Task(lambda: sae.encode(inputs["x"]), read_dense, "dense")


def encode_topk_sparse(inputs: Inputs) -> Task:
    sae = _training(inputs, True)
    return Task(lambda: sae.encode(inputs["x"]), lambda out: read_dense(out.to_dense()), "COO")


def encode_jumprelu(inputs: Inputs) -> Task:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = _with_weights(JumpReLUSAE(JumpReLUSAEConfig(**_sizes(inputs))), inputs)
    sae.threshold.data = inputs["threshold"].clone()
    return Task(lambda: sae.encode(inputs["x"]), read_dense, "dense")


def decode(inputs: Inputs) -> Task:
    sae, acts = _topk(inputs), inputs.dense("acts")
    return Task(lambda: sae.decode(acts), lambda out: {"reconstruction": out}, "dense")


def decode_sparse(inputs: Inputs) -> Task:
    sae, acts = _training(inputs, True), inputs.coo("acts")
    return Task(lambda: sae.decode(acts), lambda out: {"reconstruction": out}, "dense, from COO")


def train(inputs: Inputs, sparse: bool, few: bool = False) -> Task:
    from sae_lens.saes.sae import TrainStepInput

    sae = _training(inputs, sparse, inputs["b_enc_few"] if few else None)
    x = inputs["x"][:FEW] if few else inputs["x"]
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)

    def run() -> Tensor:
        out = sae.training_forward_pass(step)
        out.loss.backward()
        return out.sae_out

    def read(out: Tensor) -> Arrays:
        return read_step(out, sae.W_enc.grad, sae.b_enc.grad, sae.W_dec.grad)

    return Task(run, read, "gradients", [*sae.parameters()], grad=True)


SPARSE = "use_sparse_activations"
TASKS = {
    "encode_topk": {"": encode_topk, SPARSE: encode_topk_sparse},
    "encode_jumprelu": {"": encode_jumprelu},
    "decode": {"": decode, SPARSE: decode_sparse},
    "train": {"": partial(train, sparse=False), SPARSE: partial(train, sparse=True)},
    "train_few": {"": partial(train, sparse=False, few=True), SPARSE: partial(train, sparse=True, few=True)},
}
