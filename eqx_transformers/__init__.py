"""Transformers in JAX as immutable Equinox pytrees. The one public door: every name here is public."""

import os as _os

if _os.environ.get("EQX_TRANSFORMERS_CHECK") == "1":
    from ._checks import install as _install

    _install()

from .models import (
    BERT as BERT,
    ROBERTA as ROBERTA,
    XLM_R as XLM_R,
    Encoder as Encoder,
    EncoderConfig as EncoderConfig,
    MaskedLM as MaskedLM,
    SentenceEmbedder as SentenceEmbedder,
    SequenceClassifier as SequenceClassifier,
)
from .nn import stack as stack, unstack as unstack
from .reconfigure import reconfigure as reconfigure
from .serialisation import FormatError as FormatError, load as load, save as save
from .summary import summary as summary
