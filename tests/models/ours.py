"""Tiny models of ours, with random numbers in every array, and compiled calls of them."""

import functools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqx_transformers import (
    BERT,
    DISTILBERT,
    ELECTRA,
    FUNCTIONAL_2022,
    HAIKU_EXAMPLE,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    ROBERTA,
    XLM_R,
    CausalLM,
    Discriminator,
    Encoder,
    GPT2Config,
    MaskedLM,
    MultipleChoice,
    NextSentencePredictor,
    PreTraining,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
    stack,
)
from eqx_transformers.skeletons import skeleton
from eqx_transformers.surgery import spell

SIZES = {"vocab_size": 61, "embed_dim": 21, "num_layers": 2, "num_heads": 3, "mlp_dim": 37, "max_positions": 31}
CONFIGS = {
    "bert": replace(BERT, **SIZES, activation="gelu_tanh"),
    "roberta": replace(ROBERTA, **SIZES, labels=3),
    "xlm-roberta": replace(XLM_R, **SIZES, activation="relu"),
    "distilbert": replace(DISTILBERT, **SIZES),
    "electra": replace(ELECTRA, **SIZES, embedding_dim=13, activation="silu"),
}
ROTARY = SIZES | {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "attention_dropout": 0.1}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_base": 30.0, "rope_original_positions": 8}
# Every fact that decides the function is somewhere; sequences are longer than the windows and the original positions.
DECODERS = {
    "gpt2": GPT2Config(**SIZES, padding_id=1, labels=3),
    "llama": replace(LLAMA, **ROTARY, **LLAMA3, padding_id=1, labels=3),
    "mistral": replace(MISTRAL, **ROTARY, window=4),
    "qwen2": replace(QWEN2, **ROTARY, window=5, windowed=(False, True), rope_scaling="linear", rope_factor=3.0),
    "qwen3": replace(QWEN3, **ROTARY, tied=True, output_bias=True, mlp_bias=True, activation="gelu_tanh"),
    "haiku": replace(HAIKU_EXAMPLE, **{k: v for k, v in SIZES.items() if k != "mlp_dim"}, head_dim=5),
    "functional": replace(FUNCTIONAL_2022, **SIZES, head_dim=5),
}
# The models of one sequence, and what a call of each gives.
SHAPES = {
    Encoder: ("seq", 21),
    MaskedLM: ("seq", 61),
    SequenceClassifier: ("labels",),
    SentenceEmbedder: (21,),
    CausalLM: ("seq", 61),
    PreTraining: (("seq", 61), (2,)),
    NextSentencePredictor: (2,),
    TokenClassifier: ("seq", "labels"),
    QuestionAnswerer: ("seq", 2),
    Discriminator: ("seq",),
}
HEADS = (*SHAPES, MultipleChoice)
KEY = jax.random.key(0)
LENGTH = 13


def filled(tree, seed=0, dtype="float32"):
    """Random numbers for the arrays, or the shapes, of a tree: fresh biases of zero hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
            return x
        gain = spell(path).endswith("norm.weight")
        return jnp.asarray((gain + 0.4 * rng.normal(size=x.shape)).astype(jnp.dtype(dtype)))

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def make(head, family, stacked=False, **facts):
    """A model of `family` under changed facts."""
    model = filled(skeleton(head, replace((CONFIGS | DECODERS)[family], **facts)))
    return stack(model) if stacked else model


def tokens(seed=0, length=LENGTH):
    """Ids that are no family's padding."""
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], length).astype(np.int32)


call = eqx.filter_jit(lambda model, ids, key=None, **inputs: model(ids, key=key, **inputs))


@eqx.filter_jit
def train(model, ids, inputs):
    """(output, gradient of the sum of its squares), compiled once: compiling is what costs time in these tests."""

    def loss(model):
        y = model(ids, **inputs)
        return jnp.square(y).sum(), y

    (_, y), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return y, gradient
