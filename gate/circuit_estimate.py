"""How much memory and time a circuit will take, from configuration, tokenizer and task alone: no weight is read.

Time is counted in multiplications and divided by the speed of one matrix product on this machine; memory is the sum of
what is held at once. Both were fitted to measured runs (benchmarks/RESULTS.md) and are meant to be right within a
factor of two on one idle core.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heredity.interp.errors import HeredityError

SLOWNESS = 1.25
"""Time of a forward over that of its multiplications at the speed of large ones: norms, attention, hooks."""
STEPS = 12
"""Gradients a pair, of which 8 to 18 were needed."""
CIRCUITS = 55
"""Circuits that are run: two curves, the search for the size, the proof."""
LIBRARIES = 0.7e9
"""Bytes of the libraries themselves."""
LOADING = 18.0
"""Seconds to import the libraries."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: on one idle core.
        peak_bytes: of memory.
        sources, destinations, edges: of the graph.
        pairs: in both halves.
        tokens: of a prompt, on average, and how many of them are run (from the first that differs).
    """

    seconds: float
    peak_bytes: float
    parameters: int
    sources: int
    destinations: int
    edges: int
    pairs: int
    tokens: float
    tokens_run: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def in_words(self) -> str:
        """For a terminal."""
        minutes = self.seconds / 60
        return (
            f"about {minutes:.2g} minutes on one idle core, {self.peak_bytes / 1e9:.2g} GB of memory (each within a "
            f"factor of two)\n{self.parameters / 1e6:.4g} M parameters, {self.sources} sources, "
            f"{self.destinations} destinations, {self.edges} edges; {self.pairs} pairs of {self.tokens:.3g} tokens, of "
            f"which {self.tokens_run:.3g} are run"
        )


def estimate_circuit(model: str, task: str, pairs: int) -> Estimate:
    """What ``heredity circuit`` will take for ``model`` and ``task``.

    Raises:
        HeredityError: the model is not a directory (or an adapter on one), or its configuration lacks a size.
        ModelError, TaskError: the model or the task cannot be read.
    """
    from heredity.circuits import edge_patching, edges
    from heredity.circuits.discover import CONFIRMED_EDGES, CONFIRMED_NODES
    from heredity.circuits.layout import NodeLayout
    from heredity.circuits.tasks import load_task
    from heredity.interp.checkpoint import check_directory

    asked = load_task(task)
    directory = _directory(model)
    checkpoint = check_directory(directory)
    config = checkpoint.config
    layers = _size(config, directory, "num_hidden_layers", "n_layer")
    heads = _size(config, directory, "num_attention_heads", "n_head")
    width = _size(config, directory, "hidden_size", "n_embd")
    inner = int(config.get("intermediate_size") or config.get("n_inner") or 4 * width)
    vocabulary = _size(config, directory, "vocab_size")
    layout = NodeLayout(layers, heads, int(config.get("num_key_value_heads") or heads), width)
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    length, run = _tokens(asked, directory)
    half = pairs / 2

    sources, destinations = len(layout.sources), len(layout.destinations)
    embeddings = (1 if config.get("tie_word_embeddings", True) else 2) * vocabulary * width
    inside = max(parameters - embeddings, parameters // 10)
    forward = 2 * inside * SLOWNESS  # floating-point operations a token
    contraction = 2 * layout.n_edges * width
    circuit = forward + 4 * contraction  # read from memory rather than computed
    work = half * run * (STEPS * (3 * forward + contraction) + 6 * forward)
    work += half * run * CIRCUITS * circuit
    work += half * length * 6 * circuit  # means and zeros change the beginning too
    work += half * run * (CONFIRMED_EDGES + CONFIRMED_NODES) * forward
    seconds = LOADING + 4 * parameters / 4e8 + work / _speed(width)

    tokens = max(edges.GROUP_TOKENS, run)
    held = 3 * 4 * sources * tokens * width
    kept = min(edge_patching.KEPT_BYTES, 4 * sources * width * run * half)
    circuits = kept + 3 * 4 * sources * width * max(edge_patching.GROUP_TOKENS, length)
    passes = 4 * max(edges.PASS_TOKENS, run) * layers * (14 * width + 5 * inner)
    parts = min(edges.PER_PAIR_BYTES, 4 * sources * destinations * half)
    peak = LIBRARIES + 4 * parameters + 2 * parts + max(held + passes, circuits)
    return Estimate(
        seconds=round(seconds, 1),
        peak_bytes=round(peak),
        parameters=parameters,
        sources=sources,
        destinations=destinations,
        edges=layout.n_edges,
        pairs=2 * int(half),
        tokens=round(length, 2),
        tokens_run=round(run, 2),
    )


def _directory(model: str) -> Path:
    from heredity.interp.spec import parse_spec

    parsed = parse_spec(model, "parent")
    while parsed.kind == "adapter":
        parsed = parse_spec(parsed.base, "parent")
    if parsed.kind not in ("directory", "zoo"):
        raise HeredityError(
            f"an estimate needs config.json and the headers of the weights, which a {parsed.kind} model does not show",
            where=model,
            remedy="Give a directory in Hugging Face format, or run without --estimate.",
        )
    return Path(parsed.base)


def _size(config: dict[str, Any], directory: Path, *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and 0 < value < 10**9:
            return value
    raise HeredityError(
        f"no {' or '.join(names)}", where=str(directory / "config.json"), remedy="Run without --estimate."
    )


def _tokens(task: Any, directory: Path) -> tuple[float, float]:
    """Tokens of a clean prompt, and from the first that differs in the counterfactual one; means over some prompts."""
    from heredity.circuits.tasks.prepare import samples

    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except BaseException as fault:
        if isinstance(fault, KeyboardInterrupt | SystemExit):
            raise
        raise HeredityError(
            f"the tokenizer cannot be read ({type(fault).__name__})",
            where=str(directory / "tokenizer.json"),
            remedy="Save the model's own fast tokenizer beside the weights.",
        ) from None
    lengths, runs = [], []
    for example in samples(task, 16):
        clean, corrupt = (tokenizer.encode(text).ids for text in (example.clean, example.counterfactual))
        shared = next((i for i, (a, b) in enumerate(zip(clean, corrupt, strict=False)) if a != b), len(clean) - 1)
        lengths.append(len(clean))
        runs.append(max(1, len(clean) - shared))
    return sum(lengths) / len(lengths), sum(runs) / len(runs)


def _speed(width: int) -> float:
    """Floating-point operations a second of one core in a matrix product such as a forward makes.

    In seconds of the processor, which other processes do not lengthen.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.ones(256, width), torch.ones(width, 4 * width)
    torch.mm(a, b)
    started = time.process_time()
    for _ in range(20):
        torch.mm(a, b)
    taken = time.process_time() - started
    torch.set_num_threads(threads)
    return 20 * 2 * 256 * width * 4 * width / max(taken, 1e-6)
