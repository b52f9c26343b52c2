"""ELECTRA, discriminator and generator: google/electra-*. Reference: transformers' electra."""

from eqx_transformers import (
    ELECTRA,
    CausalLM,
    Discriminator,
    Encoder,
    EncoderConfig,
    MaskedLM,
    MultipleChoice,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
)

from ..config import fact, rate, whole
from ..family import Family
from ..rules import Ignore, Table, affine
from ._encoder import (
    FIXED,
    FLAX,
    IRRELEVANT,
    LEGACY,
    encoder_table,
    facts,
    inputs,
    linear_output,
    observe,
    options_without_pooler,
    ours,
    probes,
)

PREFIX = "electra."


def table(config: EncoderConfig, model_class: type) -> Table:
    return (
        *encoder_table(PREFIX, model_class, config),
        *affine(f"{PREFIX}embeddings_project", f"{ours(model_class)}embedding.projection"),
        *head(config, model_class),
        *SURPLUS,
    )


def head(config: EncoderConfig, model_class: type) -> Table:
    predictions = (
        *affine("generator_predictions.dense", "head.dense"),
        *affine("generator_predictions.LayerNorm", "head.norm"),
        *linear_output(config, PREFIX, "generator_lm_head"),
    )
    return {
        MaskedLM: predictions,
        CausalLM: predictions,
        Discriminator: (
            *affine("discriminator_predictions.dense", "head.dense"),
            *affine("discriminator_predictions.dense_prediction", "head.output"),
        ),
        SequenceClassifier: (*affine("classifier.dense", "head.dense"), *affine("classifier.out_proj", "head.output")),
        TokenClassifier: affine("classifier", "head.output"),
        MultipleChoice: (*affine("sequence_summary.summary", "head.dense"), *affine("classifier", "head.output")),
        QuestionAnswerer: affine("qa_outputs", "head.output"),
    }.get(model_class, ())


SURPLUS = (
    Ignore("generator_*", "the generator's head is not part of this model", parameter=True),
    Ignore("discriminator_predictions.*", "the discriminator's head is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("sequence_summary.*", "the multiple-choice head is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

MASKED = ("head.norm", "generator_predictions"), ("head", "generator_lm_head")
HEAD_PROBES = {
    MaskedLM: MASKED,
    CausalLM: MASKED,
    Discriminator: (
        ("head.dense", "discriminator_predictions.dense"),
        ("head", "discriminator_predictions.dense_prediction"),
    ),
    SequenceClassifier: (("head.dense", "classifier.dense"), ("head", "classifier")),
    TokenClassifier: (("head", "classifier"),),
    MultipleChoice: (("head.dense", "sequence_summary.summary"), ("head", "classifier")),
    QuestionAnswerer: (("head", "qa_outputs"),),
}

FAMILY = Family(
    model_type="electra",
    defaults=ELECTRA,
    architectures={
        "ElectraModel": Encoder,
        "ElectraForPreTraining": Discriminator,
        "ElectraForMaskedLM": MaskedLM,
        "ElectraForCausalLM": CausalLM,
        "ElectraForSequenceClassification": SequenceClassifier,
        "ElectraForTokenClassification": TokenClassifier,
        "ElectraForQuestionAnswering": QuestionAnswerer,
        "ElectraForMultipleChoice": MultipleChoice,
    },
    like={SentenceEmbedder: Encoder},
    carries={"ElectraForMaskedLM": (CausalLM,), "ElectraForCausalLM": (MaskedLM,)},
    prefix=PREFIX,
    roots=("embeddings", "embeddings_project", "encoder"),
    facts=(
        *facts(vocab_size=30522, padding_id=0, embed_dim=256, num_heads=4, mlp_dim=1024),
        fact("embedding_size", "embedding_dim", whole, 128),
        fact("summary_last_dropout", "choice_dropout", rate, 0.1),
    ),
    fixed=FIXED
    | {
        "summary_type": ("first",),
        "summary_use_proj": (True,),
        "summary_activation": ("gelu",),
    },
    irrelevant=IRRELEVANT,
    table=table,
    observe=observe(PREFIX),
    legacy=LEGACY,
    probes=probes(
        PREFIX, HEAD_PROBES, (("embedding.norm", "embeddings"), ("embedding.projection", "embeddings_project"))
    ),
    flax=FLAX,
    inputs=inputs,
    options=options_without_pooler,
)
