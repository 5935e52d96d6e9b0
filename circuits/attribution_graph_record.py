"""An attribution graph as plain arrays, its two exact identities, and its files.

Rows of ``weights`` are what is explained: the n latents, then the logits. Columns are what explains it: the same n
latents, then error nodes, then tokens. ``weights[t, s]`` is the direct effect of s on t, signed. For every row

    Σ_s weights[t, s] + dropped[t] + constant[t] = read[t]

with ``read`` a latent's pre-activation (which is its activation: latents at zero have no node) or a logit; this is
:meth:`AttributionGraph.residuals`. Substituting latents by what explains them leaves logits as sums over the roots,
:meth:`AttributionGraph.roots`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from heredity.interp.errors import GraphError

from .influence import Pruned, Scores, influence, prune, scores

FORMAT = "heredity attribution graph 1"
_ARRAYS = ("latents", "activations", "errors", "tokens", "weights", "read", "constant", "dropped", "logit_weights")


@dataclass(frozen=True)
class Kept:
    """Which of the active latents are nodes, and what the others amount to.

    Attributes:
        active: active latents at the prompt.
        nodes: of them, nodes of the graph.
        unranked: of them, left out before effects on one another were computed, for want of memory; chosen by
            ``unranked_share``.
        unranked_share: their share of Σ |total effect| on the targets, all paths, over all active latents.
        dropped_share: share of the influence on latents that goes to those ranked and then left out.
        reason: what the limits were, in words; empty if every active latent is a node.
    """

    active: int
    nodes: int
    unranked: int = 0
    unranked_share: float = 0.0
    dropped_share: float = 0.0
    reason: str = ""


class Explained(NamedTuple):
    """What is known of a latent: when it is active, in words, and how far that is right on other texts (0 to 1)."""

    rule: str
    q: float | None = None


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """What explains some logits at a prompt (or, merged, at several).

    Attributes:
        prompt: the text.
        places: name of each position: its token; in a merged graph a role, or one name for all positions.
        n_layers: of the model.
        latents: int64 [n, 3], (layer, place, latent), ascending.
        activations: [n].
        errors: int64 [m, 2], (layer, place).
        tokens: int64 [k, 2], (token id, place); −1 for a role that different tokens take.
        logits: label of each target.
        logit_tokens: its token id, −1 where it is no single logit.
        logit_weights: [logits], with what it counts (its probability).
        weights: [n + logits, n + m + k].
        read: [n + logits].
        constant: [n + logits], what biases put there.
        dropped: [n + logits, 2], what active latents that are no nodes put there: the sum, and the sum of the absolute
            values (at least: those left out before ranking count by position).
        kept: which latents are nodes.
        provenance: model, dictionaries, prompts; JSON values only.
        explained: what the dictionaries' notes say of latents that are nodes, by (layer, latent).
    """

    prompt: str
    places: tuple[str, ...]
    n_layers: int
    latents: Tensor
    activations: Tensor
    errors: Tensor
    tokens: Tensor
    logits: tuple[str, ...]
    logit_tokens: tuple[int, ...]
    logit_weights: Tensor
    weights: Tensor
    read: Tensor
    constant: Tensor
    dropped: Tensor
    kept: Kept
    provenance: Mapping[str, Any] = field(default_factory=dict)
    explained: Mapping[tuple[int, int], Explained] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, columns = len(self.latents) + len(self.logits), len(self.latents) + len(self.errors) + len(self.tokens)
        if tuple(self.weights.shape) != (rows, columns):
            raise ValueError(f"weights must be [{rows}, {columns}], not {list(self.weights.shape)}")
        for name, shape in (
            ("latents", (len(self.latents), 3)),
            ("activations", (len(self.latents),)),
            ("errors", (len(self.errors), 2)),
            ("tokens", (len(self.tokens), 2)),
            ("logit_weights", (len(self.logits),)),
            ("read", (rows,)),
            ("constant", (rows,)),
            ("dropped", (rows, 2)),
        ):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, not {list(getattr(self, name).shape)}")

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self.latents)} latents of {self.kept.active} active, {len(self.errors)} errors, "
            f"{len(self.tokens)} tokens, {len(self.logits)} targets: {', '.join(map(repr, self.logits))})"
        )

    @property
    def n_latents(self) -> int:
        """n."""
        return len(self.latents)

    @cached_property
    def influence(self) -> Tensor:
        """Influence of each column (:func:`.influence.influence`), float64."""
        n = self.n_latents
        return influence(self.weights[:n], self.weights[n:], self.latents[:, 0], self.logit_weights)

    @cached_property
    def scores(self) -> Scores:
        """Replacement and completeness score, of the nodes of the graph."""
        return scores(self.weights, self.latents[:, 0], self.logit_weights, len(self.errors))

    def prune(self, *, nodes: float = 0.8, edges: float = 0.98) -> Pruned:
        """The nodes and edges that carry most of the influence (:func:`.influence.prune`)."""
        return prune(self.weights, self.latents[:, 0], self.logit_weights, len(self.tokens), nodes=nodes, edges=edges)

    def residuals(self) -> Tensor:
        """By how much each row misses its sum, as a share of Σ |terms|, float64 [n + logits]."""
        aside = torch.stack([self.dropped[:, 0], self.constant], 1).double()
        sums = self.weights.sum(1, dtype=torch.float64) + aside.sum(1)
        sizes = [row.abs().sum(dtype=torch.float64) for row in self.weights]
        size = torch.stack(sizes) + aside.abs().sum(1)
        return (sums - self.read.double()).abs() / size.clamp_min(1e-300)

    def effects(self) -> Tensor:
        """What each source brings to each logit over all paths, signed, float64 [logits, columns].

        For tokens and errors that is their part of :meth:`roots`; for a latent, what would go if the local replacement
        model ran without it. Latents overlap (one works through another), so their effects do not add up to a logit.
        """
        return self._flow[0]

    def roots(self) -> "Roots":
        """Each logit as an exact signed sum over tokens, errors, constants and what was dropped.

        Every latent is replaced by what its activation is made of, from the last layer to the first. Exact where
        activations equal pre-activations, so for graphs of one prompt.
        """
        flow, rest = self._flow
        n, n_errors = self.n_latents, len(self.errors)
        return Roots(flow[:, n + n_errors :], flow[:, n : n + n_errors], rest[:, 1], rest[:, 0])

    @cached_property
    def _flow(self) -> tuple[Tensor, Tensor]:
        """Effects over all paths [logits, columns], and those of what was dropped and of constants [logits, 2]."""
        n = self.n_latents
        flow = self.weights[n:].double().clone()
        rest = torch.stack([self.dropped[n:, 0], self.constant[n:]], 1).double()
        read = self.read[:n].double()
        aside = torch.stack([self.dropped[:n, 0], self.constant[:n]], 1).double()
        for layer in self.latents[:, 0].unique().flip(0).tolist():
            own = (self.latents[:, 0] == layer).nonzero()[:, 0]
            share = flow[:, own] / read[own]
            flow += share @ self.weights[own].double()
            rest += share @ aside[own]
        return flow, rest

    # --- files ---

    def save(self, directory: str | Path) -> None:
        """Write ``graph.safetensors`` and ``graph.json``, each whole or not at all.

        Raises:
            StoreError: they cannot be written.
        """
        from safetensors.torch import save_file

        from heredity.interp.store import replacing

        directory = Path(directory)
        arrays = {name: getattr(self, name).detach().cpu().contiguous() for name in _ARRAYS}
        with replacing(directory / "graph.safetensors") as partial:
            save_file(arrays, partial, {"format": FORMAT})
        said = {
            "format": FORMAT,
            "prompt": self.prompt,
            "places": list(self.places),
            "n_layers": self.n_layers,
            "logits": list(self.logits),
            "logit_tokens": list(self.logit_tokens),
            "kept": vars(self.kept),
            "provenance": dict(self.provenance),
            "explained": [[*which, *known] for which, known in self.explained.items()],
        }
        with replacing(directory / "graph.json") as partial:
            partial.write_text(json.dumps(said, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "AttributionGraph":
        """Read what :meth:`save` wrote.

        Raises:
            GraphError: the files are missing, of another format or do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            said = json.loads((directory / "graph.json").read_text(encoding="utf-8"))
            if said["format"] != FORMAT:
                raise ValueError(f"its format is {said['format']!r}")
            arrays = load_file(directory / "graph.safetensors")
            return cls(
                prompt=said["prompt"],
                places=tuple(said["places"]),
                n_layers=said["n_layers"],
                logits=tuple(said["logits"]),
                logit_tokens=tuple(said["logit_tokens"]),
                kept=Kept(**said["kept"]),
                provenance=said["provenance"],
                explained={(layer, latent): Explained(rule, q) for layer, latent, rule, q in said["explained"]},
                **{name: arrays[name] for name in _ARRAYS},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as fault:
            raise GraphError(
                f"no attribution graph can be read there ({type(fault).__name__}: {fault})",
                where=str(directory),
                remedy=f"Give a directory with graph.json and graph.safetensors of the format {FORMAT!r}.",
            ) from None


@dataclass(frozen=True, eq=False)
class Roots:
    """Logits as sums over what nothing in the graph explains, float64.

    Attributes:
        tokens: [logits, tokens].
        errors: [logits, errors].
        constants: [logits], biases of all kinds.
        dropped: [logits], active latents that are no nodes.
    """

    tokens: Tensor
    errors: Tensor
    constants: Tensor
    dropped: Tensor

    @property
    def total(self) -> Tensor:
        """The logits, [logits]."""
        return self.tokens.sum(1) + self.errors.sum(1) + self.constants + self.dropped

    def error_share(self) -> np.ndarray:
        """Signed share of errors in what tokens and errors bring, [logits]; it may lie outside 0 to 1."""
        tokens, errors = self.tokens.sum(1), self.errors.sum(1)
        return (errors / (tokens + errors)).numpy()
