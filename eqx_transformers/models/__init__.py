"""Models, one file a family, and the heads that stand on them."""

from .heads import (
    MaskedLM as MaskedLM,
    SentenceEmbedder as SentenceEmbedder,
    SequenceClassifier as SequenceClassifier,
)
from .roberta import (
    BERT as BERT,
    ROBERTA as ROBERTA,
    XLM_R as XLM_R,
    Encoder as Encoder,
    EncoderConfig as EncoderConfig,
)
