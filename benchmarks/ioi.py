"""Indirect-object identification for a tokenizer: the clean prompt names the receiver, the counterfactual the giver."""

from typing import Any

import torch

from heredity.circuits.pairs import LogitDifference, Pairs

NAMES = (
    "Mary John Tom James Paul Anna Sarah David Mark Peter Jack Alice Emma Lucy Kate Henry George Robert Laura Susan "
    "Michael Richard Charles Martin Simon Andrew Jane Helen Adam Frank"
).split()
TEMPLATES = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "Then {a} and {b} had a long talk, and {s} handed the letter to",
)


def pairs(tokenizer: Any, n: int, seed: int) -> tuple[Pairs, LogitDifference, list[str]]:
    """``n`` pairs, their metric (receiver minus giver), and the clean texts.

    In the counterfactual the other of the two names is the giver.
    """
    single = [name for name in NAMES if len(tokenizer(" " + name)["input_ids"]) == 1]
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt, right, wrong, texts = [], [], [], [], []
    for i in range(n):
        a, b = (single[j] for j in torch.randperm(len(single), generator=generator)[:2].tolist())
        giver, receiver = (a, b) if torch.rand((), generator=generator) < 0.5 else (b, a)
        template = TEMPLATES[i % len(TEMPLATES)]
        texts.append(template.format(a=a, b=b, s=giver))
        clean.append(tokenizer(texts[-1])["input_ids"])
        corrupt.append(tokenizer(template.format(a=a, b=b, s=receiver))["input_ids"])
        right.append(tokenizer(" " + receiver)["input_ids"])
        wrong.append(tokenizer(" " + giver)["input_ids"])
    width = max(map(len, clean))
    rows = [torch.tensor([[*row, *[0] * (width - len(row))] for row in side]) for side in (clean, corrupt)]
    last = torch.tensor([len(row) - 1 for row in clean])
    return Pairs(rows[0], rows[1], last), LogitDifference(last, right, wrong), texts
