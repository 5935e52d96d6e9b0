"""Times, memory and floors of what ``kernels_gpu.py`` measures."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    shape: str
    op: str
    contestant: str
    ms: float
    low: float
    high: float
    again: float
    floor: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Run:
    """Where rows are gathered, and until when."""

    device: str
    until: float
    json: Path | None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def time(self, shape: object, op: str, contestant: str, run: Callable[[], Any], floor: float = 0.0) -> Row | None:
        """Measure, unless time is up; a contestant that fails gets a note instead of a row."""
        if time.monotonic() > self.until:
            self.notes.append(f"{shape}, {op}, {contestant}: not measured, time was up")
            return None
        try:
            run()
            peak = self._peak(run)
            (ms, low, high), (again, _, _) = self._clock(run), self._clock(run)
        except (RuntimeError, ValueError, TypeError) as error:
            self.notes.append(
                f"{shape}, {op}, {contestant}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            )
            return None
        self.rows.append(Row(str(shape), op, contestant, ms, low, high, again, floor, peak))
        print(f"{op}, {contestant}: {ms:.3g} ms", file=sys.stderr)
        if self.json is not None:
            self.json.write_text(json.dumps([asdict(row) for row in self.rows], indent=1))
        return self.rows[-1]

    def _clock(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        if self.device == "cuda":
            from triton.testing import do_bench

            return do_bench(run, warmup=20, rep=100, quantiles=[0.5, 0.2, 0.8])
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            run()
            seconds.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(seconds), min(seconds), max(seconds)

    def _peak(self, run: Callable[[], Any]) -> float:
        if self.device != "cuda":
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


@dataclass(frozen=True)
class Ceilings:
    """Bytes per millisecond of a copy (read and written), operations per millisecond of a product."""

    copy: float
    product: float

    def floor(self, operations: float = 0.0, n_bytes: float = 0.0) -> float:
        return max(operations / self.product, n_bytes / self.copy)


def table(rows: list[Row]) -> str:
    out = []
    for shape in dict.fromkeys(row.shape for row in rows):
        out += [f"### {shape}", "", "| op | contestant | ms | 20–80 % | again | of floor | peak MB |"]
        out += ["|---|---|---:|---:|---:|---:|---:|"]
        for row in (row for row in rows if row.shape == shape):
            share = f"{row.floor / row.ms:.0%}" if row.floor else ""
            out.append(
                f"| {row.op} | {row.contestant} | {row.ms:.3g} | {row.low:.3g}–{row.high:.3g} | {row.again:.3g} "
                f"| {share} | {row.peak_mb:.0f} |"
            )
        out.append("")
    return "\n".join(out)
