"""Training from models that run as the training asks for more: nothing is written to disk."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...align import align
from ...capture import by_length
from ...corpus import Corpus
from ...model import Model, pad
from ..record import Port
from .sources import BUFFER, Pieces, digest, flat

FORWARD = 2048
"""Padded tokens in one forward."""


@dataclass(frozen=True)
class Running(Pieces):
    """Models and texts as a :class:`.sources.Source`; a piece is one forward of each model.

    Attributes:
        models: one or more.
        ports: site and model of each place.
        corpus: the texts; what lies beyond a model's context is not read.
        buffer: tokens shuffled together; part of the order.

    Raises:
        SiteError: a model does not have the site.
        TrainingError: a site has a row per head.
    """

    models: tuple[Model, ...]
    ports: tuple[Port, ...]
    corpus: Corpus
    buffer: int = BUFFER

    def __post_init__(self) -> None:
        _ = self.widths

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each place."""
        found = []
        for port in self.ports:
            model = self.models[port.model]
            per_head = model.site(port.site).kind in ("attn_q", "attn_k", "attn_v", "attn_z")
            heads = [model.shape.n_heads, model.shape.d_head]
            found.append(flat(port.site, heads if per_head else [model.shape.d_model], model.spec))
        return tuple(found)

    @property
    def digest(self) -> str:
        """Of weights, texts, places and order."""
        fixed = (self.corpus.digest, repr(self.ports), str(self.buffer), str(FORWARD))
        return digest(*(model.digest for model in self.models), *fixed)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each forward that all models read."""
        return tuple(rows for _, rows in self._plan)

    @cached_property
    def _plan(self) -> list[tuple[list[int], int]]:
        """Texts of each forward, and how many rows they give. Texts are not kept encoded: spans take much memory."""
        lengths, rows = [], []
        for text in self.corpus.texts:
            positions = self._positions(text.text)
            lengths.append(len(self.models[0].encode(text.text).ids))
            rows.append(len(positions[0]))
        groups = by_length(lengths, FORWARD)
        return [(members, sum(rows[i] for i in members)) for members in groups]

    def load(self, piece: int) -> tuple[Tensor, ...]:
        """The activations of some texts."""
        texts = [self.corpus.texts[i].text for i in self._plan[piece][0]]
        positions = [self._positions(text) for text in texts]
        seen: list[dict[str, Tensor]] = []
        for m, model in enumerate(self.models):
            tokens, _ = pad([model.encode(text).ids for text in texts])
            sites = list(dict.fromkeys(port.site for port in self.ports if port.model == m))
            device = next(model.bridge.original_model.parameters()).device
            with torch.no_grad():
                captured = model.capture(tokens.to(device), sites)
            seen.append({site: value.cpu() for site, value in captured.items()})
        out = []
        for port in self.ports:
            value = seen[port.model][port.site]
            out.append(torch.cat([value[i, at[port.model]] for i, at in enumerate(positions)]))
        return tuple(out)

    def _positions(self, text: str) -> list[list[int]]:
        """Positions in each model of the tokens that all of them read."""
        first, *others = [model.encode(text) for model in self.models]
        partners = [dict(zip(*align(first, other), strict=True)) for other in others]
        mine = [i for i in range(len(first.ids)) if all(i in partner for partner in partners)]
        return [mine, *([partner[i] for i in mine] for partner in partners)]
