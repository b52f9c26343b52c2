"""The purely functional transformer, by the paths of its parameters: `layers[0]/heads[1]/query`.

Matrices (in, out), one for every head. The article's model (2022) has biases, and `/weight`, `/bias`, `/gain` behind
its names; the repository's of today has plain arrays.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqx_transformers import FUNCTIONAL_HEAD, CausalLM, FunctionalConfig, FunctionalTransformer

from ..config import choice, fact, flag, number, optional, size, some, whole
from ..errors import MalformedCheckpoint
from ..family import Family
from ..ops import FLIP, Op, split
from ..rules import Ignore, Table, rule
from ._inferred import completed, highest, other_depth, side

LAYER = "layers[{i}]"


def prepare(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
    """The arrays, and the config with the sizes that they tell, and which of the two models it is."""
    if not any(re.match(r"layers\[\d+\]/", name) for name in arrays):
        raise MalformedCheckpoint(
            f"None of the {len(arrays)} arrays has a name of the functional transformer, such as"
            f" 'layers[0]/heads[0]/query'; the first is {next(iter(arrays), None)!r}."
        )
    use_bias = any(name.endswith("/bias") for name in arrays)
    end = "/weight" if use_bias else ""
    at = lambda name, axis: side(arrays, name + end, axis)
    layers = highest(arrays, r"^layers\[(\d+)\]/")
    inferred = {
        "n_vocab": side(arrays, "embeddings", 0),
        "d_model": side(arrays, "embeddings", 1),
        "n_layers": layers,
        "n_heads": highest(arrays, r"^layers\[\d+\]/heads\[(\d+)\]/"),
        "d_k": at("layers[0]/heads[0]/query", 1),
        "d_ff": at("layers[0]/ffn1", 1),
        "max_len": side(arrays, "positional_encodings", 0),
        "use_bias": use_bias,
        "merge": "sum" if use_bias else "concatenate",
    }
    return dict(arrays), completed(config, inferred), other_depth(config, "n_layers", layers)


def joined(heads: int, width: int) -> Op:
    """A matrix (in, out) or a vector of every head to one of all heads, (all heads' out, in)."""
    cut = split(*[width] * heads)
    return Op(
        f"{heads} heads joined",
        lambda *x: cut.backward(*(part.T for part in x)),
        lambda y: tuple(part.T for part in cut.forward(y)),
    )


def table(config: FunctionalConfig, model_class: type) -> Table:
    before = "" if model_class is FunctionalTransformer else "backbone."
    block, bias = f"{before}stack.blocks.{{i}}", config.use_bias

    def dense(theirs: str, module: str) -> Table:
        weight = rule(f"{theirs}/weight" if bias else theirs, f"{module}.weight", FLIP)
        return (weight, rule(f"{theirs}/bias", f"{module}.bias")) if bias else (weight,)

    def norm(theirs: str, module: str) -> Table:
        gain = rule(f"{theirs}/gain" if bias else theirs, f"{module}.weight")
        return (gain, rule(f"{theirs}/bias", f"{module}.bias")) if bias else (gain,)

    def heads(part: str, width: int) -> Table:
        names = [f"{LAYER}/heads[{j}]/{part}" for j in range(config.num_heads)]
        leaves = {"/weight": "weight", "/bias": "bias"} if bias else {"": "weight"}
        op, module = joined(config.num_heads, width), f"{block}.attention.{part}_proj"
        return tuple(rule(tuple(n + end for n in names), f"{module}.{leaf}", op) for end, leaf in leaves.items())

    return (
        rule("embeddings", f"{before}embedding.tokens.weight"),
        rule("positional_encodings", f"{before}embedding.positions.weight"),
        *norm(f"{LAYER}/norm_self_attn", f"{block}.attention_norm"),
        *heads("query", config.head_dim),
        *heads("key", config.head_dim),
        *heads("value", config.embed_dim if config.merge == "sum" else config.head_dim),
        *norm(f"{LAYER}/norm_ff", f"{block}.mlp_norm"),
        *dense(f"{LAYER}/ffn1", f"{block}.mlp.up_proj"),
        *dense(f"{LAYER}/ffn2", f"{block}.mlp.down_proj"),
        *norm("pre_output_norm", f"{before}norm"),
        *(dense("output", "head.decoder") if model_class is CausalLM else ()),
        Ignore("output", "the output is not part of this model", parameter=True),
        Ignore("output/*", "the output is not part of this model", parameter=True),
    )


FAMILY = Family(
    model_type="functional-transformer",
    defaults=FUNCTIONAL_HEAD,
    architectures={"transformer": FunctionalTransformer, "language-model": CausalLM},
    like={},
    carries={"transformer": (CausalLM,)},
    prefix="",
    roots=(),
    facts=(
        fact("n_vocab", "vocab_size", whole),
        fact("d_model", "embed_dim", whole),
        fact("n_layers", "num_layers", whole),
        fact("n_heads", "num_heads", some),
        fact("d_k", "head_dim", some),
        fact("d_ff", "mlp_dim", whole),
        fact("max_len", "max_positions", whole),
        fact("eps", "norm_eps", size, 1e-5),
        fact("lambda_e", "lambda_e", optional(number), None),
        fact("lambda_pe", "lambda_pe", number, 1.0),
        fact("tau", "tau", optional(number), None),
        fact("use_bias", "use_bias", flag),
        choice("merge", "merge", {"sum": "sum", "concatenate": "concatenate"}),
    ),
    fixed={},
    irrelevant=frozenset(
        ["lr", "learning_rate", "beta1", "beta2", "seq_len", "batch_size", "epochs", "batches", "seed"]
    ),
    table=table,
    observe=lambda config, model_class, keys, fields: config,
    legacy={},
    probes=lambda model_class: (),
    recognise=lambda names: "language-model" if {"output", "output/weight"} & set(names) else "transformer",
)
