"""A loaded model with changed weights, written as a Hugging Face directory of its own."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError, OutputError
from .load import _quiet, bare
from .spec import Role

if TYPE_CHECKING:
    from torch import Tensor

    from .model import Model

AGREEMENT = 1e-3
"""Largest difference of log-probabilities, nats, between what was written and the model in memory."""

_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")


def save_changed(
    model: "Model", role: Role, weights: Mapping[str, "Tensor"], out: Path, extra: Mapping[str, str]
) -> None:
    """Write the model that ``model`` was loaded from, with ``weights`` in the place of its own, into ``out``.

    Configuration and tokenizer are those that the loader accepted; an adapter is merged. Nothing of the original's
    place on the disk is kept. ``out`` appears whole or not at all.

    Args:
        model: whose ``spec`` is read again, and which holds the changed weights already.
        role: which model of a zoo directory is meant.
        weights: new values by the name transformers gives them.
        out: directory to write; one of the same name is replaced.
        extra: further files, by name.

    Raises:
        ModelError: what was written does not compute what ``model`` computes.
        OutputError: it cannot be written.
    """
    hf, tokenizer, tokens = bare(model.spec, role)
    with _quiet(online=False):
        _write(hf, tokenizer, tokens, model, weights, out, extra)


def _write(
    hf: Any,
    tokenizer: Any,
    tokens: "Tensor",
    model: "Model",
    weights: Mapping[str, "Tensor"],
    out: Path,
    extra: Mapping[str, str],
) -> None:
    import torch

    named = dict(hf.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
        apart = (hf(tokens, use_cache=False).logits.log_softmax(-1) - model.logits(tokens).log_softmax(-1)).abs().max()
    if not float(apart) <= max(AGREEMENT, 2 * model.floor):
        raise ModelError(
            f"the edited weights compute other predictions than the edited model (by {float(apart):.3g} nats)",
            where=model.spec,
            remedy="This architecture keeps its weights in a form that cannot be written back; repair another one.",
        )
    building = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        shutil.rmtree(building, ignore_errors=True)
        hf.save_pretrained(building)
        tokenizer.save_pretrained(building)
        for path in (*building.glob("*config.json"), *building.glob("tokenizer*.json")):
            _forget_paths(path)
        for name, content in extra.items():
            (building / name).write_text(content, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(building, out)
    except OSError as error:
        raise OutputError(
            f"the model cannot be written ({error.strerror or error})",
            where=str(error.filename or out),
            remedy="Name a directory that can be written, with space for the weights in float32.",
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _forget_paths(path: Path) -> None:
    """Drop what savers note about where files were."""
    said = json.loads(path.read_text(encoding="utf-8"))
    kept = {field: value for field, value in said.items() if field not in _PATHS}
    if kept != said:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
