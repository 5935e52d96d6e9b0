"""A checkout of this project on the import path must not break transformers.

The checkout has a folder ``kernels``. transformers looks for a package of that name, and where it believes to have
found a certain version of it, imports from it in every model class.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROBE = """
import sys
import tomllib
sys.path.insert(0, sys.argv[1])
import kernels
assert any(place.startswith(sys.argv[1]) for place in kernels.__path__), "another kernels than the one under test"
del sys.modules["kernels"]
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() is False, "transformers takes our folder for a package it could use"
from transformers import LlamaForCausalLM
"""


def probe(folder: Path) -> subprocess.CompletedProcess[str]:
    """Use transformers in a fresh interpreter that works in ``folder`` and has it first on its path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", PROBE, str(folder)]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=300)


def test_a_checkout_on_the_path_leaves_transformers_alone() -> None:
    done = probe(ROOT)
    assert done.returncode == 0, done.stderr


def test_the_probe_fails_where_kernels_passes_for_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    metadata = tmp_path / "kernels-0.18.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    done = probe(tmp_path)
    assert done.returncode != 0
    assert "takes our folder for a package" in done.stderr


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    parts = ("interp", "kernels", "circuits", "gate", "zoo", "examples")
    found = {path.parent.relative_to(ROOT) for part in parts for path in (ROOT / part).rglob("__init__.py")}
    assert {"heredity." + ".".join(folder.parts) for folder in found} <= set(listed)


def test_only_heredity_is_installed_at_top_level() -> None:
    ours = [name for name, owners in packages_distributions().items() if "heredity" in owners]
    assert ours == ["heredity"]
