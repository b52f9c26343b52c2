"""What files of causal models have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eqx_transformers import CausalLM, SequenceClassifier

from ..config import fact, whole
from ..rules import Ignore, Rule, Table, Tie, rule
from . import _shared
from ._shared import EVERYWHERE

FIXED = _shared.FIXED | {"is_causal": (True,)}
IRRELEVANT = EVERYWHERE | {"is_decoder"}

SURPLUS = (
    Ignore("lm_head.*", "the language-model head is not part of this model", parameter=True),
    Ignore("score.*", "another task's classifier is not part of this model", parameter=True),
)


def _padding(value: Any) -> int | None:
    """A token, or none: older conversions say -1, which no token is."""
    return None if value in (None, -1) else whole(value)


PADDING = fact("pad_token_id", "padding_id", _padding, None)


def head(config: Any, model_class: type, tokens: str) -> Table:
    """One matrix: of a language model the token embedding, called `tokens`, where it is tied."""
    own: dict[type, tuple[Rule | Tie, ...]] = {
        CausalLM: (rule("lm_head.weight", "head.decoder.weight"),),
        SequenceClassifier: (rule("score.weight", "head.output.weight"),),
    }
    if model_class is CausalLM and config.tied:
        return (Tie("lm_head.weight", to=tokens),)
    return own.get(model_class, ())


def observe(config: Any, model_class: type, keys: frozenset[str], fields: Mapping[str, Any]) -> Any:
    """The tensors decide nothing that config.json does not."""
    return config


def inputs(model: Any, ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Positions, which padding does not take: what a call of ours counts, and the reference is given by `generate`."""
    return {"position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}


def options(model: Any) -> dict[str, Any]:
    """The number of labels, where the model has any."""
    return {"num_labels": model.config.labels} if isinstance(model, SequenceClassifier) else {}


def settle(reference: Any, model: Any) -> None:
    """Without a padding token the reference's classifier refuses batches, and reads the last: -1 is no token's."""
    if reference.config.pad_token_id is None:
        reference.config.pad_token_id = -1


Probes = tuple[tuple[str, str], ...]


def probes(prefix: str, parts: Probes) -> Callable[[type], Probes]:
    """`parts` of the backbone, without what stands before their names on either side, and a language model's head.

    What a classifier's matrix gives is not compared but at the end: there it is applied to every token.
    """

    def listed(model_class: type) -> Probes:
        own = _shared.ours(model_class)
        before = prefix if own else ""
        last = (("head", "lm_head"),) if model_class is CausalLM else ()
        return (*((f"{own}{ours}", f"{before}{theirs}") for ours, theirs in parts), *last)

    return listed
