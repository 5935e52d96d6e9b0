"""A table of candidates for the three places it is read in: a terminal, a job summary, a page with links to reports.

All text may come from an untrusted model or from the names of its files: escaped as :mod:`.summary` and
:mod:`.report` do.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from heredity.interp.visible import visible

from . import phrases
from .report import page_parts, templates, write_page
from .score import Candidate, Outcome, Scores
from .summary import SIGNS, STYLES, code, escaped
from .values import Interval, NotMeasured
from .work import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

WORDS: dict[Outcome, str] = {
    **{verdict: word for verdict, (word, _) in phrases.VERDICTS.items()},  # pyright: ignore[reportAssignmentType]
    "bad_input": "Not audited",
    "internal_error": "Internal error",
}
COLUMNS = ("Verdict", "Candidate", "Findings", "Largest effect", "Opacity", "Emergence", "Visible from")
COLUMNS += ("Mean KL", "Time")


def write_pages(scores: Scores, out: Path) -> None:
    """Write ``scores.md`` and ``scores.html`` into ``out``.

    Raises:
        OutputError: they cannot be written.
    """
    write_atomically(out / "scores.md", markdown(scores))
    template = templates().get_template("scores.html.j2")
    rows = [(candidate, cells(candidate)) for candidate in scores.candidates]
    page = template.render(scores=scores, rows=rows, words=WORDS, columns=COLUMNS, **page_parts({}))
    write_page(page, out / "scores.html")


def cells(candidate: Candidate) -> list[str]:
    """What stands in the columns from ``Findings`` on; empty but for the time where there was no audit."""
    row = candidate.row
    time = phrases.duration(candidate.seconds)
    if row is None:
        return [""] * (len(COLUMNS) - 3) + [time]
    findings = str(row.findings) + (f", {row.declared} declared" if row.declared else "")
    if row.findings != row.counted:
        findings = f"{row.counted} of {findings}"
    visible_from = "–" if isinstance(row.visible, NotMeasured) else f"{phrases.number(row.visible)} nats"
    return [
        findings,
        brief(row.effect, "nats"),
        brief(row.opacity) if row.findings or row.declared else "–",
        brief(row.emergence) if row.findings or row.declared else "–",
        visible_from,
        phrases.number(row.mean_kl),
        time,
    ]


def brief(value: Interval | NotMeasured, unit: str = "share") -> str:
    """An estimate with its interval in brackets, or that there is none, without the reason."""
    if isinstance(value, NotMeasured):
        return "not measured"
    shown, tail = (phrases.share, "") if unit == "share" else (phrases.number, f" {unit}")
    interval = "" if value.n < 2 else f" [{shown(value.low)}, {shown(value.high)}]"
    return f"{shown(value.estimate)}{tail}{interval}"


def markdown(scores: Scores) -> str:
    """``scores`` as GitHub-flavoured Markdown."""
    lines = [
        f"## {phrases.count(len(scores.candidates), 'candidate')}, the worst first",
        "",
        f"Parent {code(phrases.short_name(scores.parent_spec))} ({code(scores.parent_sha256[:12])}).",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for candidate in scores.candidates:
        sign = SIGNS.get(candidate.outcome, "🛑")
        row = [f"{sign} {WORDS[candidate.outcome]}", code(candidate.name), *cells(candidate)]
        lines.append("| " + " | ".join(row) + " |")
    lines.append("")
    for candidate in scores.candidates:
        said = _said(candidate)
        if said:
            lines.append(f"- {code(candidate.name)}: {escaped(said)}")
    return "\n".join(lines).rstrip() + "\n"


def _said(candidate: Candidate) -> str:
    """Why it could not be audited, or what it does that stands in its row."""
    if candidate.error:
        return candidate.error
    row = candidate.row
    return (row.title or "") if row and (row.findings or row.declared) else ""


def terminal(scores: Scores, console: "Console") -> None:
    """Print ``scores`` on ``console``."""
    from rich.text import Text

    width = max(len(candidate.name) for candidate in scores.candidates)
    for candidate in scores.candidates:
        word = WORDS[candidate.outcome].upper()
        style = STYLES.get(candidate.outcome, "bold white on dark_red")
        line = Text.assemble((f" {word:^14} ", style), f" {candidate.name:{width}}")
        if candidate.row is not None:
            values = dict(zip(COLUMNS[2:], cells(candidate), strict=True))
            shown = [
                f"{phrases.count(candidate.row.findings, 'finding')}",
                f"largest effect {values['Largest effect']}",
                f"opacity {values['Opacity']}",
                f"emergence {values['Emergence']}",
                f"visible from {values['Visible from']}",
                f"mean KL {values['Mean KL']}",
            ]
            line.append("  " + "; ".join(shown))
        line.append(f"  {phrases.duration(candidate.seconds)}", "dim")
        console.print(line, soft_wrap=True)
        said = _said(candidate)
        if said:
            console.print(Text(f"  {visible(said, 400)}"), soft_wrap=True)
