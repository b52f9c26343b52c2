"""The causal language models of Haiku: a tutorial's of March 2021, and the official example's of today.

One dictionary of arrays each, matrices (in, out). The tutorial names its modules; the example leaves that to Haiku,
which numbers them (`transformer/layer_norm_3`), and its embeddings stand in `language_model`. The table here is in the
tutorial's names, and the example's are translated.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from eqx_transformers import HAIKU_EXAMPLE, HAIKU_TUTORIAL, CausalLM, Transformer, TransformerConfig

from ..config import fact, optional, rate, size, some, whole
from ..errors import MalformedCheckpoint, UnsupportedConfig
from ..family import Family
from ..ops import FLIP
from ..rules import Ignore, Table, rule
from ..spelling import Prefixed, Spelling
from ._inferred import completed, highest, other_depth, side

WORDS, POSITIONS, OUTPUT, LAYER = "embed/embeddings", "~/pos_embs", "linear", "transformer/h{i}"

# ---- the example's names

PLAIN = {
    WORDS: "language_model/embed/embeddings",
    POSITIONS: "language_model/positional_embeddings",
    f"{OUTPUT}/w": "language_model/linear/w",
    f"{OUTPUT}/b": "language_model/linear/b",
}
# What the tutorial calls a module of a layer; what the example does, how many of these a layer has, and which it is.
KINDS = {
    "attn": ("multi_head_attention", 1, 0),
    "ln_1": ("layer_norm", 2, 0),
    "ln_2": ("layer_norm", 2, 1),
    "mlp/linear": ("linear", 2, 0),
    "mlp/linear_1": ("linear", 2, 1),
}
NAMED = re.compile(rf"transformer/h(\d+)_({'|'.join(KINDS)})/(.+)")
LAST = "transformer/ln_f/"
NUMBERED = re.compile(r"transformer/(layer_norm|linear|multi_head_attention)(?:_(\d+))?/(.+)")


@dataclass(frozen=True)
class Numbered:
    """The example's names: the modules of a kind are numbered, and the first one has no number."""

    num_layers: int

    @classmethod
    def of(cls, keys: Collection[str], family: Family | None = None) -> "Numbered":
        found = [(m[1], int(m[2] or 0)) for m in map(NUMBERED.fullmatch, keys) if m]
        # One norm stands behind all layers: that of number 2 * num_layers.
        layers = [n + 1 if kind == "multi_head_attention" else n // 2 + (kind == "linear") for kind, n in found]
        return cls(max(layers, default=0))

    def names(self, keys: Collection[str]) -> dict[str, str]:
        names: dict[str, str] = {}
        for key in sorted(keys, key=lambda key: self.modern(key) == key):
            name = self.modern(key)
            names[key if name in names else name] = key
        return names

    def modern(self, key: str) -> str:
        """A key of the example by the tutorial's name; any other as it is."""
        found = NUMBERED.fullmatch(key)
        if found is None:
            return next((name for name, plain in PLAIN.items() if plain == key), key)
        kind, number, rest = found[1], int(found[2] or 0), found[3]
        if kind == "layer_norm" and number == 2 * self.num_layers:
            return LAST + rest
        part, each = next((p, each) for p, (k, each, at) in KINDS.items() if k == kind and number % each == at)
        return f"transformer/h{number // each}_{part}/{rest}"

    def old(self, key: str) -> str:
        found = NAMED.fullmatch(key)
        if found is None and not key.startswith(LAST):
            return PLAIN.get(key, key)
        kind, number, rest = "layer_norm", 2 * self.num_layers, key.removeprefix(LAST)
        if found is not None:
            kind, each, at = KINDS[found[2]]
            number, rest = each * int(found[1]) + at, found[3]
        return f"transformer/{kind}{f'_{number}' if number else ''}/{rest}"


def tutorial(keys: Collection[str], family: Family | None = None) -> Spelling:
    return Prefixed("", (), False, {}, False)  # as they are


# ---- what both are


@dataclass(frozen=True)
class Words:
    """What the two call one fact, how they name arrays, and the width of a head that is no option."""

    width: str
    head: str
    padding: str
    spell: Any
    only: int | None = None


TUTORIAL_WORDS = Words("d_model", "key_size", "pad_id", tutorial, only=64)
EXAMPLE_WORDS = Words("model_size", "attn_size", "pad_token", Numbered.of)


def prepare(
    words: Words, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """The arrays, the config with the sizes that they tell, and what was assumed."""
    names = words.spell(arrays).names(arrays)
    if not any(re.match(r"transformer/(h\d+_|ln_f/)", name) for name in names):
        raise MalformedCheckpoint(
            f"None of the {len(arrays)} arrays has a name of this Haiku model, such as"
            f" {words.spell(()).old('transformer/h0_attn/query/w')!r}; the first is {next(iter(arrays), None)!r}."
        )
    at = lambda name, axis: side(arrays, names.get(name, name), axis)
    width, inner = at(WORDS, 1), at("transformer/h0_mlp/linear/w", 1)
    layers = highest(names, r"^transformer/h(\d+)_")
    inferred = {
        "vocab_size": at(WORDS, 0),
        words.width: width,
        "num_layers": layers,
        "widening_factor": inner // width if inner and width and inner % width == 0 else None,
        "sequence_length": at(POSITIONS, 0),
    }
    heads, notes = _heads(words, at("transformer/h0_attn/query/w", 1), config)
    return dict(arrays), completed(config, inferred | heads), (*notes, *other_depth(config, "num_layers", layers))


def _heads(
    words: Words, product: int | None, config: Mapping[str, Any]
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """How many heads, or how wide they are: the arrays tell only the product of both."""
    for given, other in (("num_heads", words.head), (words.head, "num_heads")):
        one = config.get(given)
        if isinstance(one, int) and one > 0 and product and product % one == 0:
            return {other: product // one}, ()
        if given in config:
            return {}, ()  # reading the config says what is wrong with it
    if not product or not words.only or product % words.only:
        raise UnsupportedConfig(
            f"num_heads and {words.head} are missing from the config, and the arrays tell only their product,"
            f" {product}. Pass one of them."
        )
    heads = product // words.only
    assumed = f"num_heads = {heads} was assumed, heads of {words.only} as the tutorial's: no array tells it"
    return {"num_heads": heads, words.head: words.only}, (assumed,)


def dense(theirs: str, module: str) -> Table:
    return rule(f"{theirs}/w", f"{module}.weight", FLIP), rule(f"{theirs}/b", f"{module}.bias")


def norm(theirs: str, module: str) -> Table:
    return rule(f"{theirs}/scale", f"{module}.weight"), rule(f"{theirs}/offset", f"{module}.bias")


def table(config: TransformerConfig, model_class: type) -> Table:
    before = "" if model_class is Transformer else "backbone."
    block = f"{before}stack.blocks.{{i}}"
    return (
        rule(WORDS, f"{before}embedding.tokens.weight"),
        rule(POSITIONS, f"{before}embedding.positions.weight"),
        *norm(f"{LAYER}_ln_1", f"{block}.attention_norm"),
        *dense(f"{LAYER}_attn/query", f"{block}.attention.query_proj"),
        *dense(f"{LAYER}_attn/key", f"{block}.attention.key_proj"),
        *dense(f"{LAYER}_attn/value", f"{block}.attention.value_proj"),
        *dense(f"{LAYER}_attn/linear", f"{block}.attention.output_proj"),
        *norm(f"{LAYER}_ln_2", f"{block}.mlp_norm"),
        *dense(f"{LAYER}_mlp/linear", f"{block}.mlp.up_proj"),
        *dense(f"{LAYER}_mlp/linear_1", f"{block}.mlp.down_proj"),
        *norm("transformer/ln_f", f"{before}norm"),
        *(dense(OUTPUT, "head.decoder") if model_class is CausalLM else ()),
        Ignore(f"{OUTPUT}/*", "the output is not part of this model", parameter=True),
    )


def family(name: str, words: Words, defaults: TransformerConfig, training: Collection[str]) -> Family:
    return Family(
        model_type=name,
        defaults=defaults,
        architectures={"transformer": Transformer, "language-model": CausalLM},
        like={},
        carries={"transformer": (CausalLM,)},
        prefix="",
        roots=(),
        facts=(
            fact("vocab_size", "vocab_size", whole),
            fact(words.width, "embed_dim", whole),
            fact("num_layers", "num_layers", whole),
            fact("num_heads", "num_heads", some),
            fact(words.head, "head_dim", some),
            fact("widening_factor", "widening_factor", some, 4),
            fact("sequence_length", "max_positions", whole),
            fact("layer_norm_eps", "norm_eps", size, 1e-5),
            fact(words.padding, "padding_id", optional(whole), 0),
            fact("dropout_rate", "dropout", rate, 0.1),
        ),
        fixed={},
        irrelevant=frozenset(training),
        table=table,
        observe=lambda config, model_class, keys, fields: config,
        legacy={},
        probes=lambda model_class: (),
        spell=words.spell,
        recognise=lambda names: "language-model" if f"{OUTPUT}/w" in names else "transformer",
    )


TRAINING = ("batch_size", "learning_rate", "grad_clip_value", "max_steps", "seed", "checkpoint_dir", "dataset_path")
# Each format's family, and what prepares its arrays.
TUTORIAL = (
    family("haiku-lm-tutorial", TUTORIAL_WORDS, HAIKU_TUTORIAL, (*TRAINING, "b1", "b2", "eps")),
    partial(prepare, TUTORIAL_WORDS),
)
EXAMPLE = (family("haiku-lm-example", EXAMPLE_WORDS, HAIKU_EXAMPLE, TRAINING), partial(prepare, EXAMPLE_WORDS))
