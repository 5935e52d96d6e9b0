"""A transformer written out edge by edge, in float64: what the estimators of edges and nodes are held against.

It takes the weights of a bed (``benchmarks/beds/model.py``) and nothing else of it. Every destination reads the sum of
what sources write plus whatever is added on single edges, so the gradient there is the gradient at the edge.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Run:
    """What one forward made: ``writes`` per source, ``patterns`` by (layer, head), and the logits."""

    logits: Tensor
    writes: list[Tensor]
    patterns: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class Plain:
    """``weights`` as the bed names them; heads of one layer share key-value heads in order."""

    weights: dict[str, Tensor]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm: str
    activation: str
    gated: bool
    rotary: bool
    causal: bool = True
    eps: float = 1e-5

    @classmethod
    def of(cls, model) -> "Plain":
        bed = model.bridge.bed
        weights = {name: value.double() for name, value in model.bridge.state_dict().items()}
        return cls(
            weights, bed.n_layers, bed.n_heads, bed.groups, bed.norm, bed.activation, bed.gated, bed.rotary, bed.causal
        )

    def run(
        self,
        tokens: Tensor,
        *,
        added: Tensor | None = None,
        replaced: Mapping[int, Tensor] = {},
        inner: Mapping[str, Tensor] = {},
        patterns: Mapping[tuple[int, int], Tensor] = {},
        rules: bool = False,
        hold_attention: bool = False,
        held_layer: int | None = None,
    ) -> Run:
        """Logits on ``tokens``.

        Args:
            tokens: [batch, pos].
            added: [sources, destinations, batch, pos, d_model] on single edges.
            replaced: what some sources write instead.
            inner: added to a query, key or value, by the destination's name.
            patterns: attention patterns instead of those computed.
            rules: relevance propagation: what is not linear held at the ratio it has.
            hold_attention: no gradient through patterns.
            held_layer: no gradient through what this layer writes.
        """
        w, made = self.weights, Run(torch.empty(0), [])
        shared = self.n_heads // self.n_kv_heads
        column = 0

        def write(value: Tensor) -> None:
            made.writes.append(replaced.get(len(made.writes), value))

        def read(sources: int) -> Tensor:
            nonlocal column
            parts = made.writes[:sources]
            x = torch.stack(parts).sum(0) if added is None else (torch.stack(parts) + added[:sources, column]).sum(0)
            column += 1
            return x

        write(w["embed.original_component.weight"][tokens] + w["position"][: tokens.shape[1]])
        for layer in range(self.n_layers):
            at = f"blocks.{layer}."
            before = len(made.writes)
            sides: dict[str, list[Tensor]] = {}
            for kind, heads in (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads)):
                weight = w[f"{at}attn.{kind}.original_component.weight"].unflatten(0, (heads, -1))
                bias = w[f"{at}attn.{kind}.original_component.bias"].unflatten(0, (heads, -1))
                sides[kind] = []
                for h in range(heads):
                    normed = self._norm(read(before), f"{at}ln1.original_component.", rules)
                    side = normed @ weight[h].T + bias[h] + inner.get(f"attn_{kind}@{layer}.{h}", 0)
                    if hold_attention and kind != "v":
                        side = side.detach()
                    sides[kind].append(self._rotate(side) if self.rotary and kind != "v" else side)
            out = w[f"{at}attn.o.original_component.weight"].unflatten(1, (self.n_heads, -1))
            for h in range(self.n_heads):
                q, k, v = sides["q"][h], sides["k"][h // shared], sides["v"][h // shared]
                scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
                if self.causal:
                    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(future, -torch.inf)
                pattern = patterns.get((layer, h), scores.softmax(-1))
                made.patterns[layer, h] = pattern
                written = pattern @ v @ out[:, h].T + w[f"{at}attn.o.original_component.bias"] / self.n_heads
                write(written.detach() if held_layer == layer else written)
            written = self._mlp(self._norm(read(len(made.writes)), f"{at}ln2.original_component.", rules), at, rules)
            write(written.detach() if held_layer == layer else written)
        final = self._norm(read(len(made.writes)), "ln_final.original_component.", rules)
        made.logits = final @ w["unembed.weight"].T + w["unembed.bias"]
        return made

    def _norm(self, x: Tensor, name: str, rules: bool) -> Tensor:
        if self.norm == "none":
            return x
        if self.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = x / (scale.detach() if rules else scale) * self.weights[name + "weight"]
        return x + self.weights[name + "bias"] if self.norm == "layer" else x

    def _mlp(self, x: Tensor, at: str, rules: bool) -> Tensor:
        w = self.weights
        u, g = (
            x @ w[f"{at}mlp.{kind}.original_component.weight"].T + w[f"{at}mlp.{kind}.original_component.bias"]
            for kind in ("in", "gate" if self.gated else "in")
        )
        z = self._act(g)
        if rules and self.gated:
            hidden = u * z.detach() / 2 + g * (z / g * u).detach() / 2
        elif rules:
            hidden = u * (z / u).detach()
        else:
            hidden = z * u if self.gated else z
        return hidden @ w[f"{at}mlp.out.original_component.weight"].T + w[f"{at}mlp.out.original_component.bias"]

    def _act(self, x: Tensor) -> Tensor:
        functions = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
        return x if self.activation == "none" else functions[self.activation](x)

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10_000.0 ** (
            -torch.arange(half, dtype=x.dtype) / half
        )
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)
