"""encode against its definition in float64, on fresh inputs and on rows made to be hard."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, FeatureCSR, JumpReLU, ReLU, TopK, encode
from heredity.kernels.ops.encode import cpu

pytestmark = pytest.mark.usefixtures("poisoned")


def drawn(tokens: int, width: int, latents: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=made), torch.randn(width, latents, generator=made)
    return x, weight / width**0.5, torch.randn(latents, generator=made) / 5


def activations(latents: int, seed: int = 0) -> dict[str, Activation]:
    threshold = torch.rand(latents, generator=torch.Generator().manual_seed(seed)) * 2
    k = min(latents, 5)
    return {
        "relu": ReLU(),
        "jump": JumpReLU(threshold),
        "jump-one": JumpReLU(0.7),
        "top": TopK(k),
        "top-all": TopK(latents),
        "batch": BatchTopK(k=k),
        "batch-threshold": BatchTopK(threshold=0.8),
    }


def same(got: FeatureCSR, want: FeatureCSR) -> bool:
    places = torch.equal(got.indptr, want.indptr) and torch.equal(got.indices, want.indices)
    return places and torch.allclose(got.values.double(), want.values.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", activations(8))
@pytest.mark.parametrize("shape", [(0, 3, 7), (1, 1, 1), (63, 33, 31), (5, 100, 300), (130, 7, 4099)])
def test_the_same_latents_as_the_definition_in_float64(name: str, shape: tuple[int, int, int]) -> None:
    x, weight, bias = drawn(*shape, seed=sum(shape))
    activation = activations(shape[2])[name]
    wide = activation
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        wide = JumpReLU(activation.threshold.double())
    want = encode(x.double(), weight.double(), bias.double(), wide, impl="reference")
    got = encode(x, weight, bias, activation, impl="cpu").validate()
    assert same(got, want) and got.dtype == torch.float32
    got = encode(x.double(), weight.double(), bias.double(), wide, impl="cpu")
    assert same(got, want) and got.dtype == torch.float64


@pytest.mark.parametrize("name", activations(8))
def test_several_blocks_of_tokens_and_tiles_of_latents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TOKENS", 7)
    monkeypatch.setattr(cpu, "LATENTS", 24)
    x, weight, bias = drawn(40, 9, 203, seed=3)
    activation = activations(203)[name]
    assert same(encode(x, weight, bias, activation, impl="cpu"), encode(x, weight, bias, activation, impl="reference"))


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(k=3)], ids=str)
@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_candidates_in_an_order_that_fills_every_buffer(
    order: str, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ascending order each tile displaces all that was kept, so what is put by is searched again and again."""
    monkeypatch.setattr(cpu, "LATENTS", 16)
    monkeypatch.setattr(cpu, "TOKENS", 4)
    searched: list[int] = []
    name = "_best_of_rows" if isinstance(activation, TopK) else "_best_of_all"
    search = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda found, *rest: searched.append(len(found.rows)) or search(found, *rest))
    row = {"ascending": torch.arange(1.0, 401), "descending": torch.arange(400.0, 0, -1), "equal": torch.ones(400)}
    rows = row[order].repeat(9, 1)
    got = encode(rows, torch.eye(400), None, activation, impl="cpu").to_dense()
    assert torch.equal(got, torch.where(kept_slowly(rows, activation), rows, 0.0))
    if order == "ascending":
        assert len(searched) > 9 and max(searched) > 4 * 3 * 4


def hard_rows(latents: int) -> Tensor:
    """Pre-activations that strain selection."""
    ties = torch.arange(latents).remainder(3).float()
    rows = [
        torch.ones(latents),
        -torch.ones(latents),
        torch.zeros(latents),
        ties,
        ties.flip(0),
        torch.linspace(-1, 1, latents),
        torch.linspace(1, -1, latents),
        torch.full((latents,), torch.finfo(torch.float32).tiny / 4),
        torch.full((latents,), 3e38),
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "activation", [*activations(50).values(), TopK(1), TopK(17), TopK(49), BatchTopK(k=50)], ids=str
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("tile", [2048, 16])
def test_hard_rows(activation: Activation, impl: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LATENTS", tile)
    rows = hard_rows(50)
    # An identity encoder hands the rows through unchanged.
    got = encode(rows, torch.eye(50), None, activation, impl=impl).to_dense()
    assert torch.equal(got, torch.where(kept_slowly(rows, activation), rows, 0.0))


def kept_slowly(scores: Tensor, activation: Activation) -> Tensor:
    """Selection by Python's own sorting of (score, latent, token)."""
    n_tokens, n_latents = scores.shape
    keep = scores > 0
    if isinstance(activation, JumpReLU):
        return keep & (scores > torch.as_tensor(activation.threshold))
    if isinstance(activation, BatchTopK) and activation.threshold is not None:
        return keep & (scores > activation.threshold)
    if isinstance(activation, ReLU):
        return keep
    assert activation.k is not None
    groups = [[(t, f) for f in range(n_latents)] for t in range(n_tokens)]
    count = activation.k
    if isinstance(activation, BatchTopK):
        groups, count = [[entry for group in groups for entry in group]], activation.k * n_tokens
    best = torch.zeros_like(keep)
    for group in groups:
        for t, f in sorted(group, key=lambda e: (-float(scores[e]), e[1], e[0]))[:count]:
            best[t, f] = True
    return keep & best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", activations(8))
def test_low_precision_selects_on_the_rounded_pre_activations(name: str, dtype: torch.dtype) -> None:
    # Small whole numbers: every product and sum is exact, and rounding to bfloat16 makes ties.
    made = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, shape, generator=made).to(dtype) for shape in ((40, 30), (30, 90)))
    activation = activations(90)[name]
    if isinstance(activation, JumpReLU):
        activation = JumpReLU(torch.full((90,), 6.0, dtype=dtype))
    pre = (x.float() @ weight.float()).to(dtype)
    got = encode(x, weight, None, activation, impl="cpu")
    assert got.dtype == dtype and torch.equal(got.to_dense(), torch.where(kept_slowly(pre, activation), pre, 0))


@pytest.mark.parametrize("name", activations(8))
def test_a_crosscoder_sums_over_its_models(name: str) -> None:
    (a, u, bias), (b, v, _) = drawn(30, 10, 77, seed=1), drawn(30, 13, 77, seed=2)
    activation = activations(77)[name]
    got = encode([a, b], [u, v], bias, activation, impl="cpu")
    assert same(got, encode(torch.cat([a, b], 1), torch.cat([u, v]), bias, activation, impl="reference"))


@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(k=4), BatchTopK(threshold=0.9)], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_norm_weighs_selection_and_leaves_values(activation: Activation, impl: str) -> None:
    x, weight, bias = drawn(20, 10, 60, seed=4)
    norm = torch.rand(60, generator=torch.Generator().manual_seed(5)) * 3
    pre = x @ weight + bias
    got = encode(x, weight, bias, activation, norm=norm, impl=impl).to_dense()
    keep = kept_slowly(pre * norm, activation)
    assert torch.equal(got != 0, keep) and torch.allclose(got[keep], pre[keep], atol=1e-5)


@pytest.mark.parametrize("name", activations(8))
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_subset_of_latents_is_encoding_without_the_others(name: str, impl: str) -> None:
    x, weight, bias = drawn(20, 10, 60, seed=6)
    some = torch.randperm(60, generator=torch.Generator().manual_seed(7))[:23]
    activation = small = activations(60)[name]
    if isinstance(activation, JumpReLU) and isinstance(activation.threshold, Tensor):
        small = JumpReLU(activation.threshold[some.sort().values])
    if isinstance(activation, TopK) and activation.k > 23:
        activation = small = TopK(23)
    ids = some.sort().values
    got = encode(x, weight, bias, activation, latents=some, impl=impl).validate()
    want = encode(x, weight[:, ids].contiguous(), bias[ids], small, impl=impl)
    assert got.n_latents == 60 and torch.equal(got.to_dense()[:, ids], want.to_dense())


def test_strides_of_the_encoder_do_not_matter() -> None:
    x, weight, bias = drawn(20, 10, 60, seed=8)
    turned = weight.T.contiguous().T
    wide = torch.randn(20, 30)
    wide[:, ::3] = x
    assert same(encode(wide[:, ::3], turned, bias, TopK(4)), encode(x, weight, bias, TopK(4)))


def test_encode_works_where_gradients_are_recorded() -> None:
    x, weight, bias = drawn(4, 10, 60, seed=9)
    assert not encode(x, weight.requires_grad_(), bias, TopK(4)).values.requires_grad


X, W, B = torch.ones(3, 4), torch.ones(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.ones(5, 6), B, ReLU()), ValueError, r"W_enc must have shape \[4, 6\], not \[5, 6\]"),
        ((X[0], W, B, ReLU()), ValueError, r"x must have shape \[any, any\], not \[4\]"),
        ((X, W, torch.ones(5), ReLU()), ValueError, r"b_enc must have shape \[6\]"),
        ((X.double(), W, B, ReLU()), TypeError, "W_enc is torch.float32 and x torch.float64"),
        ((X.long(), W.long(), None, ReLU()), TypeError, "x must be float32"),
        ((X.to("meta"), W, B, ReLU()), ValueError, "W_enc is on cpu and x on meta"),
        (([X, X], [W], B, ReLU()), ValueError, "x holds 2 arrays and W_enc 1"),
        (([], [], B, ReLU()), ValueError, "x is an empty list"),
        (([X, X[:2]], [W, W], B, ReLU()), ValueError, r"x\[1\] must have shape \[3, any\]"),
        (([X, X], [W, torch.ones(4, 5)], B, ReLU()), ValueError, r"W_enc\[1\] must have shape \[4, 6\]"),
        ((X, W, B, TopK(7)), ValueError, r"TopK.k must lie in \[1, 6\]"),
        ((X, W, B, BatchTopK(k=7)), ValueError, r"BatchTopK.k must lie in \[1, 6\]"),
        ((X, W, B, BatchTopK(threshold=float("nan"))), ValueError, "BatchTopK.threshold is nan"),
        ((X, W, B, JumpReLU(float("nan"))), ValueError, "JumpReLU.threshold is nan"),
        ((X, W, B, JumpReLU(B.to("meta"))), ValueError, "JumpReLU.threshold is on meta and x on cpu"),
        ((X, W, B, TopK(0)), ValueError, "TopK.k"),
        ((X, W, B, BatchTopK()), ValueError, "exactly one of k and threshold"),
        ((X, W, B, BatchTopK(k=1, threshold=0.1)), ValueError, "exactly one of k and threshold"),
        ((X, W, B, JumpReLU(torch.ones(5))), ValueError, r"JumpReLU.threshold must have shape \[6\]"),
        ((X, W, B, JumpReLU(B * float("nan"))), ValueError, r"JumpReLU.threshold\[0\] is nan"),
        ((X, W, B, JumpReLU(1.0, bandwidth=0.0)), ValueError, "bandwidth must be a number above 0"),
        ((X, W, B, JumpReLU(1.0, bandwidth=float("inf"))), ValueError, "bandwidth must be a number above 0"),
        ((X.index_fill(1, torch.tensor(2), float("inf")), W, B, ReLU()), ValueError, r"x\[0, 2\] is inf; 3 entries"),
        ((X, W.index_fill(0, torch.tensor(1), float("nan")), B, ReLU()), ValueError, r"W_enc\[1, 0\] is nan"),
    ],
)
def test_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(*arguments)


UNCHECKED = """
import torch
from heredity.kernels import BatchTopK, ReLU, TopK, encode

for activation in (ReLU, "relu", TopK(2.0), BatchTopK(k=True)):
    try:
        encode(torch.ones(3, 4), torch.ones(4, 6), None, activation)
    except TypeError as error:
        print(error)
"""


def test_types_that_are_refused_where_nothing_checks_them() -> None:
    """In a process of its own: here the annotations of the package are checked."""
    done = subprocess.run([sys.executable, "-c", UNCHECKED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "activation must be a ReLU, JumpReLU, TopK or BatchTopK, not <class 'heredity.kernels.activations.ReLU'>",
        "activation must be a ReLU, JumpReLU, TopK or BatchTopK, not 'relu'",
        "TopK.k must be a whole number, not 2.0",
        "BatchTopK.k must be a whole number, not True",
    ]


@pytest.mark.parametrize(
    ("activation", "norm", "message"),
    [
        (ReLU(), B, "norm weighs what TopK and BatchTopK select; ReLU"),
        (JumpReLU(1.0), B, "JumpReLU.* takes none"),
        (TopK(2), -B, r"norm\[0\] is negative"),
        (TopK(2), B * float("nan"), r"norm\[0\] is nan"),
        (TopK(2), B[:5], r"norm must have shape \[6\]"),
    ],
)
def test_norms_refused(activation: Activation, norm: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(X, W, B, activation, norm=norm)


@pytest.mark.parametrize("activation", [ReLU(), TopK(2)], ids=str)
def test_sums_that_overflow_to_nan_are_refused_and_infinity_is_kept(activation: Activation) -> None:
    x = torch.tensor([[1.0, 1.0], [3e38, 3e38]])
    with pytest.raises(ValueError, match=r"token 1 and latent 2 overflows torch.float32 in both directions"):
        encode(x, torch.tensor([[1.0, 1.0, 2.0], [1.0, 0.0, -2.0]]), None, activation)
    found = encode(x, torch.tensor([[1.0, 1.0], [1.0, -0.5]]), None, activation)
    assert found.to_dense().tolist() == [[2.0, 0.5], [float("inf"), pytest.approx(1.5e38)]]
    half = encode(torch.full((1, 2), 6e4).half(), torch.tensor([[1.0, 1.0], [1.0, -2.0]]).half(), None, activation)
    assert half.to_dense().tolist() == [[float("inf"), 0.0]]


@pytest.mark.parametrize("latents", [[0, 0], [6], [-1]])
def test_a_subset_must_name_different_latents(latents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"different numbers in \[0, 6\)"):
        encode(X, W, B, ReLU(), latents=torch.tensor(latents))


def test_large_finite_numbers_are_not_taken_for_infinity() -> None:
    x = torch.full((2, 4), 3e38)
    assert encode(x, torch.eye(4), None, ReLU()).nnz == 8
