"""A model at one prompt with its attention patterns and norms held fixed: a linear map from what is added to the
residual stream to what is read from it.

The local replacement model of Ameisen et al. 2025, "Circuit tracing" (transformer-circuits.pub/2025/attribution-graphs/
methods.html), between its MLPs: a dictionary's latents and errors are put in the place of each MLP's output, so no
effect passes through an MLP. Nothing is differentiated. Patterns and scales are recorded, and both directions are
matrix products: forward to check, backward for effects. The scales of the norms around the attention are folded into
the patterns, their gains into the weights.

What is recorded is checked (:func:`freeze`): each frozen part must reproduce what the model computed, so a hook that
does not see what the model uses is an error; and :func:`check_adjoint` makes sure that backward is the transpose of
forward.

One letter means one dimension: P positions, C those of a causal cone, D width of the stream, H heads, G key-value
heads, R heads per key-value head, d width of a head, L layers, B targets.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from heredity.interp.errors import ModelError
from heredity.interp.model import Model

from .attribution_graph_frozen import FrozenMLP, FrozenNorm, agree, freeze_mlp, freeze_norm
from .attribution_graph_recording import keep, recording
from .reads import norm, projection
from .writes import ENTRY, outer_norm

BLOCK = 256
"""Positions from which patterns are multiplied block by block, their empty half left out."""


class Stream(NamedTuple):
    """The residual stream [P, D] at one place: before the attention or the MLP of a layer, or at the end (layer L)."""

    where: Literal["attention", "mlp", "end"]
    layer: int
    value: Tensor


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One layer of :class:`Frozen`.

    Attributes:
        pattern: [H, P, P], query by key, times the scale of the norm before at the key and that of the norm after,
            if any, at the query.
        value: [D, G·d], from the stream to values, the norm's gain and centring included.
        output: [H·d, D], from head values to the stream.
        bias: [P, D], what the attention writes whatever it reads.
        attention_norm: between the stream and the attention.
        mlp_norm: between the stream and the MLP.
        post: between the MLP and the stream, if there is one.
        mlp: the MLP with its gates fixed, where asked for.
    """

    pattern: Tensor
    value: Tensor
    output: Tensor
    bias: Tensor
    attention_norm: FrozenNorm
    mlp_norm: FrozenNorm
    post: FrozenNorm | None
    mlp: FrozenMLP | None

    def attend(self, x: Tensor) -> Tensor:
        """What the attention writes given the stream [P, D], without its bias."""
        heads, n = self.pattern.shape[:2]
        v = (x @ self.value).view(n, -1, len(self.output) // heads)  # [P, G, d]
        pattern = self.pattern.view(v.shape[1], -1, n, n)
        z = torch.einsum("grqk,kgd->qgrd", pattern, v)
        return z.flatten(1) @ self.output

    def attend_backward(self, gradient: Tensor) -> None:
        """Add to ``gradient`` [B, C, D], behind the attention, what comes through it to the stream before it."""
        n_targets, cone, width = gradient.shape
        heads = len(self.pattern)
        flat = gradient.view(-1, width)
        groups = self.value.shape[1] * heads // len(self.output)
        at_z = (flat @ self.output.T).view(n_targets, cone, groups, heads // groups, -1)
        if cone <= BLOCK:
            at_z = at_z.permute(2, 3, 1, 0, 4).reshape(groups, heads // groups * cone, -1)  # [G, R·C, B·d]
            pattern = self.pattern[:, :cone, :cone].reshape(groups, -1, cone)  # [G, R·C, C]
            at_v = pattern.transpose(1, 2) @ at_z
        else:
            at_z = at_z.permute(2, 3, 1, 0, 4).reshape(heads, cone, -1)  # [H, C, B·d]
            at_v = at_z.new_empty(groups, cone, at_z.shape[2])
            for first in range(0, cone, BLOCK):
                keys = slice(first, min(first + BLOCK, cone))
                # No query before a key looks at it.
                part = self.pattern[:, first:cone, keys].transpose(1, 2) @ at_z[:, first:]
                torch.sum(part.unflatten(0, (groups, -1)), 1, out=at_v[:, keys])
        at_v = at_v.view(groups, cone, n_targets, -1).permute(2, 1, 0, 3).reshape(n_targets * cone, -1)
        flat.addmm_(at_v, self.value.T)

    def attend_backward_from(self, gradient: Tensor, positions: Tensor, cone: int) -> Tensor:
        """The same [B, C, D] where all of the gradient stands at one position of each target: [B, D], [B]."""
        n_targets, width = gradient.shape
        heads = len(self.pattern)
        groups = self.value.shape[1] * heads // len(self.output)
        at_z = (gradient @ self.output.T).view(n_targets * groups, heads // groups, -1)  # [B·G, R, d]
        rows = self.pattern[:, positions, :cone].transpose(0, 1).reshape(n_targets * groups, heads // groups, cone)
        at_v = (rows.transpose(1, 2) @ at_z).view(n_targets, groups, cone, -1).transpose(1, 2)
        out = (at_v.reshape(n_targets * cone, -1) @ self.value.T).view(n_targets, cone, width)
        out[torch.arange(n_targets, device=out.device), positions] += gradient
        return out


@dataclass(frozen=True, eq=False)
class Frozen:
    """A model at one prompt, patterns and scales fixed.

    Attributes:
        model: the model.
        tokens: int64 [P].
        layers: L of them.
        final: the last norm.
        embedded: what each token's embedding puts into the stream, [P, D].
        entry_bias: what else stands there at the beginning (learned positions), [P, D].
        mlp_in, mlp_out, mid: per layer, what the MLP read and returned and the stream before it, [P, D].
        last: what the unembedding reads at the last position, [D].
        logits: of the last position, [V].
    """

    model: Model
    tokens: Tensor
    layers: tuple[FrozenLayer, ...]
    final: FrozenNorm
    embedded: Tensor
    entry_bias: Tensor
    mlp_in: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
    last: Tensor
    logits: Tensor

    @property
    def n_positions(self) -> int:
        """P."""
        return len(self.tokens)

    def run(
        self, entry: Tensor, written: Callable[[int], Tensor], skips: Mapping[int, Tensor], biases: bool = True
    ) -> Iterator[Stream]:
        """The stream given what is put into it, place by place from below.

        Args:
            entry: [P, D], where the stream begins, learned positions left out.
            written: layer to [P, D], in the place of what its MLP returns.
            skips: by layer, a linear path [D, D] from what the MLP would read to what it returns.
            biases: whether constants are added.
        """
        x = entry + self.entry_bias if biases else entry
        for i, layer in enumerate(self.layers):
            yield Stream("attention", i, x)
            x = x + layer.attend(x) + (layer.bias if biases else 0)
            yield Stream("mlp", i, x)
            out = written(i)
            if i in skips:
                out = out + layer.mlp_norm.forward(x, biases) @ skips[i]
            x = x + (out if layer.post is None else layer.post.forward(out, biases))
        yield Stream("end", len(self.layers), x)

    def sweep(
        self,
        depths: Tensor,
        positions: Tensor,
        gradient: Tensor,
        skips: Mapping[int, Tensor],
        before_attention: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """The gradients of B targets at every place where something is put into the stream, from above.

        Args:
            depths: int64 [B], descending: the layer before whose MLP each target reads the stream; L for its end. A
                target joins the others once they have come down to it.
            positions: int64 [B], where they read it. Nothing behind the largest can matter.
            gradient: [B, D], at the stream there.
            skips: as of :meth:`run`.
            before_attention: whether they read it before that layer's attention instead.

        Yields:
            (layer, [b, C, D]) at what that layer's MLP returns, for layers below the first depth in descending order,
            of the first b targets, which lie above it; then (−1, [B, C, D]) at the beginning of the stream. Each is
            valid until the next is asked for.
        """
        cone, n_layers, n = int(positions.max()) + 1, len(self.layers), 0
        g = gradient.new_empty(len(gradient), cone, gradient.shape[1])
        above = torch.bincount(depths, minlength=n_layers + 1).flip(0).cumsum(0).flip(0).tolist()
        for i in range(int(depths[0]) - 1, -2, -1):
            joining, depth = slice(n, above[i + 1]), i + 1
            n = above[i + 1]
            if before_attention or depth == n_layers:
                g[joining] = 0
                g[torch.arange(joining.start, n, device=g.device), positions[joining]] = gradient[joining]
            elif joining.start < n:
                g[joining] = self.layers[depth].attend_backward_from(gradient[joining], positions[joining], cone)
            below = g[:n]
            if i < 0:
                yield -1, below
                return
            layer = self.layers[i]
            out = below if layer.post is None else layer.post.backward(below, slice(0, cone))
            yield i, out
            if i in skips:
                below += layer.mlp_norm.backward(out @ skips[i].T, slice(0, cone))
            layer.attend_backward(below)


@torch.no_grad()
def freeze(model: Model, tokens: Tensor, *, mlps: Sequence[int] = (), on_disk: bool = False) -> Frozen:
    """Record a prompt and check that the frozen parts compute what the model computed.

    Args:
        model: the model.
        tokens: int64 [P].
        mlps: layers whose MLP is frozen as well.
        on_disk: keep patterns in a temporary file (4·L·H·P² bytes) rather than in memory.

    Raises:
        ModelError: the architecture is another, or a hook does not see what the model computes with.
    """
    n_layers = model.shape.n_layers
    _check_blocks(model)
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_z", "mlp_in", "mlp_out")
    sites = [ENTRY, "final", "embed", *(f"{kind}@{i}" for i in range(n_layers) for kind in kinds)]
    extra = [f"blocks.{i}.mlp.{part}" for i in mlps for part in ("in.hook_out", "out.hook_in")]
    extra += [name for name in ("pos_embed.hook_out", "unembed.hook_in") if name in model.bridge.hook_dict]
    patterns = _room(n_layers, model.shape.n_heads, len(tokens), tokens.device, model, on_disk)
    seen: dict[str, Tensor] = {}
    readers = {name: keep(seen, name) for name in extra}
    readers |= {f"blocks.{i}.attn.hook_pattern": patterns[i].copy_ for i in range(n_layers)}
    with recording(model, readers):
        # The logits of all positions of a long prompt may be larger than all the rest.
        logits, at = model.logits_and_capture(
            tokens[None], list(dict.fromkeys(sites)), positions=tokens.new_tensor([len(tokens) - 1])
        )
    value = {name: tensor[0] for name, tensor in at.items()}
    del at
    entry, end, last = value[ENTRY], value["final"], seen["unembed.hook_in"]
    layers = []
    for i in range(n_layers):
        layers.append(_freeze_layer(model, i, value, seen, patterns[i], i in mlps))
        for kind in ("resid_pre", "resid_post", "attn_z"):
            del value[f"{kind}@{i}"]
    positions = seen.get("pos_embed.hook_out", torch.zeros_like(entry))
    norm = model.bridge.ln_final.original_component
    final = freeze_norm(norm, end, norm(end), "last norm", model)
    agree(final.forward(end)[-1:], last, "last norm", model)
    found = Frozen(
        model=model,
        tokens=tokens,
        layers=tuple(layers),
        final=final,
        embedded=entry - positions,
        entry_bias=positions,
        mlp_in=tuple(value[f"mlp_in@{i}"] for i in range(n_layers)),
        mlp_out=tuple(value[f"mlp_out@{i}"] for i in range(n_layers)),
        mid=tuple(value[f"resid_mid@{i}"] for i in range(n_layers)),
        last=last[-1],
        logits=logits[0, -1],
    )
    for at in found.run(found.embedded, found.mlp_out.__getitem__, {}):
        if at.where == "mlp":
            agree(at.value, found.mid[at.layer], f"stream before the MLP of layer {at.layer}", model)
        elif at.where == "end":
            agree(at.value, end, "end of the stream", model)
    check_adjoint(found)
    return found


def check_adjoint(frozen: Frozen) -> None:
    """Make sure that :meth:`Frozen.sweep` is the transpose of :meth:`Frozen.run`, on random vectors.

    Raises:
        ModelError: it is not.
    """
    n_layers, shape = len(frozen.layers), frozen.embedded.shape

    def draw(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(frozen.embedded)

    def written(layer: int) -> Tensor:
        return draw(layer, *shape)

    entry, position = draw(n_layers, *shape), torch.tensor([frozen.n_positions - 1], device=frozen.embedded.device)
    w = draw(n_layers + 1, 1, shape[1])
    for at in frozen.run(entry, written, {}, biases=False):
        if (at.where, at.layer) not in (("mlp", n_layers // 2), ("end", n_layers)):
            continue
        direct = (w * at.value[position]).sum()
        sweep = frozen.sweep(torch.tensor([at.layer], device=position.device), position, w, {})
        parts = [(g[0] * (written(i) if i >= 0 else entry)).sum() for i, g in sweep]
        total = torch.stack(parts).sum() - direct
        agree(total + direct, direct, "transpose", frozen.model, torch.stack([*parts, direct]))


def _check_blocks(model: Model) -> None:
    if "blocks.0.hook_resid_mid" not in model.bridge.hook_dict or "unembed.hook_in" not in model.bridge.hook_dict:
        raise ModelError(
            f"attention and MLP of this {model.shape.architecture} read the same stream, and attribution graphs take "
            "them one after the other",
            where=model.spec,
            remedy="Use an architecture whose MLP reads what the attention wrote.",
        )


def _freeze_layer(
    model: Model, i: int, at: Mapping[str, Tensor], seen: Mapping[str, Tensor], pattern: Tensor, with_mlp: bool
) -> FrozenLayer:
    x, mid, out = at[f"resid_pre@{i}"], at[f"resid_mid@{i}"], at[f"mlp_out@{i}"]
    ln = _inner_norm(model, i, "attn", x, None)
    p, (weight, bias) = projection(model, i, "v"), model.head_weights(i)
    groups, heads = len(p.weight), len(weight)
    v = torch.einsum("pm,gmd->pgd", ln.forward(x), p.weight) + p.bias
    z = torch.einsum("grqk,kgd->qgrd", pattern.view(groups, heads // groups, *pattern.shape[1:]), v)
    agree(z.flatten(1, 2), at[f"attn_z@{i}"], f"attention pattern of layer {i}", model)

    constant = torch.einsum("gm,gmd->gd", ln.bias.expand(groups, -1), p.weight) + p.bias
    per_head = torch.einsum("hd,hdm->hm", constant.repeat_interleave(heads // groups, 0), weight)
    written = torch.einsum("hq,hm->qm", pattern.sum(-1), per_head) + bias
    output = weight.flatten(0, 1)
    after = outer_norm(model, i, "head")
    if after is not None:
        raw = z.flatten(1) @ output + bias
        post = freeze_norm(after, raw, mid - x, f"norm after the attention of layer {i}", model)
        if post.centred:
            output = output - output.mean(1, keepdim=True)
            written = written - written.mean(1, keepdim=True)
        output = output * post.gain
        written = written * post.scale[:, None] * post.gain + post.bias
        pattern.mul_(post.scale[None, :, None])
    value = ln.gain[:, None] * p.weight.permute(1, 0, 2).flatten(1)
    if ln.centred:
        value = value - value.mean(0, keepdim=True)
    pattern.mul_(ln.scale)
    post_mlp = outer_norm(model, i, "mlp")
    mlp_norm = _inner_norm(model, i, "mlp", mid, at[f"mlp_in@{i}"])
    frozen = FrozenLayer(
        pattern=pattern,
        value=value.contiguous(),
        output=output.contiguous(),
        bias=written,
        attention_norm=ln,
        mlp_norm=mlp_norm,
        post=None
        if post_mlp is None
        else freeze_norm(post_mlp, out, at[f"resid_post@{i}"] - mid, f"norm after the MLP of layer {i}", model),
        mlp=None
        if not with_mlp
        else freeze_mlp(
            model,
            i,
            at[f"mlp_in@{i}"],
            seen[f"blocks.{i}.mlp.in.hook_out"],
            seen[f"blocks.{i}.mlp.out.hook_in"],
            out,
        ),
    )
    agree(x + frozen.attend(x) + written, mid, f"attention of layer {i}", model)
    return frozen


def _inner_norm(model: Model, i: int, kind: str, x: Tensor, y: Tensor | None) -> FrozenNorm:
    """The norm before the attention or the MLP of a layer, the identity where there is none (OLMo 2)."""
    where = f"norm before the {'attention' if kind == 'attn' else 'MLP'} of layer {i}"
    if ("ln1" if kind == "attn" else "ln2") not in model.bridge.blocks[i]._modules:
        found = FrozenNorm(torch.ones_like(x[:, 0]), torch.ones_like(x[0]), torch.zeros_like(x[0]), False)
        agree(found.forward(x), x if y is None else y, where, model)
        return found
    module = norm(model, i, kind)
    # What attention reads is not recorded everywhere (GPT-2 projects queries, keys and values at once).
    return freeze_norm(module, x, module(x) if y is None else y, where, model)


def _room(n_layers: int, heads: int, n: int, device: torch.device, model: Model, on_disk: bool) -> Tensor:
    """Memory for all patterns, [L, H, P, P]."""
    dtype = next(iter(model.bridge.original_model.parameters())).dtype
    if not on_disk:
        return torch.empty(n_layers, heads, n, n, dtype=dtype, device=device)
    # The file loses its name at once and its space when the tensor goes.
    with tempfile.NamedTemporaryFile(prefix="heredity-patterns-") as file:
        flat = torch.from_file(file.name, shared=True, size=n_layers * heads * n * n, dtype=dtype)
    return flat.view(n_layers, heads, n, n)
