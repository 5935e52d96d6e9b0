"""What a model remembers: answers that are its own to the last bit, found again, bounded, and never another's."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heredity.interp.errors import OutputError
from heredity.interp.model import Model
from heredity.interp.remember import Remembered

SITES = ["resid_post@0", "attn_z@1"]
"""Not in the order of their names."""


@pytest.fixture
def tokens(tiny_model: Model) -> Tensor:
    return torch.randint(tiny_model.shape.d_vocab, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def forwards(tiny_model: Model) -> Iterator[Callable[[], int]]:
    """How often the model has run since last asked."""
    seen: list[None] = []
    handle = tiny_model.bridge.original_model.register_forward_pre_hook(lambda *_: seen.append(None))

    def count() -> int:
        n = len(seen)
        seen.clear()
        return n

    yield count
    handle.remove()


def ask(model: Model, tokens: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        forced = torch.cat(list(model.forced(tokens[0], torch.arange(5), batch=2)))
        return [model.logits(tokens), *model.capture(tokens, SITES).values(), forced]


def test_answers_are_the_models_own_and_come_back_to_the_last_bit(
    tiny_model: Model, tokens: Tensor, forwards: Callable[[], int], tmp_path: Path
) -> None:
    own = ask(tiny_model, tokens)
    without = ask(Remembered(tiny_model, None), tokens)
    first = ask(Remembered(tiny_model, tmp_path), tokens)
    model = Remembered(tiny_model, tmp_path)
    forwards()
    again = ask(model, tokens)
    assert forwards() == 0
    for a, b, c, d in zip(own, without, first, again, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
        assert torch.equal(b, c) and torch.equal(c, d)
    with torch.inference_mode():
        assert list(model.capture(tokens, SITES[::-1])) == SITES[::-1]


def test_forced_words_say_what_whole_texts_say(tiny_model: Model, tokens: Tensor) -> None:
    with torch.inference_mode():
        whole = [tiny_model.logits(torch.tensor([[*tokens[0].tolist(), word]]))[0, -1] for word in range(5)]
    torch.testing.assert_close(ask(tiny_model, tokens)[-1], torch.stack(whole), rtol=0, atol=1e-4)


def test_only_the_very_same_question_finds_an_answer(
    tiny_model: Model, tokens: Tensor, forwards: Callable[[], int], tmp_path: Path
) -> None:
    model = Remembered(tiny_model, tmp_path)
    with torch.inference_mode():
        model.logits(tokens)
        forwards()
        model.logits(tokens[:2])
        model.logits(tokens.reshape(7, 3))
        assert forwards() == 2
        other = Remembered(tiny_model, tmp_path)
        other.digest = "another model"
        other.logits(tokens)
        assert forwards() == 3  # two of them to see whether its logits can be made from the last residual
    changed = torch.get_num_threads() + 1
    torch.set_num_threads(changed)
    try:
        with torch.inference_mode():
            model.logits(tokens)
    finally:
        torch.set_num_threads(changed - 1)
    assert forwards() == 1


def test_edits_and_gradients_are_computed_anew(tiny_model: Model, tokens: Tensor, tmp_path: Path) -> None:
    model = Remembered(tiny_model, tmp_path)
    before = len(list(tmp_path.iterdir()))
    with torch.inference_mode():
        plain = model.logits(tokens)
        edited = model.logits(tokens, edits={"mlp_out@1": lambda value: value * 0})
        expected = tiny_model.logits(tokens, edits={"mlp_out@1": lambda value: value * 0})
    assert torch.equal(edited, expected) and not torch.equal(edited, plain)
    found: list[Tensor] = []

    def watch(value: Tensor) -> Tensor:
        found.append(value.detach().requires_grad_())
        return found[0]

    model.logits(tokens, edits={"resid_post@0": watch}).sum().backward()
    assert found[0].grad is not None and found[0].grad.any()
    assert len(list(tmp_path.iterdir())) == before + 1


def test_damaged_answers_are_computed_again(
    tiny_model: Model, tokens: Tensor, forwards: Callable[[], int], tmp_path: Path
) -> None:
    model = Remembered(tiny_model, tmp_path)
    with torch.inference_mode():
        expected = model.logits(tokens)
        (path,) = tmp_path.iterdir()
        whole = path.read_bytes()
        for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"\x80" + whole[1:]):
            path.write_bytes(damaged)
            forwards()
            assert torch.equal(model.logits(tokens), expected)
            assert forwards() == 1 and path.read_bytes() == whole


def test_the_folder_stays_within_its_bytes_and_leaves_other_files_alone(tiny_model: Model, tmp_path: Path) -> None:
    questions = torch.arange(60).reshape(6, 1, 10) % tiny_model.shape.d_vocab
    (tmp_path / "notes.txt").write_text("mine")
    with torch.inference_mode():
        Remembered(tiny_model, tmp_path).logits(questions[0])
    (first,) = (path for path in tmp_path.iterdir() if path.name != "notes.txt")
    left = tmp_path / "left-by-a-kill.tmp"
    left.write_bytes(bytes(10))
    for age, path in ((3, left), (2, first)):
        os.utime(path, (age, age))
    size = first.stat().st_size
    model = Remembered(tiny_model, tmp_path, most_bytes=3 * size)
    with torch.inference_mode():
        for question in (*questions[:3], questions[0], questions[3]):
            model.logits(question)
    held = [path for path in tmp_path.iterdir() if path.name != "notes.txt"]
    # The one read again outlived one kept after it.
    assert len(held) == 3 and first in held and left not in held
    assert sum(path.stat().st_size for path in held) <= 3 * size
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="Name a directory that can be written"):
        Remembered(tiny_model, tmp_path / "file" / "deeper")
