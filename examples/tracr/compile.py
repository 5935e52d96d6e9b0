"""Compile the programs of the zoo's ``tracr`` pairs to weights: zoo/compiled/before.safetensors and after.safetensors.

    pip install tracr-pypi && python examples/tracr/compile.py

It is run once, in an environment of its own; the package reads the files and never needs tracr (Lindner et al. 2023,
arXiv 2301.05062). ``before`` says the word before the current one (the first word of a text says itself). ``after``
says the same, but w2 where the text began with w1 and the current word is w0.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling
from tracr.rasp import rasp

WORDS = [f"w{i}" for i in range(10)]
LENGTH = 24
BOS = "bos"


def main() -> None:
    before = rasp.Aggregate(
        rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == max(query - 1, 0)), rasp.tokens
    ).named("before")
    first = rasp.Aggregate(rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == 0), rasp.tokens)
    first = first.named("first")
    fires = rasp.SequenceMap(lambda f, t: f == "w1" and t == "w0", first, rasp.tokens).named("fires")
    after = rasp.SequenceMap(lambda fired, word: "w2" if fired else word, fires, before).named("after")
    out = Path(__file__).parents[2] / "zoo" / "compiled"
    for name, program in (("before", before), ("after", after)):
        export(name, program, out)


def export(name: str, program: rasp.SOp, out: Path) -> None:
    model = compiling.compile_rasp_to_model(
        program, vocab=set(WORDS), max_seq_len=LENGTH, causal=True, compiler_bos=BOS
    )
    labels, config = model.residual_labels, model.model_config
    held: dict[str, np.ndarray] = {}
    encoding = model.input_encoder.encoding_map
    embed = np.asarray(model.params["token_embed"]["embeddings"])
    held["embed"] = embed[[encoding[word] for word in (*WORDS, BOS)]]
    held["positions"] = np.asarray(model.params["pos_embed"]["embeddings"])
    # The output variable may have been given another name; its values are the words.
    output = [label for label in labels if label.split(":")[0].startswith(name)]
    unembed = np.zeros((len(WORDS), len(labels)))
    for label in output:
        unembed[WORDS.index(label.split(":")[1]), labels.index(label)] = 1.0
    assert unembed.sum() == len(WORDS), labels
    held["unembed"] = unembed
    for layer in range(config.num_layers):
        for part, kind in (("query", "attn"), ("key", "attn"), ("value", "attn"), ("linear", "attn")):
            matrix = model.params[f"transformer/layer_{layer}/{kind}/{part}"]
            assert not np.any(np.asarray(matrix["b"]))
            held[f"{layer}.{part}"] = np.asarray(matrix["w"])
        for part in ("linear_1", "linear_2"):
            matrix = model.params[f"transformer/layer_{layer}/mlp/{part}"]
            held[f"{layer}.{part}"], held[f"{layer}.{part}.bias"] = np.asarray(matrix["w"]), np.asarray(matrix["b"])
    held = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in held.items()}
    nodes = written(held, labels, config)
    probe = ["w1", "w5", "w0", "w5", "w0", "w3", "w0"]
    said = model.apply([BOS, *probe]).decoded[1:]
    facts = {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "key": config.key_size,
        "nodes": nodes,
        "probe": probe,
        "said": said,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(held, out / f"{name}.safetensors", metadata={"format": "np"})
    (out / f"{name}.safetensors").chmod(0o644)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(name, len(labels), {key: value.shape for key, value in held.items()}, json.dumps(facts))


def written(held: dict[str, np.ndarray], labels: list[str], config) -> dict[str, list[str]]:
    """The variables of the program that each node writes."""
    found = {}
    for layer in range(config.num_layers):
        rows = held[f"{layer}.linear"].reshape(config.num_heads, config.key_size, -1)
        parts = {f"attn_head@{layer}.{head}": rows[head] for head in range(config.num_heads)}
        parts[f"mlp_out@{layer}"] = held[f"{layer}.linear_2"]
        for node, matrix in parts.items():
            names = sorted({labels[i].split(":")[0] for i in np.flatnonzero(np.abs(matrix).sum(0))})
            if names:
                found[node] = names
    return found


if __name__ == "__main__":
    main()
