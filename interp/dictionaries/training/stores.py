"""Training from activation stores: one, or those of several models read in step."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import StoreError
from ...store import Store
from ...stream import aligned_rows, homes, shard_texts
from ..record import Port
from .sources import BUFFER, Pieces, digest, flat

Partners = dict[int, tuple[int, Tensor]]
"""Model to the shard and rows of its store that belong to rows of the first."""


@dataclass(frozen=True)
class Stores(Pieces):
    """Activation stores as a :class:`.sources.Source`; a piece is a shard of the first.

    Attributes:
        stores: one per model.
        ports: site and model of each place.
        buffer: tokens shuffled together; part of the order.

    Raises:
        StoreError: the stores are of different texts, or do not have the site.
        TrainingError: a site has a row per head.
    """

    stores: tuple[Store, ...]
    ports: tuple[Port, ...]
    buffer: int = BUFFER

    def __post_init__(self) -> None:
        first = self.stores[0]
        for store in self.stores:
            if store.manifest.corpus != first.manifest.corpus:
                what = f"captured on other texts than {first.directory}"
                raise StoreError(what, where=str(store.directory), remedy="Capture both on one corpus.")
        for port in self.ports:
            self.stores[port.model].shard_path(port.site, 0)  # refuses what is not there
        _ = self.widths

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each place."""
        of = [(port.site, self.stores[port.model]) for port in self.ports]
        return tuple(flat(site, store.manifest.sites[site], str(store.directory)) for site, store in of)

    @property
    def digest(self) -> str:
        """Of the manifests, the places and the order."""
        return digest(*(store.manifest.model_dump_json() for store in self.stores), repr(self.ports), str(self.buffer))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each shard of the first store that have partners in all others."""
        first = self.stores[0]
        if len(self.stores) == 1:
            return tuple(first.index(shard).num_rows for shard in range(first.n_shards))
        return tuple(sum(len(rows) for rows, _ in self._matched(shard)) for shard in range(first.n_shards))

    def load(self, piece: int) -> tuple[Tensor, ...]:
        """A shard of the first store, and what belongs to it in the others."""
        own = {port: self.stores[0].read(port.site, piece) for port in self.ports if port.model == 0}
        if len(self.stores) == 1:
            return tuple(own[port] for port in self.ports)
        found = [
            torch.empty(0, width, dtype=self.stores[port.model].manifest.torch_dtype)
            for port, width in zip(self.ports, self.widths, strict=True)
        ]
        parts = [[empty] for empty in found]
        for rows, partners in self._matched(piece):
            for part, port in zip(parts, self.ports, strict=True):
                if port.model == 0:
                    part.append(own[port][rows])
                else:
                    shard, there = partners[port.model]
                    part.append(self.stores[port.model].read(port.site, shard)[there])
        return tuple(torch.cat(part) for part in parts)

    @cached_property
    def _homes(self) -> dict[int, dict[int, int]]:
        return {m: homes(store) for m, store in enumerate(self.stores) if m}

    def _matched(self, shard: int) -> Iterator[tuple[Tensor, Partners]]:
        """Rows of a shard of the first store that all others know: in one part for each combination of their shards."""
        texts = shard_texts(self.stores[0], shard)
        groups: dict[tuple[int, ...], list[int]] = {}
        for text in texts:
            there = tuple(home.get(text, -1) for home in self._homes.values())
            if min(there) >= 0:
                groups.setdefault(there, []).append(text)
        for there, members in sorted(groups.items()):
            mine = {text: texts[text] for text in members}
            pairs = {
                m: (other, *aligned_rows(mine, shard_texts(self.stores[m], other)))
                for m, other in zip(self._homes, there, strict=True)
            }
            common = set.intersection(*(set(rows.tolist()) for _, rows, _ in pairs.values()))
            kept = torch.tensor(sorted(common), dtype=torch.int64)
            # Rows come in ascending order, text by text.
            yield kept, {m: (other, b[torch.searchsorted(a.contiguous(), kept)]) for m, (other, a, b) in pairs.items()}
