"""Layers: arrays in, arrays out. Each acts on the last axis (attention on the last two), with any leading axes.

The axis names in the shapes of this package, always with the same meaning:

| axis | is |
|---|---|
| `*axes` | any leading axes: batch, choices, layers |
| `seq` | tokens of the sequence that is computed; query positions |
| `keys` | key positions (`seq`, or cached ones and new ones) |
| `embed_dim` | width of the stream through the model |
| `num_heads`, `num_kv_heads` | query heads; key and value heads that groups of them share |
| `head_dim`, `value_dim` | width of one head's queries and keys; of its values |
| `mlp_dim` | inner width of the feed-forward network |
| `vocab_size` | rows of an embedding; `vocab` in logits |
| `length` | slots of a cache |
| `memory` | tokens that a decoder looks at: `keys` of its cross-attention |
| `pairs` | pairs of numbers of a head that rotary positions turn |
| `labels` | classes of a classifier |
| `in_features`, `out_features`, `dim` | widths of one layer |
"""

from . import kernels as kernels
from .activations import (
    ACTIVATIONS as ACTIVATIONS,
    gelu as gelu,
    gelu_tanh as gelu_tanh,
    relu as relu,
    silu as silu,
    tanh as tanh,
)
from .attention import Attention as Attention
from .cache import (
    AbstractCache as AbstractCache,
    Branches as Branches,
    Cache as Cache,
    LayerCache as LayerCache,
    MemoryCache as MemoryCache,
)
from .dropout import Dropout as Dropout
from .embedding import Embedding as Embedding
from .linear import Linear as Linear
from .mask import Mask as Mask, Places as Places
from .mlp import MLP as MLP, GatedMLP as GatedMLP
from .norm import LayerNorm as LayerNorm, RMSNorm as RMSNorm
from .positions import RelativeBias as RelativeBias, Rotary as Rotary, Rotation as Rotation, rotate as rotate
from .stack import Stack as Stack, stack as stack, unstack as unstack
