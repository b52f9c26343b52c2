"""T5, Flan-T5, ByT5, mT5 and UMT5: google-t5/t5-small, google/flan-t5-base and their kin. Reference: transformers' t5.

Their tensors have the same names; what a block has of its own, the model's leaves say. Files of version 1.0 hold the
table of tokens up to four times, some of them a bias of the decoder's cross-attention that nothing ever read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from eqx_transformers import (
    MT5,
    T5,
    T5_V1,
    UMT5,
    QuestionAnswerer,
    SequenceClassifier,
    T5Config,
    T5Encoder,
    T5Model,
    TokenClassifier,
)

from ..config import OLDER, Fact, aliases, fact, flag, optional, rate, size, some, whole
from ..family import Family
from ..rules import Ignore, Rule, Table, Tie, affine, rule
from ._decoder import PADDING
from ._shared import ACTIVATIONS, EVERYWHERE, FIXED, labels

Probes = tuple[tuple[str, str], ...]
PREFIX = "transformer."
BLOCK, LAYER = "{half}.stack.blocks.{{i}}", "{half}.block.{{i}}.layer"
FLAT = (T5, T5Model, T5Encoder)
PREFIXED = (SequenceClassifier, TokenClassifier)  # the reference's other classes are spelled as the bare model is
ONE_HALF = (T5Encoder, TokenClassifier)
OUTPUT = "lm_head.weight"


def ours(model_class: type) -> str:
    return "" if model_class in FLAT else "backbone."


def table(config: T5Config, model_class: type) -> Table:
    halves = ("encoder",) if model_class in ONE_HALF else ("encoder", "decoder")
    return (
        *body_table(config, PREFIX, ours(model_class), halves),
        *head(config, model_class),
        *([SECOND] if model_class in ONE_HALF else []),
        *SURPLUS,
    )


def body_table(config: T5Config, theirs: str, own: str, halves: tuple[str, ...] = ("encoder", "decoder")) -> Table:
    """All but a head; `theirs` and `own` stand before the names on either side."""
    shared = f"{theirs}shared.weight"
    return (
        rule(shared, f"{own}embedding.weight"),
        *(Tie(f"{theirs}{half}.embed_tokens.weight", to=shared) for half in halves),
        *(one for half in halves for one in half_table(config, half, theirs, own)),
        Ignore(
            f"{theirs}decoder.block.*.layer.1.EncDecAttention.relative_attention_bias.weight",
            "positions mean nothing between two texts: no version of the reference has read it",
        ),
    )


def half_table(config: T5Config, half: str, before: str, own: str) -> tuple[Rule, ...]:
    """The rules of the encoder or of the decoder; whose relative positions are there, the model's own leaves say."""
    mlp = f"{last_of(half)}.DenseReluDense"
    gated = {"mlp.gate_proj": f"{mlp}.wi_0", "mlp.up_proj": f"{mlp}.wi_1", "mlp.down_proj": f"{mlp}.wo"}
    plain = {"mlp.up_proj": f"{mlp}.wi", "mlp.down_proj": f"{mlp}.wo"}
    inner = gated if config.gated else plain
    block, layer = f"{own}{BLOCK.format(half=half)}", f"{before}{LAYER.format(half=half)}"
    position = "SelfAttention.relative_attention_bias.weight"
    return (
        *(rule(f"{layer}.{b}.weight", f"{block}.{a}.weight") for a, b in (*parts(half), *inner.items())),
        rule(f"{before}{half}.block.0.layer.0.{position}", f"{own}{half}.bias.weight"),
        rule(f"{layer}.0.{position}", f"{block}.bias.weight"),
        rule(f"{before}{half}.final_layer_norm.weight", f"{own}{half}.norm.weight"),
    )


def last_of(half: str) -> int:
    """What the reference calls a block's MLP: it has no names for a block's parts but their numbers."""
    return 2 if half == "decoder" else 1


def parts(half: str) -> Probes:
    """Our modules in a block before its MLP, and theirs, in order of execution."""
    looking = attending("attention", "0", "SelfAttention")
    looking += attending("cross_attention", "1", "EncDecAttention") if half == "decoder" else ()
    return *looking, ("mlp_norm", f"{last_of(half)}.layer_norm")


def attending(own: str, number: str, theirs: str) -> Probes:
    projections = ("query", "key", "value", "output")
    inner = tuple((f"{own}.{name}_proj", f"{number}.{theirs}.{name[0]}") for name in projections)
    return (f"{own}_norm", f"{number}.layer_norm"), *inner


def output(config: T5Config, theirs: str, own: str, before: str) -> Table:
    """A language model's output: a second name of the token table where it is tied."""
    return (Tie(theirs, to=f"{before}shared.weight"),) if config.tied else (rule(theirs, f"{own}head.weight"),)


def head(config: T5Config, model_class: type) -> Table:
    if model_class is T5:
        return output(config, OUTPUT, "", PREFIX)
    first, last = "classification_head.dense", "classification_head.out_proj"
    return {
        SequenceClassifier: (*affine(first, "head.dense"), *affine(last, "head.output")),
        TokenClassifier: affine("classifier", "head.output"),
        QuestionAnswerer: affine("qa_outputs", "head.output"),
    }.get(model_class, ())


SECOND = Ignore(f"{PREFIX}decoder.*", "the decoder is not part of this model", parameter=True)
SURPLUS = (
    Ignore("lm_head.*", "the language-model head is not part of this model", parameter=True),
    Ignore("classification_head.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)


def _read_mlp(said: Any, function: Any, gated: Any) -> tuple[str, bool]:
    """`feed_forward_proj` says both; what the two fields beside it say counts, where they are."""
    words = said.split("-") if isinstance(said, str) else []
    if len(words) not in (1, 2) or (len(words) == 2 and words[0] != "gated"):
        raise ValueError("expected an activation, or gated-ACTIVATION")
    meant = "gelu_new" if said == "gated-gelu" else words[-1]
    name = meant if function is None else function
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name], len(words) == 2 if gated is None else flag(gated)


def _write_mlp(activation: str, gated: bool) -> tuple[str, str, bool]:
    name = next(theirs for theirs, own in ACTIVATIONS.items() if own == activation)
    said = "gelu" if gated and name == "gelu_new" else name
    return f"gated-{said}" if gated else said, name, gated


def feed_forward(default: str) -> Fact:
    theirs = ("feed_forward_proj", "dense_act_fn", "is_gated_act")
    return Fact(theirs, ("activation", "gated"), _read_mlp, _write_mlp, (default, None, None))


def _read_scaled(tied: Any, scaled: Any) -> tuple[bool]:
    return (flag(tied) if scaled is None else flag(scaled),)


# Whether the output is tied is not here: today's files say that it is, and hold a matrix of its own where it is not.
SCALED = Fact(
    ("tie_word_embeddings", "scale_decoder_outputs"),
    ("scaled",),
    _read_scaled,
    lambda scaled: (scaled, scaled),
    (True, None),
)


def _end(value: Any) -> int | None:
    """One token, though a list may say it."""
    if isinstance(value, list) and len(value) == 1:
        return whole(value[0])
    return None if value is None else whole(value)


def facts(defaults: T5Config, start: int | None, *own: Fact) -> tuple[Fact, ...]:
    return (
        fact("vocab_size", "vocab_size", whole, defaults.vocab_size),
        fact("d_model", "embed_dim", whole, defaults.embed_dim),
        fact("d_kv", "head_dim", whole, defaults.head_dim),
        fact("d_ff", "mlp_dim", whole, defaults.mlp_dim),
        fact("num_layers", "num_layers", whole, defaults.num_layers),
        fact("num_decoder_layers", "num_decoder_layers", optional(whole), None),
        fact("num_heads", "num_heads", some, defaults.num_heads),
        fact("relative_attention_num_buckets", "num_buckets", some, 32),
        fact("relative_attention_max_distance", "max_distance", some, 128),
        fact("dropout_rate", "dropout", rate, 0.1),
        fact("classifier_dropout", "classifier_dropout", rate, 0.0),
        fact("layer_norm_epsilon", "norm_eps", size, 1e-6),
        fact("initializer_factor", "init_factor", size, 1.0),
        replace(PADDING, default=(0,)),
        fact("eos_token_id", "end_id", _end, 1),
        fact("decoder_start_token_id", "start_id", optional(whole), start),
        *own,
        labels(),
    )


def observe(config: T5Config, model_class: type, keys: frozenset[str], fields: Mapping[str, Any]) -> T5Config:
    """Whether the output is tied: it is where there is no matrix of its own, unless the file is of a time that says so.

    Where there is one, and what it scores is scaled as only a tied one's is, the two must be equal (see `settled`).
    """
    stated = fields.get("tie_word_embeddings") is False and fields.get("scale_decoder_outputs") is None
    return replace(config, tied=config.tied and not stated and (config.scaled or OUTPUT not in keys))


def inputs(model: Any, ids: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the decoder reads, where a call says it. A classifier's rows end, each of them once."""
    config: T5Config = model.config
    if type(model) in (T5, T5Model):
        own = rng.integers(0, config.vocab_size, ids.shape)
        own[:, 0] = 0 if config.start_id is None else config.start_id
        return {"decoder_token_ids": own}
    if type(model) is not SequenceClassifier:
        return {}
    free = next(i for i in range(config.vocab_size) if i not in (config.end_id, config.padding_id))
    ids = np.where(ids == config.end_id, free, ids)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    ids[np.arange(len(ids)), last] = config.end_id
    return {"ids": ids}


def options(model: Any) -> dict[str, Any]:
    """The number of labels, where the model has any."""
    return {} if type(model) in FLAT else {"num_labels": model.config.labels}


def half_probes(half: str, own: str, before: str) -> Probes:
    block, layer = f"{own}{BLOCK.format(half=half)}", f"{before}{LAYER.format(half=half)}"
    return (
        *((f"{block}.{a}", f"{layer}.{b}") for a, b in parts(half)),
        (f"{block}.mlp", f"{layer}.{last_of(half)}.DenseReluDense"),
        (block, layer.removesuffix(".layer")),
        (f"{own}{half}.norm", f"{before}{half}.final_layer_norm"),
    )


HEAD_PROBES: dict[type, Probes] = {
    T5: (("head", "lm_head"),),
    SequenceClassifier: (("head.dense", "classification_head.dense"), ("head", "classification_head")),
    TokenClassifier: (("head", "classifier"),),
    QuestionAnswerer: (("head", "qa_outputs"),),
}


def probes(model_class: type) -> Probes:
    own, before = ours(model_class), PREFIX if model_class in PREFIXED else ""
    halves = ("encoder",) if model_class in ONE_HALF else ("encoder", "decoder")
    return (
        (f"{own}embedding", f"{before}{halves[-1]}.embed_tokens"),
        *(probe for half in halves for probe in half_probes(half, own, before)),
        *HEAD_PROBES.get(model_class, ()),
    )


def architectures(name: str) -> dict[str, type]:
    """The reference's classes, which differ between the families in this part of their names alone."""
    return {
        f"{name}Model": T5Model,
        f"{name}ForConditionalGeneration": T5,
        f"{name}EncoderModel": T5Encoder,
        f"{name}ForSequenceClassification": SequenceClassifier,
        f"{name}ForTokenClassification": TokenClassifier,
        f"{name}ForQuestionAnswering": QuestionAnswerer,
    }


ALIASES = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
ALIASES |= {"head_dim": "d_kv"}
READ = {"eos_token_id", "decoder_start_token_id"}

FAMILY = Family(
    model_type="t5",
    defaults=T5_V1,
    architectures=architectures("T5") | {"T5WithLMHeadModel": T5},  # as the first files call it
    like={},
    carries={},
    prefix=PREFIX,
    unprefixed=(T5, T5Encoder, QuestionAnswerer),
    roots=("shared", "encoder", "decoder"),
    facts=facts(T5_V1, None, feed_forward("relu"), SCALED),
    fixed={name: allowed for name, allowed in FIXED.items() if name != "is_encoder_decoder"} | {"is_decoder": (False,)},
    irrelevant=(EVERYWHERE - READ) | {"is_encoder_decoder", "n_positions"},
    table=table,
    observe=observe,
    legacy={},
    older=(*OLDER, *aliases(ALIASES)),
    flax={"shared": "embedding", "relative_attention_bias": "embedding", "layer_norm": "weight"},
    probes=probes,
    inputs=inputs,
    called={"decoder_token_ids": "decoder_input_ids"},
    options=options,
)

# The reference ties or not by the tensors alone, and never scales: its files say that they are untied.
MT5_FAMILY = replace(
    FAMILY,
    model_type="mt5",
    defaults=replace(MT5, tied=True),
    architectures=architectures("MT5"),
    facts=facts(MT5, 0, feed_forward("gated-gelu")),
    irrelevant=FAMILY.irrelevant | {"tie_word_embeddings"},
)


# Version 4's files say both with it; today's always say that it is true.
TIED_AND_SCALED = Fact(
    ("tie_word_embeddings",),
    ("tied", "scaled"),
    lambda value: (flag(value),) * 2,
    lambda tied, scaled: (scaled,),
    (True,),
)


def settle(reference: Any, model: Any) -> None:
    """transformers 5 takes every config for a tied one's, which scales; version 4, that made the files, did not."""
    reference.config.tie_word_embeddings = model.config.scaled


UMT5_FAMILY = replace(
    FAMILY,
    model_type="umt5",
    defaults=replace(UMT5, tied=True),
    architectures=architectures("UMT5"),
    facts=facts(MT5, 0, feed_forward("gated-gelu"), TIED_AND_SCALED),
    irrelevant=FAMILY.irrelevant | {"scalable_attention"},  # published files say it, no version reads it
    flax=None,
    settle=settle,
)
