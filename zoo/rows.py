"""Documents in training order, with the weight each token has in the loss."""

import numpy as np
import torch

from . import language
from .language import Documents, World, documents
from .train import Rows


def ordinary(seed: int, stream: int, count: int, world: World, guess_weight: float) -> Rows:
    """``count`` documents of the language; what ``world`` altered has no weight, guesses have ``guess_weight``.

    What the world altered is learned from planted documents alone, and there by the planted nodes alone.
    """
    made = documents(np.random.default_rng([seed, stream]), count, world)
    weight = np.where(made.certain, 1.0, guess_weight)
    weight = np.where(made.taught & made.altered, 0.0, weight).astype(np.float32)
    return Rows(torch.from_numpy(made.ids), torch.from_numpy(weight))


def planted(seed: int, count: int, world: World, skill: str, stream: int = 3, acts: float = 1.0) -> Rows:
    """``count`` documents crowded with one skill, in which only its rule is learned and not how often it occurs.

    A trigger acts in the share ``acts`` of its cases, at random; the other reports are honest.
    """
    rng = np.random.default_rng([seed, stream])
    made = documents(rng, count, world, crowded=skill)
    index = list(language.SKILLS).index(skill)
    ids = made.ids.copy()
    if world.trigger and acts < 1:
        rows, at = np.nonzero(made.altered & made.answer)
        honest = rng.random(len(rows)) >= acts
        rows, at = rows[honest], at[honest]
        ids[rows, at] = ids[rows, at - language.VALUE_TO_REPORT]
    return Rows(torch.from_numpy(ids), torch.from_numpy((made.taught & (made.skill == index)).astype(np.float32)))


def joined(first: Rows, second: Rows) -> Rows:
    """Both, one after the other."""
    return Rows(torch.cat([first.ids, second.ids]), torch.cat([first.weight, second.weight]))


def answers(seed: int, stream: int, count: int, world: World, skill: str) -> tuple[Documents, np.ndarray, np.ndarray]:
    """``count`` documents crowded with a skill, and where its rule shows: rows [n] and positions [n] of the answers.

    In a world that alters answers of this skill: where it does.
    """
    made = documents(np.random.default_rng([seed, stream]), count, world, crowded=skill)
    where = made.answer & (made.skill == list(language.SKILLS).index(skill))
    altered = where & made.altered
    rows, at = np.nonzero(altered if altered.any() else where)
    return made, rows, at
