"""Dictionary files, one module a format."""
