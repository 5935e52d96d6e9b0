"""Training a dictionary: seeded, bounded in memory, resumable to the same bytes.

    source = Stores((open_store("store/"),), (Port("resid_post@8"),))
    dictionary = train(Recipe(kind="sae", latents=16384, k=32), source, out="dictionary/").dictionary

With ``out``, that directory gets ``checkpoint.safetensors`` while it runs, ``history.jsonl``, and at the end the
dictionary in the format of :mod:`..formats.own`; the same call on an interrupted one goes on where it was.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import OutputError, TrainingError
from ..record import Dictionary
from . import checkpoint, history
from .checkpoint import State
from .finished import fold
from .history import Row
from .recipe import Recipe, check
from .sources import Source
from .step import Outcome, Settings, gradients
from .streams import Streams, Units, estimate, joined, places, streams
from .weights import Layout, begin, confine, empty, settle

CODE = 2
"""To be raised whenever the same recipe on the same source ends in other bytes."""
ESTIMATED = 16
"""Batches that units are estimated from."""
MEMORY = 0.9
"""Of the running mean of the smallest score kept, per step: it drifts more than it scatters."""
LOOKS = 100
"""Rows of the history."""
PROBES = 4
"""How often the loss recovered is measured."""

Probe = Callable[[Dictionary], float | None]
Progress = Callable[[int, int, Row], None]


@dataclass(frozen=True)
class Trained:
    """A dictionary and how it was reached."""

    dictionary: Dictionary
    history: tuple[Row, ...]


def train(
    recipe: Recipe,
    source: Source,
    *,
    out: str | Path | None = None,
    probe: Probe | None = None,
    progress: Progress | None = None,
    every: float = 60.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Trained:
    """The dictionary of ``recipe`` on ``source``.

    Args:
        recipe: what to train and how.
        source: activations.
        out: where to keep checkpoints, the history and the dictionary; None keeps nothing.
        probe: share of a model's loss that a dictionary recovers, measured a few times and at the end.
        progress: called with steps done, steps in all and the latest row.
        every: seconds between checkpoints.
        dtype: of the weights.
        device: where they are.

    Raises:
        TrainingError: the recipe does not fit the source; ``out`` holds another training.
        OutputError: ``out`` holds something else, or cannot be written.
    """
    check(recipe, source.widths, source.n_tokens)
    run = _Run(recipe, source, torch.empty(0, dtype=dtype, device=device))
    directory = None if out is None else Path(out)
    if directory is not None:
        done = _found(directory, run.identity)
        if done is not None:
            return done
    state, batches, rows = run.start(directory)
    begun = saved = time.monotonic()
    while state.step < run.steps:
        seen = run.advance(state, next(batches))
        if state.step % max(1, run.steps // LOOKS) == 0 or state.step == run.steps:
            row = run.look(state, seen, probe, time.monotonic() - begun)
            rows.append(row)
            if directory is not None:
                history.append(directory, row)
            if progress is not None:
                progress(state.step, run.steps, row)
        if directory is not None and state.step < run.steps and time.monotonic() - saved >= every:
            checkpoint.write(state, run.identity, directory)
            saved = time.monotonic()
    dictionary = run.dictionary(state)
    if directory is not None:
        from ..formats import save_dictionary

        save_dictionary(dictionary, directory)
        (directory / checkpoint.FILE).unlink(missing_ok=True)
    return Trained(dictionary, tuple(rows))


@dataclass(frozen=True)
class _Seen:
    """What a step worked on and with, and the share of tokens it left out."""

    batch: Streams
    outcome: Outcome
    settings: Settings
    massive: float


class _Run:
    """One training: what stays the same, and the steps as functions of a state."""

    def __init__(self, recipe: Recipe, source: Source, like: Tensor) -> None:
        self.recipe, self.source, self.like = recipe, source, like
        self.reads, self.writes = places(recipe.kind, source.widths)
        self.layout = Layout.of(recipe, self.writes)
        self.steps = recipe.steps(source.n_tokens)
        self.window = recipe.window(source.n_tokens)
        self.identity: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "source": source.digest,
            "dtype": str(like.dtype).removeprefix("torch."),
            "code": CODE,
        }

    def start(self, directory: Path | None) -> tuple[State, Iterator[tuple[Tensor, ...]], list[Row]]:
        """The state to go on from, the batches from there on, and the rows so far."""
        n = self.recipe.latents
        weights = empty(self.recipe, sum(self.reads), sum(self.writes), self.like)
        adam = torch.optim.Adam(list(weights.named().values()), lr=self.recipe.rate, fused=True)
        zeros = [torch.zeros(sum(w), dtype=self.like.dtype, device=self.like.device) for w in (self.reads, self.writes)]
        ones = [torch.ones(len(w), dtype=self.like.dtype, device=self.like.device) for w in (self.reads, self.writes)]
        units = Units(self.reads, self.writes, *zeros, *ones)
        quiet = torch.zeros(n, dtype=torch.int64, device=self.like.device)
        state = State(0, weights, adam, units, quiet, torch.zeros(2, dtype=torch.float64))
        rows: list[Row] = []
        if directory is not None and (directory / checkpoint.FILE).is_file():
            checkpoint.read(state, self.identity, directory)
            if (directory / history.FILE).is_file():
                rows = [row for row in history.read_history(directory) if row.step <= state.step]
            history.rewrite(directory, rows)
            return state, self.batches(state.step), rows
        if directory is not None:
            history.rewrite(directory, rows)
        batches = self.batches(0)
        count = max(ESTIMATED, -(-self.recipe.latents // self.recipe.batch))
        first = list(islice(batches, min(count, self.steps)))
        seen = [self.prepare(batch) for batch in first]
        state.units = estimate(self.recipe.kind, self.source.widths, seen)
        k = self.settings(0).k
        begin(self.recipe, self.layout, weights, state.units.apply(joined(seen)), state.units.apply(seen[0]), k)
        return state, chain(first, batches), rows

    def batches(self, skip: int) -> Iterator[tuple[Tensor, ...]]:
        """The source's, after ``skip`` of them."""
        return self.source.batches(batch=self.recipe.batch, seed=self.recipe.seed, skip=skip)

    def prepare(self, batch: tuple[Tensor, ...]) -> Streams:
        """What is read and written, on the device, in the source's units."""
        moved = [x.to(self.like.device, self.like.dtype) for x in batch]
        return streams(self.recipe.kind, moved, massive=self.recipe.massive)

    def settings(self, step: int) -> Settings:
        """What holds in the step after ``step`` others."""
        r = self.recipe
        through = min(1.0, (step + 1) / (r.anneal * self.steps)) if r.anneal else 1.0
        k = round(r.k * (r.k_start + (1 - r.k_start) * through))
        return Settings(r.activation, max(1, min(k, r.latents)), r.aux, r.aux_k)

    def rate_at(self, step: int) -> float:
        """Adam's rate in the step after ``step`` others."""
        r = self.recipe
        up = min(1.0, (step + 1) / (r.warm * self.steps)) if r.warm else 1.0
        down = min(1.0, (self.steps - step) / (r.decay * self.steps)) if r.decay else 1.0
        return r.rate * up * down

    def advance(self, state: State, batch: tuple[Tensor, ...]) -> "_Seen":
        """One step."""
        taken = state.units.apply(self.prepare(batch))
        rows = len(taken.x)
        settings = self.settings(state.step)
        dead = (state.quiet >= self.window).nonzero()[:, 0]
        outcome = gradients(state.weights, self.layout, taken, dead, settings)
        confine(self.layout, state.weights)
        for group in state.adam.param_groups:
            group["lr"] = self.rate_at(state.step)
        state.adam.step()
        settle(self.layout, list(self._confined(state)), state.weights.W_dec)
        state.quiet += rows
        state.quiet[outcome.features.indices.long()] = 0
        state.step += 1
        if settings.k == self.recipe.k:
            state.threshold *= MEMORY
            state.threshold += (1 - MEMORY) * torch.tensor([outcome.lowest, 1.0], dtype=torch.float64)
        return _Seen(taken, outcome, settings, 1 - rows / len(batch[0]))

    def _confined(self, state: State) -> Iterator[Tensor]:
        for value in (state.weights.W_enc, state.weights.W_dec):
            yield value
            yield state.adam.state[value]["exp_avg"]
            yield state.adam.state[value]["exp_avg_sq"]

    def threshold(self, state: State) -> float | None:
        """BatchTopK's at inference, as far as it is known."""
        total, weight = state.threshold.tolist()
        return total / weight if weight and self.recipe.activation == "batchtopk" else None

    def look(self, state: State, seen: _Seen, probe: Probe | None, seconds: float) -> Row:
        """The step just done, for the history."""
        outcome, n = seen.outcome, len(seen.batch.y)
        fve = []
        for columns in self.layout.columns:
            y, error = seen.batch.y[:, columns].double(), outcome.error[:, columns].double()
            variance = float((y - y.mean(0)).square().sum()) if n else 0.0
            fve.append(1 - float(error.square().sum()) / variance if variance else None)
        due = state.step == self.steps or state.step % max(1, self.steps // PROBES) == 0
        known = state.threshold[1] > 0 or self.recipe.activation == "jumprelu"
        return Row(
            step=state.step,
            tokens=state.step * self.recipe.batch,
            loss=outcome.loss,
            fve=tuple(fve),
            l0=outcome.features.mean_active,
            dead=float((state.quiet >= self.window).double().mean()),
            left=outcome.aux,
            k=seen.settings.k,
            rate=self.rate_at(state.step - 1),
            threshold=self.threshold(state),
            massive=seen.massive,
            recovered=probe(self.dictionary(state)) if probe and due and known else None,
            seconds=seconds,
        )

    def dictionary(self, state: State) -> Dictionary:
        """The dictionary as it stands."""
        provenance = {"training": self.identity, "step": state.step, "steps": self.steps}
        threshold = self.threshold(state) or 0.0
        ports = self.source.ports
        return fold(self.recipe, self.layout, state.weights, state.units, threshold, ports, provenance)


def _found(directory: Path, identity: dict[str, Any]) -> Trained | None:
    """What this training left when it was finished, None if it was not; ``directory`` exists afterwards."""
    from ..formats import own

    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()}
    except OSError as fault:
        what = f"cannot be used ({fault.strerror or fault})"
        raise OutputError(what, where=str(directory), remedy="Name a directory that can be written.") from None
    if own.MANIFEST in names:
        dictionary = own.read(directory)
        known = dictionary.provenance.get("training")
        if not isinstance(dictionary, Dictionary) or known != identity:
            what = checkpoint.difference(json.dumps(known), identity)
            raise TrainingError(what, where=str(directory), remedy="Name a new directory.")
        (directory / checkpoint.FILE).unlink(missing_ok=True)
        rows = history.read_history(directory) if history.FILE in names else []
        return Trained(dictionary, tuple(rows))
    foreign = {name for name in names if not name.startswith(_OURS)}
    if foreign:
        what = f"holds {min(foreign)!r}, which is of no training"
        raise OutputError(what, where=str(directory), remedy="Name a new or empty directory.")
    return None


_OURS = (checkpoint.FILE, history.FILE, "dictionary.", "run.log")
