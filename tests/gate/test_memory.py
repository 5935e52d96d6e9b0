import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from heredity.gate.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_a_large_block_that_was_freed_is_not_faulted_in_again():
    faults = [
        int(subprocess.run([sys.executable, "-c", COUNT, how], check=True, capture_output=True, text=True).stdout)
        for how in ("as it is", "kept")
    ]
    assert faults[1] * 5 < faults[0]
