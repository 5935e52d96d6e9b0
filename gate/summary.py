"""The audit in short: ``summary.md`` for the job page of a CI run, and the lines on a terminal.

All text may come from an untrusted model. In Markdown every mark of it that could be structure becomes a character
reference, which no renderer reads as structure; on the terminal it is :class:`rich.text.Text`, read as no markup.
"""

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heredity.interp.visible import visible

from . import phrases
from .principle_verdict import kept_rows, sentence
from .records import Audit, Circuit, Example, ModelRecord
from .values import NotMeasured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

SIGNS = {"pass": "✅", "flag": "⛔", "inconclusive": "❓"}
STYLES = {"pass": "bold white on dark_green", "flag": "bold white on red3", "inconclusive": "bold black on gold1"}
_PLAIN = frozenset(" ,;()%'./+=?-" + string.ascii_letters + string.digits)
_LEADING = re.compile(r"\s*(\d+[.)]|[-+=])")  # what makes a list or a heading at the start of a line
# Renderers make links of bare addresses and mentions even where every mark in them is a reference.
_BREAKS = {"@": "&#64;&#8203;", ":": "&#58;&#8203;"}
_FINDINGS = 20


def markdown(audit: Audit) -> str:
    """``audit`` as GitHub-flavoured Markdown."""
    word, meaning = phrases.VERDICTS[audit.verdict]
    groups = phrases.cases(audit)
    lines = [
        f"## {SIGNS[audit.verdict]} {word}",
        "",
        f"{meaning} Successor {_named(audit.successor)}, parent {_named(audit.parent)}, "
        f"policy {_code(audit.policy.name)}.",
        "",
        *(f"- {_text(reason)}" for reason in audit.reasons),
        "",
    ]
    for title, group in (("Findings", groups.undeclared), ("New and declared", groups.declared)):
        lines += [f"### {title}", "", *(_table(group) if group else ["None."]), ""]
    if groups.below:
        lines += [f"{phrases.count(len(groups.below), 'other difference')} below the policy.", ""]
    kept = kept_rows(audit)
    if kept:
        rows = [f"| {what} | {_code(row.id)} | {_text(sentence(row))} |" for what, row in kept]
        lines += ["### Principles and tasks", "", "| | | What became of it |", "|---|---|---|", *rows, ""]
    if not isinstance(audit.crosscoders, NotMeasured):
        lines += ["### Crosscoders", "", *(f"- {_text(phrases.crosscoder(each))}" for each in audit.crosscoders), ""]
    lines += ["### Cheap read-outs", "", _text(_readouts(audit)) + ".", "", "### Not measured", ""]
    lines += [f"- {_text(item)}" for item in phrases.unmeasured(audit)] or ["Nothing was recorded as not measured."]
    return "\n".join(lines) + "\n"


def terminal(audit: Audit, console: "Console") -> None:
    """Print ``audit`` on ``console``: the verdict, why, findings, what was not measured."""
    from rich.padding import Padding
    from rich.text import Text

    word, meaning = phrases.VERDICTS[audit.verdict]
    groups = phrases.cases(audit)
    console.print(Text.assemble((f" {word.upper()} ", STYLES[audit.verdict]), f" {meaning}"))
    for reason in audit.reasons:
        console.print(Padding(Text(f"• {visible(reason, 400)}"), (0, 0, 0, 2)))
    console.print()
    for role, model in (("parent", audit.parent), ("successor", audit.successor)):
        console.print(_model(role, model))
    for title, group in (("Finding", groups.undeclared), ("Declared change", groups.declared)):
        for number, case in enumerate(group[:_FINDINGS], start=1):
            console.print()
            console.print(Text.assemble((f"{title} {number}: ", "bold"), (visible(case.title, 200), "bold")))
            for line in _case_lines(case):
                console.print(Padding(line, (0, 0, 0, 2)))
        if len(group) > _FINDINGS:
            console.print(Text(f"  and {len(group) - _FINDINGS} more"))
    console.print()
    for what, row in kept_rows(audit):
        console.print(Text.assemble((f"{what} {visible(row.id, 80)}: ", "bold"), visible(sentence(row), 400)))
    if not isinstance(audit.crosscoders, NotMeasured):
        for each in audit.crosscoders:
            console.print(Text(visible(phrases.crosscoder(each), 500)))
    if groups.below:
        console.print(Text(f"{phrases.count(len(groups.below), 'other difference')} below the policy"))
    console.print(Text(_readouts(audit)))
    missing = phrases.unmeasured(audit)
    if missing:
        console.print(Text.assemble(("Not measured, so the verdict says nothing about:", "bold")))
    for item in missing:
        console.print(Padding(Text(f"• {visible(item, 300)}"), (0, 0, 0, 2)))


def _model(role: str, model: ModelRecord) -> "Text":
    from rich.text import Text

    name = visible(phrases.short_name(model.spec), 80)
    return Text.assemble(
        f"{role:9} ", (name, "bold"), f"  {phrases.size(model)}  ", (visible(model.sha256[:12]), "dim")
    )


def _case_lines(case: phrases.Case) -> list["Text"]:
    from rich.text import Text

    lines: list[Text] = []
    if case.declared_by:
        lines.append(Text(f"declared as {visible(case.declared_by, 80)}"))
    item = case.behaviour
    examples = case.finding.examples if case.finding else item.examples if item else ()
    if examples:
        lines.append(_example(examples[0]))
    if item:
        lines.append(
            Text(
                f"{phrases.contexts(item)}, {phrases.SOURCES[item.source]}; effect "
                f"{phrases.estimate(item.effect, 'nats')}; largest null effect {phrases.number(item.null_max)} nats"
            )
        )
        if item.trigger_tokens:
            lines.append(Text("depends on: " + ", ".join(_quoted(token) for token in item.trigger_tokens[:8])))
        lines.append(Text(visible(_circuit(case), 500)))
        lines.append(Text(visible(phrases.mechanisms(item), 700)))
        lines.append(Text(visible(f"opacity: {phrases.opacity(item)}", 400)))
        if named := phrases.latents(item):
            lines.append(Text(visible(named, 500)))
    return lines


def _example(example: Example) -> "Text":
    """The end of the context, its trigger tokens underlined, and what each model says."""
    from rich.text import Text

    text = Text("… " if len(example.tokens) > 16 else "")
    for token in example.tokens[-16:]:
        text.append(visible(token.text, 40), "bold underline" if token.weight >= 0.1 else "")
    return text + Text(
        f" → successor {_quoted(example.successor_says)} (p {phrases.number(example.p_successor)}), "
        f"parent {_quoted(example.parent_says)} (p {phrases.number(example.p_parent)})"
    )


def _table(group: Sequence[phrases.Case]) -> list[str]:
    rows = [
        "| | What the successor does | Effect | Impact | Circuit | New and lost | Opacity | Depends on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, case in enumerate(group[:_FINDINGS], start=1):
        item = case.behaviour
        declared = f" (declared as {_code(case.declared_by)})" if case.declared_by else ""
        cells = [str(number), _text(case.title, 200) + declared]
        if item:
            triggers = " ".join(_code(token, 40) for token in item.trigger_tokens[:6])
            opaque = phrases.opacity(item)
            if named := phrases.latents(item):
                opaque += f"; {named}"
            effect = f"{phrases.number(item.effect.estimate)} nats (null at most {phrases.number(item.null_max)})"
            told = [_text(_circuit(case), 300), _text(phrases.mechanisms(item), 700), _text(opaque, 500)]
            cells += [effect, phrases.share(item.impact), *told, triggers]
        else:
            cells += [""] * 6
        rows.append("| " + " | ".join(cells) + " |")
    return [*rows, "", f"and {len(group) - _FINDINGS} more"] if len(group) > _FINDINGS else rows


def _circuit(case: phrases.Case) -> str:
    it = case.behaviour.circuit if case.behaviour else None
    if not isinstance(it, Circuit):
        return f"circuit not measured: {it.reason}" if it else "no circuit recorded"
    checked = "confirmed by intervention" if it.confirmed else "not confirmed by intervention"
    names = ", ".join(it.selected[:6]) + (f" and {len(it.selected) - 6} more" if len(it.selected) > 6 else "")
    closes = phrases.estimate(it.reversion if it.method == "parent" else it.ablation)
    return f"{names}; {checked}; closes {closes}, {phrases.controls(it)}"


def _readouts(audit: Audit) -> str:
    divergence = audit.baselines.divergence
    raised = ", ".join(_quoted(change.token) for change in audit.baselines.raised_tokens[:5])
    return (
        f"Mean KL(successor‖parent) {phrases.number(divergence.mean)} nats per token, largest "
        f"{phrases.number(divergence.max)}, over {divergence.tokens:,} tokens; weights moved by "
        f"{phrases.estimate(audit.drift.weight_distance)}" + (f"; tokens raised most: {raised}" if raised else "")
    )


def _quoted(text: str) -> str:
    return f"“{visible(text.strip(' '), 40)}”"


def _named(model: ModelRecord) -> str:
    return f"{_code(phrases.short_name(model.spec))} ({_code(model.sha256[:12])})"


def _code(text: str, limit: int = 120) -> str:
    return f"<code>{_text(text, limit)}</code>"


def _text(text: str, limit: int = 600) -> str:
    """``text`` so that no Markdown or HTML in it is read."""
    shown = visible(text, limit).replace("www.", "www\N{ZERO WIDTH SPACE}.")
    leading = _LEADING.match(shown)
    mark = leading.end() - 1 if leading else -1
    return "".join(
        c if not c.isascii() or (c in _PLAIN and i != mark) else _BREAKS.get(c) or f"&#{ord(c)};"
        for i, c in enumerate(shown)
    )


code, escaped = _code, _text
"""For other pages of the same make."""
