"""What a repair starts from: a finished audit of the very pair, its rules and its text, each checked by digest."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heredity.interp.errors import CorpusError, HeredityError, ModelError, PolicyError, one_line

from .benign_null import SCRAMBLED
from .policy import Loaded, load_rules
from .records import Audit, Finding, Null

if TYPE_CHECKING:
    from heredity.interp.corpus import Corpus
    from heredity.interp.model import Model


@dataclass(frozen=True)
class RepairRequest:
    """What the user asked for."""

    parent: str
    successor: str
    audit: Path
    out: Path
    corpus: tuple[Path, ...] = ()
    field: str = "text"
    policy: Path | None = None
    intent: Path | None = None
    findings: tuple[str, ...] = ()
    target: float = 0.9
    principles: str | None = None
    """For the new audit, as ``tasks``: what it is to compare beside what it finds."""
    tasks: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def wanted(audit: Audit, names: Sequence[str], where: Path) -> list[Finding]:
    """The findings to repair: those of ``names``, or every confirmed one that nobody declared.

    Raises:
        HeredityError: there is no such finding, or it cannot be repaired.
    """
    by_name = {finding.id: finding for finding in audit.findings}
    remedy = f"This audit's findings: {', '.join(one_line(name, 40) for name in by_name) or 'none'}."
    for name in names:
        if name not in by_name:
            raise HeredityError(f"no finding {one_line(name, 40)!r}", where=str(where), remedy=remedy)
        if not by_name[name].nodes:
            raise HeredityError(
                f"no parts were found that carry finding {name}, so nothing says what to edit",
                where=str(where),
                remedy="Audit with a larger --budget, or repair another finding.",
            )
    found = [by_name[name] for name in dict.fromkeys(names)]
    found = found or [f for f in audit.findings if f.confirmed and f.declared_by is None]
    if not found:
        raise HeredityError(
            "nothing to repair: it has no confirmed finding that nobody declared", where=str(where), remedy=remedy
        )
    return found


def rules_of(audit: Audit, request: RepairRequest) -> tuple[Loaded, Path | None]:
    """The policy and intent the audit was made under, and where the intent is.

    Raises:
        PolicyError: the files named (or found where the audit found them) are others.
    """
    intent = request.intent or (Path(audit.policy.intent) if audit.policy.intent else None)
    rules = load_rules(request.policy, intent)
    if rules.policy_sha256 != audit.policy.sha256:
        raise PolicyError(
            "not the policy that the audit was made under",
            where=str(request.policy or "shipped policy.yaml"),
            remedy="Give that file with --policy.",
        )
    if rules.intent_sha256 != audit.policy.intent_sha256:
        raise PolicyError(
            "not the intent that the audit was made under",
            where=str(intent),
            remedy="Give that file with --intent." if audit.policy.intent_sha256 else "Leave --intent out.",
        )
    return rules, intent


def null_of(audit: Audit) -> str:
    """What ``--null`` said."""
    null = audit.calibration.null
    return f"benign:{null.draws}" if isinstance(null, Null) and null.kind == "benign" else SCRAMBLED


def check_pair(audit: Audit, parent: "Model", successor: "Model", where: Path) -> None:
    """Make sure that the audit is of this pair.

    Raises:
        ModelError: it is of another one.
    """
    for role, record, model in (("parent", audit.parent, parent), ("successor", audit.successor, successor)):
        if record.sha256 != model.digest:
            raise ModelError(
                f"not the {role} that was audited in {where}",
                where=model.spec,
                remedy="Give the models of that audit, or audit this pair first.",
            )


def corpus_of(audit: Audit, request: RepairRequest) -> tuple["Corpus | None", tuple[Path, ...]]:
    """The text that was audited and the files it is in; None where it was sampled from the parent.

    Raises:
        CorpusError: it is not there any more, or is another text.
    """
    from heredity.interp.corpus import read_corpus

    if not request.corpus and audit.coverage.corpus == "sampled from the parent":
        return None, ()
    files = request.corpus or tuple(Path(name) for name in audit.coverage.corpus.split(", "))
    try:
        corpus = read_corpus(files, field=request.field)
    except CorpusError as error:
        raise CorpusError(error.what, where=error.where, remedy="Name the audited text with --corpus.") from None
    if corpus.digest != audit.provenance.corpus_sha256:
        raise CorpusError(
            "not the text that was audited",
            where=", ".join(map(str, files)),
            remedy="Give that text with --corpus (and --field where its column has another name).",
        )
    return corpus, tuple(files)


def reuse_steps(audit: Audit, directory: Path, into: Path, versions: dict[str, str]) -> None:
    """Copy what the audit read and decoded into the work folder ``into``, so that it is not computed again.

    Only where the same releases of the libraries would compute the same; whether the steps are those of this audit
    shows when the behaviours in them are compared with its record.
    """
    folders = [path for path in (directory / "work").glob("*") if path.is_dir()] if directory.is_dir() else []
    if len(folders) != 1 or audit.provenance.versions != versions:
        return
    into.mkdir(parents=True, exist_ok=True)
    for pattern in ("scan-*.json", "amplified-*.json", "declared.json", "swept.json"):
        for path in folders[0].glob(pattern):
            if not (into / path.name).exists():
                shutil.copyfile(path, into / path.name)
