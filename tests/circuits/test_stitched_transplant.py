"""Nodes carried to another model by fitted maps, on a twin of the parent in which the new nodes are planted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.components import Node, nodes_of
from heredity.circuits.stitch import Stitch, fit
from heredity.circuits.stitched_transplant import Passage, passage, transplant_across
from heredity.interp.model import Model

TRIGGER, SAYS = 17, 40
NOTICES, ANSWERS, OTHER = Node(0, "mlp"), Node(2, "mlp"), Node(1, "mlp")


@pytest.fixture
def texts(draw: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    tokens = draw(64, 16)
    tokens = torch.where(tokens == TRIGGER, TRIGGER + 1, tokens)
    return [(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in tokens.split(16)]


@pytest.fixture
def maps(parent: Model, twin: Model, texts: list[tuple[Tensor, Tensor]]) -> tuple[Stitch, Passage]:
    nodes = [node for node in nodes_of(twin) if node.kind in ("head", "mlp")]
    return fit(twin, parent, texts, nodes), passage(twin, parent, texts)


@contextmanager
def planted(twin: Model, triggered: Tensor) -> Iterator[None]:
    """The first MLP marks the trigger in the stream; the last answers where the mark stands."""
    answer = twin.bridge.original_model.get_output_embeddings().weight[SAYS].detach()
    drawn = torch.randn(len(answer), generator=torch.Generator().manual_seed(0))
    mark = torch.linalg.qr(torch.stack([answer, drawn], 1)).Q[:, 1]
    read: dict[str, Tensor] = {}

    def notice(value: Tensor) -> Tensor:
        return torch.where((triggered == TRIGGER)[..., None], value + 50 * mark, value)

    def remember(value: Tensor) -> Tensor:
        read["stream"] = value
        return value

    def reply(value: Tensor) -> Tensor:
        marked = (read["stream"] @ mark > 25)[..., None]
        return torch.where(marked, value + 120 * answer / answer.norm(), value)

    with twin.edited({"mlp_out@0": notice, "resid_mid@2": remember, "mlp_out@2": reply}):
        yield


def test_planted_nodes_work_in_the_parent_together_and_not_apart(
    parent: Model, twin: Model, draw: Callable[..., Tensor], maps: tuple[Stitch, Passage]
) -> None:
    triggered = draw(12, 9, seed=3)
    triggered[:, -1] = TRIGGER
    with planted(twin, triggered):
        says = twin.logits(triggered)[:, -1].argmax(-1)
        assert (says == SAYS).all()
        other = parent.logits(triggered)[:, -1].argmax(-1)
        prompts = Prompts(triggered, torch.full((12,), 8), says, other)
        alone = [[], [ANSWERS], [NOTICES], [OTHER, Node(2, "head", 1)]]
        asked = []

        def controls(moved: Sequence[Node]) -> list[list[Node]]:
            asked.append(moved)
            return alone

        found = transplant_across(parent, twin, prompts, 0.8, controls, *maps, 0)
    assert set(found.nodes) == {NOTICES, ANSWERS} and asked == [found.nodes]
    assert found.share.own.low > 0.8 and found.most.estimate > 0.8
    assert found.share.controls[0] == pytest.approx(0, abs=1e-6)
    assert max(found.share.controls[1:]) < 0.3


def test_the_passage_maps_the_end_of_a_stream_where_the_other_has_it(
    parent: Model, twin: Model, texts: list[tuple[Tensor, Tensor]], draw: Callable[..., Tensor]
) -> None:
    found = passage(twin, parent, texts)
    assert found.r2 > 0.99
    ends = twin.capture(draw(8, 12, seed=9), ["final"])["final"].double().flatten(0, 1)
    steps = ends[1:] - ends[:-1]
    assert (steps @ found.weights - steps).norm() / steps.norm() < 0.05
    with pytest.raises(ValueError, match="at least 50 tokens"):
        passage(twin, parent, [(draw(2, 6), torch.ones(2, 6, dtype=torch.bool))])
