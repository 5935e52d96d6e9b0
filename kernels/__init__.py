"""Arithmetic on sparse features: encode, decode, their gradients, attribution and statistics over one type.

Every op has a plain reference, a fast CPU path and a Triton path behind one dispatcher; it knows neither models nor
files. All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
    from .dispatch import use
    from .features import FeatureCSR
    from .ops.attribute import attribute, attribute_errors
    from .ops.attribute.virtual import virtual_weights
    from .ops.autoencode import Autoencoded, autoencode
    from .ops.decode import decode, residual
    from .ops.encode import encode
    from .ops.statistics import Statistics, statistics

# transformers reads the version of anything importable as `kernels`, and older releases fail where there is none.
__version__ = "0.0"

_HOME = {
    "Activation": "activations",
    "Autoencoded": "ops.autoencode",
    "BatchTopK": "activations",
    "FeatureCSR": "features",
    "JumpReLU": "activations",
    "ReLU": "activations",
    "Statistics": "ops.statistics",
    "TopK": "activations",
    "attribute": "ops.attribute",
    "attribute_errors": "ops.attribute",
    "autoencode": "ops.autoencode",
    "decode": "ops.decode",
    "encode": "ops.encode",
    "residual": "ops.decode",
    "statistics": "ops.statistics",
    "use": "dispatch",
    "virtual_weights": "ops.attribute.virtual",
}

__all__ = [
    "Activation",
    "Autoencoded",
    "BatchTopK",
    "FeatureCSR",
    "JumpReLU",
    "ReLU",
    "Statistics",
    "TopK",
    "attribute",
    "attribute_errors",
    "autoencode",
    "decode",
    "encode",
    "residual",
    "statistics",
    "use",
    "virtual_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
