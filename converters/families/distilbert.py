"""DistilBERT: distilbert/distilbert-base-uncased and its kin. Reference: transformers' distilbert."""

from eqx_transformers import (
    DISTILBERT,
    Encoder,
    EncoderConfig,
    MaskedLM,
    MultipleChoice,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
)

from ..config import choice, fact, flag, optional, rate, size, whole
from ..family import Family
from ..rules import Ignore, Table, affine, rule
from ._encoder import (
    ACTIVATIONS,
    FIXED,
    FLAX,
    IRRELEVANT,
    LEGACY,
    inputs,
    labels,
    linear_output,
    observe,
    options_without_pooler,
    ours,
)

PREFIX = "distilbert."


def table(config: EncoderConfig, model_class: type) -> Table:
    inside, embedding = f"{PREFIX}embeddings", f"{ours(model_class)}embedding"
    layer, block = f"{PREFIX}transformer.layer.{{i}}", f"{ours(model_class)}stack.blocks.{{i}}"
    return (
        rule(f"{inside}.word_embeddings.weight", f"{embedding}.tokens.weight"),
        rule(f"{inside}.position_embeddings.weight", f"{embedding}.positions.weight"),
        *affine(f"{inside}.LayerNorm", f"{embedding}.norm"),
        *affine(f"{layer}.attention.q_lin", f"{block}.attention.query_proj"),
        *affine(f"{layer}.attention.k_lin", f"{block}.attention.key_proj"),
        *affine(f"{layer}.attention.v_lin", f"{block}.attention.value_proj"),
        *affine(f"{layer}.attention.out_lin", f"{block}.attention.output_proj"),
        *affine(f"{layer}.sa_layer_norm", f"{block}.attention_norm"),
        *affine(f"{layer}.ffn.lin1", f"{block}.mlp.up_proj"),
        *affine(f"{layer}.ffn.lin2", f"{block}.mlp.down_proj"),
        *affine(f"{layer}.output_layer_norm", f"{block}.mlp_norm"),
        *head(config, model_class),
        Ignore(f"{inside}.position_ids", "a counter 0, 1, 2, …: positions are computed"),
        *SURPLUS,
    )


def head(config: EncoderConfig, model_class: type) -> Table:
    dense = (*affine("pre_classifier", "head.dense"), *affine("classifier", "head.output"))
    return {
        MaskedLM: (
            *affine("vocab_transform", "head.dense"),
            *affine("vocab_layer_norm", "head.norm"),
            *linear_output(config, PREFIX, "vocab_projector"),
        ),
        SequenceClassifier: dense,
        MultipleChoice: dense,
        TokenClassifier: affine("classifier", "head.output"),
        QuestionAnswerer: affine("qa_outputs", "head.output"),
    }.get(model_class, ())


SURPLUS = (
    Ignore("vocab_*", "the masked-LM head is not part of this model", parameter=True),
    Ignore("pre_classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

HEAD_PROBES = {
    MaskedLM: (("head.dense", "vocab_transform"), ("head", "vocab_projector")),
    SequenceClassifier: (("head.dense", "pre_classifier"), ("head", "classifier")),
    MultipleChoice: (("head.dense", "pre_classifier"), ("head", "classifier")),
    TokenClassifier: (("head", "classifier"),),
    QuestionAnswerer: (("head", "qa_outputs"),),
}


def probes(model_class: type) -> tuple[tuple[str, str], ...]:
    before = "" if model_class in (Encoder, SentenceEmbedder) else PREFIX
    block, layer = f"{ours(model_class)}stack.blocks.{{i}}", f"{before}transformer.layer.{{i}}"
    return (
        (f"{ours(model_class)}embedding", f"{before}embeddings"),
        (f"{block}.attention.query_proj", f"{layer}.attention.q_lin"),
        (f"{block}.attention.key_proj", f"{layer}.attention.k_lin"),
        (f"{block}.attention.value_proj", f"{layer}.attention.v_lin"),
        (f"{block}.attention", f"{layer}.attention.out_lin"),
        (f"{block}.attention_norm", f"{layer}.sa_layer_norm"),
        (f"{block}.mlp.up_proj", f"{layer}.ffn.lin1"),
        (f"{block}.mlp", f"{layer}.ffn"),
        (f"{block}.mlp_norm", f"{layer}.output_layer_norm"),
        *HEAD_PROBES.get(model_class, ()),
    )


FAMILY = Family(
    model_type="distilbert",
    defaults=DISTILBERT,
    architectures={
        "DistilBertModel": Encoder,
        "DistilBertForMaskedLM": MaskedLM,
        "DistilBertForSequenceClassification": SequenceClassifier,
        "DistilBertForTokenClassification": TokenClassifier,
        "DistilBertForQuestionAnswering": QuestionAnswerer,
        "DistilBertForMultipleChoice": MultipleChoice,
    },
    like={SentenceEmbedder: Encoder},
    carries={},
    prefix=PREFIX,
    roots=("embeddings", "transformer"),
    facts=(
        fact("vocab_size", "vocab_size", whole, 30522),
        fact("dim", "embed_dim", whole, 768),
        fact("n_layers", "num_layers", whole, 6),
        fact("n_heads", "num_heads", whole, 12),
        fact("hidden_dim", "mlp_dim", whole, 3072),
        fact("max_position_embeddings", "max_positions", whole, 512),
        choice("activation", "activation", ACTIVATIONS, "gelu"),
        fact("pad_token_id", "padding_id", optional(whole), 0),
        fact("dropout", "dropout", rate, 0.1),
        fact("attention_dropout", "attention_dropout", rate, 0.1),
        fact("seq_classif_dropout", "classifier_dropout", rate, 0.2),
        fact("qa_dropout", "answer_dropout", rate, 0.1),
        fact("initializer_range", "init_std", size, 0.02),
        fact("tie_word_embeddings", "tied", flag, True),
        labels(),
    ),
    fixed=FIXED | {"is_decoder": (False,)},
    # Sinusoidal positions are how the table was first filled; it is in the file as any other.
    irrelevant=IRRELEVANT | {"sinusoidal_pos_embds", "tie_weights_"},
    table=table,
    observe=observe(PREFIX),
    legacy=LEGACY,
    probes=probes,
    flax=FLAX,
    inputs=inputs,
    options=options_without_pooler,
)
