"""BERT: google-bert/bert-base-uncased and its kin. Reference: transformers' bert."""

from eqx_transformers import BERT, Encoder, EncoderConfig, MaskedLM, SentenceEmbedder, SequenceClassifier

from ..family import Family
from ..rules import Ignore, Table, affine
from ._encoder import FIXED, IRRELEVANT, encoder_table, facts, observe, output_table, probes

PREFIX, PREDICTIONS = "bert.", "cls.predictions"


def table(config: EncoderConfig, model_class: type) -> Table:
    return (*encoder_table(PREFIX, model_class, config), *head(config, model_class), *SURPLUS)


def head(config: EncoderConfig, model_class: type) -> Table:
    if model_class is MaskedLM:
        return (
            *affine(f"{PREDICTIONS}.transform.dense", "head.dense"),
            *affine(f"{PREDICTIONS}.transform.LayerNorm", "head.norm"),
            *output_table(config, PREFIX, PREDICTIONS),
        )
    return affine("classifier", "head.output") if model_class is SequenceClassifier else ()


SURPLUS = (
    Ignore("cls.predictions.*", "the masked-LM head is not part of this model", parameter=True),
    Ignore("cls.seq_relationship.*", "the next-sentence head is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

HEAD_PROBES = {
    Encoder: (("pooler", "pooler"),),
    MaskedLM: (("head.dense", f"{PREDICTIONS}.transform.dense"), ("head", "cls")),
    SequenceClassifier: (("backbone.pooler", "bert.pooler"), ("head.output", "classifier")),
}

FAMILY = Family(
    model_type="bert",
    defaults=BERT,
    architectures={
        "BertModel": Encoder,
        "BertForMaskedLM": MaskedLM,
        "BertForSequenceClassification": SequenceClassifier,
    },
    like={SentenceEmbedder: Encoder},
    carries={"BertForPreTraining": (MaskedLM,)},
    prefix=PREFIX,
    facts=facts(vocab_size=30522, padding_id=0),
    fixed=FIXED,
    irrelevant=IRRELEVANT,
    table=table,
    observe=observe(PREFIX, PREDICTIONS),
    legacy={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    probes=probes(PREFIX, HEAD_PROBES),
)
