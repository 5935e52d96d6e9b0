"""A command as a process of one thread, with what it took."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def timed(command: Sequence[object], log: Path) -> dict[str, Any]:
    """Run ``command`` with its output in ``log``.

    Returns:
        ``status`` (exit status), ``said`` (the last line of output), ``seconds`` by the clock, ``processor_seconds``
        and ``rss`` (peak memory in bytes) of this process alone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "status": process.returncode,
        "said": (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1],
        "seconds": time.perf_counter() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "rss": used.ru_maxrss * 1024,
    }
