"""What a process keeps of the machine."""

import platform
import subprocess
import sys

import pytest

# Prints how many pages the system had to hand out while 20 tensors of 40 MiB came and went, after
# as many that the heap grew for.
COUNT_FAULTS = """
import resource, sys, torch
from cs336_alignment.cores import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(10 * 2**20).fill_(1.0)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_memory_asked_for_again_costs_no_page_faults() -> None:
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS, how]))
        for how in ("keep", "as it comes")
    )
    assert kept < 100 < returned
