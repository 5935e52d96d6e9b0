"""The end of a context behind other text: what is kept, and that a fluke of one context averages out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from heredity.circuits.behaviours import Cluster, Context, Piece
from heredity.circuits.divergence import Window, scan
from heredity.circuits.replicate import REPLICAS, replicate
from heredity.interp.model import Model

WINDOW = 12


@pytest.fixture
def triggered(twin: Model) -> Model:
    """The parent with another embedding of ``bridge``."""
    with torch.no_grad():
        row = twin.bridge.original_model.get_input_embeddings().weight[twin.tokenizer.convert_tokens_to_ids("bridge")]
        row.copy_(torch.randn(row.shape, generator=torch.Generator().manual_seed(0)) * row.std() * 3)
    return twin


def found_in(parent: Model, successor: Model, text: str, source: str = "corpus") -> Cluster:
    """The divergence at the last token of ``text``."""
    read = parent.encode(text)
    scanned = scan(parent, successor, [Window("7", read, read)]).texts[0]
    last = len(read.ids) - 1
    return Cluster((Context(Piece(source, read, read, scanned), last, (last, last)),))  # pyright: ignore


@pytest.fixture
def carriers(parent: Model, draw: Callable[..., Tensor]) -> list[Window]:
    texts = [parent.decode(row) for row in draw(9, 10, seed=4).tolist()]
    read = [parent.encode(text.replace("bridge", "road")) for text in texts]
    return [Window(str(i), r, r) for i, r in enumerate(read)]


def grown(parent: Model, successor: Model, found: Cluster, carriers: list[Window], seed: int = 0) -> Cluster:
    (out,) = replicate([found], parent, successor, carriers, fewest=5, from_nats=0.0, window=WINDOW, seed=seed)
    return out


@pytest.mark.parametrize("text", ["the cat saw old bridge", "bridge the cat", "bridge"])
def test_replicas_keep_the_last_tokens_also_of_a_context_shorter_than_that(
    parent: Model, triggered: Model, carriers: list[Window], text: str
) -> None:
    """A trigger may be the very first token."""
    found = found_in(parent, triggered, text)
    out = grown(parent, triggered, found, carriers)
    kept = " ".join(text.split()[-(WINDOW // 3) :])
    assert len(out.contexts) == 1 + REPLICAS and found.contexts[0] in out.contexts
    for context in out.contexts:
        assert context.piece.successor.text.endswith(kept)
        if context not in found.contexts:
            assert context.piece.source == "replicated" and len(context.ids_successor) <= WINDOW
            assert context.ids_successor[-len(kept.split()) :] == parent.encode(kept).ids
            assert context.kl > 1e-4
    assert [c.kl for c in out.contexts] == sorted((c.kl for c in out.contexts), reverse=True)


def test_a_fluke_averages_out(parent: Model, triggered: Model, carriers: list[Window]) -> None:
    """The models part only after a token that is too far back to be kept."""
    found = found_in(parent, triggered, "bridge the cat read a red book .")
    assert found.effect > 1e-4
    out = grown(parent, triggered, found, carriers)
    assert out.effect == pytest.approx(found.effect / (1 + REPLICAS), rel=1e-3, abs=1e-7)


def test_it_is_the_seed_s_and_leaves_alone_what_needs_no_replicas(
    parent: Model, triggered: Model, carriers: list[Window]
) -> None:
    found = found_in(parent, triggered, "the cat saw old bridge")
    one, two, other = (grown(parent, triggered, found, carriers, seed) for seed in (0, 0, 1))
    assert one == two != other
    often = Cluster(found.contexts * 5)
    amplified = found_in(parent, triggered, "the cat saw old bridge", "amplified")
    assert grown(parent, triggered, often, carriers) == often
    assert grown(parent, triggered, amplified, carriers) == amplified
    (weak,) = replicate(
        [found], parent, triggered, carriers, fewest=5, from_nats=found.effect + 1, window=WINDOW, seed=0
    )
    assert weak == found
