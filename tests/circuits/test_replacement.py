"""The frozen model: linear, equal to the model at its prompt, and refused where a hook does not see what it uses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits import replacement
from heredity.circuits.attribution_graph_recording import recording
from heredity.circuits.replacement import FrozenLayer, check_adjoint, freeze
from heredity.circuits.writes import ENTRY
from heredity.interp.errors import ModelError
from heredity.interp.model import Model


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, pair_of: Callable[[str], tuple[Model, Model]]) -> Model:
    return pair_of(request.param)[0]


def test_the_frozen_forward_is_linear_where_the_model_is_not(model: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(1, 9)[0]
    frozen = freeze(model, tokens)
    step = torch.randn(frozen.embedded.shape, generator=torch.Generator().manual_seed(0)) * frozen.embedded.std()

    def end(change: Tensor) -> Tensor:
        return list(frozen.run(frozen.embedded + change, frozen.mlp_out.__getitem__, {}))[-1].value

    def live(change: Tensor) -> Tensor:
        seen = {}
        edits = {ENTRY: lambda value: value + change}
        for layer, out in enumerate(frozen.mlp_out):  # MLPs held, so that only attention and norms are live
            edits[f"mlp_out@{layer}"] = lambda value, out=out: out.expand_as(value)
        seen = model.capture(tokens[None], ["final"], edits=edits)
        return seen["final"][0]

    none = torch.zeros_like(step)
    assert torch.allclose(end(none), live(none), atol=1e-4)
    for run, bends in ((end, False), (live, True)):
        curvature = (run(step) + run(-step) - 2 * run(none)).norm() / run(step).sub(run(none)).norm()
        assert (curvature > 1e-2) == bends, (run, curvature)
        assert bends or curvature < 1e-5


def test_a_pattern_the_model_does_not_use_is_noticed(
    model: Model, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_off(model: Model, readers: Any) -> Any:
        wrong = {
            name: (lambda value, reader=reader: reader(value.roll(1, -1))) if "pattern" in name else reader
            for name, reader in readers.items()
        }
        return recording(model, wrong)

    monkeypatch.setattr(replacement, "recording", slightly_off)
    with pytest.raises(ModelError, match="attention pattern of layer 0"):
        freeze(model, draw(1, 6)[0])


def test_a_hook_that_sees_nothing_is_noticed(model: Model) -> None:
    name = "blocks.0.attn.hook_pattern"
    with pytest.raises(ModelError, match=f"never passes {name}"), recording(model, {name: print}):
        pass
    with pytest.raises(ModelError, match="has no nowhere"), recording(model, {"nowhere": print}):
        pass


def test_a_backward_that_is_not_the_transpose_is_noticed(
    model: Model, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze(model, draw(1, 6)[0])
    check_adjoint(frozen)
    monkeypatch.setattr(FrozenLayer, "attend_backward", lambda self, gradient: None)
    with pytest.raises(ModelError, match="transpose"):
        check_adjoint(frozen)


def test_long_patterns_in_blocks_are_the_same(
    model: Model, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze(model, draw(1, 23)[0])
    positions, gradient = torch.tensor([4, 21]), torch.randn(2, frozen.embedded.shape[1])
    whole = [g.clone() for _, g in frozen.sweep(torch.full((2,), len(frozen.layers)), positions, gradient, {})]
    monkeypatch.setattr(replacement, "BLOCK", 5)
    blocks = [g.clone() for _, g in frozen.sweep(torch.full((2,), len(frozen.layers)), positions, gradient, {})]
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    check_adjoint(frozen)


def test_patterns_on_disk_are_the_same(model: Model, draw: Callable[..., Tensor]) -> None:
    tokens = draw(1, 6)[0]
    first, second = freeze(model, tokens), freeze(model, tokens, on_disk=True)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.pattern, b.pattern)


def test_parallel_blocks_are_refused(
    pair_of: Callable[[str], tuple[Model, Model]], draw: Callable[..., Tensor]
) -> None:
    with pytest.raises(ModelError, match="read the same stream"):
        freeze(pair_of("neox")[0], draw(1, 5)[0])


def test_a_norm_the_model_does_not_use_is_noticed(
    model: Model, draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a norm returned is compared with what its recorded input gives: a value changed on the way is seen."""
    kept = model.logits_and_capture

    def shifted(self: Model, tokens: Tensor, sites: Any, positions: Tensor) -> Any:
        logits, at = kept(tokens, sites, positions=positions)
        return logits, {**at, "mlp_in@1": at["mlp_in@1"] + 0.1 * at["mlp_in@1"].roll(1, -1)}

    monkeypatch.setattr(Model, "logits_and_capture", shifted)
    with pytest.raises(ModelError, match="norm before the MLP of layer 1"):
        freeze(model, draw(1, 6)[0])
