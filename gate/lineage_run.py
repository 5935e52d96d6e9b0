"""The audits that a line of models needs: each generation against the one before it and against the first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from heredity.interp.errors import HeredityError

from . import audit as single
from .policy import load_rules
from .score import PARENT_WORK, Reporter, own_threads
from .values import sayable

if TYPE_CHECKING:
    from heredity.interp import Model


def run_line(request: single.Request, models: Sequence[str], reporter: Reporter) -> list[Path]:
    """Audit the steps of ``models`` and the distances to the first of them as ``request`` says (whose own ``parent``
    and ``successor`` are not read); the folders of the audits in ``request.out``.

    Where no corpus is given, all audits read text sampled from the first ancestor, so that losses are comparable.

    Raises:
        HeredityError: a model, the corpus, the policy or the intent cannot be used.
    """
    from heredity.interp.load import load

    if len(models) < 2:
        raise HeredityError(
            "is a single model", where=sayable(models[0]), remedy="Name at least a parent and a successor."
        )
    load_rules(request.policy, request.intent)
    reporter.announce("loading the first ancestor")
    first = load(models[0], role="parent")
    out = []
    for number in range(1, len(models)):
        for ancestor in sorted({0, number - 1}, reverse=True):
            folder = request.out / f"{number}-from-{ancestor}"
            reporter.announce(f"generation {number} of {len(models) - 1} against generation {ancestor}")
            parent: Model | None = first if ancestor == 0 else None
            asked = replace(
                request,
                parent=models[ancestor],
                successor=models[number],
                out=folder,
                parent_work=request.parent_work or request.out / PARENT_WORK,
            )
            with reporter.follow(folder) as progress, own_threads():
                single.run(asked, progress, parent=parent, author=first)
            out.append(folder)
    return out
