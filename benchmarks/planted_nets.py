"""Residual ReLU nets whose every hidden unit is known, with the hooks that opacity needs, for tests and benchmarks.

    x_0 = E[token],   x_{l+1} = x_l + relu(x_l W_l + b_l) V_l,   logits = x_L R

One position, no attention, float64. The transcoder with W_l as encoder and V_l as decoder is exact, so that declaring
hidden units unexplained, or taking them out of the dictionary, plants a known opacity.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heredity.circuits.pairs import Pairs
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.kernels import ReLU

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PlantedNet:
    """embedding [V, D], W [L, D, M], b [L, M], out [L, M, D], readout [D, K]."""

    embedding: Tensor
    W: Tensor
    b: Tensor
    out: Tensor
    readout: Tensor

    @property
    def n_layers(self) -> int:
        return len(self.W)

    def logits(self, tokens: Tensor, *, edits: Mapping[str, Edit] | None = None) -> Tensor:
        return self._run(tokens, edits or {}, {}) @ self.readout

    def capture(
        self, tokens: Tensor, sites: Sequence[str], *, edits: Mapping[str, Edit] | None = None
    ) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        self._run(tokens, edits or {}, seen)
        return {site: seen[site] for site in sites}

    def _run(self, tokens: Tensor, edits: Mapping[str, Edit], seen: dict[str, Tensor]) -> Tensor:
        def at(site: str, value: Tensor) -> Tensor:
            seen[site] = edits[site](value) if site in edits else value
            return seen[site]

        x = at("resid_pre@0", self.embedding[tokens])
        for layer in range(self.n_layers):
            y = at(f"mlp_in@{layer}", x)
            a = at(f"mlp_post@{layer}", torch.relu(y @ self.W[layer] + self.b[layer]))
            x = at(f"resid_post@{layer}", x + at(f"mlp_out@{layer}", a @ self.out[layer]))
        return at("final", x)


def planted(
    seed: int,
    *,
    layers: int = 4,
    width: int = 16,
    hidden: int = 32,
    tokens: int = 200,
    size: float = 1.0,
    bias: float = -0.3,
) -> PlantedNet:
    """A random net; ``size`` is how much a layer writes, ``bias`` how seldom units are active."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return PlantedNet(
        embedding=draw(tokens, width),
        W=draw(layers, width, hidden) / width**0.5,
        b=0.3 * draw(layers, hidden) + bias,
        out=size * draw(layers, hidden, width) * (2 / hidden) ** 0.5,
        readout=draw(width, 2) / width**0.5,
    )


def exact(net: PlantedNet, layer: int, units: Tensor | None = None) -> Dictionary:
    """The transcoder of a layer with all of its units, or only some [n]."""
    kept = torch.arange(net.W.shape[2]) if units is None else units
    return Dictionary(
        "transcoder",
        (Port(f"mlp_in@{layer}"),),
        (Port(f"mlp_out@{layer}"),),
        (net.W[layer][:, kept].contiguous(),),
        net.b[layer][kept].contiguous(),
        (net.out[layer][kept].contiguous(),),
        (torch.zeros(net.out.shape[2], dtype=torch.float64),),
        ReLU(),
    )


def prompts(net: PlantedNet, n: int, seed: int) -> Pairs:
    """``n`` pairs of one token each, the clean one being that of the larger :func:`difference`."""
    drawn = torch.randint(len(net.embedding), (2, n, 1), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(n)
    scores = torch.stack([difference(net.logits(tokens), rows) for tokens in drawn])
    clean = scores.argmax(0)
    return Pairs(drawn[clean, rows], drawn[1 - clean, rows], torch.zeros(n, dtype=torch.int64))


def difference(logits: Tensor, rows: Tensor) -> Tensor:
    """First logit less second, at the only position."""
    return logits[:, 0, 0] - logits[:, 0, 1]
