"""Other libraries' names of places, as sites where there is an exact equal, unchanged where there is none.

Models that norm what a block returns before adding it to the stream (Gemma 2 and 3, OLMo 2) have two outputs of it.
TransformerLens' ``hook_mlp_out`` and ``hook_attn_out`` are the normed one there, ours are what the module returns.
"""

import re
from pathlib import Path

from ...errors import DictionaryError
from ...sites import parse_site

_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    # TransformerBridge, and circuit-tracer's wrapper of the MLP.
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "attn.hook_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out",
}
_AFTER_NORM = ("hook_attn_out", "hook_mlp_out")
_NORMS_TWICE = re.compile(r"gemma-?[234]|olmo-?[23]", re.IGNORECASE)
_MODULES = {
    ("", "input"): "resid_pre",
    ("", "output"): "resid_post",
    ("mlp", "input"): "mlp_in",
    ("mlp", "output"): "mlp_out",
    ("self_attn", "output"): "attn_out",
    ("attn", "output"): "attn_out",
    ("attention", "output"): "attn_out",
    # Gemma: what the MLP reads.
    ("pre_feedforward_layernorm", "output"): "mlp_in",
}
_MODULE = re.compile(
    r"(?:model\.)?(?:language_model\.)?(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.(\d{1,9})(?:\.([a-z_0-9.]+))?"
)


def of_hook(name: str, model: str | None) -> str:
    """The site of a TransformerLens or TransformerBridge hook of ``model``; the hook's own name if there is none."""
    match = re.fullmatch(r"blocks\.(\d{1,9})\.([a-z_.]+)", name)
    if match is None:
        return "final" if name == "ln_final.hook_in" else name
    layer, hook = int(match[1]), match[2]
    if hook not in _HOOKS or (hook in _AFTER_NORM and _NORMS_TWICE.search(model or "")):
        return name
    return f"{_HOOKS[hook]}@{layer}"


def of_module(name: str, end: str) -> str:
    """The site at the ``end`` ("input" or "output") of a transformers module; ``name.end`` if there is none."""
    match = _MODULE.fullmatch(name)
    if match is None or (match[2] or "", end) not in _MODULES:
        return f"{name}.{end}"
    return f"{_MODULES[match[2] or '', end]}@{int(match[1])}"


def told(found: str | None, hint: str | None, which: str, path: Path) -> str:
    """The place the user names, or else the one the files name.

    Raises:
        DictionaryError: neither says it, or the user names no site.
    """
    if hint is not None:
        if parse_site(hint) is None:
            remedy = "Use a name such as resid_post@12 or mlp_out@3."
            raise DictionaryError(f"{which}={hint!r} is no site", where=str(path), remedy=remedy)
        return hint
    if not found:
        what = f"which place it {which} cannot be told from its files"
        raise DictionaryError(what, where=str(path), remedy=f'Say it: load_dictionary(…, {which}="resid_post@12").')
    return found
