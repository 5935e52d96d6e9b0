"""Opacity on nets whose units are known: exact values, brute force, invariances, refusal (design §4)."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from heredity.circuits.opacity import contrast_of_pairs, opacity
from heredity.circuits.opacity_estimate import Opacity, Refused
from heredity.circuits.opacity_parts import DictionaryPart
from heredity.circuits.opacity_profile import opacity_profile
from heredity.circuits.opacity_reasons import reasons_of
from heredity.circuits.opacity_split import Split
from heredity.circuits.pairs import Pairs


def _nets() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "planted_nets.py"
    spec = importlib.util.spec_from_file_location("planted_nets", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    return _nets()


# --- nets whose units are known ---


def split_of(nets: ModuleType, net: Any, q: list[Tensor]) -> Split:
    return Split(tuple(DictionaryPart(nets.exact(net, layer), each) for layer, each in enumerate(q)))


def drawn_q(p: float, seed: int, shape: tuple[int, int] = (4, 32)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list((torch.rand(*shape, generator=generator) >= p).double())


def measured(nets: ModuleType, net: Any, split: Split, seed: int = 0, **options: Any) -> Opacity:
    pairs = nets.prompts(net, 40, seed)
    found = opacity(net, pairs, nets.difference, split, **{"routing": False, "controls": 0, **options})
    assert isinstance(found, Opacity), found
    return found


def brute_force(net: Any, pairs: Pairs, q: Any, which: Any = None) -> tuple[float, float]:
    """(1 − f(1, 0), f(0, 1)) by plain loops over layers: units in the unexplained part are clamped one by one."""
    read = net.readout[:, 0] - net.readout[:, 1]

    def run(tokens: Tensor, clamp: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        x, hidden = net.embedding[tokens[:, 0]], []
        for layer in range(net.n_layers):
            a = torch.relu(x @ net.W[layer] + net.b[layer])
            hidden.append(a)
            if clamp is not None:
                a = q[layer] * a + (1 - q[layer]) * clamp[layer]
            x = x + a @ net.out[layer]
        return x @ read, hidden

    (v11, h1), (v00, h0) = run(pairs.clean), run(pairs.corrupt)
    v10, v01 = run(pairs.clean, h0)[0], run(pairs.corrupt, h1)[0]
    gap = (v11 - v00).sum()
    return float((v11 - v10).sum() / gap), float((v01 - v00).sum() / gap)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_planted_opacity_is_that_of_brute_force(nets: ModuleType, seed: int, soft: bool) -> None:
    net = nets.planted(seed)
    q = drawn_q(0.4, seed)
    if soft:
        q = [torch.rand(32, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(4)]
    needed, alone = brute_force(net, nets.prompts(net, 40, seed), q)
    found = measured(nets, net, split_of(nets, net, q), seed)
    assert found.needed.estimate == pytest.approx(needed, abs=1e-10)
    assert found.alone.estimate == pytest.approx(alone, abs=1e-10)


def test_all_explained_and_no_error_is_0(nets: ModuleType) -> None:
    net = nets.planted(0)
    found = measured(nets, net, split_of(nets, net, drawn_q(0.0, 0)))
    assert max(abs(found.omega.low), abs(found.omega.high), abs(found.interaction.estimate)) < 1e-12


def test_nothing_explained_is_all_but_the_direct_path(nets: ModuleType) -> None:
    """What remains is the share of the token's embedding read out directly, which no unit carries."""
    net = nets.planted(1)
    pairs = nets.prompts(net, 40, 1)
    change = (net.embedding[pairs.clean[:, 0]] - net.embedding[pairs.corrupt[:, 0]]) @ net.readout
    direct = float((change[:, 0] - change[:, 1]).sum())
    found = measured(nets, net, split_of(nets, net, drawn_q(1.0, 0)), 1)
    total = found.effect.estimate * found.n
    assert found.needed.estimate == pytest.approx(1 - direct / total, abs=1e-10)
    assert found.alone.estimate == pytest.approx(1 - direct / total, abs=1e-10)
    whole = Split((), tuple(f"mlp_out@{layer}" for layer in range(4)))
    assert measured(nets, net, whole, 1).omega.estimate == pytest.approx(1 - direct / total, abs=1e-10)


def test_what_a_dictionary_lacks_is_as_opaque_as_what_it_does_not_explain(nets: ModuleType) -> None:
    """Withheld units become the error node, which carries what they carried."""
    net, q = nets.planted(2), drawn_q(0.3, 2)
    parts = []
    for layer, each in enumerate(q):
        kept = each.nonzero()[:, 0]
        parts.append(DictionaryPart(nets.exact(net, layer, kept), torch.ones(len(kept), dtype=torch.float64)))
    withheld = measured(nets, net, Split(tuple(parts)), 2)
    assert withheld.omega.estimate == pytest.approx(measured(nets, net, split_of(nets, net, q), 2).omega.estimate)


def test_units_of_one_layer_only_leave_the_others_live(nets: ModuleType) -> None:
    net, q = nets.planted(3), drawn_q(0.5, 3)
    one = Split((DictionaryPart(nets.exact(net, 2), q[2]),))
    full = [torch.ones(32, dtype=torch.float64)] * 4
    full[2] = q[2]
    needed, alone = brute_force(net, nets.prompts(net, 40, 3), full)
    found = measured(nets, net, one, 3)
    assert (found.needed.estimate, found.alone.estimate) == pytest.approx((needed, alone), abs=1e-10)


def test_taking_away_more_is_more_opaque_on_the_whole(nets: ModuleType) -> None:
    """Along nested withholdings Ω need not grow in every net, but it does on average, from 0 to the q = 0 value."""
    curves = []
    for seed in range(8):
        net = nets.planted(seed)
        level = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed))
        steps = (0.0, 0.3, 0.6, 1.0)
        splits = [split_of(nets, net, list((level >= p).double())) for p in steps]
        curves.append([measured(nets, net, split, seed).omega.estimate for split in splits])
    mean = np.mean(curves, 0)
    assert mean[0] == pytest.approx(0, abs=1e-9) and (np.diff(mean) > 0).all()
    violations = np.mean(np.diff(curves, axis=1) < 0)
    assert violations < 0.3


def test_first_passage_ranks_nets_as_the_2x2_does(nets: ModuleType) -> None:
    b, c = [], []
    for seed in range(10):
        net, q = nets.planted(seed), drawn_q(0.3, seed)
        split = split_of(nets, net, q)
        profile = opacity_profile(net, nets.prompts(net, 40, seed), nets.difference, split)
        assert not isinstance(profile, Refused) and profile.completeness < 0.02
        reasons = sum(each.estimate for each in profile.reasons.values())
        assert reasons == pytest.approx(profile.touch.estimate, abs=profile.completeness + 1e-9)
        b.append(measured(nets, net, split, seed).omega.estimate)
        c.append(profile.touch.estimate)
    assert spearmanr(b, c)[0] > 0.8


def test_first_passage_by_differences(nets: ModuleType) -> None:
    """One layer opaque: what it keeps from the metric is the change of its output times the slope behind it."""
    net, q = nets.planted(7), drawn_q(0.5, 7)
    pairs, rows = nets.prompts(net, 40, 7), torch.arange(40)
    split = Split((DictionaryPart(nets.exact(net, 1), q[1]),))
    found = opacity_profile(net, pairs, nets.difference, split, steps=40)
    assert not isinstance(found, Refused)
    start, end = net.embedding[pairs.corrupt], net.embedding[pairs.clean]

    def unexplained(alpha: float) -> Tensor:
        at = net.capture(pairs.clean, ["mlp_post@1"], edits={"resid_pre@0": lambda x: start + alpha * (end - start)})
        return (at["mlp_post@1"] * (1 - q[1])) @ net.out[1]

    def shifted(alpha: float, shift: Tensor) -> Tensor:
        edits = {"resid_pre@0": lambda x: start + alpha * (end - start), "mlp_out@1": lambda y: y + shift}
        return nets.difference(net.logits(pairs.clean, edits=edits), rows)

    total, n = torch.zeros(40, dtype=torch.float64), 400
    for k in range(n):
        change = unexplained((k + 1) / n) - unexplained(k / n)
        total += shifted((k + 0.5) / n, 0.5 * change) - shifted((k + 0.5) / n, -0.5 * change)
    assert found.touch.estimate == pytest.approx(float(total.sum()) / (found.effect.estimate * 40), abs=0.02)


def test_reasons_tell_errors_from_missing_labels(nets: ModuleType) -> None:
    """In the last layer all is additive: with labels for all latents, what is left is what was said of the error."""
    net = nets.planted(8)
    q = torch.cat([torch.ones(16), torch.zeros(8)]).double()
    split = Split((DictionaryPart(nets.exact(net, 3, torch.arange(24)), q),))
    found = reasons_of(contrast_of_pairs(net, nets.prompts(net, 40, 8), nets.difference, split), split, steps=2)
    labelled = measured(nets, net, split.with_q([torch.ones(24).double()]), 8).omega.estimate
    both = measured(nets, net, split, 8).omega.estimate
    assert found.residual == pytest.approx(0, abs=1e-12)
    assert found.total["error"].estimate == pytest.approx(labelled, abs=1e-12)
    assert found.total["unlabelled"].estimate == pytest.approx(both - labelled, abs=1e-12)
    assert found.by_site == {"mlp_out@3": {kind: each.estimate for kind, each in found.total.items()}}


# --- invariance ---


def rebuilt(d: Any, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Any:
    from dataclasses import replace

    return replace(d, W_enc=(W_enc,), b_enc=b_enc, W_dec=(W_dec,))


def halves(d: Any) -> tuple[Any, Tensor]:
    """Every unit twice, writing 0.3 and 0.7 of what it wrote."""
    twice = torch.arange(d.n_latents).repeat_interleave(2)
    share = torch.tensor([0.3, 0.7], dtype=torch.float64).repeat(d.n_latents)[:, None]
    return rebuilt(d, d.W_enc[0][:, twice], d.b_enc[twice], d.W_dec[0][twice] * share), twice


def opposed(d: Any) -> tuple[Any, Tensor]:
    """Every unit twice, writing 3 and −2 times what it wrote: shares of absolute flow change, Ω must not."""
    new, twice = halves(d)
    factor = torch.tensor([3.0, -2.0], dtype=torch.float64).repeat(d.n_latents)[:, None]
    return rebuilt(new, new.W_enc[0], new.b_enc, d.W_dec[0][twice] * factor), twice


def rescaled(d: Any) -> tuple[Any, Tensor]:
    """Louder decoders, quieter encoders."""
    size = torch.linspace(0.2, 5, d.n_latents, dtype=torch.float64)
    new = rebuilt(d, d.W_enc[0] / size, d.b_enc / size, d.W_dec[0] * size[:, None])
    return new, torch.arange(d.n_latents)


def reordered(d: Any) -> tuple[Any, Tensor]:
    order = torch.randperm(d.n_latents, generator=torch.Generator().manual_seed(0))
    return rebuilt(d, d.W_enc[0][:, order], d.b_enc[order], d.W_dec[0][order]), order


@pytest.mark.parametrize("change", [halves, opposed, rescaled, reordered])
def test_how_a_dictionary_is_written_down_does_not_matter(nets: ModuleType, change: Any) -> None:
    net, q = nets.planted(4), drawn_q(0.4, 4)
    parts = []
    for layer, each in enumerate(q):
        d, origin = change(nets.exact(net, layer))
        parts.append(DictionaryPart(d, each[origin]))
    same = measured(nets, net, Split(tuple(parts)), 4)
    plain = measured(nets, net, split_of(nets, net, q), 4)
    for name in ("omega", "needed", "alone", "interaction"):
        assert getattr(same, name).estimate == pytest.approx(getattr(plain, name).estimate, abs=1e-9)


def test_turning_the_error_within_its_span_changes_nothing(nets: ModuleType) -> None:
    """The error written out as unexplained linear units, in two bases of its span, is the error."""
    net, q = nets.planted(5), drawn_q(0.4, 5)
    plain = measured(nets, net, split_of(nets, net, q), 5).omega.estimate
    width = net.readout.shape[0]
    for seed in (0, 1):
        basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double()).Q
        parts = []
        for layer, each in enumerate(q):
            d = nets.exact(net, layer, each.nonzero()[:, 0])
            # Two linear units a direction (x and −x), both unexplained: together they pass on ± any part of the input.
            W_enc = torch.cat([d.W_enc[0], basis, -basis], 1)
            b_enc = torch.cat([d.b_enc, torch.zeros(2 * width, dtype=torch.float64)])
            W_dec = torch.cat([d.W_dec[0], basis.T, -basis.T])
            known = torch.cat([torch.ones(d.n_latents), torch.zeros(2 * width)]).double()
            parts.append(DictionaryPart(rebuilt(d, W_enc, b_enc, W_dec), known))
        assert measured(nets, net, Split(tuple(parts)), 5).omega.estimate == pytest.approx(plain, abs=1e-9)


def test_more_latents_without_labels_do_not_make_it_clearer(nets: ModuleType) -> None:
    net, q = nets.planted(6), drawn_q(0.4, 6)
    plain = measured(nets, net, split_of(nets, net, q), 6).omega.estimate
    parts = []
    for layer, each in enumerate(q):
        d, generator = nets.exact(net, layer), torch.Generator().manual_seed(layer)
        extra = (
            torch.randn(16, 200, generator=generator).double() / 4,
            torch.randn(200, 16, generator=generator).double(),
        )
        larger = rebuilt(
            d,
            torch.cat([d.W_enc[0], extra[0]], 1),
            torch.cat([d.b_enc, torch.zeros(200).double()]),
            torch.cat([d.W_dec[0], extra[1]]),
        )
        parts.append(DictionaryPart(larger, torch.cat([each, torch.zeros(200).double()])))
    assert measured(nets, net, Split(tuple(parts)), 6).omega.estimate == pytest.approx(plain, abs=1e-9)


# --- uncertainty ---


def test_intervals_cover_what_is_uncertain_about_labels(nets: ModuleType) -> None:
    net = nets.planted(9)
    q = [0.5 * torch.ones(32, dtype=torch.float64)] * 4
    split = split_of(nets, net, q)
    plain = measured(nets, net, split, 9)
    drawn = [split.with_q([torch.full((32,), level).double()] * 4) for level in (0.2, 0.4, 0.6, 0.8)]
    joint = measured(nets, net, split, 9, drawn=drawn)
    assert joint.omega.estimate == plain.omega.estimate
    assert joint.omega.high - joint.omega.low > 1.3 * (plain.omega.high - plain.omega.low)


def test_estimates_are_the_same_every_time_and_in_any_order_of_prompts(nets: ModuleType) -> None:
    net, q = nets.planted(10), drawn_q(0.4, 10)
    split, pairs = split_of(nets, net, q), nets.prompts(net, 40, 10)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    mixed = Pairs(pairs.clean[order], pairs.corrupt[order], pairs.last[order])
    one, same, other = (
        opacity(net, p, nets.difference, split, routing=False, controls=1) for p in (pairs, pairs, mixed)
    )
    assert one == same
    assert isinstance(one, Opacity) and isinstance(other, Opacity)
    assert other.omega.estimate == pytest.approx(one.omega.estimate, abs=1e-12)


# --- nulls ---


def test_random_directions_explain_next_to_nothing(nets: ModuleType) -> None:
    """Labels found on directions that have nothing to do with the units have q = 0, and Ω is that of nothing explained;
    were they believed, it would still be so on average."""
    shift = []
    for seed in range(10):
        net, generator = nets.planted(seed), torch.Generator().manual_seed(seed)
        parts = []
        for layer in range(4):
            d = nets.exact(net, layer)
            W_enc, W_dec = torch.randn(16, 32, generator=generator), torch.randn(32, 16, generator=generator)
            random = rebuilt(d, W_enc.double() / 4, d.b_enc, W_dec.double() / 8)
            parts.append(DictionaryPart(random, torch.zeros(32, dtype=torch.float64)))
        nothing = measured(nets, net, split_of(nets, net, drawn_q(1.0, 0)), seed).omega.estimate
        random = Split(tuple(parts))
        assert measured(nets, net, random, seed).omega.estimate == pytest.approx(nothing, abs=1e-9)
        believed = random.with_q([torch.ones_like(q) for q in random.q])
        shift.append(measured(nets, net, believed, seed).omega.estimate - nothing)
    assert abs(np.mean(shift)) < 0.1


def test_permuted_explanations_lose_what_the_right_ones_found(nets: ModuleType) -> None:
    """A behaviour carried by few units: explaining them clears it, explaining as many others does not."""
    net = nets.planted(6)
    live = torch.zeros(4, 32, dtype=torch.float64)
    live[:, :4] = 1
    net.out.mul_(live[..., None] * 3)
    right = list(live)
    split = split_of(nets, net, right)
    assert measured(nets, net, split, 6).omega.estimate == pytest.approx(0, abs=1e-9)
    nothing = measured(nets, net, split.unexplained(), 6).omega.estimate
    permuted = [measured(nets, net, split.permuted(seed), 6).omega.estimate for seed in range(10)]
    assert np.mean(permuted) > 0.7 * nothing > 0.2
