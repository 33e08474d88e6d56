"""Keep the memory that tensors free, so that the next ones need not pay for it again.

By default glibc gives a large block back to the system as soon as it is freed, and the system clears the next one
page by page at its first touch. A training or sampling step makes the same buffers again and again. What keeping
them is worth depends on how many there are: on 2 cores 2.2x for a step with all logits and dense masks, between
nothing and 1.4x for ours, which makes fewer (`ops/bench/LOG.md`).
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let malloc take every block from a heap that never shrinks, in huge pages where the system offers them.

    Call it before the first large tensor: torch asks only once whether it may use huge pages. The process stays as
    large as its largest moment, and holes in the heap may add to that (14% in the measurement above).

    Returns:
        False where the C library is not glibc; nothing is changed there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: 2 MiB alignment and MADV_HUGEPAGE
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _TOP_PAD_BYTES}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
