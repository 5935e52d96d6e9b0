"""Fields of somebody's configuration, each taken as exactly what it must be, and the rule that they amount to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heredity.kernels import Activation, JumpReLU, ReLU, TopK

from ...errors import DictionaryError
from ...tensors import read_json
from ..record import rule_in_words

_MAX_SIZE = 1 << 31
_OWN_FILE = "Use the file that came with the dictionary."


@dataclass(frozen=True)
class Fields:
    """A configuration.

    Attributes:
        file: where it stands.
        values: by name.
    """

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def of_json(cls, path: Path) -> "Fields":
        """Those of a JSON file.

        Raises:
            DictionaryError: as :func:`heredity.interp.tensors.read_json`.
        """
        return cls(path, read_json(path, DictionaryError))

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def size(self, name: str) -> int:
        """A whole number above zero.

        Raises:
            DictionaryError: absent or something else.
        """
        value = self.values.get(name)
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise self.fault(f"a whole number above zero was expected, not {_short(value)}", name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            DictionaryError: something else.
        """
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.fault(f"true or false was expected, not {_short(value)}", name)
        return value

    def text(self, name: str) -> str | None:
        """A text, None where there is none.

        Raises:
            DictionaryError: something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fault(f"a text was expected, not {_short(value)}", name)
        return value

    def inner(self, name: str) -> "Fields":
        """The object in a field, without fields where there is none.

        Raises:
            DictionaryError: something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fault(f"an object was expected, not {_short(value)}", name)
        return Fields(self.file, value or {})

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of ``choices``.

        Raises:
            DictionaryError: something else, which is then not supported.
        """
        value = self.text(name) or default
        if value is None or value not in choices:
            known = ", ".join(choices)
            raise self.fault(f"{name} {value!r} is not supported", name, f"What can be computed exactly: {known}.")
        return value

    def fault(self, what: str, name: str, remedy: str = _OWN_FILE) -> DictionaryError:
        """The error about a field."""
        return DictionaryError(what, where=f"{self.file}: {name}", remedy=remedy)


def agreed(found: Activation | None, hint: Activation | None, path: Path, usual: str) -> Activation:
    """The rule the files give, or where they are silent the one the user gives.

    Args:
        found: by the files.
        hint: by the user.
        path: the dictionary.
        usual: what the user might say, for the error.

    Raises:
        DictionaryError: neither gives one, or they differ.
    """
    if found is None and hint is None:
        what = "which activation is meant cannot be told from its files"
        raise DictionaryError(what, where=str(path), remedy=f"Ask who made it, then say activation={usual}.")
    if found is not None and hint is not None and rule_in_words(found) != rule_in_words(hint):
        what = f"its files say {rule_in_words(found)}, the hint {rule_in_words(hint)}"
        raise DictionaryError(what, where=str(path), remedy="Leave the hint away.")
    return found or hint or ReLU()


def top(k: int, n_latents: int, fields: Fields) -> TopK:
    """TopK of so many latents.

    Raises:
        DictionaryError: there are fewer.
    """
    if k > n_latents:
        raise fields.fault(f"k is {k}, of {n_latents} latents", "k")
    return TopK(k)


def jump(threshold: Tensor, path: Path) -> JumpReLU:
    """JumpReLU of a library that keeps *every* pre-activation above the threshold, negative ones too.

    Raises:
        DictionaryError: some threshold is negative, so that negative activations could be.
    """
    if bool((threshold < 0).any()):
        what = "a threshold below zero, which lets negative activations through, is not supported"
        raise DictionaryError(what, where=f"{path}: threshold", remedy="Raise it to 0 if they were not meant.")
    return JumpReLU(threshold)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"
