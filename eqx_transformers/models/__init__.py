"""Models, one file a family, and the heads that stand on them."""

from .encoder_config import (
    BERT as BERT,
    DISTILBERT as DISTILBERT,
    ELECTRA as ELECTRA,
    ROBERTA as ROBERTA,
    XLM_R as XLM_R,
    EncoderConfig as EncoderConfig,
)
from .functional import (
    FUNCTIONAL_2022 as FUNCTIONAL_2022,
    FUNCTIONAL_HEAD as FUNCTIONAL_HEAD,
    FunctionalConfig as FunctionalConfig,
    FunctionalTransformer as FunctionalTransformer,
)
from .gpt2 import GPT2 as GPT2, GPT2Config as GPT2Config
from .heads import (
    CausalLM as CausalLM,
    Discriminator as Discriminator,
    MaskedLM as MaskedLM,
    MultipleChoice as MultipleChoice,
    NextSentencePredictor as NextSentencePredictor,
    PreTraining as PreTraining,
    PreTrainingLogits as PreTrainingLogits,
    QuestionAnswerer as QuestionAnswerer,
    SentenceEmbedder as SentenceEmbedder,
    SequenceClassifier as SequenceClassifier,
    TokenClassifier as TokenClassifier,
)
from .llama import (
    LLAMA as LLAMA,
    MISTRAL as MISTRAL,
    QWEN2 as QWEN2,
    QWEN3 as QWEN3,
    Llama as Llama,
    LlamaConfig as LlamaConfig,
)
from .roberta import Encoder as Encoder
from .transformer import (
    HAIKU_EXAMPLE as HAIKU_EXAMPLE,
    HAIKU_TUTORIAL as HAIKU_TUTORIAL,
    Transformer as Transformer,
    TransformerConfig as TransformerConfig,
)
