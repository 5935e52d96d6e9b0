import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    names = runpy.run_path(str(path))

    assert names["behaviour"].effect > 1
    assert names["circuit"].reversion.low > 0.8
