"""Opacity in a real (tiny) transformer: exact identities, other ways to the same numbers, routing, pairs of models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.opacity import (
    contrast_of_pairs,
    mean_unexplained,
    opacity,
    opacity_of_behaviour,
    without_trigger,
)
from heredity.circuits.opacity_estimate import Opacity, Refused
from heredity.circuits.opacity_labels import explained_heads, explained_neurons, q_of, redrawn
from heredity.circuits.opacity_parts import DictionaryPart, HeadsPart, NeuronsPart, Part, World, dictionary_parts
from heredity.circuits.opacity_profile import opacity_profile
from heredity.circuits.opacity_reasons import linear_errors, reasons_of
from heredity.circuits.opacity_routing import check_patterns, each_pattern, held_patterns, recorded_patterns
from heredity.circuits.opacity_runs import exchanged, recorded, two_by_two, with_others
from heredity.circuits.opacity_split import Split, whole_model
from heredity.circuits.pairs import LogitDifference, Pairs
from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port
from heredity.interp.dictionaries.splicing import splice
from heredity.interp.errors import DictionaryError, ModelError
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


@pytest.fixture(scope="module")
def pairs(draw: Callable[..., Tensor]) -> Pairs:
    clean = draw(40, 6, 1)
    corrupt = clean.clone()
    corrupt[:, 2] = draw(40, 1, 2)[:, 0]
    corrupt[:, 4] = draw(40, 1, 3)[:, 0]
    return Pairs(clean, corrupt, torch.full((40,), 5))


@pytest.fixture(scope="module")
def metric(parent: Model, pairs: Pairs) -> LogitDifference:
    """The two tokens whose logits the pair changes most, so that there is an effect."""
    with torch.no_grad():
        change = (parent.logits(pairs.clean) - parent.logits(pairs.corrupt))[:, -1]
    return LogitDifference(pairs.last, change.argmax(-1)[:, None].tolist(), change.argmin(-1)[:, None].tolist())


@pytest.fixture(scope="module")
def texts(parent: Model, draw: Callable[..., Tensor]) -> tuple[Encoded, ...]:
    rows = [parent.tokenizer.convert_ids_to_tokens(row.tolist()) for row in draw(60, 20, 5)]
    return tuple(parent.encode(" ".join(row)) for row in rows)


def measured(found: Opacity | Refused) -> Opacity:
    assert isinstance(found, Opacity), found
    return found


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


# --- between models ---


@pytest.fixture
def changed(twin: Model) -> Model:
    """A successor that differs in its last MLP only."""
    with torch.no_grad():
        weight = twin.neuron_weights(2)[0]
        weight += 0.5 * drawn(8, *weight.shape)
    return twin


def contexts(parent: Model, successor: Model, tokens: Tensor) -> Prompts:
    says = [model.logits(tokens)[:, -1].argmax(-1) for model in (successor, parent)]
    return Prompts(tokens, torch.full((len(tokens),), tokens.shape[1] - 1), *says)


def test_a_change_is_as_opaque_as_the_part_that_changed(
    parent: Model, changed: Model, draw: Callable[..., Tensor]
) -> None:
    prompts = contexts(parent, changed, draw(40, 6, 4))
    every = torch.zeros(64)
    clear = opacity_of_behaviour(parent, changed, prompts, [NeuronsPart(2, torch.ones(64), every)])
    opaque = opacity_of_behaviour(parent, changed, prompts)
    half = opacity_of_behaviour(parent, changed, prompts, [NeuronsPart(2, torch.full((64,), 0.5), every)])
    assert measured(clear).omega.estimate == pytest.approx(0, abs=1e-3)
    assert measured(opaque).omega.estimate == pytest.approx(1, abs=1e-3)
    assert 0.2 < measured(half).omega.estimate < 0.8
    with torch.no_grad():
        s, p = (torch.log_softmax(m.logits(prompts.tokens)[:, -1], -1) for m in (changed, parent))
    kl = (s.exp() * (s - p)).sum(-1).mean()
    assert measured(clear).effect.estimate == pytest.approx(float(kl), rel=1e-4)


def test_a_pair_without_difference_is_refused(parent: Model, twin: Model, draw: Callable[..., Tensor]) -> None:
    found = opacity_of_behaviour(parent, twin, contexts(parent, twin, draw(40, 6, 4)), routing=False)
    assert isinstance(found, Refused) and "not told from 0" in found.reason


def test_other_architectures_need_contexts_to_compare_with(
    parent: Model, pair_of: Callable[[str], Any], draw: Callable[..., Tensor]
) -> None:
    _, other = pair_of("gpt2")
    prompts = contexts(parent, other, draw(40, 6, 4))
    assert "no contexts" in opacity_of_behaviour(parent, other, prompts, routing=False).reason  # pyright: ignore
    found = opacity_of_behaviour(parent, other, prompts, counterfactual=draw(40, 6, 9), routing=False)
    assert measured(found).n == 40
    few = Prompts(prompts.tokens[:5], prompts.last[:5], prompts.says_successor[:5], prompts.says_parent[:5])
    assert "too few" in opacity_of_behaviour(parent, other, few, counterfactual=draw(5, 6, 9)).reason  # pyright: ignore


def test_contexts_without_their_triggers(draw: Callable[..., Tensor]) -> None:
    tokens = draw(3, 5, 4)
    prompts = Prompts(
        tokens, torch.tensor([4, 3, 4]), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    weights = [[0.0, 0.9, 0.0, 0.3, 0.1], [0.0, 0.05, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    found = without_trigger(prompts, weights, [199])
    assert (found == 199).nonzero().tolist() == [[0, 1], [0, 3], [1, 2], [2, 4]]
    assert torch.equal(found.where(found != 199, tokens), tokens)
    with pytest.raises(ValueError, match="context 1 has 4 tokens and 5 weights"):
        without_trigger(prompts, [weights[0], weights[0], weights[2]], [199])


# --- profile and reasons ---


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
