"""(IA)³ as the PEFT library holds it: a vector for each layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eqx_transformers.surgery.ia3 import IA3

from ..errors import ConversionError
from .modules import Modules, Site
from .settings import Settings
from .tree import Tree


def ia3(tree: Tree, modules: Modules) -> tuple[Settings, dict[str, np.ndarray]]:
    """The settings and the tensors of a model's IA3."""
    scaled = tree.wrappers(IA3)
    sites = modules.covering(scaled)
    if tables := [site.paths[0] for site in sites if site.is_table]:
        raise ConversionError(f"{tables[0]} is a table with an IA3, which PEFT has none for.")
    inputs = tuple(site.name for site in sites if _side(site, scaled) == "input")
    vectors = {f"{site.name}.ia3_l": _vector(site, scaled, site.name in inputs) for site in sites}
    return Settings("IA3", targets=tuple(site.name for site in sites), feedforward=inputs), vectors


def _side(site: Site, scaled: Mapping[str, Any]) -> str:
    sides = {scaled[path].on for path in site.paths if path in scaled}
    if len(sides) > 1:
        raise ConversionError(f"{_one(site)}: an IA3 scales its inputs or its outputs, not both.")
    return sides.pop()


def _vector(site: Site, scaled: Mapping[str, Any], is_input: bool) -> np.ndarray:
    pick = lambda x: np.asarray(x) if site.layer is None else np.asarray(x)[site.layer]
    there = [pick(scaled[path].scale) if path in scaled else None for path in site.paths]
    if not is_input:
        ones = site.split(np.ones(site.outputs, np.float32))
        return site.join([one if x is None else x for x, one in zip(there, ones, strict=True)])[:, None]
    first = there[0]
    if first is None or any(x is None or not np.array_equal(x, first) for x in there):
        raise ConversionError(f"{_one(site)}: their IA3 on='input' must be equal, for they have one input.")
    return first[None]


def _one(site: Site) -> str:
    return f"{', '.join(site.paths)} are one layer ({site.name}) in the reference"
