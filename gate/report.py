"""``report.html``: the audit for the person who signs, one file that opens offline and asks nothing of the network.

Everything in an audit comes from an untrusted model. Every string that a template prints is made visible and escaped by
the environment itself (autoescape and ``finalize``); the page's Content-Security-Policy runs exactly two scripts, named
by their digests, and loads nothing.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from heredity.circuits import views
from heredity.circuits.opacity_views import opacity_figure
from heredity.interp.errors import OutputError
from heredity.interp.visible import pieces, visible

from . import phrases
from .principle_verdict import fled, gained, kept_rows, sentence
from .read_audit import read_content, validated
from .records import Audit, Behaviour, Circuit, Example, MarkedToken
from .values import Interval, NotMeasured

TOKENS_SHOWN = 60
"""Tokens of a context that show at once, the last ones, so that the place where the models part is in sight."""
TOKENS_FOLDED = 400
"""Tokens before those that a click unfolds; still earlier ones are cut with a notice."""
TOKEN_CHARACTERS = 120
"""Characters of one token that are printed."""
MARKED = 0.1
"""Share of the divergence from which a token is marked with its number."""


def write_report(audit: Audit, path: Path) -> None:
    """Write ``audit`` as one self-contained HTML page.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    figures: dict[str, str] = {}
    groups = phrases.cases(audit)
    null = audit.calibration.null
    null_effects = () if isinstance(null, NotMeasured) else null.largest_effects
    for kind, group in (("finding", groups.undeclared), ("declared", groups.declared)):
        for i, case in enumerate(group, start=1):
            if case.behaviour:
                figures |= _behaviour_figures(case.behaviour, f"{kind}-{i}", null_effects)
    figures |= _ordinary_figures(audit)
    template = templates().get_template("report.html.j2")
    shown = {"cases": groups, "unmeasured": phrases.unmeasured(audit), "kept_rows": kept_rows(audit)}
    write_page(template.render(audit=audit, **shown, **page_parts(figures)), path)


def write_view(source: Path, out: Path) -> None:
    """Write the circuits of an audit directory, an ``audit.json`` or a ``circuits/*.json`` as one interactive page.

    Raises:
        OutputError: ``source`` is none of these, or ``out`` cannot be written.
    """
    heading, behaviours = _read(source / "audit.json" if source.is_dir() else source)
    figures: dict[str, str] = {}
    for i, behaviour in enumerate(behaviours, start=1):
        figures |= _behaviour_figures(behaviour, f"case-{i}", ())
    template = templates().get_template("view.html.j2")
    write_page(template.render(heading=heading, behaviours=behaviours, **page_parts(figures)), out)


def write_page(page: str, path: Path) -> None:
    """Write a page.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(
            f"the page cannot be written ({error.strerror})",
            where=str(path),
            remedy="Name a file in a writable folder.",
        ) from error


def _read(path: Path) -> tuple[dict[str, str], tuple[Behaviour, ...]]:
    """What the page is about, and the behaviours of an audit or of one circuit file."""
    remedy = "Name an audit directory, its audit.json, or one of its circuits/*.json."
    content = read_content(path, remedy)
    if "behaviour" in content:
        about = content.get("audit")
        heading = {str(k): str(v) for k, v in about.items()} if isinstance(about, dict) else {}
        return heading, (validated(Behaviour, content["behaviour"], path, remedy),)
    audit = validated(Audit, content, path, remedy)
    return {"parent": audit.parent.spec, "successor": audit.successor.spec, "verdict": audit.verdict}, audit.behaviours


def _behaviour_figures(behaviour: Behaviour, prefix: str, null_effects: Sequence[float]) -> dict[str, str]:
    figures: dict[str, Any] = {}
    circuit = behaviour.circuit
    if isinstance(circuit, Circuit):
        figures["circuit"] = views.circuit_figure(circuit.tokens, circuit.grid, circuit.nodes)
        reversion, ablation = (v if isinstance(v, Interval) else None for v in (circuit.reversion, circuit.ablation))
        figures["reversion"] = views.reversion_figure(reversion, ablation, circuit.controls, target=circuit.target)
    if not isinstance(behaviour.opacity_detail, NotMeasured):
        figures["opacity"] = opacity_figure(behaviour.opacity_detail.sites)
    figures["null"] = views.null_figure(behaviour.effect, null_effects or (behaviour.null_max,))
    return {f"{prefix}-{name}": figure.to_json() for name, figure in figures.items()}


def _ordinary_figures(audit: Audit) -> dict[str, str]:
    """Of the text as a whole."""
    divergence, similarity, sites = audit.baselines.divergence, audit.baselines.similarity, audit.coverage.sites
    kl = views.kl_histogram(divergence.histogram_edges, divergence.histogram_counts)
    figures: dict[str, Any] = {"kl": kl.to_json()}
    if not isinstance(similarity, NotMeasured):
        figures["cka"] = views.cka_figure(similarity).to_json()
    if not isinstance(sites, NotMeasured):
        figures["depth"] = views.depth_figure(sites).to_json()
    return figures


def page_parts(figures: dict[str, str]) -> dict[str, Any]:
    """What every page needs: the scripts, the policy that admits only them, the style, the figures."""
    scripts = [_plotly(), _template_text("figures.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return {
        "policy": Markup(policy),
        "style": Markup(_template_text("report.css")),
        "scripts": [Markup(script) for script in scripts],
        "figures": Markup(_safe_json(figures)),
        "figure_names": frozenset(figures),
    }


def _safe_json(figures: dict[str, str]) -> str:
    """One JSON object of already encoded figures, with nothing in it that HTML or JavaScript would read as its own."""
    joined = "{" + ",".join(f"{json.dumps(name)}:{encoded}" for name, encoded in figures.items()) + "}"
    for char in "<>&\u2028\u2029":
        joined = joined.replace(char, f"\\u{ord(char):04x}")
    return joined


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script = (
        get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    )  # as an HTML parser reads it, or the digest differs
    if "</script" in script.lower() or "<!--" in script:
        raise RuntimeError("this plotly.js cannot be inlined in HTML")
    return script


def _template_text(name: str) -> str:
    found = templates()
    assert found.loader is not None
    return found.loader.get_source(found, name)[0]


@cache
def templates() -> Environment:
    """The templates, which escape and make visible whatever they print."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "controls": phrases.controls,
        "number": phrases.number,
        "share": _share,
        "estimate": _estimate,
        "size": phrases.size,
        "count": phrases.count,
        "contexts": phrases.contexts,
        "short_name": phrases.short_name,
        "duration": phrases.duration,
        "mebibytes": phrases.mebibytes,
        "model_text": _model_text,
        "cut": _shown,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "signed": lambda value: f"{value:+.3g}".replace("-", "\N{MINUS SIGN}"),
        "hundredths": lambda value: f"{value:.2f}",
        "exact_share": lambda value: f"{100 * value:g} %",
        "setting": lambda value: f"{value:g}" if isinstance(value, float) else value,
        "option_text": lambda text: escape(visible(text, 120)),
    }
    environment.globals |= {
        "VERDICTS": phrases.VERDICTS,
        "KINDS": phrases.KINDS,
        "SOURCES": phrases.SOURCES,
        "METHODS": phrases.METHODS,
        "NULLS": phrases.NULLS,
        "became": sentence,
        "gained": gained,
        "fled": fled,
        "context_of": _context_of,
        "plot_width": _plot_width,
        "not_measured": lambda value: isinstance(value, NotMeasured),
    }
    return environment


def _finalize(value: object) -> object:
    """What a template prints, made safe whether or not it thought of it: strings visible, numbers to three digits."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, str):
        return _shown(value, 2_000)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return Markup(escape(phrases.number(value))) if isinstance(value, int | float) else value


def _shown(text: str, limit: int) -> Markup:
    return Markup("").join(
        Markup('<span class="standin">{}</span>').format(part) if stand_in else escape(part)
        for part, stand_in in pieces(text, limit)
    )


def _model_text(text: str, limit: int = 1_200) -> Markup:
    """Text written by a model: isolated from the direction of the text around it, cut with a notice."""
    return Markup('<bdi class="model">{}</bdi>').format(_shown(text, limit) or Markup("<i>nothing</i>"))


def _share(value: float) -> Markup:
    return _unbroken(phrases.share(value))


def _unbroken(text: str) -> Markup:
    return escape(text.replace(" %", "\N{NO-BREAK SPACE}%"))


def _estimate(value: Interval | NotMeasured | float, unit: str = "share") -> Markup:
    """The estimate large, its interval small (an exact number has none); or the reason why there is none."""
    if isinstance(value, NotMeasured):
        return Markup('<span class="unmeasured">not measured: {}</span>').format(_shown(value.reason, 600))
    main, _, interval = phrases.estimate(value, unit).partition(" (")
    if not interval:
        return Markup('<span class="estimate"><b>{}</b></span>').format(_unbroken(main))
    return Markup('<span class="estimate"><b>{}</b> <small>({}</small></span>').format(
        _unbroken(main), _unbroken(interval)
    )


def _context_of(example: Example) -> dict[str, Any]:
    """The tokens of an example that show, those folded away before them, and how many do not fit on the page."""
    # A fold over a handful of tokens would take more room than it saves.
    shown = example.tokens[-TOKENS_SHOWN:] if len(example.tokens) > TOKENS_SHOWN + 20 else example.tokens
    before = example.tokens[: len(example.tokens) - len(shown)]
    folded = before[-TOKENS_FOLDED:]
    return {
        "tokens": [_token(token) for token in shown],
        "folded": [_token(token) for token in folded],
        "left_out": len(before) - len(folded),
        "marked_before": [token.text for token in before if token.weight >= MARKED][:8],
    }


def _token(token: MarkedToken) -> dict[str, Any]:
    weight = 0.0 if math.isnan(token.weight) else min(max(token.weight, 0.0), 1.0)
    return {
        "text": _shown(token.text, TOKEN_CHARACTERS),
        "weight": round(weight, 3),
        "note": _share(token.weight) if token.weight >= MARKED else "",
    }


def _plot_width(circuit: Circuit) -> int:
    """Pixels that the figure of a circuit needs for its tokens; narrower screens scroll."""
    first, last = views.shown_positions(circuit.tokens, circuit.grid)
    return min(120 + 17 * (last - first), 1600)
