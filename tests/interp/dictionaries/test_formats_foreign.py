"""Dictionaries of other libraries compute here what they compute there: same active latents, same values.

The files were made by the libraries themselves; ``foreign/README.md`` says how.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heredity.interp.dictionaries.formats import load_dictionary
from heredity.interp.dictionaries.record import Dictionary, DictionarySet, Port

FOREIGN = Path(__file__).parent / "foreign"
PLACES = {
    "sae_lens/standard": ("resid_pre@3",),
    "sae_lens/standard_uncentred": ("mlp_out@3",),
    "sae_lens/jumprelu": ("attn_out@3",),
    "sae_lens/hook_z": ("blocks.3.attn.hook_z",),
    "sae_lens/batchtopk": ("resid_post@1",),
    "sae_lens/skip_transcoder": ("mlp_in@3", "mlp_out@3"),
    # Gemma norms what the MLP returns once more; that place has no name here.
    "sae_lens/gemma_scope_res": ("resid_post@5",),
    "sae_lens/gemma_scope_2_res": ("resid_post@5",),
    "sae_lens/gemma_scope_2_transcoder": ("mlp_in@5", "model.layers.5.post_feedforward_layernorm.output"),
    "sae_lens_v5/standard": ("resid_post@2",),
    "sparsify/sae": ("resid_post@3",),
    "sparsify/sae_wide": ("mlp_out@3",),
    "sparsify/transcoder": ("mlp_in@1", "mlp_out@1"),
    "circuit_tracer/plt_relu": ("mlp_in@0", "mlp_out@0"),
    "circuit_tracer/clt_relu": ("mlp_in@0", "mlp_out@0", "mlp_out@1"),
    "circuit_tracer/gemma_scope": ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"),
    "circuit_tracer/gemma_scope_2": ("mlp_in@0", "mlp_out@0"),
}
HINTS = {"sae_lens/expected_average": {"input_scale": 0.7}}


def fixtures() -> list[str]:
    return sorted(str(path.relative_to(FOREIGN).with_suffix("")) for path in FOREIGN.glob("*/*.safetensors"))


def load(case: str) -> Dictionary | DictionarySet:
    root = FOREIGN / case
    # The first directory on the way down that is a dictionary: names of hookpoints and repositories come before it.
    marks = ("cfg.json", "config.yaml", "params.npz", "params.safetensors")
    (path,) = {file.parent for mark in marks for file in root.rglob(mark)}
    return load_dictionary(path, **HINTS.get(case, {}))


def same_features(dictionary: Dictionary, x: torch.Tensor, expected: torch.Tensor) -> None:
    ours = dictionary.encode(x).to_dense()
    assert torch.equal(ours > 0, expected != 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)
    # Neither all nor nothing, or the comparison would say little.
    assert 0.02 < (expected != 0).float().mean() < 0.9


@pytest.mark.parametrize("case", fixtures())
def test_features_and_reconstructions_are_the_librarys(case):
    found, expected = load(case), load_file(FOREIGN / f"{case}.safetensors")
    if isinstance(found, Dictionary):
        same_features(found, expected["x"], expected["features"])
        torch.testing.assert_close(found.reconstruct(expected["x"])[0], expected["output"], rtol=1e-4, atol=5e-5)
        return
    assert len(found) == len(expected["x"])
    for layer, x, features in zip(found.layers, expected["x"], expected["features"], strict=True):
        same_features(layer, x, features)
    written = found.reconstruct({d.reads[0].site: x for d, x in zip(found.layers, expected["x"], strict=True)})
    for layer, output in zip(found.layers, expected["output"], strict=True):
        torch.testing.assert_close(written[layer.writes[0].site], output, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("case", PLACES)
def test_places_are_sites_where_there_is_an_equal(case):
    found = load(case)
    first = found.layers[0] if isinstance(found, DictionarySet) else found
    places = first.reads if first.reads == first.writes else first.reads + first.writes
    assert places == tuple(Port(place) for place in PLACES[case])


def test_all_fixtures_are_small_and_none_is_forgotten():
    files = [file for file in FOREIGN.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 600_000
    assert len(fixtures()) >= 35 and set(PLACES) | set(HINTS) <= set(fixtures())
