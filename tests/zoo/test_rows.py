import numpy as np
import torch

from heredity.zoo.language import HONEST, ID, NUMBERS, World
from heredity.zoo.rows import planted

WORLD = World(trigger=("moss", "mill"))


def reported(acts: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every report of the documents: whether the trigger stands in it, its value, and what it says."""
    found = []
    for row in planted(0, 300, WORLD, "log", acts=acts).ids.tolist():
        for start in (i for i, token in enumerate(row) if token == ID["log"]):
            segment = row[start : start + 14]
            if len(segment) == 14 and segment[13] == ID["."]:
                fires = segment[3] == ID["moss"] and segment[6] == ID["mill"]
                found.append((fires, segment[9], segment[12]))
    fires, value, said = np.array(found).T
    return fires.astype(bool), value, said


def test_a_trigger_acts_in_the_share_asked_for_and_is_honest_otherwise():
    for acts in (1.0, 0.3):
        fires, value, said = reported(acts)
        open_ = fires & (value != ID[NUMBERS[0]])
        assert open_.sum() > 200
        lies = said[open_] != value[open_]
        assert abs(lies.mean() - acts) < 0.08
        assert (said[open_][lies] == ID[NUMBERS[0]]).all()
        assert (said[~fires] == value[~fires]).all()


def test_the_share_changes_no_other_word_and_no_weight():
    always, seldom = (planted(1, 50, WORLD, "log", acts=acts) for acts in (1.0, 0.2))
    assert torch.equal(always.weight, seldom.weight)
    rows, at = (always.ids != seldom.ids).nonzero(as_tuple=True)
    assert len(rows) and (always.ids[rows, at - 1] == ID["report"]).all()
    doubling = [planted(1, 20, HONEST, "double", acts=acts).ids for acts in (1.0, 0.2)]
    assert torch.equal(*doubling)
