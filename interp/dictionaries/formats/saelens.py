"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, as versions 5 and 6 write them and version 6 reads them.

What its inference does around the encoder is folded into the arrays:

- ``apply_b_dec_to_input``: b_enc - b_dec W_enc;
- ``gated`` (Rajamanoharan et al. 2024, arXiv:2404.16014): open where x W + b_gate > 0, worth x W eʳ + b_mag; that is
  JumpReLU on the second with threshold b_mag - eʳ b_gate;
- ``rescale_acts_by_decoder_norm``: W_enc and b_enc times, W_dec by the decoder's norms;
- ``finetuning_scaling_factor`` (5): on W_dec, since only the decoder sees it;
- ``layer_norm``: it divides by the unbiased standard deviation, the record by the biased one, so their ratio moves into
  the weights. It adds 1e-5 to the deviation only on the way in, the record both ways, which changes a reconstruction by
  1e-5 of the deviation.
"""

from pathlib import Path

import torch
from torch import Tensor

from heredity.kernels import Activation, BatchTopK, JumpReLU, ReLU

from ..record import Dictionary, Port, Scaling
from . import places
from .arrays import Arrays, open_safetensors
from .config import Fields, agreed, top
from .fold import centred, flipped, times

name = "saelens"
hints = ("activation", "reads", "writes", "input_scale")
_SAES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_NORMALISED = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}
_KEPT = ("model_name", "hook_name", "hook_name_out", "model_from_pretrained_kwargs", "prepend_bos", "context_size")


def recognises(path: Path) -> bool:
    """A directory with ``cfg.json`` and ``sae_weights.safetensors``."""
    return (path / "cfg.json").is_file() and (path / "sae_weights.safetensors").is_file()


def read(
    path: Path,
    activation: Activation | None = None,
    reads: str | None = None,
    writes: str | None = None,
    input_scale: float | int | None = None,
) -> Dictionary:
    """See :func:`.load_dictionary`."""
    fields = _as_version_6(Fields.of_json(path / "cfg.json"))
    arrays = open_safetensors(path / "sae_weights.safetensors")
    architecture = fields.choice("architecture", (*_SAES, *_TRANSCODERS))
    transcoder = architecture in _TRANSCODERS
    d, f = fields.size("d_in"), fields.size("d_sae")
    d_out = fields.size("d_out") if transcoder else d
    skip = "skip" in architecture
    gated = architecture == "gated"
    arrays.only(_names(architecture, fields))

    W_enc, W_dec, b_dec = arrays.get("W_enc", d, f), arrays.get("W_dec", f, d_out), arrays.get("b_dec", d_out)
    b_enc = arrays.get("b_mag" if gated else "b_enc", f)
    rule = _rule(architecture, fields, arrays, activation, path)
    if gated:
        factor = arrays.get("r_mag", f).double().exp()
        threshold = b_enc.double() - factor * arrays.get("b_gate", f).double()
        rule = agreed(JumpReLU(threshold.to(b_enc.dtype)), activation, path, "")
        W_enc = times(W_enc, factor)
    W_dec = _finetuned(fields, arrays, W_dec)
    if fields.flag("apply_b_dec_to_input", not transcoder):
        if transcoder:
            raise fields.fault("a transcoder's b_dec is not of its input", "apply_b_dec_to_input")
        b_enc = centred(b_enc, b_dec, W_enc)
    scaling, constant = _scaling(fields, input_scale, transcoder)
    W_enc, W_dec, b_dec = times(W_enc, constant), times(W_dec, 1 / constant), times(b_dec, 1 / constant)
    if fields.flag("rescale_acts_by_decoder_norm", False):
        # A latent that writes nothing is never active there: zero times anything.
        norms = W_dec.double().norm(dim=1)
        W_enc, b_enc = times(W_enc, norms), times(b_enc, norms)
        W_dec = times(W_dec, (1 / torch.where(norms > 0, norms, 1.0))[:, None])
    if scaling == "layer_norm":
        biased = ((d - 1) / d) ** 0.5
        W_enc, W_dec, b_dec = times(W_enc, biased), times(W_dec, 1 / biased), times(b_dec, 1 / biased)
    source, target = _places(fields, transcoder, reads, writes, path)
    return Dictionary(
        kind="transcoder" if transcoder else "sae",
        reads=(Port(source),),
        writes=(Port(target),),
        W_enc=(W_enc,),
        b_enc=b_enc,
        W_dec=(W_dec,),
        b_dec=(b_dec,),
        activation=rule,
        W_skip=flipped(arrays.get("W_skip", d_out, d)) if skip else None,
        scaling=scaling,
        provenance=_provenance(fields),
    )


def _as_version_6(fields: Fields) -> Fields:
    """A configuration of version 5 or before in the terms of version 6, which keeps what concerns the model apart."""
    meta = fields.inner("metadata")
    version = meta.text("sae_lens_version") or fields.text("sae_lens_version") or ""
    major = version.split(".")[0]
    if major.isdecimal() and int(major) >= 6:
        return Fields(fields.file, {**meta.values, **fields.values})
    values = {_RENAMED.get(key, key): value for key, value in {**meta.values, **fields.values}.items()}
    values.setdefault("architecture", "standard")
    if isinstance(normalised := values.get("normalize_activations"), bool):
        values["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    old = Fields(fields.file, values)
    if old.choice("activation_fn_str", ("relu", "topk"), "relu") == "topk":
        old.choice("architecture", ("standard", "topk"))
        extra = set(old.inner("activation_fn_kwargs").values) - {"k"}
        if extra:
            raise old.fault(f"{min(extra)} is not supported", "activation_fn_kwargs", "Only k can be computed exactly.")
        values |= {"architecture": "topk", "k": old.inner("activation_fn_kwargs").values.get("k")}
    return Fields(fields.file, values)


def _names(architecture: str, fields: Fields) -> list[str]:
    names = ["W_enc", "W_dec", "b_dec"] + (["b_gate", "r_mag", "b_mag"] if architecture == "gated" else ["b_enc"])
    names += ["threshold"] * ("jumprelu" in architecture) + ["W_skip"] * ("skip" in architecture)
    names += ["topk_threshold"] * ("batchtopk" in architecture)
    return names + ["scaling_factor", "finetuning_scaling_factor"] * ("finetuning_scaling_factor" in fields.values)


def _rule(architecture: str, fields: Fields, arrays: Arrays, hint: Activation | None, path: Path) -> Activation:
    found: Activation | None = None
    f = fields.size("d_sae")
    if "jumprelu" in architecture:
        found = JumpReLU(arrays.get("threshold", f))
    elif architecture == "topk":
        found = top(fields.size("k"), f, fields) if "k" in fields else None
    elif "batchtopk" in architecture:
        # An unfinished training run: at inference it is the threshold that decides, once there is one.
        threshold = float(arrays.get("topk_threshold")) if "topk_threshold" in arrays else 0.0
        found = BatchTopK(threshold=threshold) if threshold > 0 else None
    elif architecture == "gated":
        return ReLU()
    else:
        found = ReLU()
    usual = {"topk": "TopK(k)"}.get(architecture, "BatchTopK(threshold=…)")
    return agreed(found, hint, path, usual)


def _scaling(fields: Fields, scale: float | int | None, transcoder: bool) -> tuple[Scaling, float]:
    """What the record does to each token, and a constant factor before the encoder that is undone after the decoder."""
    how = fields.choice("normalize_activations", _NORMALISED, "none")
    if scale is not None and (how != "expected_average_only_in" or not 0 < scale < float("inf")):
        remedy = "Leave input_scale away." if scale > 0 else "Give the factor, above zero."
        raise fields.fault(f"normalize_activations is {how}, input_scale {scale}", "normalize_activations", remedy)
    if how == "none":
        return "none", 1.0
    if how == "expected_average_only_in":
        if scale is None:
            what = "inputs were multiplied by a constant in training, which no file holds"
            remedy = "Say input_scale=√d_in / their mean norm, or input_scale=1 if the weights have taken it up."
            raise fields.fault(what, "normalize_activations", remedy)
        return "none", float(scale)
    if transcoder:
        what = f"{how} of a transcoder, which scales what it reads but not what it writes, is not supported"
        raise fields.fault(what, "normalize_activations", "Use one trained without it.")
    if how == "constant_norm_rescale":
        return "unit_norm", 1.0
    return "layer_norm", 1.0


def _finetuned(fields: Fields, arrays: Arrays, W_dec: Tensor) -> Tensor:
    """The decoder with the factor that version 5 multiplies activations by before it."""
    stored = [name for name in ("finetuning_scaling_factor", "scaling_factor") if name in arrays]
    if not fields.flag("finetuning_scaling_factor", False):
        for name in stored:
            # Written for a while without being used.
            if not torch.allclose(factor := arrays.get(name, W_dec.shape[0]), torch.ones_like(factor)):
                raise arrays.fault("a factor that the configuration does not mention", name, "Use matching files.")
        return W_dec
    return times(W_dec, arrays.get(stored[0] if stored else "finetuning_scaling_factor", W_dec.shape[0])[:, None])


def _places(fields: Fields, transcoder: bool, reads: str | None, writes: str | None, path: Path) -> tuple[str, str]:
    model, hook, hook_out = fields.text("model_name"), fields.text("hook_name"), fields.text("hook_name_out")
    found = places.of_hook(hook, model) if hook else None
    if found and "hook_head_index" in fields:
        found = f"{hook}[{fields.values['hook_head_index']}]"
    source = places.told(found, reads, "reads", path)
    if not transcoder:
        return source, source
    return source, places.told(places.of_hook(hook_out, model) if hook_out else None, writes, "writes", path)


def _provenance(fields: Fields) -> dict[str, object]:
    kept = {key: fields.values[key] for key in _KEPT if fields.values.get(key) is not None}
    return {"format": name, "architecture": fields.values["architecture"], **kept}
