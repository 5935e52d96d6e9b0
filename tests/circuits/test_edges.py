"""Scores of edges against finite differences, exact patching in the limit of small changes, and an ungrouped twin."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from heredity.circuits.edge_patching import patch_edges, run_circuit, written
from heredity.circuits.edges import EdgeScores, attribute_edges, complete, path
from heredity.circuits.layout import layout_of
from heredity.circuits.pairs import LogitDifference, NegativeKL, Pairs, ProbabilityDifference
from heredity.interp.errors import ModelError
from heredity.interp.model import Model

FAMILIES = ["llama", "gpt2", "neox", "gemma2", "phi3", "granite"]


@pytest.fixture
def double(pair_of) -> "Any":
    """A family's parent in float64 (norms and softmax stay float32 in transformers); back to float32 afterwards."""
    changed = []

    def make(family: str) -> Model:
        model = pair_of(family)[0]
        model.bridge.original_model.double()
        changed.append(model)
        return model

    yield make
    for model in changed:
        model.bridge.original_model.float()


def some_pairs(draw: Callable[..., torch.Tensor], n: int = 3, length: int = 7, first: int = 3, seed: int = 0) -> Pairs:
    """Pairs that differ in one token; one shorter than the others, so that there is padding."""
    clean = draw(n, length, seed)
    corrupt = clean.clone()
    corrupt[:, first] = draw(n, length, seed + 1)[:, first]
    last = torch.full((n,), length - 1)
    last[0] = length - 2
    return Pairs(clean, corrupt, last)


def difference(pairs: Pairs) -> LogitDifference:
    n = len(pairs)
    return LogitDifference(pairs.last, [[5 + i, 6] for i in range(n)], [[9 + i] for i in range(n)])


def near(model: Model, size: float) -> None:
    """Make tokens 20 to 29 almost the same as tokens 10 to 19."""
    weight = model.bridge.original_model.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(10, weight.shape[1], generator=generator, dtype=weight.dtype)
    weight[20:30] = weight[10:20] + size * weight[10:20].std() * noise


def near_pairs(draw: Callable[..., torch.Tensor]) -> Pairs:
    clean = 30 + draw(3, 6) % 100
    clean[:, 1], clean[:, 3] = torch.tensor([10, 11, 12]), torch.tensor([15, 16, 17])
    corrupt = clean.clone()
    corrupt[:, [1, 3]] += 10
    return Pairs(clean, corrupt, torch.tensor([5, 5, 5]))


@pytest.fixture
def barely(double) -> Callable[[str, float], Model]:
    """A family's parent with tokens that differ by a given size."""
    kept = []

    def make(family: str, size: float) -> Model:
        model = double(family)
        weight = model.bridge.original_model.get_input_embeddings().weight
        kept.append((weight, weight.detach().clone()))
        near(model, size)
        return model

    yield make  # pyright: ignore[reportReturnType]
    for weight, old in kept:
        weight.data.copy_(old)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_changes_add_up_and_every_edge_is_what_exchanging_it_does(family: str, barely, draw) -> None:
    # Where changes are small the model is linear in them: what leaves the embedding, what enters the logits and the
    # effect of the whole exchange are one number, and an edge's score is its exact effect.
    model, pairs = barely(family, 1e-3), near_pairs(draw)
    metric = difference(pairs)
    found = attribute_edges(model, pairs, metric, method="eap")
    total = float((found.clean - found.corrupt).mean())
    assert found.completeness < 5e-3
    assert float(found.scores[0].sum()) == pytest.approx(total, rel=5e-3)
    assert float(found.scores[:, -1].sum()) == pytest.approx(total, rel=5e-3)
    layout = found.layout
    edges = [(int(s), int(d)) for s, d in layout.edges.nonzero()]
    chosen = edges[:: max(1, len(edges) // 60)]
    exact = patch_edges(model, layout, pairs, metric, chosen).mean(1)
    ours = torch.stack([found.scores[edge] for edge in chosen])
    assert torch.allclose(ours, exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))
    assert float(found.scores[~layout.edges].abs().sum()) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_one_gradient_is_the_slope_of_the_edges_mask(family: str, double, draw) -> None:
    model, pairs = double(family), some_pairs(draw)
    metric = difference(pairs)
    layout = layout_of(model)
    scores = attribute_edges(model, pairs, metric, method="eap").scores
    rows = torch.arange(len(pairs))
    clean, corrupt = (written(model, layout, tokens) for tokens in (pairs.clean, pairs.corrupt))

    def at(edge: tuple[int, int], mask: float) -> float:
        """The metric with one edge carrying (1 − mask) of its clean value and mask of its counterfactual one."""
        circuit = layout.edges.clone()
        circuit[edge] = False
        logits = run_circuit(model, layout, pairs.clean, circuit, clean + mask * (corrupt - clean))
        return float(metric(logits, rows).mean())

    edges = [(int(s), int(d)) for s, d in layout.edges.nonzero()][::9]
    slopes = [(at(edge, -5e-3) - at(edge, 5e-3)) / 1e-2 for edge in edges]
    ours = [float(scores[edge]) for edge in edges]
    assert ours == pytest.approx(slopes, rel=2e-3, abs=5e-4 * max(map(abs, slopes)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_integrated_gradients_are_complete_within_two_percent(family: str, pair_of, draw) -> None:
    model, pairs = pair_of(family)[0], some_pairs(draw, n=6)
    found = attribute_edges(model, pairs, difference(pairs))
    assert found.completeness <= 0.02
    many = attribute_edges(model, pairs, difference(pairs), steps=120)
    missed = (many.input_cut - (many.clean - many.corrupt)).abs().sum() / (many.clean - many.corrupt).abs().sum()
    assert float(missed) < 1e-3


def test_steps_grow_until_completeness_holds(pair_of, draw) -> None:
    model, pairs = pair_of("llama")[0], some_pairs(draw, n=5)
    metric = difference(pairs)
    loose, tight = (attribute_edges(model, pairs, metric, tolerance=t) for t in (0.5, 1e-5))
    assert loose.steps < tight.steps and tight.completeness <= 1e-5
    assert not complete(model, pairs, metric, 1, 1e-6) and complete(model, pairs, metric, 60, 1e-2)


def test_positive_scores_support_the_behaviour(pair_of, draw) -> None:
    model, pairs = pair_of("llama")[0], some_pairs(draw)
    metric = difference(pairs)
    turned = LogitDifference(pairs.last, metric.wrong, metric.right)
    one, other = (attribute_edges(model, pairs, m, steps=12) for m in (metric, turned))
    assert torch.allclose(one.scores, -other.scores, atol=1e-6)
    swapped = attribute_edges(model, Pairs(pairs.corrupt, pairs.clean, pairs.last), metric, steps=12)
    # The path is the same line walked backwards, so differences and the total change sign.
    assert torch.allclose(one.scores, -swapped.scores, atol=1e-4)
    assert torch.allclose(one.clean - one.corrupt, swapped.corrupt - swapped.clean, atol=1e-6)
    direct = one.scores[:, -1]
    exact = patch_edges(
        model, one.layout, pairs, metric, [(row, len(one.layout.destinations) - 1) for row in range(16)]
    )
    strong = exact.mean(1).abs() > 0.05
    assert strong.any() and bool((direct[strong].sign() == exact.mean(1)[strong].sign()).all())


def test_shared_keys_and_values_are_sums_of_an_ungrouped_twins(tiny_dir, tmp_path, draw, parent) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from heredity.interp.load import load

    bare = AutoModelForCausalLM.from_pretrained(tiny_dir)
    config = copy.deepcopy(bare.config)
    config.num_key_value_heads = 4
    twin = LlamaForCausalLM(config)
    state = bare.state_dict()
    for name in [name for name in state if "k_proj" in name or "v_proj" in name]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    twin.load_state_dict(state)
    twin.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path)
    ungrouped = load(str(tmp_path))
    pairs = some_pairs(draw)
    native, repeated = (attribute_edges(m, pairs, difference(pairs), steps=8) for m in (parent, ungrouped))
    for layer, kind, group in itertools.product(range(3), "kv", range(2)):
        own = native.scores[:, native.layout.destination_index[f"attn_{kind}@{layer}.{group}"]]
        parts = [
            repeated.scores[:, repeated.layout.destination_index[f"attn_{kind}@{layer}.{2 * group + i}"]]
            for i in (0, 1)
        ]
        assert torch.allclose(own, parts[0] + parts[1], atol=1e-5)
        assert own.abs().max() > 1e-3 or layer == 0
    for layer, head in itertools.product(range(3), range(4)):
        name = f"attn_q@{layer}.{head}"
        assert torch.allclose(
            native.scores[:, native.layout.destination_index[name]],
            repeated.scores[:, repeated.layout.destination_index[name]],
            atol=1e-5,
        )


def test_scores_do_not_depend_on_batching_padding_or_the_shared_beginning(pair_of, draw, monkeypatch) -> None:
    from heredity.circuits import edges, prefix

    model, pairs = pair_of("llama")[0], some_pairs(draw, n=5)
    whole = attribute_edges(model, pairs, difference(pairs), steps=8, parts=True)
    monkeypatch.setattr(edges, "GROUP_TOKENS", 1)
    monkeypatch.setattr(edges, "PASS_TOKENS", 1)
    alone = attribute_edges(model, pairs, difference(pairs), steps=8)
    monkeypatch.setattr(prefix, "can_share", lambda model: False)
    full = attribute_edges(model, pairs, difference(pairs), steps=8, parts=True)

    def same(a: EdgeScores, b: EdgeScores) -> bool:
        return torch.allclose(a.scores, b.scores, atol=2e-6) and torch.allclose(a.input_cut, b.input_cut, atol=2e-5)

    assert same(whole, alone) and same(whole, full)
    assert whole.parts is not None and full.parts is not None and len(whole.parts) == 5
    assert torch.allclose(whole.parts, full.parts, atol=2e-5)
    assert torch.allclose(whole.parts.double().mean(0) * whole.layout.edges, whole.scores, atol=1e-6)
    assert whole.places is not None
    assert torch.allclose(whole.places.sum(1), (whole.parts[0] * whole.layout.edges).sum(1).double(), atol=1e-4)
    assert float(whole.places[:, :3].abs().sum()) == 0  # the prompts differ from position 3 on


def test_few_groups_hold_the_sums_of_many_pairs(pair_of, draw, monkeypatch) -> None:
    from heredity.circuits import edges

    model, pairs = pair_of("llama")[0], some_pairs(draw, n=5)
    every = attribute_edges(model, pairs, difference(pairs), steps=2, parts=True).parts
    monkeypatch.setattr(edges, "PER_PAIR_BYTES", 2 * 4 * layout_of(model).edges.numel())
    few = attribute_edges(model, pairs, difference(pairs), steps=2, parts=True).parts
    assert every is not None and few is not None and len(few) == 2
    assert torch.allclose(few[0], every[[0, 2, 4]].sum(0), atol=1e-5)
    assert torch.allclose(few[1], every[[1, 3]].sum(0), atol=1e-5)


def test_metrics_of_all_kinds(pair_of, draw) -> None:
    model, pairs = pair_of("gpt2")[0], some_pairs(draw)
    rows = torch.arange(len(pairs))
    with torch.no_grad():
        clean = model.logits(pairs.clean)[rows, pairs.last].log_softmax(-1)
    kl = NegativeKL(pairs.last, clean)
    once, path_ = (attribute_edges(model, pairs, kl, method=method) for method in ("eap", "eap-ig"))
    # KL is flat at the clean end, so one gradient there sees nothing (Syed et al. 2310.10348, section 3.3).
    assert float(once.scores.abs().max()) < 1e-5 and path_.completeness <= 0.02
    assert bool((path_.clean.abs() < 1e-6).all()) and bool((path_.corrupt < 0).all())
    mass = ProbabilityDifference(pairs.last, [[3, 4]] * 3, [[]] * 3)
    found = attribute_edges(model, pairs, mass)
    assert torch.allclose(found.clean, clean.exp()[:, [3, 4]].sum(1).double(), atol=1e-6)

    def at_two_places(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Any function of all logits, those before the first difference too."""
        return logits[:, 1, 7] * logits[:, -2, 8]

    own = attribute_edges(model, Pairs(pairs.clean, pairs.corrupt, torch.full((3,), 6)), at_two_places)
    assert own.completeness <= 0.02
    with torch.no_grad():
        assert torch.allclose(own.clean, at_two_places(model.logits(pairs.clean), rows).double(), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5, 12, 40])
def test_a_path_averages(steps: int) -> None:
    points = path("eap-ig", steps)
    assert sum(weight for _, weight in points) == pytest.approx(1) and all(0 < alpha < 1 for alpha, _ in points)
    assert sum(weight * alpha for alpha, weight in points) == pytest.approx(0.5)
    if steps >= 12:
        assert sum(weight * alpha**2 for alpha, weight in points) == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["olmo2", "bloom"])
def test_an_architecture_whose_edges_cannot_be_told_apart_is_refused(family: str, pair_of, draw) -> None:
    pairs = some_pairs(draw)
    with pytest.raises(ModelError, match=r"cannot be told apart|one by one"):
        attribute_edges(pair_of(family)[0], pairs, difference(pairs), method="eap")
