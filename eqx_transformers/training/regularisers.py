"""What an autoencoder's loss has beside the cross-entropy: what keeps its latents near the prior, and how strongly."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..models.t5_vae import reparameterised as reparameterised
from ..nn._dtypes import wider

# So many differences of two vectors' numbers exist at a time, in float32 16 MiB: see `mmd`.
BLOCK = 2**22


class AbstractKernel(eqx.Module):
    """How alike two vectors are, $k(x, y)$, from their squared distance alone: 1 for equal ones."""

    @abc.abstractmethod
    def minus_one(self, squared: Float[Array, "*pairs"], dim: int) -> Float[Array, "*pairs"]:
        """$k - 1$ of squared distances between vectors of `dim` numbers, without the digits that a 1 would cost."""

    def __call__(self, squared: Float[Array, "*pairs"], dim: int) -> Float[Array, "*pairs"]:
        """$k$ of squared distances between vectors of `dim` numbers."""
        return 1 + self.minus_one(squared, dim)


class OriginalKernel(AbstractKernel):
    r"""$k(x, y) = \exp(-|x - y|^2 / d^2)$ for vectors of $d$ numbers: the T5-VAE's. It divides by $d$ twice.

    The wider the vectors, the flatter it is: of two draws from the standard normal, $k \approx 1 - 2 / d$. The
    discrepancy of wide vectors is therefore small, and mostly that of their means.

    Source: https://github.com/Fraser-Greenlee/T5-VAE.
    """

    def minus_one(self, squared: Float[Array, "*pairs"], dim: int) -> Float[Array, "*pairs"]:
        return jnp.expm1(-squared / dim**2)


class RBF(AbstractKernel):
    r"""$k(x, y) = \frac{1}{|B|} \sum_{b \in B} \exp(-|x - y|^2 / 2 b^2)$, the Gaussian kernel, of several widths.

    `bandwidths` are the $b$. By default they are $\sqrt d / 2$, $\sqrt d$ and $2 \sqrt d$ for vectors of $d$ numbers:
    two draws from the standard normal are about $\sqrt{2 d}$ apart, where a width of $c \sqrt d$ gives
    $\exp(-1 / c^2)$, so that none of the three is flat and none is blind there, however wide the vectors are. Raises
    a `ValueError` when they are none, or not above zero.

    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13.
    """

    bandwidths: tuple[float, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.bandwidths is not None and not (self.bandwidths and min(self.bandwidths) > 0):
            raise ValueError(f"bandwidths = {self.bandwidths} must be numbers above zero, at least one, or None.")

    def minus_one(self, squared: Float[Array, "*pairs"], dim: int) -> Float[Array, "*pairs"]:
        widths = self.bandwidths or tuple(c * dim**0.5 for c in (0.5, 1.0, 2.0))
        return sum((jnp.expm1(-squared / (2 * b * b)) for b in widths), jnp.zeros_like(squared)) / len(widths)


ORIGINAL = OriginalKernel()


def mmd(
    x: Float[Array, "samples dim"],
    y: Float[Array, "others dim"],
    kernel: AbstractKernel = ORIGINAL,
    *,
    unbiased: bool = False,
) -> Float[Array, ""]:
    r"""The squared maximum mean discrepancy of two sets of vectors, $\bar k(x, x) + \bar k(y, y) - 2 \bar k(x, y)$.

    $\bar k$ is the mean of the kernel over all pairs: also a vector's with itself, as in the T5-VAE. That one is never
    below zero, but for rounding, and above it on average even for two samples of one distribution. With `unbiased`, no
    vector is paired with itself: the average is right, and single values may be negative.

    Computed in float32 at least. Distances are sums of squared differences, not $|x|^2 + |y|^2 - 2 x \cdot y$, which
    loses the digits of small ones and may be negative: equal vectors are exactly 0 apart, and gradients are finite
    everywhere. The differences of all pairs never exist at once. They are made for as many rows of `x` as fit into
    4 million numbers (one at least), in the backward pass once more; what is held is that, and a few matrices
    `samples others`.

    Raises a `ValueError` where vectors differ in size, or a set is too small: one vector, two with `unbiased`.
    Source: Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13, lemma 6.
    """
    return _discrepancy(x, y, kernel, unbiased, None)


def mmd_to_prior(
    latents: Float[Array, "batch tokens size"],
    *,
    key: PRNGKeyArray | None = None,
    noise: Float[Array, "others dim"] | None = None,
    per_token: bool = False,
    kernel: AbstractKernel = ORIGINAL,
    unbiased: bool = False,
    weights: Float[Array | np.ndarray, " batch"] | None = None,
) -> Float[Array, ""]:
    """`mmd` of latents and a draw from the standard normal: as many vectors with `key`, or those of `noise`.

    A sequence is one sample, `tokens * size` wide; `per_token` makes each of its latent tokens one, `size` wide, in
    the order of the batch. Flat is as the PyTorch T5-VAE has it; token by token, nothing is said of how the tokens of
    one sequence go together. `weights` say how much each sequence counts, and the draw at its place: those of 0, which
    fill a batch, have no effect, be they NaN. Raises a `ValueError` unless there is a `key` or a `noise`, and not both,
    and where the shapes do not fit.
    """
    if latents.ndim != 3:
        raise ValueError(f"latents must be (batch, tokens, size), but they are {latents.shape}.")
    batch, tokens, size = latents.shape
    samples = latents.reshape((batch * tokens, size) if per_token else (batch, tokens * size))
    if key is not None and noise is None:
        noise = jax.random.normal(key, samples.shape, wider(latents.dtype, jnp.float32))
    elif key is not None or noise is None:
        raise ValueError("mmd_to_prior needs a draw from the prior: give key or noise, one of them.")
    if weights is not None:
        _expect_weights(weights, batch)
        if len(noise) != len(samples):
            raise ValueError(f"weights count draws too: {len(samples)} are needed, but noise has {len(noise)}.")
        weights = jnp.repeat(jnp.asarray(weights), tokens if per_token else 1)
    return _discrepancy(samples, noise, kernel, unbiased, weights)


def kl(
    mean: Float[Array, "batch *dims"],
    log_variance: Float[Array, "batch *dims"],
    *,
    free_bits: int | float | Float[Array, ""] = 0.0,
    weights: Float[Array | np.ndarray, " batch"] | None = None,
) -> Float[Array, ""]:
    r"""$\sum_j \max(\lambda, \overline{\mathrm{KL}_j})$ nats a sequence, from $N(\mu, \sigma^2)$ to $N(0, 1)$.

    $\mathrm{KL}_j = \frac12 (\mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2)$, the bar is the mean over the batch, and $j$
    goes over all numbers of a sequence's latents. $\lambda$ is `free_bits`: a dimension that costs less is not pressed
    further, which keeps it from carrying nothing. Its mean over the batch counts, not each sequence for itself, so
    that a dimension may be spent on few of them. With 0, the result is the mean of the sequences' divergences.
    `weights` say how much each sequence counts in it: those of 0, which fill a batch, have no effect, be they NaN.

    Computed in float32 at least. Raises a `ValueError` where the shapes differ, or `free_bits` is a number below zero.
    Source: Kingma et al. 2016, arXiv:1606.04934 (its groups are the single dimensions here).
    """
    _expect_same("mean", mean, "log_variance", log_variance)
    if isinstance(free_bits, int | float) and free_bits < 0:
        raise ValueError(f"free_bits = {free_bits} must be at least 0, in nats: what a dimension costs at least.")
    dtype = wider(mean.dtype, log_variance.dtype, jnp.float32)
    mean, log_variance = mean.astype(dtype), log_variance.astype(dtype)
    if weights is not None:
        _expect_weights(weights, len(mean))
        weights = jnp.asarray(weights, dtype)
        mean, log_variance = _counted(mean, weights), _counted(log_variance, weights)
    each = (jnp.square(mean) + (jnp.expm1(log_variance) - log_variance)) / 2
    average = each.mean(0) if weights is None else jnp.tensordot(weights, each, 1) / _some(weights.sum())
    return jnp.maximum(average, jnp.asarray(free_bits, dtype)).sum()


def reconstruction_loss(
    states: Float[Array, "*axes seq dim"],
    rebuilt: Float[Array, "*axes seq dim"],
    mask: Bool[Array | np.ndarray, "*axes seq"] | Integer[Array | np.ndarray, "*axes seq"] | None = None,
) -> Float[Array, ""]:
    """The mean squared error of an encoder's states, rebuilt from latents: of all numbers of all tokens that count.

    Those are the tokens where `mask` is not 0, which share one mean, or all: the T5-VAE counts the padding too. What
    stands where the mask is 0 has no effect, be it NaN; where nothing counts, the loss and its gradients are zero.
    Computed in float32 at least. Raises a `ValueError` where shapes differ.
    """
    _expect_same("states", states, "rebuilt", rebuilt)
    dtype = wider(states.dtype, rebuilt.dtype, jnp.float32)
    real = jnp.ones(states.shape[:-1], bool) if mask is None else jnp.asarray(mask).astype(bool)
    if real.shape != states.shape[:-1]:
        raise ValueError(f"mask must have the shape {states.shape[:-1]}, one entry a token, but it is {real.shape}.")
    difference = states.astype(dtype) - rebuilt.astype(dtype)
    # The inner choice is made before squaring: the gradient of a NaN that is dropped afterwards would be NaN.
    squares = jnp.square(jnp.where(real[..., None], difference, 0))
    return squares.sum() / jnp.maximum(real.sum() * states.shape[-1], 1).astype(dtype)


def logistic_weight(
    step: int | float | Integer[Array, "*steps"] | Float[Array, "*steps"],
    *,
    slope: float = 0.0025,
    offset: float = 6.25,
) -> Float[Array, "*steps"]:
    r"""$1 / (1 + e^{\mathrm{offset} - \mathrm{slope} \cdot \mathrm{step}})$: a regulariser's weight, in float32.

    From almost 0 over 1/2 at `offset / slope` steps, 2,500 by default, to 1. It is an optax schedule as it is; with
    other numbers, `functools.partial(logistic_weight, slope=..., offset=...)` is. The defaults are the T5-VAE's.
    """
    return jax.nn.sigmoid(jnp.asarray(step, jnp.float32) * slope - offset)


def _discrepancy(
    x: Float[Array, "samples dim"],
    y: Float[Array, "others dim"],
    kernel: AbstractKernel,
    unbiased: bool,
    weights: Float[Array, " samples"] | None,
) -> Float[Array, ""]:
    """`mmd`, where the vectors count as `weights` say, in both sets alike."""
    _expect_samples(x, y, 2 if unbiased else 1)
    dtype = wider(x.dtype, y.dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)
    # The ones of the three means cancel, and a vector's pair with itself adds nothing to k - 1.
    pairs = lambda a, b: kernel.minus_one(_squared_distances(a, b), a.shape[-1])
    if weights is None:
        own = lambda a: pairs(a, a).sum() / (len(a) * (len(a) - unbiased))
        return own(x) + own(y) - 2 * (pairs(x, y).sum() / (len(x) * len(y)))
    weights = weights.astype(dtype)
    x, y = _counted(x, weights), _counted(y, weights)
    total = lambda a, b: weights @ pairs(a, b) @ weights
    both = jnp.square(weights.sum())
    others = both - jnp.square(weights).sum() if unbiased else both
    return (total(x, x) + total(y, y)) / _some(others) - 2 * total(x, y) / _some(both)


def _counted(x: Float[Array, "rows *dims"], weights: Float[Array, " rows"]) -> Float[Array, "rows *dims"]:
    """Zero in rows that do not count: what is dropped after a product with 0 may have been NaN."""
    return jnp.where(weights.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, jnp.zeros((), x.dtype))


def _some(total: Float[Array, ""]) -> Float[Array, ""]:
    """What can be divided by: 1 where nothing counts."""
    return jnp.where(total > 0, total, jnp.ones((), total.dtype))


def _expect_weights(weights: Array | np.ndarray, batch: int) -> None:
    if weights.shape != (batch,):
        raise ValueError(f"weights must have one entry a sequence, {batch}, but they are {weights.shape}.")


def _squared_distances(x: Float[Array, "samples dim"], y: Float[Array, "others dim"]) -> Float[Array, "samples others"]:
    one = lambda row: jnp.square(row[None] - y).sum(-1)
    rows = max(1, BLOCK // max(1, y.size))
    # Without the checkpoint, the backward pass would keep the differences of every block.
    return jax.vmap(one)(x) if rows >= len(x) else jax.lax.map(jax.checkpoint(one), x, batch_size=rows)


def _expect_samples(x: Array, y: Array, least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"Two sets of vectors of one size are compared, but they are {x.shape} and {y.shape}.")
    if min(len(x), len(y)) < least:
        kind = "unbiased discrepancy" if least > 1 else "discrepancy"
        raise ValueError(f"The {kind} needs {least} vectors a set at least, but there are {len(x)} and {len(y)}.")


def _expect_same(name: str, x: Array, other: str, y: Array) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name} and {other} must have one shape, but they are {x.shape} and {y.shape}.")
