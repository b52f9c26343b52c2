"""Tiny models of the reference that generate, and ours with the same numbers, and what the reference generates.

Matrices are drawn large, so that what follows depends on what stands before, and the best token is not a close call.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

import converters

from .. import kept

VOCAB, ROOM, PAD = 61, 41, 1
ENDS = [2, 7, 11]
COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.5}
# Multiples of 16: batches of it run on turned matrices (on a CPU), single rows do not.
SHARED_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES = {"num_hidden_layers": 2, "intermediate_size": 37}
# Distances of all buckets occur; multiples of 16 in the one, for the same reason.
TWO_HALVES = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
TWO_HALVES |= {"num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11}
TWO_HALVES |= {"pad_token_id": PAD, "decoder_start_token_id": 5, "eos_token_id": 2, "initializer_factor": 1.5}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_positions=ROOM, n_embd=21, n_layer=2, n_head=3, n_inner=37, **COMMON),
    "mistral": lambda: transformers.MistralConfig(
        sliding_window=9, max_position_embeddings=ROOM, **SHARED_HEADS, **(SIZES | {"intermediate_size": 48}), **COMMON
    ),
    "roberta": lambda: transformers.RobertaConfig(
        hidden_size=21, num_attention_heads=3, max_position_embeddings=ROOM, is_decoder=True, **SIZES, **COMMON
    ),
    "t5": lambda: transformers.T5Config(**TWO_HALVES),
    "umt5": lambda: transformers.UMT5Config(**TWO_HALVES),
}


@dataclass(frozen=True)
class Twins:
    """A model of torch, and ours."""

    torch: Any
    ours: Any


@functools.cache
def twins(name: str) -> Twins:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    directory = kept.directory("generation")
    model.save_pretrained(directory)
    ours, _ = converters.load(directory)
    return Twins(model, ours)


def prompts(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens, none of which is padding or an end."""
    return np.random.default_rng([seed, length]).integers(12, VOCAB, (rows, length))


def padded(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The same padded on the left, row i by 2 i tokens."""
    ids, mask = prompts(rows, length, seed), np.ones((rows, length), np.int64)
    for i in range(rows):
        mask[i, : 2 * i] = 0
    return np.where(mask == 1, ids, PAD), mask


def reference(model: Any, ids: np.ndarray, mask: np.ndarray | None = None, *, ends: Any = None, **options: Any) -> Any:
    """The new tokens of transformers' `generate`, padded to `max_new_tokens`.

    RoBERTa is told its positions: transformers 5 would count them from 0, where its own forward pass counts from 2.
    """
    most, mask = options["max_new_tokens"], torch.from_numpy(np.ones_like(ids) if mask is None else mask)
    if model.config.model_type == "roberta":
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + 2
    given = {
        "attention_mask": mask,
        "eos_token_id": ends,
        "pad_token_id": PAD,
        "do_sample": False,
    }
    model.generation_config.eos_token_id = None  # it would be taken where `ends` is None
    with torch.inference_mode():
        found = model.generate(torch.from_numpy(ids), **given, **options)
    found = found[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].numpy()
    return np.pad(found, ((0, 0), (0, most - found.shape[1])), constant_values=PAD)
