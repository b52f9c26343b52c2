"""Training: losses, and what is built on them."""

from .losses import (
    chunked_cross_entropy as chunked_cross_entropy,
    cross_entropy as cross_entropy,
    lm_loss as lm_loss,
    next_token_loss as next_token_loss,
    next_tokens as next_tokens,
)
from .optimizers import adam_uncorrected as adam_uncorrected
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
