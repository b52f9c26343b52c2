"""What usually stands behind a report that is not clean, as sentences."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

Shape = tuple[int, ...]


def causes(
    missing: Collection[str], unexpected: Collection[str], mismatched: Mapping[str, tuple[Shape, Shape]], config: object
) -> tuple[str, ...]:
    """The likely causes, the most telling first; keys are spelled as the file spells them."""
    return (
        *_wrapped(missing, unexpected),
        *_layers(missing, unexpected, config),
        *_vocabulary(mismatched),
        *_untied(missing),
    )


def _wrapped(missing: Collection[str], unexpected: Collection[str]) -> Iterator[str]:
    """A wrapper's name before every key."""
    firsts = {key.split(".")[0] + "." for key in unexpected}
    for first in sorted(firsts):
        found = [key for key in missing if first + key in unexpected]
        if len(found) > 1 and 2 * len(found) > len(missing):
            known = WRAPPERS.get(first, "some wrapper of the model")
            yield (
                f"the keys would be right without {first!r} before them, which {known} puts there: save"
                " the state of the model inside it"
            )


WRAPPERS = {
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.": "an adapter of PEFT",
    "model.": "a training framework",
    "0.": "sentence-transformers",
}


def _layers(missing: Collection[str], unexpected: Collection[str], config: object) -> Iterator[str]:
    """Another number of layers than config.json says."""
    depth = getattr(config, "num_layers", None)
    if depth is None:
        return
    absent, surplus = _numbers(missing), _numbers(unexpected)
    if absent and surplus.isdisjoint(absent) and max(absent) == depth - 1 and _whole(absent) and len(absent) < depth:
        yield f"config.json says {depth} layers, the file has {min(absent)}"
    if surplus and min(surplus) == depth and _whole(surplus):
        yield f"config.json says {depth} layers, the file has {max(surplus) + 1}"


NUMBER = re.compile(r"(?:^|[./])(?:layer|block|h|layers)[./](\d+)[./]")


def _numbers(keys: Collection[str]) -> set[int]:
    return {int(found[1]) for key in keys if (found := NUMBER.search(key))}


def _whole(numbers: set[int]) -> bool:
    return len(numbers) == max(numbers) - min(numbers) + 1


# What files call the token embedding, and the matrix of an output.
EMBEDDINGS = ("word_embeddings", "embed_tokens", "wte", "shared")
OUTPUTS = tuple(f"{name}{last}" for name in ("decoder", "lm_head") for last in (".weight", "/kernel"))


def _vocabulary(mismatched: Mapping[str, tuple[Shape, Shape]]) -> Iterator[str]:
    """A vocabulary that was resized after config.json was written."""
    for key, (expected, found) in mismatched.items():
        if any(name in key for name in EMBEDDINGS) and expected[1:] == found[1:]:
            yield (
                f"config.json says a vocabulary of {expected[0]}, the file has {found[0]} rows:"
                f" override={{'vocab_size': {found[0]}}} takes them all"
            )


def _untied(missing: Sequence[str] | Collection[str]) -> Iterator[str]:
    """An untied config with a tied model's file."""
    if any(key.endswith(OUTPUTS) for key in missing):
        yield (
            "config.json says tie_word_embeddings = false, but the file has no output matrix of its own, as a tied"
            " model's: override={'tied': True} if it is one"
        )
