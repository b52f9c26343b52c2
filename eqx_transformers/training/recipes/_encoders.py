"""A model and the texts that it reads: loaded, held out, tokenized and put into batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ...sharding import row_share
from ..batching import AbstractLayout, Buckets
from ..data import Batches
from ..text import DataError, Records, read_texts
from ..tokens import TokenizedTexts, tokenize
from ._options import WrongUsage, expect_foreign, naming

LONGEST = 128  # tokens, where the model has room for more and nothing is said
SHAPES = 8  # lengths that batches are padded to, at most
Path_ = str | PathLike[str]


def several(paths: Path_ | Sequence[Path_]) -> list[Path_]:
    """One path or several, as several."""
    return [paths] if isinstance(paths, str | PathLike) else list(paths)


def read(paths: Sequence[Path_], text: str | tuple[str, str], options: Mapping[str, str]) -> Records:
    """The texts of several files, one after the other; `options` says by the column which option names another."""
    if not paths:
        raise WrongUsage("There are no files of texts: name one at least.")
    with naming(options):
        found = [read_texts(path, text=text) for path in paths]
    joined: Any = [[x for one in found for x in getattr(one, name)] for name in ("texts", "files", "lines")]
    return Records(joined[0], None, (), joined[1], joined[2], sum(one.blank for one in found))


def loaded(source: Path_, head: type, seed: int) -> tuple[Any, Any, str]:
    """(model, origin, what to say of it): a checkpoint in float32 under a head, which is drawn where it has none."""
    import converters

    expect_foreign(source)
    reports: list[Any] = []
    key = jax.random.key(seed)
    model, origin = converters.load(source, head=head, key=key, dtype="float32", announce=reports.append)
    new = sorted({path.rpartition(".")[0] for path in reports[0].new}) if reports else []
    return model, origin, f"{head.__name__} of {source}{', new: ' if new else ''}{', '.join(new)}"


def limit(model: Any, given: int | None, longest: int = LONGEST, option: str = "--max-length") -> int:
    """How many tokens a text may have: what is given; else what the model's table of positions has room for, and
    `longest` at most. Raises a `WrongUsage` for more than there is room for.
    """
    room = model.backbone.room
    if given is not None and room is not None and given > room:
        raise WrongUsage(f"{option} {given} is more than the {room} tokens that the model has room for.")
    return min(longest, room or longest) if given is None else given


def expect_known(ids: Int[np.ndarray, " tokens"], vocab_size: int) -> None:
    """Raises a `DataError` for a token that the model has no row for."""
    if ids.max() >= vocab_size:
        raise DataError(
            f"The tokenizer gives the token {ids.max()}, but the model's vocabulary has {vocab_size}: is"
            " tokenizer.json of another model?"
        )


def tokenized(texts: Sequence[str], tokenizer: Any, vocab_size: int, max_length: int) -> TokenizedTexts:
    """Single texts, cut to `max_length`. Raises a `DataError` for a token that the model has no row for."""
    tokens = tokenize(texts, tokenizer, max_length=max_length)
    expect_known(tokens.ids, vocab_size)
    return TokenizedTexts(tokens.ids, tokens.offsets, truncated=tokens.truncated)  # one text each: no types


def shuffled(
    texts: TokenizedTexts, layout: AbstractLayout, config: Any, seed: int, mesh: Any, **options: Any
) -> Batches:
    """Endless, of this process's rows."""
    return Batches(texts, layout, padding_id=_padding(config), seed=seed, process=row_share(mesh), **options)


def in_order(texts: TokenizedTexts, layout: AbstractLayout, config: Any, **options: Any) -> Batches:
    """Once, and the same every time."""
    return Batches(texts, layout, padding_id=_padding(config), shuffle=False, epochs=1, **options)


def same_lengths(texts: TokenizedTexts, rows: int, batches: Batches) -> Buckets:
    """Padded to lengths that there are batches of already, as far as these reach."""
    longest, lengths = int(texts.lengths.max()), sorted(length for _, length in batches.shapes)
    last = min((n for n in lengths if n >= longest), default=longest)
    return Buckets(rows, lengths=(*(n for n in lengths if n < last), last))


def measured(score: Callable[..., Any], model: Any, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The `loss` and what else a loss says with `score(model, batch)`: means over all that counts in the batches.

    `score` gives the numbers by name, and their `weight`.
    """
    found = [{name: float(x) for name, x in score(model, batch).items()} for batch in batches]
    weights = np.array([one["weight"] for one in found])
    mean = lambda name: float((weights * np.array([one[name] for one in found])).sum() / weights.sum())
    others = sorted(found[0].keys() - {"loss", "weight"})
    return {name: mean(name) for name in ["loss", *others]}


def improved(name: str, before: dict[str, float], after: dict[str, float], metric: str) -> str:
    """A line for the user."""
    return f"held-out {name}: {after[metric]:.3f} (was {before[metric]:.3f})"


def _padding(config: Any) -> int:
    return config.padding_id or 0
