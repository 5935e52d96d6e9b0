"""A training step on Triton kernels from end to end, against autograd of dense float64."""

import pytest
import torch

from heredity.kernels import Activation, BatchTopK, JumpReLU, TopK, autoencode

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(k=3), JumpReLU(2.0, bandwidth=1.0)], ids=str)
def test_gradients(activation: Activation, dtype: torch.dtype, device: str) -> None:
    made = torch.Generator().manual_seed(0)
    shapes = [(5, 20), (20, 70), (70,), (70, 20), (20,)]
    # Whole numbers up to 2: pre-activations are exact, so the same latents are kept.
    leaves = [torch.randint(-2, 3, shape, generator=made).to(device, dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(5, 20, generator=made).to(device, dtype)
    out = autoencode(*leaves, activation, impl="triton")
    (out.reconstruction * weight).sum().backward()
    x, encoder, bias, decoder, offset = wide = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    pre = x @ encoder + bias
    acts = torch.where(out.features.to_dense().cpu() != 0, pre, 0.0)
    if isinstance(activation, JumpReLU):
        assert torch.equal(acts > 0, pre > 2)
    else:
        assert out.features.nnz == 15
    ((acts @ decoder + offset) * weight.cpu().double()).sum().backward()
    for leaf, truth in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and truth.grad is not None and leaf.grad.dtype == dtype
        # Stores truncate to bfloat16 under the interpreter.
        assert (leaf.grad.cpu().double() - truth.grad).norm() <= 4 * torch.finfo(dtype).eps * truth.grad.norm()
