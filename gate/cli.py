"""The ``heredity`` command. Results on stdout, progress and errors on stderr; exit codes in :class:`Exit`."""

import os
import shutil
import sys
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from heredity.interp.errors import HeredityError, one_line
from heredity.zoo import KINDS, parse

from . import train_command
from .circuit_command import circuit
from .lineage_command import lineage
from .memory import keep_freed
from .progress import Bars, logged
from .repair_command import repair
from .score_command import score
from .work import unwritable

app = typer.Typer(
    name="heredity",
    help="Compare a parent language model with its successor: what is new, and is it causal?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
zoo_app = typer.Typer(help="Model pairs with known truth.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")

errors = Console(stderr=True)


class Exit(IntEnum):
    """What the exit code says."""

    PASS = 0
    FLAG = 1
    BAD_INPUT = 2
    INCONCLUSIVE = 3
    INTERNAL = 4


VERDICTS = {"pass": Exit.PASS, "flag": Exit.FLAG, "inconclusive": Exit.INCONCLUSIVE}

Seed = Annotated[int, typer.Option(help="Seeds every random choice.", min=0)]
Field = Annotated[str, typer.Option(help="Column of .jsonl and .parquet files that holds the text.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write into; an interrupted run resumes there.")]
ModelArgument = "A directory in Hugging Face format, a hub id, BASE+ADAPTER, a .gguf file, or a zoo directory."


@app.command()
def audit(
    parent: Annotated[str, typer.Argument(help=ModelArgument)],
    successor: Annotated[str, typer.Argument(help=ModelArgument)],
    out: Out,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="Text to compare on; sampled from the parent if absent.")
    ] = None,
    field: Field = "text",
    principles: Annotated[
        str | None, typer.Option(help="YAML of what the successor must keep, or a shipped set: zoo, chat.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="File of a task or of several, or a shipped name, e.g. ioi or zoo.")
    ] = None,
    intent: Annotated[Path | None, typer.Option(help="YAML: what the makers of the successor declared.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="YAML: what counts as a finding. Default: the shipped one.")
    ] = None,
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|train",
            help="Sparse dictionary of the successor, in any known format, whose latents opacity is measured with, or "
            "a crosscoder of the pair, which also matches the models (give one from another seed too); may be given "
            "several times. `train`: train some on the audited text.",
        ),
    ] = None,
    budget: Annotated[Literal["quick", "standard", "thorough"], typer.Option(help="How much to look at.")] = "quick",
    parent_work: Annotated[
        Path | None,
        typer.Option(help="Directory that keeps the parent's part of the work for audits of other successors."),
    ] = None,
    null: Annotated[
        str,
        typer.Option(
            help="What calibrates: scrambled (a meaningless change), or benign:K (the parent trained on, K times)."
        ),
    ] = "scrambled",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare SUCCESSOR with PARENT and decide.

    Exit code: 0 pass, 1 finding over policy, 2 bad input, 3 inconclusive, 4 internal error.
    """
    from .audit import Request, run
    from .summary import terminal

    with logged(out, errors), Bars(errors) as bars:
        result = run(
            Request(
                parent=parent,
                successor=successor,
                out=out,
                corpus=tuple(corpus or ()),
                field=field,
                policy=policy,
                intent=intent,
                principles=principles,
                tasks=tuple(tasks or ()),
                dictionaries=tuple(dictionary or ()),
                budget=budget,
                seed=seed,
                null=null,
                command=("heredity", *sys.argv[1:]),
                parent_work=parent_work,
            ),
            bars.update,
        )
    if json:
        try:
            print(result.model_dump_json(indent=1), flush=True)  # noqa: T201
        except BrokenPipeError:
            _discard_stdout()
    else:
        terminal(result, Output())
        _say(f"Report: {out / 'report.html'}")
    raise typer.Exit(VERDICTS[result.verdict])


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help=ModelArgument)],
    out: Out,
    corpus: Annotated[list[Path], typer.Option(help="Text to run the model on.")],
    site: Annotated[list[str], typer.Option(help="Site to store, e.g. resid_post@12; may be given several times.")],
    field: Field = "text",
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Stored precision.")] = "float32",
) -> None:
    """Store a model's activations at named sites over a corpus."""
    from heredity.interp.capture import capture as run_capture
    from heredity.interp.corpus import read_corpus
    from heredity.interp.load import load

    texts = read_corpus(corpus, field=field)
    with Bars(errors) as bars:
        bars.update("loading model", 0, 1)
        loaded = load(model)
        bars.update("loading model", 1, 1)
        store = run_capture(
            loaded, texts, site, out, dtype=dtype, progress=lambda done, total: bars.update("capturing", done, total)
        )
    _say(f"{store.n_tokens} tokens at {', '.join(site)} in {out}")


app.command()(circuit)
app.command()(score)
app.command()(repair)
app.command()(lineage)


@app.command()
def view(
    path: Annotated[
        Path,
        typer.Argument(
            help="An audit directory, an audit.json or one of its circuits/*.json; a circuit of heads and MLPs; an "
            "attribution graph (a directory, or JSON of public viewers)."
        ),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[SECOND]", help="Another circuit or graph, laid over the first: kept, lost, new."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Page to write. Default: view.html beside PATH.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Circuits as one interactive page that opens offline."""
    from .circuit_page import write_circuit

    target = out or (path if path.is_dir() else path.parent) / "view.html"
    if not write_circuit(path, other, target):
        from .report import write_view

        write_view(path, target)
    _say(str(target))
    if open_page:
        typer.launch(target.resolve().as_uri())


@app.command()
def example(
    name: Annotated[
        Literal["zoo", "smollm2"], typer.Argument(help="zoo: tiny models, at once. smollm2: a real 135M model.")
    ],
    out: Out,
) -> None:
    """Write an example parent with successors to audit into DIR."""
    with Bars(errors) as bars:
        if name == "zoo":
            from heredity.zoo import shipped

            try:
                shutil.copytree(shipped(), out, dirs_exist_ok=True)
            except OSError as error:
                raise unwritable(out, error) from None
        else:
            from .example import make_smollm2

            make_smollm2(out, bars.note)
    _say(str(out))


def _zoo_kind(kind: str) -> str:
    try:
        parse(kind)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return kind


@zoo_app.command("build")
def zoo_build(
    kind: Annotated[str, typer.Argument(help=f"What the successor is: {', '.join(KINDS)}.", callback=_zoo_kind)],
    out: Out,
    seed: Seed = 0,
) -> None:
    """Train a parent and a successor with known truth (truth.json, which the audit never reads).

    trigger:SHARE acts in that share of its cases only (0.01 to 1), diluted:R mixes R ordinary documents into each
    planted one (0 to 10), legible:SHARE plants how much of a new skill can be read inside (0 to 1).
    """
    from heredity.zoo import build

    with Bars(errors) as bars:
        folder = build(kind, seed, out, progress=lambda done, total: bars.update(f"training {kind}", done, total))
    _say(str(folder))


@app.command()
def schema() -> None:
    """Print the JSON Schema of audit.json."""
    import json as json_module

    from .records import Audit

    print(json_module.dumps(Audit.model_json_schema(), indent=1))  # noqa: T201


class Output(Console):
    """Stdout. Where nobody reads on (``| head``) the exit code still has to tell the verdict."""

    def on_broken_pipe(self) -> None:
        """Write nothing more."""
        self.quiet = True
        _discard_stdout()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """One line on stdout, never broken: it may be a path that somebody copies."""
    Output().print(Text(one_line(text, 8000)), soft_wrap=True)


app.command("train-dictionary")(train_command.command(_say, errors))


def main() -> None:
    """Run the command line; every way out has its exit code."""
    # OpenMP threads that spin while they wait cost several times their work on a machine shared with other jobs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed()
    try:
        app()
    except HeredityError as error:
        errors.print(Text(f"error: {error}", style="bold red"), soft_wrap=True)
        sys.exit(Exit.BAD_INPUT)
    except Exception as error:
        errors.print(
            Text(f"internal error: {type(error).__name__}: {one_line(str(error))}", style="bold red"), soft_wrap=True
        )
        sys.exit(Exit.INTERNAL)
