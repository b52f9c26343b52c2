"""The optimizers of the original systems as their programs have them, with the numbers of their articles."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from .optimizers import adam_uncorrected
from .schedules import Schedule, Step


def haiku_tutorial(
    learning_rate: int | float = 2e-4, *, clip_norm: int | float = 0.25, b1: int | float = 0.9, b2: int | float = 0.99
) -> optax.GradientTransformation:
    """Of Haiku's causal language model: gradients clipped by their global norm, then Adam.

    The numbers are those of the official example that the tutorial copies; that of today has `learning_rate=3e-4`,
    `clip_norm=1.0` and Adam's own `b2=0.999`.
    """
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(learning_rate, b1=b1, b2=b2))


def roberta_article(
    learning_rate: int | float = 1e-5,
    total_steps: int | float = 31_250,
    *,
    warmup: int | float = 0.1,
    max_grad_norm: int | float = 1.0,
) -> optax.GradientTransformation:
    """Of the RoBERTa article: gradients clipped by their global norm, Adam, then times `roberta_scale`.

    Step 0 has the factor 0 and changes nothing but Adam's moments.
    """
    scale = optax.scale_by_schedule(roberta_scale(total_steps, warmup))
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(learning_rate), scale)


def roberta_scale(total_steps: int | float, warmup: int | float = 0.1) -> Schedule:
    r"""$\min(p / w, 1) (1 - p)$ where $p = t / T$: up over the first part $w$ of $T$ steps, down from the first one on.

    Not `warmup_linear`, which falls from the end of the warm-up: here the highest factor is $1 - w$.
    """

    def scale(step: Step) -> Float[Array, "*steps"]:
        progress = jnp.asarray(step, jnp.float32) / total_steps
        rise = jnp.minimum(progress / warmup, 1.0) if warmup else jnp.ones_like(progress)
        return rise * (1 - progress)

    return scale


def functional_transformer(
    learning_rate: int | float = 0.001,
    *,
    b1: int | float = 0.9,
    b2: int | float = 0.99,
    method: Literal["adam", "sgd", "sign"] = "adam",
    clip: int | float | None = None,
) -> optax.GradientTransformation:
    """Of the purely functional transformer: `adam_uncorrected`, or plain gradient descent (its `-sgd`).

    With "sign", descent by the sign of every number of the gradient (its former `-1bit`). Its ancestor cuts every
    number to [-1, 1] first, `clip=1.0`, and has `b2=0.999`.
    """
    signs = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    methods = {
        "adam": lambda: adam_uncorrected(learning_rate, b1, b2),
        "sgd": lambda: optax.sgd(learning_rate),
        "sign": lambda: optax.chain(signs, optax.sgd(learning_rate)),
    }
    if method not in methods:
        raise ValueError(f"method = {method!r} is not one of {', '.join(methods)}.")
    return methods[method]() if clip is None else optax.chain(optax.clip(clip), methods[method]())
