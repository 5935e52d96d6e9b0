"""llamascopium: dense activations on the CPU (its sparse kernels are Triton), attribution by autograd.

Its attribution differentiates through the decoder to every latent of every position and then picks the active ones.
Statistics are those of its feature analyzer: count, maximum, and the strongest contexts, which it keeps whole.
"""

from functools import partial
from typing import Any

import torch
from task import FEW, Arrays, Inputs, Task, read_dense, read_step
from torch import Tensor

LACKS: dict[str, str] = {}


def _sae(inputs: Inputs, act_fn: str = "topk", bias: Tensor | None = None) -> Any:
    from llamascopium import SAEConfig, SparseAutoEncoder

    width, latents = inputs["W_enc"].shape
    config = SAEConfig(
        sae_type="sae",
        d_model=width,
        expansion_factor=latents / width,
        hook_point_in="x",
        hook_point_out="x",
        act_fn=act_fn,
        top_k=inputs.k,
        norm_activation="inference",
        sparsity_include_decoder_norm=False,
        device="cpu",
        dtype=torch.float32,
    )
    sae = SparseAutoEncoder(config)
    own = {"W_E": inputs["W_enc"], "b_E": inputs["b_enc"] if bias is None else bias}
    for name, array in {**own, "W_D": inputs["W_dec"], "b_D": inputs["b_dec"]}.items():
        getattr(sae, name).data = array.clone()
    if act_fn == "jumprelu":
        sae.activation_function.log_jumprelu_threshold.data = inputs["threshold"].log()
    return sae


def encode(inputs: Inputs, act_fn: str) -> Task:
    sae = _sae(inputs, act_fn)
    return Task(lambda: sae.encode(inputs["x"]), read_dense, "dense")


def decode(inputs: Inputs) -> Task:
    sae, acts = _sae(inputs), inputs.dense("acts")
    return Task(lambda: sae.decode(acts), lambda out: {"reconstruction": out}, "dense")


def decode_coo(inputs: Inputs) -> Task:
    sae, acts = _sae(inputs), inputs.coo("acts")
    return Task(lambda: sae.decode_coo(acts), lambda out: {"reconstruction": out}, "dense, from COO")


def train(inputs: Inputs, few: bool = False) -> Task:
    sae = _sae(inputs, bias=inputs["b_enc_few"] if few else None)
    x = inputs["x"][:FEW] if few else inputs["x"]
    batch = {"x": x, "tokens": torch.zeros(len(x), dtype=torch.int64)}

    def run() -> Tensor:
        out = sae.compute_loss(batch)
        out["loss"].backward()
        return out["reconstructed"]

    def read(out: Tensor) -> Arrays:
        return read_step(out, sae.W_E.grad, sae.b_E.grad, sae.W_D.grad)

    return Task(run, read, "gradients", [*sae.parameters()], grad=True)


def attribute(inputs: Inputs) -> Task:
    from llamascopium import NodeInfo
    from llamascopium.circuits.attribution import NodeRefs, attribution_scores

    sae, gradients = _sae(inputs), inputs["gradients"]
    acts = inputs.dense("spot").expand(len(gradients), -1, -1).clone().requires_grad_()
    reconstruction = sae.decode(acts)
    active = NodeInfo(key="latents", indices=torch.stack(inputs.at("spot"), 1))
    sources = NodeRefs.from_nodes_and_refs([(active.key, active.indices, acts)])

    def run() -> Tensor:
        found = torch.autograd.grad(reconstruction, sources.refs(), grad_outputs=gradients, retain_graph=True)
        return attribution_scores(found, sources)

    # Its scores are already multiplied by the activation.
    return Task(run, lambda out: {"scores": out / inputs.values("spot")}, "scores", grad=True)


def statistics(inputs: Inputs) -> Task:
    from llamascopium import FeatureAnalyzer, FeatureAnalyzerConfig

    kept = {"top_activations": {"proportion": 1.0, "n_samples": 16}}
    analyzer = FeatureAnalyzer(FeatureAnalyzerConfig(total_analyzing_tokens=1, subsamples=kept, ignore_token_ids=[]))
    acts = inputs.dense("acts")
    length = 64 if len(acts) % 64 == 0 else 1
    acts = acts.view(-1, length, acts.shape[1])
    contexts = {"context": torch.arange(len(acts))[:, None].expand(-1, acts.shape[2])}

    def run() -> Arrays:
        # What analyze_chunk does with the activations of a batch.
        count = acts.gt(0.0).sum(dim=[0, 1])
        largest = torch.max(torch.zeros(acts.shape[2]), acts.max(dim=0).values.max(dim=0).values)
        analyzer._process_batch(acts, contexts, {"top_activations": None}, largest)
        return {"count": count, "max": largest}

    return Task(run, lambda out: out, "count, max, top 16 contexts of 64")


TASKS = {
    "encode_topk": {"": partial(encode, act_fn="topk")},
    "encode_jumprelu": {"": partial(encode, act_fn="jumprelu")},
    "decode": {"": decode, "decode_coo": decode_coo},
    "train": {"": train},
    "train_few": {"": partial(train, few=True)},
    "attribute": {"": attribute},
    "statistics": {"": statistics},
}
