"""Transformers in JAX as immutable Equinox pytrees. The one public door: every name here is public."""

import os as _os

if _os.environ.get("EQX_TRANSFORMERS_CHECK") == "1":
    from ._checks import install as _install

    _install()

from .encode import encode as encode
from .expression import Rewritten as Rewritten, capture as capture, rewrite as rewrite, trace as trace
from .generation import Beams as Beams, beam_search as beam_search, generate as generate
from .models import (
    BERT as BERT,
    DISTILBERT as DISTILBERT,
    ELECTRA as ELECTRA,
    FLAX_T5_VAE as FLAX_T5_VAE,
    FUNCTIONAL_2022 as FUNCTIONAL_2022,
    FUNCTIONAL_HEAD as FUNCTIONAL_HEAD,
    GPT2 as GPT2,
    HAIKU_EXAMPLE as HAIKU_EXAMPLE,
    HAIKU_TUTORIAL as HAIKU_TUTORIAL,
    LLAMA as LLAMA,
    MISTRAL as MISTRAL,
    MT5 as MT5,
    QWEN2 as QWEN2,
    QWEN3 as QWEN3,
    ROBERTA as ROBERTA,
    T5 as T5,
    T5_V1 as T5_V1,
    T5_V1_1 as T5_V1_1,
    T5VAE as T5VAE,
    TORCH_T5_VAE as TORCH_T5_VAE,
    UMT5 as UMT5,
    XLM_R as XLM_R,
    CausalLM as CausalLM,
    Discriminator as Discriminator,
    Encoder as Encoder,
    EncoderConfig as EncoderConfig,
    FunctionalConfig as FunctionalConfig,
    FunctionalTransformer as FunctionalTransformer,
    GPT2Config as GPT2Config,
    Llama as Llama,
    LlamaConfig as LlamaConfig,
    MaskedLM as MaskedLM,
    Memory as Memory,
    MultipleChoice as MultipleChoice,
    NextSentencePredictor as NextSentencePredictor,
    Posterior as Posterior,
    PreTraining as PreTraining,
    PreTrainingLogits as PreTrainingLogits,
    QuestionAnswerer as QuestionAnswerer,
    SentenceEmbedder as SentenceEmbedder,
    SequenceClassifier as SequenceClassifier,
    T5Config as T5Config,
    T5Encoder as T5Encoder,
    T5Model as T5Model,
    T5VAEConfig as T5VAEConfig,
    T5VAEOutput as T5VAEOutput,
    TokenClassifier as TokenClassifier,
    Transformer as Transformer,
    TransformerConfig as TransformerConfig,
)
from .nn import stack as stack, unstack as unstack
from .reconfigure import reconfigure as reconfigure
from .serialisation import FormatError as FormatError, load as load, save as save
from .summary import summary as summary
from .surgery import LoRA as LoRA, Selection as Selection, select as select
