"""How well texts come back from their codes, beside what knows nothing of them, and what lies between two texts."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ...generation import generate
from ...latents import interpolate, picture, principal_plane, table
from ._gathered import fetched

Ids = Int[np.ndarray, "rows length"]
Codes = Float[np.ndarray, "rows codes size"]
Way = Float[np.ndarray, "points codes size"]
SHOWN = 600  # points of a picture


class Reconstruction:
    """Measures a `T5VAE` on texts that it was not trained on: rows of one length, padded behind their ends.

    `rows` of them are measured at once; `say(tokens)` makes text of a row.

    - `accuracy`: of all tokens of the texts, ends included, how many stand in the same place of what is said from the
      codes alone, every token from those said before: greedy and free-running. After a token too many, what follows
      stands in other places and counts as wrong.
    - `exact_match`: the share of texts that come back whole.
    - `shuffled_accuracy`: the accuracy where each text is said from the codes of another one.
    - `valid`: the share of what is said that `check` takes.
    - `teacher_forced_accuracy`, `loss` (the cross-entropy of a text) and `regulariser`: of `objective`.
    """

    def __init__(
        self,
        ids: Ids,
        rows: int,
        padding_id: int,
        objective: Callable[..., Any],
        say: Callable[[Any], str],
        check: Callable[[str], bool] | None = None,
    ):
        self.ids, self.padding_id, self.say, self.check = ids, padding_id, say, check
        self.rows, self.batches = rows, [_batch(x, padding_id) for x in _in_parts(ids, rows, padding_id)]
        self._objective = eqx.filter_jit(partial(objective, key=None))

    def __call__(self, model: Any) -> dict[str, float]:
        codes = self.codes(model)
        # Half way round: the neighbours of a text are often of one file, and alike.
        others = np.roll(codes, max(1, len(codes) // 2), axis=0)
        said = self.said(model, codes)
        found = {"accuracy": agreement(said, self.ids, self.padding_id)}
        found["exact_match"] = float((said == self.ids).all(1).mean())
        found["shuffled_accuracy"] = agreement(self.said(model, others), self.ids, self.padding_id)
        if self.check is not None:
            found["valid"] = float(np.mean([self.check(self.say(row)) for row in said]))
        return found | self._taught(model)

    def codes(self, model: Any) -> Codes:
        """The codes of the texts, without dropout or draws."""
        rows = [fetched(_encoded(model, x["token_ids"], x["attention_mask"])) for x in self.batches]
        return np.concatenate(rows)[: len(self.ids)]

    def said(self, model: Any, codes: Codes) -> Ids:
        """What codes stand for, padded behind its end."""
        t5, length = model.config.t5, self.ids.shape[1]
        call = partial(generate, model, max_new_tokens=length, end_ids=t5.end_id, padding_id=t5.padding_id)
        parts = [fetched(call(memory=x)) for x in _in_parts(codes, self.rows, 0)]
        return np.concatenate(parts)[: len(codes)]

    def _taught(self, model: Any) -> dict[str, float]:
        """What the objective says of batches, a mean over the tokens."""
        said = [self._objective(model, batch)[1] for batch in self.batches]
        tokens = np.array([float(aux["tokens"]) for aux in said])
        mean = lambda name: float(tokens @ [float(aux[name]) for aux in said] / tokens.sum())
        found = {"loss": mean("cross_entropy") * float(tokens.sum()) / len(self.ids)}
        found["teacher_forced_accuracy"] = mean("accuracy")
        return found | ({"regulariser": mean("regulariser")} if "regulariser" in said[0] else {})


def _in_parts(x: np.ndarray, rows: int, fill: int) -> list[np.ndarray]:
    """Parts of so many rows, in their order, the last one filled: one program serves all."""
    rest = np.full((-len(x) % rows, *x.shape[1:]), fill, x.dtype)
    return np.split(np.concatenate([x, rest]), -(-len(x) // rows))


def _batch(ids: Ids, padding_id: int) -> dict[str, np.ndarray]:
    """Rows as a loss takes them; those that only fill the shape have no weight."""
    mask = ids != padding_id
    weights = mask.any(1).astype(np.float32)
    mask[:, 0] = True  # attention to nothing is an edge
    return {"token_ids": ids, "attention_mask": mask.astype(np.int32), "weights": weights}


@eqx.filter_jit
def _encoded(model: Any, ids: Array | np.ndarray, mask: Array | np.ndarray) -> Float[Array, "rows codes size"]:
    return jax.vmap(lambda ids, mask: model.encode(ids, attention_mask=mask))(ids, mask)


def agreement(said: Ids, texts: Ids, padding_id: int) -> float:
    """The share of the texts' tokens that stand in the same place of what was said."""
    real = texts != padding_id
    return float(((said == texts) & real).sum() / real.sum())


def unigram_accuracy(train: Int[np.ndarray, "lines length"], held: Ids, padding_id: int) -> float:
    """The accuracy of the most frequent token of the training texts, or of that of each place, whichever is higher."""
    count = lambda ids: np.bincount(ids[ids != padding_id], minlength=1).argmax()
    places = np.array([count(train[:, place]) for place in range(train.shape[1])], train.dtype)
    guesses = (np.broadcast_to(count(train), held.shape), np.broadcast_to(places, held.shape))
    return max(agreement(guess, held, padding_id) for guess in guesses)


def interpolations(
    measure: Reconstruction, model: Any, codes: Codes, texts: Sequence[str], *, pairs: int, steps: int
) -> tuple[str, list[Way]]:
    """(tables of what stands between texts 0 and 1, 2 and 3, and so on, the codes on these ways)."""
    tables, ways = [], []
    for first in range(0, min(2 * pairs, len(codes) - 1), 2):
        ways.append(np.asarray(interpolate(jnp.asarray(codes[first]), jnp.asarray(codes[first + 1]), steps)))
        said = [measure.say(row) for row in measure.said(model, ways[-1])]
        shown = table(said, np.linspace(0, 1, steps))
        tables.append(f"from  {texts[first]}\nto    {texts[first + 1]}\n{shown}")
    return "\n\n".join(tables) + "\n", ways


def latent_picture(
    path: Path, codes: Codes, colours: Sequence[Any] | np.ndarray, *, what: str, meaning: str, ways: Sequence[Way] = ()
) -> None:
    """The plane along which codes vary most, and the ways between some.

    Raises a `ValueError` for fewer than three codes, and for codes of one number: they have no plane.
    """
    plane = principal_plane(jnp.asarray(codes))
    picture(
        np.asarray(plane(jnp.asarray(codes[:SHOWN]))),
        colours[:SHOWN],
        path=path,
        title=f"{what} of held-out lines: {float(plane.explained.sum()):.0%} of their variance",
        meaning=meaning,
        lines=[np.asarray(plane(jnp.asarray(way))) for way in ways],
    )
