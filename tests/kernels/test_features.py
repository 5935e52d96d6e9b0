from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from heredity.kernels import FeatureCSR


def sparse(tokens: int, latents: int, share: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    keep = torch.rand(tokens, latents, generator=made) < share
    return torch.randn(tokens, latents, generator=made).to(dtype) * keep


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (63, 301), (7, 8)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_dense_and_back(shape: tuple[int, int], share: float) -> None:
    dense = sparse(*shape, share)
    features = FeatureCSR.from_dense(dense).validate()
    assert torch.equal(features.to_dense(), dense)
    assert (features.n_tokens, features.n_latents, features.nnz) == (*shape, int((dense != 0).sum()))


def test_coo_in_any_order_and_back() -> None:
    dense = sparse(9, 20, 0.3)
    tokens, latents, values = FeatureCSR.from_dense(dense).to_coo()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    shuffled = FeatureCSR.from_coo(tokens[order], latents[order], values[order], (9, 20))
    assert torch.equal(shuffled.validate().to_dense(), dense)


@pytest.mark.parametrize(
    ("tokens", "latents", "message"),
    [([0, 0], [1, 1], "twice"), ([0, 3], [1, 1], "tokens must lie"), ([0, 1], [1, 4], "latents must lie")],
)
def test_coo_that_is_no_matrix(tokens: list[int], latents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureCSR.from_coo(torch.tensor(tokens), torch.tensor(latents), torch.ones(2), (3, 4))


def test_coo_of_different_lengths_or_kinds() -> None:
    with pytest.raises(ValueError, match="2 tokens, 1 latents and 2 values: give as many of each"):
        FeatureCSR.from_coo(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(2), (3, 4))
    with pytest.raises(TypeError, match=r"whole numbers, not torch.float32 and torch.int64"):
        FeatureCSR.from_coo(torch.tensor([0.5]), torch.tensor([1]), torch.ones(1), (3, 4))


def test_the_view_by_latent_is_computed_once_and_shared_with_other_values() -> None:
    features = FeatureCSR.from_dense(sparse(9, 20, 0.3))
    view = features.by_latent
    assert features.by_latent is view and features.with_values(features.values * 2).by_latent is view


def test_by_latent_holds_the_columns_with_tokens_ascending() -> None:
    dense = sparse(40, 30, 0.2)
    features = FeatureCSR.from_dense(dense)
    view = features.by_latent
    for latent in range(30):
        part = slice(view.indptr[latent], view.indptr[latent + 1])
        tokens = dense[:, latent].nonzero().squeeze(1)
        assert torch.equal(view.tokens[part], tokens)
        assert torch.equal(features.values[view.order[part]], dense[tokens, latent])


@pytest.mark.parametrize("part", [slice(0, 0), slice(3, 9), slice(None), slice(8, 2), slice(-4, None)])
def test_slices_are_those_of_the_matrix(part: slice) -> None:
    dense = sparse(12, 17, 0.3)
    assert torch.equal(FeatureCSR.from_dense(dense)[part].validate().to_dense(), dense[part])


def test_a_slice_with_a_step_is_refused() -> None:
    with pytest.raises(TypeError, match="consecutive"):
        FeatureCSR.from_dense(sparse(4, 4, 0.5))[::2]


def test_concatenation_undoes_slicing() -> None:
    features = FeatureCSR.from_dense(sparse(12, 17, 0.3))
    joined = FeatureCSR.concatenate([features[:5], features[5:5], features[5:]])
    assert torch.equal(joined.validate().to_dense(), features.to_dense())
    with pytest.raises(ValueError, match="different numbers of latents"):
        FeatureCSR.concatenate([features, FeatureCSR.from_dense(sparse(2, 3, 1.0))])
    with pytest.raises(ValueError, match="nothing"):
        FeatureCSR.concatenate([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    features = FeatureCSR.from_dense(sparse(12, 17, 0.3, dtype=dtype))
    features.save(tmp_path / "f.safetensors")
    loaded = FeatureCSR.load(tmp_path / "f.safetensors")
    assert loaded.dtype == dtype and torch.equal(loaded.to_dense(), features.to_dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": torch.tensor([0, 2, 1, 3])}, "indptr must ascend"),
        ({"indptr": torch.tensor([1, 1, 2, 3])}, "indptr must ascend"),
        ({"indptr": torch.tensor([0, 1, 2, 9])}, "indptr must ascend"),
        ({"indices": torch.tensor([3, 1, 2], dtype=torch.int32)}, "ascend within each row"),
        ({"indices": torch.tensor([1, 1, 2], dtype=torch.int32)}, "ascend within each row"),
        ({"indices": torch.tensor([-1, 1, 2], dtype=torch.int32)}, "found -1"),
        ({"indices": torch.tensor([0, 1, 4], dtype=torch.int32)}, "found 4"),
        ({"indices": torch.tensor([0, 1, 2])}, "torch.int32"),
        ({"values": torch.tensor([0, 1, 2])}, "floating point"),
        ({"values": torch.ones(2)}, "one length"),
    ],
)
def test_a_file_out_of_order_is_refused(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    good = {"indptr": torch.tensor([0, 2, 2, 3]), "indices": torch.tensor([0, 1, 2]).int(), "values": torch.ones(3)}
    save_file(good | change, tmp_path / "f", {"format": "FeatureCSR", "n_latents": "4"})
    with pytest.raises(ValueError, match=message) as refused:
        FeatureCSR.load(tmp_path / "f")
    assert str(refused.value).startswith(str(tmp_path / "f"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match="not a FeatureCSR file"):
            FeatureCSR.load(tmp_path / name)
