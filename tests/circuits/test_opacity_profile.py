"""Where and why a tiny transformer is opaque: first passage by site, and reasons that add up."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from opaque import (
    KINDS,
    LAYERS,
    WIDTH,
    heads,
    identity,
    largest_change,
    measured,
    random_pairs,
    random_texts,
    transcoders,
)
from torch import Tensor

from heredity.circuits.opacity import (
    contrast_of_pairs,
    opacity,
)
from heredity.circuits.opacity_estimate import Refused
from heredity.circuits.opacity_parts import DictionaryPart, World
from heredity.circuits.opacity_profile import opacity_profile
from heredity.circuits.opacity_reasons import linear_errors, reasons_of
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.interp.model import Encoded, Model


@pytest.fixture(scope="module")
def pairs(draw: Callable[..., Tensor]) -> Pairs:
    return random_pairs(draw)


@pytest.fixture(scope="module")
def metric(parent: Model, pairs: Pairs) -> LogitDifference:
    return largest_change(parent, pairs)


@pytest.fixture(scope="module")
def texts(parent: Model, draw: Callable[..., Tensor]) -> tuple[Encoded, ...]:
    return random_texts(parent, draw)


@pytest.mark.parametrize("routing", [False, True])
def test_profile_adds_up(parent: Model, pairs: Pairs, metric: LogitDifference, routing: bool) -> None:
    split = whole_model(parent, [*transcoders(), heads(1, True)])
    found = opacity_profile(parent, pairs, metric, split, routing=routing)
    assert not isinstance(found, Refused)
    assert found.completeness < 0.02
    total = found.explained.estimate + sum(each.estimate for each in found.reasons.values())
    assert total == pytest.approx(1, abs=found.completeness + 1e-3)
    assert found.up_to(-1) == 0
    assert found.up_to(2) == pytest.approx(found.touch.estimate, abs=found.completeness + 1e-3)
    assert ("routing" in found.reasons) == routing


def test_profile_s_free_paths_by_reverse_mode(parent: Model, pairs: Pairs, metric: LogitDifference) -> None:
    """The same share by gradients that pass divided sites through explained units only."""
    from heredity.circuits.edges import path
    from heredity.circuits.writes import ENTRY

    split, rows = Split(tuple(transcoders())), torch.arange(40)
    found = opacity_profile(parent, pairs, metric, split, steps=4)
    assert not isinstance(found, Refused)
    start, end = (parent.capture(tokens, [ENTRY])[ENTRY].detach() for tokens in (pairs.corrupt, pairs.clean))
    free = torch.zeros(40)
    for alpha, weight in path("eap-ig", 4):
        entry = (start + alpha * (end - start)).requires_grad_()
        world = World(parent, pairs.clean)
        edits = split.edits(world, lambda v: v.made[0] + (v.value - v.made[0]).detach(), slopes=True)
        edits[ENTRY] = lambda value, entry=entry: entry
        value = metric(parent.logits(pairs.clean, edits=edits), rows)
        (gradient,) = torch.autograd.grad(value.sum(), entry)
        free += weight * (gradient * (end - start)).flatten(1).sum(1)
    with torch.no_grad():
        gap = (metric(parent.logits(pairs.clean), rows) - metric(parent.logits(pairs.corrupt), rows)).sum()
    assert found.explained.estimate == pytest.approx(float(free.sum() / gap), abs=1e-3)


def test_profile_of_a_clear_and_of_an_opaque_model(parent: Model, pairs: Pairs, metric: LogitDifference) -> None:
    clear = opacity_profile(parent, pairs, metric, Split(tuple(identity(f"mlp_out@{i}") for i in range(LAYERS))))
    assert not isinstance(clear, Refused) and abs(clear.touch.estimate) < clear.completeness + 1e-3
    opaque = opacity_profile(parent, pairs, metric, Split((), ("resid_pre@1",)))
    assert not isinstance(opaque, Refused) and opaque.touch.estimate == pytest.approx(1, abs=1e-3)
    assert list(opaque.by_site) == ["resid_pre@1"]


@pytest.mark.parametrize("kind", ["transcoders", "cross-layer", "heads"])
def test_reasons_add_up_to_opacity(parent: Model, pairs: Pairs, metric: LogitDifference, kind: str) -> None:
    split = whole_model(parent, KINDS[kind]())
    omega = measured(opacity(parent, pairs, metric, split, routing=False)).omega.estimate
    found = reasons_of(contrast_of_pairs(parent, pairs, metric, split), split)
    total = sum(each.estimate for each in found.total.values())
    assert total + found.residual == pytest.approx(omega, abs=1e-4)
    assert abs(found.residual) < 0.03
    by_site = sum(share for site in found.by_site.values() for share in site.values())
    assert by_site == pytest.approx(total, abs=1e-6)
    assert set(found.total) == ({"undivided", "unlabelled"} if kind == "heads" else {"error", "unlabelled"})


def test_a_linear_error_is_found_to_be_linear(
    parent: Model, pairs: Pairs, metric: LogitDifference, texts: tuple[Encoded, ...]
) -> None:
    """A dictionary of the stream that keeps nothing has the stream itself as error."""
    nothing = identity("resid_post@1")
    d = replace(nothing.dictionary, W_dec=(torch.zeros(2 * WIDTH, WIDTH),))
    split = Split((DictionaryPart(d, torch.ones(2 * WIDTH)),))
    linear = linear_errors(parent, texts, split)
    assert linear["resid_post@1"].explained > 0.99
    found = reasons_of(contrast_of_pairs(parent, pairs, metric, split), split, linear=linear)
    assert found.total["linear error"].estimate == pytest.approx(1, abs=0.03)
    assert abs(found.total["non-linear error"].estimate) < 0.02
    # The error of an MLP's random transcoder is mostly not a linear function of what it reads.
    rough = linear_errors(parent, texts, Split((transcoders()[1],)))
    assert rough["mlp_out@1"].explained < 0.9
