"""What was found out about a dictionary's latents, kept beside it: statistics, effects on logits, explanations, texts.

::

    DIR/latents.json         of which dictionary, models and seed; rules with their scores; the sha256 of the arrays
    DIR/latents.safetensors  statistics, logit effects, active latents of those explained, and the texts themselves

One letter means one dimension: T tokens of all texts, F latents.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch import Tensor

from heredity.kernels import FeatureCSR, JumpReLU, Statistics

from ..errors import DictionaryError
from ..explain.contexts import Contexts
from ..explain.record import Explanation
from ..model import Encoded
from ..store import replacing
from .record import Dictionary

_AGAIN = "Describe the dictionary again."
_STATISTICS = ("count", "sum", "sum_of_squares", "max", "histogram", "top_values", "top_tokens")
_EFFECTS = ("raised", "raised_by", "lowered", "lowered_by")


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """Tokens whose logit each latent changes most, directly.

    Changes are per unit of activation where the last residual has RMS 1, with their mean over the vocabulary taken off
    (which the softmax would). Another RMS divides all of them by it.

    Attributes:
        raised: int64 [F, n], token ids, most first.
        raised_by: float32 [F, n].
        lowered: int64 [F, n], token ids, most first.
        lowered_by: float32 [F, n], negative.
    """

    raised: Tensor
    raised_by: Tensor
    lowered: Tensor
    lowered_by: Tensor


@dataclass(frozen=True, eq=False)
class LatentNotes:
    """What :func:`.describing.describe` found.

    Attributes:
        dictionary: digest of the dictionary.
        models: digests of the models.
        seed: of the sample and the explanations.
        contexts: the texts.
        statistics: of each latent over the T tokens.
        effects: of each model; None where the dictionary writes to no place that reaches the logits directly.
        names: text of the tokens in ``effects``.
        features: T tokens; holds the latents ``kept`` and no other.
        kept: the latents that were explained.
        explanations: of each of these.
    """

    dictionary: str
    models: tuple[str, ...]
    seed: int
    contexts: Contexts
    statistics: Statistics
    effects: tuple[LogitEffects | None, ...]
    names: Mapping[int, str]
    features: FeatureCSR
    kept: tuple[int, ...]
    explanations: Mapping[int, Explanation]

    def __repr__(self) -> str:
        s = self.statistics
        return f"LatentNotes({s.n_latents} latents over {s.n_tokens} tokens, {len(self.explanations)} explained)"

    def save(self, directory: str | Path) -> None:
        """Write ``latents.json`` and ``latents.safetensors`` into ``directory``, the texts included.

        Raises:
            StoreError: they cannot be written.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        with replacing(directory / "latents.safetensors") as partial:
            save_file(_arrays(self), partial)
        header = _Header(
            dictionary=self.dictionary,
            models=self.models,
            seed=self.seed,
            n_latents=self.features.n_latents,
            n_tokens=self.features.n_tokens,
            effects=tuple(effect is not None for effect in self.effects),
            names=dict(self.names),
            explanations=tuple(self.explanations[latent] for latent in self.kept),
            arrays=_sha256(directory / "latents.safetensors"),
        )
        # Last, so that it never speaks for arrays that are not there.
        with replacing(directory / "latents.json") as partial:
            partial.write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_notes(directory: str | Path, dictionary: Dictionary) -> LatentNotes:
    """The notes in ``directory``, which must be on ``dictionary``.

    Raises:
        DictionaryError: they are absent, damaged, or on another dictionary.
    """
    from safetensors import SafetensorError

    directory = Path(directory)
    path, arrays = directory / "latents.json", directory / "latents.safetensors"
    try:
        header = _Header.model_validate_json(path.read_bytes())
    except OSError as fault:
        what = f"no readable notes ({fault.strerror or fault})"
        raise DictionaryError(what, where=str(path), remedy="Name the directory they were saved in.") from fault
    except (ValidationError, ValueError, RecursionError) as fault:
        what = f"malformed notes ({_first(fault)})"
        raise DictionaryError(what, where=str(path), remedy=_AGAIN) from fault
    if header.dictionary != digest(dictionary):
        raise DictionaryError(
            "these notes are on another dictionary", where=str(path), remedy="Load the one they were made of."
        )
    try:
        if _sha256(arrays) != header.arrays:
            raise ValueError("they are not those the notes were saved with")
        return _read(header, arrays)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as fault:
        what = f"damaged or absent arrays of notes ({_first(fault)})"
        raise DictionaryError(what, where=str(arrays), remedy=_AGAIN) from fault


def with_notes(dictionary: Dictionary, notes: LatentNotes | str | Path) -> Dictionary:
    """``dictionary`` with ``notes``, or with those in a directory, which is read when a latent is first looked at.

    Raises:
        DictionaryError: notes on another dictionary.
    """
    if isinstance(notes, LatentNotes) and notes.dictionary != digest(dictionary):
        raise DictionaryError("these notes are on another dictionary", where=repr(dictionary), remedy=_AGAIN)
    return replace(dictionary, notes=notes if isinstance(notes, LatentNotes) else Path(notes))


def digest(dictionary: Dictionary) -> str:
    """Sha256 (hex) over everything that decides what the dictionary computes; where it comes from is left out."""
    whole = hashlib.sha256()
    rule = dictionary.activation
    threshold = rule.threshold if isinstance(rule, JumpReLU) else None
    words = "JumpReLU" if isinstance(rule, JumpReLU) else repr(rule)
    whole.update(repr((dictionary.kind, dictionary.reads, dictionary.writes, dictionary.scaling, words)).encode())
    tensors = [*dictionary.W_enc, dictionary.b_enc, *dictionary.W_dec, *dictionary.b_dec]
    tensors += [dictionary.norm, dictionary.W_skip, None if threshold is None else torch.as_tensor(threshold)]
    for tensor in tensors:
        if tensor is None:
            whole.update(b"none")
            continue
        whole.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16.
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


# --- files ---


class _Header(BaseModel):
    """``latents.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    dictionary: str
    models: tuple[str, ...]
    seed: int
    n_latents: NonNegativeInt
    n_tokens: NonNegativeInt
    effects: tuple[bool, ...]
    names: dict[int, str]
    explanations: tuple[Explanation, ...]
    arrays: str


def _arrays(notes: LatentNotes) -> dict[str, Tensor]:
    found = {f"statistics.{name}": getattr(notes.statistics, name) for name in _STATISTICS}
    found |= {f"features.{name}": getattr(notes.features, name) for name in ("indptr", "indices", "values")}
    for m, effects in enumerate(notes.effects):
        if effects is not None:
            found |= {f"effects.{m}.{name}": getattr(effects, name) for name in _EFFECTS}
    texts = notes.contexts.texts
    data = [text.text.encode("utf-8", "surrogatepass") for text in texts]
    found["texts.characters"] = torch.frombuffer(bytearray(b"".join(data)) or bytearray(1), dtype=torch.uint8)
    found["texts.bytes"] = torch.tensor([len(each) for each in data], dtype=torch.int64)
    found["texts.tokens"] = torch.tensor([len(text.ids) for text in texts], dtype=torch.int64)
    found["texts.ids"] = torch.tensor([i for text in texts for i in text.ids], dtype=torch.int64)
    spans = [span for text in texts for span in text.spans]
    found["texts.spans"] = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return {name: array.detach().cpu().contiguous() for name, array in found.items()}


def _read(header: _Header, path: Path) -> LatentNotes:
    from safetensors.torch import load_file

    found = load_file(path)
    f, t = header.n_latents, header.n_tokens
    statistics = Statistics(**{name: found[f"statistics.{name}"] for name in _STATISTICS}, n_tokens=t).validate()
    parts = [found[f"features.{name}"] for name in ("indptr", "indices", "values")]
    features = FeatureCSR(parts[0], parts[1], parts[2], f).validate()
    contexts = Contexts(tuple(_texts(found)))
    if {statistics.n_latents, features.n_latents} != {f} or {len(contexts), features.n_tokens} != {t}:
        raise ValueError("they are of different numbers of latents or tokens")
    if t and int(statistics.top_tokens.max()) >= t:
        raise ValueError("a token lies beyond the last text")
    effects = [
        LogitEffects(*(found[f"effects.{m}.{name}"] for name in _EFFECTS)) if there else None
        for m, there in enumerate(header.effects)
    ]
    if len(effects) != len(header.models):
        raise ValueError("logit effects are of another number of models")
    for each in effects:
        shapes = {getattr(each, name).shape for name in _EFFECTS} if each is not None else set()
        if any(len(shape) != 2 or shape[0] != f for shape in shapes) or len(shapes) > 1:
            raise ValueError("logit effects are of another number of latents")
    if any(not 0 <= each.latent < f for each in header.explanations):
        raise ValueError("a latent that does not exist is explained")
    return LatentNotes(
        dictionary=header.dictionary,
        models=header.models,
        seed=header.seed,
        contexts=contexts,
        statistics=statistics,
        effects=tuple(effects),
        names=header.names,
        features=features,
        kept=tuple(each.latent for each in header.explanations),
        explanations={each.latent: each for each in header.explanations},
    )


def _texts(found: Mapping[str, Tensor]) -> list[Encoded]:
    if any(found[f"texts.{name}"].dtype != torch.int64 for name in ("bytes", "tokens", "ids", "spans")):
        raise TypeError("texts are not told in whole numbers")
    data = found["texts.characters"].numpy().tobytes()
    ids, spans = found["texts.ids"].tolist(), [(int(a), int(b)) for a, b in found["texts.spans"].tolist()]
    texts, byte, token = [], 0, 0
    for n_bytes, n in zip(found["texts.bytes"].tolist(), found["texts.tokens"].tolist(), strict=True):
        text = data[byte : byte + n_bytes].decode("utf-8", "surrogatepass")
        own = spans[token : token + n]
        if n < 0 or n_bytes < 0 or any(not 0 <= a <= b <= len(text) for a, b in own):
            raise ValueError("a token lies outside its text")
        texts.append(Encoded(text, tuple(ids[token : token + n]), tuple(own)))
        byte, token = byte + n_bytes, token + n
    if not len(ids) == len(spans) == token:
        raise ValueError("texts and tokens do not belong together")
    return texts


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first(fault: Any) -> str:
    if isinstance(fault, ValidationError):
        first = fault.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
    return str(getattr(fault, "strerror", None) or fault or type(fault).__name__)
