"""Dictionaries given to an audit, and what an audit says of opacity and latents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heredity.gate.opacity_units import load_dictionaries
from heredity.interp.dictionaries.formats import save_dictionary
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.errors import DictionaryError, SiteError
from heredity.interp.model import Model
from heredity.kernels import ReLU


def saved(path: Path, site: str, width: int) -> str:
    port, weight = (Port(site),), torch.randn(width, 12, generator=torch.Generator().manual_seed(0))
    d = Dictionary(
        "sae", port, port, (weight,), torch.zeros(12), (weight.T.contiguous(),), (torch.zeros(width),), ReLU()
    )
    save_dictionary(d, path)
    return str(path)


def test_dictionaries_that_fit_are_read(tiny_model: Model, tmp_path: Path) -> None:
    paths = [saved(tmp_path / site, site, tiny_model.shape.d_model) for site in ("mlp_out@1", "attn_out@0")]
    found = load_dictionaries(paths, tiny_model, tiny_model)
    assert [d.reads[0].site for d in found.dictionaries] == ["mlp_out@1", "attn_out@0"] and found.other_seeds == ()
    assert load_dictionaries([], tiny_model, tiny_model).dictionaries == ()


def test_dictionaries_that_do_not_fit_are_refused(tiny_model: Model, tmp_path: Path) -> None:
    width = tiny_model.shape.d_model
    wide = saved(tmp_path / "wide", "mlp_out@1", width + 1)
    with pytest.raises(DictionaryError, match=f"reads {width + 1} numbers at mlp_out@1, where this model has {width}"):
        load_dictionaries([wide], tiny_model, tiny_model)
    one, two = (saved(tmp_path / name, "mlp_out@1", width) for name in ("one", "two"))
    with pytest.raises(DictionaryError, match="mlp_out@1 is written by"):
        load_dictionaries([one, two], tiny_model, tiny_model)
    with pytest.raises(SiteError, match="mlp_out@99"):
        load_dictionaries([saved(tmp_path / "deep", "mlp_out@99", width)], tiny_model, tiny_model)


def test_an_audit_measures_opacity_where_it_traced_a_circuit(flagged: Any) -> None:
    record = json.loads((flagged[1] / "audit.json").read_text())
    finding = record["findings"][0]
    behaviour = next(b for b in record["behaviours"] if b["id"] == finding["behaviour"])
    share, detail = behaviour["opacity"], behaviour["opacity_detail"]
    assert finding["opacity"] == share and share["status"] == detail["status"] == "measured" and share["n"] >= 30
    assert share["low"] <= share["estimate"] <= share["high"]
    terms = [detail[name]["estimate"] for name in ("needed", "alone")]
    assert share["estimate"] == pytest.approx(sum(terms) / 2, abs=1e-4)
    # Reasons, the residual and the sites tell of one and the same share.
    reasons = {each["name"]: each["share"]["estimate"] for each in detail["reasons"]}
    assert sum(reasons.values()) + detail["residual"] == pytest.approx(share["estimate"], abs=1e-3)
    for name, value in reasons.items():
        assert sum(s["shares"].get(name, 0.0) for s in detail["sites"]) == pytest.approx(value, abs=1e-3)
    routing = detail["routing"]
    assert sum(routing[k]["estimate"] for k in ("explained", "unexplained", "routing")) == pytest.approx(1, abs=1e-3)
    assert detail["n_labelled"] <= detail["n_explained"] <= detail["n_units"] and detail["labels"]
    for latent in behaviour["latents"]:
        assert latent["contrast"] > latent["null_max"] and latent["n_null"] > 0
    untraced = [b for b in record["behaviours"] if b["circuit"].get("status") == "not_measured"]
    for each in untraced:
        assert "was not traced" in each["opacity"]["reason"] and each["latents"]["status"] == "not_measured"
    page = (flagged[1] / "report.html").read_text()
    assert "how much of it nobody can explain" in page and "finding-1-opacity" in page
    assert "| Opacity |" in (flagged[1] / "summary.md").read_text()
