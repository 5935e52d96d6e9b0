"""Gemma Scope (``params.npz``) and Gemma Scope 2 (``params.safetensors`` with ``config.json``).

JumpReLU; nothing is taken off the input (Lieberum et al. 2024, arXiv:2408.05147). Which place a dictionary reads stands
in the name of its repository or folder, or in ``config.json``, and not in the weights.
"""

import re
from pathlib import Path

from heredity.kernels import JumpReLU

from ...errors import DictionaryError
from ..record import Dictionary, Port
from . import places
from .arrays import Arrays, open_npz, open_safetensors
from .config import Fields

name = "gemma_scope"
hints = ("reads", "writes")
_FIRST = {
    "res": ("resid_post@{layer}", None),
    "att": ("blocks.{layer}.attn.hook_z", None),
    # Behind the second norm, which Gemma 2 has there.
    "mlp": ("blocks.{layer}.hook_mlp_out", None),
    "transcoders": ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
}
_SECOND = {
    "resid_post": ("model.layers.{layer}.output", None),
    "attn_out": ("model.layers.{layer}.self_attn.o_proj.input", None),
    "mlp_out": ("model.layers.{layer}.post_feedforward_layernorm.output", None),
    "transcoder": (
        "model.layers.{layer}.pre_feedforward_layernorm.output",
        "model.layers.{layer}.post_feedforward_layernorm.output",
    ),
}


def recognises(path: Path) -> bool:
    """A directory with ``params.npz`` or ``params.safetensors``, an ``.npz``, or a file of that second kind."""
    if path.is_file():
        return path.suffix == ".npz" or path.name == "params.safetensors"
    return (path / "params.npz").is_file() or (path / "params.safetensors").is_file()


def read(path: Path, reads: str | None = None, writes: str | None = None) -> Dictionary:
    """See :func:`.load_dictionary`."""
    file = path
    if path.is_dir():
        file = path / ("params.npz" if (path / "params.npz").is_file() else "params.safetensors")
    first = file.suffix == ".npz"
    source, target = _first_places(file) if first else _second_places(file)
    source = places.told(source, reads, "reads", path)
    target = places.told(target, writes, "writes", path) if target or writes else source
    return dictionary(open_npz(file) if first else open_safetensors(file), Port(source), Port(target))


def dictionary(arrays: Arrays, source: Port, target: Port) -> Dictionary:
    """The dictionary in a file of either kind.

    Raises:
        DictionaryError: other arrays than the format's, or of shapes that do not belong together.
    """
    big = "W_enc" in arrays
    W_enc, W_dec = ("W_enc", "W_dec") if big else ("w_enc", "w_dec")
    skip = "affine_skip_connection"
    arrays.only([W_enc, W_dec, "b_enc", "b_dec", "threshold"] + ([] if big else [skip]))
    d, f = arrays.shape(W_enc, 2)
    if not big and len(arrays.shapes.get(W_dec, ())) == 3:
        what = "a cross-layer dictionary in this layout is not supported"
        raise arrays.fault(what, W_dec, "Save it with circuit-tracer's to_safetensors.")
    d_out = arrays.shape(W_dec, 2)[1]
    return Dictionary(
        kind="sae" if source == target else "transcoder",
        reads=(source,),
        writes=(target,),
        W_enc=(arrays.get(W_enc, d, f),),
        b_enc=arrays.get("b_enc", f),
        W_dec=(arrays.get(W_dec, f, d_out),),
        b_dec=(arrays.get("b_dec", d_out),),
        activation=JumpReLU(arrays.get("threshold", f)),
        W_skip=arrays.get(skip, d, d_out) if skip in arrays else None,
        provenance={"format": name, "file": "/".join(arrays.file.resolve().parts[-4:])},
    )


def _first_places(file: Path) -> tuple[str | None, str | None]:
    whole = str(file.resolve())
    kind = re.search(r"gemma-scope-[0-9a-z]+-(?:pt|it)-(res|att|mlp|transcoders)(?![a-z])", whole)
    layer = re.search(r"layer_(\d{1,4})(?!\d)", whole)
    return _filled(_FIRST[kind[1]], int(layer[1])) if kind and layer else (None, None)


def _second_places(file: Path) -> tuple[str | None, str | None]:
    folder = "/".join(file.resolve().parts[-3:-1])
    source = target = None
    if (config := file.parent / "config.json").is_file():
        fields = Fields.of_json(config)
        fields.choice("architecture", ("jump_relu",))
        source, target = fields.text("hf_hook_point_in"), fields.text("hf_hook_point_out")
    else:
        layer = re.search(r"layer_(\d{1,4})(?!\d)", folder)
        for kind in _SECOND:
            if layer and kind in folder:
                source, target = _filled(_SECOND[kind], int(layer[1]))
    found = [None if each is None else places.of_module(*_ended(each, file)) for each in (source, target)]
    return found[0], found[1] if target != source else None


def _ended(module: str, file: Path) -> tuple[str, str]:
    name, _, end = module.rpartition(".")
    if end not in ("input", "output"):
        raise DictionaryError(
            f"{module!r} is neither input nor output of a module", where=str(file), remedy="Say reads= and writes=."
        )
    return name, end


def _filled(pair: tuple[str, str | None], layer: int) -> tuple[str, str | None]:
    return pair[0].format(layer=layer), None if pair[1] is None else pair[1].format(layer=layer)
