"""Models from local files, adapters, GGUF files or the hub: checked first, wrapped for hooks after.

transformers reads from a staging directory that holds nothing but the files checked here, so that nothing else lying
beside them (pickles, code, adapters) can have a say. It is never allowed code from a model, nor the network.
"""

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import merge, read_adapter
from .checkpoint import check_account, check_directory, check_finite, check_fit
from .errors import HeredityError, ModelError, TokenizerError, WrapperError, one_line
from .fingerprint import fingerprint, fingerprint_adapted, fingerprint_file
from .spec import ModelSpec, Role, parse_spec

if TYPE_CHECKING:
    from torch import Tensor

    from .model import Model

# Read by the hooked and the bare model, to measure how far apart they are.
_SENTENCES = (
    "The old bridge over the river was closed last winter, so we took the train to the coast instead.",
    "In 1969 three people flew to the moon; two of them walked on it, and all of them came home safely.",
)
_PROBE_TOKENS = 48
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt"]
_OFFLINE = "HF_HUB_OFFLINE"
# A user's own ban on the network stands even when a hub id is named; ours is lifted for it.
_BANNED_BY_USER = any(os.environ.get(name) for name in (_OFFLINE, "TRANSFORMERS_OFFLINE"))
_STAGE = re.compile(r"[^\s'\"]*/heredity-\w+/?")


def load(spec: str, *, role: Role = "parent", tolerance: float = 1e-2) -> "Model":
    """The hooked model that ``spec`` names (grammar in :mod:`.spec`), in float32 on the CPU.

    Args:
        spec: a directory, ``.gguf`` file, hub id, ``BASE+ADAPTER`` or zoo directory.
        role: which model of a zoo directory is meant.
        tolerance: largest log-probability error against the bare forward (nats) that is accepted.

    Raises:
        ModelError: the files cannot or must not be loaded.
        AdapterError: the adapter is malformed or does not fit its base.
        TokenizerError: the tokenizer is absent or does not fit the embedding.
        WrapperError: the hooked forward is further than ``tolerance`` from the bare one.
    """
    parsed = parse_spec(spec, role)
    with _quiet(online=_names_hub(parsed, role)):
        hf, tokenizer, digest = _read(parsed, role)
        return _wrap(hf, tokenizer, spec, digest, tolerance)


def bare(spec: str, role: Role = "parent") -> tuple[Any, Any, "Tensor"]:
    """The transformers model that ``spec`` names, read as :func:`load` reads it, its tokenizer, and tokens [2, pos] to
    compare forwards on.

    Raises:
        HeredityError: as :func:`load` does.
    """
    parsed = parse_spec(spec, role)
    with _quiet(online=_names_hub(parsed, role)):
        hf, tokenizer, _ = _read(parsed, role)
        hf.eval()
        return hf, tokenizer, _probe(tokenizer, hf)[0]


def _read(parsed: ModelSpec, role: Role) -> tuple[Any, Any, str]:
    """The bare model, its tokenizer and the content digest."""
    if parsed.kind == "adapter":
        adapter = read_adapter(Path(parsed.adapter or ""))
        hf, tokenizer, digest = _read(parse_spec(parsed.base, role), role)
        merge(adapter, hf)
        return hf, tokenizer, fingerprint_adapted(digest, adapter.config, adapter.tensors.values())
    if parsed.kind == "gguf":
        return _read_gguf(Path(parsed.base))
    return _read_directory(_download(parsed.base) if parsed.kind == "hub" else Path(parsed.base))


def _read_directory(directory: Path) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = check_directory(directory)
    with _staged(checkpoint.files) as stage, _translated(directory):
        config = AutoConfig.from_pretrained(stage, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        check_fit(checkpoint, empty)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            stage,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        hf, account = loaded
        check_account(account, empty, directory)
        del empty
        tokenizer = _read_tokenizer(stage, directory, hf)
    check_finite(hf, directory)
    return hf, tokenizer, fingerprint(checkpoint)


def _read_gguf(path: Path) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForCausalLM

    _check_gguf(path)
    with _staged([path]) as stage, _translated(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            stage, gguf_file=path.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        hf, account = loaded
        check_account(account, hf, path)
        # The weights are plain floats by now; what says otherwise would turn the wrapper away.
        hf.hf_quantizer, hf.is_quantized = None, False
        for holder in (hf.__dict__, hf.config.__dict__):
            holder.pop("quantization_method", None)
            holder.pop("quantization_config", None)
        tokenizer = _read_tokenizer(stage, path, hf, gguf_file=path.name)
    check_finite(hf, path)
    return hf, tokenizer, fingerprint_file(path)


def _check_gguf(path: Path) -> None:
    """Refuse a file whose first bytes cannot begin a GGUF file of its size (ggml-org/ggml, docs/gguf.md)."""
    remedy = "Give an undamaged GGUF file of version 2 or 3."
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(24)
    except OSError as fault:
        raise ModelError(
            f"cannot be read ({fault.strerror})", where=str(path), remedy="Check the path and its permissions."
        ) from None
    version, tensors, fields = (int.from_bytes(head[a:b], "little") for a, b in ((4, 8), (8, 16), (16, 24)))
    if len(head) < 24 or head[:4] != b"GGUF" or version not in (2, 3):
        raise ModelError("not a GGUF file", where=f"{path}: header", remedy=remedy)
    # A tensor takes at least 32 bytes to describe, a field at least 13.
    if tensors * 32 + fields * 13 > size:
        raise ModelError(
            f"{tensors} tensors and {fields} fields do not fit {size} bytes", where=f"{path}: header", remedy=remedy
        )


def _read_tokenizer(stage: str, where: Path, hf: Any, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer

    def refuse(what: str) -> TokenizerError:
        return TokenizerError(
            what, where=str(where), remedy="Save the model's own fast tokenizer (tokenizer.json) beside the weights."
        )

    try:
        tokenizer = AutoTokenizer.from_pretrained(stage, local_files_only=True, **kwargs)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        _ = tokenizer.unk_token_id, tokenizer.all_special_ids  # found by calls that a bad name makes endless
        ids = tokenizer(_SENTENCES[0], return_offsets_mapping=True)["input_ids"] if tokenizer.is_fast else []
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # a panic in the Rust half of tokenizers is no Exception
        raise refuse(f"the tokenizer cannot be read ({_short(fault)})") from None
    if not tokenizer.is_fast or not ids:
        raise refuse("the tokenizer " + ("reads text as nothing" if tokenizer.is_fast else "gives no character spans"))
    rows = hf.get_input_embeddings().weight.shape[0]
    if max(largest, len(tokenizer) - 1) >= rows:
        raise refuse(f"the tokenizer has {max(largest + 1, len(tokenizer))} tokens, the embedding {rows} rows")
    tokenizer.name_or_path = str(where)
    return tokenizer


def _wrap(hf: Any, tokenizer: Any, spec: str, digest: str, tolerance: float) -> "Model":
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from .model import Model

    hf.eval()
    n_params = hf.num_parameters()
    # What the wrapper goes by, and what a hand-edited config.json need not say.
    hf.config.architectures = [type(hf).__name__]
    tokens, real = _probe(tokenizer, hf)
    with torch.no_grad(), _translated(Path(spec)):
        bare = hf(tokens, use_cache=False).logits.log_softmax(-1)[real]
        # The wrapper changes the tokenizer it is given, and ours must stay as it was saved. One that says it adds
        # a BOS token is spared being read from the disk again by the wrapper.
        theirs = copy.deepcopy(tokenizer)
        theirs.init_kwargs["add_bos_token"] = True
        bridge = TransformerBridge.boot_transformers("local/model", hf_model=hf, tokenizer=theirs, device="cpu")
        # Only now: where query, key and value are one matrix the wrapper has made parameters of its own.
        bridge.requires_grad_(False)
        model = Model(bridge, tokenizer, spec=spec, digest=digest, floor=0.0)
        model.n_params = n_params
        hooked = model.logits(tokens).log_softmax(-1)[real]
    if not bare.isfinite().all():
        raise ModelError(
            "the bare model's own predictions are not finite", where=spec, remedy="Check config.json and the weights."
        )
    model.floor = float((hooked - bare).abs().max())
    if not model.floor <= tolerance:
        raise WrapperError(
            f"hooked and bare forward differ by {model.floor:.3g} nats, more than {tolerance:.3g}",
            where=spec,
            remedy="Raise the tolerance only if results no finer than that are enough.",
        )
    return model


def _probe(tokenizer: Any, hf: Any) -> tuple["Tensor", "Tensor"]:
    """Tokens [2, pos] to compare forwards on, and the mask of real ones.

    Two sentences; where the tokenizer knows fewer than half of their tokens, seeded draws from its vocabulary.
    """
    import torch

    from .model import pad

    width = min(_PROBE_TOKENS, getattr(hf.config, "max_position_embeddings", None) or _PROBE_TOKENS)
    rows = [tokenizer(text)["input_ids"][:width] for text in _SENTENCES]
    unknown = sum(token == tokenizer.unk_token_id for row in rows for token in row)
    if 2 * unknown >= sum(map(len, rows)):
        known = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
        draws = torch.randint(len(known), (2, width), generator=torch.Generator().manual_seed(0))
        rows = known[draws].tolist()
    return pad(rows)


def _download(name: str) -> Path:
    """The snapshot of a hub repository: safetensors, JSON and tokenizer files of its top level, nothing else."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as fault:
        raise ModelError(
            f"cannot be fetched from the hub ({_short(fault)})",
            where=name,
            remedy="Check the name and the connection, or give a local directory.",
        ) from None


def _names_hub(parsed: ModelSpec, role: Role) -> bool:
    return parsed.kind == "hub" or (parsed.kind == "adapter" and parse_spec(parsed.base, role).kind == "hub")


@contextmanager
def _staged(files: list[Path]) -> Iterator[str]:
    """A temporary directory with links to ``files``; a tokenizer's own idea of where its files are is left out."""
    with tempfile.TemporaryDirectory(prefix="heredity-") as stage:
        for path in files:
            if path.name == "tokenizer_config.json":
                said = json.loads(path.read_text(encoding="utf-8"))
                kept = {k: v for k, v in said.items() if not k.endswith(("_file", "_files")) and k != "name_or_path"}
                Path(stage, path.name).write_text(json.dumps(kept), encoding="utf-8")
            else:
                Path(stage, path.name).symlink_to(path.resolve())
        yield stage


@contextmanager
def _translated(where: Path) -> Iterator[None]:
    """Turn whatever a library raises into one line about ``where``."""
    try:
        yield
    except HeredityError:
        raise
    except Exception as fault:
        raise ModelError(
            f"cannot be loaded ({_short(fault)})",
            where=str(where),
            remedy="Use a causal language model that this release of transformers and TransformerLens supports.",
        ) from None


def _short(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines() or [""]
    return one_line(f"{type(fault).__name__}: {_STAGE.sub('', lines[0])}", 200)


@contextmanager
def _quiet(online: bool) -> Iterator[None]:
    """Keep the libraries' bars and advice off the terminal, and, unless ``online``, keep them off the network."""
    import logging

    if not online:
        os.environ.setdefault(_OFFLINE, "1")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        from huggingface_hub import constants
        from transformers.utils import logging as hf_logging

        if hf_logging.is_progress_bar_enabled():
            stack.callback(hf_logging.enable_progress_bar)
            hf_logging.disable_progress_bar()
        if not _BANNED_BY_USER:
            stack.callback(setattr, constants, _OFFLINE, constants.HF_HUB_OFFLINE)
            constants.HF_HUB_OFFLINE = not online
        yield
