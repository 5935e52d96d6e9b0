"""decode, backward and attribute against dense float64, on fresh inputs."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from heredity.kernels import FeatureCSR, attribute, attribute_errors, decode, residual, virtual_weights
from heredity.kernels.ops.backward import run as backward
from heredity.kernels.ops.decode import cpu

pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(tokens: int, latents: int, share: float, seed: int = 0) -> FeatureCSR:
    keep = torch.rand(tokens, latents, generator=torch.Generator().manual_seed(seed)) < share
    return FeatureCSR.from_dense(normal(tokens, latents, seed=seed + 1) * keep)


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape and not out.isnan().any()
    return float((out.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30))


CASES = [
    (1, 1, 1, 1.0),
    (63, 33, 301, 0.01),
    (63, 33, 301, 0.5),
    (7, 100, 31, 0.0),
    (0, 4, 5, 0.3),
    (1000, 3, 65, 0.05),
]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-14}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("tokens", "width", "latents", "share"), CASES)
def test_decode(tokens: int, width: int, latents: int, share: float, dtype: torch.dtype, impl: str) -> None:
    sparse = features(tokens, latents, share).to(dtype=dtype)
    decoders = [normal(latents, size, seed=3).to(dtype) for size in (width, width + 2)]
    biases = [normal(size, seed=4).to(dtype) for size in (width, width + 2)]
    targets = [normal(tokens, size, seed=5).to(dtype) for size in (width, width + 2)]
    want = [sparse.to_dense().double() @ d.double() + b.double() for d, b in zip(decoders, biases, strict=True)]
    out = decode(sparse, decoders, biases, impl=impl)
    residuals, errors = residual(sparse, decoders, biases, targets, impl=impl)
    for m in range(2):
        assert out[m].dtype == residuals[m].dtype == dtype
        assert error(out[m], want[m]) < LIMIT[dtype]
        left = targets[m].double() - want[m]
        assert error(residuals[m], left) < 3 * LIMIT[dtype]
        assert error(errors[m], left.square().sum(1)) < 3 * LIMIT[dtype]
    single = decode(sparse, decoders[0], impl=impl)
    assert error(single, want[0] - biases[0].double()) < LIMIT[dtype]


@pytest.mark.parametrize("latents", [3, 300])
def test_not_a_number_is_never_dropped(latents: int) -> None:
    dense = torch.zeros(2, latents)
    dense[0, 0], dense[1, 1] = 1.0, 2.0
    decoder = torch.ones(latents, 2)
    decoder[1, 0] = float("nan")
    out = decode(FeatureCSR.from_dense(dense), decoder)
    assert out[1, 0].isnan() and out[:, 1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.ones(4, 2), None), ValueError, r"W_dec must have shape \[5, any\], not \[4, 2\]"),
        ((torch.ones(5, 2), torch.ones(3)), ValueError, r"b_dec must have shape \[2\], not \[3\]"),
        ((torch.ones(5, 2).double(), None), TypeError, "W_dec is torch.float64 and features.values torch.float32"),
        (([torch.ones(5, 2)], [torch.ones(2)] * 2), ValueError, "W_dec holds 1 arrays and b_dec 2"),
        (([], None), ValueError, "W_dec is an empty list"),
    ],
)
def test_decode_refuses(arguments: tuple, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        decode(features(3, 5, 0.5), *arguments)


def test_residual_refuses_a_target_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"target must have shape \[3, 2\], not \[3, 1\]"):
        residual(features(3, 5, 0.5), torch.ones(5, 2), None, torch.ones(3, 1))


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("tokens", "width", "latents", "share"), CASES)
@pytest.mark.parametrize("given", [False, True], ids=["positive", "mask"])
def test_backward(tokens: int, width: int, latents: int, share: float, dtype: torch.dtype, given: bool) -> None:
    sparse = features(tokens, latents, share).to(dtype=dtype)
    sizes = (width, width + 2)
    grads, xs = ([normal(tokens, size, seed=s).to(dtype) for size in sizes] for s in (6, 7))
    weights = [normal(size, latents, seed=8).to(dtype) for size in sizes]
    decoders = [normal(latents, size, seed=9).to(dtype) for size in sizes]
    extra = normal(sparse.nnz, seed=10).to(dtype) if given else None
    active = normal(sparse.nnz, seed=11) > 0 if given else None
    wide = [[t.double() for t in group] for group in (grads, xs, weights, decoders)]
    want = backward(
        sparse.to(dtype=torch.float64), active, *wide, None if extra is None else extra.double(), True, impl="reference"
    )
    got = backward(sparse, active, grads, xs, weights, decoders, extra, True, impl="cpu")
    assert want.xs is not None and got.xs is not None
    limit = 10 * LIMIT[dtype]
    for ours, truth in zip(
        [*got.decoders, got.values, *got.weights, got.bias, *got.xs],
        [*want.decoders, want.values, *want.weights, want.bias, *want.xs],
        strict=True,
    ):
        assert ours.dtype == dtype and error(ours, truth) < limit
    assert all(w.T.is_contiguous() for w in [*got.weights, *want.weights])
    assert backward(sparse, active, grads, xs, weights, decoders, extra, False, impl="cpu").xs is None


def test_the_reference_of_backward_is_what_autograd_says() -> None:
    sparse = features(20, 30, 0.2).to(dtype=torch.float64)
    x, weight, decoder = normal(20, 8, seed=1).double(), normal(8, 30, seed=2).double(), normal(30, 8, seed=3).double()
    grad = normal(20, 8, seed=4).double()
    on = sparse.to_dense() > 0
    for leaf in (x, weight, decoder):
        leaf.requires_grad_()
    bias = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    # Pre-activations are shifted by constants so that their values are those of `sparse`.
    pre = x @ weight + bias
    acts = torch.where(on, pre + (sparse.to_dense() - pre).detach(), 0.0)
    (acts @ decoder).backward(grad)
    got = backward(
        sparse, None, [grad], [x.detach()], [weight.detach()], [decoder.detach()], None, True, impl="reference"
    )
    assert got.xs is not None
    pairs = [(got.decoders[0], decoder), (got.weights[0], weight), (got.bias, bias), (got.xs[0], x)]
    for ours, leaf in pairs:
        assert leaf.grad is not None and error(ours, leaf.grad) < 1e-13


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("positions", "width", "latents", "share"), CASES)
def test_attribute(positions: int, width: int, latents: int, share: float, dtype: torch.dtype, impl: str) -> None:
    sparse = features(positions, latents, share)
    gradients = [normal(5, positions, size, seed=6).to(dtype) for size in (width, width + 2)]
    decoders = [normal(latents, size, seed=7).to(dtype) for size in (width, width + 2)]
    want = torch.zeros(5, sparse.nnz, dtype=torch.float64)
    for gradient, decoder in zip(gradients, decoders, strict=True):
        for n, (position, latent) in enumerate(zip(sparse.tokens, sparse.indices, strict=True)):
            want[:, n] += gradient[:, position].double() @ decoder[latent].double()
    got = attribute(gradients, sparse, decoders, impl=impl)
    assert got.dtype == dtype and error(got, want) < 10 * LIMIT[dtype]


def test_attribute_refuses_what_does_not_fit() -> None:
    sparse = features(4, 5, 0.5)
    with pytest.raises(ValueError, match=r"gradients must have shape \[2, 4, 3\], not \[2, 6, 3\]"):
        attribute(torch.ones(2, 6, 3), sparse, torch.ones(5, 3))
    with pytest.raises(ValueError, match="gradients holds 2 arrays and W_dec 1"):
        attribute([torch.ones(2, 4, 3)] * 2, sparse, [torch.ones(5, 3)])


def test_error_nodes_meet_the_gradient_of_their_own_position() -> None:
    gradients, errors = normal(3, 4, 5, seed=1), normal(4, 5, seed=2)
    want = torch.stack([torch.stack([gradients[b, p] @ errors[p] for p in range(4)]) for b in range(3)])
    assert error(attribute_errors(gradients, errors), want) < 1e-6
    with pytest.raises(ValueError, match=r"gradients must have shape \[any, 4, 5\]"):
        attribute_errors(gradients[:, :3], errors)


def test_virtual_weights_join_active_latents_of_one_position() -> None:
    source, target = features(6, 20, 0.3, seed=1), features(6, 11, 0.4, seed=2)
    decoder, encoder = normal(20, 8, seed=3), normal(8, 11, seed=4)
    whole = encoder.T @ decoder.T
    blocks = virtual_weights(source, decoder, target, encoder)
    for position, block in enumerate(blocks):
        reading, writing = (f[position : position + 1].indices.long() for f in (target, source))
        assert torch.allclose(block, whole[reading][:, writing], atol=1e-5)
    with pytest.raises(ValueError, match="source has 6 positions and target 5"):
        virtual_weights(source, decoder, target[:5], encoder)
    with pytest.raises(ValueError, match="source is on cpu and W_dec on meta"):
        virtual_weights(source, decoder.to("meta"), target, encoder.to("meta"))


@pytest.mark.parametrize("share", [0.05, 0.5], ids=["sparse", "dense"])
def test_memory_layouts_do_not_matter(share: float) -> None:
    sparse = features(20, 60, share)
    x, grad, decoder, gradients = (
        normal(20, 9, seed=1),
        normal(20, 9, seed=2),
        normal(60, 9, seed=3),
        normal(4, 20, 9, seed=4),
    )

    def turned(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def thinned(t: Tensor) -> Tensor:
        return torch.stack([t, t * float("nan")], -1)[..., 0]

    def outputs(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        a, g, d, q = (change(t) for t in (x, grad, decoder, gradients))
        back = backward(sparse, None, [g], [a], [change(decoder.T)], [d], None, True)
        assert back.xs is not None
        return [
            *residual(sparse, d, None, a),
            attribute(q, sparse, d),
            *back.decoders,
            back.values,
            *back.weights,
            *back.xs,
        ]

    plain = outputs(lambda t: t)
    for change in (turned, thinned):
        assert all(error(ours, truth) < 1e-6 for ours, truth in zip(outputs(change), plain, strict=True))


@pytest.mark.parametrize(("share", "cached", "dense"), [(0.15, True, False), (0.15, False, True), (0.3, True, True)])
def test_dense_by_share_and_size_of_the_decoder(
    share: float, cached: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cpu, "CACHED", 4 * 60 * 9 if cached else 4 * 60 * 9 - 1)
    for name in ("decode", "backward"):
        module = import_module(f"heredity.kernels.ops.{name}.reference")
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: asked.append(name) or real(*args))
    sparse, decoder, x = features(40, 60, share), normal(60, 9, seed=1), normal(40, 9, seed=2)
    decode(sparse, decoder)
    backward(sparse, None, [x], [x], [decoder.T], [decoder], None, False)
    assert asked == (["decode", "backward"] if dense else [])
