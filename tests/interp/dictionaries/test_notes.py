"""Notes on latents in files: the same comes back, and nothing else is believed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from heredity.interp.dictionaries import load_dictionary, load_notes, save_dictionary, with_notes
from heredity.interp.dictionaries.notes import LatentNotes, digest
from heredity.interp.errors import DictionaryError
from heredity.kernels import JumpReLU


def everything(notes: LatentNotes) -> dict[str, Any]:
    found = {name: getattr(notes, name) for name in ("dictionary", "models", "seed", "names", "kept", "explanations")}
    found |= {"texts": notes.contexts.texts, "features": notes.features.to_dense().tolist()}
    found |= {name: array.tolist() for name, array in vars(notes.statistics).items() if isinstance(array, torch.Tensor)}
    found["tokens"] = notes.statistics.n_tokens
    found["effects"] = [None if e is None else {k: v.tolist() for k, v in vars(e).items()} for e in notes.effects]
    return found


@pytest.mark.parametrize("which", ["", "pair_"])
def test_round_trip(known, tmp_path: Path, which: str) -> None:
    notes, dictionary = getattr(known, f"{which}notes"), known.pair if which else known.bare
    notes.save(tmp_path)
    assert everything(load_notes(tmp_path, dictionary)) == everything(notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents.json", "latents.safetensors"]


def test_saved_twice_the_bytes_are_the_same(known, tmp_path: Path) -> None:
    for name in ("a", "b"):
        known.notes.save(tmp_path / name)
    for name in ("latents.json", "latents.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_they_come_back_beside_the_dictionary(known, tmp_path: Path) -> None:
    save_dictionary(known.bare, tmp_path)
    known.notes.save(tmp_path)
    again = with_notes(load_dictionary(tmp_path), tmp_path)
    assert again.latents[known.on_bridge].rule == known.notes.explanations[known.on_bridge].rule


def test_another_dictionary_is_refused(known, tmp_path: Path) -> None:
    changed = known.bare.W_dec[0].clone()
    changed[2, 3] += 1e-3
    other = replace(known.bare, W_dec=(changed,))
    known.notes.save(tmp_path)
    with pytest.raises(DictionaryError, match="another dictionary"):
        load_notes(tmp_path, other)
    with pytest.raises(DictionaryError, match="another dictionary"):
        with_notes(other, known.notes)
    # Named by directory they are read, and refused, when a latent is first looked at.
    with pytest.raises(DictionaryError, match="another dictionary"):
        _ = with_notes(other, tmp_path).latents
    with pytest.raises(DictionaryError, match="another dictionary"):
        _ = replace(with_notes(known.bare, known.notes), W_dec=(changed,)).latents


def test_the_digest_is_of_what_is_computed(known) -> None:
    bare = known.bare
    same = replace(bare, provenance={"from": "elsewhere"})
    assert digest(same) == digest(bare)
    others = [
        replace(bare, activation=JumpReLU(0.5)),
        replace(bare, activation=JumpReLU(0.25)),
        replace(bare, norm=torch.ones(bare.n_latents)),
        replace(bare, scaling="layer_norm"),
        bare.to(dtype=torch.float64),
        bare.to(dtype=torch.bfloat16),
    ]
    assert len({digest(each) for each in (bare, *others)}) == 7


def test_numbers_of_another_kind_have_no_notes(known) -> None:
    noted = with_notes(known.bare, known.notes)
    assert noted.to("cpu").notes is known.notes
    assert noted.to(dtype=torch.float64).notes is None


def change_header(directory: Path, **changes: Any) -> None:
    path = directory / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_arrays(directory: Path, **changes: Any) -> None:
    """Arrays exchanged, with a header that vouches for the new ones."""
    import hashlib

    path = directory / "latents.safetensors"
    arrays = load_file(path)
    for name, change in changes.items():
        name = name.replace("__", ".")
        arrays[name] = change(arrays[name].clone()).contiguous()
    save_file(arrays, path)
    change_header(directory, arrays=hashlib.sha256(path.read_bytes()).hexdigest())


def set_at(*index: int, to: Any) -> Any:
    def change(array: torch.Tensor) -> torch.Tensor:
        array[index] = to
        return array

    return change


DAMAGES: dict[str, Any] = {
    "no header": lambda d: (d / "latents.json").unlink(),
    "half a header": lambda d: (d / "latents.json").write_bytes((d / "latents.json").read_bytes()[:500]),
    "a header that is a list": lambda d: (d / "latents.json").write_text("[]"),
    "a deep header": lambda d: (d / "latents.json").write_text("[" * 100_000),
    "a field too many": lambda d: change_header(d, more=1),
    "a version to come": lambda d: change_header(d, schema_version=2),
    "no arrays": lambda d: (d / "latents.safetensors").unlink(),
    "half the arrays": lambda d: (d / "latents.safetensors").write_bytes((d / "latents.safetensors").read_bytes()[:-9]),
    "arrays of another save": lambda d: change_header(d, arrays="0" * 64),
    "more latents than arrays": lambda d: change_header(d, n_latents=7),
    "more tokens than arrays": lambda d: change_header(d, n_tokens=9),
    "a model too many": lambda d: change_header(d, models=["a", "b"]),
    "an explained latent that does not exist": lambda d: change_header(
        d, explanations=[json.loads((d / "latents.json").read_text())["explanations"][0] | {"latent": 99}]
    ),
    "effects that are not there": lambda d: change_header(d, models=["a", "b"], effects=[True, True]),
    "effects of too few latents": lambda d: change_arrays(d, effects__0__raised=lambda a: a[:2]),
    "effects of too few tokens": lambda d: change_arrays(d, effects__0__raised_by=lambda a: a[:, :1]),
    "an activation of a latent that does not exist": lambda d: change_arrays(d, features__indices=set_at(0, to=40)),
    "a histogram that lies": lambda d: change_arrays(d, statistics__histogram=set_at(0, 3, to=5)),
    "a strongest token beyond the texts": lambda d: change_arrays(d, statistics__top_tokens=set_at(0, 15, to=10**6)),
    "a token outside its text": lambda d: change_arrays(d, texts__spans=set_at(3, 1, to=10**6)),
    "a text of negative length": lambda d: change_arrays(d, texts__bytes=set_at(0, to=-1)),
    "texts that are not text": lambda d: change_arrays(d, texts__characters=set_at(0, to=0xFF)),
    "ids that are not numbers of tokens": lambda d: change_arrays(d, texts__ids=lambda a: a.double()),
    "tokens without text": lambda d: change_arrays(d, texts__tokens=set_at(0, to=1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(known, tmp_path: Path, damage: str) -> None:
    known.notes.save(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(DictionaryError, match=r"latents\.(json|safetensors): .*notes"):
        load_notes(tmp_path, known.bare)
