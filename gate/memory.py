"""How the process holds memory it has freed."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_MOST = 2**31 - 1


def keep_freed() -> None:
    """Let glibc keep freed blocks for the next ones, however large.

    By default it hands every large block back, and the system zeroes the next one page by page: a third of the time of
    comparing logits of a large vocabulary. Other C libraries have no such setting and are left as they are.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _MOST)
