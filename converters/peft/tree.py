"""Places of a model that may have adapters: what stands there, and what is under it."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from eqx_transformers.surgery._bases import dense, unwrapped
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA
from eqx_transformers.surgery.paths import at, is_array_like, nodes, spell

from ..errors import ConversionError
from ..rules import Link
from .modules import Modules

Wrapper = LoRA | IA3


class Tree:
    """A model by paths as they are without adapters."""

    def __init__(self, model: Any):
        self.model = model
        self._places: dict[str, tuple[KeyPath, Any]] = {spell(path): (path, node) for path, node in nodes(model)}

    def __getitem__(self, path: str) -> Any:
        """What stands there: the layer, or what has been put in its place."""
        return self._places[path][1]

    def wrappers(self, kind: Any) -> dict[str, Any]:
        """Every one of a class or several, by the path at which the plain layer would be."""
        found: dict[str, Any] = {}
        for path, (_, node) in self._places.items():
            if not isinstance(node, kind):
                continue
            if (own := self._plain(path)) in found:
                raise ConversionError(
                    f"{own} has one {type(node).__name__} within another, and a directory has one adapter a layer."
                    " Select the LoRA and not its base (add_adapter does), or merge(model) first."
                )
            found[own] = node
        return found

    def _plain(self, path: str) -> str:
        above = path.removesuffix(".base")
        return self._plain(above) if above != path and isinstance(self[above], Wrapper) else path

    def array(self, path: str) -> np.ndarray:
        """A parameter of the plain model."""
        return np.asarray(self[self._real(path)])

    def matrix(self, path: str, layer: int | None) -> np.ndarray:
        """That of the plain layer at a path, or of one of stacked layers, in float32."""
        node = unwrapped(self[path])
        one = node if layer is None else jax.tree.map(lambda x: x[layer] if is_array_like(x) else x, node)
        return np.asarray(dense(one).astype(jnp.float32))

    def _real(self, path: str) -> str:
        module, _, last = path.rpartition(".")
        while isinstance(self[module], Wrapper):
            module += ".base"
        if f"{module}.{last}" not in self._places:
            raise ConversionError(
                f"{module} is a {type(self[module]).__name__}, which has no {last} of its own to replace or to save."
                " Dequantize it first."
            )
        return f"{module}.{last}"

    def with_arrays(self, new: Mapping[str, np.ndarray]) -> "Tree":
        """The same with other parameters, in the dtypes that they have here."""
        real = {self._real(path): x for path, x in new.items()}
        return self.replaced({path: jnp.asarray(x.astype(self[path].dtype)) for path, x in real.items()})

    def replaced(self, new: Mapping[str, Any]) -> "Tree":
        """The same with other nodes."""
        if not new:
            return self
        paths = [self._places[path][0] for path in new]
        return Tree(eqx.tree_at(lambda model: [at(model, path) for path in paths], self.model, list(new.values())))


def written(tree: Tree, modules: Modules, names: list[str]) -> dict[str, np.ndarray]:
    """Parameters of the plain model as the reference has them, by its names; ties too."""
    held: dict[int, dict[str, np.ndarray]] = {}
    found = {}
    for name in names:
        link, key = modules.parameters[modules.ties.get(name, name)]
        if id(link) not in held:
            held[id(link)] = link.write(tree.array)
        found[name] = held[id(link)][key]
    return found


def read(tree: Tree, modules: Modules, new: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays by path, with the reference's parameters of these names in them."""
    links: dict[int, tuple[Link, dict[str, np.ndarray]]] = {}
    for name, x in new.items():
        link, key = modules.parameters[name]
        links.setdefault(id(link), (link, {}))[1][key] = x
    found: dict[str, np.ndarray] = {}
    for link, given in links.values():
        whole = given if len(given) == len(link.keys) else link.write(tree.array) | given
        found |= link.read(whole.__getitem__)
    return found
