"""Arithmetic on sparse features: encode, decode, their gradients, attribution and statistics over one type.

Every op has a plain reference, a fast CPU path and a Triton path behind one dispatcher; it knows neither models nor
files. All names are imported on first use; importing this package costs nothing and leaves torch alone.
"""

from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from .attribute import attribute, attribute_errors
from .attribute.virtual import virtual_weights
from .autoencode import Autoencoded, autoencode
from .decode import decode, residual
from .dispatch import use
from .encode import encode
from .features import FeatureCSR
from .statistics import Statistics, statistics

# transformers reads the version of anything importable as `kernels`, and older releases fail where there is none.
__version__ = "0.0"
