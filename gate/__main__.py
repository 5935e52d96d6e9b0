"""``python -m heredity.gate`` is the ``heredity`` command."""

from .cli import main

if __name__ == "__main__":
    main()
