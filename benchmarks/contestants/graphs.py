"""The other side of ``attribution_graph.py``: one contestant in its own interpreter, told line by line what to do.

    python -P graphs.py FILE MODEL RESULT ACTIVE=DIRECTORY …

Lines are JSON: ``{"ids", "active", "nodes", "batch"?, "budget"?, "keep"?}`` computes a graph with one of the
transcoder sets and answers with the seconds it took (of the clock and of the processor), the memory on top of what was
there before, and what the contestant adds; with ``keep`` the graph goes into RESULT.
"""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Not onto the path of a package that would look for a module called like one of these files.
sys.path.append(str(Path(__file__).parent))

import torch
from safetensors.torch import save_file
from worker import trim_heap


def main() -> None:
    file, model, result, *sets = sys.argv[1:]
    # Packages print while they are imported; the answers need a line of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)

    def answer(**said: object) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        contestant = importlib.import_module(file)
        places = dict(pair.split("=", 1) for pair in sets)
        models = {float(active): contestant.load(model, path) for active, path in places.items()}
        answer(torch=torch.__version__, **contestant.versions())
        for line in sys.stdin:
            asked = json.loads(line)
            loaded = models[asked["active"]]
            with watched() as taken:
                begun, before = time.perf_counter(), time.process_time()
                graph = contestant.graph(loaded, asked)
                seconds, cpu = time.perf_counter() - begun, time.process_time() - before
            if asked.get("keep"):
                save_file({k: v.contiguous() for k, v in contestant.arrays(graph).items()}, result)
            answer(seconds=seconds, cpu=cpu, **taken, **contestant.facts(graph))
            del graph
    except Exception as error:
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        raise


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Bytes at most within the block, on top of those before it: resident, of them anonymous, of them file pages."""
    trim_heap()
    fields = {"peak": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    before, most, done = status(), status(), threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            for field, value in status().items():
                most[field] = max(most[field], value)

    watcher = threading.Thread(target=look)
    watcher.start()
    taken: dict[str, float] = {}
    try:
        yield taken
    finally:
        done.set()
        watcher.join()
        taken |= {name: most[field] - before[field] for name, field in fields.items()}


def status() -> dict[str, float]:
    """Bytes by field of /proc/self/status."""
    pairs = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {k: 1024.0 * int(v.split()[0]) for k, v in pairs if k in ("VmRSS", "RssAnon", "RssFile", "RssShmem")}


if __name__ == "__main__":
    main()
