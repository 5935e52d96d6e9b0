"""Latents as HTML: fragments for Jupyter, and whole pages that need no network, no script and no other file.

Every string goes through :func:`_text`, whoever wrote it: rules quote tokens, tokens come from a model, site names and
provenance from a file.
"""

import html
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import DictionaryError
from ..visible import pieces
from .record import Dictionary, rule_in_words
from .snippets import Snippet

if TYPE_CHECKING:
    from .browse import Effect, Latent, Latents

SHOWN = 12
"""Latents listed in an overview."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
.hd{--ink:#1b2430;--muted:#5f6b7a;--line:#dfe4ea;--wash:#f6f8fa;--up:#b8480c;--down:#1b66a8;--good:#1f7a4d;
color-scheme:light;color:var(--ink);background:#fff;border:1px solid var(--line);border-radius:10px;padding:16px 20px;
margin:8px 0;max-width:1080px;font:14px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
.hd *{box-sizing:border-box}
.hd h3{font-size:18px;line-height:1.3;margin:0;color:var(--ink)}
.hd h4{font-size:12px;font-weight:600;margin:16px 0 6px;color:var(--muted)}
.hd p{margin:4px 0}
.hd .of,.hd .dim{color:var(--muted);font-size:13px}
.hd .rule{font-size:16px;margin:10px 0 8px;max-width:80ch}
.hd .q{display:flex;align-items:center;gap:10px;font-variant-numeric:tabular-nums}
.hd .q b{font-size:16px;white-space:nowrap}
.hd .meter{flex:0 0 160px;height:8px;border-radius:4px;background:var(--line);overflow:hidden}
.hd .meter i{display:block;height:100%;background:var(--good)}
.hd .parts{display:grid;grid-template-columns:minmax(0,1fr) 300px;gap:0 28px}
.hd .places{list-style:none;margin:0;padding:0}
.hd .places li{display:grid;grid-template-columns:52px minmax(0,1fr);gap:10px;padding:5px 0;
border-top:1px solid var(--line);margin:0}
.hd .places .by{text-align:right;color:var(--muted);font-variant-numeric:tabular-nums}
.hd .says{overflow-wrap:anywhere;white-space:pre-wrap}
.hd .says span,.hd mark{border-radius:3px;padding:1px 0;background:rgba(232,137,52,calc(var(--a,0)*.75));color:inherit}
.hd mark{box-shadow:inset 0 -2px 0 var(--up);font-weight:600;padding:1px 2px}
.hd .said{background:var(--wash);border-radius:3px;padding:0 3px;white-space:pre-wrap;overflow-wrap:anywhere;
font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12.5px}
.hd .instead{color:#7b1fa2;background:#f5ebf8;border-radius:3px}
.hd svg{display:block;width:100%;max-width:340px;height:auto}
.hd svg text{font:10px system-ui,sans-serif;fill:var(--muted)}
.hd table{border-collapse:collapse;margin:0;width:100%;font-variant-numeric:tabular-nums;background:transparent}
.hd tr,.hd tr:nth-child(even){background:transparent}
.hd td,.hd th{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border:0;border-bottom:1px solid var(--line)}
.hd th{color:var(--muted);font-weight:600;font-size:12px}
.hd td.n,.hd th.n{text-align:right;white-space:nowrap}
.hd table.effects{table-layout:fixed}
.hd .effects td{padding:1px 8px 1px 0;border:0;vertical-align:middle}
.hd .effects td.bar{width:120px}
.hd .effects td.n{width:52px}
.hd .effects i{display:block;height:9px;border-radius:2px;background:var(--side)}
.hd .facts{display:flex;flex-wrap:wrap;gap:6px 28px;margin:10px 0}
.hd .facts b{display:block;font-size:17px;font-weight:600;font-variant-numeric:tabular-nums}
.hd .facts span{color:var(--muted);font-size:12px}
.hd .two{display:grid;grid-template-columns:1fr 1fr;gap:0 28px}
.hd .fault{border-left:4px solid var(--up);background:#fdf3ec;padding:6px 12px;margin:10px 0}
.hd a{color:var(--down);text-decoration:none}
@media(max-width:760px){.hd .parts,.hd .two{grid-template-columns:minmax(0,1fr)}}
"""


def card(latent: "Latent", *, style: bool = True) -> str:
    """One latent: rule, q, examples, activations, effects on logits."""
    from .browse import measured_on

    found = latent.explanation
    q, *rest = measured_on(latent)
    head = f"<h3>Latent {latent.number:,}</h3><p class='of'>{_text(_title(latent.dictionary), 300)}</p>"
    if latent.rule:
        head += f"<p class='rule'>{_text(latent.rule, 1_000)}</p>"
    if found is not None and found.q is not None:
        head += f"<div class='q'>{_meter(found.q)}<span class='dim'>{_text(q.partition(': ')[2])}</span></div>"
    else:
        head += f"<p>{_text(q)}</p>"
    head += "".join(f"<p class='dim'>{_text(line)}</p>" for line in rest)
    if (delta := latent.delta_norm) is not None and delta == delta:
        head += f"<p class='dim'>Δnorm {delta:.2f} (0 the parent's alone, ½ shared, 1 the successor's alone)</p>"
    left = _places("Where it is most active", latent.examples, latent.max or 0.0)
    left += _places("Where it is less active", latent.more_examples, latent.max or 0.0)
    right = _histogram([(_bin(low, high), count) for low, high, count in latent.histogram], "Activations, tokens")
    right += _effects(latent.effects)
    body = f"{head}<div class='parts'><div>{left}</div><div>{right}</div></div>" if left or right else head
    return _block(body, style, f"latent-{latent.number}")


def table(latents: "Latents", most: int | None = None, *, linked: bool = False, style: bool = True) -> str:
    """A list of latents.

    Args:
        latents: in their order.
        most: how many are shown.
        linked: whether numbers lead to the cards of the same page.
        style: whether the style comes with it.
    """
    from .browse import LISTED

    count = LISTED if most is None else most
    head = f"<h3>{len(latents):,} {_text(latents.about, 300)}</h3>"
    return _block(head + _rows(latents, count, linked), style)


def overview(dictionary: Dictionary) -> str:
    """A dictionary: what it is, how active its latents are and how well explained, and the best explained ones."""
    facts = [
        ("latents", f"{dictionary.n_latents:,}"),
        ("wide", " and ".join(f"{width:,}" for width in dictionary.widths)),
        ("activation", _text(rule_in_words(dictionary.activation))),
        ("numbers", str(dictionary.b_enc.dtype).removeprefix("torch.")),
    ]
    fault, described = "", None
    try:
        described = dictionary.latents
    except DictionaryError as error:
        fault = f"<p class='fault'>{_text(str(error))}</p>"
    notes = None if described is None else described.notes
    below = ""
    if described is not None and notes is not None:
        seen = notes.statistics
        on = float(seen.count.sum()) / max(seen.n_tokens, 1)
        facts += [
            ("tokens seen", f"{seen.n_tokens:,}"),
            ("active per token", f"{on:.1f}"),
            ("never active", f"{int((seen.count == 0).sum()):,}"),
            ("explained", f"{len(notes.explanations):,}"),
        ]
        below = f"<div class='two'><div>{_frequencies(seen.frequency)}</div>"
        below += f"<div>{_scores([e.q for e in notes.explanations.values() if e.q is not None])}</div></div>"
        best = described.sort(by="q")[: min(SHOWN, len(notes.explanations))] or described.sort(by="frequency")[:SHOWN]
        below += f"<h4>The {'best explained' if notes.explanations else 'most often active'}</h4>{_rows(best, SHOWN)}"
    elif not fault:
        below = "<p class='dim'>Nothing is known of its latents yet: <span class='said'>describe</span> it.</p>"
    if dictionary.provenance:
        origin = json.dumps(dict(dictionary.provenance), ensure_ascii=False, default=str)
        below += f"<h4>Where it comes from</h4><p class='said'>{_text(origin, 1_500)}</p>"
    head = f"<h3>{_text(_title(dictionary), 300)}</h3>"
    return _block(f"{head}{fault}{_facts(facts)}{below}", True)


def page(title: str, body: str) -> str:
    """``body`` (fragments of this module) as a page of its own; nothing in it may load or run anything."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title, 200)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}body{{margin:16px;background:#f6f8fa}}</style></head><body>{body}</body></html>\n"
    )


def _block(body: str, style: bool, name: str = "") -> str:
    named = f" id='{name}'" if name else ""
    return f"<div class='hd'{named}>{f'<style>{_STYLE}</style>' if style else ''}{body}</div>"


def _text(text: str, limit: int = 2_000) -> str:
    """``text`` made visible and escaped; what stands for something else looks different."""
    return "".join(
        f"<span class='instead'>{html.escape(shown)}</span>" if instead else html.escape(shown)
        for shown, instead in pieces(text, limit)
    )


def _meter(q: float) -> str:
    return f"<b>q {q:.2f}</b><span class='meter'><i style='width:{100 * min(max(q, 0), 1):.0f}%'></i></span>"


def _places(title: str, snippets: Sequence[Snippet], largest: float) -> str:
    if not snippets:
        return ""
    shown = "".join(
        f"<li><span class='by'>{each.activation:.3g}</span>{_snippet(each, largest)}</li>" for each in snippets
    )
    return f"<h4>{title}</h4><ul class='places'>{shown}</ul>"


def _snippet(snippet: Snippet, largest: float) -> str:
    shown = []
    for part in snippet.parts:
        strength = min(1.0, abs(part.activation) / largest) if largest else 0.0
        style = f" style='--a:{strength:.2f}' title='{part.activation:.3g}'" if strength or part.marked else ""
        tag = "mark" if part.marked else "span" if style else ""
        inside = _text(part.text)
        shown.append(f"<{tag}{style}>{inside}</{tag}>" if tag else inside)
    ends = ("" if snippet.begins else "… ", "" if snippet.ends else " …")
    return f"<span class='says'>{ends[0]}{''.join(shown)}{ends[1]}</span>"


def _effects(effects: Sequence["Effect"]) -> str:
    """The last model's first: what a successor does is asked before what its parent did."""
    changes = [abs(by) for effect in effects for _, by in (*effect.raised, *effect.lowered)]
    largest, most, out = max(changes, default=1.0), 10 if len(effects) == 1 else 6, ""
    for effect in reversed(effects):
        where = f" in the {effect.model}" if effect.model else ""
        for verb, side, tokens in (("Raises", "up", effect.raised), ("Lowers", "down", effect.lowered)):
            rows = "".join(
                f"<tr><td><span class='said'>{_text(token, 40)}</span></td>"
                f"<td class='bar'><i style='width:{100 * abs(by) / largest:.0f}%'></i></td>"
                f"<td class='n'>{f'{by:+.2f}'.replace('-', '−')}</td></tr>"
                for token, by in tokens[:most]
            )
            out += f"<h4>{verb} the logits{_text(where)} of</h4>"
            out += f"<table class='effects' style='--side:var(--{side})'>{rows}</table>"
    return out


def _rows(latents: "Latents", most: int, linked: bool = False) -> str:
    pair = latents.dictionary.kind == "crosscoder" and len(latents.dictionary.W_dec) == 2
    heads = ["", "q", "active", *(["Δnorm"] if pair else [])]
    rows = ["".join(f"<th class='n'>{name}</th>" for name in heads) + "<th>where it is active</th><th>raises</th>"]
    for latent in latents[:most]:
        number = f"<a href='#latent-{latent.number}'>{latent.number:,}</a>" if linked else f"{latent.number:,}"
        cells = [number, "–" if latent.q is None else f"{latent.q:.2f}"]
        cells.append("" if latent.frequency is None else f"{latent.frequency:.3%}")
        cells += [f"{latent.delta_norm:.2f}".replace("nan", "–")] if pair else []
        where = _text(latent.rule, 200) if latent.rule else ""
        if not where and latent.examples:
            where = _snippet(latent.examples[0], latent.max or 0.0)
        last = latent.effects[-1].raised[:4] if latent.effects else ()
        raises = " ".join(f"<span class='said'>{_text(token, 30)}</span>" for token, _ in last)
        plain = "".join(f"<td class='n'>{cell}</td>" for cell in cells)
        rows.append(f"{plain}<td>{where}</td><td>{raises}</td>")
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    rest = f"<p class='dim'>and {len(latents) - most:,} more</p>" if len(latents) > most else ""
    return f"<table>{body}</table>{rest}" if len(latents) else "<p class='dim'>none</p>"


def _title(dictionary: Dictionary) -> str:
    from .browse import named

    words = named(dictionary)
    return words[:1].upper() + words[1:]


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "<div class='facts'>" + "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in facts) + "</div>"


def _histogram(bars: Sequence[tuple[tuple[str, str], int]], title: str) -> str:
    """Bars with what is under their left ends, and what their titles say."""
    if not bars:
        return ""
    width, height = 300 / len(bars), 70
    most, drawn = max(count for _, count in bars) or 1, ""
    step = max(1, -(-len(bars) // 8))
    for i, ((under, said), count) in enumerate(bars):
        tall = max(1.0, height * count / most) if count else 0.0
        drawn += (
            f"<rect x='{i * width + 1:.1f}' y='{height - tall:.1f}' width='{max(width - 2, 1):.1f}' "
            f"height='{tall:.1f}' fill='#1b66a8'><title>{said}: {count:,}</title></rect>"
        )
        if i % step == 0:
            drawn += f"<text x='{i * width + 1:.1f}' y='{height + 13}'>{under}</text>"
    return (
        f"<h4>{title}</h4><svg viewBox='0 0 300 {height + 18}' role='img' aria-label='{title}'>"
        f"<line x1='0' x2='300' y1='{height}' y2='{height}' stroke='#9aa5b1'/>{drawn}</svg>"
    )


def _bin(low: float, high: float) -> tuple[str, str]:
    return f"{low:.2g}", f"{low:.3g} to {high:.3g}"


def _frequencies(frequency: torch.Tensor) -> str:
    """How many latents are active how often, by powers of ten."""
    on = frequency[frequency > 0]
    decades = on.log10().floor().long().clamp(-7, -1)
    bars = []
    for decade in range(int(decades.min()), 0) if len(on) else ():
        said = (f"{10.0**decade:.3g}", f"active at {10.0**decade:.3g} to {10.0 ** (decade + 1):.3g} of tokens")
        bars.append((said, int((decades == decade).sum())))
    return _histogram(bars, "Latents by share of tokens they are active at")


def _scores(scores: Sequence[float]) -> str:
    tenths = [min(int(10 * q), 9) for q in scores]
    bars = [((f"{i / 10:.1f}", f"q from {i / 10:.1f} to {(i + 1) / 10:.1f}"), tenths.count(i)) for i in range(10)]
    return _histogram(bars if scores else [], "Explained latents by q")
