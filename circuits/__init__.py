"""Causes and changes: where two models diverge, which parts carry it, and pictures of both."""
