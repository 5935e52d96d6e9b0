"""A repair in short: ``repair.md``, and the lines on a terminal."""

from typing import TYPE_CHECKING

from heredity.interp.visible import visible

from . import phrases
from .records import Audit
from .repair_records import Repair, RepairedFinding
from .summary import _text
from .values import NotMeasured

if TYPE_CHECKING:
    from rich.console import Console

_WAYS = {
    "restore": "the parent’s weights restored on part of the input",
    "overwrite": "what the parts write there overwritten",
}


def markdown(done: Repair, again: Audit) -> str:
    """``done`` and the verdict of the new audit as GitHub-flavoured Markdown."""
    word, meaning = phrases.VERDICTS[again.verdict]
    lines = ["## Repair", "", f"The repaired model’s audit: **{word}**. {meaning}", ""]
    lines += [
        "| finding | what the successor did | edit | gone (held-out contexts) | effect before → after | random edits |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for found in done.findings:
        cells = [found.id, found.title, _edit(found), _gone(found), _effect(found), _random(found)]
        lines.append("| " + " | ".join(_text(cell, 400) for cell in cells) + " |")
    lines += ["", "### What it cost elsewhere", "", _text(_cost(done)), "", "### Weights", ""]
    lines += ["| finding | tensor | rank | relative change |", "|---|---|---:|---:|"]
    lines += [
        f"| {_text(found.id)} | {_text(t.name)} | {t.rank} | {t.relative_change:.2g} |"
        for found in done.findings
        for t in found.tensors
    ]
    if not isinstance(done.declared, NotMeasured):
        lines += ["", "### Declared behaviours", ""]
        lines += [f"- {_text(k.declared_by)}: {phrases.share(k.kept)} kept ({_text(k.title)})" for k in done.declared]
    if done.left:
        lines += ["", f"Not repaired: {_text(', '.join(done.left))}."]
    lines += ["", "### Why the new verdict", "", *(f"- {_text(reason)}" for reason in again.reasons)]
    return "\n".join(lines) + "\n"


def terminal(done: Repair, again: Audit, console: "Console") -> None:
    """Print what was done, what it cost, and the new audit."""
    from rich.padding import Padding
    from rich.text import Text

    from .summary import terminal as of_audit

    for found in done.findings:
        console.print(Text(f"Finding {visible(found.id, 40)}: {visible(found.title, 200)}", "bold"))
        for line in (_edit(found), f"gone: {_gone(found)}", f"effect {_effect(found)}", _random(found)):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print(Text(f"Elsewhere: {_cost(done)}"))
    if not isinstance(done.declared, NotMeasured):
        for kept in done.declared:
            console.print(Text(f"Declared as {visible(kept.declared_by, 80)}: {phrases.share(kept.kept)} kept"))
    if done.left:
        console.print(Text(f"Not repaired: {visible(', '.join(done.left), 200)}"))
    console.print()
    console.print(Text("The repaired model, audited again:", "bold"))
    of_audit(again, console)


def _edit(found: RepairedFinding) -> str:
    if not found.tensors:
        best = found.chosen
        return (
            f"left alone: the best edit found takes back {phrases.share(best.reversion)} and costs "
            f"{phrases.number(best.kl_elsewhere)} nats per token elsewhere"
        )
    ranks = sum(t.rank for t in found.tensors)
    return (
        f"{_WAYS[found.chosen.way]}: {phrases.count(len(found.tensors), 'weight')}, "
        f"{phrases.count(ranks, 'direction')} in all"
    )


def _gone(found: RepairedFinding) -> str:
    short = "" if found.reached else ", short of the target"
    return f"{phrases.estimate(found.reversion)} in {phrases.count(found.reversion.n, 'context')}{short}"


def _effect(found: RepairedFinding) -> str:
    return f"{phrases.number(found.effect_before.estimate)} → {phrases.number(found.effect_after.estimate)} nats"


def _random(found: RepairedFinding) -> str:
    if not found.controls:
        return "no random edits were measured"
    gone = sorted(control.reversion for control in found.controls)
    cost = sorted(control.kl_elsewhere for control in found.controls)
    middle = len(gone) // 2
    return (
        f"{phrases.count(len(gone), 'random edit')} of that size: {phrases.share(gone[middle])} gone in the median, "
        f"{phrases.share(gone[-1])} at most, at {phrases.number(cost[middle])} nats per token elsewhere"
    )


def _cost(done: Repair) -> str:
    cost = done.elsewhere
    return (
        f"KL to the successor {phrases.estimate(cost.kl, 'nats')} per token, next-token loss "
        f"{cost.nll.estimate:+.2g} [{cost.nll.low:+.2g}, {cost.nll.high:+.2g}] nats, next-token accuracy "
        f"{100 * cost.accuracy.estimate:+.2g} [{100 * cost.accuracy.low:+.2g}, {100 * cost.accuracy.high:+.2g}] "
        f"points, over {phrases.count(cost.tokens, 'token')} of text without any behaviour"
    )
