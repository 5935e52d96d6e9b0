"""What a second candidate against the same parent costs, next to the first.

    python benchmarks/score.py PARENT FIRST SECOND... --work DIR [--corpus FILE] [--principles NAME] [--budget quick]
        [--threads N] [--record]

One process runs ``heredity score`` on an empty folder and an empty cache. The first candidate is charged with all that
comes before its end: imports, loading the parent, sampling text from it where no corpus is given, everything that is
then kept of the parent. Seconds of the processor are given beside
those of the clock, since other jobs may share the machine. That results are those of an audit with nothing kept is
tested in ``tests/gate/test_score.py``. ``--record`` appends the table to ``benchmarks/RESULTS.md``.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    begun = time.monotonic(), time.process_time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--principles")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    if given.work.exists() and any(given.work.iterdir()):
        raise SystemExit(f"{given.work} is not empty: what was done before would not be measured")
    # Where sampled text is kept for later audits of the same parent.
    os.environ["XDG_CACHE_HOME"] = str(given.work / "cache")
    import torch

    torch.set_num_threads(given.threads)
    from heredity.gate.audit import Request
    from heredity.gate.score import Reporter, score

    marks: list[tuple[float, float]] = []
    stages: list[dict[str, float]] = []

    @contextmanager
    def follow(folder: Path) -> Iterator[Callable[[str, int, int], None]]:
        folder.mkdir(parents=True, exist_ok=True)
        spent: dict[str, float] = {}
        stages.append(spent)
        since = {"at": time.process_time(), "stage": "before"}

        def progress(stage: str, done: int, total: int) -> None:
            now = time.process_time()
            spent[since["stage"]] = spent.get(since["stage"], 0.0) + now - since["at"]
            since.update(at=now, stage=stage if done < total else f"after {stage}")

        yield progress
        progress("", 0, 0)
        marks.append((time.monotonic(), time.process_time()))

    request = Request(
        given.parent,
        "",
        given.work,
        corpus=(given.corpus,) if given.corpus else (),
        principles=given.principles,
        budget=given.budget,
    )
    scores = score(request, given.candidates, Reporter(lambda text: print(text, flush=True), follow))
    kept = sum(path.stat().st_size for path in (given.work / "parent").iterdir())
    rows = {row.spec: row for row in scores.candidates}
    text = "the corpus given" if given.corpus else "text sampled from the parent"
    lines = [
        f"\n### `heredity score`, `--budget {given.budget}`: a second candidate",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, {given.threads} thread(s), torch "
        f"{version('torch')}, transformers {version('transformers')}, transformer-lens {version('transformer-lens')}; "
        f"kept of the parent: {kept / 1e6:.0f} MB. On {text}; principles: {given.principles or 'none'}.",
        "",
        "| candidate | verdict | seconds by the clock | of the processor | of the first's |",
        "|---|---|---:|---:|---:|",
    ]
    first = 0.0
    for spec, before, after in zip(given.candidates, [begun, *marks], marks, strict=False):
        clock, processor = after[0] - before[0], after[1] - before[1]
        first = first or processor
        name = f"{rows[spec].name} | {rows[spec].outcome}"
        lines.append(f"| {name} | {clock:.0f} | {processor:.0f} | {processor / first:.0%} |")
    table = "\n".join(lines) + "\n"
    print(table)
    shared = [stage for stage in stages[0] if all(stage in spent for spent in stages)]
    for spec, spent in zip(given.candidates, stages, strict=True):
        alike = sum(spent[stage] for stage in shared) / sum(stages[0][stage] for stage in shared)
        print(f"of the stages that all have, {alike:.0%} of the first's")
        print(spec, {stage: round(value, 1) for stage, value in spent.items() if value >= 0.1})
    if given.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write(table)


if __name__ == "__main__":
    main()
