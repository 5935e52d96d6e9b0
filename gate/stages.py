"""The measuring stages of an audit, each a resumable step over plain data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from heredity.circuits.amplify import VAGUE_TURNS, amplified_texts, declared_prompts, vague_prompts
from heredity.circuits.behaviours import MOST_EPISODES, Cluster, Piece, Source, cluster, episodes, largest_effect
from heredity.circuits.divergence import TextScan, Window, logits_of_parent, scan
from heredity.circuits.drift import drift
from heredity.circuits.null import PERCENTILE, NullSuccessors
from heredity.circuits.replicate import replicate
from heredity.circuits.sweep import openings as openings_after
from heredity.circuits.sweep import sweep
from heredity.circuits.weights import directions
from heredity.interp.capture import batches
from heredity.interp.corpus import Corpus
from heredity.interp.model import Encoded, Model

from .budget import Budget
from .work import Work

EPISODE_NATS = 0.3
"""A position belongs to an episode from this KL on; far below what policies call material."""

REPLICATE_NATS = 1.0
"""Rare behaviours are replicated from this effect on."""

SWEPT_OPENINGS = 3
"""Openings after which words are forced."""

SWEPT_KEPT = 72
"""Forced words whose continuation is read."""

CONTINUED = 20
"""Tokens of that continuation."""

REMEMBERED = 2**29
"""Bytes of the parent's logits that are kept over all null successors; more are computed again for each."""

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""

Step = Callable[[str, Callable[[], Any]], Any]
"""Runs or recalls a named step."""


def windows(parent: Model, successor: Model, corpus: Corpus, budget: Budget, seed: int) -> list[Window]:
    """Texts drawn (seeded) until the token budget is spent; long ones as overlapping windows, each position once."""
    order = np.random.default_rng(seed).permutation(len(corpus.texts))
    out: list[Window] = []
    spent = 0
    for k in order:
        text = corpus.texts[int(k)]
        for part, (piece, overlap) in enumerate(_pieces(parent, text.text, budget.window)):
            encoded_p, encoded_s = parent.encode(piece), successor.encode(piece)
            first = sum(end <= overlap for _, end in encoded_s.spans) if overlap else 0
            if len(encoded_p.ids) < 2 or len(encoded_s.ids) <= first + 1:
                continue
            out.append(Window(f"{text.id}.{part}", encoded_p, encoded_s, first))
            spent += len(encoded_p.ids)
            if spent >= budget.scan_tokens:
                return out
    return out


def _pieces(model: Model, text: str, size: int) -> list[tuple[str, int]]:
    """``text`` as windows of at most ``size`` tokens, each with the characters it shares with the one before."""
    spans = [span for span in model.spans(text) if span[1] > span[0]]
    room = size - (len(model.spans(text)) - len(spans))
    if len(spans) <= room:
        return [(text, 0)]
    shared = room // 4
    out = []
    for start in range(0, len(spans) - shared, room - shared):
        begin = spans[start][0]
        piece = text[begin : spans[min(start + room, len(spans)) - 1][1]]
        out.append((piece, spans[start + shared - 1][1] - begin if start else 0))
    return out


@dataclasses.dataclass(frozen=True)
class Scanned:
    """Pieces with their divergence, and how often each token's logit moved most."""

    pieces: list[Piece]
    raised: dict[int, int]
    lowered: dict[int, int]

    @property
    def kl(self) -> np.ndarray:
        """KL(S‖P) of every compared position, nats."""
        return np.array([value for piece in self.pieces for value in piece.scan.kl])

    @property
    def bulk(self) -> float:
        """The percentile of KL(S‖P) by which the size of a change is measured, nats."""
        return float(np.percentile(self.kl, PERCENTILE))

    @property
    def drifted(self) -> tuple[float, float]:
        """:attr:`bulk` without the behaviours that would set it by themselves, nats; and what share they take.

        A percentile measures how far a model drifted as long as nothing new lies above it. A behaviour on more than a
        twentieth of the text is all that lies there: null successors of its size would be broken models, beside which
        no behaviour stands out, this one included. Damage is no such behaviour: it is many, each seldom.
        """
        bulk = self.bulk
        if bulk < EPISODE_NATS:
            return bulk, 0.0
        pieces = self._clustered_at_once()
        kl = np.array([value for piece in pieces for value in piece.scan.kl])
        start = np.cumsum([0, *(len(piece.scan.kl) for piece in pieces)])
        number = {id(piece): i for i, piece in enumerate(pieces)}
        left_out = np.zeros(len(kl), bool)
        for found in cluster(pieces, EPISODE_NATS):
            covered = np.zeros(len(kl), bool)
            for context in (*found.contexts, *found.weaker):
                at = start[number[id(context.piece)]]
                covered[at + context.span[0] : at + context.span[1] + 1] = True
            if covered.mean() > 1 - PERCENTILE / 100:
                left_out |= covered
        if not left_out.any():
            return bulk, 0.0
        return float(np.percentile(kl[~left_out], PERCENTILE)), float(left_out.mean())

    def _clustered_at_once(self) -> list[Piece]:
        """The first pieces (they are in random order) with no more episodes than are clustered at once."""
        out: list[Piece] = []
        held = 0
        for piece in self.pieces:
            held += len(episodes(piece, EPISODE_NATS))
            if held > MOST_EPISODES:
                break
            out.append(piece)
        return out

    def loss(self, *, of_parent: bool) -> float | None:
        """Mean −log p of the tokens that really follow compared positions, nats; None where none follows."""
        values: list[float] = []
        for piece in self.pieces:
            scan = piece.scan
            read, at, surprise = piece.successor, scan.position, scan.surprise
            if of_parent:
                read, at, surprise = piece.parent, scan.position_parent, scan.surprise_parent
            values += [value for i, value in zip(at, surprise, strict=True) if i + 1 < len(read.ids)]
        return float(np.mean(values)) if values else None

    @property
    def reverse(self) -> np.ndarray:
        """KL(P‖S) of every compared position, nats."""
        return np.array([value for piece in self.pieces for value in piece.scan.reverse])


def scan_windows(
    parent: Model,
    successor: Model,
    items: Sequence[Window],
    source: Source,
    budget: Budget,
    step: Step,
    progress: Progress,
    parent_logits: dict[int, Tensor] | None = None,
) -> Scanned:
    """Scan ``items`` in batches of similar length, one step per batch.

    ``parent_logits``, where given, remembers the parent's of each batch: for further scans of the same items.
    """
    scans: dict[int, TextScan] = {}
    counts: dict[str, dict[int, int]] = {"raised": {}, "lowered": {}}
    groups = batches([item.longer for item in items], budget.batch_tokens)
    for number, members in enumerate(groups):
        progress(f"comparing {source} text", number, len(groups))

        def compute(members: list[int] = members, number: int = number) -> Any:
            some = [items[i] for i in members]
            if parent_logits is not None and number not in parent_logits:
                parent_logits[number] = logits_of_parent(parent, some)
            found = scan(parent, successor, some, (parent_logits or {}).get(number))
            # Not asdict, whose deep copy of the columns takes as long as the forwards of a small model.
            return {**vars(found), "texts": [vars(text) for text in found.texts]}

        result = step(f"scan-{source}-{number:05d}", compute)
        for i, raw in zip(members, result["texts"], strict=True):
            scans[i] = TextScan(**raw)
        for name, totals in counts.items():
            for token, count in result[name].items():
                totals[int(token)] = totals.get(int(token), 0) + count
    progress(f"comparing {source} text", len(groups), len(groups))
    pieces = [Piece(source, item.parent, item.successor, scans[i]) for i, item in enumerate(items)]
    return Scanned(pieces, counts["raised"], counts["lowered"])


def amplified(
    parent: Model,
    successor: Model,
    openings: Sequence[Encoded],
    declared: Sequence[str],
    budget: Budget,
    step: Step,
    progress: Progress,
    seed: int,
) -> list[dict[str, Any]]:
    """Texts decoded from the successor (amplification 0) and from amplified differences, as plain data.

    Phrases that the intent declares prompt the successor too, so that a declared change is seen at work even where the
    corpus does not exercise it.
    """
    prompts = vague_prompts(parent, openings, budget.amplified, seed)
    out: list[dict[str, Any]] = []
    for k, amounts in enumerate(budget.amplifications):
        progress("decoding amplified text", k, len(budget.amplifications))

        def compute(amounts: tuple[float, ...] = amounts, k: int = k) -> Any:
            decoded = amplified_texts(
                parent, successor, prompts, amplifications=amounts, length=budget.amplified_length, seed=seed + k
            )
            return [dataclasses.asdict(item) for item in decoded]

        out += step(f"amplified-{k}", compute)
    if declared:
        asked = declared_prompts(parent, declared, max(budget.amplified // 4, 4 * len(declared)))
        length = budget.amplified_length
        out += step(
            "declared",
            lambda: [
                dataclasses.asdict(item)
                for item in amplified_texts(parent, successor, asked, amplifications=(0.0,), length=length, seed=seed)
            ],
        )
    if budget.swept:
        progress("forcing words", 0, 1)
        starts = openings_after(parent, vague_prompts(parent, openings, len(VAGUE_TURNS), seed), SWEPT_OPENINGS)
        found = step(
            "swept",
            lambda: [
                dataclasses.asdict(item)
                for item in sweep(parent, successor, starts, tried=budget.swept, kept=SWEPT_KEPT, length=CONTINUED)
            ],
        )
        out += [{**item, "swept": True} for item in found]
        progress("forcing words", 1, 1)
    progress("decoding amplified text", len(budget.amplifications), len(budget.amplifications))
    return out


def generated_windows(
    parent: Model, successor: Model, texts: Sequence[dict[str, Any]], *, from_amplified: bool
) -> list[Window]:
    """Windows over decoded texts, compared from the last prompt token on."""
    return [
        Window(str(i), parent.encode(item["text"]), successor.encode(item["text"]), item["prompt_tokens"] - 1)
        for i, item in enumerate(texts)
        if (item["amplification"] > 0 or item.get("swept", False)) == from_amplified
    ]


def behaviours_in(
    parent: Model,
    successor: Model,
    pieces: Sequence[Piece],
    carriers: Sequence[Window],
    budget: Budget,
    fewest: int,
    seed: int,
) -> list[Cluster]:
    """Behaviours among ``pieces``, rare ones replicated in other text; the same steps for the pair and its null."""
    found = cluster(pieces, EPISODE_NATS)
    if not budget.replicate:
        return found
    return replicate(
        found,
        parent,
        successor,
        carriers,
        fewest=fewest,
        from_nats=REPLICATE_NATS,
        window=budget.window,
        seed=seed,
    )


def null_effects(
    parent: Model,
    nulls: NullSuccessors,
    items: Sequence[Window],
    size: float,
    budget: Budget,
    work: Work,
    progress: Progress,
    *,
    seed: int,
    fewest: int,
) -> dict[str, Any]:
    """Scale of the null's change, and per null successor the largest behaviour-sized effect and the mean KL."""

    def compare(model: Model, some: Sequence[Window], logits: dict[int, Tensor] | None) -> Scanned:
        return scan_windows(parent, model, some, "corpus", budget, lambda _, f: f(), lambda *_: None, logits)

    few = items[: max(1, len(items) // 4)]
    size_in_memory = 4 * nulls.parent.shape.d_vocab * sum(len(item.parent.ids) for item in items)
    of_few: dict[int, Tensor] | None = {} if size_in_memory <= REMEMBERED else None
    of_items: dict[int, Tensor] | None = {} if size_in_memory <= REMEMBERED else None
    progress("null successors", 0, budget.null_draws)
    scale = work.step(
        "null-scale",
        lambda: nulls.matching_scale(lambda model: compare(model, few, of_few).bulk, size, seed * 1000),
    )
    draws = []
    for draw in range(budget.null_draws):

        def compute(draw: int = draw) -> Any:
            with nulls.draw(seed * 1000 + draw, scale) as model:
                scanned = compare(model, items, of_items)
                found = behaviours_in(nulls.parent, model, scanned.pieces, items, budget, fewest, seed)
            return {
                "largest": largest_effect(found, fewest),
                "bulk": scanned.bulk,
                "mean": float(scanned.kl.mean()),
                "max": float(scanned.kl.max()),
            }

        draws.append(work.step(f"null-{draw:03d}", compute))
        progress("null successors", draw + 1, budget.null_draws)
    return {"scale": scale, "draws": draws}


def drift_and_weights(
    parent: Model, successor: Model, items: Sequence[Window], budget: Budget, work: Work, same: bool, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """CKA and mean differences over some of ``items``; leading weight directions where the parameters correspond."""
    progress("reading drift and weights", 0, 2)

    def compute_drift() -> Any:
        few = items[: max(1, budget.drift_tokens // budget.window)]
        groups = batches([item.longer for item in few], budget.batch_tokens)
        similarity, readings = drift(
            parent, successor, [[(few[i].parent, few[i].successor) for i in group] for group in groups]
        )
        return {"cka": similarity, "readings": [dataclasses.asdict(r) for r in readings]}

    drifted = work.step("drift", compute_drift)
    progress("reading drift and weights", 1, 2)
    weights = None
    if same:
        weights = work.step("weights", lambda: [dataclasses.asdict(d) for d in directions(parent, successor, count=12)])
    progress("reading drift and weights", 2, 2)
    return drifted, weights
