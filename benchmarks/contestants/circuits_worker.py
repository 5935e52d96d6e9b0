"""One contestant of ``circuits.py`` in its own interpreter, told line by line which task to run.

    python -P circuits_worker.py FILE MODEL PAIRS RESULT [OPTION …]

Lines are names of tasks; ``!name`` writes the scores to RESULT. The answer holds the seconds it took, and the memory it
took at its peak on top of the loaded model.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch


def main() -> None:
    name, model, pairs, result, *options = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    tasks = importlib.import_module(name).tasks(model, json.loads(Path(pairs).read_text()), *options)
    print(json.dumps({"ready": list(tasks)}), file=answers, flush=True)
    for line in sys.stdin:
        asked = line.strip()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before, started, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
        scores = tasks[asked.lstrip("!")]()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        memory = status("VmHWM") - before
        if asked.startswith("!"):
            np.savez(result, **scores)
        print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": memory}), file=answers, flush=True)


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()
