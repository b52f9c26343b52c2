"""The tensors of a file against the arrays of a model: set algebra over every key and every path, shapes only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from eqx_transformers.tensor_file import Spec

from . import diagnosis
from .ops import SAME
from .report import Report, Shape, nearest
from .rules import Ignore, Link, Table, Tie

LISTED = 20  # of the unexpected keys, so many come with the nearest name: looking for it takes milliseconds a key


def examine(
    table: Table,
    links: Iterable[Link],
    leaves: Mapping[str, Any],
    specs: Mapping[str, Spec],
    spell: Any,
    *,
    new: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    config: Any = None,
    **facts: Any,
) -> Report:
    """Compares shapes only. `specs` are by today's keys, `spell` gives a key as the file spells it.

    A key or an array that two rules claim, or an array that no rule fills, is a fault of the table: `AssertionError`.
    """
    links, new = tuple(links), set(new)
    ties = {one.theirs: one.to for one in table if isinstance(one, Tie)}
    claimed = Counter(key for link in links for key in link.keys)
    filled = Counter(path for link in links for path in link.ours)
    _expect_sound(claimed, filled, leaves, new)
    missing, mismatched = {}, {}
    for link in links:
        absent = [key for key in link.keys if key not in specs]
        missing |= {spell(key): link.ours[0] for key in absent}
        if not absent:
            mismatched |= {spell(k): v for k, v in _mismatches(link, leaves, specs).items()}
    tied, ignored, dropped, unexpected = {}, {}, {}, {}
    for key in specs.keys() - claimed.keys():
        why = next((one for one in table if isinstance(one, Ignore) and one.matches(key)), None)
        if key in ties:
            owner = ties[key]
            if owner in specs and specs[owner].shape != specs[key].shape:
                mismatched[spell(key)] = specs[owner].shape, specs[key].shape
            if spell(key) != spell(owner):  # a file may have one key for both
                tied[spell(key)] = spell(owner)
        elif why is not None:
            (dropped if why.parameter else ignored)[spell(key)] = why.why
        elif any(fnmatchcase(spell(key), glob) for glob in allow_unexpected):
            ignored[spell(key)] = "allowed by allow_unexpected"
        else:
            unexpected[spell(key)] = ""
    sort = lambda entries: dict(sorted(entries.items()))
    known = [spell(k) for k in claimed if k not in specs] or list(claimed)
    unexpected |= {key: nearest(key, known) for key in sorted(unexpected)[:LISTED]}
    read = [key for link in links for key in link.keys if key in specs]
    held = {spell(key): s for key, s in specs.items()}
    return Report(
        missing=sort(missing),
        unexpected=sort(unexpected),
        mismatched=sort(mismatched),
        tied=sort(tied),
        ignored=sort(ignored),
        dropped=sort(dropped),
        new={path: tuple(leaves[path].shape) for path in leaves if path in new},
        renamed=sort({spell(key): key for key in specs if _last(spell(key)) != _last(key)}),
        links=links,
        num_tensors=len(held),
        num_parameters=sum(prod(s.shape) for s in held.values() if s.dtype[0] in "FB" and s.dtype != "BOOL"),
        num_bytes=sum(s.stored for s in held.values()),
        num_read=sum(specs[key].stored for key in read),
        dtypes=tuple(sorted({s.dtype for s in specs.values()})),
        spelled={key: spell(key) for link in links for key in link.keys},
        tensors={key: (s.dtype, s.shape, s.stored) for key, s in held.items()},
        causes=diagnosis.causes(missing, unexpected, mismatched, config),
        **facts,
    )


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _expect_sound(claimed: Counter, filled: Counter, leaves: Mapping[str, Any], new: set[str]) -> None:
    twice = [name for c in (claimed, filled) for name, n in c.items() if n > 1]
    holes = [path for path in leaves if path not in filled and path not in new]
    if twice or holes:
        raise AssertionError(f"The family's table claims {twice} twice and leaves {holes} unfilled; this is a bug.")


def _mismatches(link: Link, leaves: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, tuple[Shape, Shape]]:
    """Keys whose shape is not the one that the model's arrays would write."""
    if link.op is SAME:  # most rules: nothing to trace
        wanted = {row[0]: leaves[link.ours[0]].shape[len(link.sizes) :] for row in link.theirs}
    else:
        traced = jax.eval_shape(lambda: link.write(lambda path: jnp.zeros(leaves[path].shape)))
        wanted = {key: x.shape for key, x in traced.items()}
    return {key: (shape, specs[key].shape) for key, shape in wanted.items() if shape != specs[key].shape}
