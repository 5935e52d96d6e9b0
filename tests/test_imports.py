"""What importing a module may bring with it, and in which direction modules may import each other.

torch and the model libraries take 10 to 20 seconds to import when cold, so what the command line imports at start-up
must not touch them.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("interp", "kernels", "circuits", "gate", "zoo")
HEAVY = {"torch", "transformers", "transformer_lens", "peft", "datasets", "scipy", "pandas"}

MUST_NOT_BRING = {
    "heredity.kernels": HEAVY | {"heredity.interp", "heredity.circuits", "heredity.gate", "heredity.zoo"},
    "heredity.interp": HEAVY | {"heredity.circuits", "heredity.gate", "heredity.zoo"},
    "heredity.interp.errors": HEAVY | {"heredity.circuits", "heredity.gate", "heredity.zoo"},
    "heredity.interp.load": HEAVY | {"heredity.circuits", "heredity.gate", "heredity.zoo"},
    "heredity.circuits": {"heredity.gate", "heredity.zoo"},
    "heredity.circuits.views": HEAVY | {"heredity.gate", "heredity.zoo"},
    "heredity.zoo": HEAVY | {"heredity.kernels", "heredity.circuits", "heredity.gate"},
    "heredity.gate": HEAVY,
    "heredity.gate.cli": HEAVY,
    "heredity.gate.policy": HEAVY,
    "heredity.gate.records": HEAVY,
    "heredity.gate.report": HEAVY,
}

IMPORT_AND_LIST = (
    "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(list(sys.modules)))"
)


def run(*command: str | Path, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Some packages (hf kernels, pandas) are looked for on the path; only what the test names may be there.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(command, env=env, cwd=cwd, text=True, capture_output=True, timeout=300)


def brought(module: str, unwanted: Collection[str], path: Path | None = None) -> set[str]:
    """Which of ``unwanted`` are imported when a fresh interpreter imports ``module``."""
    done = run(sys.executable, "-c", IMPORT_AND_LIST, module, path=path)
    assert done.returncode == 0, done.stderr
    return set(unwanted) & set(json.loads(done.stdout))


@pytest.mark.parametrize("module", MUST_NOT_BRING)
def test_import_brings_only_what_it_may(module: str) -> None:
    assert brought(module, MUST_NOT_BRING[module]) == set()


def test_the_check_sees_an_import_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import inner\n")
    (tmp_path / "inner.py").write_text("import torch\nimport heredity.interp.errors\n")
    assert brought("outer", {"torch", "heredity.interp", "heredity.gate"}, tmp_path) == {"torch", "heredity.interp"}


def test_the_check_lets_an_import_inside_a_function_pass(tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text("def f():\n    import torch\n    return torch\n")
    assert brought("later", HEAVY, tmp_path) == set()


def directions(source: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with this project's contracts on the ``heredity`` package that lies in ``source``."""
    linter = Path(sysconfig.get_path("scripts"), "lint-imports")
    config = ROOT / "pyproject.toml"
    return run(linter, "--config", config, "--no-cache", "--no-logo", path=source, cwd=source)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with this checkout's source as the package ``heredity``, to be changed at will."""
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder,
            tmp_path / "heredity" / folder,
            ignore=lambda at, names: {n for n in names if not source(at, n)},
        )
    return tmp_path


def source(at: str, name: str) -> bool:
    return name.endswith(".py") or (Path(at, name).is_dir() and name != "__pycache__")


def test_directions_hold(package: Path) -> None:
    done = directions(package)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kernels", "interp.errors"),
        ("interp", "circuits.views"),
        ("circuits", "gate.records"),
        ("circuits", "zoo.language"),
        ("zoo", "interp.model"),
    ],
)
def test_an_upward_import_is_reported(package: Path, importer: str, imported: str) -> None:
    (package / "heredity" / importer / "upward.py").write_text(f"def f():\n    import heredity.{imported}\n")
    done = directions(package)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"heredity.{importer}.upward -> heredity.{imported}" in done.stdout


def test_the_zoo_may_use_the_error_classes(package: Path) -> None:
    (package / "heredity" / "zoo" / "downward.py").write_text("import heredity.interp.errors\n")
    done = directions(package)
    assert done.returncode == 0, done.stdout + done.stderr
