"""Adapters in: a directory that the PEFT library wrote, on a model of ours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eqx_transformers import tensor_file
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA
from eqx_transformers.surgery.merging import expect_unmerged, merge as merged
from eqx_transformers.tensor_file import DamagedFile

from .. import torch_reader
from ..checkpoint import Checkpoint
from ..containers import stamp
from ..errors import ConversionError, MalformedCheckpoint, SourceNotFound, UnsupportedConfig
from ..origin import Origin
from . import expected, settings as options, tree as trees
from .expected import OLD, PREFIX, TOKENS, Layer, ends
from .factors import Factors, scale_of
from .fitting import Offer, expect_fit, is_parameter
from .modules import Modules, Site
from .placing import with_ia3, with_loras
from .settings import Settings
from .targets import matched
from .tree import Tree

Get = Callable[[str], np.ndarray]


def load(model: Any, directory: str | os.PathLike[str], origin: Origin | None = None, *, name: str = "default") -> Any:
    """The model with the adapter of a directory that the PEFT library wrote: LoRA (rsLoRA, DoRA) or (IA)³.

    Each adapted layer becomes a `LoRA` of it, with its factors and its scale as they are in the file; where there is
    one already, a further adapter of that `name`. What the file has beside (whole modules, biases, rows of a table)
    takes the place of the base's numbers, in the base's dtype, as with PEFT. One layer of the reference that is three
    of ours (GPT-2's queries, keys and values) gives three adapters with the same A. Stacked blocks get stacked ones.

    `origin`, the base's, is for messages. Raises

    - a `Mismatch` with every tensor that is missing, unexpected or of another shape, as with a base of another
      architecture;
    - an `UnsupportedConfig` that names the option for what is not had here;
    - a `ConversionError` for a name that is there already, for adapters that change one end of tied weights alone, and
      for those that do not fit stacked blocks;
    - a `SourceNotFound`, a `MalformedCheckpoint` or an `UnsafeCheckpoint` for the files.
    """
    path = Path(directory)
    asked = options.read(path)
    expect_unmerged(model, "peft.load")
    tree, modules = Tree(model), Modules.of(model)
    _expect_new(tree, asked, name)
    checkpoint, names = _opened(path)
    adapted = expected.layers(asked, modules, names)
    get = lambda key: checkpoint.get(names[key])
    shape_of = lambda key: trees.written(tree, modules, [key])[key].shape
    specs = {key: checkpoint.specs[actual] for key, actual in names.items()}
    expect_fit(Offer(os.fspath(directory), asked, modules, adapted, specs), shape_of, model, origin)
    tree = _with_parameters(tree, modules, asked, set(names), get)
    if asked.kind == "IA3":
        return with_ia3(tree, asked, adapted, get).model
    sites = _sites(asked, modules, adapted, get)
    return with_loras(tree, sites, asked.dropout, name).model


def files(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of an adapter. Raises a `SourceNotFound` where there are none."""
    path = Path(directory)
    return path / options.CONFIG, _weights(path)


def expect(directory: str | os.PathLike[str]) -> None:
    """Raises where a directory holds no adapter that could be read; reads no tensor."""
    options.read(Path(directory))
    files(directory)


def adapted(model: Any, origin: Origin | None, directory: str | os.PathLike[str], merge: bool) -> Any:
    """The model with the adapter of a directory; with `merge`, plain layers again that compute the same."""
    model = load(model, directory, origin)
    has_layers = bool(Tree(model).wrappers(trees.Wrapper))
    return merged(model) if merge and has_layers else model


def _expect_new(tree: Tree, asked: Settings, name: str) -> None:
    if asked.kind == "IA3" and (there := tree.wrappers(IA3)):
        raise ConversionError(f"There is an IA3 at {next(iter(there))} already, and it has no name to tell two apart.")
    for path, node in tree.wrappers(LoRA).items():
        if asked.kind == "LORA" and name in node.names:
            raise ConversionError(
                f"There is an adapter named {name!r} at {path} already: give this one another name (name=…), or merge"
                " that one first."
            )


def _weights(directory: Path) -> Path:
    path = next((directory / name for name in options.WEIGHTS if (directory / name).is_file()), None)
    if path is None:
        raise SourceNotFound(
            f"{directory} has an {options.CONFIG}, but no {' or '.join(options.WEIGHTS)} with its numbers."
        )
    return path


def _opened(directory: Path) -> tuple[Checkpoint, dict[str, str]]:
    """The tensors, and the file's name of each by its name without the prefix (with a `?` where it has none)."""
    path = _weights(directory)
    try:
        reader = tensor_file.read_header if path.suffix == ".safetensors" else torch_reader.read_header
        specs, metadata = reader(path)
    except DamagedFile as error:
        raise MalformedCheckpoint(str(error)) from error
    stamps = {path.name: stamp(os.stat(path))}
    checkpoint = Checkpoint(directory, {}, specs, {path.name: list(specs)}, metadata, path.suffix, stamps)
    if odd := [f"{key} is {spec.dtype}" for key, spec in specs.items() if spec.dtype not in ("F32", "F16", "BF16")]:
        raise MalformedCheckpoint(f"{path}: {odd[0]}; an adapter's numbers are F32, F16 or BF16.")
    return checkpoint, {_named(key): key for key in specs}


def _named(key: str) -> str:
    name = key.removeprefix(PREFIX) if key.startswith(PREFIX) else f"?{key}"
    old = next((end for end in OLD if name.endswith(end)), None)
    return name if old is None else name.removesuffix(old) + OLD[old]


def _with_parameters(tree: Tree, modules: Modules, asked: Settings, names: set[str], get: Get) -> Tree:
    """The base with the parameters that the file has: whole modules, biases, tables, rows of tables."""
    held = {expected.parameter_of(name): name for name in names if is_parameter(modules, name)}
    new = {own: get(name) for own, name in held.items() if own in modules.parameters}
    tree = tree.with_arrays(trees.read(tree, modules, new))
    for alias in held.keys() & modules.ties.keys():
        _expect_tied(tree, modules, alias, get(held[alias]))
    rows = {}
    for site, ids in expected.tokens(asked, modules):
        (path,), table = site.paths, trees.written(tree, modules, [f"{site.name}.weight"])[f"{site.name}.weight"]
        if wrong := [i for i in ids if not 0 <= i < len(table)]:
            raise UnsupportedConfig(f"trainable_token_indices: {wrong[0]} is no row of {site.name} ({len(table)}).")
        table = table.copy()
        table[list(ids)] = get(site.name + TOKENS).astype(table.dtype)
        rows[f"{path}.weight"] = table
    return tree.with_arrays(rows)


def _expect_tied(tree: Tree, modules: Modules, alias: str, theirs: np.ndarray) -> None:
    own = trees.written(tree, modules, [alias])[alias]
    if not np.array_equal(theirs.astype(own.dtype), own):
        raise ConversionError(
            f"The adapter's {alias} is not its {modules.ties[alias]}, but in this model they are one array. {UNTIE}"
        )


UNTIE = (
    "Give the output an array of its own before the adapter is loaded:"
    " reconfigure(model, lambda path, old, new: TABLE, tied=False), TABLE being the embedding's weight."
)


def _sites(asked: Settings, modules: Modules, adapted: list[Layer], get: Get) -> dict[str, tuple[Site, Factors]]:
    """The factors of every layer of ours; of tied ones, of the table."""
    found: dict[str, tuple[Site, Factors]] = {}
    for layer in adapted:
        factors = _factors(asked, layer, get)
        if layer.is_table != layer.site.is_table:
            _expect_no_magnitude(layer, factors)
            factors = factors.transposed()
        if layer.site.name in found and not _equal(found[layer.site.name][1], factors):
            raise ConversionError(
                f"The adapter changes {layer.name} otherwise than {layer.site.name}, but in this model the two are one"
                f" table. {UNTIE}"
            )
        found.setdefault(layer.site.name, (layer.site, factors))
    _expect_both_ends(modules, adapted, asked)
    return found


def _factors(asked: Settings, layer: Layer, get: Get) -> Factors:
    a, b = (get(layer.name + end) for end in ends(layer.is_table))
    own = layer.names(asked)
    more = [get(layer.name + end) if end in own else None for end in (".lora_B.bias", ".lora_magnitude_vector")]
    alpha = matched(asked.alpha_pattern, layer.name, asked.alpha)
    return Factors(a, b, scale_of(alpha, len(a), asked.rslora), *more)


def _expect_no_magnitude(layer: Layer, factors: Factors) -> None:
    if factors.magnitude is not None:
        raise UnsupportedConfig(
            f"use_dora on {layer.name}, which is tied to {layer.site.name}: the magnitudes of a table and of an output"
            f" are not of the same rows. {UNTIE}"
        )


def _equal(one: Factors, other: Factors) -> bool:
    is_same = np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
    return is_same and one.scale == other.scale and one.magnitude is None and other.magnitude is None


def _expect_both_ends(modules: Modules, adapted: list[Layer], asked: Settings) -> None:
    """Of one array, an adapter changes all uses or none."""
    there = {layer.name for layer in adapted}
    for site in {layer.site.name: layer.site for layer in adapted}.values():
        uses = modules.aliases(site)
        # Where the second name is a table too, it is the one that is called (T5's `shared` never is).
        is_called = not any(layer.is_alias and layer.is_table for layer in adapted if layer.site is site)
        if unchanged := [use for use in [*uses, *([site.name] if is_called else [])] if use not in there]:
            changed = [layer.name for layer in adapted if layer.site is site]
            raise ConversionError(
                f"The adapter changes {', '.join(changed)} but not {', '.join(unchanged)}, and in this model they are"
                f" one table: its scores would change too. PEFT adapts both with ensure_weight_tying=True. {UNTIE}"
            )
