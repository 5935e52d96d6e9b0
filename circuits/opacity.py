"""Opacity: the share of an effect that runs through parts no explanation predicts.

The effect is the difference of a metric between a clean run and a counterfactual one. Every divided site carries an
explained and an unexplained part (:mod:`.opacity_parts`); the model is run with each from either world
(:mod:`.opacity_runs`), and the share of the unexplained parts is the Shapley value of that game
(:mod:`.opacity_estimate`). It is a share of a causal effect. Shares of the flow in a graph, such as replacement scores,
say how much of the computation a dictionary covers, whatever the behaviour (:mod:`.opacity_flow`).

The precedent for the runs: sparse feature circuits with errors removed (Marks et al. 2024, arXiv:2403.19647).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heredity.interp.errors import DictionaryError
from heredity.interp.model import Encoded, Model, pad

from .attribution import Prompts
from .opacity_estimate import FEWEST, Opacity, Refused, estimate
from .opacity_parts import Part, World
from .opacity_routing import check_patterns
from .opacity_runs import Contrast, Unexplained, recorded, two_by_two, with_others, with_routing
from .opacity_split import Split, whole_model
from .pairs import Metric, Pairs

GROUP_TOKENS = 256
"""Padded tokens in one forward."""


def opacity(
    model: Any,
    pairs: Pairs,
    metric: Metric,
    split: Split,
    *,
    counterfactual: Literal["paired", "mean"] = "paired",
    texts: Sequence[Encoded] = (),
    controls: int = 1,
    routing: bool = True,
    drawn: Sequence[Split] = (),
    models: Sequence[Any] = (),
    side: int = 0,
    fewest: int = FEWEST,
    seed: int = 0,
) -> Opacity | Refused:
    """Ω of the difference between clean and counterfactual prompts in one model.

    For a headline, divide the whole model (:func:`.opacity_split.whole_model`): sites that are left out stay live and
    count as explained, so a small circuit looks clear by what it omits. Four forwards per prompt, two more for each
    control and six for routing.

    Args:
        model: the model, a :class:`heredity.interp.Model` or whatever has its ``logits`` and ``capture``.
        pairs: at least ``fewest``, of equal length token by token.
        metric: what the behaviour is measured by.
        split: what is explained of which sites.
        counterfactual: what unexplained parts carry in the counterfactual: what they carry on the paired prompt, or
            their mean over ``texts``.
        texts: ordinary text, for means.
        controls: draws of random directions to compare with.
        routing: whether attention patterns are measured as a bucket of their own.
        drawn: the same split with q drawn from its uncertainty (:func:`.opacity_labels.redrawn`), to make intervals
            cover it.
        models: a crosscoder's models, in the order of its ports.
        side: which of them ``model`` is.
        fewest: pairs below which the estimate is refused.
        seed: of the bootstrap and the random directions.

    Raises:
        SiteError: the model lacks a site.
        DictionaryError: a dictionary does not fit, or reads a model that was not given.
        ModelError: patterns cannot be held in this architecture.
        ValueError: means asked for without text.
    """
    contrast = contrast_of_pairs(model, pairs, metric, split, models=models, side=side)
    means = None
    if counterfactual == "mean":
        means = mean_unexplained(model, texts, split, models=models, side=side)
    return measure(
        contrast, split, means=means, controls=controls, routing=routing, drawn=drawn, fewest=fewest, seed=seed
    )


def opacity_of_behaviour(
    parent: Model,
    successor: Model,
    prompts: Prompts,
    parts: Sequence[Part] = (),
    *,
    counterfactual: Tensor | None = None,
    controls: int = 1,
    routing: bool = True,
    drawn: Sequence[Sequence[Part]] = (),
    fewest: int = FEWEST,
    seed: int = 0,
) -> Opacity | Refused:
    """Ω of what the successor says and the parent does not, over all of the successor's computation.

    The metric of a run r is the part of the divergence it reaches, Σ_v p_S(v) (log p_r(v) − log p_P(v)) =
    KL(S‖P) − KL(S‖r): KL(S‖P) for the successor, 0 for the parent, and less for a run that is merely damaged.

    Between models of one architecture, the counterfactual is the parent itself on the same tokens: explained parts
    "of world 0" are the parent's own run, and unexplained parts of either model are held in the other. Every head and
    MLP that ``parts`` do not explain is opaque, so nothing that training changed in them counts as explained;
    embeddings, norms and the unembedding stay with the run they belong to. Between other models, ``counterfactual``
    must give contexts in which the behaviour does not show; heads then are transport, as within one model.

    Args:
        parent, successor: the models; a crosscoder's models 0 and 1.
        prompts: contexts, at least ``fewest``; the behaviour shows at the last position of each.
        parts: units of the successor. A dictionary of the successor is applied to the parent's activity as well.
        counterfactual: token ids of the successor without the trigger, [batch, pos], position by position.
        controls, routing, fewest, seed: as of :func:`opacity`.
        drawn: the same parts with q drawn from its uncertainty.

    Raises:
        As :func:`opacity`.
    """
    if counterfactual is None and not alike(parent, successor):
        return Refused(
            "parent and successor have other parts, and no contexts without the behaviour were given to compare with",
            len(prompts.last),
        )
    heads = counterfactual is None
    split = whole_model(successor, parts, heads=heads, side=1)
    contrast = contrast_of_models(parent, successor, prompts, split, counterfactual=counterfactual)
    others = [whole_model(successor, each, heads=heads, side=1) for each in drawn]
    return measure(contrast, split, controls=controls, routing=routing, drawn=others, fewest=fewest, seed=seed)


def without_trigger(
    prompts: Prompts, weights: Sequence[Sequence[float]], pool: Sequence[int], *, least: float = 0.25, seed: int = 0
) -> Tensor:
    """Contexts in which the behaviour should not show, for :func:`opacity_of_behaviour`: token ids [batch, pos].

    Every token whose replacement takes away a share ``least`` of the divergence or more (:func:`.marks.token_weights`)
    is replaced by one of ordinary text; where no token does, the one that takes away most.

    Args:
        prompts: N contexts.
        weights: of each context's tokens.
        pool: token ids of ordinary text to draw from.
        least: share of KL(S‖P).
        seed: of the draws.

    Raises:
        ValueError: not one weight for each token of a context.
    """
    out, generator = prompts.tokens.clone(), torch.Generator().manual_seed(seed)
    for row, (last, each) in enumerate(zip(prompts.last.tolist(), weights, strict=True)):
        if len(each) != last + 1:
            raise ValueError(f"context {row} has {last + 1} tokens and {len(each)} weights")
        need = torch.tensor(list(each), dtype=torch.float64)
        chosen = (need >= min(least, float(need.max()))).nonzero()[:, 0]
        out[row, chosen] = torch.tensor(list(pool))[torch.randint(len(pool), (len(chosen),), generator=generator)]
    return out


def measure(
    contrast: Contrast,
    split: Split,
    *,
    means: Unexplained | None = None,
    controls: int = 1,
    routing: bool = True,
    drawn: Sequence[Split] = (),
    fewest: int = FEWEST,
    seed: int = 0,
) -> Opacity | Refused:
    """Ω over any two worlds; arguments as of :func:`opacity`."""
    if len(contrast) < fewest:
        return Refused(
            f"{len(contrast)} prompts are too few: shares of single prompts vary by about half, {fewest} are needed",
            len(contrast),
        )
    outcomes, control = two_by_two(contrast, split, means=means, controls=controls, seed=seed)
    others = [two_by_two(contrast, other, means=means)[0] for other in drawn]
    routed = None
    if routing:
        for world in contrast.worlds(contrast.groups[0]):
            check_patterns(world.model)
        routed = with_routing(contrast, split)
    return estimate(
        [outcomes, *others],
        counterfactual="paired" if means is None else "mean",
        control=control,
        routed=routed,
        fewest=fewest,
        seed=seed,
    )


def contrast_of_pairs(
    model: Any, pairs: Pairs, metric: Metric, split: Split, *, models: Sequence[Any] = (), side: int = 0
) -> Contrast:
    """Clean and counterfactual prompts in one model."""

    def worlds(rows: Tensor) -> tuple[World, World]:
        group = pairs.of(rows)
        zero, one = (World(model, tokens, side) for tokens in (group.corrupt, group.clean))
        return with_others(models, zero, split), with_others(models, one, split)

    return Contrast(tuple(pairs.groups(GROUP_TOKENS)), worlds, metric)


def contrast_of_models(
    parent: Model,
    successor: Model,
    prompts: Prompts,
    split: Split,
    *,
    counterfactual: Tensor | None = None,
    places: Sequence[Sequence[int]] | None = None,
) -> Contrast:
    """The parent and the successor on the same tokens, or the successor on two kinds of tokens.

    Args:
        parent, successor, prompts, counterfactual: as of :func:`opacity_of_behaviour`.
        split: what is explained.
        places: positions of each context at which the behaviour shows, whose divergences are summed; None: the last.
    """
    tokens = prompts.tokens
    pairs = Pairs(tokens, tokens if counterfactual is None else counterfactual, prompts.last)
    both = (parent, successor)
    if counterfactual is None and split.sites(0) != split.sites(1):
        raise DictionaryError(
            "a crosscoder writes other sites of the parent than of the successor",
            where="opacity",
            remedy="Give contexts without the behaviour, or leave the crosscoder out.",
        )

    def worlds(rows: Tensor) -> tuple[World, World]:
        group = pairs.of(rows)
        other = World(successor, group.corrupt, 1) if counterfactual is not None else World(parent, group.clean, 0)
        return with_others(both, other, split), with_others(both, World(successor, group.clean, 1), split)

    return Contrast(tuple(pairs.groups(GROUP_TOKENS)), worlds, reached(parent, successor, pairs, places))


def reached(parent: Model, successor: Model, pairs: Pairs, places: Sequence[Sequence[int]] | None = None) -> Metric:
    """How much of KL(S‖P) at some positions of each clean prompt a run reaches, nats: see
    :func:`opacity_of_behaviour`.

    Args:
        parent, successor: the models.
        pairs: prompts.
        places: positions of each prompt, at least one; the last if None.
    """
    at = [[last] for last in pairs.last.tolist()] if places is None else places
    values = reached_at(parent, successor, pairs, at)
    return lambda logits, rows: torch.stack([each.sum() for each in values(logits, rows)])


@torch.no_grad()
def reached_at(
    parent: Model, successor: Model, pairs: Pairs, places: Sequence[Sequence[int]]
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The same as :func:`reached`, of each position by itself: of every prompt, float [places]."""
    at = [list(each) for each in places]
    target: list[Tensor] = [torch.empty(0)] * len(pairs)
    base: list[Tensor] = [torch.empty(0)] * len(pairs)
    for rows in pairs.groups(GROUP_TOKENS):
        group = pairs.of(rows)
        log_s, log_p = (model.logits(group.clean) for model in (successor, parent))
        size = min(log_s.shape[-1], log_p.shape[-1])
        for k, row in enumerate(rows.tolist()):
            target[row] = torch.log_softmax(log_s[k, at[row]].float(), -1)[:, :size]
            base[row] = torch.log_softmax(log_p[k, at[row]].float(), -1)[:, :size]

    def values(logits: Tensor, rows: Tensor) -> list[Tensor]:
        found = []
        for k, row in enumerate(rows.tolist()):
            own = torch.log_softmax(logits[k, at[row]].float(), -1)[:, : target[row].shape[1]]
            found.append((target[row].exp() * (own - base[row])).sum(-1))
        return found

    return values


@torch.no_grad()
def mean_unexplained(
    model: Any, texts: Sequence[Encoded], split: Split, *, models: Sequence[Any] = (), side: int = 0
) -> dict[str, Tensor]:
    """Mean of the unexplained part over the tokens of ``texts``, by site [D].

    Raises:
        ValueError: no text.
    """
    if not texts:
        raise ValueError("a mean needs texts")
    total: dict[str, Tensor] = {}
    dtype = torch.float32
    for text in texts:
        tokens, _ = pad([text.ids])
        world = with_others(models, World(model, tokens, side), split)
        _, found = recorded(world, split, lambda logits: logits)
        for site, value in found.items():
            total[site], dtype = total.get(site, 0.0) + value.double().sum((0, 1)), value.dtype
    n = sum(len(text.ids) for text in texts)
    return {site: (value / n).to(dtype) for site, value in total.items()}


def alike(parent: Model, successor: Model) -> bool:
    """Whether the two models have the same parts."""
    one, other = (vars(model.shape) | {"d_vocab": 0, "n_ctx": 0} for model in (parent, successor))
    return one == other
