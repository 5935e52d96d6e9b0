"""The packages that the other benchmarks compare with, each in a virtual environment of its own.

    python benchmarks/peers.py install DIR [NAME …]

Their requirements contradict each other, and most of those are for loading models or drawing plots. So each package is
installed without its requirements, with torch and what its import needs added by name; versions that must not be newer
are pinned. An environment that cannot be made is left with a file that says why, which becomes its row of the table.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """One package: its requirement, and what its import needs besides torch, with and without their requirements."""

    package: str
    version: str
    needs: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.package} {self.version}"


_TRANSFORMER_LENS = "transformer-lens>=2.16.2,<4"

PEERS = {
    "sae_lens": Peer(
        "sae-lens",
        "6.54.12",
        (_TRANSFORMER_LENS, "python-dotenv", "simple-parsing<0.2", "tenacity", "nltk"),
        ("babe", "plotly-express", "plotly"),
    ),
    "sparsify": Peer(
        "eai-sparsify",
        "1.3.3",
        ("accelerate", "datasets", "einops", "natsort", "simple-parsing", "transformers"),
        ("schedulefree",),
    ),
    # nnsight asks for torchvision, which on PyPI is built for a torch with CUDA and fails to load beside another.
    "dictionary_learning": Peer(
        "dictionary-learning",
        "0.1.0",
        ("accelerate", "diffusers", "einops", "pydantic", "python-socketio[client]", "transformers", "wandb"),
        ("nnsight==0.3.7",),
    ),
    "llamascopium": Peer(
        "llamascopium",
        "2.0.0b34",
        (
            _TRANSFORMER_LENS,
            "cattrs",
            "json-repair",
            "more-itertools",
            "pydantic-settings",
            "pymongo",
            "tomlkit",
            "typer",
        ),
        ("openai",),
    ),
    # Its replacement model imports a name that huggingface_hub has no longer.
    "circuit_tracer": Peer(
        "circuit-tracer", "0.5.0", (_TRANSFORMER_LENS, "transformers<4.58", "huggingface_hub<1", "tokenizers")
    ),
}
"""By the name of their module, which is also that of their file in ``contestants/``."""

AUDITORS = {"modeldiffr": Peer("modeldiffr", "0.9.3", ("transformers==5.23.0",))}
"""Those that compare two models, whose command lines ``detection.py`` runs; they have no kernels to time."""


def python(directory: Path, name: str) -> Path:
    """Interpreter of a peer's environment."""
    return directory / name / "bin" / "python"


def missing(directory: Path | None, name: str) -> str | None:
    """Why a peer cannot take part, or None."""
    if directory is None:
        return "no --peers given"
    failure = directory / name / "failed.txt"
    if failure.exists():
        return failure.read_text().strip()
    return None if python(directory, name).exists() else f"not installed in {directory.name}"


def install(directory: Path, name: str) -> str | None:
    """Make one environment; why it failed, or None."""
    peer, place = (PEERS | AUDITORS)[name], directory / name
    steps = [
        [sys.executable, "-m", "venv", place],
        [place / "bin/pip", "install", "--quiet", TORCH, "numpy", "safetensors", *peer.needs],
        [place / "bin/pip", "install", "--quiet", "--no-deps", f"{peer.package}=={peer.version}", *peer.bare],
        [python(directory, name), "-P", "-c", f"import {name}"],
    ]
    failure = place / "failed.txt"
    failure.unlink(missing_ok=True)
    for step in steps:
        done = subprocess.run([*map(str, step)], text=True, capture_output=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            place.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{step[-1] if step[1] != '-m' else 'venv'}: {last}\n")
            return last
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS | AUDITORS)}; all without")
    args = parser.parse_args()
    if unknown := set(args.names) - set(PEERS | AUDITORS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    failures = {name: install(args.directory, name) for name in args.names or PEERS | AUDITORS}
    for name, failure in failures.items():
        print(f"{(PEERS | AUDITORS)[name].label}: {failure or 'installed'}")
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
