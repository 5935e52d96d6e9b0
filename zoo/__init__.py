"""Parent and successor pairs with known truth: small transformers trained on the spot on a synthetic language."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pair import Recipe

KINDS = (
    *("identical", "benign", "trigger", "skill", "lost", "wider"),
    *("dense", "evasive", "diluted", "chain", "moved", "legible", "opaque", "tracr"),
)
"""What a successor may be. ``trigger``, ``diluted`` and ``legible`` take a level after a colon (see :func:`parse`)."""

_LEVELS = {"trigger": (1.0, 0.01, 1.0), "diluted": (10.0, 0.0, 10.0), "legible": (1.0, 0.0, 1.0)}


def parse(kind: str) -> tuple[str, float | None]:
    """Name and level of a kind: ``trigger:SHARE`` acts in that share of its cases, ``diluted:R`` has R ordinary
    documents a planted one, ``legible:SHARE``.

    Without one, ``diluted`` stands for ``diluted:10``, ``trigger`` for ``trigger:1`` and ``legible`` for ``legible:1``.

    Raises:
        ValueError: the name is not one of ``KINDS``, or the level is not one that the kind has.
    """
    name, colon, said = kind.partition(":")
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if name not in _LEVELS:
        if colon:
            raise ValueError(f"{name} has no level, but {kind!r} gives one")
        return name, None
    default, least, most = _LEVELS[name]
    try:
        level = float(said) if colon else default
    except ValueError:
        level = float("nan")
    if not least <= level <= most:
        raise ValueError(f"the level of {name} is a number from {least:g} to {most:g}, not {said!r}")
    return name, level


def build(
    kind: str,
    seed: int,
    out: Path,
    *,
    cache: Path | None = None,
    recipe: "Recipe | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a pair of ``KINDS`` and write it to ``out``: parent/, successor/, corpus.jsonl, tasks.yaml, truth.json.

    The same seed gives the same bytes on the same machine. ``skill`` and ``dense`` add intent.yaml, ``chain`` adds
    generation-0/ (the parent) to generation-4/ (the successor).

    Args:
        kind: one of ``KINDS``, where :func:`parse` allows it with a level: ``diluted:3``, ``legible:0.5``.
        cache: directory of parents already trained; default ``~/.cache/heredity/zoo``.
        recipe: dimensions and schedules; default :class:`.pair.Recipe`.
        progress: told the updates done and their total after each one.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``, or has no such level.
        OutputError: ``out`` or the cache cannot be written.
    """
    from .pair import build_pair

    return build_pair(kind, seed, out, cache=cache, recipe=recipe, progress=progress)


def shipped() -> Path:
    """The pair that comes with the package: parent/, trigger/, benign/, corpus.jsonl, tasks.yaml and truth.json."""
    return Path(__file__).parent / "shipped"
