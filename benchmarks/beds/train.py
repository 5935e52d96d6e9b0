"""Transformers trained to compute a program in the parts it names, and in no others (strict interchange).

    python benchmarks/beds/train.py [NAME …] [--steps 4000]

The recipe of InterpBench (Gupta et al. 2407.14494), from its description. Three losses, weighted 1, 1 and 0.4:

* behaviour: the program's output on a prompt;
* interchange: with one variable's part taken from another prompt, the output that the program has with that variable
  taken from there;
* strictness: with a part of no variable taken from another prompt, the output as it was.

Writes ``siit-NAME.safetensors`` beside this file; accuracies on fresh prompts are in its header: of the behaviour, of
every variable's interchange, and of every other part's.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from model import BedConfig as Config
from model import Transformer, bed, save
from programs import PROGRAMS, Program
from torch import Tensor, nn

HEADS, BATCH = 4, 128
WEIGHTS = 1.0, 1.0, 0.4


def parts_of(program: Program) -> list[str]:
    layers = range(program.n_layers)
    return [part for i in layers for part in (*(f"attn_head@{i}.{h}" for h in range(HEADS)), f"mlp_out@{i}")]


class Exchange:
    """Forwards in which rows have one part each taken from another forward."""

    def __init__(self, inner: Transformer) -> None:
        self.inner = inner
        self.kept: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] | None = None
        for layer in range(len(inner.blocks)):
            inner.hook_dict[f"blocks.{layer}.attn.o.hook_in"].add_hook(self._heads(layer))
            inner.hook_dict[f"blocks.{layer}.mlp.hook_out"].add_hook(self._mlp(layer))

    def source(self, tokens: Tensor) -> None:
        """Keep what every part writes on ``tokens``."""
        self.masks = None
        self.inner(tokens)

    def exchanged(self, tokens: Tensor, parts: list[str | None]) -> Tensor:
        """Logits with row i's ``parts[i]`` taken from row i of the source."""
        self.masks = {part: torch.tensor([p == part for p in parts]) for part in set(parts) - {None}}  # type: ignore
        return self.inner(tokens).logits

    def _heads(self, layer: int) -> Any:
        def hook(z: Tensor, hook: Any) -> Tensor:
            name = f"attn@{layer}"
            if self.masks is None:
                self.kept[name] = z
                return z
            for part, mask in self.masks.items():
                if part.startswith(f"attn_head@{layer}."):
                    chosen = torch.zeros(z.shape[2], dtype=torch.bool)
                    chosen[int(part.rpartition(".")[2])] = True
                    z = torch.where(mask[:, None, None, None] & chosen[:, None], self.kept[name], z)
            return z

        return hook

    def _mlp(self, layer: int) -> Any:
        def hook(out: Tensor, hook: Any) -> Tensor:
            name = f"mlp_out@{layer}"
            if self.masks is None:
                self.kept[name] = out
                return out
            mask = self.masks.get(name)
            return out if mask is None else torch.where(mask[:, None, None], self.kept[name], out)

        return hook


def labels(program: Program, base: Tensor, source: Tensor, variable: str | None) -> Tensor:
    """The program's output [batch, scored] on ``base``, a variable taken from ``source``."""
    instead = {} if variable is None else {variable: program.run(source)[variable]}
    return program.run(base, instead)[program.output][:, list(program.scored)]


def train(program: Program, steps: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(seed)
    config = Config(
        program.n_layers, HEADS, 32, 8, 64, program.d_vocab, program.d_out, program.length,
        norm=program.norm, activation="gelu",
    )  # fmt: skip
    model = bed(config, seed=seed, scale=0.15)
    inner: Any = model.bridge.requires_grad_(True)
    exchange = Exchange(inner)
    optimiser = torch.optim.Adam(inner.parameters(), lr=2e-3, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1.0, 2.0 * (1 - i / steps)))
    generator = torch.Generator().manual_seed(seed)
    by_part = {variable.part: name for name, variable in program.variables.items()}
    others = [part for part in parts_of(program) if part not in by_part]
    loss_of, started, about = nn.CrossEntropyLoss(), time.time(), {}
    for step in range(steps):
        base, source = program.draw(BATCH, generator), program.draw(BATCH, generator)
        inside = list(by_part)[int(torch.randint(len(by_part), (), generator=generator))]
        drawn = torch.randint(len(others), (BATCH,), generator=generator).tolist()
        exchange.source(torch.cat([source, source, source]))
        parts = [*[None] * BATCH, *[inside] * BATCH, *(others[i] for i in drawn)]
        logits = exchange.exchanged(torch.cat([base, base, base]), parts)[:, list(program.scored)]
        plain = labels(program, base, source, None)
        wanted = plain, labels(program, base, source, by_part[inside]), plain
        loss = sum(
            weight * loss_of(part.flatten(0, 1), target.flatten())
            for weight, part, target in zip(WEIGHTS, logits.split(BATCH), wanted, strict=True)
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            about = check(program, exchange, torch.Generator().manual_seed(seed + 1))
            about |= {"steps": step + 1, "seconds": round(time.time() - started, 1)}
            print(program.name, f"{float(loss.detach()):.4f}", about, flush=True)
            if min(about["behaviour"], *about["interchange"].values(), *about["strict"].values()) >= 0.999:
                break
    inner.requires_grad_(False)
    for point in inner.hook_dict.values():
        point.remove_hooks()
    return model, about


@torch.no_grad()
def check(program: Program, exchange: Exchange, generator: torch.Generator, n: int = 1000) -> dict[str, Any]:
    """Accuracies on fresh prompts, all scored positions counted."""
    base, source = program.draw(n, generator), program.draw(n, generator)
    exchange.source(source)

    def accuracy(part: str | None, variable: str | None) -> float:
        logits = exchange.exchanged(base, [part] * n)[:, list(program.scored)]
        return round(float((logits.argmax(-1) == labels(program, base, source, variable)).float().mean()), 4)

    by_part = {variable.part: name for name, variable in program.variables.items()}
    return {
        "behaviour": accuracy(None, None),
        "interchange": {name: accuracy(part, name) for part, name in by_part.items()},
        "strict": {part: accuracy(part, None) for part in parts_of(program) if part not in by_part},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROGRAMS)}; all without")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names or PROGRAMS:
        model, about = train(PROGRAMS[name], arguments.steps)
        save(model, Path(__file__).parent / f"siit-{name}.safetensors", about)


if __name__ == "__main__":
    main()
