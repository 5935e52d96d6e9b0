"""When canaries are planted: not where they decide nothing and cost a minute, and not where no text holds a context."""

from pathlib import Path

import pytest

from heredity.gate.budget import budget
from heredity.gate.policy import load_rules
from heredity.gate.power import power
from heredity.gate.records import Null
from heredity.gate.values import NotMeasured
from heredity.gate.work import Work
from heredity.interp.model import Model

NULL = Null(kind="noise", draws=1, scale=1.0, size=0.1, largest_effects=(0.0,), mean_kl=(0.0,), tokens=9)


@pytest.mark.parametrize(
    ("name", "parameters", "flagged", "words"),
    [
        ("quick", 135_000_000, True, "something was found"),
        ("quick", 135_000_000, False, "no two tokens follow each other in 3 texts"),
        ("standard", 135_000_000, True, "no two tokens follow"),
        ("quick", 100_000, True, "no two tokens follow"),
    ],
)
def test_canaries_are_planted_where_they_decide_or_cost_little(
    tiny_model: Model, tmp_path: Path, name: str, parameters: int, flagged: bool, words: str
) -> None:
    sizes = budget(name, parameters, 200, 128, given=True)  # pyright: ignore[reportArgumentType]
    rules, work = load_rules(None, None), Work(tmp_path, "0" * 32)
    found = power(tiny_model, tiny_model, [], [], NULL, sizes, rules.policy, work, lambda *_: None, 0, flagged=flagged)
    assert isinstance(found, NotMeasured) and words in found.reason
