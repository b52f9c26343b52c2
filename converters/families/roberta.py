"""RoBERTa and XLM-R: FacebookAI/roberta-base, xlm-roberta-base and their kin. Reference: transformers' roberta."""

from dataclasses import replace

from eqx_transformers import (
    ROBERTA,
    XLM_R,
    CausalLM,
    Encoder,
    EncoderConfig,
    MaskedLM,
    MultipleChoice,
    QuestionAnswerer,
    SentenceEmbedder,
    SequenceClassifier,
    TokenClassifier,
)

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
    observe,
    options,
    output_table,
    probes,
)

PREFIX = "roberta."


def table(config: EncoderConfig, model_class: type) -> Table:
    return (*encoder_table(PREFIX, model_class, config), *head(config, model_class), *SURPLUS)


def head(config: EncoderConfig, model_class: type) -> Table:
    predictions = (
        *affine("lm_head.dense", "head.dense"),
        *affine("lm_head.layer_norm", "head.norm"),
        *output_table(config, PREFIX, "lm_head"),
    )
    return {
        MaskedLM: predictions,
        CausalLM: predictions,
        SequenceClassifier: (*affine("classifier.dense", "head.dense"), *affine("classifier.out_proj", "head.output")),
        TokenClassifier: affine("classifier", "head.output"),
        MultipleChoice: affine("classifier", "head.output"),
        QuestionAnswerer: affine("qa_outputs", "head.output"),
    }.get(model_class, ())


SURPLUS = (
    Ignore("lm_head.*", "the masked-LM head is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

MASKED = ("head.dense", "lm_head.dense"), ("head", "lm_head")
HEAD_PROBES = {
    Encoder: (("pooler", "pooler"),),
    MaskedLM: MASKED,
    CausalLM: MASKED,
    SequenceClassifier: (("head.dense", "classifier.dense"), ("head", "classifier")),
    TokenClassifier: (("head", "classifier"),),
    MultipleChoice: (("backbone.pooler", "roberta.pooler"), ("head", "classifier")),
    QuestionAnswerer: (("head", "qa_outputs"),),
}


def architectures(name: str) -> dict[str, type]:
    """The reference's classes, which differ between the two families in this part of their names alone."""
    return {
        f"{name}Model": Encoder,
        f"{name}ForMaskedLM": MaskedLM,
        f"{name}ForCausalLM": CausalLM,
        f"{name}ForSequenceClassification": SequenceClassifier,
        f"{name}ForTokenClassification": TokenClassifier,
        f"{name}ForQuestionAnswering": QuestionAnswerer,
        f"{name}ForMultipleChoice": MultipleChoice,
    }


def carries(name: str) -> dict[str, tuple[type, ...]]:
    return {f"{name}ForMaskedLM": (CausalLM,), f"{name}ForCausalLM": (MaskedLM,)}


FAMILY = Family(
    model_type="roberta",
    defaults=ROBERTA,
    architectures=architectures("Roberta"),
    like={SentenceEmbedder: Encoder},
    carries=carries("Roberta"),
    prefix=PREFIX,
    roots=("embeddings", "encoder", "pooler"),
    facts=facts(vocab_size=50265, padding_id=1),
    fixed=FIXED,
    irrelevant=IRRELEVANT,
    table=table,
    observe=observe(PREFIX, "lm_head"),
    legacy=LEGACY,
    probes=probes(PREFIX, HEAD_PROBES),
    flax=FLAX,
    inputs=inputs,
    options=options,
)

XLM = replace(
    FAMILY,
    model_type="xlm-roberta",
    defaults=XLM_R,
    architectures=architectures("XLMRoberta"),
    carries=carries("XLMRoberta"),
    facts=facts(vocab_size=30522, padding_id=1),
)
