"""``heredity circuit``: the circuit of one task in one model, with its evidence, as a file."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from heredity.interp.errors import HeredityError, one_line

from .progress import Bars
from .work import Work, unwritable

if TYPE_CHECKING:
    from heredity.circuits.circuit_record import CircuitRecord, Edge, Node
    from heredity.circuits.intervals import Interval

_LISTED = 8
"""Nodes and edges that are printed."""


def circuit(
    model: Annotated[str, typer.Argument(help="A model; see `heredity audit --help`.")],
    task: Annotated[str, typer.Option(help="A .yaml or .jsonl file, or a shipped task, e.g. ioi (docs/circuits.md).")],
    out: Annotated[Path | None, typer.Option("--out", help="FILE.json to write; an interrupted run resumes.")] = None,
    pairs: Annotated[int, typer.Option(help="Prompts; a circuit is found on half, tested on half.", min=8)] = 64,
    method: Annotated[
        Literal["eap-ig", "clean-corrupted", "eap"], typer.Option(help="Where gradients are taken.")
    ] = "eap-ig",
    target: Annotated[float, typer.Option(help="Faithfulness the circuit is to reach.", min=0.0, max=1.0)] = 0.8,
    seed: Annotated[int, typer.Option(help="Seeds every random choice.", min=0)] = 0,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what memory and time it takes.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Find what causes a behaviour in MODEL, prove it, and write it down."""
    from .cli import Output, errors

    if estimate:
        from .circuit_estimate import estimate_circuit

        found = estimate_circuit(model, task, pairs)
        text = json.dumps(found.as_dict(), indent=1) if json_out else found.in_words()
        Output().print(Text(text), soft_wrap=True)
        return
    if out is None or out.suffix != ".json":
        raise HeredityError(
            "no file to write" if out is None else f"ends in {out.suffix!r}, not in .json",
            where="--out" if out is None else str(out),
            remedy="Give --out FILE.json; arrays go beside it into FILE.safetensors.",
        )
    with Bars(errors) as bars:
        record = run(model, task, out, pairs, method, target, seed, bars.update)
    if json_out:
        Output().print(Text(out.read_text(encoding="utf-8").rstrip("\n")), soft_wrap=True)
    else:
        terminal(record, Output())
        Output().print(Text(f"Circuit: {one_line(str(out), 8000)}"), soft_wrap=True)


def run(
    model: str,
    task: str,
    out: Path,
    pairs: int,
    method: Literal["eap-ig", "clean-corrupted", "eap"],
    target: float,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> "CircuitRecord":
    """Find the circuit and write ``out``; what an interrupted run did is read from ``out`` + ".work".

    Raises:
        HeredityError: the model, the task or the place to write to cannot be used.
    """
    from heredity.circuits.circuit_record import save_circuit
    from heredity.circuits.discover import discover
    from heredity.circuits.tasks import load_task
    from heredity.interp.load import load
    from heredity.interp.store import code_version

    asked = load_task(task)
    _writable(out)
    progress("loading model", 0, 1)
    loaded = load(model)
    progress("loading model", 1, 1)
    key = json.dumps([code_version(), loaded.digest, asked.sha256, pairs, method, target, seed])
    work = Work(out.with_name(out.name + ".work"), hashlib.sha256(key.encode()).hexdigest())
    found = discover(loaded, asked, pairs=pairs, method=method, target=target, seed=seed, steps=work, progress=progress)
    record = save_circuit(found.record, found.scores, found.circuit, out)
    work.remove()
    return record


def _writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(21, "is a directory")
    except OSError as error:
        raise unwritable(out, error) from None


def terminal(record: "CircuitRecord", console: Console) -> None:
    """Print what was found on ``console``."""
    task, proof = record.task, record.proof
    right = "" if task.accuracy is None else f"right on {task.accuracy:.0%} of prompts, "
    lines = [
        f"{one_line(task.name)} in {one_line(record.model.spec)}: {right}{task.metric.replace('_', ' ')} "
        f"{task.clean:.3g}, on counterfactual prompts {task.corrupt:.3g} (n = {task.testing_pairs})",
        f"{record.size} of {record.layout.n_edges} edges ({record.share:.2%}) keep {_percent(proof.faithfulness)} of "
        "the effect on prompts that were not used to find them",
        f"  outside at its mean {_percent(proof.faithfulness_mean)}, at zero {_percent(proof.faithfulness_zero)}; "
        f"without the circuit {_percent(proof.complement)}",
        f"  {record.attribution.method}, {record.attribution.steps} gradients a pair: scores miss their sum by "
        f"{record.attribution.completeness:.2%}",
        "  "
        + ", ".join(f"{one.kind} {one.area:.3f}" for one in record.curves)
        + f"; edges agree between draws of prompts: Jaccard {proof.stability.jaccard:.2f}",
    ]
    if proof.missed.share is not None:
        lines.append(f"  no edge outside carries more than {proof.missed.share:.1%} of the effect (95 % confidence)")
    if record.attribution.completeness > record.attribution.tolerance:
        lines.append(f"  ! more than {record.attribution.tolerance:.0%} is missing from the scores")
    if proof.faithfulness.estimate < record.target:
        lines.append(f"  ! below the {record.target:.0%} asked for, which it reached on the prompts it was found on")
    measured = [node for node in record.nodes if node.effect is not None]
    measured.sort(key=lambda node: -abs(node.effect or 0))
    lines += ["", "Exchanging a part lowers the metric by (95 % interval):"]
    lines += [f"  {node.name:<16} {_effect(node)}" for node in measured[:_LISTED]]
    lines += [
        f"  {edge.source} → {edge.destination}: {_effect(edge)}"
        for edge in record.edges[:_LISTED]
        if edge.effect is not None
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _percent(value: "Interval") -> str:
    return f"{value.estimate:.0%} [{value.low:.0%}, {value.high:.0%}]"


def _effect(one: "Node | Edge") -> str:
    return f"{one.effect:+.3g} [{one.low:+.3g}, {one.high:+.3g}]{'' if one.confirmed else ', not confirmed'}"
