"""Training: losses and objectives, steps, data, checkpoints, and the loop around them; `recipes/` are applications."""

from ._signals import Interrupted as Interrupted
from .batching import Buckets as Buckets
from .callbacks import Callback as Callback, EarlyStop as EarlyStop, to_run as to_run
from .checkpoint import CheckpointError as CheckpointError, Checkpoints as Checkpoints, Restored as Restored
from .corruption import (
    corrupt_batch as corrupt_batch,
    corrupt_spans as corrupt_spans,
    corrupted_lengths as corrupted_lengths,
    mask_tokens as mask_tokens,
)
from .data import Batches as Batches, BatchIterator as BatchIterator
from .entropy import (
    bigram_entropy as bigram_entropy,
    bits_per_character as bits_per_character,
    unigram_entropy as unigram_entropy,
)
from .history import History as History, Log as Log, plot_curves as plot_curves
from .loop import Fitted as Fitted, NotFinite as NotFinite, fit as fit
from .losses import (
    chunked_cross_entropy as chunked_cross_entropy,
    cross_entropy as cross_entropy,
    lm_loss as lm_loss,
    next_token_loss as next_token_loss,
    next_tokens as next_tokens,
)
from .objectives import (
    autoencoder_loss as autoencoder_loss,
    classification_loss as classification_loss,
    contrastive_loss as contrastive_loss,
    language_model_loss as language_model_loss,
    masked_lm_loss as masked_lm_loss,
    sequence_to_sequence_loss as sequence_to_sequence_loss,
)
from .optimizers import adam_uncorrected as adam_uncorrected, adamw as adamw
from .originals import (
    functional_transformer as functional_transformer,
    haiku_tutorial as haiku_tutorial,
    roberta_article as roberta_article,
    roberta_scale as roberta_scale,
)
from .packing import Packed as Packed, Windows as Windows
from .regularisers import (
    RBF as RBF,
    AbstractKernel as AbstractKernel,
    OriginalKernel as OriginalKernel,
    kl as kl,
    logistic_weight as logistic_weight,
    mmd as mmd,
    mmd_to_prior as mmd_to_prior,
    reconstruction_loss as reconstruction_loss,
    reparameterised as reparameterised,
)
from .schedules import (
    warmup_cosine as warmup_cosine,
    warmup_linear as warmup_linear,
    warmup_steps as warmup_steps,
)
from .text import DataError as DataError, Records as Records, read_text as read_text, read_texts as read_texts
from .tokens import TokenizedTexts as TokenizedTexts, tokenize as tokenize
from .updater import TrainState as TrainState, Updater as Updater, compiled as compiled
from .vocabularies import (
    load_tokenizer as load_tokenizer,
    train_tokenizer as train_tokenizer,
    word_starts as word_starts,
)
