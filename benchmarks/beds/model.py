"""A small transformer behind the same :class:`heredity.interp.model.Model` as any other, its truth known.

Compiled programs and hand-set weights have no norms, attend in both directions, read out into something else than
their input vocabulary, or need float64: no model class of transformers has all of that. This one has the hook points
and the module names that :mod:`heredity.interp.sites` and :mod:`heredity.circuits` use, and no more.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heredity.interp.model import Model


@dataclass(frozen=True)
class BedConfig:
    """Dimensions and choices.

    Attributes:
        d_out: rows of the unembedding.
        norm: before attention, MLP and unembedding.
        activation: of the MLP; ``none`` makes it linear.
        gated: whether the MLP multiplies an activated gate with a linear part.
        causal: whether positions see only what is before them.
        rotary: whether queries and keys are rotated by position.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_out: int
    n_ctx: int
    n_kv_heads: int = 0
    norm: Literal["none", "layer", "rms"] = "none"
    activation: Literal["none", "relu", "gelu", "silu"] = "relu"
    gated: bool = False
    causal: bool = True
    rotary: bool = False

    @property
    def groups(self) -> int:
        return self.n_kv_heads or self.n_heads


class HookPoint(nn.Module):
    """The identity, with functions called on what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[tuple[int | None, Any]] = []

    def add_hook(self, function: Any, level: int | None = None) -> None:
        self.hooks.append((level, function))

    def remove_hooks(self, level: int | None = None) -> None:
        self.hooks = [pair for pair in self.hooks if pair[0] != level]

    def forward(self, value: Tensor) -> Tensor:
        for _, function in list(self.hooks):
            changed = function(value, hook=self)
            value = value if changed is None else changed
        return value


class Wrapped(nn.Module):
    """A module between two hook points."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_component = module
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.original_component(self.hook_in(x)))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight


def _norm(config: BedConfig) -> Wrapped:
    kinds = {"none": nn.Identity, "layer": nn.LayerNorm, "rms": RMSNorm}
    return Wrapped(kinds[config.norm](config.d_model))


class Attention(nn.Module):
    def __init__(self, config: BedConfig) -> None:
        super().__init__()
        self.config = config
        width, heads, groups, d = config.d_model, config.n_heads, config.groups, config.d_head
        self.q, self.k, self.v = Heads(width, heads, d), Heads(width, groups, d), Heads(width, groups, d)
        self.o = Wrapped(nn.Linear(heads * d, width))
        self.hook_pattern, self.hook_attn_scores, self.hook_out = HookPoint(), HookPoint(), HookPoint()
        self.o.hook_in = HookPoint()
        if config.rotary:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)
        if config.rotary:
            q, k = self.hook_rot_q(_rotated(q)), self.hook_rot_k(_rotated(k))
        k, v = (side.repeat_interleave(config.n_heads // config.groups, 2) for side in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * config.d_head**-0.5
        if config.causal:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(-1))
        z = self.o.hook_in(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return self.hook_out(self.o.original_component(z.flatten(2)))


class Heads(nn.Module):
    """A linear layer whose output is taken apart by head."""

    def __init__(self, width: int, heads: int, d_head: int) -> None:
        super().__init__()
        self.original_component = nn.Linear(width, heads * d_head)
        self.heads, self.hook_out = heads, HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.original_component(x).unflatten(-1, (self.heads, -1)))


class MLP(nn.Module):
    def __init__(self, config: BedConfig) -> None:
        super().__init__()
        self.hook_in, self.hook_out = HookPoint(), HookPoint()
        self.act = {"none": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[config.activation]
        self.add_module("in", Wrapped(nn.Linear(config.d_model, config.d_mlp)))
        if config.gated:
            self.gate = Wrapped(nn.Linear(config.d_model, config.d_mlp))
        self.gated = config.gated
        self.out = Wrapped(nn.Linear(config.d_mlp, config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_in(x)
        u = self.get_submodule("in")(x)
        return self.hook_out(self.out(self.act(self.gate(x)) * u if self.gated else self.act(u)))


class Block(nn.Module):
    def __init__(self, config: BedConfig) -> None:
        super().__init__()
        self.ln1, self.ln2 = _norm(config), _norm(config)
        self.attn, self.mlp = Attention(config), MLP(config)
        self.hook_in, self.hook_resid_mid, self.hook_out = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_in(x)
        x = x + self.attn(self.ln1(x))
        return self.hook_out(x + self.mlp(self.ln2(self.hook_resid_mid(x))))


class Transformer(nn.Module):
    """What :class:`~heredity.interp.model.Model` takes for a bridge and for the model behind it."""

    def __init__(self, config: BedConfig) -> None:
        super().__init__()
        self.bed = config
        self.embed = Wrapped(nn.Embedding(config.d_vocab, config.d_model))
        self.position = nn.Parameter(torch.zeros(config.n_ctx, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = _norm(config)
        self.unembed = nn.Linear(config.d_model, config.d_out)
        self.cfg = SimpleNamespace(
            n_layers=config.n_layers, n_heads=config.n_heads, n_key_value_heads=config.groups,
            d_model=config.d_model, d_head=config.d_head, n_ctx=config.n_ctx,
        )  # fmt: skip
        self.config = SimpleNamespace()
        self.hook_dict = {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}

    @property
    def original_model(self) -> "Transformer":
        return self

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembed

    def forward(self, tokens: Tensor, past_key_values: None = None, use_cache: bool = False) -> SimpleNamespace:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.unembed(self.ln_final(x)))


def _rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [batch, pos, head, d], halves rotated against each other."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * rate
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    return torch.cat([turned, x[..., 2 * half :]], -1)


def bed(config: BedConfig, *, seed: int | None = None, scale: float = 0.3, dtype: torch.dtype = torch.float32) -> Model:
    """A model of that shape with all weights 0, or normal with standard deviation ``scale`` if there is a ``seed``."""
    inner = Transformer(config).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed or 0)
    for name, value in inner.named_parameters():
        if "ln" in name and name.endswith("weight"):
            value.fill_(1)
        elif seed is None:
            value.zero_()
        if seed is not None:
            noise = scale * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)
            value.copy_(value + noise if "ln" in name else noise)
    return wrap(inner)


def wrap(inner: Transformer) -> Model:
    """The model around such a transformer."""
    model = Model(inner, None, spec="bed", digest="", floor=0.0)  # pyright: ignore[reportArgumentType]
    # Otherwise taken from the unembedding, which here may have other rows than the embedding.
    model.shape = replace(model.shape, d_vocab=inner.bed.d_vocab)
    return model


def save(model: Model, path: Path, about: dict[str, Any]) -> None:
    """Weights to a safetensors file with the shape and ``about`` in its header."""
    from safetensors.torch import save_file

    inner: Any = model.bridge
    tensors = {name: value.contiguous() for name, value in inner.state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(asdict(inner.bed)), "about": json.dumps(about)})


def load(path: Path) -> tuple[Model, dict[str, Any]]:
    """What :func:`save` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
        inner = Transformer(BedConfig(**json.loads(meta["config"])))
        inner.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return wrap(inner.requires_grad_(False).eval()), json.loads(meta["about"])
