"""Models from local files, adapters, GGUF files or the hub, checked first and wrapped for hooks after."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import WrapperError
from .spec import ModelSpec, Role, parse_spec

if TYPE_CHECKING:
    from .model import Model

_SENTENCES = (
    "The old bridge over the river was closed last winter, so we took the train to the coast instead.",
    "In 1969 three people flew to the moon; two of them walked on it, and all of them came home safely.",
)


def load(spec: str, *, role: Role = "parent", tolerance: float = 1e-2) -> "Model":
    """The hooked model that ``spec`` names (grammar in :mod:`.spec`), in float32 on the CPU.

    Args:
        spec: a directory, ``.gguf`` file, hub id, ``BASE+ADAPTER`` or zoo directory.
        role: which model of a zoo directory is meant.
        tolerance: largest log-probability error against the bare forward (nats) that is accepted.

    Raises:
        ModelError: the files cannot or must not be loaded.
        AdapterError: the adapter is malformed or does not fit.
        TokenizerError: the tokenizer is absent or does not fit.
        WrapperError: the hooked forward is further than ``tolerance`` from the bare one.
    """
    parsed = parse_spec(spec, role)
    if not _names_hub(parsed):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _quiet():
        hf, tokenizer, digest = _read(parsed)
        return _wrap(hf, tokenizer, spec, digest, tolerance)


def _names_hub(parsed: ModelSpec) -> bool:
    return parsed.kind == "hub" or (parsed.kind == "adapter" and parse_spec(parsed.base).kind == "hub")


def _read(parsed: ModelSpec) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs: dict[str, Any] = {"local_files_only": True}
    path = Path(parsed.base)
    if parsed.kind == "adapter":
        from peft import PeftModel

        base, tokenizer, digest = _read(parse_spec(parsed.base))
        return PeftModel.from_pretrained(base, parsed.adapter).merge_and_unload(), tokenizer, digest + "+"
    if parsed.kind == "gguf":
        kwargs["gguf_file"] = path.name
        path = path.parent
    hf = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True, **kwargs)
    return hf.eval(), AutoTokenizer.from_pretrained(str(path), **kwargs), str(path.resolve())


def _wrap(hf: Any, tokenizer: Any, spec: str, digest: str, tolerance: float) -> "Model":
    import copy

    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from .model import Model, pad

    hf.requires_grad_(False)
    tokens, mask = pad([tokenizer(text)["input_ids"][:64] for text in _SENTENCES])
    with torch.no_grad():
        bare = hf(tokens, use_cache=False).logits.log_softmax(-1)
    # The wrapper changes the tokenizer it is given (special tokens), and ours must stay as it was saved.
    bridge = TransformerBridge.boot_transformers(
        "local/model", hf_model=hf, tokenizer=copy.deepcopy(tokenizer), device="cpu"
    )
    model = Model(bridge, tokenizer, spec=spec, digest=digest, floor=0.0)
    with torch.no_grad():
        model.floor = float((model.logits(tokens).log_softmax(-1) - bare)[mask].abs().max())
    if not model.floor <= tolerance:
        raise WrapperError(
            f"hooked and bare forward differ by {model.floor:.3g} nats, more than {tolerance:.3g}",
            where=spec,
            remedy="Raise the tolerance only if results at that precision are enough.",
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
