"""RoBERTa and XLM-R: FacebookAI/roberta-base, xlm-roberta-base and their kin. Reference: transformers' roberta."""

from dataclasses import replace

from eqx_transformers import ROBERTA, XLM_R, Encoder, EncoderConfig, MaskedLM, SentenceEmbedder, SequenceClassifier

from ..family import Family
from ..rules import Ignore, Table, affine
from ._encoder import FIXED, IRRELEVANT, encoder_table, facts, observe, output_table, probes

PREFIX = "roberta."


def table(config: EncoderConfig, model_class: type) -> Table:
    return (*encoder_table(PREFIX, model_class, config), *head(config, model_class), *SURPLUS)


def head(config: EncoderConfig, model_class: type) -> Table:
    if model_class is MaskedLM:
        return (
            *affine("lm_head.dense", "head.dense"),
            *affine("lm_head.layer_norm", "head.norm"),
            *output_table(config, PREFIX, "lm_head"),
        )
    if model_class is SequenceClassifier:
        return (*affine("classifier.dense", "head.dense"), *affine("classifier.out_proj", "head.output"))
    return ()


SURPLUS = (
    Ignore("lm_head.*", "the masked-LM head is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

HEAD_PROBES = {
    Encoder: (("pooler", "pooler"),),
    MaskedLM: (("head.dense", "lm_head.dense"), ("head", "lm_head")),
    SequenceClassifier: (("head.dense", "classifier.dense"), ("head.output", "classifier.out_proj")),
}

FAMILY = Family(
    model_type="roberta",
    defaults=ROBERTA,
    architectures={
        "RobertaModel": Encoder,
        "RobertaForMaskedLM": MaskedLM,
        "RobertaForSequenceClassification": SequenceClassifier,
    },
    like={SentenceEmbedder: Encoder},
    carries={},
    prefix=PREFIX,
    facts=facts(vocab_size=50265, padding_id=1),
    fixed=FIXED,
    irrelevant=IRRELEVANT,
    table=table,
    observe=observe(PREFIX, "lm_head"),
    legacy={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    probes=probes(PREFIX, HEAD_PROBES),
)

XLM = replace(
    FAMILY,
    model_type="xlm-roberta",
    defaults=XLM_R,
    architectures={
        "XLMRobertaModel": Encoder,
        "XLMRobertaForMaskedLM": MaskedLM,
        "XLMRobertaForSequenceClassification": SequenceClassifier,
    },
    facts=facts(vocab_size=30522, padding_id=1),
)
