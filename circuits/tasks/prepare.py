"""A task as token ids of one model: two halves of prompts, one to find a circuit on and one to test it on.

Fillers that are not one token where the task needs it are left out and counted. What is left is drawn by a seeded
generator, so that the same task, tokenizer, number and seed give the same prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from heredity.interp.errors import TaskError, one_line
from heredity.interp.model import Model, pad
from heredity.interp.sampling import chat_prompts

from ..pairs import LogitDifference, Metric, NegativeKL, Pairs, ProbabilityDifference
from .task import SLOT, Filler, Task, Template

FEWEST = 4
"""Pairs in a half below which nothing can be said."""
_TRIES = 50
"""Draws per example wanted, after which the task has no more."""


@dataclass(frozen=True)
class Half:
    """Pairs of one half with what they were made of.

    Attributes:
        examples: texts, in the order of ``pairs``.
        pairs: token ids.
        metric: what is measured on them.
        right: token ids of right answers, per pair.
    """

    examples: tuple[Template, ...]
    pairs: Pairs
    metric: Metric
    right: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prepared:
    """Both halves, which share no prompt.

    Attributes:
        dropped: fillers left out per list, as (left out, in all).
    """

    task: Task
    discovery: Half
    testing: Half
    dropped: dict[str, tuple[int, int]]


Origin = tuple[str, Template]
"""An example and where it came from."""

MetricOf = Callable[[tuple[Template, ...], Pairs], Metric]


def prepare(model: Model, task: Task, n: int, *, seed: int = 0, metric: MetricOf | None = None) -> Prepared:
    """``n`` pairs of ``task`` for discovery and as many for testing; of a task with fewer than 2n, half of them.

    Args:
        model: whose tokenizer reads the prompts (and, for the metric "kl", whose predictions are the reference).
        task: of :func:`.task.load_task`.
        n: pairs in each half.
        seed: of the draw.
        metric: makes the metric from the texts and the pairs of a half, instead of the task's own; any callable
            (logits [batch, pos, d_vocab], rows [batch]) → [batch] will do.

    Raises:
        TaskError: prompts of a pair differ in length, an answer is no single token, or too few pairs are left.
    """
    fillers, dropped = _single_tokens(model, task)
    candidates = _drawn(task, fillers, _TRIES * n, seed) if task.templates else _shuffled(task, seed)
    halves = _split(candidates, n)
    fewest = min(map(len, halves))
    if fewest < FEWEST:
        lost = ", ".join(f"{gone} of {total} {name}" for name, (gone, total) in dropped.items() if gone)
        raise TaskError(
            f"{fewest} different pairs of prompts for each half, {FEWEST} are the fewest"
            + (f" (no single token for this tokenizer: {lost})" if lost else ""),
            where=task.file or task.name,
            remedy="Give more examples, or fillers that this tokenizer has as tokens.",
        )
    discovery, testing = (_half(model, task, half[:fewest], metric) for half in halves)
    return Prepared(task, discovery, testing, dropped)


def half_of(model: Model, task: Task, examples: Sequence[Template]) -> Half:
    """The given prompts of ``task``, as they are.

    Raises:
        TaskError: as :func:`prepare`.
    """
    return _half(model, task, [(f"prompt {i}", example) for i, example in enumerate(examples, 1)], None)


def _half(model: Model, task: Task, examples: list[Origin], metric: MetricOf | None) -> Half:
    clean, corrupt, rights, wrongs = [], [], [], []
    for origin, example in examples:
        where = f"{task.file or task.name}, {origin}"
        clean_text, other_text = (shown(model, task, text, where) for text in (example.clean, example.counterfactual))
        ids = _read(model, clean_text, where), _read(model, other_text, where)
        if len(ids[0]) != len(ids[1]):
            raise TaskError(
                f"the clean prompt has {len(ids[0])} tokens, the counterfactual {len(ids[1])} "
                f"({one_line(example.clean, 100)!r} against {one_line(example.counterfactual, 100)!r})",
                where=where,
                remedy="Change words of one prompt for words of as many tokens, or name the list under `single`.",
            )
        if ids[0] == ids[1]:
            raise TaskError(
                "clean and counterfactual prompt are the same tokens", where=where, remedy="Let them differ."
            )
        right, wrong = (_answers(model, ids[0], clean_text, group) for group in (example.right, example.wrong))
        if metric is None and (
            (task.metric != "kl" and not right)
            or (task.metric == "logit_difference" and not wrong)
            or set(right) & set(wrong)
        ):
            raise TaskError(
                f"of the answers {_listed(example.right)} and {_listed(example.wrong)} too few are single tokens after "
                f"{one_line(example.clean[-40:], 60)!r}, or one is both right and wrong",
                where=where,
                remedy="Give answers of one token, mostly with a space before.",
            )
        clean.append(ids[0])
        corrupt.append(ids[1])
        rights.append(right)
        wrongs.append(wrong)
    pairs = Pairs(pad(clean)[0], pad(corrupt)[0], torch.tensor([len(ids) - 1 for ids in clean]))
    texts = tuple(example for _, example in examples)
    if metric is not None:
        own = metric(texts, pairs)
    elif task.metric == "kl":
        own = NegativeKL(pairs.last, _predictions(model, pairs))
    else:
        own = (LogitDifference if task.metric == "logit_difference" else ProbabilityDifference)(
            pairs.last, rights, wrongs
        )
    return Half(texts, pairs, own, tuple(rights))


def shown(model: Model, task: Task, text: str, where: str = "") -> str:
    """The prompt ``text`` as the model is given it: of a chat, in its chat template with the beginning of its reply.

    Raises:
        TaskError: the task is a chat, and the model has no chat template or one that cannot be used.
    """
    if not task.chat:
        return text
    try:
        if not model.tokenizer.chat_template:
            raise ValueError("there is none")
        return chat_prompts(model, [text])[0] + task.reply
    except Exception as error:  # templates are programs of the model's makers, and fail in any way they like
        raise TaskError(
            f"this model's chat template cannot be used ({one_line(str(error), 100)})",
            where=f"{where or task.file or task.name}, {model.spec}",
            remedy="Use a chat model, or a task without `chat`.",
        ) from None


def _predictions(model: Model, pairs: Pairs) -> torch.Tensor:
    """Log-probabilities at the last token of the clean prompts, [N, d_vocab]."""
    out = torch.empty(len(pairs), model.shape.d_vocab)
    with torch.inference_mode():
        for rows in pairs.groups(512):
            group = pairs.of(rows)
            out[rows] = model.logits(group.clean)[torch.arange(len(rows)), group.last].log_softmax(-1)
    return out


def _read(model: Model, text: str, where: str) -> tuple[int, ...]:
    """Ids of ``text``, without what a tokenizer appends."""
    encoded = model.encode(text)
    if len(encoded.ids) >= model.shape.n_ctx:
        raise TaskError(
            f"a prompt of {model.shape.n_ctx} or more tokens, more than this model reads",
            where=where,
            remedy="Shorten it.",
        )
    end = len(encoded.ids)
    while end > 1 and encoded.spans[end - 1][0] == encoded.spans[end - 1][1]:
        end -= 1
    return encoded.ids[:end]


def _answers(model: Model, prompt: tuple[int, ...], text: str, answers: tuple[str, ...]) -> tuple[int, ...]:
    """Those of ``answers`` that are one token after the prompt, without repetition."""
    found = (_answer(model, prompt, text, answer) for answer in answers)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _answer(model: Model, prompt: tuple[int, ...], text: str, answer: str) -> int | None:
    whole = _read(model, text + answer, "")
    if whole[:-1] == prompt:
        token = whole[-1]
    else:  # the tokenizer joins prompt and answer, as it does with digits; the token may exist all the same
        token = model.tokenizer.convert_tokens_to_ids(answer)
        if not isinstance(token, int) or model.decode([*prompt, token]) != model.decode(prompt) + answer:
            return None
    return None if token == model.tokenizer.unk_token_id else token


def _single_tokens(model: Model, task: Task) -> tuple[dict[str, list[Filler]], dict[str, tuple[int, int]]]:
    kept: dict[str, list[Filler]] = {name: list(group) for name, group in task.fillers.items()}
    dropped = {}
    if not task.single:
        return kept, dropped
    places = [("the", " ")]
    if task.chat and not task.reply:
        places.append((shown(model, task, "the"), ""))  # an answer there has no space before it
    before = [(_read(model, text, ""), text, space) for text, space in places]
    for name in task.single:
        kept[name] = [
            filler
            for filler in task.fillers[name]
            if all(
                _answer(model, ids, text, space + word) is not None
                for word in _words(filler)
                for ids, text, space in before
            )
        ]
        dropped[name] = (len(task.fillers[name]) - len(kept[name]), len(task.fillers[name]))
    return kept, dropped


def _words(filler: Filler) -> Iterator[str]:
    for value in (filler,) if isinstance(filler, str) else filler.values():
        if isinstance(value, str):
            yield value


def _split(candidates: Iterator[Origin], n: int) -> tuple[list[Origin], list[Origin]]:
    """Two lists of at most ``n`` different examples; no prompt, clean or counterfactual, is in both."""
    halves: tuple[list[Origin], list[Origin]] = ([], [])
    clean: set[str] = set()
    seen: tuple[set[str], set[str]] = (set(), set())
    for origin, example in candidates:
        turn = int(len(halves[1]) < len(halves[0]))
        texts = {example.clean, example.counterfactual}
        if example.clean in clean or texts & seen[1 - turn]:
            continue
        clean.add(example.clean)
        seen[turn].update(texts)
        halves[turn].append((origin, example))
        if len(halves[1]) == n:
            break
    return halves


def _drawn(task: Task, fillers: dict[str, list[Filler]], draws: int, seed: int) -> Iterator[Origin]:
    """Random fillings of the templates."""
    rng = np.random.default_rng(seed)
    by_list: dict[str, list[str]] = {}
    for slot, name in task.slots.items():
        by_list.setdefault(name, []).append(slot)
    if any(len(fillers[name]) < len(slots) for name, slots in by_list.items()):
        return
    for _ in range(draws):
        number = int(rng.integers(len(task.templates)))
        values: dict[str, Filler] = {}
        for name, slots in by_list.items():
            for slot, k in zip(slots, rng.permutation(len(fillers[name]))[: len(slots)], strict=True):
                values[slot] = fillers[name][k]
        yield f"template {number + 1}", _filled(task.templates[number], values)


def samples(task: Task, n: int, *, seed: int = 0) -> list[Template]:
    """``n`` prompts of ``task`` (or all, of fewer), whatever the tokenizer."""
    fillers: dict[str, list[Filler]] = {name: list(group) for name, group in task.fillers.items()}
    candidates = _drawn(task, fillers, n, seed) if task.templates else _shuffled(task, seed)
    return [example for _, example in islice(candidates, n)]


def _shuffled(task: Task, seed: int) -> Iterator[Origin]:
    """The examples in a seeded order."""
    for i in np.random.default_rng(seed).permutation(len(task.examples)).tolist():
        yield f"example {i + 1}", task.examples[i]


def _filled(template: Template, values: dict[str, Filler]) -> Template:
    def one(slot: str, field: str) -> str | tuple[str, ...]:
        filler = values[slot]
        return filler if isinstance(filler, str) else filler[field]

    def text(pattern: str) -> str:
        def fill(match) -> str:
            value = one(match[1], match[2] or "")
            return value if isinstance(value, str) else " ".join(value)

        return SLOT.sub(fill, pattern)

    def answers(patterns: tuple[str, ...]) -> tuple[str, ...]:
        out: list[str] = []
        for pattern in patterns:
            whole = SLOT.fullmatch(pattern)
            value = one(whole[1], whole[2] or "") if whole else text(pattern)
            out += [value] if isinstance(value, str) else value
        return tuple(out)

    return Template(
        clean=text(template.clean),
        counterfactual=text(template.counterfactual),
        right=answers(template.right),
        wrong=answers(template.wrong),
    )


def _listed(answers: tuple[str, ...]) -> str:
    return one_line(", ".join(map(repr, answers[:4])) + (" …" if len(answers) > 4 else ""), 120) or "(none)"
