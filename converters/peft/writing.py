"""Adapters out: a directory that the PEFT library reads."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqx_transformers import T5, CausalLM, tensor_file
from eqx_transformers._files import MODEL, Kind, expect_replaceable, replacing
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA, LowRank
from eqx_transformers.surgery.merging import expect_unmerged

from ..errors import ConversionError
from ..origin import Origin
from . import settings as options
from .expected import PREFIX, ends
from .factors import Factors, alphas, join
from .modules import Modules, Site
from .settings import Settings
from .targets import is_saved
from .tree import Tree
from .vectors import ia3
from .whole import parameters, saved_modules

ADAPTER = Kind("an adapter", options.CONFIG)
Tensors = dict[str, np.ndarray]


def save(
    model: Any,
    directory: str | os.PathLike[str],
    origin: Origin | None = None,
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
) -> None:
    """Writes a directory that the PEFT library loads on the base, with nothing missing or unexpected.

    Its configuration is that of the tree: ranks, scales (as alphas that give the same numbers back), DoRA, dropout.
    `name` says which adapter, where there are several; how much it counts at the moment (`set_adapters`) is no part of
    it. What else has changed is for the caller to name: `modules_to_save`, paths of ours whose parameters are written
    whole (`("head",)`: without it, a head that was trained is not in the directory), and `bias` ("all", or
    "lora_only": of adapted layers). `origin`, the base's, says where it is.

    What is read back by `load` is the same, to the bit, but for the numbers that dropout's keys are mixed with. Of the
    three layers of ours that are one in the reference (GPT-2's queries, keys and values), adapters with different A
    become one of all their ranks, which computes the same. An adapted table that is tied is written as PEFT would adapt
    it and its second names, each on its own.

    The base is taken to be the one that `load` is given. PiSSA and OLoRA have taken what is in the adapter out of it:
    such a model is refused, and exported after `merge`.

    The directory appears whole, or stays as it was; an earlier adapter in it is replaced, nothing else is. Raises a
    `FileExistsError` for a directory of something else, and a `ConversionError` for a tree that has no adapter or
    several, or one that the format has no words for.
    """
    modules_to_save = (modules_to_save,) if isinstance(modules_to_save, str) else modules_to_save
    target = Path(os.path.realpath(directory))
    expect_replaceable(target, _has_no_model, ADAPTER)
    expect_unmerged(model, "peft.save")
    if bias not in ("none", "all", "lora_only"):
        raise ConversionError(f"bias = {bias!r} is not one of none, all, lora_only.")
    tree, modules = Tree(model), Modules.of(model)
    saved = saved_modules(modules, modules_to_save)
    settings, tensors = ia3(tree, modules) if _is_ia3(tree, name) else _lora(tree, modules, name)
    if inside := [one for one in settings.targets or () if is_saved(f"{one}.weight", saved)]:
        raise ConversionError(f"{inside[0]} has an adapter and is to be saved whole (modules_to_save): merge it first.")
    adapted = set(settings.targets or ())
    tensors |= parameters(tree, modules, saved, bias, adapted)
    settings = replace(settings, saved=saved, bias=bias, base=None if origin is None else origin.source)
    fields = options.as_json(settings, turned=any(one.turned for one in modules.sites.values() if one.name in adapted))
    # Other tasks would have PEFT look for modules to save that a directory may not have.
    fields["task_type"] = {CausalLM: "CAUSAL_LM", T5: "SEQ_2_SEQ_LM"}.get(type(model))
    fields["revision"] = None if origin is None else origin.revision
    _write(target, fields, tensors)


def _write(target: Path, fields: Mapping[str, Any], tensors: Tensors) -> None:
    named = {PREFIX + key: x for key, x in sorted(tensors.items())}
    specs = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in named.items()}
    with replacing(target, stale=["adapter_*"], replaceable=_has_no_model, kind=ADAPTER) as fresh:
        text = json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (fresh / options.CONFIG).write_text(text, encoding="utf-8")
        tensor_file.write(fresh / options.WEIGHTS[0], specs, named.__getitem__, {"format": "pt"})


def _has_no_model(directory: Path) -> bool:
    return not (directory / MODEL.mark).exists()


def _is_ia3(tree: Tree, name: str | None) -> bool:
    loras, scaled = tree.wrappers(LoRA), tree.wrappers(IA3)
    if not loras and not scaled:
        raise ConversionError(f"There is no LoRA and no IA3 in this {type(tree.model).__name__}: nothing to save.")
    if loras and scaled and name is None:
        raise ConversionError(
            "There are LoRA and IA3 in this model, and a directory holds one adapter: name= chooses a LoRA, which is"
            " then saved alone."
        )
    if scaled and not loras and name is not None:
        raise ConversionError(f"There is no adapter named {name!r}: this model has IA3, which has no name.")
    return not loras


def _lora(tree: Tree, modules: Modules, name: str | None) -> tuple[Settings, Tensors]:
    loras = tree.wrappers(LoRA)
    name = _named(loras, name)
    _expect_whole_bases(loras)
    having = {path: node.adapters[node.names.index(name)] for path, node in loras.items() if name in node.names}
    found = [(site, _factors(tree, site, having)) for site in modules.covering(having)]
    uses = [use for site, whole in found for use in _uses(modules, site, whole)]
    tensors = {name: x for use in uses for name, x in _tensors(*use).items()}
    return _settings({name: factors for name, _, factors in uses}, having, found), tensors


def _named(loras: Mapping[str, LoRA], name: str | None) -> str:
    names = list(dict.fromkeys(name for node in loras.values() for name in node.names))
    if name is None and len(names) > 1:
        raise ConversionError(f"There are adapters named {', '.join(names)}; name= chooses one.")
    if name is not None and name not in names:
        raise ConversionError(f"There is no adapter named {name!r}; there are {', '.join(names)}.")
    return names[0] if name is None else name


def _expect_whole_bases(loras: Mapping[str, LoRA]) -> None:
    """Others have the base as it was before PiSSA or OLoRA took a part of it."""
    if taken := [path for path, node in loras.items() if any(adapter.residual for adapter in node.adapters)]:
        raise ConversionError(
            f"The base at {taken[0]} is what init='pissa' or 'olora' left of it, so on the base that others have the"
            " adapter would compute something else. Export the whole model after surgery.merge(model)."
        )


def _factors(tree: Tree, site: Site, having: Mapping[str, LowRank]) -> Factors:
    parts = [Factors.of(having[path], site.layer) if path in having else None for path in site.paths]
    return join(site, parts, lambda i: tree.matrix(site.paths[i], site.layer))


def _uses(modules: Modules, site: Site, whole: Factors) -> Iterator[tuple[str, bool, Factors]]:
    """(module, whether it is a table, factors) of a layer and of what is tied to it."""
    aliases = modules.aliases(site)
    if aliases and whole.magnitude is not None:
        raise ConversionError(
            f"{site.paths[0]} has a DoRA adapter and is tied to {', '.join(aliases)}: PEFT has no such thing. Untie the"
            " model, or merge the adapter and export the whole."
        )
    yield site.name, site.is_table, whole
    for alias in aliases:
        is_table = "embed" in alias.rpartition(".")[2]  # as the reference calls all tables, and no output
        yield alias, is_table, whole if is_table else whole.transposed()


def _tensors(name: str, is_table: bool, factors: Factors) -> Tensors:
    if is_table and factors.b_bias is not None:
        raise ConversionError(f"{name} is a table whose adapter has a bias of B, which PEFT has none for.")
    a, b = ends(is_table)
    found = {a: factors.a, b: factors.b, ".lora_B.bias": factors.b_bias, ".lora_magnitude_vector": factors.magnitude}
    return {name + end: x for end, x in found.items() if x is not None}


def _settings(
    layers: Mapping[str, Factors], having: Mapping[str, LowRank], found: Sequence[tuple[Site, Factors]]
) -> Settings:
    rslora, numbers = alphas(list(layers.values()))
    rank, rank_pattern = _most({name: factors.rank for name, factors in layers.items()})
    alpha, alpha_pattern = _most(dict(zip(layers, numbers, strict=True)))
    biases = {site.name: factors.b_bias is not None for site, factors in found if not site.is_table}
    return Settings(
        "LORA",
        rank=rank,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        dropout=_one("dropout", {path: float(adapter.dropout.p) for path, adapter in having.items()}),
        rslora=rslora,
        dora=_one("magnitude", {name: x.magnitude is not None for name, x in layers.items()}),
        lora_bias=bool(biases) and _one("bias of B", biases),
        targets=tuple(layers),
    )


def _one(what: str, values: Mapping[str, Any]) -> Any:
    """What all have. Raises a `ConversionError` where they differ: PEFT has one word for all."""
    first = next(iter(values.values()))
    if other := [name for name, value in values.items() if value != first]:
        raise ConversionError(
            f"The adapters differ in {what} ({next(iter(values))}: {first}, {other[0]}: {values[other[0]]}), and PEFT"
            " has one setting for all. Make them alike, or give them two names and save each."
        )
    return first


def _most(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others by name."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}
