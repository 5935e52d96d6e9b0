"""Which mechanism of the successor is which of the parent: heads, MLPs or latents, matched one to one or not at all.

Three ways, one answer (:class:`Matching`):

* ``identity``: the same parameters correspond, so the same node does;
* ``function``: nodes of whatever two architectures are alike as far as they do the same on the same characters. The
  similarity of two nodes is the mean of two numbers over aligned tokens: the unbiased linear CKA of what they write
  (Kornblith et al. 2019; U-centring of Székely & Rizzo 2014), which needs no common basis, and the cosine of what
  their writes add to the logits of the tokens that both models know, which needs none beside the vocabulary. The
  assignment is optimal (linear_sum_assignment), and a node may stay alone: a match must be closer than both nulls
  allow, the 95th percentile of the best similarity that any node finds when the other model reads the texts in another
  order, and the 95th percentile of the similarity of different nodes of one model;
* ``latents``: a crosscoder's latent is one concept in both models, unless :mod:`heredity.interp.dictionaries.exclusive`
  says that one model holds nothing of it and it came back in other seeds.

N aligned tokens; n_P, n_S nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from heredity.interp.align import align, same_vocabulary, shared_vocabulary
from heredity.interp.model import Encoded, Model, pad
from heredity.interp.readout import unembedding

from .components import Node, node_sites, nodes_of
from .weights import comparable
from .writes import head_writes, mlp_write

if TYPE_CHECKING:
    from heredity.interp.dictionaries.exclusive import Exclusives, Stability

Way = Literal["identity", "function", "latents"]

TOKENS = 256
"""Aligned tokens that similarity is taken over: the N × N Gram matrices of all nodes are held at once."""

QUANTILE = 0.95
"""Of both nulls."""


@dataclass(frozen=True)
class Match:
    """A mechanism of the parent and one of the successor that do the same.

    Attributes:
        parent, successor: ``attn_head@L.H``, ``mlp_out@L`` or ``latent@J``.
        similarity: 1 the same, 0 unrelated; of latents, how much of the concept the weaker model holds.
    """

    parent: str
    successor: str
    similarity: float


@dataclass(frozen=True)
class Matching:
    """Matches of one pair and how they were made.

    Attributes:
        way: see the module.
        matches: in the order of the successor's computation; each mechanism at most once.
        alone_in_parent, alone_in_successor: mechanisms without a counterpart.
        threshold: the similarity a match had to reach; None where it did not have to.
    """

    way: Way
    matches: tuple[Match, ...]
    alone_in_parent: tuple[str, ...] = ()
    alone_in_successor: tuple[str, ...] = ()
    threshold: float | None = None

    @cached_property
    def _by_successor(self) -> dict[str, Match]:
        return {match.successor: match for match in self.matches}

    @cached_property
    def _by_parent(self) -> dict[str, Match]:
        return {match.parent: match for match in self.matches}

    def in_parent(self, node: str) -> Match | None:
        """The match of the successor's ``node``; None where the parent has no counterpart."""
        return self._by_successor.get(node)

    def in_successor(self, node: str) -> Match | None:
        """The match of the parent's ``node``; None where the successor has no counterpart."""
        return self._by_parent.get(node)

    def exchanged(self) -> "Matching":
        """The same matching with parent and successor exchanged."""
        turned = tuple(Match(match.successor, match.parent, match.similarity) for match in self.matches)
        return Matching(self.way, turned, self.alone_in_successor, self.alone_in_parent, self.threshold)


def match_nodes(
    parent: Model, successor: Model, texts: Sequence[str], *, way: Literal["identity", "function"] | None = None
) -> Matching:
    """Heads and MLPs of ``successor`` matched with those of ``parent``.

    Args:
        parent, successor: the pair.
        texts: ordinary text; at most :data:`TOKENS` tokens that end at the same character in both models are used.
        way: by default ``identity`` where every parameter of one model has its counterpart in the other, else
            ``function``.

    Raises:
        ValueError: no text has eight aligned tokens in all, or ``identity`` is asked of unlike models.
    """
    same = comparable(parent, successor)
    if way == "identity" and not same:
        raise ValueError("models whose parameters differ in shape cannot be matched by identity")
    return (
        by_identity(successor) if (way or "identity") == "identity" and same else by_function(parent, successor, texts)
    )


def by_identity(model: Model) -> Matching:
    """Every head and MLP matched with itself, for models whose parameters correspond; similarity 1, unmeasured."""
    return Matching("identity", tuple(Match(name, name, 1.0) for name in map(str, inner(model))))


def by_function(parent: Model, successor: Model, texts: Sequence[str]) -> Matching:
    """The ``function`` way; see the module.

    Raises:
        ValueError: fewer than eight aligned tokens.
    """
    features = Features.of(parent, successor, texts)
    similarity = features.similarity()
    threshold = max(features.shuffled(), features.within())
    pairs, alone_p, alone_s = assign(similarity, threshold)
    names_p, names_s = [str(node) for node in inner(parent)], [str(node) for node in inner(successor)]
    return Matching(
        "function",
        tuple(Match(names_p[i], names_s[j], float(similarity[i, j])) for i, j in pairs),
        tuple(names_p[i] for i in alone_p),
        tuple(names_s[j] for j in alone_s),
        threshold,
    )


def by_latents(verdicts: "Exclusives", stable: "Stability") -> Matching:
    """Latents of a crosscoder, named ``latent@J``, each its own counterpart or without one.

    Alone are those that are exclusive by verdict *and* came back over seeds; the others, undecided ones included, are
    matched, with how much the weaker model holds: the largest of the ratio of decoder norms, ν^ε and ν^r.
    """
    came_back = {each.latent for each in stable.latents if each.stable}
    matches, alone = [], {"parent-only": [], "successor-only": []}
    for each in verdicts.latents:
        name = f"latent@{each.latent}"
        if each.verdict in alone and each.latent in came_back:
            alone[each.verdict].append(name)
            continue
        held = [1 - abs(2 * each.delta_norm - 1), each.nu_error, each.nu_reconstruction]
        known = [min(max(value, 0.0), 1.0) for value in held if value == value]
        matches.append(Match(name, name, max(known, default=0.0)))
    return Matching("latents", tuple(matches), tuple(alone["parent-only"]), tuple(alone["successor-only"]))


def assign(similarity: np.ndarray, threshold: float) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """The one-to-one pairs with the largest summed excess over ``threshold``, and the rows and columns left alone.

    Args:
        similarity: [n_P, n_S].
        threshold: what a pair must exceed; staying alone counts as much.

    Returns:
        (row, column) in the order of columns; rows; columns.
    """
    from scipy.optimize import linear_sum_assignment

    # A pair below the threshold is worth nothing, which is what staying alone is worth.
    worth = np.maximum(similarity - threshold, 0.0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    pairs = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if similarity[i, j] > threshold]
    pairs.sort(key=lambda pair: pair[1])
    taken_p, taken_s = {i for i, _ in pairs}, {j for _, j in pairs}
    n_p, n_s = similarity.shape
    return pairs, [i for i in range(n_p) if i not in taken_p], [j for j in range(n_s) if j not in taken_s]


# --- functional similarity ---


def inner(model: Model) -> list[Node]:
    """Heads and MLPs of ``model``."""
    return [node for node in nodes_of(model) if node.kind in ("head", "mlp")]


@dataclass(frozen=True)
class Features:
    """What all nodes of both models do on the same tokens, in forms whose inner products are similarities.

    Attributes:
        grams: per model, U-centred Gram matrices of the nodes' centred writes, [n, N · N], of unit length.
        effects: per model, the nodes' centred effects on the shared tokens' logits in d orthonormal coordinates of its
            own, [n, N · d], of unit length.
        across: the parent's and the successor's effects in coordinates whose inner products are the cosines of the
            two, [n, N, d_P] each.
    """

    grams: tuple[Tensor, Tensor]
    effects: tuple[Tensor, Tensor]
    across: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, parent: Model, successor: Model, texts: Sequence[str]) -> "Features":
        """Run both models over ``texts``."""
        writes = [value - value.mean(1, keepdim=True) for value in aligned_writes(parent, successor, texts)]
        grams = [torch.stack([_u_centred(node @ node.T) for node in model]).flatten(1) for model in writes]
        read = []
        for model, ids in zip((parent, successor), _shared(parent, successor), strict=True):
            rows = unembedding(model)[ids].to(writes[0].dtype)
            read.append(rows - rows.mean(0))
        effects = [(w @ _root(r.T @ r)).flatten(1) for w, r in zip(writes, read, strict=True)]
        lengths = [value.norm(dim=1).clamp_min(1e-30)[:, None, None] for value in effects]
        across = (writes[0] / lengths[0], writes[1] @ (read[1].T @ read[0]) / lengths[1])
        return cls((_unit(grams[0]), _unit(grams[1])), (_unit(effects[0]), _unit(effects[1])), across)

    def similarity(self, order: Tensor | None = None) -> np.ndarray:
        """[n_P, n_S]; with ``order`` [N] the successor's tokens are taken in that order."""
        grams, effects = self.grams[1], self.across[1]
        if order is not None:
            n = len(order)
            grams = grams.reshape(-1, n, n)[:, order][:, :, order].flatten(1)
            effects = effects[:, order]
        return _mean(self.grams[0] @ grams.T, self.across[0].flatten(1) @ effects.flatten(1).T)

    def shuffled(self, draws: int = 20, seed: int = 0) -> float:
        """Quantile of the best similarity a node of the successor finds when its tokens are in another order."""
        generator = torch.Generator().manual_seed(seed)
        n = self.across[1].shape[1]
        best = [self.similarity(torch.randperm(n, generator=generator)).max(0) for _ in range(draws)]
        return float(np.quantile(np.concatenate(best), QUANTILE))

    def within(self) -> float:
        """Quantile of the similarity of different nodes of one model, of the model in which it is larger."""
        found = []
        for grams, effects in zip(self.grams, self.effects, strict=True):
            alike = _mean(grams @ grams.T, effects @ effects.T)
            others = alike[~np.eye(len(alike), dtype=bool)]
            found.append(float(np.quantile(others, QUANTILE)) if len(others) else 0.0)
        return max(found)


def aligned_writes(parent: Model, successor: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What every head and MLP of both models writes at :data:`TOKENS` aligned tokens, [n_P, N, d_P], [n_S, N, d_S].

    Raises:
        ValueError: fewer than eight aligned tokens.
    """
    read: list[tuple[Encoded, Encoded]] = []
    at: list[tuple[list[int], list[int]]] = []
    for text in texts:
        both = parent.encode(text), successor.encode(text)
        read.append(both)
        at.append(align(*both))
        if sum(len(left) for left, _ in at) >= 4 * TOKENS:
            break
    found = sum(len(left) for left, _ in at)
    if found < 8:
        raise ValueError(f"mechanisms are matched on at least 8 aligned tokens of text, not {found}")
    chosen = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:TOKENS].sort().values
    row = torch.tensor([i for i, (left, _) in enumerate(at) for _ in left])[chosen]
    out = []
    for side, model in enumerate((parent, successor)):
        # A text none of whose tokens is aligned may have no token at all, and takes up its row all the same.
        tokens, _ = pad([each[side].ids or (0,) for each in read])
        column = torch.tensor([position for each in at for position in each[side]])[chosen]
        out.append(_writes(model, tokens, row, column))
    return out[0], out[1]


def _writes(model: Model, tokens: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Every head's and MLP's write [n, N, d_model] at positions (``row``, ``column``) of ``tokens``."""
    out = []
    with torch.inference_mode():
        seen = model.capture(tokens, node_sites(model)[1:])
        for layer in range(model.shape.n_layers):
            z = seen[f"attn_z@{layer}"][row, column][None]
            out += list(head_writes(model, layer, z, range(model.shape.n_heads))[0].transpose(0, 1))
            out.append(mlp_write(model, layer, seen[f"mlp_out@{layer}"][row, column]))
    return torch.stack(out)


def _shared(parent: Model, successor: Model) -> tuple[Tensor, Tensor]:
    if same_vocabulary(parent.tokenizer, successor.tokenizer):
        ids = torch.arange(min(parent.shape.d_vocab, successor.shape.d_vocab))
        return ids, ids
    return shared_vocabulary(parent.tokenizer, successor.tokenizer)


def _u_centred(gram: Tensor) -> Tensor:
    """A Gram matrix [N, N] centred so that inner products with others are unbiased (Székely & Rizzo 2014, 3.1)."""
    n = len(gram)
    gram = gram - torch.diag(gram.diagonal())
    rows = gram.sum(0) / (n - 2)
    out = gram - rows[:, None] - rows[None, :] + gram.sum() / ((n - 1) * (n - 2))
    return out - torch.diag(out.diagonal())


def _root(matrix: Tensor) -> Tensor:
    """Symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _mean(first: Tensor, second: Tensor) -> np.ndarray:
    return ((first + second) / 2).double().numpy()
