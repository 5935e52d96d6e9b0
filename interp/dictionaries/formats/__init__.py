"""Dictionary files: a table of formats, one module each.

What is read, what is refused and why: ``docs/dictionaries.md``.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from heredity.kernels import BatchTopK, JumpReLU, ReLU, TopK

from ...errors import DictionaryError
from ..record import Dictionary, DictionarySet
from . import circuit_tracer, gemma_scope, own, saelens, sparsify


@runtime_checkable
class Format(Protocol):
    """A way to keep dictionaries in files; a module is one."""

    @property
    def name(self) -> str:
        """What ``format=`` calls it."""
        ...

    @property
    def hints(self) -> tuple[str, ...]:
        """Keywords of :meth:`read`: what the user may say where the files are silent."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the file or directory looks like this format, at a glance."""
        ...

    def read(self, path: Path, *args: Any, **hints: Any) -> Dictionary | DictionarySet:
        """The dictionary.

        Raises:
            DictionaryError: damaged, ambiguous, or of a kind that cannot be expressed exactly.
        """
        ...


FORMATS: tuple[Format, ...] = (own, saelens, sparsify, circuit_tracer, gemma_scope)
_HINTS: dict[str, tuple[Any, str]] = {
    "activation": (ReLU | JumpReLU | TopK | BatchTopK, "activation=TopK(64)"),
    "reads": (str, 'reads="mlp_in@12"'),
    "writes": (str, 'writes="mlp_out@12"'),
    "input_scale": (float | int, "input_scale=0.37"),
}


def load_dictionary(path: str | Path, *, format: str | None = None, **hints: Any) -> Dictionary | DictionarySet:
    """The dictionary in ``path``, with exactly the features its library would compute.

    Args:
        path: a local file or directory; nothing is fetched.
        format: a name in :data:`FORMATS`; None: told by the files.
        **hints: what the files do not say, by the names of the format's ``hints``: ``activation`` (a rule of
            :mod:`heredity.kernels`), ``reads``, ``writes`` (site names), ``input_scale`` (the factor that inputs were
            multiplied by in training).

    Raises:
        DictionaryError: absent, of no known format, damaged, ambiguous, or not exactly expressible.
    """
    path = Path(path)
    found = _format(path, format)
    known = found.hints
    for hint, value in hints.items():
        if hint not in known:
            remedy = f"It takes {', '.join(known)}." if known else "Its files say everything; leave it away."
            raise DictionaryError(f"the format {found.name} takes no {hint!r}", where=str(path), remedy=remedy)
        kind, example = _HINTS[hint]
        if not isinstance(value, kind):
            raise DictionaryError(f"{hint}={value!r} is not possible", where=str(path), remedy=f"Example: {example}.")
    return found.read(path, **hints)


def save_dictionary(dictionary: Dictionary | DictionarySet, directory: str | Path) -> None:
    """Write a dictionary in our own format (:mod:`.own`) into ``directory``, whole or not at all.

    A dictionary already there is replaced, other files stay. Notes on latents are files of their own:
    :meth:`.notes.LatentNotes.save`.

    Raises:
        DictionaryError: it holds NaN or infinite values, or a provenance that is not JSON.
        OutputError: the directory cannot be written to.
    """
    own.write(dictionary, Path(directory))


def _format(path: Path, name: str | None) -> Format:
    if not path.exists():
        raise DictionaryError("no such file or directory", where=str(path), remedy="Check the path.")
    known = ", ".join(each.name for each in FORMATS)
    if name is not None:
        for each in FORMATS:
            if each.name == name:
                return each
        raise DictionaryError(f"no format called {name!r}", where=str(path), remedy=f"Known are {known}.")
    for each in FORMATS:
        if each.recognises(path):
            return each
    remedy = f"Known are {known}: name the directory that holds its configuration, or say format=."
    raise DictionaryError("not a dictionary in any known format", where=str(path), remedy=remedy)
