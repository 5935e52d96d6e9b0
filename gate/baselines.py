"""The read-outs that need no circuits, from what the stages measured to records."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from heredity.circuits.behaviours import Natural
from heredity.interp.model import Model

from .readouts import (
    AmplifiedSample,
    Baselines,
    Divergence,
    LayerSimilarity,
    MeanDifference,
    MinedToken,
    WeightReadout,
)
from .stages import Scanned
from .values import NotMeasured, tidy


def baselines(
    successor: Model,
    scanned: dict[Natural, Scanned],
    decoded: Sequence[dict[str, Any]],
    drifted: dict[str, Any],
    weights: list[dict[str, Any]] | None,
) -> Baselines:
    """``decoded``, ``drifted`` and ``weights`` are the plain data that the stages of those names return."""
    corpus = scanned["corpus"]
    return Baselines(
        divergence=_divergence(corpus),
        raised_tokens=_mined(corpus.raised, len(corpus.kl), successor),
        lowered_tokens=_mined(corpus.lowered, len(corpus.kl), successor),
        amplified=_amplified(scanned["amplified"], [d for d in decoded if d["amplification"] > 0 or d.get("swept")]),
        weights=NotMeasured(reason="the models have different parameters")
        if weights is None
        else tuple(WeightReadout.model_validate(_tidied(w)) for w in weights),
        mean_differences=tuple(
            MeanDifference(**{**reading, "relative_norm": tidy(reading["relative_norm"])})
            for reading in drifted["readings"]
        )
        or NotMeasured(reason="the models have different widths"),
        similarity=tuple(LayerSimilarity(site=site, cka=tidy(value)) for site, value in drifted["cka"]),
    )


def _tidied(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tidy(value) if isinstance(value, float) else value for name, value in record.items()}


def _divergence(corpus: Scanned) -> Divergence:
    kl, reverse = corpus.kl, corpus.reverse
    edges = [0.0, *(10.0**k for k in np.arange(-5, 1.51, 0.25))]
    counts, _ = np.histogram(np.clip(kl, 0, edges[-1]), bins=edges)
    return Divergence(
        texts=len(corpus.pieces),
        tokens=len(kl),
        mean=tidy(kl.mean()),
        median=tidy(np.median(kl)),
        p99=tidy(np.quantile(kl, 0.99)),
        max=tidy(kl.max()),
        mean_reverse=tidy(reverse.mean()),
        max_reverse=tidy(reverse.max()),
        histogram_edges=tuple(tidy(edge) for edge in edges),
        histogram_counts=tuple(int(count) for count in counts),
    )


def _mined(counts: dict[int, int], positions: int, model: Model) -> tuple[MinedToken, ...]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
    return tuple(
        MinedToken(token=model.decode([token]), count=count, share=tidy(count / positions)) for token, count in ranked
    )


def _amplified(scanned: Scanned, decoded: Sequence[dict[str, Any]]) -> tuple[AmplifiedSample, ...]:
    """The decoded texts over which the unamplified models disagree most."""
    samples = [
        AmplifiedSample(
            prompt=item["prompt"],
            amplification=item["amplification"],
            text=item["text"],
            kl_mean=tidy(float(np.mean(piece.scan.kl))),
            kl_max=tidy(max(piece.scan.kl)),
        )
        for item, piece in zip(decoded, scanned.pieces, strict=True)
        if piece.scan.kl
    ]
    return tuple(sorted(samples, key=lambda s: (-s.kl_mean, s.text))[:12])
