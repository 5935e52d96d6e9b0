"""Tokens per second with one site captured: ours beside the bare forward, TransformerLens and nnsight, in one run.

    python benchmarks/capture.py MODEL_DIRECTORY [--nnsight-python PATH] [--record benchmarks/RESULTS.md]

Every contestant reads the same random tokens of the same weights with the same number of threads. Before anything is
timed, what each one captured is compared with the output of that layer in the bare model. Contestants then take turns,
in an order that rotates from round to round, so that a busy moment of the machine falls on all of them; the ratio to
the bare forward is the median over rounds of the ratio within a round. nnsight runs in its own interpreter, where it
is timed by itself. The exit status is 1 where our capture falls below ``--require`` of the bare forward; it stops
after the site, so one row also shows the whole forward with the site captured on the way.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Run = Callable[[], float]
"""One forward; its seconds."""


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.worker:
        return serve_nnsight(args)
    from transformers import AutoModelForCausalLM

    from heredity.interp.load import load

    bare = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, local_files_only=True).eval()
    ours = load(str(args.model))
    tokens = torch.randint(0, ours.shape.d_vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    middle, last = ours.shape.n_layers // 2, ours.shape.n_layers - 1
    truth = outputs(bare, tokens, (middle, last))
    site = {layer: f"resid_post@{layer}" for layer in (middle, last)}
    hook = {layer: ours.site(site[layer]).hook for layer in (middle, last)}

    def peer(layer: int, **options: Any) -> Tensor:
        return ours.bridge.run_with_cache(tokens, names_filter=hook[layer], **options)[1][hook[layer]]

    captures: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "ours, resid_post of the middle layer": (middle, lambda: ours.capture(tokens, [site[middle]])[site[middle]]),
        "ours, resid_post of the last layer": (last, lambda: ours.capture(tokens, [site[last]])[site[last]]),
        "whole forward of ours, middle layer": (
            middle,
            lambda: ours.logits_and_capture(tokens, [site[middle]])[1][site[middle]],
        ),
        "TransformerLens run_with_cache, middle layer": (middle, lambda: peer(middle)),
        "TransformerLens run_with_cache, stopped after it": (middle, lambda: peer(middle, stop_at_layer=middle + 1)),
    }
    for name, (layer, captured) in captures.items():
        with torch.inference_mode():
            check(name, captured(), truth[layer])
    runs: dict[str, Run] = {"bare transformers forward": timed(lambda: bare(tokens, use_cache=False).logits)}
    runs |= {name: timed(captured) for name, (_, captured) in captures.items()}
    with nnsight(args, tokens, middle, truth[middle]) as more:
        seconds = take_turns(runs | more, args.rounds)
    table = report(args, ours.shape, ours.n_params, seconds, tokens.numel(), bool(more))
    print(table)
    if args.record:
        new = not args.record.exists()
        with args.record.open("a", encoding="utf-8") as file:
            file.write(("# Measurements\n" if new else "") + "\n" + table)
    slow = [name for name in seconds if name.startswith("ours, ") and ratio(seconds, name) < args.require]
    for name in slow:
        print(f"below {args.require} of the bare forward: {name}", file=sys.stderr)
    return 1 if slow else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--require", type=float, default=0.95)
    parser.add_argument("--nnsight-python", type=Path, help="interpreter of an environment with nnsight")
    parser.add_argument("--record", type=Path, help="Markdown file the table is appended to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- measuring ---


def outputs(model: Any, tokens: Tensor, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """What transformers itself says the residual stream is after each of ``layers``."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({layer: output[0] if type(output) is tuple else output})

    handles = [model.base_model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    with torch.inference_mode():
        hidden = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    # The last of hidden_states comes after the final norm; the others are the layers' own outputs.
    for layer in layers[:-1]:
        check("hidden_states", hidden[layer + 1], found[layer])
    return found


def check(name: str, captured: Tensor, truth: Tensor) -> None:
    """Stops the run where a contestant did not capture what the bare model computed."""
    torch.testing.assert_close(captured, truth, rtol=1e-3, atol=1e-3, msg=lambda fault: f"{name}: {fault}")


def timed(run: Callable[[], Tensor]) -> Run:
    def once() -> float:
        with torch.inference_mode():
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun

    return once


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(runs[name]())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Speed relative to the bare forward, the median over rounds."""
    bare = next(iter(seconds.values()))
    return statistics.median(b / s for b, s in zip(bare, seconds[name], strict=True))


def report(
    args: argparse.Namespace, shape: Any, n_params: int, seconds: dict[str, list[float]], n: int, with_nnsight: bool
) -> str:
    packages = ("heredity", "torch", "transformers", "transformer-lens")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    lines = [
        f"## Capture, {date.today().isoformat()}",
        "",
        f"{shape.architecture}, {n_params / 1e6:.0f}M parameters, {shape.n_layers} layers, float32; "
        f"{args.batch} × {args.length} tokens; {args.rounds} rounds. {processor()}, {args.threads} threads. "
        f"Python {platform.python_version()}, {versions}.",
        "",
        "| contestant | tokens/s (median) | quartiles | ratio to bare |",
        "|---|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([n / t for t in times], n=4)
        lines.append(f"| {name} | {middle:.0f} | {low:.0f}–{high:.0f} | {ratio(seconds, name):.3f} |")
    if not with_nnsight:
        lines.append("| nnsight | not measured | | |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- nnsight ---


@contextmanager
def nnsight(args: argparse.Namespace, tokens: Tensor, layer: int, truth: Tensor) -> Iterator[dict[str, Run]]:
    """nnsight's contestants, run by a process of their own; none without an interpreter that has it."""
    if args.nnsight_python is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "exchange.safetensors"
        save_file({"tokens": tokens}, exchange)
        options = {"threads": args.threads, "layer": layer, "exchange": exchange}
        command = [args.nnsight_python, __file__, args.model, "--worker"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            ask, answer = process.stdin, process.stdout
            line = answer.readline()
            if not line:
                raise SystemExit("the nnsight process ended early; its message is above")
            ready = json.loads(line)
            for name, captured in load_file(exchange).items():
                check(f"nnsight, {name}", captured, truth)

            def run(name: str) -> float:
                ask.write(name + "\n")
                ask.flush()
                return float(answer.readline())

            label = f"nnsight {ready['nnsight']} (torch {ready['torch']})"
            yield {
                f"{label}, middle layer": lambda: run("whole"),
                f"{label}, stopped after it": lambda: run("stopped"),
            }
            ask.close()


def serve_nnsight(args: argparse.Namespace) -> int:
    """The other side: captures once for the check, then runs and times what standard input names, line by line."""
    from nnsight import LanguageModel

    model = LanguageModel(str(args.model), device_map="cpu", dispatch=True, dtype=torch.float32)
    tokens = load_file(args.exchange)["tokens"]

    def whole() -> Tensor:
        with model.trace(tokens, use_cache=False):
            captured = model.model.layers[args.layer].output.save()
        return captured

    def stopped() -> Tensor:
        with model.trace(tokens, use_cache=False) as tracer:
            captured = model.model.layers[args.layer].output.save()
            tracer.stop()
        return captured

    runs = {"whole": whole, "stopped": stopped}
    with torch.inference_mode():
        save_file({name: run().clone().contiguous() for name, run in runs.items()}, args.exchange)
    print(json.dumps({"nnsight": version("nnsight"), "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        print(timed(runs[line.strip()])(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
