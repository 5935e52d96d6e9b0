"""Models with known circuits as tasks: pairs of prompts, two metrics, and which edges are the truth."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heredity.circuits.attention_changes import record_attention
from heredity.circuits.edge_patching import written
from heredity.circuits.layout import NodeLayout, layout_of
from heredity.circuits.pairs import Metric, Pairs
from heredity.circuits.reads import projection
from heredity.interp.model import Model

from . import hand_set
from .model import load
from .programs import PROGRAMS, Program

HERE = Path(__file__).parent
TRACR = ("xproportion", "reverse", "histogram", "balance", "sort")


@dataclass(frozen=True)
class Outputs:
    """How far outputs at some positions go towards those on the clean prompts, from those on the others.

    ``direction`` is [N, positions, d_out]; the sum of its products with the logits.
    """

    positions: list[int]
    direction: Tensor

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        return (logits[:, self.positions] * self.direction[rows]).sum((1, 2))


@dataclass(frozen=True)
class Divergence:
    """How far outputs are from those on the clean prompts: −Σ KL over positions, or minus the squared distance."""

    positions: list[int]
    reference: Tensor
    distribution: bool

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        own, wanted = logits[:, self.positions], self.reference[rows]
        if self.distribution:
            own, wanted = own.log_softmax(-1), wanted.log_softmax(-1)
            return -(wanted.exp() * (wanted - own)).sum((1, 2))
        return -(own - wanted).square().sum((1, 2))


@dataclass(frozen=True)
class Case:
    """One model with one task.

    Attributes:
        difference: metric whose value changes sign from clean to counterfactual.
        divergence: metric that is 0, with no gradient, on the clean prompts.
        truth: bool [sources, destinations].
        counted: bool [sources, destinations], edges that can be told by exchanging what pairs differ in.
        by_part: compare parts with parts: queries, keys and values of a head are one.
    """

    kind: str
    name: str
    model: Model
    layout: NodeLayout
    pairs: Pairs
    difference: Metric
    divergence: Metric
    truth: Tensor
    counted: Tensor
    by_part: bool


def cases(n: int, seed: int) -> Iterator[Case]:
    """All of them, ``n`` pairs each."""
    for sharpness in (10.0, 100.0):
        yield _hand_set(sharpness, n, seed)
    for name in TRACR:
        yield _tracr(name, n, seed)
    for program in PROGRAMS.values():
        yield _trained(program, n, seed)


def _hand_set(sharpness: float, n: int, seed: int) -> Case:
    model = hand_set.induction(sharpness)
    clean, corrupt = hand_set.prompts(n, torch.Generator().manual_seed(seed))
    truth = torch.zeros_like(layout_of(model).edges)
    layout = layout_of(model)
    for source, destination in hand_set.EDGES:
        truth[layout.source_index[source], layout.destination_index[destination]] = True
    return _case("hand-set", f"induction, sharpness {sharpness:g}", model, clean, corrupt, [hand_set.LENGTH - 1], truth)


def _tracr(name: str, n: int, seed: int) -> Case:
    model, about = load(HERE / f"tracr-{name}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    first, others = about["prompts"][0][0], sorted({i for row in about["prompts"] for i in row[1:]})
    length = len(about["prompts"][0])

    def draw() -> Tensor:
        if name == "sort":  # no value twice
            order = torch.rand(n, len(others), generator=generator).argsort(1)[:, : length - 1]
        else:
            order = torch.randint(len(others), (n, length - 1), generator=generator)
        return torch.cat([torch.full((n, 1), first), torch.tensor(others)[order]], 1)

    clean, corrupt = draw(), draw()
    layout, structure = layout_of(model), tracr_edges(model)
    change = (written(model, layout, clean) - written(model, layout, corrupt)).abs().amax((1, 2)) > 1e-4
    # An edge that carries only what is the same in all prompts (positions, constants) cannot be told by exchange.
    carried = torch.einsum("sm,vm->sv", change.float(), _reads(model)) > 0
    kept = structure & carried & ~_inert(model, torch.cat([clean, corrupt]))
    return _case(
        "tracr", name, model, clean, corrupt, list(range(1, length)), kept, counted=layout.edges & (kept | ~structure)
    )


def tracr_edges(model: Model) -> Tensor:
    """From who writes a place of the stream to all behind it who read that place, bool [sources, destinations]."""
    layout, inner = layout_of(model), _inner(model)
    writes = torch.zeros(len(layout.sources), layout.d_model)
    writes[0] = inner.embed.original_component.weight.abs().sum(0) + inner.position.abs().sum(0)
    for layer in range(layout.n_layers):
        rows = writes[layout.written_by(layer)]
        rows[:-1] = model.head_weights(layer)[0].abs().sum(1)
        rows[-1] = inner.blocks[layer].mlp.out.original_component.weight.abs().sum(1)
    return (torch.einsum("sm,vm->sv", (writes > 0).float(), _reads(model)) > 0) & layout.edges


def _inert(model: Model, tokens: Tensor) -> Tensor:
    """Queries and keys of heads that attend the same on all prompts, whatever they read, bool [destinations]."""
    layout = layout_of(model)
    inert = torch.zeros(len(layout.destinations), dtype=torch.bool)
    for layer, attention in enumerate(record_attention(model, tokens)):
        pattern = attention.pattern
        same = (pattern - pattern[:1]).abs().amax((0, 2, 3)) < 1e-4
        for head in same.nonzero().flatten().tolist():
            for kind in "qk":
                inert[layout.destination_index[f"attn_{kind}@{layer}.{head}"]] = True
    return inert


def _reads(model: Model) -> Tensor:
    """Which places of the stream each destination reads, 0 or 1, [destinations, d_model]."""
    layout, inner = layout_of(model), _inner(model)
    found = []
    for layer in range(layout.n_layers):
        found += [weight.abs().sum(1) for kind in "qkv" for weight in projection(model, layer, kind).weight]
        found.append(inner.blocks[layer].mlp.get_submodule("in").original_component.weight.abs().sum(0))
    found.append(inner.unembed.weight.abs().sum(0))
    return (torch.stack(found) > 0).float()


def _trained(program: Program, n: int, seed: int) -> Case:
    model, _ = load(HERE / f"siit-{program.name}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = program.draw(n, generator), program.draw(n, generator)
    layout = layout_of(model)
    truth = torch.zeros_like(layout.edges)
    for column, name in enumerate(layout.destinations):
        owner = layout.owner(name)
        part = owner if isinstance(owner, str) else owner[0]
        for row, source in enumerate(layout.sources):
            truth[row, column] = (source, part) in program.edges
    name, positions = program.name, list(program.scored)
    return _case("strict interchange", name, model, clean, corrupt, positions, truth & layout.edges, by_part=True)


def _case(
    kind: str,
    name: str,
    model: Model,
    clean: Tensor,
    corrupt: Tensor,
    positions: list[int],
    truth: Tensor,
    *,
    counted: Tensor | None = None,
    by_part: bool = False,
) -> Case:
    layout = layout_of(model)
    with torch.inference_mode():
        a, b = (model.logits(tokens)[:, positions] for tokens in (clean, corrupt))
    numbers = a.shape[-1] == 1
    direction = a - b
    if not numbers:
        direction = torch.nn.functional.one_hot(a.argmax(-1), a.shape[-1]).float()
        direction -= torch.nn.functional.one_hot(b.argmax(-1), a.shape[-1])
    last = torch.full((len(clean),), clean.shape[1] - 1)
    return Case(
        kind, name, model, layout, Pairs(clean, corrupt, last), Outputs(positions, direction.clone()),
        # tracr's outputs are values or one-hot vectors, no log-probabilities.
        Divergence(positions, a.clone(), kind != "tracr"), truth, layout.edges if counted is None else counted, by_part,
    )  # fmt: skip


def _inner(model: Model) -> Any:
    return model.bridge
