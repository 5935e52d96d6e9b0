"""One audit from model arguments to ``audit.json``: measure, describe, decide, write. Resumes where it was cut off."""

import dataclasses
import hashlib
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from heredity.interp.errors import OutputError

from .benign_null import drawn
from .budget import Budget, Name, budget
from .policy import Loaded, load_rules
from .principle_files import load_asked
from .principle_verdict import judged
from .records import Audit, Behaviour, Circuit, Coverage, ModelRecord, PolicyRecord, Provenance
from .report import write_report
from .summary import markdown
from .values import NotMeasured, tidy
from .values import sayable as _sayable
from .verdict import decide, findings, lacking
from .work import Work, unwritable, write_atomically

if TYPE_CHECKING:
    from heredity.interp import Model
    from heredity.interp.corpus import Corpus
    from heredity.interp.spec import Role

    from .stages import Progress

CODE = 16
"""Raised whenever a change of the code makes old work folders wrong."""


NOT_MEASURED = (
    "Circuits whose trigger is neither in the text nor brought out by amplification: the power measured here is for "
    "those that the text exercises.",
)

PRINCIPLES = "none were named with --principles, so a lost behaviour is seen only where the audited text exercises it"


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    parent: str
    successor: str
    out: Path
    corpus: tuple[Path, ...] = ()
    field: str = "text"
    policy: Path | None = None
    intent: Path | None = None
    principles: str | None = None
    tasks: tuple[str, ...] = ()
    dictionaries: tuple[str, ...] = ()
    """Directories, or ``train``."""
    budget: Name = "quick"
    seed: int = 0
    null: str = "scrambled"
    command: tuple[str, ...] = ()
    parent_work: Path | None = None
    """Where what depends on the parent and the text alone is kept for other candidates; None keeps nothing."""


def run(
    request: Request, progress: "Progress", *, parent: "Model | None" = None, author: "Model | None" = None
) -> Audit:
    """Audit the pair, write everything into ``request.out`` and return the record.

    Args:
        request: what is asked.
        progress: is told of every stage.
        parent: the loaded model that ``request.parent`` names, where the caller has it.
        author: who writes the text where no corpus is given; the parent by default.

    Raises:
        HeredityError: an input that cannot or must not be used.
    """
    from heredity.interp.corpus import read_corpus
    from heredity.interp.load import load

    started, clock = datetime.now(UTC), time.monotonic()
    rules = load_rules(request.policy, request.intent)
    asked = load_asked(request.principles, request.tasks, rules)
    benign = drawn(request.null, rules.policy)
    given = read_corpus(request.corpus, field=request.field) if request.corpus else None
    progress("loading models", 0, 2)
    parent = parent or load(request.parent, role="parent")
    progress("loading models", 1, 2)
    successor = load(request.successor, role="successor")
    progress("loading models", 2, 2)
    # Only now: a mistake in what was read so far should not wait for these imports.
    import torch

    from heredity.interp.dictionaries.notes import digest
    from heredity.interp.remember import Remembered

    from .assemble import Setting, measure
    from .opacity_units import TRAIN, load_dictionaries

    known = load_dictionaries([d for d in request.dictionaries if d != TRAIN], successor, parent)

    sizes = sizes_of(request.budget, parent, successor, given=given is not None)
    corpus = given or sampled(author or parent, sizes, request.seed, progress)
    described = _sayable(", ".join(map(str, request.corpus))) or f"sampled from {_writer(author, parent)}"
    key = key_of(
        CODE,
        # Other releases of the libraries compute other last bits: results of two are never mixed.
        versions(),
        parent.digest,
        successor.digest,
        corpus.digest,
        sizes.name,
        request.seed,
        rules.policy_sha256,
        rules.intent_sha256,
        *([] if benign is None else [request.null]),
        [digest(each) for each in (*known.dictionaries, *known.other_seeds)],
        TRAIN in request.dictionaries,
    )
    setting = Setting(
        parent,
        successor,
        sizes,
        rules,
        Work(request.out, key),
        request.seed,
        progress,
        another_parent=lambda: load(request.parent, role="parent"),
        remembered=Remembered(parent, request.parent_work),
        benign=benign,
        dictionaries=known.dictionaries,
        other_seeds=known.other_seeds,
        train_dictionaries=TRAIN in request.dictionaries,
    )
    measured = measure(setting, corpus, asked)
    found = findings(measured.behaviours, rules.policy)
    lack = lacking(measured.calibration.power, measured.calibration.null, rules.policy)
    verdict, reasons = decide(measured.behaviours, found, measured.compared, lack, rules.policy)
    verdict, reasons = judged(verdict, reasons, measured.principles, rules.policy)
    audit = Audit(
        verdict=verdict,
        reasons=reasons,
        parent=_model(parent, "parent"),
        successor=_model(successor, "successor"),
        baselines=measured.baselines,
        behaviours=measured.behaviours,
        findings=found,
        principles=measured.principles or (NotMeasured(reason=PRINCIPLES),),
        tasks=measured.tasks,
        calibration=measured.calibration,
        crosscoders=measured.crosscoders,
        coverage=Coverage(
            corpus=described,
            texts=measured.texts,
            tokens=measured.tokens,
            compared_tokens=measured.compared,
            kl_in_behaviours=measured.kl_in_behaviours,
            sites=measured.sites,
        ),
        drift=measured.drift,
        policy=_policy(rules, measured.behaviours),
        not_measured=NOT_MEASURED,
        provenance=Provenance(
            command=tuple(map(_sayable, request.command)),
            budget=sizes.name,
            seed=request.seed,
            versions=versions(),
            threads=torch.get_num_threads(),
            device="cpu",
            corpus_sha256=corpus.digest,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        ),
    )
    _write(audit, request.out)
    return audit


def sizes_of(name: Name, parent: "Model", successor: "Model", *, given: bool) -> Budget:
    """How much of a pair a budget looks at, on text that was ``given`` or else sampled; sets torch's threads for it."""
    sizes = budget(
        name,
        max(parent.n_params, successor.n_params),
        max(parent.shape.d_vocab, successor.shape.d_vocab),
        min(parent.shape.n_ctx, successor.shape.n_ctx),
        given=given,
    )
    if sizes.small:
        import torch

        # Tiny matrices: a second thread costs more to wake than it saves.
        torch.set_num_threads(1)
    return sizes


def sampled(parent: "Model", sizes: Budget, seed: int, progress: "Progress") -> "Corpus":
    """Text sampled from the parent, kept in the user's cache so that every candidate is measured on the same."""
    from heredity.interp.corpus import Corpus, Text
    from heredity.interp.sampling import sample_corpus

    texts = max(8, sizes.scan_tokens // sizes.window)
    name = key_of(CODE, parent.digest, texts, sizes.window, seed)[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heredity" / "sampled" / f"{name}.json"
    try:
        rows = json.loads(cache.read_text(encoding="utf-8"))
        return Corpus(tuple(Text(**row) for row in rows))
    except (OSError, ValueError, TypeError):
        progress("sampling text from the parent", 0, 1)
        corpus = sample_corpus(parent, texts=texts, length=sizes.window, seed=seed)
        progress("sampling text from the parent", 1, 1)
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps([dataclasses.asdict(text) for text in corpus.texts]))
        except (OSError, OutputError):
            pass  # A read-only home costs time on the next run, nothing else.
        return corpus


def _writer(author: "Model | None", parent: "Model") -> str:
    return "the parent" if author is None or author.digest == parent.digest else "the first ancestor"


def _model(model: "Model", role: "Role") -> ModelRecord:
    shape = model.shape
    return ModelRecord(
        spec=_sayable(_named(model.spec, role)),
        architecture=shape.architecture,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        d_model=shape.d_model,
        d_vocab=shape.d_vocab,
        parameters=model.n_params,
        sha256=model.digest,
        floor=tidy(model.floor),
    )


def _named(spec: str, role: "Role") -> str:
    """``spec`` with the side of a zoo directory that was meant."""
    from heredity.interp.spec import parse_spec

    parsed = parse_spec(spec, role)
    if parsed.kind == "adapter":
        return f"{_named(parsed.base, role)}+{parsed.adapter}"
    return parsed.base if parsed.kind == "zoo" else spec


def _policy(rules: Loaded, behaviours: Sequence[Behaviour]) -> PolicyRecord:
    declared = {b.declared_by for b in behaviours if b.declared_by}
    changes = [change.id for change in rules.intent.changes] if rules.intent else []
    return PolicyRecord(
        name=rules.policy.name,
        sha256=rules.policy_sha256,
        values=rules.policy.model_dump(exclude={"name"}),
        intent=None if rules.intent_path is None else _sayable(rules.intent_path),
        intent_sha256=rules.intent_sha256,
        declared=tuple(change for change in changes if change in declared),
        undelivered=tuple(change for change in changes if change not in declared),
    )


def versions() -> dict[str, str]:
    """Releases of what computes the numbers of an audit."""
    names = ("heredity", "torch", "transformers", "transformer-lens", "peft", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def key_of(*parts: object) -> str:
    """Digest of what steps depend on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(audit: Audit, out: Path) -> None:
    """``audit.json``, one file per circuit, ``summary.md`` and ``report.html``."""
    folder = out / "circuits"
    try:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("b*.json"):
            if old.stem[1:].isdigit():
                old.unlink()
    except OSError as error:
        raise unwritable(folder, error) from None
    for behaviour in audit.behaviours:
        if isinstance(behaviour.circuit, Circuit):
            record = {
                "schema_version": audit.schema_version,
                "audit": {"parent": audit.parent.sha256, "successor": audit.successor.sha256},
                "behaviour": behaviour.model_dump(mode="json"),
            }
            write_atomically(folder / f"{behaviour.id}.json", json.dumps(record, indent=1))
    write_atomically(out / "summary.md", markdown(audit))
    write_report(audit, out / "report.html")
    # Last, so that a reader who finds audit.json finds everything.
    write_atomically(out / "audit.json", audit.model_dump_json(indent=1))
