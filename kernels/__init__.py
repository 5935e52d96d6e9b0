"""Arithmetic on sparse features: knows neither models nor files. Empty until the first op lands."""

# transformers reads the version of anything importable as `kernels`, and older releases fail where there is none.
__version__ = "0.0"
