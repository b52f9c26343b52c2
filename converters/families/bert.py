"""BERT: google-bert/bert-base-uncased and its kin. Reference: transformers' bert."""

from eqx_transformers import (
    BERT,
    CausalLM,
    Encoder,
    EncoderConfig,
    MaskedLM,
    MultipleChoice,
    NextSentencePredictor,
    PreTraining,
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

PREFIX, PREDICTIONS, PAIRS = "bert.", "cls.predictions", "cls.seq_relationship"


def table(config: EncoderConfig, model_class: type) -> Table:
    return (*encoder_table(PREFIX, model_class, config), *head(config, model_class), *SURPLUS)


def head(config: EncoderConfig, model_class: type) -> Table:
    predictions = (
        *affine(f"{PREDICTIONS}.transform.dense", "head.dense"),
        *affine(f"{PREDICTIONS}.transform.LayerNorm", "head.norm"),
        *output_table(config, PREFIX, PREDICTIONS),
    )
    return {
        MaskedLM: predictions,
        CausalLM: predictions,
        PreTraining: (*predictions, *affine(PAIRS, "next_sentence.output")),
        NextSentencePredictor: affine(PAIRS, "head.output"),
        SequenceClassifier: affine("classifier", "head.output"),
        TokenClassifier: affine("classifier", "head.output"),
        MultipleChoice: affine("classifier", "head.output"),
        QuestionAnswerer: affine("qa_outputs", "head.output"),
    }.get(model_class, ())


SURPLUS = (
    Ignore(f"{PREDICTIONS}.*", "the masked-LM head is not part of this model", parameter=True),
    Ignore(f"{PAIRS}.*", "the next-sentence head is not part of this model", parameter=True),
    Ignore("classifier.*", "another task's classifier is not part of this model", parameter=True),
    Ignore("qa_outputs.*", "the question-answering head is not part of this model", parameter=True),
)

MASKED = ("head.dense", f"{PREDICTIONS}.transform.dense"), ("head", PREDICTIONS)
POOLER = ("backbone.pooler", "bert.pooler")
HEAD_PROBES = {
    Encoder: (("pooler", "pooler"),),
    MaskedLM: MASKED,
    CausalLM: MASKED,
    PreTraining: (*MASKED, POOLER, ("next_sentence", PAIRS)),
    NextSentencePredictor: (POOLER, ("head", PAIRS)),
    SequenceClassifier: (POOLER, ("head", "classifier")),
    TokenClassifier: (("head", "classifier"),),
    MultipleChoice: (POOLER, ("head", "classifier")),
    QuestionAnswerer: (("head", "qa_outputs"),),
}

FAMILY = Family(
    model_type="bert",
    defaults=BERT,
    architectures={
        "BertModel": Encoder,
        "BertForMaskedLM": MaskedLM,
        "BertLMHeadModel": CausalLM,
        "BertForCausalLM": CausalLM,  # as its Flax class is called
        "BertForPreTraining": PreTraining,
        "BertForNextSentencePrediction": NextSentencePredictor,
        "BertForSequenceClassification": SequenceClassifier,
        "BertForTokenClassification": TokenClassifier,
        "BertForQuestionAnswering": QuestionAnswerer,
        "BertForMultipleChoice": MultipleChoice,
    },
    like={SentenceEmbedder: Encoder},
    carries={
        "BertForPreTraining": (MaskedLM, CausalLM, NextSentencePredictor),
        "BertForMaskedLM": (CausalLM, PreTraining),
        "BertLMHeadModel": (MaskedLM, PreTraining),
        "BertForCausalLM": (MaskedLM, PreTraining),
        "BertForNextSentencePrediction": (PreTraining,),
    },
    prefix=PREFIX,
    roots=("embeddings", "encoder", "pooler"),
    facts=facts(vocab_size=30522, padding_id=0),
    fixed=FIXED,
    irrelevant=IRRELEVANT,
    table=table,
    observe=observe(PREFIX, PREDICTIONS),
    legacy=LEGACY,
    probes=probes(PREFIX, HEAD_PROBES),
    flax=FLAX,
    inputs=inputs,
    options=options,
)
