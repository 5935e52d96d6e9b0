"""Several tasks in one file: the tasks of an audit, and the principles that a successor has to keep.

A principle is a task whose right answer keeps it and whose wrong answer violates it, on prompts where it has to act;
the counterfactual prompt is one where it does not act (docs/principles.md).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from heredity.interp.errors import PrinciplesError, TaskError

from .task import SHIPPED, Strict, Task, load_task, parse_yaml, read_file, validated

SHIPPED_SETS = ("zoo",)
"""Names of sets of tasks that :func:`load_tasks` knows beside those of single tasks."""

SHIPPED_PRINCIPLES = ("zoo", "chat")
"""Names that :func:`load_principles` knows."""

_NAMES = {"name": "id", "about": "description", "right": "keeps", "wrong": "violates"}
_MOST = 50
_FORMAT = "docs/principles.md has the format."
_Each = TypeVar("_Each", bound=Task)


class Principle(Task):
    """A task in the words of a file of principles: ``id``, ``description``, ``keeps``, ``violates``."""

    metric: Literal["logit_difference", "probability"] = "logit_difference"  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _in_words_of_tasks(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        found = _renamed(value, ("name", "about"))
        for group in ("templates", "examples"):
            if isinstance(found.get(group), list):
                found[group] = [
                    _renamed(item, ("right", "wrong")) if isinstance(item, Mapping) else item for item in found[group]
                ]
        return found


class _File(Strict):
    version: Literal[1]


class _Tasks(_File):
    tasks: tuple[Task, ...] = Field(min_length=1, max_length=_MOST)

    @field_validator("tasks")
    @classmethod
    def _differ(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        return _distinct(tasks)


class _Principles(_File):
    principles: tuple[Principle, ...] = Field(min_length=1, max_length=_MOST)

    @field_validator("principles")
    @classmethod
    def _differ(cls, principles: tuple[Principle, ...]) -> tuple[Principle, ...]:
        return _distinct(principles)


def load_tasks(spec: str | Path) -> tuple[Task, ...]:
    """The shipped task or set of tasks of that name, or those in a file: of one task, of several, or of a zoo pair.

    What the ``tasks.yaml`` of a zoo pair says of roles is not read: only its prompts are.

    Raises:
        TaskError: no such file or name, or it is malformed.
    """
    where, path = str(spec), Path(spec)
    if where in SHIPPED_SETS:
        path = Path(__file__).parent / "shipped" / f"{where}.yaml"
    elif where in SHIPPED:
        return (load_task(spec),)
    elif path.suffix not in (".yaml", ".yml", ".jsonl"):
        raise TaskError(
            "neither a shipped task nor a .yaml or .jsonl file",
            where=where,
            remedy=f"Shipped: {', '.join((*SHIPPED, *SHIPPED_SETS))}.",
        )
    if path.suffix == ".jsonl":
        return (load_task(spec),)
    content = parse_yaml(read_file(path, where)[1], where)
    if not isinstance(content, dict) or "tasks" not in content:
        return (load_task(spec),)
    if isinstance(content["tasks"], list):
        content["tasks"] = [_from_zoo(item) for item in content["tasks"]]
    return _identified(validated(_Tasks, content, where).tasks, where)


def load_principles(spec: str | Path) -> tuple[Principle, ...]:
    """The shipped principles of that name, or those in a ``.yaml`` file.

    Raises:
        PrinciplesError: no such file or name, or it is malformed.
    """
    where, path = str(spec), Path(spec)
    if where in SHIPPED_PRINCIPLES:
        path = Path(__file__).parent / "principles" / f"{where}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise PrinciplesError(
            "neither shipped principles nor a .yaml file",
            where=where,
            remedy=f"Shipped: {', '.join(SHIPPED_PRINCIPLES)}.",
        )
    content = parse_yaml(read_file(path, where, PrinciplesError)[1], where, PrinciplesError)
    found = validated(_Principles, content, where, PrinciplesError, _FORMAT, _NAMES)
    return _identified(found.principles, where)


def _renamed(value: Mapping[Any, Any], names: tuple[str, ...]) -> dict[Any, Any]:
    """``value`` with the words of principles replaced by those of tasks, which are not fields of a principle."""
    for name in names:
        if name in value:
            raise ValueError(f"{name!r} is called {_NAMES[name]!r} in a principle")
    own = {_NAMES[name]: name for name in names}
    return {own.get(key, key): item for key, item in value.items()}


def _from_zoo(item: Any) -> Any:
    """An entry of a zoo pair's ``tasks.yaml`` as a task; anything else as it is."""
    if not isinstance(item, dict) or not isinstance(pairs := item.get("pairs"), list):
        return item
    if not all(isinstance(pair, dict) for pair in pairs):
        return item
    return {
        "name": item.get("id"),
        "examples": [
            {
                "clean": pair.get("clean"),
                "counterfactual": pair.get("counterfactual"),
                "right": f" {pair.get('answer')}",
                "wrong": f" {pair.get('counterfactual_answer')}",
            }
            for pair in pairs
        ],
    }


def _distinct(tasks: tuple[_Each, ...]) -> tuple[_Each, ...]:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two are called {name!r}")
    return tasks


def _identified(tasks: tuple[_Each, ...], where: str) -> tuple[_Each, ...]:
    """Each with its file and a digest of its own, so that a change of one changes nothing for the others."""
    out = []
    for task in tasks:
        text = json.dumps(task.model_dump(mode="json", exclude={"sha256", "file"}), sort_keys=True)
        out.append(task.model_copy(update={"sha256": hashlib.sha256(text.encode()).hexdigest(), "file": where}))
    return tuple(out)
