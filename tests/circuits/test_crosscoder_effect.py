"""Latents taken back: against the same run written out, and where they are all that the models differ by."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from heredity.circuits.attribution import Prompts
from heredity.circuits.crosscoder_effect import taken_back
from heredity.interp.dictionaries.record import Dictionary, Port
from heredity.interp.model import Model
from heredity.kernels import ReLU

PLACES = [[7], [3, 7], [7], [5], [7]]


def crosscoder(site: str, encoders: Sequence[Tensor], decoders: Sequence[Tensor], bias: float = 0.0) -> Dictionary:
    ports = Port(site, 0), Port(site, 1)
    latents = encoders[0].shape[1]
    zero = tuple(torch.zeros(rows.shape[1]) for rows in decoders)
    full = torch.full((latents,), bias)
    return Dictionary("crosscoder", ports, ports, tuple(encoders), full, tuple(decoders), zero, ReLU())


def differing(site: str, width: int) -> Dictionary:
    """Whose latents say what the successor has beyond the parent, and only the successor writes them."""
    signed = torch.cat([torch.eye(width), -torch.eye(width)])
    return crosscoder(site, (-signed.T.contiguous(), signed.T.contiguous()), (torch.zeros_like(signed), signed))


@pytest.fixture(scope="module")
def prompts(parent: Model, successor: Model, draw: Callable[..., Tensor], prompts_at: Callable[..., Prompts]) -> Any:
    return prompts_at(parent, successor, draw(5, 8, seed=11))


def kl(successor_logits: Tensor, parent_logits: Tensor) -> float:
    log_s, log_p = (x.double().log_softmax(-1) for x in (successor_logits, parent_logits))
    at = [(row, place) for row, places in enumerate(PLACES) for place in places]
    return sum(float((log_s[r, t].exp() * (log_s[r, t] - log_p[r, t])).sum()) for r, t in at)


@pytest.mark.parametrize("latents", [[0, 3], [5], list(range(9))])
def test_shares_are_those_of_the_run_written_out(
    parent: Model, successor: Model, prompts: Prompts, latents: list[int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    width = parent.shape.d_model
    encoders = [torch.randn(width, 9, generator=generator) / width**0.5 for _ in range(2)]
    decoders = [torch.randn(9, width, generator=generator) * size for size in (0.02, 0.1)]
    found = taken_back(
        parent,
        successor,
        crosscoder("resid_post@1", encoders, decoders, -0.1),
        prompts,
        PLACES,
        [[1], latents],
        controls=2,
        seed=0,
    )
    x_p, x_s = (model.capture(prompts.tokens, ["resid_post@1"])["resid_post@1"] for model in (parent, successor))
    active = (x_p @ encoders[0] + x_s @ encoders[1] - 0.1).relu()
    off = active[..., latents] @ (decoders[1] - decoders[0])[latents]
    edited = successor.logits(prompts.tokens, edits={"resid_post@1": lambda x: x - off})
    original, target = successor.logits(prompts.tokens), parent.logits(prompts.tokens)
    expected = 1 - sum_reached(edited, original, target)
    assert found.shares[1].estimate == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3 and len(found.controls) == 2


def sum_reached(edited: Tensor, original: Tensor, target: Tensor) -> float:
    """How much of KL(S‖P) a run still reaches: KL(S‖P) less KL(S‖run) over all places, as a share of the former."""
    whole = kl(original, target)
    return (whole - kl(original, edited)) / whole


def test_all_that_the_models_differ_by_takes_everything_back(parent: Model, successor: Model, prompts: Prompts) -> None:
    width = parent.shape.d_model
    # The last norm and the unembedding differ too, so exchange of the stream is the whole only up to those.
    here, there = (model.capture(prompts.tokens, ["resid_post@2"])["resid_post@2"] for model in (successor, parent))
    assert not torch.allclose(here, there)
    exchanged = successor.logits(prompts.tokens, edits={"resid_post@2": lambda _: there})
    expected = 1 - sum_reached(exchanged, successor.logits(prompts.tokens), parent.logits(prompts.tokens))
    found = taken_back(
        parent,
        successor,
        differing("resid_post@2", width),
        prompts,
        PLACES,
        [list(range(width)), list(range(2 * width))],
        controls=0,
        seed=0,
    )
    assert found.shares[1].estimate == pytest.approx(expected, abs=1e-4) and expected > 0.5
    assert found.shares[0].estimate < found.shares[1].estimate


def test_latents_that_both_models_write_alike_take_nothing_back(
    parent: Model, successor: Model, prompts: Prompts
) -> None:
    generator = torch.Generator().manual_seed(3)
    width = parent.shape.d_model
    encoder, decoder = (torch.randn(*shape, generator=generator) for shape in ((width, 6), (6, width)))
    shared = crosscoder("resid_post@1", (encoder, encoder), (decoder, decoder))
    found = taken_back(parent, successor, shared, prompts, PLACES, [[0, 1, 2]], controls=1, seed=0)
    assert found.shares[0].estimate == pytest.approx(0, abs=1e-6)
    assert found.controls[0] == pytest.approx(0, abs=1e-6)
