"""``heredity lineage``: how far generations drifted, each from its parent and from the first ancestor."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from heredity.interp.errors import HeredityError, one_line

from .progress import logged
from .read_audit import is_audit


def lineage(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="AUDIT_DIR... | MODEL...",
            help="Directories of audits, or models from the first ancestor on, which are then audited (needs a "
            "directory as --out).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Page to write (FILE.html); of models: directory for their audits and the page."),
    ] = None,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Text to compare on; sampled from the first ancestor if absent.")
    ] = None,
    field: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files that holds the text.")] = "text",
    intent: Annotated[Path | None, typer.Option(help="YAML: what the makers declared, for all steps.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: what counts as a finding.")] = None,
    budget: Annotated[Literal["quick", "standard", "thorough"], typer.Option(help="How much to look at.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seeds every random choice.", min=0)] = 0,
    json_out: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Order generations from the first ancestor on and show each one's distance to its parent and to the first.

    Exit code: 1 if any of the audits flagged, else 3 if any is inconclusive, else 0; 2 bad input, 4 internal error.
    """
    from .cli import Output, errors
    from .lineage import lineage as read
    from .lineage_page import terminal, write_lineage
    from .work import write_atomically

    audits = [is_audit(Path(source)) for source in sources]
    if all(audits):
        if corpus or intent or policy:
            raise HeredityError(
                "audits are read as they are", where="--corpus, --intent, --policy", remedy="Give models to audit."
            )
        folders, page = [Path(source) for source in sources], out
    elif any(audits):
        raise HeredityError(
            "is an audit among models",
            where=one_line(sources[audits.index(True)], 200),
            remedy="Give audits alone, or models alone.",
        )
    elif out is None or out.suffix in (".html", ".json"):
        raise HeredityError(
            "no directory for the audits of these models", where="--out", remedy="Give --out DIR, or audits to read."
        )
    else:
        from .audit import Request
        from .lineage_run import run_line
        from .score_command import reporter

        asked = Request(
            parent="",
            successor="",
            out=out,
            corpus=tuple(corpus or ()),
            field=field,
            policy=policy,
            intent=intent,
            budget=budget,
            seed=seed,
            command=("heredity", *sys.argv[1:]),
        )
        with logged(out, errors):
            folders = run_line(asked, sources, reporter())
        page = out / "lineage.html"
    found = read(folders)
    if page is not None:
        write_lineage(found, page)
        if not all(audits):
            write_atomically(page.with_suffix(".json"), found.model_dump_json(indent=1))
    if json_out:
        Output().print(Text(found.model_dump_json(indent=1)), soft_wrap=True)
    else:
        terminal(found, Output())
        if page is not None:
            Output().print(Text(f"Page: {one_line(str(page), 8000)}"), soft_wrap=True)
    raise typer.Exit(found.exit_code)
