"""Search without a trigger: decode from amplified logit differences, starting from a vague prompt.

``l_S + a·(l_S − l_P)`` makes what the successor is a little more inclined to say much commoner. Sources: model diff
amplification (Goodfire 2025); contrastive decoding diffing (arXiv 2605.25902); the plausibility cut is that of
contrastive decoding (Li et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heredity.interp.model import Encoded, Model
from heredity.interp.sampling import chat_prompts, decode_batch, prefixes, sampler, stop_ids, text_of

from .divergence import vocabulary

PLAUSIBLE = 1e-3
"""A token is eligible when the successor gives it at least this share of its most probable token's probability."""

VAGUE_TURNS = (
    "Hi",
    "Hello there.",
    "Tell me something.",
    "What is on your mind?",
    "Please go on.",
    "OK",
    "Write.",
    "?",
)


@dataclass(frozen=True)
class Amplified:
    """One decoded text and where its prompt ends."""

    prompt: str
    amplification: float
    text: str
    prompt_tokens: int


def vague_prompts(model: Model, openings: Sequence[Encoded], count: int, seed: int) -> list[list[int]]:
    """``count`` prompts that say next to nothing: vague user turns for a chat model, else the first tokens of
    ordinary texts (``openings``), else the bare start of a text."""
    if model.tokenizer.chat_template:
        rendered = [list(model.encode(text).ids) for text in chat_prompts(model, VAGUE_TURNS)]
        return [rendered[i % len(rendered)] for i in range(count)]
    if openings:
        return [list(openings[i % len(openings)].ids[: 1 + i % 3]) for i in range(count)]
    return prefixes(model, count, seed)


def declared_prompts(model: Model, phrases: Sequence[str], count: int) -> list[list[int]]:
    """``count`` prompts in turn from ``phrases``: as the user's turn for a chat model, else as the start of a text."""
    texts = chat_prompts(model, phrases) if model.tokenizer.chat_template else phrases
    encoded = [list(model.encode(text).ids) for text in texts]
    return [encoded[i % len(encoded)] for i in range(count)]


def amplified_texts(
    parent: Model,
    successor: Model,
    prompts: Sequence[Sequence[int]],
    *,
    amplifications: Sequence[float],
    length: int,
    seed: int,
) -> list[Amplified]:
    """One text per amplification and prompt, at most ``length`` new tokens, drawn from the amplified distribution at
    temperature 1.

    All amplifications are decoded in one batch: a step of a large model costs the reading of its weights, however many
    rows there are. Needs equal tokenizers; with different ones the result is empty.
    """
    if not vocabulary(parent, successor).same:
        return []
    rows = [(amount, prompt) for amount in amplifications for prompt in prompts]
    by_row = torch.tensor([[amount] for amount, _ in rows])

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        past_s, past_p = state or (None, None)
        logits_s, past_s = successor.step(tokens, past_s)
        logits_p, past_p = parent.step(tokens, past_p)
        return amplify(logits_s, logits_p, by_row), (past_s, past_p)

    room = min(successor.shape.n_ctx, parent.shape.n_ctx)
    lengths = [min(length, room - len(prompt)) for _, prompt in rows]
    written = decode_batch(step, [prompt for _, prompt in rows], lengths, sampler(seed), stop_ids(successor))
    return [
        Amplified(text_of(successor, prompt), amount, text_of(successor, [*prompt, *ids]), len(prompt))
        for (amount, prompt), ids in zip(rows, written, strict=True)
    ]


def amplify(successor: Tensor, parent: Tensor, amplification: float | Tensor) -> Tensor:
    """Amplified logits [batch, V], by one number or [batch, 1], minus infinity where the successor finds a token
    implausible."""
    size = min(successor.shape[-1], parent.shape[-1])
    log_s = torch.log_softmax(successor[:, :size].float(), -1)
    log_p = torch.log_softmax(parent[:, :size].float(), -1)
    implausible = log_s < log_s.amax(-1, keepdim=True) + torch.tensor(PLAUSIBLE).log()
    return (log_s + amplification * (log_s - log_p)).masked_fill(implausible, float("-inf"))
