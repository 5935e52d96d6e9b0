"""Explanations: readable, executable rules that predict where something is active, scored on held-out text."""
