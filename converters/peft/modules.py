"""The reference's modules and ours: read off the tables that convert weights, so that there is no second list."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqx_transformers.nn import Embedding, Linear, Stack
from eqx_transformers.skeletons import skeleton, stacked_paths, stacks
from eqx_transformers.surgery.paths import is_array_like, leaves_by_path, nodes, spell

from ..errors import ConversionError
from ..families import FAMILIES
from ..ops import Op
from ..rules import Ignore, Link, Tie, expand

WEIGHT = ".weight"


@dataclass(frozen=True)
class Site:
    """A layer of the reference, and the modules of ours that it is made of, in the order of its outputs.

    `layer` is its number where ours are stacked blocks. `is_table`: ids go in; its inputs are the rows. `turned`: its
    matrix lies there as (inputs, outputs).
    """

    name: str
    paths: tuple[str, ...]
    layer: int | None
    is_table: bool
    inputs: int
    outputs: int
    turned: bool
    op: Op

    def split(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """`outputs *any` of the reference's layer, for each of ours."""
        column = x.reshape(len(x), -1)
        parts = self.op.forward(column.T if self.turned else column)
        return tuple(part.reshape(len(part), *x.shape[1:]) for part in parts)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The way back."""
        (column,) = self.op.backward(*(part.reshape(len(part), -1) for part in parts))
        column = column.T if self.turned else column
        return column.reshape(len(column), *parts[0].shape[1:])


@dataclass(frozen=True)
class Modules:
    """What the reference's model of a class and config consists of, as its module names and ours.

    - `sites`: layers that an adapter can stand on, by name
    - `parameters`: each parameter's link, and its key there
    - `ties`: second names of parameters, and the first names
    - `ignored`: keys of what is no parameter
    - `prefix`: what other classes of the family have before the names of their backbone, or what this one has
    """

    sites: Mapping[str, Site]
    parameters: Mapping[str, tuple[Link, str]]
    ties: Mapping[str, str]
    ignored: tuple[Ignore, ...]
    prefix: str

    @classmethod
    def of(cls, model: Any) -> "Modules":
        """Of a model, adapted or not. Raises a `ConversionError` for one that the reference does not have."""
        family = FAMILIES.get(model.config.family)
        if family is None:
            raise ConversionError(
                f"PEFT's adapters are for models of the reference library, which has no {model.config.family!r}."
                " eqx_transformers.save(model, directory, edited=True) keeps an adapted model of any kind."
            )
        built = skeleton(type(model), model.config, stacked_paths(model))
        _expect_depth(stacks(model), stacks(built))
        table = family.table(model.config, type(model))
        leaves = {path: leaf for path, leaf in leaves_by_path(built).items() if is_array_like(leaf)}
        layers = {spell(path): node for path, node in nodes(built) if isinstance(node, Linear | Embedding)}
        prefix = "" if family.is_prefixed(type(model)) else family.prefix
        named = lambda key: key.removeprefix(prefix)
        links = expand(table, leaves)
        return cls(
            {site.name: site for link in links for site in _sites(link, layers, named)},
            {named(key): (link, key) for link in links for key in link.keys},
            {named(one.theirs): named(one.to) for one in table if isinstance(one, Tie)},
            tuple(one for one in table if isinstance(one, Ignore) and not one.parameter),
            family.prefix,
        )

    def aliases(self, site: Site) -> list[str]:
        """Other modules of the reference that hold the matrix of this one."""
        return [alias.removesuffix(WEIGHT) for alias, to in self.ties.items() if to == site.name + WEIGHT]

    def covering(self, paths: Collection[str]) -> list[Site]:
        """The layers of the reference that ours at these paths are, or are parts of."""
        sites = [site for site in self.sites.values() if any(path in paths for path in site.paths)]
        if lost := sorted(set(paths) - {path for site in sites for path in site.paths}):
            raise ConversionError(f"{', '.join(lost)}: the reference has no layer of its own there for PEFT to adapt.")
        return sites

    def is_ignored(self, name: str) -> bool:
        return any(one.matches(name) or one.matches(self.prefix + name) for one in self.ignored)


def _sites(link: Link, layers: Mapping[str, Any], named: Callable[[str], str]) -> Iterator[Site]:
    paths = tuple(path.removesuffix(WEIGHT) for path in link.ours)
    if not all(path in layers for path in paths) or not all(path.endswith(WEIGHT) for path in link.ours):
        return
    parts = [layers[path] for path in paths]
    is_table = isinstance(parts[0], Embedding)
    inputs = parts[0].vocab_size if is_table else parts[0].in_features
    outputs = parts[0].embed_dim if is_table else sum(part.out_features for part in parts)
    turned = not is_table and _is_turned(link.op, outputs)
    for i, (key,) in enumerate(link.theirs):
        name = named(key).removesuffix(WEIGHT)
        yield Site(name, paths, i if link.sizes else None, is_table, inputs, outputs, turned, link.op)


def _is_turned(op: Op, outputs: int) -> bool:
    """Whether a matrix goes in as (inputs, outputs): one of as many inputs as outputs and one more would show it."""
    (first, *_) = op.forward(np.zeros((outputs + 1, outputs), np.bool_))
    return first.shape[-1] == outputs + 1


def _expect_depth(there: Mapping[str, Stack], built: Mapping[str, Stack]) -> None:
    for path, one in built.items():
        if there[path].num_layers != one.num_layers:
            raise ConversionError(
                f"{path} has {there[path].num_layers} blocks, and the config says {one.num_layers}: PEFT's names are"
                " those of the config. reconfigure(model, num_layers=…) before there are adapters, and then these."
            )
