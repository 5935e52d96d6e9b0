"""The benchmark's models are what they are said to be: compiled, hand-set and trained circuits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from heredity.circuits.edges import attribute_edges

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def known() -> Any:
    """``benchmarks/beds/cases.py``, imported while its folder is on the path, which holds a ``kernels.py`` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from beds import cases  # pyright: ignore[reportMissingImports]
    return cases


def scores_of(true: torch.Tensor, false: torch.Tensor) -> float:
    return float((true[:, None] > false).double().mean())


@pytest.mark.parametrize("name", ["xproportion", "reverse", "histogram", "balance", "sort"])
def test_exported_programs_compute_what_tracr_computed(name: str, known: Any) -> None:
    model, about = known.load(known.HERE / f"tracr-{name}.safetensors")
    logits = model.logits(torch.tensor(about["prompts"]))
    torch.testing.assert_close(logits, torch.tensor(about["logits"]), rtol=1e-4, atol=1e-4)


def test_edges_read_off_a_program_are_those_of_its_variables(known: Any) -> None:
    case = known._tracr("xproportion", 16, 3)
    names = [
        (case.layout.sources[s], case.layout.destinations[d]) for s, d in case.truth.nonzero().tolist()
    ]  # fmt: skip
    assert sorted(names) == [("attn_head@1.0", "logits"), ("embed", "mlp_in@0"), ("mlp_out@0", "attn_v@1.0")]


@pytest.mark.parametrize("sharpness", [10.0, 100.0])
def test_the_hand_set_head_copies_what_followed(sharpness: float, known: Any) -> None:
    model = known.hand_set.induction(sharpness)
    for tokens in known.hand_set.prompts(100, torch.Generator().manual_seed(5)):
        before = (tokens[:, 1:-1] == tokens[:, -1:]).int().argmax(1) + 1
        answers = tokens[torch.arange(100), before + 1]
        assert torch.equal(model.logits(tokens)[:, -1].argmax(-1), answers)


@pytest.mark.parametrize("name", ["count", "induction", "seen", "shift", "sum", "change", "ioi"])
def test_trained_parts_hold_their_variables_and_others_nothing(name: str, known: Any) -> None:
    """Strict interchange on fresh prompts, by exchanging what parts write."""
    from heredity.circuits.edge_patching import written
    from heredity.circuits.layout import layout_of
    from heredity.circuits.node_patching import _edits

    program = known.PROGRAMS[name]
    model, _ = known.load(known.HERE / f"siit-{name}.safetensors")
    layout, n = layout_of(model), 200
    generator = torch.Generator().manual_seed(11)
    base, source = program.draw(n, generator), program.draw(n, generator)
    other = written(model, layout, source)
    by_part = {variable.part: variable_name for variable_name, variable in program.variables.items()}
    values = program.run(source)
    for row, part in enumerate(layout.sources[1:], 1):
        logits = model.logits(base, edits=_edits(model, layout, [[row]], other))[:, list(program.scored)]
        instead = {by_part[part]: values[by_part[part]]} if part in by_part else {}
        wanted = program.run(base, instead)[program.output][:, list(program.scored)]
        assert float((logits.argmax(-1) == wanted).double().mean()) > 0.98, part


def test_integrated_gradients_find_a_trained_circuit(known: Any) -> None:
    case = known._trained(known.PROGRAMS["count"], 12, 2)
    found = attribute_edges(case.model, case.pairs, case.divergence, steps=5).scores.abs()
    parts: dict[Any, list[int]] = {}
    for column, name in enumerate(case.layout.destinations):
        owner = case.layout.owner(name)
        parts.setdefault(owner if isinstance(owner, str) else owner[0], []).append(column)
    merged = [torch.stack([x[:, c].amax(1) for c in parts.values()], 1) for x in (found, case.truth, case.layout.edges)]
    assert scores_of(merged[0][merged[1]], merged[0][merged[2] & ~merged[1]]) > 0.95
