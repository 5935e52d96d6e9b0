"""The other side of ``kernels.py``: one contestant in its own interpreter, told line by line what to do.

    python -P worker.py FILE INPUTS RESULT --k 32 --threads 2

Lines are JSON. ``{"prepare": [op, variant]}`` runs a task, writes what it computed to RESULT and answers with the
memory it took on top of inputs and weights; ``{"run": [op, variant]}`` answers with the seconds of one more run;
``{"drop": 1}`` forgets all tasks.
"""

import argparse
import ctypes
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Not onto the path of a package that would look for a module called like one of these files.
sys.path.append(str(Path(__file__).parent))

import torch
from safetensors.torch import load_file, save_file
from task import Inputs, Task


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # Packages print while they are imported; the answers need a line of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(args.threads)
    # Copied out of the file's pages, or reading them would count as memory of whoever runs first.
    inputs = Inputs({name: array.clone() for name, array in load_file(args.inputs).items()}, args.k)
    contestant, tasks = importlib.import_module(args.file), {}

    def answer(**said: object) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    answer(torch=torch.__version__)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "prepare" in asked:
                op, variant = asked["prepare"]
                task = tasks[op, variant] = contestant.TASKS[op][variant](inputs)
                answer(**first(task, args.result), gives=task.gives)
            elif "run" in asked:
                op, variant = asked["run"]
                answer(seconds=timed(tasks[op, variant]))
            else:
                tasks.clear()
                answer()
        except Exception as error:
            answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def first(task: Task, result: Path) -> dict[str, float]:
    """Run once and keep the result, then once more to measure memory: modules are loaded and buffers made by then."""
    with torch.set_grad_enabled(task.grad):
        arrays = {name: array.detach().contiguous().clone() for name, array in task.read(task.run()).items()}
    save_file(arrays, result)
    del arrays
    forget_gradients(task)
    with peak() as taken:
        timed(task)
    return {"peak": taken[0]}


def timed(task: Task) -> float:
    forget_gradients(task)
    with torch.set_grad_enabled(task.grad):
        begun = time.perf_counter()
        out = task.run()
        seconds = time.perf_counter() - begun
    del out
    return seconds


def forget_gradients(task: Task) -> None:
    for parameter in task.parameters:
        parameter.grad = None


@contextmanager
def peak() -> Iterator[list[float]]:
    """Bytes resident at most within the block, on top of those before it."""
    taken = [float("nan")]
    trim_heap()
    try:
        # Linux: starts the high-water mark anew.
        Path("/proc/self/clear_refs").write_text("5")
        before, after = _status("VmRSS"), lambda: _status("VmHWM")
    except OSError:
        before, after = _maxrss(), _maxrss
    yield taken
    taken[0] = after() - before


def trim_heap() -> None:
    """Give freed memory back, so that what is used next counts."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))


def _maxrss() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
