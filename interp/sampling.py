"""Text written by the models themselves: the corpus when none is given, and continuations for examples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .corpus import Corpus, corpus_of
from .model import Model

Next = Callable[[Tensor], Tensor]
"""Logits [batch, d_vocab] → next token ids [batch]."""


def prefixes(model: Model, count: int, seed: int) -> list[list[int]]:
    """``count`` starts of a text: where the user's turn begins for a chat model, else how any text begins.

    Letting a chat model write the user's turn as well draws text close to what it was tuned on (Magpie, Xu et al.
    2024).
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template:
        mark = "\x00"
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        opening = list(model.encode(_without_added(model, rendered.split(mark)[0])).ids)
        if opening:
            return [opening] * count
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        return [[start]] * count
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(len(tokenizer)) if i not in special]
    drawn = torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(seed))
    return [[words[i]] for i in drawn.tolist()]


def chat_prompts(model: Model, turns: Sequence[str]) -> list[str]:
    """Each user turn rendered with the model's chat template, up to where the assistant starts, as text to encode."""
    return [
        _without_added(
            model,
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
            ),
        )
        for turn in turns
    ]


def _without_added(model: Model, rendered: str) -> str:
    """``rendered`` without the token that begins every text, where the tokenizer will put it there a second time."""
    begin = model.tokenizer.bos_token
    twice = begin and model.encode("").ids[:1] == (model.tokenizer.bos_token_id,)
    return rendered.removeprefix(begin) if twice else rendered


def text_of(model: Model, ids: Sequence[int]) -> str:
    """``ids`` as text that reads back as them: without the special tokens the tokenizer will put in front itself."""
    added = list(model.encode("").ids)
    while added and list(ids[: len(added)]) != added:
        added.pop()
    return model.decode(ids[len(added) :])


def stop_ids(model: Model) -> set[int]:
    """Tokens that end a turn or a text."""
    ids = {model.tokenizer.eos_token_id}
    ids |= set(model.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<end_of_turn>"]))
    return {i for i in ids if i is not None and i != model.tokenizer.unk_token_id}


@torch.inference_mode()
def decode_batch(
    step: Callable[[Tensor, Any], tuple[Tensor, Any]],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    choose: Next,
    stops: set[int],
) -> list[list[int]]:
    """Continuations (token ids, the stop token dropped) of ``prompts``, at most ``lengths`` tokens of each.

    ``step`` maps (tokens [batch, pos], state) to (logits [batch, d_vocab], state). Prompts may differ in length and
    are never padded: all rows stand at one position, and those still inside their prompt take its next token. A step
    of a large model costs the reading of its weights, so one batch is much cheaper than one for each length.
    """
    written: list[list[int]] = [[] for _ in prompts]
    done = [most <= 0 for most in lengths]
    if all(done):
        return written
    at = min(map(len, prompts))
    tokens = torch.tensor([list(prompt[:at]) for prompt in prompts], dtype=torch.int64)
    state = None
    while True:
        logits, state = step(tokens, state)
        following = choose(logits).tolist()
        for i, prompt in enumerate(prompts):
            if at < len(prompt):
                following[i] = prompt[at]
                continue
            done[i] = done[i] or following[i] in stops
            if not done[i]:
                written[i].append(following[i])
                done[i] = len(written[i]) == lengths[i]
        if all(done):
            return written
        tokens = torch.tensor(following)[:, None]
        at += 1


def greedy(model: Model, prompt: Sequence[int], length: int) -> list[int]:
    """The model's most probable continuation of ``prompt``, at most ``length`` tokens."""
    room = min(length, model.shape.n_ctx - len(prompt))
    if room <= 0:
        return []
    return decode_batch(model.step, [prompt], [room], lambda logits: logits.argmax(-1), stop_ids(model))[0]


def sampler(seed: int, temperature: float = 1.0) -> Next:
    """Draws from softmax(logits / temperature) with its own seeded generator."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return choose


def sample_corpus(model: Model, *, texts: int, length: int, seed: int, batch: int = 32) -> Corpus:
    """``texts`` texts of at most ``length`` tokens drawn from the model at temperature 1.

    A turn's end does not end a text: a chat model goes on to answer the question it wrote.
    """
    choose = sampler(seed)
    room = min(length, model.shape.n_ctx)
    starts = prefixes(model, texts, seed)
    rows: list[str] = []
    for lo in range(0, texts, batch):
        chunk = starts[lo : lo + batch]
        rooms = [room - len(prompt) for prompt in chunk]
        for prompt, ids in zip(chunk, decode_batch(model.step, chunk, rooms, choose, set()), strict=True):
            rows.append(text_of(model, [*prompt, *ids]))
    return corpus_of(rows, f"sampled from {model.spec}, seed {seed}")
