"""sparsify (EleutherAI): ``{hookpoint}/cfg.json`` and ``{hookpoint}/sae.safetensors``.

The directory's name is the hookpoint, a module of the transformers model: a SAE reads its output, a transcoder its
input. ReLU, then the k largest; a SAE takes ``b_dec`` off its input, a transcoder does not; the skip connection reads
the input as it came.
"""

from pathlib import Path

from heredity.kernels import Activation, TopK

from ..record import Dictionary, Port
from . import places
from .arrays import open_safetensors
from .config import Fields, agreed, top
from .fold import centred, flipped

name = "sparsify"
hints = ("activation", "reads", "writes")


def recognises(path: Path) -> bool:
    """A directory with ``cfg.json`` and ``sae.safetensors``."""
    return (path / "cfg.json").is_file() and (path / "sae.safetensors").is_file()


def read(
    path: Path, activation: Activation | None = None, reads: str | None = None, writes: str | None = None
) -> Dictionary:
    """See :func:`.load_dictionary`."""
    fields = Fields.of_json(path / "cfg.json")
    arrays = open_safetensors(path / "sae.safetensors")
    d = fields.size("d_in")
    f = fields.size("num_latents") if fields.values.get("num_latents") else d * fields.size("expansion_factor")
    transcode, skip = fields.flag("transcode", False), fields.flag("skip_connection", False)
    if fields.flag("signed", False):
        raise fields.fault("signed activations are not supported", "signed", "Use an unsigned dictionary.")
    found: TopK | None = None
    if "activation" in fields:
        fields.choice("activation", ["topk"])
        found = top(fields.size("k"), f, fields)
    rule = agreed(found, activation, path, f"TopK({fields.values.get('k', 'k')})")
    arrays.only(["encoder.weight", "encoder.bias", "W_dec", "b_dec"] + ["W_skip"] * skip)
    W_enc = flipped(arrays.get("encoder.weight", f, d))
    b_enc, b_dec = arrays.get("encoder.bias", f), arrays.get("b_dec", d)
    source = places.of_module(path.resolve().name, "input" if transcode else "output")
    target = places.of_module(path.resolve().name, "output")
    source = places.told(source, reads, "reads", path)
    return Dictionary(
        kind="transcoder" if transcode else "sae",
        reads=(Port(source),),
        writes=(Port(places.told(target, writes, "writes", path) if transcode else source),),
        W_enc=(W_enc,),
        b_enc=b_enc if transcode else centred(b_enc, b_dec, W_enc),
        W_dec=(arrays.get("W_dec", f, d),),
        b_dec=(b_dec,),
        activation=rule,
        W_skip=flipped(arrays.get("W_skip", d, d)) if skip else None,
        provenance={"format": name, "hookpoint": path.resolve().name},
    )
