"""Opacity in a real (tiny) transformer: exact identities, other ways to the same numbers, routing, labels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opaque import (
    KINDS,
    LAYERS,
    dictionary,
    drawn,
    identity,
    largest_change,
    measured,
    random_pairs,
    random_texts,
    sae,
    some_q,
    transcoders,
)
from torch import Tensor

from heredity.circuits.opacity import (
    contrast_of_pairs,
    mean_unexplained,
    opacity,
)
from heredity.circuits.opacity_estimate import Refused
from heredity.circuits.opacity_labels import explained_heads, explained_neurons, q_of, redrawn
from heredity.circuits.opacity_parts import DictionaryPart, HeadsPart, NeuronsPart, Part, World
from heredity.circuits.opacity_profile import opacity_profile
from heredity.circuits.opacity_routing import check_patterns, each_pattern, held_patterns, recorded_patterns
from heredity.circuits.opacity_runs import exchanged, recorded, two_by_two, with_others
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.interp.dictionaries.record import DictionarySet, Port
from heredity.interp.dictionaries.splicing import splice
from heredity.interp.errors import DictionaryError, ModelError
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


# --- the engine ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_world_with_its_own_unexplained_parts_is_itself(parent: Model, pairs: Pairs, kind: str) -> None:
    split, world = Split(tuple(KINDS[kind]())), World(parent, pairs.clean)
    with torch.no_grad():
        plain, unexplained = recorded(world, split, lambda logits: logits)
        again = parent.logits(pairs.clean, edits=exchanged(world, split, unexplained))
    assert torch.equal(plain, parent.logits(pairs.clean))
    torch.testing.assert_close(again, plain, atol=2e-3, rtol=1e-4)
    assert min(float(u.abs().max()) for u in unexplained.values()) > 1e-3


@pytest.mark.parametrize("skip", [False, True])
def test_the_exchange_is_that_of_splicing(parent: Model, pairs: Pairs, skip: bool) -> None:
    """By other means: dictionaries spliced with latents scaled by q, and errors made by hand."""
    parts = KINDS["skip" if skip else "transcoders"]()
    bare = [replace(part.dictionary, W_skip=None) for part in parts]  # pyright: ignore
    errors = {}
    with torch.no_grad():
        for part, d in zip(parts, bare, strict=True):
            (read,), (write,) = d.reads, d.writes
            seen = parent.capture(pairs.corrupt, [read.site, write.site])
            a = torch.relu(seen[read.site] @ d.W_enc[0] + d.b_enc) * part.q
            errors[write.site] = seen[write.site] - a @ d.W_dec[0] - d.b_dec[0]
        scale = {i: lambda f, q=part.q: f.with_values(f.values * q[f.indices.long()]) for i, part in enumerate(parts)}
        want = parent.logits(pairs.clean, edits=splice(DictionarySet(tuple(bare)), scale, errors=errors))
        split = Split(tuple(parts))
        _, u = recorded(World(parent, pairs.corrupt), split, lambda logits: logits)
        found = parent.logits(pairs.clean, edits=exchanged(World(parent, pairs.clean), split, u))
    torch.testing.assert_close(found, want, atol=2e-3, rtol=1e-4)
    assert (found - parent.logits(pairs.clean)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_units(parent: Model, pairs: Pairs, kind: str) -> None:
    """Against differences, in what is read."""
    for part in KINDS[kind]():
        if isinstance(part, NeuronsPart):  # so many, that any step moves some across their thresholds
            part = replace(part, thresholds=torch.zeros(64))
        world = World(parent, pairs.clean[:3])
        seen = parent.capture(world.tokens, part.reads(0))
        weights = torch.stack([part.q, torch.ones_like(part.q)])
        where = {site: 0.1 * drawn(4, *value.shape) for site, value in seen.items()}

        def total(step: float, part: Part = part, world: World = world, seen: Any = seen, where: Any = where) -> Tensor:
            moved = {site: value + step * where[site] for site, value in seen.items()}
            weights = torch.stack([part.q, torch.ones_like(part.q)])
            return torch.cat([out.flatten() for out in part.write(world, moved, weights, False).values()])

        leaves = {site: value.clone().requires_grad_() for site, value in seen.items()}
        out = torch.cat([o.flatten() for o in part.write(world, leaves, weights, True).values()])
        torch.testing.assert_close(out.detach(), total(0.0), atol=1e-4, rtol=1e-4)
        probe = drawn(6, len(out))
        grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
        slope = sum(float((g * where[site]).sum()) for g, site in zip(grads, leaves, strict=True))
        step = 1e-3
        numeric = float((((total(step) - total(-step)) / (2 * step)) * probe).sum())
        assert slope == pytest.approx(numeric, rel=0.05, abs=0.02)


def test_a_part_must_read_before_it_writes() -> None:
    late = dictionary("transcoder", [Port("mlp_in@2")], [Port("mlp_out@1")], 0)
    with pytest.raises(DictionaryError, match="before the forward has come to"):
        Split((DictionaryPart(late, some_q(0)),))


def test_q_must_belong_to_the_units() -> None:
    d = dictionary("sae", [Port("mlp_out@0")], [Port("mlp_out@0")], 0)
    for wrong in (some_q(0, 5), some_q(0) + 1, -some_q(0)):
        with pytest.raises(ValueError, match=r"one q in \[0, 1\]"):
            DictionaryPart(d, wrong)


# --- exactness, routing ---


def test_no_error_and_all_explained_is_0_and_the_rest_is_routing(
    parent: Model, pairs: Pairs, metric: LogitDifference
) -> None:
    split = Split(tuple(identity(f"mlp_out@{i}") for i in range(LAYERS)))
    found = measured(opacity(parent, pairs, metric, split))
    assert abs(found.omega.estimate) < 1e-4 and abs(found.interaction.estimate) < 1e-4
    assert found.buckets is not None and abs(found.buckets.unexplained.estimate) < 1e-3
    assert found.buckets.explained.estimate + found.buckets.routing.estimate == pytest.approx(1, abs=1e-3)
    assert abs(found.buckets.routing.estimate) > 0.01


def test_nothing_explained_is_all_but_the_direct_path(parent: Model, pairs: Pairs, metric: LogitDifference) -> None:
    """Heads and MLPs held at the counterfactual's values, the embedding alone being the clean prompt's."""
    split = whole_model(parent, heads=True)
    assert split.opaque == tuple(f"{kind}@{i}" for i in range(LAYERS) for kind in ("attn_out", "mlp_out"))
    found = measured(opacity(parent, pairs, metric, split, routing=False))
    rows = torch.arange(40)
    with torch.no_grad():
        other = parent.capture(pairs.corrupt, split.opaque)
        own = parent.capture(pairs.clean, split.opaque)
        m11, m00 = (metric(parent.logits(t), rows).sum() for t in (pairs.clean, pairs.corrupt))
        direct = metric(parent.logits(pairs.clean, edits={k: lambda x, v=v: v for k, v in other.items()}), rows).sum()
        alone = metric(parent.logits(pairs.corrupt, edits={k: lambda x, v=v: v for k, v in own.items()}), rows).sum()
    assert found.needed.estimate == pytest.approx(float((m11 - direct) / (m11 - m00)), abs=1e-4)
    assert found.alone.estimate == pytest.approx(float((alone - m00) / (m11 - m00)), abs=1e-4)
    none = Split(tuple(identity(f"{k}@{i}", 0.0) for i in range(LAYERS) for k in ("attn_out", "mlp_out")))
    assert measured(opacity(parent, pairs, metric, none, routing=False)).omega.estimate == pytest.approx(
        found.omega.estimate, abs=1e-3
    )


def test_buckets_add_up_and_routing_is_what_held_patterns_do(
    parent: Model, pairs: Pairs, metric: LogitDifference
) -> None:
    found = measured(opacity(parent, pairs, metric, whole_model(parent, transcoders())))
    assert found.buckets is not None
    parts = [found.buckets.explained, found.buckets.unexplained, found.buckets.routing]
    assert sum(part.estimate for part in parts) == pytest.approx(1, abs=1e-6)
    # Without unexplained parts, what routing is needed for is what the model loses with the other patterns.
    split = Split(tuple(identity(f"mlp_out@{i}") for i in range(LAYERS)))
    plain = measured(opacity(parent, pairs, metric, split))
    rows = torch.arange(40)
    with torch.no_grad():
        with recorded_patterns(parent) as patterns:
            low = metric(parent.logits(pairs.corrupt), rows).sum()
        high = metric(parent.logits(pairs.clean), rows).sum()
        with held_patterns(parent, dict(patterns)):
            held = metric(parent.logits(pairs.clean), rows).sum()
    assert plain.buckets is not None
    assert plain.buckets.routing_needed.estimate == pytest.approx(float((high - held) / (high - low)), abs=1e-3)


def test_patterns_that_the_model_does_not_compute_with_are_refused(parent: Model, monkeypatch: Any) -> None:
    from heredity.circuits import opacity_routing

    check_patterns(parent)

    def idle(model: Model, patterns: Any) -> Any:
        return each_pattern(model, lambda layer, pattern: pattern)

    monkeypatch.setattr(opacity_routing, "held_patterns", idle)
    with pytest.raises(ModelError, match="other patterns than those that can be held"):
        check_patterns(parent)


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2"])
def test_other_families(pair_of: Callable[[str], Any], draw: Callable[..., Tensor], family: str) -> None:
    """Learned positions and biases, parallel blocks, norms behind modules: worlds are themselves, and all adds up."""
    model, _ = pair_of(family)
    clean = draw(30, 6, 1)
    corrupt = clean.clone()
    corrupt[:, 2] = draw(30, 1, 2)[:, 0]
    with torch.no_grad():
        change = (model.logits(clean) - model.logits(corrupt))[:, -1]
    last = torch.full((30,), 5)
    metric = LogitDifference(last, change.argmax(-1)[:, None].tolist(), change.argmin(-1)[:, None].tolist())
    n = len(model.neuron_weights(1)[0])
    parts = [HeadsPart(0, some_q(0, 4), torch.zeros(4)), NeuronsPart(1, some_q(1, n), torch.zeros(n))]
    split, world = whole_model(model, parts, heads=True), World(model, clean)
    with torch.no_grad():
        plain, u = recorded(world, split, lambda logits: logits)
        again = model.logits(clean, edits=exchanged(world, split, u))
    torch.testing.assert_close(again, plain, atol=2e-3, rtol=1e-4)
    pairs = Pairs(clean, corrupt, last)
    found = measured(opacity(model, pairs, metric, split))
    assert found.buckets is not None
    buckets = (found.buckets.explained, found.buckets.unexplained, found.buckets.routing)
    assert sum(each.estimate for each in buckets) == pytest.approx(1, abs=1e-5)
    profile = opacity_profile(model, pairs, metric, split)
    assert not isinstance(profile, Refused) and profile.completeness < 0.02


def test_screens(parent: Model) -> None:
    """What comes before a divided stream passes through it; what comes after it is opaque without units."""
    assert whole_model(parent, [sae("resid_post@1")]).opaque == ("mlp_out@2",)
    assert whole_model(parent, [sae("resid_mid@1")], heads=True).opaque == ("mlp_out@1", "attn_out@2", "mlp_out@2")
    assert whole_model(parent, transcoders()).opaque == ()


# --- what the counterfactual is ---


def test_mean_counterfactual(parent: Model, pairs: Pairs, metric: LogitDifference, texts: tuple[Encoded, ...]) -> None:
    split = Split((), ("mlp_out@1",))
    means = mean_unexplained(parent, texts, split)
    tokens = torch.cat([parent.capture(torch.tensor([t.ids]), ["mlp_out@1"])["mlp_out@1"][0] for t in texts])
    torch.testing.assert_close(means["mlp_out@1"], tokens.mean(0), atol=1e-5, rtol=1e-4)
    found = measured(opacity(parent, pairs, metric, split, counterfactual="mean", texts=texts, routing=False))
    assert found.counterfactual == "mean"
    rows = torch.arange(40)
    with torch.no_grad():
        hold = {"mlp_out@1": lambda x: means["mlp_out@1"].expand_as(x)}
        v10, v00 = (metric(parent.logits(t, edits=hold), rows).sum() for t in (pairs.clean, pairs.corrupt))
        v11 = metric(parent.logits(pairs.clean), rows).sum()
    assert found.needed.estimate == pytest.approx(float((v11 - v10) / (v11 - v00)), abs=1e-4)


def test_control_of_equal_norm(parent: Model, pairs: Pairs, metric: LogitDifference) -> None:
    """Random directions restore nothing by themselves, and a control of the same seed is the same."""
    split = whole_model(parent, heads=True)
    contrast = contrast_of_pairs(parent, pairs, metric, split)
    plain, (one, two) = two_by_two(contrast, split, controls=2, seed=3)
    gap = (plain["11"] - plain["00"]).sum()
    assert abs((one["01"] - one["00"]).sum() / gap) < 0.3 < (plain["01"] - plain["00"]).sum() / gap
    assert not np.array_equal(one["10"], two["10"])
    again = two_by_two(contrast, split, controls=1, seed=3)[1][0]
    assert np.array_equal(one["10"], again["10"])


def test_a_crosscoder_reads_the_other_model(
    parent: Model, successor: Model, pairs: Pairs, metric: LogitDifference
) -> None:
    ports = [Port("resid_post@1", 0), Port("resid_post@1", 1)]
    d = dictionary("crosscoder", ports, ports, 50)
    split = Split((DictionaryPart(d, some_q(3)),))
    with pytest.raises(DictionaryError, match="Give 1 models"):
        opacity(successor, pairs, metric, split, side=1, routing=False)
    world = with_others([parent, successor], World(successor, pairs.clean, 1), split)
    with torch.no_grad():
        _, u = recorded(world, split, lambda logits: logits)
        x = [model.capture(pairs.clean, ["resid_post@1"])["resid_post@1"] for model in (parent, successor)]
        a = torch.relu(x[0] @ d.W_enc[0] + x[1] @ d.W_enc[1] + d.b_enc) * some_q(3)
    torch.testing.assert_close(u["resid_post@1"], x[1] - a @ d.W_dec[1] - d.b_dec[1], atol=1e-4, rtol=1e-4)


# --- labels ---


def test_heads_and_neurons_with_explanations(parent: Model, texts: tuple[Encoded, ...]) -> None:
    part, found = explained_heads(parent, texts, 1, seed=0)
    assert [e.latent for e in found] == [0, 1, 2, 3] and part.directions is not None
    torch.testing.assert_close(part.directions.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(part.q, q_of(found, 4))
    tokens = torch.cat([torch.tensor(t.ids) for t in texts])
    with torch.no_grad():
        z = torch.cat([parent.capture(torch.tensor([t.ids]), ["attn_z@1"])["attn_z@1"][0] for t in texts])
        weight, bias = parent.head_weights(1)
        write = z[:, 2] @ weight[2] + bias / 4
        along = ((write - part.centres[2]) @ part.directions[2]).abs()  # pyright: ignore
    assert int((along >= part.thresholds[2]).sum()) == found[2].n_active == round(0.05 * len(tokens))
    neurons, said = explained_neurons(parent, texts, 1, [5, 9], seed=0)
    assert [e.latent for e in said] == [5, 9]
    assert torch.isinf(neurons.thresholds).sum() == 62 and neurons.q[[0, 1, 63]].sum() == 0
    one, other = redrawn([part, neurons], [found, said], 2, 1)
    assert not torch.equal(one[0].q, other[0].q) or float(part.q.max()) == 0
    with pytest.raises(ValueError, match="neurons 0 to 63"):
        explained_neurons(parent, texts, 1, [64], seed=0)
