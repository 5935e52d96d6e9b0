"""Gradients of encode and decode together, from one pass over the activations ordered by latent."""

from ... import dispatch

run = dispatch.Op("backward", __name__, lambda features, *_: features.values)
