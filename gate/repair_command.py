"""``heredity repair``: edit the successor's weights until confirmed findings are gone, then audit the result."""

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from heredity.interp.errors import CorpusError

from .repair_inputs import RepairRequest

if TYPE_CHECKING:
    from .budget import Name
    from .records import Audit
    from .repair_records import Repair
    from .stages import Progress

CODE = 1
"""Raised whenever a change of the code makes old work folders wrong."""


def repair(
    parent: Annotated[str, typer.Argument(help="The parent; see `heredity audit --help`.")],
    successor: Annotated[str, typer.Argument(help="The successor that was audited. It is only read.")],
    audit: Annotated[Path, typer.Argument(help="The --out directory of the finished audit of this pair.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write into; an interrupted run resumes there.")],
    finding: Annotated[
        list[str] | None,
        typer.Option(
            help="Finding to repair, e.g. f1; may be given several times. Default: every confirmed one that "
            "nobody declared."
        ),
    ] = None,
    target: Annotated[
        float, typer.Option(help="Share of a finding's divergence that must go.", min=0.05, max=0.999)
    ] = 0.9,
    corpus: Annotated[
        list[Path] | None, typer.Option(help="The audited text, where it is no longer where it was.")
    ] = None,
    field: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files that holds the text.")] = "text",
    policy: Annotated[Path | None, typer.Option(help="The audit's policy, where it was not the shipped one.")] = None,
    intent: Annotated[Path | None, typer.Option(help="The audit's intent, where it is no longer where it was.")] = None,
    principles: Annotated[
        str | None,
        typer.Option(help="What the repaired model must have kept, for the new audit; see `heredity audit`."),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks the new audit is to compare, likewise.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Edit SUCCESSOR's weights until what AUDIT found is gone; write OUT/model, and audit it into OUT/audit.

    Exit code: that of the new audit's verdict (0 pass, 1 flagged, 3 inconclusive); 2 bad input, 4 internal error.
    """
    from .cli import VERDICTS, Output, _say, errors
    from .progress import Bars, logged
    from .repair_summary import markdown, terminal
    from .work import write_atomically

    with logged(out, errors), Bars(errors) as bars:
        done, again = run(
            RepairRequest(
                parent=parent,
                successor=successor,
                audit=audit,
                out=out,
                corpus=tuple(corpus or ()),
                field=field,
                policy=policy,
                intent=intent,
                findings=tuple(finding or ()),
                target=target,
                principles=principles,
                tasks=tuple(tasks or ()),
                command=("heredity", *sys.argv[1:]),
            ),
            bars.update,
        )
        write_atomically(out / "repair.md", markdown(done, again))
    if json:
        text = json_module.dumps({"verdict": again.verdict, "repair": done.model_dump(mode="json")}, indent=1)
        Output().print(Text(text), soft_wrap=True)
    else:
        terminal(done, again, Output())
        _say(f"Model: {out / 'model'}")
        _say(f"Report of the new audit: {out / 'audit' / 'report.html'}")
    raise typer.Exit(VERDICTS[again.verdict])


def run(request: RepairRequest, progress: "Progress") -> "tuple[Repair, Audit]":
    """Repair, write ``out/model`` and audit it into ``out/audit``; both records.

    Raises:
        HeredityError: an input that cannot be used, or is not what was audited.
    """
    from heredity.interp.load import load

    from . import audit as auditing
    from .read_audit import read_audit
    from .repair_inputs import check_pair, corpus_of, null_of, reuse_steps, rules_of, wanted
    from .work import Work

    before = read_audit(request.audit)
    findings = wanted(before, request.findings, request.audit)
    rules, intent = rules_of(before, request)
    given, files = corpus_of(before, request)
    progress("loading models", 0, 2)
    parent = load(request.parent, role="parent")
    progress("loading models", 1, 2)
    successor = load(request.successor, role="successor")
    progress("loading models", 2, 2)
    check_pair(before, parent, successor, request.audit)

    from heredity.interp.remember import Remembered

    from .assemble import Setting
    from .repair import repair as repair_pair

    depth: Name = before.provenance.budget  # pyright: ignore[reportAssignmentType]
    sizes = auditing.sizes_of(depth, parent, successor, given=given is not None)
    seed = before.provenance.seed
    text = given or auditing.sampled(parent, sizes, seed, progress)
    if text.digest != before.provenance.corpus_sha256:
        raise CorpusError(
            "the text sampled from the parent is not the one that was audited",
            where=request.parent,
            remedy="Audit the pair again with these versions of the libraries.",
        )
    versions = auditing.versions()
    names = [finding.id for finding in findings]
    key = auditing.key_of(
        "repair",
        CODE,
        auditing.CODE,
        versions,
        before.model_dump_json(exclude={"provenance": {"command"}}),
        names,
        request.target,
    )
    reuse_steps(before, request.audit, request.out / "work" / key[:32], versions)
    setting = Setting(
        parent,
        successor,
        sizes,
        rules,
        Work(request.out, key),
        seed,
        progress,
        another_parent=lambda: load(request.parent, role="parent"),
        remembered=Remembered(parent, None),
    )
    done = repair_pair(setting, text, before, findings, request.target, request.out / "model")
    del setting, parent, successor
    again = auditing.run(
        auditing.Request(
            parent=request.parent,
            successor=str(request.out / "model"),
            out=request.out / "audit",
            corpus=files,
            field=request.field,
            policy=request.policy,
            intent=intent,
            principles=request.principles,
            tasks=request.tasks,
            null=null_of(before),
            budget=depth,
            seed=seed,
            command=request.command,
        ),
        progress,
    )
    return done, again
