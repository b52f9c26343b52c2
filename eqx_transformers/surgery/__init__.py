"""Works on any Equinox tree and knows no model."""

from .adapter_masks import adapter_labels as adapter_labels, adapter_mask as adapter_mask
from .adapters import add_adapter as add_adapter, set_adapters as set_adapters
from .blocks import (
    duplicate as duplicate,
    insert_after as insert_after,
    insert_before as insert_before,
    remove as remove,
    reorder as reorder,
    take as take,
)
from .freeze import (
    decay_mask as decay_mask,
    labels as labels,
    layer_rates as layer_rates,
    partition as partition,
    scale_by_rates as scale_by_rates,
)
from .ia3 import IA3 as IA3
from .lora import LoRA as LoRA, LowRank as LowRank
from .merging import Merged as Merged, merge as merge, unmerge as unmerge
from .paths import (
    at as at,
    keypath_of as keypath_of,
    leaves_by_path as leaves_by_path,
    nodes as nodes,
    spell as spell,
)
from .quantize import (
    Int4Embedding as Int4Embedding,
    Int4Linear as Int4Linear,
    Int8Embedding as Int8Embedding,
    Int8Linear as Int8Linear,
    QuantizationReport as QuantizationReport,
    Quantized as Quantized,
    QuantizedLayer as QuantizedLayer,
    dequantize as dequantize,
    quantization_report as quantization_report,
    quantize as quantize,
)
from .select import Selection as Selection, select as select
from .static import set_static as set_static
from .ties import shared_leaves as shared_leaves
