"""Small programs whose every step is to stand in one part of a transformer: the truth of semi-synthetic models.

A program is a graph of variables with one value per position. Each variable is computed from others or from the tokens,
and belongs to one head or one MLP. The edges of the circuit follow: from the part of a variable to the parts of those
that are computed from it.

The first token of every prompt is 0; values are integers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = "tokens"
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Variable:
    """A step of a program.

    Attributes:
        part: ``attn_head@L.H`` or ``mlp_out@L``.
        of: what it is computed from.
        value: that computation, [batch, pos] of each to [batch, pos].
    """

    part: str
    of: tuple[str, ...]
    value: Callable[[Values], Tensor]


@dataclass(frozen=True)
class Program:
    """Variables in order, the last of which is the output.

    Attributes:
        scored: positions at which the output is asked for.
        draw: prompts, int64 [n, length].
    """

    name: str
    variables: Mapping[str, Variable]
    d_vocab: int
    d_out: int
    length: int
    n_layers: int
    scored: tuple[int, ...]
    draw: Callable[[int, torch.Generator], Tensor]
    norm: str = "none"

    @property
    def output(self) -> str:
        return list(self.variables)[-1]

    def run(self, tokens: Tensor, instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Values of all variables on ``tokens`` [batch, pos], some given."""
        values = {TOKENS: tokens}
        for name, variable in self.variables.items():
            values[name] = (instead or {}).get(name, variable.value(values))
        return values

    @property
    def edges(self) -> set[tuple[str, str]]:
        """(part, part) with ``embed`` for the tokens and ``logits`` for what reads the output."""
        parts = {TOKENS: "embed", **{name: variable.part for name, variable in self.variables.items()}}
        found = {(parts[of], variable.part) for variable in self.variables.values() for of in variable.of}
        return found | {(parts[self.output], "logits")}


def _uniform(d_vocab: int, length: int) -> Callable[[int, torch.Generator], Tensor]:
    def draw(n: int, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(1, d_vocab, (n, length), generator=generator)
        tokens[:, 0] = 0
        return tokens

    return draw


def _shifted(x: Tensor) -> Tensor:
    """The value one position before; 0 at the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def _before(x: Tensor) -> Tensor:
    """[batch, pos, pos]: where an earlier position (no first token) has the same value."""
    n = x.shape[1]
    same = (x[:, :, None] == x[:, None]) & torch.ones(n, n, dtype=torch.bool).tril(-1)
    return same & (torch.arange(n) > 0)


def _induced(v: Values) -> Tensor:
    """The token after the last earlier occurrence of the current one; 0 if there is none."""
    tokens, n = v[TOKENS], v[TOKENS].shape[1]
    # Position j follows an occurrence if what stands before it is the current token.
    match = (tokens[:, :, None] == v["previous"][:, None]) & torch.ones(n, n, dtype=torch.bool).tril()
    match &= torch.arange(n) > 1
    last = torch.where(match, torch.arange(n), -1).amax(-1)
    return torch.where(last >= 0, tokens.gather(1, last.clamp_min(0)), 0)


def _named(n: int, generator: torch.Generator) -> Tensor:
    """0, name, name, one of the two again, end: which of the two is not repeated?"""
    names = torch.rand(n, 6, generator=generator).argsort(1)[:, :2] + 1
    again = names.gather(1, torch.randint(2, (n, 1), generator=generator))
    return torch.cat([torch.zeros(n, 1, dtype=torch.int64), names, again, torch.full((n, 1), 7)], 1)


def _slot_repeated(v: Values) -> Tensor:
    """At the third name 1 or 2, the slot it stood in before; 0 elsewhere."""
    tokens = v[TOKENS]
    out = torch.zeros_like(tokens)
    out[:, 3] = torch.where(tokens[:, 3] == tokens[:, 1], 1, 2)
    return out


def _moved_to_end(v: Values) -> Tensor:
    out = torch.zeros_like(v["repeated"])
    out[:, 4] = v["repeated"][:, 3]
    return out


def _other_name(v: Values) -> Tensor:
    tokens = v[TOKENS]
    out = torch.zeros_like(tokens)
    out[:, 4] = torch.where(v["moved"][:, 4] == 1, tokens[:, 2], tokens[:, 1])
    return out


def _first(position: int) -> Callable[[Values], Tensor]:
    def value(v: Values) -> Tensor:
        out = torch.zeros_like(v[TOKENS])
        out[:, -1] = v[TOKENS][:, position]
        return out

    return value


def _count_x(v: Values) -> Tensor:
    """How many so far; a head can hold it as a mean, and the position says of how many."""
    return v["is x"].cumsum(1)


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "count",  # of x so far (tracr's frac_prevs, case 3 of InterpBench, with its numbers as classes)
            {
                "is x": Variable("mlp_out@0", (TOKENS,), lambda v: (v[TOKENS] == 1).long()),
                "mean": Variable("attn_head@1.2", ("is x",), _count_x),
                "count": Variable("mlp_out@1", ("mean",), lambda v: v["mean"]),
            },
            4, 6, 6, 2, tuple(range(1, 6)), _uniform(4, 6),
        ),
        Program(
            "shift",
            {
                "previous": Variable("attn_head@0.1", (TOKENS,), lambda v: _shifted(v[TOKENS])),
                "mapped": Variable("mlp_out@1", ("previous",), lambda v: (v["previous"] * 2 + 1) % 5),
            },
            5, 5, 6, 2, tuple(range(1, 6)), _uniform(5, 6),
        ),
        Program(
            "seen",  # the current token, told apart by whether it came before
            {
                "seen": Variable("attn_head@0.3", (TOKENS,), lambda v: _before(v[TOKENS]).any(-1).long()),
                "told": Variable("mlp_out@1", ("seen", TOKENS), lambda v: v[TOKENS] + 5 * v["seen"]),
            },
            5, 10, 6, 2, tuple(range(1, 6)), _uniform(5, 6),
        ),
        Program(
            "induction",
            {
                "previous": Variable("attn_head@0.0", (TOKENS,), lambda v: _shifted(v[TOKENS])),
                "induced": Variable("attn_head@1.3", ("previous", TOKENS), _induced),
            },
            5, 5, 7, 2, (4, 5, 6), _uniform(5, 7),
        ),
        Program(
            "sum",  # of two tokens, modulo 4, at the end
            {
                "first": Variable("attn_head@0.0", (TOKENS,), _first(1)),
                "third": Variable("attn_head@0.2", (TOKENS,), _first(3)),
                "sum": Variable("mlp_out@0", ("first", "third"), lambda v: (v["first"] + v["third"]) % 4),
            },
            5, 4, 6, 2, (5,), _uniform(5, 6),
        ),
        Program(
            "change",  # of a property of tokens from one position to the next
            {
                "odd": Variable("mlp_out@0", (TOKENS,), lambda v: v[TOKENS] % 2),
                "odd before": Variable("attn_head@1.1", ("odd",), lambda v: _shifted(v["odd"])),
                "change": Variable("mlp_out@1", ("odd", "odd before"), lambda v: v["odd"] ^ v["odd before"]),
            },
            6, 2, 6, 2, tuple(range(2, 6)), _uniform(6, 6),
        ),
        Program(
            "ioi",  # duplicate head, inhibition head, name mover
            {
                "repeated": Variable("attn_head@0.1", (TOKENS,), _slot_repeated),
                "moved": Variable("attn_head@1.2", ("repeated",), _moved_to_end),
                "name": Variable("attn_head@2.0", ("moved", TOKENS), _other_name),
            },
            8, 8, 5, 3, (4,), _named, norm="layer",
        ),
    )
}  # fmt: skip
