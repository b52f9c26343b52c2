"""Checkpoints in every container, as the libraries write them: one file, or shards with an index."""

import json

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from .packing import packed

# Heads whose bias torch has twice and Flax once.
HEADS_OF_TWO_BIASES = ("cls.predictions", "lm_head")


def sharded(directory, held, shards, name, ending, write):
    """`write(path, part)` for each part, and the index."""
    if shards == 1:
        write(directory / f"{name}{ending}", held)
        return
    weight_map = {}
    for i in range(shards):
        file, part = f"{name}-{i + 1:05d}-of-{shards:05d}{ending}", dict(list(held.items())[i::shards])
        write(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in held.values())}, "weight_map": weight_map}
    (directory / f"{name}{ending}.index.json").write_text(json.dumps(index))


def as_torch(x):
    if x.dtype == ml_dtypes.bfloat16:  # torch knows it, NumPy's bridge does not
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def write_safetensors(directory, held, shards):
    sharded(
        directory, held, shards, "model", ".safetensors", lambda path, part: save_file(part, path, {"format": "pt"})
    )


def write_torch(directory, held, shards):
    write = lambda path, part: torch.save({key: as_torch(x) for key, x in part.items()}, path)
    sharded(directory, held, shards, "pytorch_model", ".bin", write)


def to_flax(held):
    """torch's tensors by Flax's names, kernels turned; of two biases the head's own."""
    gone = [f"{head}.decoder.bias" for head in HEADS_OF_TWO_BIASES]
    names = {key: flax_key(key, x) for key, x in held.items() if key not in gone}
    return {name: held[key].T if name.endswith("/kernel") else held[key] for key, name in names.items()}


EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "wte", "wpe", "embed_tokens")
EMBEDDINGS += ("shared", "relative_attention_bias")
RMS_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def flax_key(key: str, x: np.ndarray) -> str:
    """By hand, from the classes of transformers 4: nn.Embed, nn.LayerNorm, nn.Dense, FlaxConv1D, FlaxLlamaRMSNorm."""
    module, last = key.rsplit(".", 1)
    kind = module.rsplit(".", 1)[-1]
    if last == "weight" and kind in EMBEDDINGS:
        last = "embedding"
    elif kind in RMS_NORMS or (kind.endswith("layer_norm") and ".block." in f".{module}") or kind == "final_layer_norm":
        last = "weight"
    elif last == "weight":
        last = "kernel" if x.ndim == 2 else "scale"
    return f"{module}.{last}".replace(".", "/")


def nest(flat):
    tree = {}
    for name, x in flat.items():
        *path, last = name.split("/")
        inner = tree
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = x
    return tree


def write_flax(directory, held, shards):
    write = lambda path, part: path.write_bytes(packed(nest(part)))
    sharded(directory, to_flax(held), shards, "flax_model", ".msgpack", write)


WRITERS = {"safetensors": write_safetensors, "torch": write_torch, "flax": write_flax}
