"""What the allocator was told shows in the page faults of blocks that come and go."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from research.speed.allocation import keep_freed_memory
assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(40_000_000, dtype=np.uint8)
before = faults()
for _ in range(5):
    np.ones(40_000_000, dtype=np.uint8)
assert faults() - before < 2_000, faults() - before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_freed_block_is_used_again_without_new_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
