"""What ``heredity train-dictionary`` needs for a store of a million tokens, and whether being killed changes anything.

    python benchmarks/dictionary_store.py --work WORK [--latents 16384] [--tokens N] [--record]

WORK is where ``dictionaries.py`` left its store. The command runs once undisturbed; then into another folder, is killed
(SIGKILL) when a bit more than half of the first run's time is over, and runs again. The files written must be the same
bytes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from dictionaries import HERE, SITE, processor

LIMIT = 3e9
"""Bytes it must stay below."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, help="trained on; one pass if absent")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append what was measured to RESULTS.md")
    args = parser.parse_args()
    whole, killed = (args.work / f"store-{args.latents}-{name}" for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    seconds, peak = run(args, whole, 0)
    early, _ = run(args, killed, -signal.SIGKILL, limit=0.55 * seconds)
    late, again = run(args, killed, 0)
    written = [{file.name: file.read_bytes() for file in sorted(each.glob("dictionary.*"))} for each in (whole, killed)]
    assert written[0], f"no dictionary in {whole}"
    same, tokens = written[0] == written[1], json.loads((args.work / "store" / "manifest.json").read_text())["n_tokens"]
    text = (
        f"## A dictionary from a store, {date.today().isoformat()}\n\n`heredity train-dictionary`, {args.latents} "
        f"latents, k {args.k}, batches of {args.batch}, {args.tokens or 'all'} of {tokens} tokens of SmolLM2-135M at "
        f"{SITE}, kept as float16. {processor()}, {args.threads} threads: {seconds:.0f} s, peak {peak / 1e9:.2f} GB. "
        f"Killed after {early:.0f} s and run again: {late:.0f} s more, peak {again / 1e9:.2f} GB, "
        f"{'the same' if same else '**other**'} bytes in {', '.join(written[0])}. `benchmarks/dictionary_store.py`.\n"
    )
    print(text)
    if args.record:
        with (HERE / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + text)
    return 0 if same and max(peak, again) < LIMIT else 1


def run(args: argparse.Namespace, out: Path, expected: int, limit: float | None = None) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command; it is killed after ``limit`` seconds."""
    command = [sys.executable, "-P", "-m", "heredity.gate", "train-dictionary", "sae", args.work / "store"]
    command += [
        "--site",
        SITE,
        *(("--tokens", args.tokens) if args.tokens else ()),
        "--latents",
        args.latents,
        "--k",
        args.k,
        "--batch",
        args.batch,
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    log = Path(f"{out}.log")
    begun = time.perf_counter()
    with log.open("a") as file:
        process = subprocess.Popen([*map(str, command)], cwd=args.work, env=environment, stdout=file, stderr=file)
        killer = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
        killer.daemon = True
        killer.start()
        _, status, usage = os.wait4(process.pid, 0)
        killer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == expected, f"ended with {process.returncode}, see {log}"
    return time.perf_counter() - begun, 1024 * usage.ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
