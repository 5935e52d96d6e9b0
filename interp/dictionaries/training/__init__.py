"""Training dictionaries from activation stores or from running models."""
