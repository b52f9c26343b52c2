"""RoBERTa by TensorFlow's names, as Indico's finetune published it, and the Haiku port that reads it.

One dictionary of arrays, matrices (in, out), in one of three spellings: the raw one (`model/featurizer/bert/…:0`, with
`self/` before queries, keys and values), the same with these three pieces deleted, and the Haiku modules' own
(`Transformer/transformer_block_1/multi_head_attention/linear/w`). The tables here use the second.

The function is the port's, and differs from the reference library's RoBERTa by facts: positions count the index alone
(padding too), padding is hidden by its id, a row of padding alone attends uniformly, token types are in the file and
never added, dropout acts on what attention gives and not on its weights, and a classifier is one layer on the first
token's state.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eqx_transformers import ROBERTA, Encoder, EncoderConfig, MaskedLM, SentenceEmbedder, SequenceClassifier

from ..config import fact, rate, size, whole
from ..errors import MalformedCheckpoint, UnsupportedConfig
from ..family import Family
from ..ops import FLIP
from ..rules import Ignore, Table, rule
from ._encoder import ours

WORDS, BIAS = "embeddings/word_embeddings", "model/masked-language-model/output_bias"
LAYER = "encoder/layer_{i}"
# What a module is called here, and what the Haiku port calls it.
MODULES = {
    "embeddings/LayerNorm": "embedding/layer_norm",
    f"{LAYER}/attention/query": "transformer_block{i}/multi_head_attention/linear",
    f"{LAYER}/attention/key": "transformer_block{i}/multi_head_attention/linear_1",
    f"{LAYER}/attention/value": "transformer_block{i}/multi_head_attention/linear_2",
    f"{LAYER}/attention/output/dense": "transformer_block{i}/multi_head_attention/linear_3",
    f"{LAYER}/attention/output/LayerNorm": "transformer_block{i}/layer_norm",
    f"{LAYER}/intermediate/dense": "transformer_block{i}/transformer_mlp/linear",
    f"{LAYER}/output/dense": "transformer_block{i}/transformer_mlp/linear_1",
    f"{LAYER}/output/LayerNorm": "transformer_block{i}/layer_norm_1",
    "classifier": "linear",
}
PARTS = {"kernel": "w", "bias": "b", "gamma": "scale", "beta": "offset"}
TABLES = {
    WORDS: "embedding/embed/embeddings",
    "embeddings/position_embeddings": "embedding/position_embeddings/position_embeddings",
}
FROM_HAIKU = {theirs: own for own, theirs in (TABLES | MODULES).items()}
HAIKU = re.compile(r"(?P<scope>(?:Transformer/|~/)+)(?P<name>.+)")
RAW, SELF = "model/featurizer/bert/", re.compile(r"(?<=attention/)(?=(?:query|key|value)/)")


def from_haiku(key: str) -> str:
    """A key of the Haiku port by our tables' name; any other as it is."""
    found = HAIKU.fullmatch(key)
    if found is None:
        return key
    block = re.match(r"transformer_block(?:_(\d+))?(?=/)", found["name"])
    name = re.sub(r"^transformer_block(?:_\d+)?(?=/)", "transformer_block{i}", found["name"])
    module, _, part = name.rpartition("/")
    parts = {theirs: own for own, theirs in PARTS.items()}
    if name in FROM_HAIKU:
        return FROM_HAIKU[name]
    if module not in FROM_HAIKU or part not in parts:
        return key
    return f"{FROM_HAIKU[module]}/{parts[part]}".replace("{i}", (block and block[1]) or "0")


def to_haiku(key: str, scope: str) -> str:
    """The inverse of `from_haiku`, inside `scope`."""
    if key in TABLES:
        return scope + TABLES[key]
    layer = re.match(r"encoder/layer_(\d+)", key)
    module, _, part = re.sub(r"^encoder/layer_\d+", LAYER, key).rpartition("/")
    if module not in MODULES or part not in PARTS:
        return key
    number = f"_{layer[1]}" if layer and layer[1] != "0" else ""
    return f"{scope}{MODULES[module]}/{PARTS[part]}".replace("{i}", number)


@dataclass(frozen=True)
class Names:
    """Which of the three spellings a dictionary uses; `scope` is what stands before the Haiku featurizer's names."""

    raw: bool
    scope: str | None

    @classmethod
    def of(cls, keys: Collection[str], family: Family | None = None) -> "Names":
        scopes = [m["scope"] for key in keys if (m := HAIKU.fullmatch(key)) and not m["name"].startswith("linear/")]
        return cls(any(key.endswith(":0") for key in keys), scopes[0] if scopes else None)

    def names(self, keys: Collection[str]) -> dict[str, str]:
        names: dict[str, str] = {}
        plain = {key: from_haiku(key.removesuffix(":0").replace(RAW, "").replace("self/", "")) for key in keys}
        for key in sorted(keys, key=lambda key: plain[key] != key):
            names[key if plain[key] in names else plain[key]] = key
        return names

    def old(self, key: str) -> str:
        if self.scope is not None:
            # The head of the port stands one scope further out than its featurizer.
            return to_haiku(key, self.scope.split("/")[0] + "/" if key.startswith("classifier/") else self.scope)
        if not self.raw:
            return key
        return SELF.sub("self/", key if key.startswith("model/") else RAW + key) + ":0"


def prepare(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """The arrays of the model, the config with what the arrays state, and what is to be said about both.

    A published file has four rows of an older vocabulary above the model's (row = id + 4): they are dropped, for
    otherwise every id would mean another word. It is recognised by `vocab_size`, or where the config does not state
    it, by RoBERTa's own 50265 and by an output bias that begins with exactly four zeros.
    """
    names = Names.of(arrays).names(arrays)
    if arrays and not any(re.match("embeddings/|encoder/layer_", name) for name in names):
        raise MalformedCheckpoint(
            f"None of the {len(arrays)} arrays has a name of RoBERTa in TensorFlow or in Haiku; the first is"
            f" {next(iter(arrays))!r}. A file of the reference library is read from its directory, without a format."
        )
    # `pretrained` holds the arrays again.
    arrays, given = dict(arrays), {k: v for k, v in config.items() if k != "pretrained"}
    config = {name: value for name, value in _inferred(arrays, names).items() if value is not None} | given
    stated = config.get("vocab_size")
    vocab_size = stated if isinstance(stated, int) else 0  # what it is otherwise, reading the config says
    notes = []
    if "n_heads" not in given and "n_heads" in config:
        notes.append(f"n_heads = {config['n_heads']} was assumed, heads of 64 as RoBERTa's: no array tells it")
    for key in (names[name] for name in (WORDS, BIAS) if name in names):
        if arrays[key].ndim and len(arrays[key]) == vocab_size + 4:
            arrays[key] = arrays[key][4:]
            notes.append(
                f"{key} has 4 rows more than the vocabulary's {vocab_size}: rows of an older vocabulary that"
                " stand above the model's (row = id + 4). They were dropped, which is not undone on the way back"
            )
    if "n_heads" not in config:
        raise UnsupportedConfig(
            f"n_heads is missing from the config, and no array tells it: the width {config.get('hidden_size')} is not"
            " made of heads of 64. Pass the config of the model."
        )
    return arrays, config, tuple(notes)


def _inferred(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, Any]:
    """The sizes that the arrays have; None where there is no such matrix."""

    def shape(name: str) -> tuple[Any, ...]:
        found = arrays[names[name]].shape if name in names else ()
        return found if len(found) == 2 else (None, None)

    rows, width = shape(WORDS)
    layers = {m[1] for name in names if (m := re.match(r"encoder/layer_(\d+)/", name))}
    return {
        "vocab_size": None if rows is None else rows - _older(arrays, names, rows),
        "hidden_size": width,
        "intermediate_size": shape("encoder/layer_0/intermediate/dense/kernel")[1],
        "n_layers": len(layers),
        "n_heads": width // 64 if width and width % 64 == 0 else None,
        "n_classes": shape("classifier/kernel")[1],
        "position_rows": shape("embeddings/position_embeddings")[0],
    }


def _older(arrays: Mapping[str, np.ndarray], names: Mapping[str, str], rows: int) -> int:
    bias = arrays[names[BIAS]] if BIAS in names else np.zeros(0)
    filled = bias.shape == (rows,) and rows > 4 and not bias[:4].any() and bias[4:].any()
    return 4 if rows == ROBERTA.vocab_size + 4 or filled else 0


def dense(theirs: str, module: str) -> Table:
    return rule(f"{theirs}/kernel", f"{module}.weight", FLIP), rule(f"{theirs}/bias", f"{module}.bias")


def norm(theirs: str, module: str) -> Table:
    return rule(f"{theirs}/gamma", f"{module}.weight"), rule(f"{theirs}/beta", f"{module}.bias")


def table(config: EncoderConfig, model_class: type) -> Table:
    embedding, block = f"{ours(model_class)}embedding", f"{ours(model_class)}stack.blocks.{{i}}"
    return (
        rule(WORDS, f"{embedding}.tokens.weight"),
        rule("embeddings/position_embeddings", f"{embedding}.positions.weight"),
        *norm("embeddings/LayerNorm", f"{embedding}.norm"),
        *dense(f"{LAYER}/attention/query", f"{block}.attention.query_proj"),
        *dense(f"{LAYER}/attention/key", f"{block}.attention.key_proj"),
        *dense(f"{LAYER}/attention/value", f"{block}.attention.value_proj"),
        *dense(f"{LAYER}/attention/output/dense", f"{block}.attention.output_proj"),
        *norm(f"{LAYER}/attention/output/LayerNorm", f"{block}.attention_norm"),
        *dense(f"{LAYER}/intermediate/dense", f"{block}.mlp.up_proj"),
        *dense(f"{LAYER}/output/dense", f"{block}.mlp.down_proj"),
        *norm(f"{LAYER}/output/LayerNorm", f"{block}.mlp_norm"),
        *head(model_class),
        Ignore("embeddings/token_type_embeddings", "the original never adds its token types", parameter=True),
        Ignore("model/masked-language-model/*", "the masked-LM head is not part of this model", parameter=True),
        Ignore("classifier/*", "the classifier is not part of this model", parameter=True),
    )


def head(model_class: type) -> Table:
    predictions = "model/masked-language-model"
    if model_class is SequenceClassifier:
        return dense("classifier", "head.output")
    if model_class is MaskedLM:
        return (
            # This one matrix is stored (out, in).
            rule(f"{predictions}/dense/kernel", "head.dense.weight"),
            rule(f"{predictions}/dense/bias", "head.dense.bias"),
            rule(f"{predictions}/LayerNorm/g", "head.norm.weight"),
            rule(f"{predictions}/LayerNorm/b", "head.norm.bias"),
            rule(BIAS, "head.bias"),
        )
    return ()


def observe(config: EncoderConfig, model_class: type, keys: frozenset[str], fields: Mapping[str, Any]) -> EncoderConfig:
    """One rate for all sites is said as one, so that it can be said elsewhere too."""
    sites = dict.fromkeys(("embedding_dropout", "attention_output_dropout", "classifier_dropout"))
    return replace(config, **{site: none for site, none in sites.items() if getattr(config, site) == config.dropout})


FAMILY = Family(
    model_type="roberta-tf",
    defaults=replace(
        ROBERTA,
        positions="index",
        position_offset=2,
        padding_rows=(),
        hides_padding=True,
        empty="uniform",
        token_types=0,
        attention_dropout=0.0,
        init="truncated",
        pooler=False,
        classifier="linear",
    ),
    architectures={"featurizer": Encoder, "classifier": SequenceClassifier, "masked-language-model": MaskedLM},
    like={SentenceEmbedder: Encoder},
    carries={"featurizer": (MaskedLM,), "classifier": (MaskedLM,)},
    prefix="",
    roots=(),
    facts=(
        fact("vocab_size", "vocab_size", whole),
        fact("hidden_size", "embed_dim", whole),
        fact("n_layers", "num_layers", whole),
        fact("n_heads", "num_heads", whole),
        fact("intermediate_size", "mlp_dim", whole),
        fact("position_rows", "max_positions", whole),
        fact("position_offset", "position_offset", whole, 2),
        fact("mask_id", "padding_id", whole, 1),
        fact("layer_norm_eps", "norm_eps", size, 1e-5),
        fact("embed_dropout_rate", "embedding_dropout", rate, 0.1),
        fact("fully_connected_drop_rate", "dropout", rate, 0.1),
        fact("attention_drop_rate", "attention_output_dropout", rate, 0.1),
        fact("classifier_drop_rate", "classifier_dropout", rate, 0.1),
        fact("weight_stddev", "init_std", size, 0.02),
        fact("n_classes", "labels", whole, 2),
    ),
    fixed={},
    irrelevant=frozenset(
        ["batch_size", "id2label", "l2", "label2id", "learning_rate", "max_grad_norm", "max_length", "n_epochs"]
    ),
    table=table,
    observe=observe,
    legacy={},
    probes=lambda model_class: (),
    spell=Names.of,
    recognise=lambda names: "classifier" if "classifier/kernel" in names else "featurizer",
)
