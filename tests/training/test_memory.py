"""A program that keeps what it frees asks the system for no page again."""

import ctypes
import subprocess
import sys

CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from eqx_transformers.training._memory import keep_freed

kept = keep_freed() if sys.argv[1] == "keep" else None
f = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0))  # the product, 64 MiB, exists within a call alone
x = jnp.ones((4096, 16))
f(x).block_until_ready()
f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    f(x).block_until_ready()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def pages(how):
    """(what `keep_freed` said, how many pages a call made the system clear)."""
    found = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, check=True, timeout=240)
    said, count = found.stdout.split()
    return said, int(count)


def test_what_is_freed_is_used_again():
    (_, without), (said, kept) = pages("leave"), pages("keep")
    is_glibc = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
    assert said == str(is_glibc)
    assert not is_glibc or kept < without / 4
