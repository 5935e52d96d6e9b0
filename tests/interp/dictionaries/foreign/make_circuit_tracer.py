"""Small circuit-tracer transcoders, saved by circuit-tracer, with the features and reconstructions it computes.

Run in an environment with circuit-tracer: ``python make_circuit_tracer.py``. Writes ``circuit_tracer/``. The fixtures
hold a value per layer: x, features and output are [layers, tokens, …].
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet, load_transcoder_set
from safetensors.torch import save_file

HERE = Path(__file__).parent / "circuit_tracer"
D, F, T, LAYERS = 12, 32, 12, 2
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
CPU = torch.device("cpu")


def random(module, g):
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * (0.4 if "W_" in name else 0.3)
        if "threshold" in name:
            parameter.data = parameter.data.abs() + 0.2


def keep(case, x, features, output):
    tensors = {"x": x, "features": features, "output": output}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, HERE / f"{case}.safetensors")


def config(case, **fields):
    (HERE / case).mkdir(parents=True, exist_ok=True)
    (HERE / case / "config.yaml").write_text(
        yaml.safe_dump({"model_name": "tiny/llama", "scan": "tiny", **HOOKS, **fields})
    )


def inputs(g):
    return torch.randn(LAYERS, T, D, generator=g) * 2 + torch.randn(D, generator=g)


@torch.no_grad()
def per_layer(case, seed, rule, skip=False, **fields):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i in range(LAYERS):
        made[i] = SingleLayerTranscoder(D, F, rule(), i, skip_connection=skip, device=CPU, dtype=torch.float32)
        random(made[i], g)
    whole = TranscoderSet(made, **HOOKS)
    config(case, model_kind="transcoder_set", **fields)
    whole.to_safetensors(str(HERE / case))
    if fields.get("activation") != "topk":  # which this version computes but does not load
        paths = {i: str(HERE / case / f"layer_{i}.safetensors") for i in range(LAYERS)}
        whole = load_transcoder_set(paths, "tiny", **HOOKS, device=CPU)
    x = inputs(g)
    features = whole.encode(x)
    keep(case, x, features, whole.decode(features, x))


@torch.no_grad()
def cross_layer(case, seed, rule, **fields):
    g = torch.Generator().manual_seed(seed)
    made = CrossLayerTranscoder(LAYERS, F, D, rule, lazy_decoder=False, device=CPU, dtype=torch.float32, **HOOKS)
    random(made, g)
    config(case, model_kind="cross_layer_transcoder", **fields)
    made.to_safetensors(str(HERE / case))
    made = load_clt(str(HERE / case), **HOOKS, device=CPU, dtype=torch.float32)
    x = inputs(g)
    features = made.encode(x)
    keep(case, x, features, made.decode(features.to_sparse()))


@torch.no_grad()
def gemma_scope(case, seed, second):
    """Files of Gemma Scope, named by the configuration; the first kind as version 0.1 wrote it."""
    rng = np.random.default_rng(seed)
    place = HERE / case / "google" / "gemma-scope-transcoders"
    place.mkdir(parents=True)
    paths = {}
    for i in range(LAYERS):
        shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        arrays = {k: (rng.standard_normal(s) * 0.4).astype(np.float32) for k, s in shapes.items()}
        arrays["threshold"] = np.abs(arrays["threshold"])
        if second:
            arrays["affine_skip_connection"] = (rng.standard_normal((D, D)) * 0.4).astype(np.float32)
            paths[i] = place / f"layer_{i}.safetensors"
            save_file({k.lower(): torch.from_numpy(v) for k, v in arrays.items()}, paths[i])
        else:
            paths[i] = place / f"layer_{i}.npz"
            np.savez(paths[i], **arrays)
    uris = [f"hf://google/gemma-scope-transcoders/{paths[i].name}?revision=main" for i in range(LAYERS)]
    if second:
        config(case, model_kind="transcoder_set", model_name="google/gemma-3-1b-pt", transcoders=uris)
    else:
        listed = [{"id": f"layer {i}", "layer": i, "filepath": uri} for i, uri in enumerate(uris)]
        config(case, model_name="google/gemma-2-2b", feature_input_hook="ln2.hook_normalized",
               feature_output_hook="hook_mlp_out", transcoders=listed[::-1])  # fmt: skip
    whole = load_transcoder_set(
        {i: str(path) for i, path in paths.items()}, "tiny", **HOOKS, device=CPU,
        special_load_fn="gemma-scope-2" if second else "gemma-scope", lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    x = inputs(torch.Generator().manual_seed(seed))
    features = whole.encode(x)
    keep(case, x, features, whole.decode(features, x))


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    per_layer("plt_relu", 1, lambda: torch.nn.functional.relu, activation="relu")
    per_layer("plt_jumprelu_skip", 2, lambda: JumpReLU(torch.zeros(F)), skip=True)
    per_layer("plt_topk", 3, lambda: TopK(4), activation="topk", k=4)
    cross_layer("clt_relu", 4, "relu", activation="relu")
    cross_layer("clt_jumprelu", 5, "jump_relu")
    gemma_scope("gemma_scope", 6, second=False)
    gemma_scope("gemma_scope_2", 7, second=True)


if __name__ == "__main__":
    main()
