"""Programs compiled by tracr (Lindner et al. 2301.05062), as weights of our small transformer.

    pip install tracr-pypi safetensors     # in an environment of its own: it brings jax
    python benchmarks/beds/tracr_export.py

Writes ``tracr-NAME.safetensors`` beside this file; the header holds the shape, the vocabulary, and outputs that tracr's
own forward gave for some prompts, to check the export by.
"""

import json
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

BOS, LENGTH = "BOS", 5


def programs() -> dict[str, tuple[rasp.SOp, set[str]]]:
    is_x = rasp.numerical(rasp.tokens == "x").named("is_x")
    return {
        "reverse": (lib.make_reverse(rasp.tokens), {"a", "b", "c", "d"}),
        "xproportion": (lib.make_frac_prevs(is_x), {"w", "x", "y", "z"}),
        "histogram": (lib.make_hist(), {"a", "b", "c", "d"}),
        "balance": (lib.make_pair_balance(rasp.tokens, "(", ")"), {"(", ")", "a"}),
        "sort": (lib.make_sort_unique(rasp.tokens, rasp.tokens), {1, 2, 3, 4, 5, 6, 7}),
    }


def export(name: str, program: rasp.SOp, vocab: set) -> None:
    model = compiling.compile_rasp_to_model(program, vocab, LENGTH, compiler_bos=BOS)
    config, params = model.model_config, model.params
    width, heads, d_head = len(model.residual_labels), config.num_heads, config.key_size

    @hk.without_apply_rng
    @hk.transform
    def read_out(x: jax.Array) -> jax.Array:
        return model.get_compiled_model().unembed(x, use_unembed_argmax=False)

    unembed = np.asarray(read_out.apply({}, jnp.eye(width)[None]))[0].reshape(width, -1)
    token, position = (np.asarray(params[f"{kind}_embed"]["embeddings"]) for kind in ("token", "pos"))
    tensors = {
        "embed.original_component.weight": token,
        "position": position,
        "unembed.weight": unembed.T,
        "unembed.bias": np.zeros(unembed.shape[1]),
    }
    for layer in range(config.num_layers):
        theirs, ours = f"transformer/layer_{layer}/", f"blocks.{layer}."
        names = {
            "attn/query": "attn.q", "attn/key": "attn.k", "attn/value": "attn.v", "attn/linear": "attn.o",
            "mlp/linear_1": "mlp.in", "mlp/linear_2": "mlp.out",
        }  # fmt: skip
        for a, b in names.items():
            tensors[f"{ours}{b}.original_component.weight"] = np.asarray(params[theirs + a]["w"]).T
            tensors[f"{ours}{b}.original_component.bias"] = np.asarray(params[theirs + a]["b"])
    mapping = {str(value): int(i) for value, i in model.input_encoder.encoding_map.items()}
    rng = np.random.default_rng(0)
    prompts = [[BOS, *draw(name, sorted(vocab, key=str), rng)] for _ in range(8)]
    ids = np.array([model.input_encoder.encode(prompt) for prompt in prompts])
    expected = np.concatenate(
        [np.asarray(model.forward(params, jnp.array([row])).transformer_output.output) for row in ids]
    )
    shape = {
        "n_layers": config.num_layers, "n_heads": heads, "d_model": width, "d_head": d_head,
        "d_mlp": config.mlp_hidden_size, "d_vocab": len(token), "d_out": unembed.shape[1], "n_ctx": len(position),
        "causal": False,
    }  # fmt: skip
    about = {
        "vocabulary": mapping,
        "residual": model.residual_labels,
        "prompts": ids.tolist(),
        "logits": (expected @ unembed).round(5).tolist(),
    }
    path = Path(__file__).parent / f"tracr-{name}.safetensors"
    tensors = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()}
    save_file(tensors, path, {"config": json.dumps(shape), "about": json.dumps(about)})
    print(name, shape, f"{path.stat().st_size} bytes")


def draw(name: str, vocab: list, rng: np.random.Generator) -> list:
    """A prompt; ``sort`` wants no value twice."""
    return list(rng.permutation(vocab)[:LENGTH] if name == "sort" else rng.choice(vocab, LENGTH))


def main() -> None:
    for name, (program, vocab) in programs().items():
        export(name, program, vocab)


if __name__ == "__main__":
    main()
