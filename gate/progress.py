"""Progress bars on stderr, one line per stage, and the same stages in the run log."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from heredity.interp.errors import HeredityError, one_line

from .work import unwritable

log = logging.getLogger("heredity")


class Bars:
    """Bars that appear as stages report themselves; silent where stderr is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Stage ``stage`` has done ``done`` of ``total``."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)
        if done in (0, total):
            log.info("%s: %d of %d", stage, done, total)

    def note(self, text: str) -> None:
        """A line about what is being done, for work without countable parts."""
        self._progress.console.print(text, markup=False, highlight=False)
        log.info("%s", text)

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@contextmanager
def logging_to(out: Path) -> Iterator[None]:
    """``out`` exists, and what is logged goes to ``out/run.log`` too.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(out / "run.log", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise unwritable(out, error) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def logged(out: Path, console: Console) -> Iterator[None]:
    """:func:`logging_to` for a whole command: how it began and ended; an interrupt is said on ``console``.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    with logging_to(out):
        try:
            log.info("started: %s", one_line(" ".join(sys.argv), 2000))
            yield
            log.info("finished")
        except KeyboardInterrupt:
            log.error("interrupted")
            console.print("interrupted; the same command resumes")
            raise
        except BaseException as error:
            log.error("stopped: %s", one_line(str(error)) or type(error).__name__)
            if not isinstance(error, HeredityError):
                log.error("%s", traceback.format_exc())
            raise
