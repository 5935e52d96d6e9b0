"""Arithmetic on sparse features: knows neither models nor files. Empty until the first op lands."""
