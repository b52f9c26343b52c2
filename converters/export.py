"""Checkpoints out: a Hugging Face directory from a model of ours."""

import dataclasses
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax

from eqx_transformers import serialisation, tensor_file
from eqx_transformers._files import replacing
from eqx_transformers.skeletons import differences

from . import config as configs, flax_names, hub, msgpack_writer, sentence
from .containers import FLAX, SAFETENSORS, WEIGHTS
from .convert import Source
from .errors import ConversionError
from .families import DIRECTORIES, FAMILIES, ORIGINALS
from .family import Family
from .origin import Origin
from .reference_names import tensors

# Of an earlier model in the directory: beside the new one they would make another model of it.
EARLIER = (*WEIGHTS, "tf_model.h5", "origin.json", "1_Pooling", "2_Normalize")
EARLIER += tuple(name for name in hub.COMPANIONS if "/" not in name)


def export(
    model: Any,
    directory: Source,
    origin: Origin | None = None,
    *,
    max_shard_size: int | str = "5GB",
    container: str | None = None,
) -> None:
    """Writes a Hugging Face directory that transformers 5 loads with nothing missing or unexpected.

    The tensors are the model's own, bit for bit, under today's names; with an `origin`, config.json keeps the fields
    that the file had, and tokenizer files are copied from beside it when they are still there. A model that was made
    from scratch needs no origin. `container` is how the tensors are held: as safetensors, or of a `T5VAE`, unless they
    are asked for, as its own program wrote them, in flax_model.msgpack.

    Raises a `ConversionError` that names every place in which the model is not what its config builds (changed sizes,
    adapters that are not merged): such a file would load as something else.

    A bare encoder without a pooler is loaded there with `add_pooling_layer=False`; no file can say so itself.
    """
    if found := differences(model):
        raise ConversionError(
            "The model differs from what its config builds, so the export would not be it:\n  "
            + "\n  ".join(found)
            + "\nmerge(model) makes plain layers of adapters (converters.peft.save writes these alone),"
            " dequantize(model) of small weights; reconfigure(model, …) changes a fact."
        )
    specs, get = tensors(model)
    flax = _is_flax(model, container)
    shards = {} if flax else _shards(specs, _bytes(max_shard_size))
    with replacing(directory, stale=EARLIER, replaceable=lambda d: not serialisation.is_native(d)) as fresh:
        _dump(fresh / "config.json", _config_json(model, origin, specs))
        if flax:
            _write_flax(fresh / FLAX.weights, DIRECTORIES[model.config.family], specs, get)
        for name, keys in shards.items():
            tensor_file.write(fresh / name, {k: specs[k] for k in keys}, get, {"format": "pt"})
        if len(shards) > 1:
            total = sum(prod(s.shape) * s.dtype.itemsize for s in specs.values())
            weight_map = {key: name for name, keys in shards.items() for key in keys}
            _dump(fresh / SAFETENSORS.index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _companions(model, origin, fresh)


def _is_flax(model: Any, container: str | None) -> bool:
    """Whether the tensors are to be held as Flax holds them, which the reference library does not read any more."""
    wrote_flax = model.config.family in ORIGINALS
    if container not in (None, "safetensors", "flax"):
        raise ConversionError(f"container = {container!r} is not one of safetensors, flax.")
    if container == "flax" and not wrote_flax:
        raise ConversionError(
            f"container='flax' is for {', '.join(ORIGINALS)}: transformers 5 reads no Flax file of a"
            f" {model.config.family}. Leave it out to have safetensors."
        )
    return wrote_flax and container != "safetensors"


def _write_flax(path: Path, family: Family, specs: Mapping[str, jax.ShapeDtypeStruct], get: Any) -> None:
    names = flax_names.Flax.of((), family)
    keys = {names.old(key): key for key in specs}
    is_turned = lambda name: name.endswith("/kernel")
    turned = lambda x: jax.ShapeDtypeStruct(x.shape[::-1], x.dtype)
    shapes = {name: turned(specs[key]) if is_turned(name) else specs[key] for name, key in keys.items()}
    msgpack_writer.write(path, shapes, lambda name: get(keys[name]).T if is_turned(name) else get(keys[name]))


def _config_json(model: Any, origin: Origin | None, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    family = DIRECTORIES[model.config.family]
    original = origin.config if origin is not None and origin.family == family.model_type else None
    today = None if original is None else configs.modern(original, family.older)
    fields = configs.write(model.config, family.facts, today)
    fields |= {"architectures": [family.architecture(type(model))], "model_type": family.model_type}
    dtypes = {str(s.dtype) for s in specs.values()}
    if len(dtypes) == 1 and family.model_type in FAMILIES:
        fields["dtype"] = dtypes.pop()
    fields = fields if original is None else configs.respelled(fields, original, family.older)
    if "id2label" in fields:
        fields["label2id"] = {name: int(i) for i, name in fields["id2label"].items()}
    _expect_said(model, family, fields, specs)
    return fields


# Facts that config.json need not state: the tensors or sentence-transformers' files do; what is drawn is drawn.
ELSEWHERE = ("pooler", "spare_bias", "pooling", "normalize", "init", "tied")


def _expect_said(model: Any, family: Family, written: Mapping[str, Any], specs: Mapping[str, Any]) -> None:
    """Raises a `ConversionError` where config.json has no words for a fact: it would be read back as another."""
    said, unsaid = {}, []
    for one in family.facts:
        try:
            said |= zip(one.ours, one.read(*one.stated(configs.modern(written, family.older))), strict=True)
        except ValueError as error:
            meant = {name: getattr(model.config, name) for name in one.ours}
            said |= meant
            unsaid.append(f"{', '.join(f'{name} = {value!r}' for name, value in meant.items())} ({error})")
    again = dataclasses.replace(family.defaults, **said)
    read = family.observe(again, type(model), frozenset(specs), written)
    if getattr(model.config, "tied", False) and not getattr(read, "tied", True):  # untied, the tensors say it
        unsaid.append("tied = True (it would be read as False)")
    unsaid += [
        f"{f.name} = {getattr(model.config, f.name)!r} (it would be read as {getattr(again, f.name)!r})"
        for f in dataclasses.fields(again)
        if f.name not in ELSEWHERE and getattr(model.config, f.name) != getattr(again, f.name)
    ]
    if unsaid:
        raise ConversionError(
            f"config.json of a {family.model_type} cannot say this, so the export would be another model:\n  "
            + "\n  ".join(unsaid)
            + "\nreconfigure(model, …) gives these facts the values that can be said (grow= where that adds arrays)."
        )


def _companions(model: Any, origin: Origin | None, fresh: Path) -> None:
    """The files beside the weights; sentence-transformers' own only where they say what the model does."""
    config = model.config
    if hasattr(model, "pooling"):
        sentence.write(fresh, config.embed_dim, config.pooling, config.normalize)
    if origin is None or origin.directory is None:
        return
    # Of names that we know, whatever the origin lists: it may come from a directory that somebody else made.
    for name in (name for name in hub.COMPANIONS if name in origin.files and name not in sentence.FILES):
        path = Path(origin.directory) / name
        if path.is_file():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(path.read_bytes())


def _shards(specs: Mapping[str, jax.ShapeDtypeStruct], limit: int) -> dict[str, list[str]]:
    """Keys in order, a new file whenever the next tensor would pass the limit."""
    groups: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        more = prod(spec.shape) * spec.dtype.itemsize
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += more
    if len(groups) == 1:
        return {SAFETENSORS.weights: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, start=1)}


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B", size)
    if match is None:
        raise ConversionError(f"max_shard_size = {size!r}: expected a number of bytes, or such as '500MB'.")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
