"""One audit per candidate against the same parent, whose part of the work is done once; a table of them, worst first.

A candidate that cannot be audited has a row that says why; the others are audited all the same.
"""

import gc
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from heredity.interp.errors import HeredityError, one_line

from . import audit as single
from .policy import load_rules
from .records import ModelRecord
from .row import Row, row_of
from .values import Record, sayable
from .work import write_atomically

if TYPE_CHECKING:
    from heredity.interp import Model

    from .stages import Progress

SCHEMA_VERSION = "1.0"

PARENT_WORK = "parent"
"""Folder of the output that keeps the parent's part."""

Outcome = Literal["pass", "flag", "inconclusive", "bad_input", "internal_error"]

SEVERITY: tuple[Outcome, ...] = ("internal_error", "bad_input", "flag", "inconclusive", "pass")
"""The worst first. What could not be audited outweighs what was flagged: a script that stops at a flag must not take a
candidate that nobody looked at for one that passed."""

CODES: dict[Outcome, int] = {"pass": 0, "flag": 1, "bad_input": 2, "inconclusive": 3, "internal_error": 4}

_RESERVED = frozenset({PARENT_WORK, "scores", "con", "nul", "aux", "prn"})
_NAME = 60

log = logging.getLogger("heredity")


class Candidate(Record):
    """One candidate and what its audit says."""

    name: str
    """Its directory in the output, which holds ``report.html`` and ``audit.json``."""
    spec: str
    model: ModelRecord | None
    """Null where it could not be audited."""
    outcome: Outcome
    error: str | None
    """Why it could not be audited, in one line."""
    row: Row | None
    seconds: float


class Scores(Record):
    """All candidates, the worst first."""

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    parent_spec: str
    parent_sha256: str
    candidates: tuple[Candidate, ...]
    exit_code: int
    """Of the worst candidate: 4 internal error, 2 bad input, 1 flag, 3 inconclusive, 0 pass, in this order."""
    command: tuple[str, ...]
    started: str
    seconds: float
    """Of the whole run, loading the parent included."""


@dataclass(frozen=True)
class Reporter:
    """How a run of several audits tells what it is doing.

    Attributes:
        announce: a line when a candidate's turn comes.
        follow: a context for one audit that writes into a folder: it keeps the run's log there and gives what its
            stages report to.
    """

    announce: Callable[[str], None]
    follow: "Callable[[Path], AbstractContextManager[Progress]]"


def score(request: single.Request, successors: Sequence[str], reporter: Reporter) -> Scores:
    """Audit each of ``successors`` as ``request`` says (whose own ``successor`` is not read) into a folder of its own
    in ``request.out``, and write ``scores.json``, ``scores.md`` and ``scores.html`` there.

    Raises:
        HeredityError: the parent, the corpus, the policy or the intent cannot be used, or ``request.out`` cannot be
            written.
    """
    from heredity.interp.corpus import read_corpus
    from heredity.interp.load import load

    from .score_page import write_pages

    started, clock = datetime.now(UTC), time.monotonic()
    # What is wrong with these is wrong for every candidate, and is said once and at once.
    load_rules(request.policy, request.intent)
    if request.corpus:
        read_corpus(request.corpus, field=request.field)
    names = folders(successors)
    reporter.announce("loading the parent")
    parent = load(request.parent, role="parent")
    found: list[Candidate] = []
    for number, (name, spec) in enumerate(zip(names, successors, strict=True), start=1):
        reporter.announce(f"candidate {number} of {len(names)}: {name}")
        asked = replace(
            request,
            successor=spec,
            out=request.out / name,
            parent_work=request.parent_work or request.out / PARENT_WORK,
        )
        found.append(_candidate(asked, name, parent, reporter))
        gc.collect()  # models hold each other in cycles, and two successors at a time may not fit
    found.sort(key=_rank)
    scores = Scores(
        parent_spec=sayable(request.parent),
        parent_sha256=parent.digest,
        candidates=tuple(found),
        exit_code=CODES[found[0].outcome],
        command=tuple(map(sayable, request.command)),
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - clock, 1),
    )
    write_pages(scores, request.out)
    # Last, so that a reader who finds it finds everything.
    write_atomically(request.out / "scores.json", scores.model_dump_json(indent=1))
    return scores


def _candidate(asked: single.Request, name: str, parent: "Model", reporter: Reporter) -> Candidate:
    clock = time.monotonic()
    outcome: Outcome
    model, row, error = None, None, None
    try:
        with reporter.follow(asked.out) as progress, own_threads():
            try:
                audit = single.run(asked, progress, parent=parent)
            except HeredityError as fault:
                log.error("stopped: %s", fault)
                raise
            except Exception:
                log.error("stopped: %s", traceback.format_exc())
                raise
        model, row, outcome = audit.successor, row_of(audit), audit.verdict
    except HeredityError as fault:
        outcome, error = "bad_input", str(fault)
    except Exception as fault:
        outcome, error = "internal_error", one_line(f"{type(fault).__name__}: {fault}")
    return Candidate(
        name=name,
        spec=sayable(asked.successor),
        model=model,
        outcome=outcome,
        error=error,
        row=row,
        seconds=round(time.monotonic() - clock, 1),
    )


@contextmanager
def own_threads() -> Iterator[None]:
    """Leave the number of threads, which an audit of small models lowers, as the next audit would find it alone."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rank(candidate: Candidate) -> tuple[int, int, float, str]:
    row = candidate.row
    size = 0.0 if row is None or row.effect.status == "not_measured" else row.effect.estimate
    return SEVERITY.index(candidate.outcome), -(row.counted if row else 0), -size, candidate.name


def folders(specs: Sequence[str]) -> list[str]:
    """A directory name for each model argument: made of its last part (or last two, or with a number, where an earlier
    one has that name), of letters, digits, ``.``, ``_`` and ``-`` alone.

    Names depend on the arguments before and not on those after, so that candidates can be added to a run.

    Raises:
        HeredityError: an argument is given twice.
    """
    out: list[str] = []
    for i, spec in enumerate(specs):
        if spec in specs[:i]:
            raise HeredityError("is given twice", where=sayable(spec), remedy="Name each candidate once.")
        parts = [part for part in re.split(r"[/\\+]", spec) if part]
        name = next((slug for slug in (_slug(parts[-1:]), _slug(parts[-2:])) if _free(slug, out)), None)
        if name is None:
            base, number = _slug(parts[-1:]), 2
            while not _free(f"{base}-{number}", out):
                number += 1
            name = f"{base}-{number}"
        out.append(name)
    return out


def _slug(parts: Sequence[str]) -> str:
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")[:_NAME]
    return text or "candidate"


def _free(name: str, taken: Sequence[str]) -> bool:
    # Case is not told apart: some file systems do not either.
    return name.lower() not in {other.lower() for other in taken} | _RESERVED
