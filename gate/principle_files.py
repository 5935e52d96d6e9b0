"""The files of principles and tasks that an audit was given, read before any model is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heredity.interp.errors import PolicyError, TaskError, one_line

from .policy import Loaded

if TYPE_CHECKING:
    from heredity.circuits.tasks.task import Task


@dataclass(frozen=True)
class Asked:
    """What the user named: the principles, the tasks."""

    principles: "tuple[Task, ...]" = ()
    tasks: "tuple[Task, ...]" = ()

    @property
    def all(self) -> "tuple[Task, ...]":
        """Both."""
        return (*self.principles, *self.tasks)


def load_asked(principles: str | None, tasks: Sequence[str], rules: Loaded) -> Asked:
    """The principles and tasks that were named, if any.

    Raises:
        PrinciplesError, TaskError: a file is malformed, or of a kind that cannot be compared between models.
        PolicyError: the intent names a principle that is not in the file.
    """
    if principles is None and not tasks:
        return Asked()
    from heredity.circuits.tasks.sets import load_principles, load_tasks

    held = load_principles(principles) if principles is not None else ()
    wanted = [task for name in tasks for task in load_tasks(name)]
    names = [task.name for task in wanted]
    for task in wanted:
        if task.metric == "kl":
            raise TaskError(
                f"task {one_line(task.name)!r} has the metric kl, which says nothing of answers, so it compares no two "
                "models",
                where=task.file,
                remedy="Give right and wrong answers, and logit_difference or probability.",
            )
        if names.count(task.name) > 1:
            raise TaskError(
                f"two tasks are called {one_line(task.name)!r}", where=task.file, remedy="Name each task once."
            )
    known = {task.name for task in held}
    if held and rules.intent:
        for change in rules.intent.changes:
            for name in change.principles:
                if name not in known:
                    raise PolicyError(
                        f"change {one_line(change.id)!r} names a principle {one_line(name)!r} that is not in "
                        f"{one_line(str(principles))}",
                        where=str(rules.intent_path),
                        remedy="Name a principle by its id.",
                    )
    return Asked(held, tuple(wanted))
