"""How the suite compiles: quickly, but for what is said of users' numbers to the last digits."""

import os
from collections.abc import Callable
from typing import Any

import jax

# Of compiling, which is most of what the suite does, they take two fifths.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]


def choose_quick() -> None:
    """For all processes that start from now on, if XLA knows the options: an unknown flag would end them."""
    try:
        jax.jit(lambda x: x, compiler_options=QUICK)(1.0)
    except jax.errors.JaxRuntimeError:
        return
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()


def as_users_do(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` compiled with every optimisation: without, tanh is another one, whose last digit differs."""

    def called(*args: Any) -> Any:
        jax.config.update("jax_disable_most_optimizations", False)
        try:
            return jax.jit(f)(*args)
        finally:
            jax.config.update("jax_disable_most_optimizations", True)

    return called
