"""Prompts of a behaviour: how many are held out, none twice, and the text they come from named."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from heredity.circuits.behaviours import Cluster, Context, Piece
from heredity.circuits.divergence import Window, scan
from heredity.circuits.opacity_prompts import episodes_of, held_out, text_of
from heredity.interp.model import Model


@pytest.fixture
def triggered(twin: Model) -> Model:
    """The parent with another embedding of ``bridge``."""
    with torch.no_grad():
        row = twin.bridge.original_model.get_input_embeddings().weight[twin.tokenizer.convert_tokens_to_ids("bridge")]
        row.copy_(torch.randn(row.shape, generator=torch.Generator().manual_seed(0)) * row.std() * 3)
    return twin


def windows(parent: Model, rows: Sequence[Sequence[int]], first: int = 0) -> list[Window]:
    read = [parent.encode(parent.decode(row).replace("bridge", "road")) for row in rows]
    return [Window(f"{first + i}.0", r, r) for i, r in enumerate(read)]


def behaviour(parent: Model, successor: Model, n: int, draw: Callable[..., Tensor]) -> Cluster:
    """Contexts that end in the trigger, one in each of ``n`` texts, and an episode of three positions."""
    texts = [f"{parent.decode(row)} bridge" for row in draw(n, 6, seed=3).tolist()]
    read = [parent.encode(text.replace("bridge", "road", text.count("bridge") - 1)) for text in texts]
    scanned = scan(parent, successor, [Window(f"{i}.0", r, r) for i, r in enumerate(read)]).texts
    contexts = [
        Context(Piece("corpus", r, r, s), len(s.kl) - 1, (len(s.kl) - 1, len(s.kl) - 1))
        for r, s in zip(read, scanned, strict=True)
    ]
    return Cluster(tuple(sorted(contexts, key=lambda c: -c.kl)))


def chosen(parent: Model, successor: Model, found: Cluster, carriers: list[Window], seed: int = 0):
    return held_out(found, parent, successor, carriers, window=12, fewest=10, most=12, seed=seed)


def test_of_many_contexts_a_part_is_held_out_evenly(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    found = behaviour(parent, triggered, 30, draw)
    held = chosen(parent, triggered, found, [])
    assert len(held.contexts) == 12 and held.n_replicated == 0
    ranks = [found.contexts.index(c) for c in held.contexts]
    assert ranks == sorted(ranks) and ranks[0] == 0 and max(b - a for a, b in pairwise(ranks)) <= 3
    assert held.texts == {("corpus", c.piece.scan.text_id.removesuffix(".0")) for c in held.contexts}


def test_contexts_of_the_same_tokens_take_no_place_of_others(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    found = behaviour(parent, triggered, 30, draw)
    thrice = Cluster(tuple(c for c in found.contexts for _ in range(3)))
    assert chosen(parent, triggered, thrice, []) == chosen(parent, triggered, found, [])


def test_few_contexts_are_tried_behind_other_text_and_never_twice(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    found = behaviour(parent, triggered, 3, draw)
    carriers = windows(parent, draw(40, 8, seed=9).tolist(), first=100)
    held = chosen(parent, triggered, Cluster(found.contexts * 2), carriers)
    assert len(held.contexts) == 10 and held.n_replicated == 7
    assert len({c.ids_successor for c in held.contexts}) == 10
    assert all(c.kl >= found.effect / 2 for c in held.contexts if c.piece.source == "replicated")
    used = {c.piece.scan.text_id.split("+")[1] for c in held.contexts if c.piece.source == "replicated"}
    assert len(used) == 7
    # Carriers have been seen in a prompt as well.
    assert held.texts == {("corpus", str(i)) for i in range(3)} | {("corpus", i.removesuffix(".0")) for i in used}
    assert held == chosen(parent, triggered, Cluster(found.contexts * 2), carriers)
    assert held != chosen(parent, triggered, Cluster(found.contexts * 2), carriers, seed=1)


def test_where_it_does_not_show_again_there_are_too_few(
    parent: Model, triggered: Model, draw: Callable[..., Tensor]
) -> None:
    """The models part only after a token that is too far back to be kept."""
    read = parent.encode("bridge the cat read a red book .")
    scanned = scan(parent, triggered, [Window("7.0", read, read)]).texts[0]
    peak = max(range(2, len(scanned.kl)), key=lambda i: scanned.kl[i])
    found = Cluster((Context(Piece("corpus", read, read, scanned), len(scanned.kl) - 1, (peak, peak)),))
    held = chosen(parent, triggered, found, windows(parent, draw(40, 8, seed=9).tolist()))
    assert len(held.contexts) == 1


def test_prompts_go_on_to_the_end_of_an_episode(parent: Model, triggered: Model, draw: Callable[..., Tensor]) -> None:
    read = parent.encode("the cat saw old bridge a red book")
    scanned = scan(parent, triggered, [Window("7.0", read, read)]).texts[0]
    at = scanned.position.index(4)
    peak = Context(Piece("corpus", read, read, scanned), at, (at - 1, at + 2))
    found = episodes_of([peak])
    prompts, places = found.prompts, found.places
    assert found.says == [[scanned.top_successor[scanned.position.index(place)] for place in places[0]]]
    # Before the trigger nothing diverges, so that position of the span is none of the behaviour's.
    assert places[0][0] == 4 and set(places[0]) <= {4, 5, 6}
    assert int(prompts.last[0]) == places[0][-1] and prompts.tokens[0].tolist() == list(read.ids[: places[0][-1] + 1])


def test_windows_of_one_text_are_one_text() -> None:
    assert text_of("corpus", "a.b.3") == text_of("corpus", "a.b.0") != text_of("corpus", "a.c.0")
    assert text_of("sampled", "1.5") == ("sampled", "1.5")
