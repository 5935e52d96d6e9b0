"""Lines of descent on a terminal and as a page that opens offline; all text in them may come from untrusted models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from heredity.interp.visible import visible

from . import phrases
from .lineage import Distance, Generation, Line, Lineage
from .report import page_parts, templates, write_page
from .score_page import brief
from .summary import STYLES
from .values import Interval, NotMeasured

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SIDES = (("to the parent", "to_parent"), ("to the first ancestor", "to_first"))


def write_lineage(lineage: Lineage, out: Path) -> None:
    """Write ``lineage`` as one self-contained HTML page.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    from heredity.circuits import lineage_views as views

    figures: dict[str, str] = {}
    for i, line in enumerate(lineage.lines, start=1):
        points = _points(line)
        drawn = {
            "drift": views.drift_figure(points),
            "effects": views.drift_figure(points, effects=True),
            "efficiency": views.efficiency_figure(points),
        }
        figures |= {f"{name}-{i}": figure.to_json() for name, figure in drawn.items() if figure is not None}
    template = templates().get_template("lineage.html.j2")
    write_page(
        template.render(lineage=lineage, distances=distances, brief=brief, **page_parts(figures)),
        out,
    )


def distances(generation: Generation) -> list[tuple[str, Distance | NotMeasured]]:
    """Of one generation, what it was measured against, each once: the first step's parent is the first ancestor."""
    sides: list[tuple[str, Distance | NotMeasured]] = [(words, getattr(generation, name)) for words, name in _SIDES]
    return [("to its parent, the first ancestor", generation.to_parent)] if generation.number == 1 else sides


def _points(line: Line) -> list[Any]:
    from heredity.circuits.lineage_views import Point

    place = {generation.model.sha256: i for i, generation in enumerate(line.generations)}
    out = []
    for generation in line.generations:
        near, far = (
            side.row if isinstance(side, Distance) else None for side in (generation.to_parent, generation.to_first)
        )
        effects = [row.effect.estimate if row and isinstance(row.effect, Interval) else None for row in (near, far)]
        opacities = [row.opacity for row in (far, near) if row and isinstance(row.opacity, Interval)]
        efficiency = generation.per_million_parameters
        out.append(
            Point(
                name=phrases.short_name(generation.model.spec),
                number=generation.number,
                parent=None if generation.parent is None else place[generation.parent],
                to_parent=near.mean_kl if near else None,
                to_first=far.mean_kl if far else None,
                effect_to_parent=effects[0],
                effect_to_first=effects[1],
                verdict_to_parent=near.verdict if near else None,
                verdict_to_first=far.verdict if far else None,
                efficiency=None if isinstance(efficiency, NotMeasured) else efficiency,
                opacity=opacities[0] if opacities else None,
            )
        )
    return out


def terminal(lineage: Lineage, console: "Console") -> None:
    """Print ``lineage`` on ``console``."""
    from rich.text import Text

    for line in lineage.lines:
        for generation in line.generations:
            model = generation.model
            loss = generation.loss
            known = "loss not measured" if isinstance(loss, NotMeasured) else f"loss {phrases.number(loss)} nats"
            gain = generation.per_million_parameters
            if not isinstance(gain, NotMeasured):
                known += f", {phrases.number(gain)} nats over a uniform guess per million parameters"
            name = visible(phrases.short_name(model.spec), 80)
            console.print(
                Text.assemble(
                    f"{generation.number:>3}  ", (name, "bold"), f"  {known}  ", (visible(model.sha256[:12]), "dim")
                ),
                soft_wrap=True,
            )
            for words, side in distances(generation) if generation.number else ():
                console.print(_side(words, side), soft_wrap=True)
        console.print()
    for note in lineage.notes:
        console.print(Text(f"• {visible(note, 400)}"), soft_wrap=True)


def _side(words: str, side: Distance | NotMeasured) -> "Text":
    from rich.text import Text

    if isinstance(side, NotMeasured):
        return Text(f"     {words}: not measured, {visible(side.reason, 200)}")
    row = side.row
    word = phrases.VERDICTS[row.verdict][0].upper()
    weights = "" if isinstance(row.weight_distance, NotMeasured) else f", weights {phrases.share(row.weight_distance)}"
    parts = [f"mean KL {phrases.number(row.mean_kl)}{weights}", phrases.count(row.findings, "finding")]
    if isinstance(row.effect, Interval):
        parts.append(f"largest effect {brief(row.effect, 'nats')}")
    if row.findings or row.declared:
        parts += [f"inherited {brief(row.inherited)}", f"opacity {brief(row.opacity)}"]
    text = Text.assemble("     ", (f" {word} ", STYLES[row.verdict]), f" {words}: " + "; ".join(parts))
    if row.title and row.findings:
        text.append(f"\n       {visible(row.title, 200)}")
    return text
