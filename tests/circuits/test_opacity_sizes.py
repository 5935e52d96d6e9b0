"""Circuits over sizes (a small one must not look clear by what it omits), and shares of flow, the secondary figure."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution_graph_record import AttributionGraph, Kept
from heredity.circuits.opacity import contrast_of_pairs, opacity
from heredity.circuits.opacity_estimate import Opacity, Refused
from heredity.circuits.opacity_flow import flow_opacity
from heredity.circuits.opacity_parts import DictionaryPart
from heredity.circuits.opacity_runs import Contrast
from heredity.circuits.opacity_sizes import Ranking, Size, opacity_over_sizes, rank_units
from heredity.circuits.opacity_split import Split


@pytest.fixture(scope="module")
def nets() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "planted_nets.py"
    spec = importlib.util.spec_from_file_location("planted_nets", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bed(nets: ModuleType, seed: int, q: Tensor, kept: int = 32) -> tuple[Any, Split, Contrast]:
    """A net, its first ``kept`` units of each layer as dictionaries (the rest is error), and 40 pairs."""
    net = nets.planted(seed)
    units = torch.arange(kept)
    split = Split(tuple(DictionaryPart(nets.exact(net, layer, units), q[layer]) for layer in range(4)))
    return net, split, contrast_of_pairs(net, nets.prompts(net, 40, seed), nets.difference, split)


def random_q(seed: int, kept: int = 32) -> Tensor:
    return (torch.rand(4, kept, generator=torch.Generator().manual_seed(seed)) > 0.4).double()


def curve(contrast: Contrast, split: Split, ranking: Ranking, sizes: tuple[float, ...]) -> list[Size]:
    found = opacity_over_sizes(contrast, split, ranking, sizes=sizes)
    assert not isinstance(found, Refused)
    return found


def test_the_whole_model_is_faithful_and_has_its_own_opacity(nets: ModuleType) -> None:
    net, split, contrast = bed(nets, 0, random_q(0, 24), 24)
    found = curve(contrast, split, rank_units(contrast, split), (1.0,))[0]
    plain = opacity(net, nets.prompts(net, 40, 0), nets.difference, split, routing=False)
    assert isinstance(plain, Opacity) and found.within is not None
    assert found.faithfulness.estimate == pytest.approx(1, abs=1e-9)
    assert found.total.estimate == pytest.approx(plain.omega.estimate, abs=1e-9)
    assert found.within.estimate == pytest.approx(plain.omega.estimate, abs=1e-9)


def test_a_circuit_of_clear_units_only_stays_opaque_in_total(nets: ModuleType) -> None:
    """The way to game a share: leave out what is opaque. Inside, nothing is opaque; of the whole effect, most is."""
    q = random_q(1)
    _, split, contrast = bed(nets, 1, q)
    honest = rank_units(contrast, split)
    chosen = Ranking(
        tuple(u * (each > 0) for u, each in zip(honest.units, q, strict=True)), dict.fromkeys(honest.errors, 0.0)
    )
    found = curve(contrast, split, chosen, (0.1, 0.9999))
    everything = curve(contrast, split, honest, (1.0,))[0]
    for size in found:
        assert size.within is None or size.within.estimate == pytest.approx(0, abs=1e-9)
        assert size.total.estimate > 0.1
    # All clear units together: their total is the Ω of the whole, not a better one.
    assert found[-1].total.estimate == pytest.approx(everything.total.estimate, abs=1e-9)
    assert found[-1].faithfulness.estimate < 0.95


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_circuit_by_brute_force(nets: ModuleType, share: float) -> None:
    """Faithfulness and both opacities of a circuit, by plain loops over layers."""
    q = random_q(2, 24)
    net, split, contrast = bed(nets, 2, q, 24)
    pairs = nets.prompts(net, 40, 2)
    ranking = rank_units(contrast, split)
    found = curve(contrast, split, ranking, (share,))[0]
    errors = torch.tensor([ranking.errors[f"mlp_out@{i}"] for i in range(4)])
    scores = torch.cat([torch.stack(ranking.units).flatten(), errors])
    chosen = torch.zeros(len(scores))
    chosen[scores.abs().argsort(descending=True)[: found.nodes]] = 1
    inside = torch.cat([chosen[: 4 * 24].view(4, 24), chosen[4 * 24 :, None].expand(4, 8)], 1).double()  # units, error
    clear = torch.cat([inside[:, :24] * q, torch.zeros(4, 8)], 1)
    read = net.readout[:, 0] - net.readout[:, 1]

    def run(tokens: Tensor, live: Tensor, held: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, hidden = net.embedding[tokens[:, 0]], []
        for layer in range(4):
            a = torch.relu(x @ net.W[layer] + net.b[layer])
            hidden.append(a)
            x = x + (live[layer] * a + (1 - live[layer]) * held[layer]) @ net.out[layer]
        return x @ read, hidden

    ones, nothing = torch.ones(4, 32).double(), [torch.zeros(())] * 4
    (v11, h1), (v00, h0) = (run(tokens, ones, nothing) for tokens in (pairs.clean, pairs.corrupt))
    # An error inside the circuit is held at its clean value; units inside are live.
    units = torch.cat([inside[:, :24], torch.zeros(4, 8)], 1)
    mixed = [h0[i] + (h1[i] - h0[i]) * torch.cat([torch.zeros(24), inside[i, 24:]]) for i in range(4)]
    c11 = run(pairs.clean, units, mixed)[0]
    v10 = run(pairs.clean, clear, h0)[0]
    v01 = run(pairs.corrupt, clear, h1)[0]
    unclear = [h0[i] + (h1[i] - h0[i]) * (inside[i] - clear[i]) / (1 - clear[i]).clamp_min(1e-12) for i in range(4)]
    c01 = run(pairs.corrupt, clear, unclear)[0]
    gap, carried = (v11 - v00).sum(), (c11 - v00).sum()
    assert found.faithfulness.estimate == pytest.approx(float(carried / gap), abs=1e-9)
    assert found.total.estimate == pytest.approx(float((v11 - v10 + v01 - v00).sum() / gap / 2), abs=1e-9)
    if found.within is not None:
        want = float((c11 - v10 + c01 - v00).sum() / carried / 2)
        assert found.within.estimate == pytest.approx(want, abs=1e-9)


def test_ranking_is_what_exchanging_a_unit_does_in_a_linear_net(nets: ModuleType) -> None:
    """With every unit active, first-order effects are exact."""
    net = nets.planted(3)
    net.b.fill_(60.0)
    split = Split(
        tuple(DictionaryPart(nets.exact(net, i, torch.arange(24)), torch.ones(24).double()) for i in range(4))
    )
    pairs = nets.prompts(net, 30, 3)
    contrast = contrast_of_pairs(net, pairs, nets.difference, split)
    ranking = rank_units(contrast, split)
    other = net.capture(pairs.corrupt, ["mlp_post@1"])["mlp_post@1"]

    def exchange(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., 5] = other[..., 5]
        return value

    rows = torch.arange(30)
    change = nets.difference(net.logits(pairs.clean), rows) - nets.difference(
        net.logits(pairs.clean, edits={"mlp_post@1": exchange}), rows
    )
    assert float(ranking.units[1][5]) == pytest.approx(float(change.sum()), rel=1e-9)


# --- flow ---


def graph(seed: int = 0) -> AttributionGraph:
    """Six latents of two layers, two errors, three tokens, one target; what is read is the sum of what explains it."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    weights[:3, :6] = 0
    weights[3:6, 3:6] = 0
    constant = torch.randn(7, generator=generator, dtype=torch.float64)
    read = weights.sum(1) + constant
    return AttributionGraph(
        prompt="a b c",
        places=("a", "b", "c"),
        n_layers=2,
        latents=torch.tensor([[0, 0, 1], [0, 1, 2], [0, 2, 3], [1, 0, 1], [1, 1, 2], [1, 2, 3]]),
        activations=read[:6],
        errors=torch.tensor([[0, 0], [1, 2]]),
        tokens=torch.tensor([[4, 0], [5, 1], [6, 2]]),
        logits=("x",),
        logit_tokens=(-1,),
        logit_weights=torch.ones(1, dtype=torch.float64),
        weights=weights,
        read=read,
        constant=constant,
        dropped=torch.zeros(7, 2, dtype=torch.float64),
        kept=Kept(6, 6),
    )


@pytest.mark.parametrize("seed", range(4))
def test_flow_with_all_explained_is_the_published_score_and_the_root_decomposition(seed: int) -> None:
    g = graph(seed)
    found = flow_opacity(g, torch.ones(6))
    assert found.absolute == pytest.approx(1 - g.scores.replacement)
    if found.signed[0] is not None:
        assert found.signed[0] == pytest.approx(float(g.roots().error_share()[0]))


def test_flow_with_nothing_explained_leaves_the_direct_path() -> None:
    g = graph(1)
    found = flow_opacity(g, torch.zeros(6))
    row = g.weights[6]
    assert found.absolute == pytest.approx(1 - float(row[8:].abs().sum() / row.abs().sum()))
    assert found.kept[0] == pytest.approx(abs(float(row.sum())) / float(row.abs().sum()))


def test_opposite_halves_move_the_flow_of_absolute_values_only() -> None:
    """Why it is a secondary figure: writing a latent down as 3 and −2 times itself changes it, and nothing else."""
    g, q = graph(2), torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])
    columns = torch.cat([g.weights[:, :3], 3 * g.weights[:, 3:4], -2 * g.weights[:, 3:4], g.weights[:, 4:]], 1)
    rows = torch.cat([columns[:4], columns[3:4], columns[4:]])
    twice = torch.tensor([0, 1, 2, 3, 3, 4, 5])
    split = replace(
        g,
        latents=g.latents[twice],
        activations=g.activations[twice],
        weights=rows,
        read=g.read[[*twice.tolist(), 6]],
        constant=g.constant[[*twice.tolist(), 6]],
        dropped=torch.zeros(8, 2, dtype=torch.float64),
        kept=Kept(7, 7),
    )
    plain, changed = flow_opacity(g, q), flow_opacity(split, q[twice])
    assert changed.absolute != pytest.approx(plain.absolute, abs=1e-3)
    assert plain.signed[0] is not None and changed.signed[0] == pytest.approx(plain.signed[0])


def test_shares_of_a_sum_that_cancels_are_undefined() -> None:
    g = graph(3)
    g.weights[6] = 0
    g.weights[6, 6], g.weights[6, 8] = 1.0, -0.95
    found = flow_opacity(g, torch.ones(6))
    assert found.signed == (None,) and found.kept[0] < 0.1
    with pytest.raises(ValueError, match="one q"):
        flow_opacity(g, torch.ones(5))
