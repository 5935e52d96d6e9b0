"""The other side of ``dictionaries.py``: one trainer in its own interpreter, fed the same batches as all others.

    python -P train_worker.py FILE VARIANT DATA OUT --latents 4096 --k 32 --batch 1024 --steps 384 --threads 2

FILE has ``VARIANTS``: name → function of a :class:`Job` that trains as the package's users do and returns what it
learned, and ``imports()``, which is called before memory is measured. OUT gets ``learned.safetensors`` and
``result.json``.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Not onto the path of a package that would look for a module called like one of these files.
sys.path.append(str(Path(__file__).parent))

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from worker import peak


@dataclass
class Job:
    """What to train on what.

    Attributes:
        data: float32 rows of ``width`` values, in the order in which everyone sees them.
        clock: what seconds are measured with.
        seconds: of each step of the latest pass: from when a batch was handed out until the next was asked for, so
            that reading batches is no part of it.
    """

    data: Path
    width: int
    latents: int
    k: int
    batch: int
    steps: int
    seed: int
    out: Path
    clock: Callable[[], float] = time.perf_counter
    seconds: list[float] = field(default_factory=list)

    @property
    def window(self) -> int:
        """Tokens after which a latent that was never active counts as dead, for trainers that want to be told."""
        return max(1, self.steps // 10) * self.batch

    def batches(self) -> Iterator[Tensor]:
        """One pass in order. Rows are read into memory of their own: a mapped file would count as the trainer's."""
        self.seconds = []
        size = self.batch * self.width
        for step in range(self.steps):
            rows = np.fromfile(self.data, np.float32, size, offset=4 * step * size).reshape(self.batch, self.width)
            begun = self.clock()
            yield torch.from_numpy(rows)
            self.seconds.append(self.clock() - begun)


@dataclass(frozen=True)
class Learned:
    """A dictionary as it is used for inference, acting on activations as they are in the file.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: [D, F], [F], [F, D], [D].
        threshold: latents above it are active ([] or [F]); None where the k largest above zero are.
        norm: [F], what activations are multiplied by before they are compared; ones if None.
        settings: for the table, what was set and to what.
        infer: activations to their reconstruction as the package itself does it, for the check of all of the above.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    settings: str
    infer: Callable[[Tensor], Tensor]
    norm: Tensor | None = None


Train = Callable[[Job], Learned]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("variant")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for name in ("width", "latents", "k", "batch", "steps", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contestant = importlib.import_module(args.file)
    contestant.imports()
    sizes = {name: getattr(args, name) for name in ("width", "latents", "k", "batch", "steps", "seed")}
    # With one thread the processor's time is the step's, also where other jobs have the processor in between.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    job = Job(data=args.data, out=args.out, clock=clock, **sizes)
    train: Train = contestant.VARIANTS[args.variant]
    with peak() as taken:
        begun = time.perf_counter()
        learned = train(job)
        whole = time.perf_counter() - begun
    said = {"seconds": job.seconds, "whole": whole, "peak": taken[0], "settings": learned.settings}
    arrays = {name: value for name, value in vars(learned).items() if isinstance(value, Tensor)}
    with torch.no_grad():
        arrays["reconstruction"] = learned.infer(next(job.batches()))
    save_file({name: value.detach().float().contiguous() for name, value in arrays.items()}, args.out / "learned.tmp")
    (args.out / "learned.tmp").replace(args.out / "learned.safetensors")
    (args.out / "result.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
