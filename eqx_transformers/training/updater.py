"""One step of training as a pure function: model, optimizer and loss -> the next state, and its metrics."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..nn._dtypes import wider
from ..surgery import Selection
from ._accumulation import Told, accumulated, called, divided, told_by


class TrainState(eqx.Module):
    """All that training goes on from, as one tree.

    `step` counts the updates that were tried, `skipped` those of them that were not finite and changed nothing. `key`
    never changes: step t draws from `fold_in(key, t)`, so that a state that was saved goes on as if nothing had been.
    """

    model: Any
    optimizer_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    key: PRNGKeyArray


class Updater(eqx.Module):
    r"""Training of any model by any optax transformation on any loss: `init` and `update`, both pure.

    - `loss(model, batch, *, key=None) -> value` or `(value, aux)`. `aux` is a dict of scalars, of which two have a
      meaning: `weight`, what the value is a mean of (rows, or tokens that count), and `tokens`, how many were seen.
      Where it does not say them, the weight is the number of rows, of those with weight in `batch["weights"]` if there
      are such, and the tokens are those of `batch["attention_mask"]` or of `batch["token_ids"]`. A loss with an
      argument `step` is told the step.
    - `optimizer`: an optax transformation, of the trained arrays alone, called under JAX's standard promotion. It is
      told the loss as `value` if it takes more arguments.
    - `trains`: which arrays are trained: None for all of floating point; a tree of bools like the model; a `Selection`;
      or a function of the model that gives such a tree (`adapter_mask`). The others have no gradient and no state.
    - `accumulate`: so many micro-batches are made of a batch and gone through one after the other. The gradient is the
      mean of theirs by weight: that of the batch, but for rounding, where the loss is a mean over rows or tokens.
    - `compute_dtype`: the loss sees a copy of the model whose floating-point arrays are of this dtype, trained or not;
      the arrays that are trained, their gradients and the optimizer's state keep theirs.
    - `clip_norm`: gradients are scaled down to this global norm where theirs is above it.
    - `skip_nonfinite`: where the loss or the norm of the gradient is not finite, model and optimizer's state stay.

    Raises a `ValueError` for settings out of range.
    """

    loss: Callable[..., Any] = eqx.field(static=True)
    optimizer: Any = eqx.field(static=True)
    trains: Any = eqx.field(static=True, default=None, kw_only=True)
    accumulate: int = eqx.field(static=True, default=1, kw_only=True)
    compute_dtype: Any = eqx.field(static=True, default=None, kw_only=True)
    clip_norm: int | float | None = eqx.field(static=True, default=None, kw_only=True)
    skip_nonfinite: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self):
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate = {self.accumulate!r} must be a whole number, at least 1: of micro-batches.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm!r} must be above 0; None is without clipping.")
        if self.compute_dtype is not None and not jnp.issubdtype(self.compute_dtype, jnp.floating):
            raise ValueError(f"compute_dtype = {self.compute_dtype!r} must be of floating point, jnp.bfloat16 say.")

    def init(self, model: Any, *, key: PRNGKeyArray) -> TrainState:
        """The state before the first step. Its arrays are copies, each with a buffer of its own, where the model's are.

        (An array that stands at two places of a model becomes two, which go their own ways: `shared_leaves` finds
        such.) Raises a `ValueError` where nothing would be trained.
        """
        model = jax.tree.map(_copied, model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer_state = self.optimizer.init(self._partition(model)[0])
        zero = lambda: jnp.zeros((), jnp.int32)
        state = TrainState(model, jax.tree.map(_copied, optimizer_state), zero(), zero(), _copied(key))
        leaves, treedef = jax.tree.flatten(state)
        return treedef.unflatten(_settled(leaves))

    def update(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        """The state after one step on a batch, and its metrics, all scalars:

        `loss`, `gradient_norm` (before clipping), `weight`, `tokens`, `finite`, and the loss's own. Every array of the
        batch has the rows as its leading axis. Compile it with `compiled`.
        """
        trained, frozen = self._partition(state.model)
        told, gradient = self._gradient(trained, frozen, batch, state)
        norm = _norm(gradient)
        finite = jnp.isfinite(told.value) & jnp.isfinite(norm)
        old = trained, state.optimizer_state
        stepped = lambda old: self._stepped(gradient, norm, told.value, *old)
        new = _where(finite, stepped, old) if self.skip_nonfinite else stepped(old)
        skipped = state.skipped + (~finite & self.skip_nonfinite).astype(jnp.int32)
        model = eqx.combine(new[0], frozen)
        said = {"loss": told.value, "gradient_norm": norm, "weight": told.weight, "tokens": told.tokens}
        return TrainState(model, new[1], state.step + 1, skipped, state.key), said | {"finite": finite} | told.aux

    def _partition(self, model: Any) -> tuple[Any, Any]:
        """(trained, frozen)."""
        mask = _mask(self.trains, model)
        mask = jax.tree.map(lambda chosen, x: bool(chosen) and eqx.is_inexact_array(x), mask, model)
        if not any(jax.tree.leaves(mask)):
            raise ValueError(
                f"Nothing would be trained: there is no floating-point array in this {type(model).__name__}"
                + (" that `trains` chooses." if self.trains is not None else ".")
            )
        return eqx.partition(model, mask)

    def _gradient(self, trained: Any, frozen: Any, batch: Any, state: TrainState) -> tuple[Told, Any]:
        key = jax.random.fold_in(state.key, state.step)
        frozen = _cast(frozen, self.compute_dtype)

        def told(trained: Any, batch: Any, key: PRNGKeyArray) -> tuple[Array, Told]:
            model = eqx.combine(_cast(trained, self.compute_dtype), frozen)
            said = told_by(called(self.loss, model, batch, key=key, step=state.step), batch)
            return said.value, said

        def one(batch: Any, key: PRNGKeyArray) -> tuple[Told, Any]:
            (_, said), gradient = eqx.filter_value_and_grad(told, has_aux=True)(trained, batch, key)
            return said, gradient

        if self.accumulate == 1:
            return one(batch, key)
        return accumulated(one, trained, divided(batch, self.accumulate), key)

    def _stepped(self, gradient: Any, norm: Array, value: Array, trained: Any, state: Any) -> tuple[Any, Any]:
        """(trained arrays, optimizer's state) after the step."""
        if self.clip_norm is not None:
            factor = jnp.minimum(1, self.clip_norm / norm)
            gradient = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)
        optimizer = optax.with_extra_args_support(self.optimizer)
        # Optax relies on promotion: of its own float32 numbers and Python's.
        with jax.numpy_dtype_promotion("standard"):
            updates, new = optimizer.update(gradient, state, trained, value=value)
            model = optax.apply_updates(trained, updates)
        alike = lambda x, old: x.astype(old.dtype) if eqx.is_array(x) else x
        return model, jax.tree.map(alike, new, state)


def compiled(updater: Updater) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """`updater.update`, compiled once for each shape of a batch. The state that is passed is donated: its buffers are
    used again, and it cannot be read afterwards.

    Arrays stay on the devices where they are: those of the new state lie as those of the old one.
    """
    programs: dict[Any, Any] = {}

    def call(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        leaves, treedef = jax.tree.flatten(state)
        leaves = _settled([_copied(x) if isinstance(x, np.ndarray) else x for x in leaves])
        arrays = [x if eqx.is_array(x) else None for x in leaves]
        rest = tuple(None if eqx.is_array(x) else x for x in leaves)
        at = (treedef, rest, _places(arrays))
        if at not in programs:
            programs[at] = _program(updater, *at)
        arrays, metrics = programs[at](arrays, batch)
        return _joined(treedef, arrays, rest), metrics

    return call


def _program(updater: Updater, treedef: Any, rest: tuple[Any, ...], places: Any) -> Callable[..., Any]:
    def run(arrays: list[Any], batch: Any) -> tuple[list[Any], dict[str, Array]]:
        state, metrics = updater.update(_joined(treedef, arrays, rest), batch)
        return [x if eqx.is_array(x) else None for x in jax.tree.leaves(state)], metrics

    # Without the places of the results, the compiler may choose others, and the next step would be compiled again.
    return jax.jit(run, donate_argnums=0, out_shardings=None if places is None else (list(places), None))


def _places(arrays: list[Any]) -> tuple[Any, ...] | None:
    """Where each array lies, if any is spread over several devices."""
    if not any(x is not None and x.committed and len(x.sharding.device_set) > 1 for x in arrays):
        return None
    return tuple(None if x is None else x.sharding for x in arrays)


def _joined(treedef: Any, arrays: list[Any], rest: tuple[Any, ...]) -> Any:
    return treedef.unflatten([other if x is None else x for x, other in zip(arrays, rest, strict=True)])


def _mask(trains: Any, model: Any) -> Any:
    if trains is None:
        return jax.tree.map(eqx.is_inexact_array, model)
    if isinstance(trains, Selection):
        return trains.mask(model)
    # A tree of bools in the shape of a model can be called as a model can: its structure tells it from a function.
    same = lambda mask: jax.tree.structure(mask) == jax.tree.structure(model)
    mask = trains(model) if not same(trains) and callable(trains) else trains
    if not same(mask) or not all(isinstance(x, bool | np.bool_) for x in jax.tree.leaves(mask)):
        raise ValueError(
            f"trains must be None, a tree of bools like the {type(model).__name__}, a Selection or a function that"
            f" gives such a tree, but it gives a {type(mask).__name__} that is none: adapter_mask or select(…)"
            " make one."
        )
    return mask


def _where(so: Bool[Array, ""], change: Callable[[Any], Any], old: Any) -> Any:
    """`change(old)`, or `old` where it is not so.

    By a branch: to choose between all numbers of both, the compiler would copy the old ones that are donated.
    """
    arrays, rest = eqx.partition(old, eqx.is_array)
    changed = lambda arrays: eqx.filter(change(eqx.combine(arrays, rest)), eqx.is_array)
    return eqx.combine(jax.lax.cond(so, changed, lambda arrays: arrays, arrays), rest)


def _norm(tree: Any) -> Float[Array, ""]:
    """The root of the sum of all squares, in float32 at least."""
    wide = lambda x: jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(wider(x.dtype, jnp.float32))
    return jnp.sqrt(sum((jnp.square(wide(x)).sum() for x in jax.tree.leaves(tree)), jnp.zeros(())))


def _cast(tree: Any, dtype: Any) -> Any:
    """The floating-point arrays of a tree in another dtype; None keeps it as it is."""
    is_real = lambda x: eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype) if is_real(x) else x, tree)


def _copied(x: Any) -> Any:
    """An array with a buffer of its own, where it lies; and of a dtype that is meant: a weak one changes in a step."""
    if isinstance(x, np.ndarray):
        return jnp.array(x)
    return jnp.array(x, dtype=x.dtype, copy=True) if isinstance(x, jax.Array) else x


def _settled(leaves: list[Any]) -> list[Any]:
    """With every array on the devices of the others: what lies nowhere in particular would be moved by a step, and the
    next one be compiled again."""
    is_free = [isinstance(x, jax.Array) and not x.committed for x in leaves]
    placed = [x.sharding for x in leaves if isinstance(x, jax.Array) and x.committed]
    if not placed or not any(is_free):
        return leaves
    meshes = [place.mesh for place in placed if isinstance(place, NamedSharding)]
    place = NamedSharding(meshes[0], PartitionSpec()) if meshes else placed[0]
    return [_put(x, place) if free else x for x, free in zip(leaves, is_free, strict=True)]


def _put(x: Array, place: Any) -> Array:
    # A typed key cannot be put onto devices of several processes, its numbers can.
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(x, place)
    return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), place), impl=jax.random.key_impl(x))
