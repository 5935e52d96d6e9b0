"""Directions of the residual stream read through the vocabulary, and the path from the last residual to logits."""

from typing import Any

import torch
from torch import Tensor

from .model import Model


def unembed(model: Model, residual: Tensor) -> Tensor:
    """Logits [batch, pos, d_vocab] of a value of the site ``final`` [batch, pos, d_model]."""
    hf = _transformers(model)
    logits = hf.get_output_embeddings()(model.bridge.ln_final(residual))
    # Cohere's factor and Granite's divisor.
    logits = logits * getattr(hf.config, "logit_scale", 1.0) / getattr(hf.config, "logits_scaling", 1.0)
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


def embedding(model: Model) -> Tensor:
    """Token embeddings [d_vocab, d_model]."""
    return _transformers(model).get_input_embeddings().weight.detach()


def unembedding(model: Model) -> Tensor:
    """What each residual direction adds to each logit, [d_vocab, d_model], the last norm's gain folded in."""
    weight = _transformers(model).get_output_embeddings().weight.detach()
    gain = getattr(model.bridge.ln_final.original_component, "weight", None)
    return weight if gain is None else weight * gain.detach()


def nearest_tokens(model: Model, scores: Tensor, count: int) -> tuple[str, ...]:
    """The tokens with the largest of ``scores`` [d_vocab], as text."""
    known = scores[: len(model.tokenizer)]
    return tuple(model.decode([i]) for i in known.topk(min(count, len(known))).indices.tolist())


def _transformers(model: Model) -> Any:
    """The wrapped transformers model, typed by the bridge as a bare module."""
    return model.bridge.original_model
