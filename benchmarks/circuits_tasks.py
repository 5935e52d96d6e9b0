"""A circuit from model load to confirmed effects, stage by stage, and how well a model does every shipped task.

    python benchmarks/circuits_tasks.py MODEL [--task ioi] [--pairs 64] [--threads 1] [--record]

Seconds are both those of the clock and those of the processor, as other processes lengthen only the first. Memory is
the largest resident set. The estimate that ``heredity circuit --estimate`` gives stands beside them. ``--record``
appends the tables to ``RESULTS.md``.
"""

import argparse
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()


class Clock:
    """Seconds of named stages."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    @contextmanager
    def stage(self, name: str):
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.rows.append((name, time.perf_counter() - wall, time.process_time() - processor))
        print(f"{name}: {self.rows[-1][1]:.1f} s, of the processor {self.rows[-1][2]:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("demo/circuit.json"))
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    clock = Clock()
    with clock.stage("loading"):
        import torch

        torch.set_num_threads(args.threads)
        from heredity.circuits.circuit_record import save_circuit
        from heredity.circuits.discover import Unkept, discover
        from heredity.circuits.tasks import SHIPPED, load_task, prepare
        from heredity.circuits.tasks.screen import score
        from heredity.gate.circuit_estimate import estimate_circuit
        from heredity.interp.load import load

        model = load(args.model)

    class Timed(Unkept):
        def step(self, name: str, compute: Callable[[], Any]) -> Any:
            with clock.stage(name):
                return super().step(name, compute)

        def arrays(self, name: str, compute: Callable[[], Any]) -> Any:
            with clock.stage(name):
                return super().arrays(name, compute)

    found = discover(model, load_task(args.task), pairs=args.pairs, steps=Timed())
    record = save_circuit(found.record, found.scores, found.circuit, args.out)
    wall, processor = time.perf_counter() - _STARTED, time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    guess = estimate_circuit(args.model, args.task, args.pairs)
    proof = record.proof
    confirmed = [one for one in (*record.edges, *record.others) if one.effect is not None]
    nodes = [one for one in record.nodes if one.effect is not None]

    def share(value: Any) -> str:
        return f"{value.estimate:.2f} ({value.low:.2f}; {value.high:.2f})"

    lines = [
        f"## Circuit of {args.task}, {args.pairs} pairs, {date.today()}",
        "",
        f"`python benchmarks/circuits_tasks.py MODEL --task {args.task} --pairs {args.pairs} "
        f"--threads {args.threads}`. "
        f"{model.shape.architecture} of {model.n_params / 1e6:.4g} M parameters, torch {version('torch')}, "
        f"transformers {version('transformers')}, {args.threads} thread(s), seed 0.",
        "",
        "| stage | seconds | of the processor |",
        "|---|---:|---:|",
        *(f"| {name} | {w:.1f} | {p:.1f} |" for name, w, p in clock.rows),
        f"| from start to the written file | {wall:.1f} | {processor:.1f} |",
        f"| estimated before (one idle core) | {guess.seconds:.0f} | |",
        "",
        f"Peak memory {memory / 1e9:.2f} GB, estimated {guess.peak_bytes / 1e9:.2f} GB.",
        "",
        "| | |",
        "|---|---:|",
        f"| gradients a pair | {record.attribution.steps} |",
        f"| completeness residual | {record.attribution.completeness:.2%} |",
        f"| edges of the circuit | {record.size} of {record.layout.n_edges} ({record.share:.2%}) |",
        f"| faithfulness on the testing half | {share(proof.faithfulness)} |",
        f"| with means outside | {share(proof.faithfulness_mean)} |",
        f"| with zeros outside | {share(proof.faithfulness_zero)} |",
        f"| complement | {share(proof.complement)} |",
        *(f"| {one.kind} | {one.area:.3f} |" for one in record.curves),
        f"| Jaccard between bootstrap draws | {proof.stability.jaccard:.2f} |",
        f"| bound on an edge outside, share of the effect | {proof.missed.share or 0:.2f} |",
        f"| strongest edges confirmed | {sum(bool(one.confirmed) for one in confirmed)} of {len(confirmed)} |",
        f"| strongest nodes confirmed | {sum(bool(one.confirmed) for one in nodes)} of {len(nodes)} |",
        "",
        "| f at share of all edges | " + " | ".join(f"{p.requested:g}" for p in record.curves[0].curve.points) + " |",
        "|---|" + "---:|" * len(record.curves[0].curve.points),
        *(
            f"| {one.kind} | " + " | ".join(f"{p.faithfulness.estimate:.2f}" for p in one.curve.points) + " |"
            for one in record.curves
        ),
        "",
        "Every shipped task, 32 pairs, seed 1:",
        "",
        "| task | right | metric, clean | counterfactual | tokens | refused |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in SHIPPED:
        task = load_task(name)
        half = prepare(model, task, 32, seed=1).discovery
        said = score(model, half)
        refused = said.accuracy is not None and said.accuracy < task.accuracy
        lines.append(
            f"| {name} | {said.accuracy:.0%} | {said.clean:.2f} | {said.corrupt:.2f} | "
            f"{int(half.pairs.last.max()) + 1} | {'yes' if refused or said.effect.low <= 0 else 'no'} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.record:
        with Path(__file__).with_name("RESULTS.md").open("a", encoding="utf-8") as results:
            results.write("\n" + text)


if __name__ == "__main__":
    main()
