"""The nodes and edges of a component graph, counted once: who writes, who reads, and who comes before whom.

A **source** writes to the residual stream: the embedding, each head, each MLP. A **destination** reads from it: the
query of each head, the key and the value of each key-value head, each MLP, the logits. There is an edge from every
source to every destination behind it. Grouped-query attention is taken as it is: query heads that share a key-value
head share its two destinations.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from heredity.interp.model import Model

INPUT, LOGITS = "embed", "logits"


@dataclass(frozen=True)
class NodeLayout:
    """Order and names of sources and destinations of one architecture.

    Attributes:
        parallel: whether MLPs read what the attention of their own layer reads (GPT-NeoX), not what it wrote.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    parallel: bool = False

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Site names of the sources, in the order of the computation."""
        return (INPUT, *(name for layer in range(self.n_layers) for name in self._writes(layer)))

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the destinations: ``attn_q@L.H``, ``attn_k@L.G``, ``attn_v@L.G``, ``mlp_in@L``, ``logits``."""
        return (*(name for layer in range(self.n_layers) for name in self._reads(layer)), LOGITS)

    @cached_property
    def reach(self) -> Tensor:
        """How many sources stand before each destination, int64 [destinations]."""
        per_layer = self.n_heads + 1
        found = []
        for layer in range(self.n_layers):
            before = 1 + layer * per_layer
            found += [before] * (self.n_heads + 2 * self.n_kv_heads)
            found.append(before if self.parallel else before + self.n_heads)
        return torch.tensor([*found, len(self.sources)])

    @cached_property
    def edges(self) -> Tensor:
        """Where there is an edge, bool [sources, destinations]."""
        return torch.arange(len(self.sources))[:, None] < self.reach[None]

    @cached_property
    def source_index(self) -> dict[str, int]:
        """Row of each source."""
        return {name: i for i, name in enumerate(self.sources)}

    @cached_property
    def destination_index(self) -> dict[str, int]:
        """Column of each destination."""
        return {name: i for i, name in enumerate(self.destinations)}

    @property
    def n_edges(self) -> int:
        """Edges in all."""
        return int(self.reach.sum())

    def written_by(self, layer: int) -> slice:
        """Rows of a layer's heads, then its MLP."""
        first = self.source_index[self._writes(layer)[0]]
        return slice(first, first + self.n_heads + 1)

    def read_by_attention(self, layer: int) -> slice:
        """Columns of a layer's queries, keys and values."""
        first = self.destination_index[f"attn_q@{layer}.0"]
        return slice(first, first + self.n_heads + 2 * self.n_kv_heads)

    def read_by_mlp(self, layer: int) -> int:
        """Column of a layer's MLP."""
        return self.destination_index[f"mlp_in@{layer}"]

    def owner(self, destination: str) -> str | tuple[str, ...]:
        """The source (or, of a shared key-value head, the sources) whose value ``destination`` goes into."""
        kind, _, place = destination.partition("@")
        if kind == "mlp_in":
            return f"mlp_out@{place}"
        if kind not in ("attn_q", "attn_k", "attn_v"):
            return LOGITS
        layer, _, head = place.partition(".")
        if kind == "attn_q":
            return f"attn_head@{layer}.{head}"
        group = self.n_heads // self.n_kv_heads
        return tuple(f"attn_head@{layer}.{int(head) * group + i}" for i in range(group))

    def _writes(self, layer: int) -> list[str]:
        return [*(f"attn_head@{layer}.{h}" for h in range(self.n_heads)), f"mlp_out@{layer}"]

    def _reads(self, layer: int) -> list[str]:
        queries = [f"attn_q@{layer}.{h}" for h in range(self.n_heads)]
        shared = [f"attn_{kind}@{layer}.{g}" for kind in ("k", "v") for g in range(self.n_kv_heads)]
        return [*queries, *shared, f"mlp_in@{layer}"]


def layout_of(model: Model) -> NodeLayout:
    """The layout of a model."""
    shape = model.shape
    parallel = "blocks.0.hook_resid_mid" not in model.bridge.hook_dict
    return NodeLayout(shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.d_model, parallel)
