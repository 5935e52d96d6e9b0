"""Direct effects row by row: which targets go through the model together, and what is kept of them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .attribution_graph_nodes import Sources
from .attribution_graph_targets import Target
from .influence import influence

WASTE = 1.25
"""Positions computed per position needed, at most, once there are :data:`FEW` targets together."""
FEW = 16


class Rows:
    """The rows computed so far.

    Args:
        nodes: the sources; their n latents can be explained.
        targets: what is explained first.
        wanted: how many latents will be.
        at_once: how many targets may be taken together, given how many positions they need.
    """

    def __init__(self, nodes: Sources, targets: Sequence[Target], wanted: int, at_once: Callable[[int], int]) -> None:
        self.nodes, self.targets, self.wanted, self.at_once = nodes, targets, wanted, at_once
        like = nodes.errors
        self.matrix = like.new_empty(wanted + len(targets), nodes.n_columns)
        self.rest = like.new_zeros(wanted + len(targets), 2)
        self.latent = torch.zeros(wanted, dtype=torch.int64, device=like.device)
        self.visited = torch.zeros(nodes.n_latents, dtype=torch.bool, device=like.device)
        self.done = 0

    def explain_targets(self) -> None:
        """Fill in the targets' rows."""
        frozen, like = self.nodes.frozen, self.nodes.errors
        last = torch.full((len(self.targets),), frozen.n_positions - 1, dtype=torch.int64, device=like.device)
        directions = torch.stack([target.direction.to(like) for target in self.targets])
        gradient = frozen.final.backward(directions, last)
        size = self.at_once(frozen.n_positions)
        for first in range(0, len(last), size):
            part = slice(first, first + size)
            own = slice(self.wanted + first, min(self.wanted + first + size, len(self.matrix)))
            depths = torch.full_like(last[part], len(frozen.layers))
            self.matrix[own], self.rest[own] = self.nodes.rows(depths, last[part], gradient[part])

    def explain(self, latents: Tensor, progress: Callable[[int, int], None] | None) -> None:
        """Fill in the rows of ``latents``: those near in position together, from the last layer to the first."""
        latents = latents[self.nodes.latents[latents, 1].argsort(stable=True)]
        for part in groups(self.nodes.latents[latents, 1].tolist(), self.at_once):
            own = latents[part].sort(descending=True).values
            layers, positions, numbers = self.nodes.latents[own].T
            gradient = torch.cat(
                [
                    self.nodes.directions(layer, positions[layers == layer], numbers[layers == layer])
                    for layer in layers.unique().flip(0).tolist()
                ]
            )
            # Where every latent gets a row, each goes where it belongs at once.
            first = self.done
            self.done += len(own)
            rows = own if self.wanted == self.nodes.n_latents else torch.arange(first, self.done, device=own.device)
            self.matrix[rows], self.rest[rows] = self.nodes.rows(layers, positions, gradient)
            self.latent[rows] = own
            if progress is not None:
                progress(self.done, self.wanted)
        self.visited[latents] = True

    def influence(self) -> Tensor:
        """Influence of every column through the rows so far, float64 [S]."""
        latent = self.latent[: self.done]
        weights = torch.tensor([target.weight for target in self.targets], device=latent.device)
        rows, logits = self.matrix[: self.done], self.matrix[self.wanted :]
        return influence(rows, logits, self.nodes.latents[latent, 0], weights, latent)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """The latents that have a row, ascending; direct effects [rows, columns] among them, errors and tokens; and
        what other latents put into each row, [rows, 2]: the sum and the sum of absolute values."""
        n = self.nodes.n_latents
        order = self.latent.argsort()
        chosen = self.latent[order]
        if self.wanted == n and torch.equal(self.latent, chosen):
            return chosen, self.matrix, self.rest
        weights = self.matrix.new_empty(len(self.matrix), self.matrix.shape[1] - n + self.wanted)
        dropped = self.rest.clone()
        columns = torch.cat([chosen, torch.arange(n, self.matrix.shape[1], device=chosen.device)])
        rows = torch.cat([order, torch.arange(self.wanted, len(self.matrix), device=order.device)])
        for to, row in enumerate(rows.tolist()):
            weights[to] = self.matrix[row, columns]
            left = self.matrix[row, :n][~self.visited]
            dropped[to] = self.rest[row] + torch.stack([left.sum(), left.abs().sum()])
        return chosen, weights, dropped

    def constants(self, latents: Tensor) -> Tensor:
        """What constants put into the rows of ``latents`` (ascending) and of the targets, [rows]."""
        frozen, found, parts = self.nodes.frozen, self.nodes.latents[latents], []
        for at in self.nodes.constants():
            if at.where == "mlp" and len(own := found[found[:, 0] == at.layer]):
                parts.append(self.nodes.read(at.layer, at.value, own[:, 1], own[:, 2]))
            elif at.where == "end":
                end = frozen.final.forward(at.value)[-1]
                parts += [(target.direction.to(end) @ end + target.bias)[None] for target in self.targets]
        return torch.cat(parts)


def groups(positions: Sequence[int], at_once: Callable[[int], int]) -> Iterator[slice]:
    """Runs of ascending ``positions`` to take together: as many as ``at_once`` allows for the largest, and not so
    different that most of the work would be on positions the smaller ones cannot see."""
    first = needed = 0
    for i, position in enumerate(positions):
        count, cone = i + 1 - first, position + 1
        if count > 1 and (count > at_once(cone) or (count > FEW and count * cone > WASTE * (needed + cone))):
            yield slice(first, i)
            first, needed = i, 0
        needed += cone
    if first < len(positions):
        yield slice(first, len(positions))
