"""The differentiable autoencoder against finite differences, autograd of dense code, and torch.compile."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, JumpReLU, ReLU, TopK, autoencode
from heredity.kernels.ops.autoencode import _backward, _forward

pytestmark = pytest.mark.usefixtures("poisoned")


def parameters(tokens: int = 17, width: int = 6, latents: int = 40, seed: int = 0) -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec in float64."""
    made = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (width, latents), (latents,), (latents, width), (width,)]
    return [torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_() for shape in shapes]


ACTIVATIONS = [ReLU(), TopK(5), BatchTopK(k=3), BatchTopK(threshold=0.5), JumpReLU(0.7)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_those_of_finite_differences(activation: Activation) -> None:
    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out = autoencode(*leaves, activation)
        return out.reconstruction, out.features.values

    assert torch.autograd.gradcheck(outputs, parameters(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, JumpReLU(torch.full((40,), 0.7))], ids=str)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_gradients_in_other_dtypes_are_those_of_dense_float64(
    dtype: torch.dtype, limit: float, activation: Activation
) -> None:
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in parameters(tokens=33)]
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        activation = JumpReLU(activation.threshold.to(dtype))
    out = autoencode(*leaves, activation)
    weight = torch.randn(33, 6, generator=torch.Generator().manual_seed(9)).to(dtype)
    (out.reconstruction * weight).sum().backward()
    x, encoder, bias, decoder, offset = wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # Rounding decides what is kept near a threshold, so both keep the same.
    acts = torch.where(out.features.to_dense() != 0, x @ encoder + bias, 0.0)
    ((acts @ decoder + offset) * weight.double()).sum().backward()
    for leaf, truth in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and truth.grad is not None and leaf.grad.dtype == dtype
        assert (leaf.grad.double() - truth.grad).norm() <= limit * truth.grad.norm()


@pytest.mark.parametrize("tokens", [1, 90])
def test_crosscoder_gradients(tokens: int) -> None:
    a, b = parameters(tokens, width=5, seed=1), parameters(tokens, width=7, seed=2)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, y, u, v, bias, d, e, p, q = leaves
        out = autoencode([x, y], [u, v], bias, [d, e], [p, q], TopK(4))
        return (*out.reconstruction, out.features.values)

    leaves = (a[0], b[0], a[1], b[1], a[2], a[3], b[3], a[4], b[4])
    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


def test_latents_that_topk_picks_at_zero_get_no_gradient() -> None:
    """sparsify 1.3.3 gives one to every pick, also where fewer than k pre-activations are above zero."""
    x, weight, bias, decoder, offset = parameters(tokens=8, latents=12)
    with torch.no_grad():
        bias[2:] = -100.0
    out = autoencode(x, weight, bias, decoder, offset, TopK(6))
    (out.reconstruction.square().sum() + out.features.values.sum()).backward()
    assert out.features.nnz and int(out.active.max()) <= 2
    for gradient, axis in ((bias.grad, 0), (weight.grad, 1), (decoder.grad, 0)):
        assert gradient is not None
        assert gradient.movedim(axis, 0)[:2].any() and not gradient.movedim(axis, 0)[2:].any()


class Step(torch.autograd.Function):
    """The pseudo-derivatives of JumpReLU as its paper writes them (equations 11 and 12), dense."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        on = (pre > threshold).to(pre.dtype)
        return pre * on, on

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() / ctx.width < 0.5).to(pre.dtype)
        of_threshold = -near / ctx.width * (threshold * grads[0] + grads[1])
        return grads[0] * (pre > threshold), of_threshold.sum(0), None


@pytest.mark.parametrize("width", [0.01, 0.3, 1.0])
def test_the_pseudo_derivative_of_jumprelu(width: float) -> None:
    leaves = [*parameters(tokens=60), torch.rand(40, dtype=torch.float64).add(0.6).requires_grad_()]
    x, weight, bias, decoder, offset, threshold = leaves
    out = autoencode(x, weight, bias, decoder, offset, JumpReLU(threshold, width))
    ((out.reconstruction - x).square().sum() + 0.3 * out.active.square().sum()).backward()
    got = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    acts, on = Step.apply(x @ weight + bias, threshold, width)
    ((acts @ decoder + offset - x).square().sum() + 0.3 * on.sum(1).square().sum()).backward()
    assert torch.equal(out.features.to_dense() != 0, acts != 0) and torch.equal(out.active, on.sum(1))
    for ours, leaf in zip(got, leaves, strict=True):
        assert ours is not None and leaf.grad is not None
        assert torch.allclose(ours, leaf.grad, rtol=1e-9, atol=1e-9)


# In a process of its own: torch.compile can't see through the argument checks that tests switch on.
COMPILED = """
import torch
from heredity.kernels import JumpReLU, TopK, autoencode

made = torch.Generator().manual_seed(0)
shapes = [(17, 6), (6, 40), (40,), (40, 6), (6,)]
leaves = [torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_() for shape in shapes]
leaves.append(torch.full((40,), 0.7, dtype=torch.float64, requires_grad=True))

def loss(x, weight, bias, decoder, offset, threshold):
    activation = TopK(5) if KIND == "top" else JumpReLU(threshold, 0.5)
    out = autoencode(x, weight, bias, decoder, offset, activation)
    return (out.reconstruction - x).square().sum() + out.features.values.sum() + out.active.sum()

found = []
for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
    for leaf in leaves:
        leaf.grad = None
    value = function(*leaves)
    value.backward()
    found.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
assert len(found[0]) == len(found[1]) == (6 if KIND == "top" else 7)
assert all(torch.allclose(plain, compiled, rtol=1e-12) for plain, compiled in zip(*found))
"""


@pytest.mark.parametrize("kind", ["top", "jump"])
def test_compiled_it_stays_one_graph_with_the_same_gradients(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"KIND = {kind!r}\n{COMPILED}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["top", "jump"])
def test_the_op_keeps_to_its_schema_and_its_fake_tensors(kind: str) -> None:
    x, weight, bias, decoder, offset = parameters()
    threshold = torch.full((40,), 0.7, dtype=torch.float64) if kind == "jump" else None
    arguments = ([x], [weight], bias, [decoder], [offset], threshold, None, kind, 5, 0.0, 0.5, "")
    torch.library.opcheck(
        _forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("kind", ["top", "jump"])
def test_the_op_of_the_gradients_keeps_to_its_schema_and_its_fake_tensors(kind: str) -> None:
    x, weight, bias, decoder, offset = (leaf.detach() for leaf in parameters())
    threshold = torch.full((40,), 0.7, dtype=torch.float64) if kind == "jump" else None
    out = _forward([x], [weight], bias, [decoder], [offset], threshold, None, kind, 5, 0.0, 0.5, "")
    stored = out[:3] if threshold is None else out[4:7]
    extra, of_active = torch.ones_like(out[2]), torch.ones_like(out[3])
    rest = ([x], [weight], [decoder], threshold, [x], extra, of_active, 0.5)
    for want_x in (False, True):
        torch.library.opcheck(_backward, (*stored, *rest, want_x, ""), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_an_implementation_asked_for_serves_all_of_it(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for op in ("encode", "decode", "backward"):
        for name in ("cpu", "reference"):
            module = import_module(f"heredity.kernels.ops.{op}.{name}")
            real = getattr(module, op)
            spy = lambda *args, real=real, name=name: called.append(name) or real(*args)  # noqa: E731
            monkeypatch.setattr(module, op, spy)
    out = autoencode(*parameters(), TopK(3), impl=impl)
    out.reconstruction.sum().backward()
    # Of 40 latents 3 are active: too few for the CPU to hand the work to the reference.
    assert called == [impl] * 3
    with pytest.raises(ValueError, match="'triton' can't serve this call: float64"):
        autoencode(*parameters(), TopK(3), impl="triton")


def test_what_encode_refuses_is_refused_here_too() -> None:
    x, weight, bias, decoder, offset = parameters()
    with pytest.raises(ValueError, match=r"x\[0, 0\] is nan"):
        autoencode(x * float("nan"), weight, bias, decoder, offset, TopK(5))
    with pytest.raises(ValueError, match=r"W_dec must have shape \[40, 6\], not \[39, 6\]"):
        autoencode(x, weight, bias, decoder[:-1], offset, TopK(5))
    for wrong in (offset[:1], offset[:5]):
        with pytest.raises(ValueError, match=r"b_dec must have shape \[6\], not"):
            autoencode(x, weight, bias, decoder, wrong, TopK(5))
    with pytest.raises(ValueError, match="norm weighs what TopK and BatchTopK select"):
        autoencode(x, weight, bias, decoder, offset, JumpReLU(0.7), norm=torch.ones(40).double())
    with pytest.raises(ValueError, match=r"TopK\.k"):
        autoencode(x, weight, bias, decoder, offset, TopK(41))
