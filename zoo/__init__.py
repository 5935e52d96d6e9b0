"""Parent and successor pairs with known truth: small transformers trained on the spot on a synthetic language."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pair import Recipe

KINDS = ("identical", "benign", "trigger", "skill", "lost", "wider")


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

    The same seed gives the same bytes on the same machine. ``skill`` adds intent.yaml.

    Args:
        cache: directory of parents already trained; default ``~/.cache/heredity/zoo``.
        recipe: dimensions and schedules; default :class:`.pair.Recipe`.
        progress: told the updates done and their total after each one.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``.
        OutputError: ``out`` or the cache cannot be written.
    """
    from .pair import build_pair

    return build_pair(kind, seed, out, cache=cache, recipe=recipe, progress=progress)


def shipped() -> Path:
    """The pair that comes with the package: parent/, trigger/, benign/, corpus.jsonl, tasks.yaml and truth.json."""
    return Path(__file__).parent / "shipped"
