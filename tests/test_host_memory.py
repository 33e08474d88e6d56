import subprocess
import sys

FAULTS = """
import resource, sys, torch
from pgm_scale.host_memory import keep_freed_memory

def fill_and_free():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
print(*(fill_and_free() for _ in range(5)))
"""


def test_a_block_that_was_freed_is_not_faulted_in_again():
    """64 MiB are 16,384 small or 32 huge pages; other threads and the interpreter fault a few.

    The least of the later fills: an aligned block may get a new place in the heap once.
    """

    def faults(mode):
        output = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
        )
        return [int(word) for word in output.stdout.split()]

    assert min(faults("keep")[1:]) < 16
    assert min(faults("default")[1:]) >= 32
