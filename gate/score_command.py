"""``heredity score``: several candidates against one parent."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from heredity.interp.errors import one_line

from .progress import Bars, logged, logging_to

if TYPE_CHECKING:
    from .score import Reporter
    from .stages import Progress

_MODEL = "See `heredity audit --help`."


def score(
    parent: Annotated[str, typer.Argument(help=f"A model. {_MODEL}")],
    successors: Annotated[list[str], typer.Argument(help="Models to audit against it.")],
    out: Annotated[Path, typer.Option("--out", help="Directory: a folder per candidate, and the table of them.")],
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Text to compare on; sampled from the parent if absent.")
    ] = None,
    field: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files that holds the text.")] = "text",
    intent: Annotated[Path | None, typer.Option(help="YAML: what the makers declared, for all candidates.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: what counts as a finding.")] = None,
    budget: Annotated[Literal["quick", "standard", "thorough"], typer.Option(help="How much to look at.")] = "quick",
    parent_work: Annotated[
        Path | None, typer.Option(help="Directory that keeps the parent's part of the work. Default: OUT/parent.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seeds every random choice.", min=0)] = 0,
    json_out: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Audit every SUCCESSOR against PARENT and rank them, the worst first; an interrupted run resumes.

    Exit code: that of the worst candidate, in the order 4 internal error, 2 bad input, 1 finding over policy,
    3 inconclusive, 0 pass. A candidate that cannot be audited does not stop the others.
    """
    from .audit import Request
    from .cli import Output, errors
    from .score import score as run
    from .score_page import terminal

    with logged(out, errors):
        scores = run(
            Request(
                parent=parent,
                successor="",
                out=out,
                corpus=tuple(corpus or ()),
                field=field,
                policy=policy,
                intent=intent,
                budget=budget,
                seed=seed,
                command=("heredity", *sys.argv[1:]),
                parent_work=parent_work,
            ),
            successors,
            reporter(),
        )
    if json_out:
        Output().print(Text(scores.model_dump_json(indent=1)), soft_wrap=True)
    else:
        terminal(scores, Output())
        Output().print(Text(f"Table: {one_line(str(out / 'scores.html'), 8000)}"), soft_wrap=True)
    raise typer.Exit(scores.exit_code)


def reporter() -> "Reporter":
    """Says on stderr what is audited, with bars for each audit."""
    from .cli import errors
    from .score import Reporter

    return Reporter(lambda text: errors.print(text, markup=False, highlight=False), follow)


@contextmanager
def follow(out: Path) -> "Iterator[Progress]":
    """Bars for one audit of several, and its own ``out/run.log``."""
    from .cli import errors

    with logging_to(out), Bars(errors) as bars:
        yield bars.update
