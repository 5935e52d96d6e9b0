"""Shares by depth: where the change is known, and against models whose weights are of one below, of the other above."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits.depth import by_depth, stretches
from heredity.interp.model import Model

Pair = tuple[Model, Model]
FAMILIES = ("llama", "gpt2", "neox", "gemma2", "olmo2", "bloom")


def windows(model: Model) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = ((9, 4, 7), (12, 3))
    return [[torch.randint(2, 140, (n,), generator=generator).tolist() for n in group] for group in lengths]


def shares(parent: Model, successor: Model) -> dict[str, float]:
    found = by_depth(parent, successor, windows(parent), seed=0)
    assert found is not None
    return {name: share.estimate for name, share in found}


def weights(model: Model) -> dict[str, Tensor]:
    return dict(model.bridge.original_model.named_parameters())


def depth_of(name: str) -> int:
    """-1 the embedding, else the layer; the last norm and the unembedding come after all layers."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1 if "embed_tokens" in name else 99


@pytest.mark.parametrize("changed", ["embed", "layer 0", "layer 1", "layer 2", "unembed"])
def test_all_of_it_lies_in_the_part_that_alone_was_changed(parent: Model, twin: Model, changed: str) -> None:
    depth = {"embed": -1, "unembed": 99}.get(changed) if " " not in changed else int(changed[-1])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in weights(twin).items():
            if depth_of(name) == depth:
                value += 0.2 * value.square().mean().sqrt() * torch.randn(value.shape, generator=generator)
    found = shares(parent, twin)
    assert list(found) == ["embed", "layer 0", "layer 1", "layer 2", "unembed"]
    assert found.pop(changed) == pytest.approx(1, abs=1e-5)
    assert all(abs(share) < 1e-5 for share in found.values())


def test_shares_are_those_of_models_with_weights_of_both(parent: Model, successor: Model, twin: Model) -> None:
    def log_probs(of: Callable[[int], Model], ids: list[int]) -> Tensor:
        with torch.no_grad():
            for name, value in weights(twin).items():
                value.copy_(weights(of(depth_of(name)))[name])
            bare: Any = twin.bridge.original_model
            return bare(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    below, above = np.zeros(6), np.zeros(6)
    for ids in (ids for group in windows(parent) for ids in group):
        log_s = log_probs(lambda _: successor, ids)
        for k, cut in enumerate((-2, -1, 0, 1, 2, 99)):
            mixed = log_probs(lambda depth, cut=cut: parent if depth <= cut else successor, ids)
            below[k] += float((log_s.exp() * (log_s - mixed)).sum())
            mixed = log_probs(lambda depth, cut=cut: successor if depth <= cut else parent, ids)
            above[k] += float((log_s.exp() * (log_s - mixed)).sum())
    expected = [(b - a + c - d) / 2 / below[-1] for a, b, c, d in zip(below, below[1:], above, above[1:], strict=False)]
    found = shares(parent, successor)
    assert list(found.values()) == pytest.approx(expected, abs=1e-4)
    assert min(abs(share) for share in found.values()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_add_up_and_carry_intervals(family: str, pair_of: Callable[[str], Pair]) -> None:
    parent, successor = pair_of(family)
    found = by_depth(parent, successor, windows(parent), seed=0)
    assert found is not None
    assert sum(share.estimate for _, share in found) == pytest.approx(1, abs=1e-6)
    assert all(share.low <= share.estimate <= share.high for _, share in found)
    assert any(share.high - share.low > 0.01 for _, share in found)


def test_models_that_say_the_same_have_no_shares(parent: Model, twin: Model) -> None:
    assert by_depth(parent, twin, windows(parent), seed=0) is None


@pytest.mark.parametrize(("most", "expected"), [(8, [(0, 0), (1, 1), (2, 2)]), (2, [(0, 1), (2, 2)]), (1, [(0, 2)])])
def test_stretches_hold_every_layer_once(parent: Model, most: int, expected: list[tuple[int, int]]) -> None:
    assert [(part[0], part[-1]) for part in stretches(parent, most)] == expected
