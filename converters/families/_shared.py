"""What files of encoders and of decoders have in common."""

from collections.abc import Mapping
from typing import Any

from eqx_transformers.models.backbones import BACKBONES

from ..config import Fact

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}

# Fields that do not change what any of the reference's models here computes from its inputs.
EVERYWHERE = frozenset(
    [
        "architectures",
        "model_type",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "use_cache",
        "gradient_checkpointing",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "prefix",
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        "language",
        "name",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "return_dict",
        "torchscript",
        "use_bfloat16",
        "chunk_size_feed_forward",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "xla_device",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "tf_legacy_loss",
        "use_flash_attn",
    ]
)

# Fields whose other values would ask for another function than ours; the first is what an absent field means.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
    "adapters": (
        {"adapters": {}, "config_map": {}},
        {"adapters": {}, "config_map": {}, "fusion_config_map": {}, "fusions": {}},
    ),
}


def labels(default: int = 2) -> Fact:
    """The number of labels is the length of the names' dictionary; the names themselves stay in the origin."""

    def read(value: Any) -> tuple[int]:
        if not isinstance(value, Mapping) or not value:
            raise ValueError("expected a dictionary of label names")
        if not all(str(i).isdigit() for i in value):
            raise ValueError("expected whole numbers as its keys")
        return (len(value),)

    return Fact(("id2label",), ("labels",), read, lambda count: (label_names(count),), (label_names(default),))


def label_names(count: int) -> dict[str, str]:
    return {str(i): f"LABEL_{i}" for i in range(count)}


def ours(model_class: type) -> str:
    """What stands before the backbone's paths in this class of ours."""
    return "" if model_class in BACKBONES.values() else "backbone."
