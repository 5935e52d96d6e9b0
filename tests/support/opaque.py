"""What tests of opacity in a tiny transformer share: random dictionaries and units, pairs of prompts, a metric."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heredity.circuits.opacity_estimate import Opacity, Refused
from heredity.circuits.opacity_parts import DictionaryPart, HeadsPart, NeuronsPart, Part, dictionary_parts
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.model import Encoded, Model
from heredity.kernels import JumpReLU, ReLU, TopK

WIDTH, LAYERS, LATENTS = 32, 3, 48


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary(kind: Any, reads: list[Port], writes: list[Port], seed: int, **fields: Any) -> Dictionary:
    return Dictionary(
        kind,
        tuple(reads),
        tuple(writes),
        tuple(drawn(seed + i, WIDTH, LATENTS) / WIDTH**0.5 for i in range(len(reads))),
        0.2 * drawn(seed + 5, LATENTS),
        tuple(0.3 * drawn(seed + 10 + i, LATENTS, WIDTH) for i in range(len(writes))),
        tuple(0.1 * drawn(seed + 20 + i, WIDTH) for i in range(len(writes))),
        **{"activation": ReLU(), **fields},
    )


def some_q(seed: int, n: int = LATENTS) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def transcoders(**fields: Any) -> list[Part]:
    sets = [
        dictionary("transcoder", [Port(f"mlp_in@{i}")], [Port(f"mlp_out@{i}")], 100 * i, **fields)
        for i in range(LAYERS)
    ]
    return [*dictionary_parts(DictionarySet(tuple(sets)), [some_q(i) for i in range(LAYERS)])]


def cross_layer() -> list[Part]:
    sets = []
    for i in range(LAYERS):
        writes = [Port(f"mlp_out@{j}") for j in range(i, LAYERS)]
        sets.append(dictionary("cross_layer_transcoder", [Port(f"mlp_in@{i}")], writes, 100 * i))
    return [DictionaryPart(each, some_q(i)) for i, each in enumerate(sets)]


def sae(site: str, **fields: Any) -> Part:
    return DictionaryPart(dictionary("sae", [Port(site)], [Port(site)], 7, **fields), some_q(7))


def identity(site: str, q: float = 1.0) -> DictionaryPart:
    """An SAE without error: each direction and its opposite."""
    eye = torch.eye(WIDTH)
    d = Dictionary(
        "sae", (Port(site),), (Port(site),), (torch.cat([eye, -eye], 1),), torch.zeros(2 * WIDTH),
        (torch.cat([eye, -eye]),), (torch.zeros(WIDTH),), ReLU(),
    )  # fmt: skip
    return DictionaryPart(d, torch.full((2 * WIDTH,), q))


def heads(layer: int, along: bool) -> HeadsPart:
    directions = torch.nn.functional.normalize(drawn(layer, 4, WIDTH), dim=1) if along else None
    return HeadsPart(layer, some_q(layer, 4), torch.full((4,), 0.05), directions, 0.1 * drawn(3, 4, WIDTH))


KINDS: dict[str, Callable[[], list[Part]]] = {
    "transcoders": transcoders,
    "skip": lambda: transcoders(W_skip=0.2 * drawn(9, WIDTH, WIDTH)),
    "top-k": lambda: transcoders(activation=TopK(5)),
    "cross-layer": cross_layer,
    "sae of the stream": lambda: [sae("resid_post@1", activation=JumpReLU(0.3))],
    "layer norm": lambda: [sae("mlp_out@1", scaling="layer_norm")],
    "unit norm": lambda: [sae("resid_mid@1", scaling="unit_norm")],
    "heads": lambda: [heads(0, True), heads(1, True), heads(2, False)],
    "neurons": lambda: [NeuronsPart(i, some_q(i, 64), torch.full((64,), 0.1)) for i in range(LAYERS)],
    "all together": lambda: [*transcoders(), heads(0, False), heads(1, True), sae("resid_post@2")],
}


def random_pairs(draw: Callable[..., Tensor]) -> Pairs:
    """Forty pairs of six tokens that differ in two."""
    clean = draw(40, 6, 1)
    corrupt = clean.clone()
    corrupt[:, 2] = draw(40, 1, 2)[:, 0]
    corrupt[:, 4] = draw(40, 1, 3)[:, 0]
    return Pairs(clean, corrupt, torch.full((40,), 5))


def largest_change(model: Model, pairs: Pairs) -> LogitDifference:
    """The two tokens whose logits the pair changes most, so that there is an effect."""
    with torch.no_grad():
        change = (model.logits(pairs.clean) - model.logits(pairs.corrupt))[:, -1]
    return LogitDifference(pairs.last, change.argmax(-1)[:, None].tolist(), change.argmin(-1)[:, None].tolist())


def random_texts(model: Model, draw: Callable[..., Tensor]) -> tuple[Encoded, ...]:
    """Sixty texts of twenty tokens."""
    rows = [model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in draw(60, 20, 5)]
    return tuple(model.encode(" ".join(row)) for row in rows)


def measured(found: Opacity | Refused) -> Opacity:
    assert isinstance(found, Opacity), found
    return found
