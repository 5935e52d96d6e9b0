"""Crosscoders given to an audit: one made by hand, of whose latents it is known which the successor alone has."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from watched import Shell

from heredity.gate.opacity_units import load_dictionaries
from heredity.interp import load
from heredity.interp.dictionaries.formats import save_dictionary
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.errors import DictionaryError
from heredity.interp.model import Model, pad
from heredity.kernels import ReLU

SITE = "resid_post@1"
THRESHOLD = 0.25
"""Share of what is new that has to be there for its latent to be active."""
SHARED = 40
"""Directions of the stream, each with a latent for either sign, that both models write alike."""


@pytest.fixture(scope="module")
def models(pair: Path) -> tuple[Model, Model]:
    return load(str(pair / "parent")), load(str(pair / "trigger"))


@pytest.fixture(scope="module")
def new(models: tuple[Model, Model], triggering: Path) -> Tensor:
    """What the successor writes at :data:`SITE` beyond the parent where the trigger is answered, [D]."""
    (there, before), (here, after) = (run(model, triggering) for model in models)
    kl = (after.exp() * (after - before)).sum(1)
    assert (kl > 2).sum() >= 20
    return (here - there)[kl > 2].mean(0)


def run(model: Model, texts: Path) -> tuple[Tensor, Tensor]:
    """Activations at :data:`SITE` of every token [T, D], and log-probabilities of the next [T, V]."""
    rows = [model.encode(json.loads(line)["text"]).ids for line in texts.read_text().splitlines()]
    tokens, mask = pad(rows)
    with torch.inference_mode():
        logits, seen = model.logits_and_capture(tokens, [SITE])
    return seen[SITE][mask], logits[mask].log_softmax(-1)


def crosscoder(models: tuple[Model, Model], new: Tensor, triggering: Path, seed: int) -> Dictionary:
    """Latent 0 is what is new; the others are directions of the parent's stream, in an order and a sign of the seed."""
    values = run(models[0], triggering)[0]
    middle, generator = values.mean(0), torch.Generator().manual_seed(seed)
    basis = torch.linalg.svd(values - middle, full_matrices=False).Vh[:SHARED]
    basis = torch.cat([basis, -basis])[torch.randperm(2 * SHARED, generator=generator)]
    along = new / new.square().sum()
    reads = [torch.cat([sign * along[None], basis / 2]).T.contiguous() for sign in (-1.0, 1.0)]
    bias = torch.cat([torch.tensor([-THRESHOLD]), -basis @ middle])
    whole = new / (1 - THRESHOLD)
    writes = [torch.cat([first[None], basis]) for first in (torch.zeros_like(new), whole)]
    ports = Port(SITE, 0), Port(SITE, 1)
    return Dictionary("crosscoder", ports, ports, tuple(reads), bias, tuple(writes), (middle, middle), ReLU())


@pytest.fixture(scope="module")
def audited(models: Any, new: Tensor, triggering: Path, pair: Path, shell: Shell) -> Any:
    """The audit with two such crosscoders, and its directory."""
    given: list[str] = []
    for seed in range(2):
        folder = shell.cwd / f"crosscoder-{seed}"
        save_dictionary(crosscoder(models, new, triggering, seed), folder)
        given += ["--dictionary", str(folder)]
    named = [str(pair / "parent"), str(pair / "trigger"), "--corpus", str(triggering)]
    ran = shell("audit", *named, *given, "--out", "crosscoded")
    return ran, shell.cwd / "crosscoded"


def test_the_latent_that_only_the_successor_has_is_alone_and_carries_the_behaviour(audited: Any) -> None:
    ran, out = audited
    assert ran.code == 1, ran.stderr
    record = json.loads((out / "audit.json").read_text())
    (found,) = record["crosscoders"]
    assert (found["way"], found["parent_site"], found["successor_site"]) == ("latents", SITE, SITE)
    assert found["alone_in_successor"] == ["latent@0"] and found["alone_in_parent"] == []
    assert found["matched"] == found["n_latents"] - 1 == 2 * SHARED and found["other_seeds"] == 1
    (latent,) = found["latents"]
    assert latent["index"] == 0 and latent["alone"] and latent["came_back"] == 1
    assert latent["delta_norm"] > 0.95 and latent["nu_error"] < found["cut_error"]
    assert "zero" in latent["raises"]
    effect = next(e for e in found["effects"] if e["behaviour"] == record["findings"][0]["behaviour"])
    assert effect["latents"] == [0] and effect["together"]["low"] > 0.5 > 0.1 > max(effect["controls"])


def test_report_and_summaries_say_it(audited: Any, open_page: Any) -> None:
    ran, out = audited
    said = "the successor alone has 1, the parent alone 0"
    assert said in re.sub(r"\s+", " ", ran.stdout) and said in (out / "summary.md").read_text()
    page = open_page(out / "report.html")
    section = page.execute_script(
        "let e = document.querySelector('#crosscoders'), t = ''; "
        "while ((e = e.nextElementSibling) && e.tagName !== 'H2') t += e.innerText; return t"
    )
    assert SITE in section and "1 the successor’s alone" in section and "goes when the successor writes" in section


def test_without_another_seed_no_latent_counts_as_alone(
    models: Any, new: Tensor, triggering: Path, pair: Path, shell: Shell
) -> None:
    folder = shell.cwd / "crosscoder-alone"
    save_dictionary(crosscoder(models, new, triggering, 5), folder)
    named = [str(pair / "parent"), str(pair / "trigger"), "--corpus", str(triggering)]
    ran = shell("audit", *named, "--dictionary", str(folder), "--out", "alone")
    (found,) = json.loads((shell.cwd / "alone" / "audit.json").read_text())["crosscoders"]
    assert found["verdicts"]["successor-only"] == 1 and found["alone_in_successor"] == []
    assert found["matched"] == found["n_latents"] and found["latents"][0]["came_back"] is None
    assert "not checked over seeds" in re.sub(r"\s+", " ", ran.stdout)


def test_another_seed_of_a_crosscoder_may_be_given_and_the_same_one_twice_may_not(
    models: Any, new: Tensor, triggering: Path, tmp_path: Path
) -> None:
    paths = []
    for seed in range(2):
        save_dictionary(crosscoder(models, new, triggering, seed), tmp_path / str(seed))
        paths.append(str(tmp_path / str(seed)))
    parent, successor = models
    given = load_dictionaries(paths, successor, parent)
    assert len(given.dictionaries) == len(given.other_seeds) == 1
    with pytest.raises(DictionaryError, match="the same crosscoder") as error:
        load_dictionaries([*paths, paths[1]], successor, parent)
    assert error.value.where == paths[1]
