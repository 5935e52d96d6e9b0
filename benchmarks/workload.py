"""What ``kernels.py`` and ``kernels_gpu.py`` feed to every contestant, and what must come out.

Inputs are drawn to be like a language model's: a direction that all tokens share, along which a few are massive, and
latents whose frequencies fall off like Zipf's law. Tokens whose k-th value is so near the next that rounding would
decide are not drawn, and JumpReLU thresholds stand clear of all pre-activations, so that every contestant must find the
same active latents.
"""

from dataclasses import dataclass

import torch
from task import FEW, Arrays, Inputs
from torch import Tensor

ROUNDING = 2e-5
"""Distance to the k-th value or a threshold, over the token's largest pre-activation, that counts as rounding."""

TOLERANCE = 1e-4
"""Largest accepted ‖got − true‖ / ‖true‖, for float32 contestants against float64."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a run: tokens, width of an activation, latents, active per token, and of the attribution step."""

    tokens: int = 1024
    width: int = 768
    latents: int = 24576
    k: int = 32
    batch: int = 64
    positions: int = 64
    active: int = 40

    def __str__(self) -> str:
        sizes = f"{self.tokens} tokens, d {self.width}, {self.latents} latents, {self.k} active"
        return f"{sizes}; attribution {self.batch} × {self.positions} positions × {self.active} active"


def draw(shape: Shape, seed: int = 0) -> Arrays:
    """Inputs of all ops, float32."""
    draws = torch.Generator().manual_seed(seed)
    shared = torch.nn.functional.normalize(torch.randn(shape.width, generator=draws), dim=0)
    decoder = torch.randn(shape.latents, shape.width, generator=draws)
    decoder = torch.nn.functional.normalize(decoder - (decoder @ shared)[:, None] * shared)
    popularity = 1 / (1 + torch.randperm(shape.latents, generator=draws).float())
    n = shape.tokens + shape.tokens // 4 + 16
    causes = torch.multinomial(popularity.expand(n, -1), shape.k, generator=draws)
    strength = 0.5 + torch.empty(n, shape.k).exponential_(generator=draws)
    x = torch.nn.functional.embedding_bag(causes, decoder, per_sample_weights=strength, mode="sum")
    x *= torch.randn(n, 1, generator=draws).mul_(0.1).exp_()
    x += 0.3 * torch.randn(n, shape.width, generator=draws) / shape.width**0.5
    massive = 1 + 5 * (torch.rand(n, 1, generator=draws) < 0.01)
    x += 4 * massive * torch.randn(n, 1, generator=draws).mul_(0.5).exp_() * shared
    b_dec = 4 * shared
    # Latents do not read what all tokens share, however large: training would see to that.
    encoder = decoder + 0.1 * torch.randn(decoder.shape, generator=draws) / shape.width**0.5
    encoder = (encoder - (encoder @ shared)[:, None] * shared).T.contiguous()
    b_enc = 0.02 * torch.randn(shape.latents, generator=draws) - 0.05
    pre = x.double() @ encoder.double() + b_enc.double()
    clear = _clear(pre, shape.k).nonzero()[: shape.tokens, 0]
    if len(clear) < shape.tokens:
        raise ValueError(f"only {len(clear)} tokens whose k-th value does not hang on rounding: try another seed")
    x, pre = x[clear], pre[clear]
    level = pre.flatten().kthvalue(pre.numel() - shape.tokens * shape.k).values.clamp(min=0.01)
    threshold = _between((level * (0.9 + 0.2 * torch.rand(shape.latents, generator=draws))).float(), pre)
    few = (x[:FEW].double() @ encoder.double() + b_enc.double()).topk(shape.k // 2 + 1).values[:, -1].mean()
    arrays = {
        "x": x,
        "W_enc": encoder,
        "b_enc": b_enc,
        "b_enc_few": b_enc - few.float(),
        "W_dec": decoder,
        "b_dec": b_dec,
        "threshold": threshold,
    }
    rows, latents, values = top(pre, shape.k)
    arrays |= {"acts_indptr": _starts(rows, shape.tokens), "acts_indices": latents.int(), "acts_values": values.float()}
    # The positions of a prompt are some of the tokens, over again where there are not enough.
    spots = torch.arange(shape.positions) % shape.tokens
    rows, latents, values = top(pre[spots], shape.active)
    arrays |= {
        "spot_indptr": _starts(rows, shape.positions),
        "spot_indices": latents.int(),
        "spot_values": values.float(),
        "gradients": torch.randn(shape.batch, shape.positions, shape.width, generator=draws)
        * torch.randn(shape.batch, 1, 1, generator=draws).exp(),
    }
    return {name: array.contiguous() for name, array in arrays.items()}


def facts(arrays: Arrays) -> str:
    """How unequal the activations that were drawn are, in words."""
    n_tokens, n_latents = arrays["x"].shape[0], arrays["W_dec"].shape[0]
    count = torch.bincount(arrays["acts_indices"].long(), minlength=n_latents).sort(descending=True).values
    norms = arrays["x"].norm(dim=1)
    share = int(count[: max(1, n_latents // 100)].sum()) / int(count.sum())
    return (
        f"the most frequent latent is active on {int(count[0]) / n_tokens:.0%} of tokens, the most frequent 1 % take "
        f"{share:.0%} of activations, {int((count == 0).sum()) / n_latents:.0%} of latents have none; norms of "
        f"activations reach {norms.max() / norms.median():.1f} times their median"
    )


def top(pre: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, latent, value) of the k largest positive entries of each row."""
    keep = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k).indices, True) & (pre > 0)
    rows, latents = keep.nonzero(as_tuple=True)
    return rows, latents, pre[rows, latents]


def _clear(pre: Tensor, k: int) -> Tensor:
    """Which tokens' k largest do not hang on rounding."""
    near = pre.topk(min(k + 1, pre.shape[1])).values
    gap = near[:, k - 1] - near[:, k] if pre.shape[1] > k else near[:, k - 1]
    return torch.minimum(gap, near[:, k - 1]) > ROUNDING * near[:, 0]


def _between(threshold: Tensor, pre: Tensor) -> Tensor:
    """The thresholds, moved up until no pre-activation is so near that rounding would decide."""
    room = ROUNDING * pre.amax(1, keepdim=True)
    while bool((close := ((pre - threshold.double()).abs() <= room).any(0)).any()):
        threshold = torch.where(close, threshold * (1 + 5 * ROUNDING), threshold)
    return threshold


def _starts(rows: Tensor, n_rows: int) -> Tensor:
    return torch.nn.functional.pad(torch.bincount(rows, minlength=n_rows).cumsum(0), (1, 0))


# --- what must come out ---


class Truth:
    """Results of every op in float64, each computed when it is first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[str, Arrays] = {}

    def of(self, op: str) -> Arrays:
        if op not in self._known:
            self._known[op] = getattr(self, "_" + op)()
        return self._known[op]

    def _double(self, *names: str) -> list[Tensor]:
        return [self.inputs[name].double() for name in names]

    def _pre(self) -> Tensor:
        x, encoder, b_enc = self._double("x", "W_enc", "b_enc")
        return x @ encoder + b_enc

    def _encode_topk(self) -> Arrays:
        return _entries(*top(self._pre(), self.inputs.k))

    def _encode_jumprelu(self) -> Arrays:
        pre = self._pre()
        rows, latents = (pre > self.inputs["threshold"].double()).nonzero(as_tuple=True)
        return _entries(rows, latents, pre[rows, latents])

    def _decode(self) -> Arrays:
        decoder, b_dec = self._double("W_dec", "b_dec")
        return {"reconstruction": self.inputs.dense("acts").double() @ decoder + b_dec}

    def _train(self) -> Arrays:
        return self._step("b_enc", self.inputs["x"].shape[0])

    def _train_few(self) -> Arrays:
        return self._step("b_enc_few", FEW)

    def _step(self, bias: str, n_tokens: int) -> Arrays:
        """Gradients of the squared error, summed over a token's width and averaged over tokens."""
        x, encoder, b_enc, decoder, b_dec = self._double("x", "W_enc", bias, "W_dec", "b_dec")
        x = x[:n_tokens]
        rows, latents, values = top(x @ encoder + b_enc, self.inputs.k)
        acts = torch.zeros(len(x), encoder.shape[1], dtype=torch.float64)
        acts[rows, latents] = values
        reconstruction = acts @ decoder + b_dec
        grad = 2 * (reconstruction - x) / len(x)
        inner = (grad @ decoder.T) * (acts > 0)
        return {"reconstruction": reconstruction, "W_enc": x.T @ inner, "b_enc": inner.sum(0), "W_dec": acts.T @ grad}

    def _attribute(self) -> Arrays:
        decoder, gradients = self._double("W_dec", "gradients")
        positions, latents = self.inputs.at("spot")
        return {"scores": torch.einsum("bnd,nd->bn", gradients[:, positions], decoder[latents])}

    def _statistics(self) -> Arrays:
        acts = self.inputs.dense("acts")
        precise = acts.double()
        return {
            "count": (acts > 0).sum(0),
            "sum": precise.sum(0),
            "sum_of_squares": precise.square().sum(0),
            "max": acts.amax(0),
            "top_values": acts.topk(min(16, len(acts)), dim=0).values.T,
        }


def complaint(got: Arrays, truth: Arrays) -> tuple[float, str | None]:
    """Largest relative error of what a contestant computed, and what is wrong with it, if anything is."""
    error = 0.0
    for name, array in got.items():
        true = truth[name]
        if array.shape != true.shape:
            return error, f"{name} has shape {list(array.shape)} instead of {list(true.shape)}"
        if not array.is_floating_point():
            if not torch.equal(array.long(), true.long()):
                return error, f"{int((array != true).sum())} entries of {name} differ"
            continue
        off = float((array.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300))
        # Written so that NaN does not pass.
        if not off <= TOLERANCE:
            return off, f"{name} is off by {off:.1e}"
        error = max(error, off)
    return error, None


def _entries(rows: Tensor, latents: Tensor, values: Tensor) -> Arrays:
    return {"tokens": rows, "latents": latents, "values": values}
