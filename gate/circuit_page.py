"""A circuit or an attribution graph as one page that opens offline; two of them laid over one another."""

from collections import Counter
from pathlib import Path
from typing import Any

from heredity.interp.errors import GraphError

from .report import page_parts, templates, write_page

ROWS = 25
"""Parts in the table under the figure."""


def write_circuit(path: Path, other: Path | None, out: Path) -> bool:
    """Write the circuit at ``path`` as a page, over that at ``other`` if there is one; False if ``path`` is none.

    Raises:
        GraphError: a file is damaged, or the two are not of one kind.
        OutputError: ``out`` cannot be written.
    """
    from heredity.circuits.drawing import union
    from heredity.circuits.drawing_files import read_drawing

    drawing = read_drawing(path)
    if other is not None:
        second = read_drawing(other)
        for each, where in ((drawing, path), (second, other)):
            if each is None:
                raise GraphError(
                    "no circuit or attribution graph that can be laid over another",
                    where=str(where),
                    remedy="Give two attribution graphs, or two circuits of heads and MLPs.",
                )
        assert drawing is not None and second is not None
        try:
            drawing = union(drawing, second, _names(path, other))
        except ValueError as fault:
            remedy = "Give two graphs of one prompt, or two circuits of one architecture."
            raise GraphError(str(fault), where=str(other), remedy=remedy) from None
    if drawing is None:
        return False
    from heredity.circuits.circuit_views import LINKS, PARTS, circuit_figure

    counts = Counter(part.status for part in drawing.parts)
    drawing = drawing.strongest(PARTS, LINKS)
    inner = [part for part in drawing.parts if part.kind != "logit"]
    strongest = sorted(inner, key=lambda part: -abs(part.effect))[:ROWS]
    figure: Any = circuit_figure(drawing)
    template = templates().get_template("circuit.html.j2")
    page = template.render(
        drawing=drawing,
        counts={status: counts[status] for status in ("kept", "lost", "new")},
        strongest=strongest,
        explained=any(part.rule or part.q is not None for part in strongest),
        place_of=lambda part: drawing.columns[int(part.column)] if drawing.across == "token" else "",
        width=min(140 + 17 * len(drawing.columns), 6000),
        **page_parts({"circuit": figure.to_json()}),
    )
    write_page(page, out)
    return True


def _names(path: Path, other: Path) -> tuple[str, str]:
    """What the two are called: their names, with as many folders before them as it takes to tell them apart."""
    first, second = path.absolute().parts, other.absolute().parts
    for n in range(1, max(len(first), len(second)) + 1):
        a, b = "/".join(first[-n:]), "/".join(second[-n:])
        if a != b:
            return a, b
    return "first", "second"
