"""Null successors by benign training: the parent trained on, on ordinary text, as large a change as the real one.

A shuffled change (:mod:`.null`) is meaningless; a few steps of training on text mean something, only nothing new. The
change is of low rank in every linear map (LoRA, Hu et al. 2106.09685, on all of them), so that a draw of a large model
takes little room and its optimiser little memory; it is then scaled, towards the parent where training moved it more
than the real successor moved, until the sizes agree as in :mod:`.null`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heredity.interp.model import Model, pad

from .linear import Factors, edited_weights, linear_maps
from .null import NullSuccessors
from .weights import parameters

CLIP = 1.0
"""Largest norm of the gradient of one step."""


@dataclass(frozen=True)
class Recipe:
    """How one benign successor is trained (AdamW on the mean next-token loss)."""

    steps: int
    batch: int
    """Texts a step."""
    rate: float
    rank: int

    def __str__(self) -> str:
        return (
            f"{self.steps} AdamW steps on {self.batch} texts each, rate {self.rate:g}, change of rank {self.rank} in "
            "every linear map"
        )


Keep = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Recalls the arrays of a name, or computes and keeps them."""


class BenignSuccessors(NullSuccessors):
    """Benign successors of ``parent``, made one at a time in the weights of ``body`` (same parameters as the parent).

    Args:
        parent: the parent.
        body: a model whose weights may be lent; they come back after each use.
        texts: token ids of the texts to train on.
        recipe: of the training.
        keep: keeps what was trained, so that it is trained once.
    """

    def __init__(self, parent: Model, body: Model, texts: Sequence[Sequence[int]], recipe: Recipe, keep: Keep) -> None:
        super().__init__(parent, body)
        self.texts, self.recipe, self.keep = texts, recipe, keep
        self._maps = linear_maps(body)

    @contextmanager
    def draw(self, seed: int, scale: float) -> Iterator[Model]:
        """Benign successor number ``seed`` with its change multiplied by ``scale``."""
        held = self.keep(f"benign-{seed}", lambda: self._train(seed))
        changes = {name: (held[f"l/{name}"] * scale, held[f"r/{name}"]) for name in self._maps}
        with self._as_parent(), edited_weights(self.body, self._maps, changes):
            yield self.body

    def _train(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        factors: dict[str, Factors] = {}
        own = parameters(self.body)
        for name, module in self._maps.items():
            out, width = own[name].shape[:: 1 if not _is_transposed(module) else -1]
            read = torch.randn(width, self.recipe.rank, generator=generator) / width**0.5
            factors[name] = (torch.zeros(out, self.recipe.rank, requires_grad=True), read.requires_grad_())
        wanted = [value for pair in factors.values() for value in pair]
        optimiser = torch.optim.AdamW(wanted, lr=self.recipe.rate, weight_decay=0.0)
        with self._as_parent(), _added(self._maps, factors), torch.enable_grad():
            for step in range(self.recipe.steps):
                for group in optimiser.param_groups:
                    group["lr"] = self.recipe.rate * (1 - step / self.recipe.steps)
                drawn = torch.randint(len(self.texts), (self.recipe.batch,), generator=generator).tolist()
                loss = _loss(self.body, [self.texts[i] for i in drawn])
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(wanted, CLIP)
                optimiser.step()
        return {f"{side}/{n}": pair[k].detach() for n, pair in factors.items() for k, side in enumerate("lr")}

    @contextmanager
    def _as_parent(self) -> Iterator[None]:
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for p, s in self._parameters():
                    if not torch.equal(p, s):
                        saved.append((s, s.clone()))
                        s.copy_(p)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in reversed(saved):
                    parameter.copy_(value)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _loss(model: Model, rows: Sequence[Sequence[int]]) -> Tensor:
    tokens, mask = pad(rows)
    log_p = torch.log_softmax(model.logits(tokens).float(), -1)
    return -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][mask[:, 1:]].mean()


@contextmanager
def _added(modules: dict[str, nn.Module], factors: dict[str, Factors]) -> Iterator[None]:
    """left·rightᵀ·x added to what every module returns."""

    def adding(name: str) -> Any:
        left, right = factors[name]

        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + given[0] @ right @ left.T

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(adding(name)).remove)
        yield
