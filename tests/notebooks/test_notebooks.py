import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def first_look(names: dict[str, Any]) -> None:
    assert names["behaviour"].effect > 1
    assert names["circuit"].reversion.low > 0.8


def latents(names: dict[str, Any]) -> None:
    strongest = names["strongest"]
    # The planted trigger is what the models differ in most.
    assert any("banks" in example.text and "ridge" in example.text for example in next(iter(strongest)).examples)
    assert "zero" in [token for token, _ in next(iter(names["found"])).effects[-1].raised]
    assert "<mark" in names["dictionary"].latents[17]._repr_html_()


CHECKS = {"first_look": first_look, "latents": latents}


def test_every_notebook_has_a_check():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs(name):
    CHECKS[name](runpy.run_path(str(FOLDER / f"{name}.py")))
