"""A classifier made ready to be tuned, whole or with LoRA: what of it trains, by what, and how it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

from ...models.heads import SequenceClassifier
from ...surgery import Selection, adapter_mask, add_adapter, layer_rates, scale_by_rates, select
from ..optimizers import adamw
from ..originals import roberta_article, roberta_scale
from ..schedules import warmup_linear
from ._options import Settled, expect_foreign

RATE, LORA_RATE = 5e-5, 1e-3  # where none is given: small matrices that begin at zero learn at a higher one
RATE_SAID = f"{RATE:g}, or {LORA_RATE:g} with --lora"


@dataclass(frozen=True)
class Adapter:
    """LoRA's options: `alpha` is twice the rank, where none is given.

    `targets` are patterns of paths, at or below which every linear layer gets an adapter.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ("**.blocks",)
    dropout: float = 0.0


def peak(lora: Any) -> float:
    """The learning rate where none is given, with adapters or (None) without."""
    return RATE if lora is None else LORA_RATE


class Ready(NamedTuple):
    """A model to be tuned. `trains`: a mask, or None for all. `saved`: with adapters, what is written whole."""

    model: Any
    origin: Any
    trains: Any
    saved: tuple[str, ...]
    said: str


def ready(
    source: str | PathLike[str],
    names: Sequence[str],
    seed: int,
    lora: Adapter | int | None,
    freeze: Sequence[str],
    override: Mapping[str, Any],
) -> Ready:
    """The classifier of a checkpoint in float32, with a head for the labels `names`.

    Its own head is kept if it has as many labels. What is drawn anew (the head, and BERT's pooler where the file has
    none) is trained whole and saved whole with adapters too: nobody else has it.
    """
    import converters

    lora = Adapter(lora) if isinstance(lora, int) else lora
    expect_foreign(source)
    reports: list[Any] = []
    options: dict[str, Any] = {"labels": list(names), "override": dict(override) or None, "dtype": "float32"}
    key = jax.random.key(seed)
    model, origin = converters.load(source, head=SequenceClassifier, key=key, announce=reports.append, **options)
    new = sorted({path.rpartition(".")[0] for path in reports[0].new}) if reports else []
    said = f"{origin.architecture} of {source}{', new: ' if new else ''}{', '.join(new)}"
    if lora is None:
        trains = _without(model, freeze)
        return Ready(model, origin, trains, (), f"{said}; {_share(model, trains)}")
    saved = ("head", *(path for path in new if not path.startswith("head")))
    model = add_adapter(
        model,
        reduce(or_, (select("Linear", under=pattern) for pattern in lora.targets)),
        rank=lora.rank,
        alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        dropout=lora.dropout,
        key=jax.random.fold_in(key, 1),
    )
    trains = adapter_mask(model, also=_under(saved))
    return Ready(model, origin, trains, saved, f"{said}; {_share(model, trains)}")


def _under(paths: Sequence[str]) -> Selection:
    return reduce(or_, (select(under=path) for path in paths))


def _without(model: Any, freeze: Sequence[str]) -> Any:
    """What is trained, where some is not."""
    if not freeze:
        return None
    trains = jax.tree.map(lambda frozen: not frozen, _under(freeze).mask(model))
    if not any(map(eqx.is_inexact_array, jax.tree.leaves(eqx.filter(model, trains)))):
        raise ValueError(f"Nothing is left to train: {' and '.join(freeze)} are all of the model.")
    return trains


def _share(model: Any, trains: Any) -> str:
    trained = model if trains is None else eqx.filter(model, trains)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))
    return f"{count(trained):,} of {count(model):,} parameters are trained"


def optimizer(model: Any, training: Settled, steps: int, layer_decay: float | None, original: bool) -> dict[str, Any]:
    """`optimizer` and `schedule` of `train`; none where its own are meant."""
    if original:
        if training.weight_decay != Settled.weight_decay:
            raise ValueError("--original has no --weight-decay: it is AdamW's.")
        clip = training.clip_norm or float("inf")
        made = roberta_article(training.learning_rate, steps, warmup=training.warmup, max_grad_norm=clip)
        scale = roberta_scale(steps, training.warmup)
        return {"optimizer": made, "schedule": lambda step: training.learning_rate * scale(step)}
    if layer_decay is None:
        return {}
    rates = warmup_linear(training.learning_rate, steps, training.warmup)
    slower = scale_by_rates(layer_rates(model, layer_decay))
    return {
        "optimizer": optax.chain(adamw(rates, weight_decay=training.weight_decay), slower),
        "schedule": rates,
    }


def export(model: Any, path: Path, made: Ready) -> None:
    """A directory that transformers loads, tokenizer included; of adapters, one that PEFT loads on the base."""
    import converters

    if made.saved:
        converters.peft.save(model, path, made.origin, modules_to_save=made.saved)
    else:
        converters.export(model, path, made.origin)
