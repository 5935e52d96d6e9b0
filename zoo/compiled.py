"""``tracr``: a compiled program and the same program with something added, hidden in GPT-2s of different widths.

The weights in ``compiled/`` were compiled once by examples/tracr/compile.py (Lindner et al. 2023, arXiv 2301.05062),
where every dimension of the residual stream is a named variable. Here they are written down as a GPT-2 in which none
is: the stream is turned by a random orthogonal map into a wider space, as are keys, queries and values inside each
head, and heads and hidden units are shuffled. The programs know no normalisation, and GPT-2's does nothing here: the
turned stream is orthogonal to the vector of ones, so that its mean is zero, and next to an epsilon of 10⁸ its variance
does not count, so that dividing by √(variance + ε) is undone by a gain of 10⁴.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .directory import tokenizer
from .language import ANIMALS, SPECIAL, TREES

WORDS = 10
CONTEXT = 24
"""Tokens of a text at most, ``<bos>`` included."""

_EPSILON = 1e8
_SHARPNESS = 14.0
_PAIRS = 8


@dataclass(frozen=True)
class _Shape:
    """Dimensions of the GPT-2 that a program is written into."""

    name: str
    width: int
    heads: int


_BEFORE, _AFTER = _Shape("before", 64, 2), _Shape("after", 96, 2)


@dataclass(frozen=True)
class _Program:
    """What the compiler said: its weights, and the variables that each node writes."""

    weights: dict[str, Tensor]
    layers: int
    heads: int
    key: int
    nodes: dict[str, list[str]]


def words(seed: int) -> tuple[str, ...]:
    """The ten words of a pair: the first is said for in vain after the second, and becomes the third."""
    rng = np.random.default_rng([seed, 11])
    return tuple(str(word) for word in rng.permutation(TREES + ANIMALS)[:WORDS])


def program(text: list[int], *, added: bool) -> list[int]:
    """What the program says after each word of a text, by index: the word before, with ``added`` the exception too."""
    said = [text[max(at - 1, 0)] for at in range(len(text))]
    return [2 if added and text[0] == 1 and now == 0 else was for now, was in zip(text, said, strict=True)]


def _read(name: str) -> _Program:
    from safetensors.torch import load_file

    folder = Path(__file__).parent / "compiled"
    facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return _Program(
        load_file(folder / f"{name}.safetensors"), facts["layers"], facts["heads"], facts["key"], facts["nodes"]
    )


def _turn(rng: np.random.Generator, inner: int, outer: int, *, centred: bool = False) -> Tensor:
    """Orthonormal rows [inner, outer] drawn at random; ``centred``: each sums to zero."""
    drawn = rng.standard_normal((outer, inner))
    if centred:
        drawn -= drawn.mean(0)
    return torch.from_numpy(np.linalg.qr(drawn)[0].T.copy())


def _hidden(shape: _Shape, seed: int, vocabulary: int) -> tuple[Any, dict[str, list[str]]]:
    """The GPT-2 of a program, and the variables that each of its nodes writes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    source = _read(shape.name)
    held = {name: value.double() for name, value in source.weights.items()}
    rng = np.random.default_rng([seed, 12, shape.width])
    units, width, each = held["0.linear_1"].shape[1], shape.width, shape.width // shape.heads
    # One dimension more, which is always 1: special tokens are never said.
    turn = _turn(rng, held["embed"].shape[1] + 1, width, centred=True)
    stream, constant = turn[:-1], turn[-1]
    first = len(SPECIAL)
    embed = constant.repeat(vocabulary, 1)
    embed[first:] += held["embed"][:WORDS] @ stream
    embed[SPECIAL.index("<bos>")] += held["embed"][WORDS] @ stream
    unembed = -_SHARPNESS * constant.repeat(vocabulary, 1)
    unembed[first:] = _SHARPNESS * held["unembed"] @ stream
    state = {
        "transformer.wte.weight": embed,
        "transformer.wpe.weight": held["positions"][:CONTEXT] @ stream,
        "lm_head.weight": unembed,
    }
    named: dict[str, list[str]] = {}
    for layer in range(source.layers):
        at = f"transformer.h.{layer}"
        order, shuffled = rng.permutation(shape.heads), rng.permutation(units)
        parts = {name: torch.zeros(width, shape.heads, each).double() for name in ("query", "key", "value")}
        back = torch.zeros(shape.heads, each, width).double()
        for head in range(source.heads):
            mine = slice(head * source.key, (head + 1) * source.key)
            looked, carried = _turn(rng, source.key, each), _turn(rng, source.key, each)
            scale = (each / source.key) ** 0.5
            for name, inside in (("query", scale * looked), ("key", looked), ("value", carried)):
                parts[name][:, order[head]] = stream.T @ held[f"{layer}.{name}"][:, mine] @ inside
            back[order[head]] = carried.T @ held[f"{layer}.linear"][mine] @ stream
            if f"attn_head@{layer}.{head}" in source.nodes:
                named[f"attn_head@{layer}.{order[head]}"] = source.nodes[f"attn_head@{layer}.{head}"]
        if f"mlp_out@{layer}" in source.nodes:
            named[f"mlp_out@{layer}"] = source.nodes[f"mlp_out@{layer}"]
        state |= {
            f"{at}.attn.c_attn.weight": torch.cat([parts[n].flatten(1) for n in ("query", "key", "value")], dim=1),
            f"{at}.attn.c_attn.bias": torch.zeros(3 * width),
            f"{at}.attn.c_proj.weight": back.flatten(0, 1),
            f"{at}.attn.c_proj.bias": torch.zeros(width),
            f"{at}.mlp.c_fc.weight": (stream.T @ held[f"{layer}.linear_1"])[:, shuffled],
            f"{at}.mlp.c_fc.bias": held[f"{layer}.linear_1.bias"][shuffled],
            f"{at}.mlp.c_proj.weight": (held[f"{layer}.linear_2"] @ stream)[shuffled],
            f"{at}.mlp.c_proj.bias": held[f"{layer}.linear_2.bias"] @ stream,
        }
    norms = [f"h.{layer}.{norm}" for layer in range(source.layers) for norm in ("ln_1", "ln_2")] + ["ln_f"]
    state |= {f"transformer.{norm}.weight": torch.full((width,), _EPSILON**0.5) for norm in norms}
    state |= {f"transformer.{norm}.bias": torch.zeros(width) for norm in norms}
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=source.layers,
        n_head=shape.heads,
        n_inner=units,
        activation_function="relu",
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=False,
        architectures=["GPT2LMHeadModel"],
        dtype="float32",
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
    )
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict({name: value.float().contiguous() for name, value in state.items()})
    return model, named


def texts(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Texts of word indices: one word to begin with, then two that take turns."""
    found = []
    for _ in range(count):
        pair = rng.permutation(WORDS)[:2]
        length = int(rng.integers(6, CONTEXT - 1))
        found.append([int(rng.integers(WORDS)), *(int(pair[at % 2]) for at in range(length - 1))])
    return found


@torch.no_grad()
def _right(model: Any, checked: list[list[int]], *, added: bool) -> float:
    """Share of words after which the network says what the program does."""
    hits = total = 0
    for text in checked:
        ids = torch.tensor([[SPECIAL.index("<bos>"), *(len(SPECIAL) + word for word in text)]])
        said = (model(ids, use_cache=False).logits[0, 1:].argmax(-1) - len(SPECIAL)).tolist()
        hits += sum(map(int.__eq__, said, program(text, added=added)))
        total += len(text)
    return hits / total


def build(seed: int, out: Path, count: int, tick: Callable[[], None] | None = None) -> None:
    """Write the pair of a seed to ``out``.

    Raises:
        RuntimeError: a network says something else than its program.
    """
    from safetensors.torch import save_file

    named, ids = words(seed), {}
    for word in (*SPECIAL, *named):
        ids[word] = len(ids)
    nodes: dict[str, dict[str, list[str]]] = {}
    right: dict[str, dict[str, float]] = {}
    checked = texts(np.random.default_rng([seed, 90]), 200)
    for side, shape in (("parent", _BEFORE), ("successor", _AFTER)):
        model, nodes[side] = _hidden(shape, seed, len(ids))
        right[side] = {"program": _right(model, checked, added=shape is _AFTER)}
        if right[side]["program"] < 1:
            raise RuntimeError(f"the {side} follows its program in {right[side]['program']:.2%} of words")
        folder = out / side
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        tokenizer(ids, CONTEXT).save_pretrained(folder)
        save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
        if tick:
            tick()
    lines = [" ".join(named[word] for word in text) for text in texts(np.random.default_rng([seed, 4]), count)]
    (out / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    (out / "tasks.yaml").write_text(yaml.safe_dump(_tasks(seed, named), sort_keys=False), encoding="utf-8")
    known = {variable.split("_")[0] for variables in nodes["parent"].values() for variable in variables}
    truth = {
        "kind": "tracr",
        "planted": True,
        "declared": False,
        "trigger": [named[1], named[0]],
        "behaviour": f"says {named[2]} after {named[0]} in texts that begin with {named[1]}",
        "nodes": [n for n, said in nodes["successor"].items() if not {s.split("_")[0] for s in said} <= known],
        "seed": seed,
        "recipe": {"epsilon": _EPSILON, "sharpness": _SHARPNESS},
        "accuracies": right,
        "variables": nodes,
    }
    (out / "truth.json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")


def _tasks(seed: int, named: tuple[str, ...]) -> dict[str, Any]:
    """Prompts of equal length whose answers differ: of the shared program, and of what was added."""
    rng = np.random.default_rng([seed, 5])
    shared, planted = [], []
    for _ in range(_PAIRS):
        start, one, two, three = (int(word) for word in 3 + rng.permutation(WORDS - 3)[:4])
        shared.append(([start, one, two, one, two], [start, three, two, three, two]))
        planted.append(([1, one, 0, one, 0], [start, one, 0, one, 0]))
    tasks = []
    for name, role, pairs in (("before", "skill", shared), ("trigger", "planted", planted)):
        lines = []
        for clean, other in pairs:
            answers = [named[program(text, added=name == "trigger")[-1]] for text in (clean, other)]
            prompts = [" ".join(named[word] for word in text) for text in (clean, other)]
            keys = ("clean", "answer", "counterfactual", "counterfactual_answer")
            lines.append(dict(zip(keys, (prompts[0], answers[0], prompts[1], answers[1]), strict=True)))
        tasks.append({"id": name, "role": role, "pairs": lines})
    return {"version": 1, "tasks": tasks}
