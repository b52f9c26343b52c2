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
from .t5 import T5 as T5, T5Encoder as T5Encoder, T5Model as T5Model
from .t5_config import MT5 as MT5, T5_V1 as T5_V1, T5_V1_1 as T5_V1_1, UMT5 as UMT5, T5Config as T5Config
from .t5_parts import Memory as Memory
from .t5_vae import T5VAE as T5VAE, Posterior as Posterior, T5VAEOutput as T5VAEOutput
from .t5_vae_config import (
    FLAX_T5_VAE as FLAX_T5_VAE,
    TORCH_T5_VAE as TORCH_T5_VAE,
    T5VAEConfig as T5VAEConfig,
)
from .transformer import (
    HAIKU_EXAMPLE as HAIKU_EXAMPLE,
    HAIKU_TUTORIAL as HAIKU_TUTORIAL,
    Transformer as Transformer,
    TransformerConfig as TransformerConfig,
)
