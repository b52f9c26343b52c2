"""What a step frees, kept by the process for the next step."""

import ctypes
import sys

# Of <malloc.h>: how much free memory at the heap's end is given back; how many blocks may be mapped one by one; how
# many heaps there are. Only the first heap can hold a large block that is not mapped.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Tells glibc not to give freed memory back to the system; whether there is a glibc that could be told.

    A compiled step on a processor asks for its working memory anew each time, hundreds of megabytes, and glibc maps
    and unmaps it, so that the system clears every page again. For programs of our own alone, before anything is
    computed: it holds for the whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    options = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
    return all(mallopt(name, value) for name, value in options.items())
