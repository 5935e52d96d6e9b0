"""A model that keeps what it answered in a folder, so that the next comparison with it need not compute it again.

Kept is the last residual (the site ``final``), not the logits: it is d_vocab / d_model times smaller, and the last norm
and the unembedding, which are run again, are a small part of a forward. Logits are made from it whether it was computed
or read back, by the same operations on the same shapes, so an answer does not depend on what was kept.

A file is named by everything its content depends on: the model's digest, the releases of the libraries, the number of
threads and the processor's instructions (sums are taken in other orders with others), the tokens and their shape. It
begins with its own digest and appears whole or not at all; one that is damaged is computed again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import OutputError
from .model import Edit, Model, repeated
from .readout import unembed

CODE = 1
"""Raised whenever a change of the code changes what is kept."""

MOST_BYTES = 2**32
"""Bytes a folder may hold; beyond, what was read longest ago is deleted."""

_PROBED = 16
_LIBRARIES = ("heredity", "torch", "transformers", "transformer-lens", "numpy")


class Remembered(Model):
    """``model``, which asks ``folder`` before it computes: plain forwards, captures and forced words; no gradients.

    Args:
        model: the model; it shares its weights with this one.
        folder: may be shared by models and by processes; None keeps nothing.
        most_bytes: of all that lies in ``folder``.

    Raises:
        OutputError: ``folder`` cannot be made.
    """

    def __init__(self, model: Model, folder: Path | None, *, most_bytes: int = MOST_BYTES) -> None:
        self.__dict__.update(model.__dict__)
        self.folder, self.most_bytes = folder, most_bytes
        self._known = _reads_from_residual(model)
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    error.strerror or "cannot be made",
                    where=str(folder),
                    remedy="Name a directory that can be written.",
                ) from None

    def logits(
        self,
        tokens: Tensor,
        *,
        edits: Mapping[str, Edit] | None = None,
        past: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Model.logits`."""
        if edits or past is not None or positions is not None or torch.is_grad_enabled() or not self._known:
            return super().logits(tokens, edits=edits, past=past, positions=positions)
        return unembed(self, self.capture(tokens, ["final"])["final"])

    def capture(
        self, tokens: Tensor, sites: Sequence[str], *, edits: Mapping[str, Edit] | None = None, past: Any = None
    ) -> dict[str, Tensor]:
        """As :meth:`Model.capture`."""
        if edits or past is not None or torch.is_grad_enabled():
            return super().capture(tokens, sites, edits=edits, past=past)
        names = sorted(set(sites))
        compute = super().capture
        found = self._recall(["capture", *names], [tokens], lambda: compute(tokens, names))
        return {name: found[name] for name in sites}

    def forced(self, start: Tensor, words: Tensor, *, batch: int) -> Iterator[Tensor]:
        """As :meth:`Model.forced`."""
        if torch.is_grad_enabled() or not self._known:
            yield from super().forced(start, words, batch=batch)
            return
        pasts: list[Any] = []

        def compute(chunk: Tensor) -> dict[str, Tensor]:
            if not pasts:
                pasts.append(self.step(start[None])[1])
            return Model.capture(self, chunk[:, None], ["final"], past=repeated(pasts[0], len(chunk)))

        for chunk in words.split(batch):
            found = self._recall(["forced"], [start, chunk], lambda chunk=chunk: compute(chunk))
            yield unembed(self, found["final"])[:, -1]

    def _recall(
        self, asked: list[str], tokens: Sequence[Tensor], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if self.folder is None:
            return compute()
        path = self.folder / self._key(asked, tokens)
        kept = _read(path)
        if kept is None:
            kept = {name: value.contiguous() for name, value in compute().items()}
            self._keep(path, kept)
        return kept

    def _key(self, asked: list[str], tokens: Sequence[Tensor]) -> str:
        terms = [
            CODE,
            [version(name) for name in _LIBRARIES],
            self.digest,
            torch.get_num_threads(),
            torch.backends.cpu.get_cpu_capability(),
            asked,
            [value.tolist() for value in tokens],
        ]
        return hashlib.sha256(json.dumps(terms).encode()).hexdigest()

    def _keep(self, path: Path, values: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        content = save(values)
        if len(content) > self.most_bytes:
            return
        # A folder that is full or has become unwritable costs time on the next run, nothing else.
        with suppress(OSError):
            self._make_room(len(content))
            # Under a name of its own, since another process may be keeping the same.
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise

    def _make_room(self, size: int) -> None:
        assert self.folder is not None
        held = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process made room too
                if path.is_file() and _ours(path.name):
                    status = path.stat()
                    held.append((status.st_mtime_ns, status.st_size, path))
        held.sort()
        spare = self.most_bytes - size - sum(size for _, size, _ in held)
        for _, freed, path in held:
            if spare >= 0:
                break
            with suppress(OSError):
                path.unlink()
            spare += freed


def _reads_from_residual(model: Model) -> bool:
    """Whether logits made from the last residual are the model's own (not so where an architecture does more there)."""
    tokens = torch.arange(min(_PROBED, model.shape.n_ctx))[None] % model.shape.d_vocab
    with torch.inference_mode():
        return torch.equal(model.logits(tokens), unembed(model, model.capture(tokens, ["final"])["final"]))


def _read(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        found = load(data[32:])
    except (OSError, SafetensorError):
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _ours(name: str) -> bool:
    """Whether a file is one that we made, whole or cut off: a folder may hold files of the user's own."""
    return name.endswith(".tmp") or (len(name) == 64 and set(name) <= set("0123456789abcdef"))
