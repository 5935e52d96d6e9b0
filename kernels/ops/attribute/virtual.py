"""Weights between latents of two sites through the residual stream, for the pairs that are active."""

from torch import Tensor

from ... import check
from ...features import FeatureCSR


def virtual_weights(source: FeatureCSR, W_dec: Tensor, target: FeatureCSR, W_enc: Tensor) -> list[Tensor]:
    """Encoder columns of active targets times decoder rows of active sources, position by position.

    Virtual weights: Elhage et al. 2021, "A mathematical framework for transformer circuits".

    Args:
        source: active latents that write; its rows are positions.
        W_dec: [F_source, D].
        target: active latents that read, at the same positions.
        W_enc: [D, F_target].

    Returns:
        Per position [active targets, active sources], both in ascending order of latents.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or devices do not fit.
    """
    check.shaped(W_dec, "W_dec", source.n_latents, None)
    check.shaped(W_enc, "W_enc", W_dec.shape[1], target.n_latents)
    check.alike({"W_dec": W_dec, "W_enc": W_enc})
    for name, features in (("source", source), ("target", target)):
        if features.device != W_dec.device:
            raise ValueError(f"{name} is on {features.device} and W_dec on {W_dec.device}: move one of them")
    if source.n_tokens != target.n_tokens:
        raise ValueError(f"source has {source.n_tokens} positions and target {target.n_tokens}")
    pairs = zip(_latents(source), _latents(target), strict=True)
    return [W_enc[:, reading].T @ W_dec[writing].T for writing, reading in pairs]


def _latents(features: FeatureCSR) -> tuple[Tensor, ...]:
    """Active latents of each position."""
    return features.indices.long().split(features.indptr.diff().tolist())
