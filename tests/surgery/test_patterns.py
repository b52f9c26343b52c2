"""Patterns of paths, and paths, on a plain nested tree with every kind of key."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import pytest

from eqx_transformers import select
from eqx_transformers.surgery import at, keypath_of, nodes, spell
from eqx_transformers.surgery.patterns import parse


class AbstractPart(eqx.Module):
    weight: eqx.AbstractVar[jax.Array]


class Dense(AbstractPart):
    weight: jax.Array
    bias: jax.Array | None
    heads: int = eqx.field(static=True, default=2)


class Scale(AbstractPart):
    weight: jax.Array


class Named(NamedTuple):
    left: Any
    right: Any


class Pair:
    """A container of somebody else's, that gives its children no names."""

    def __init__(self, *items):
        self.items = items


jax.tree_util.register_pytree_node(Pair, lambda pair: (pair.items, None), lambda _, items: Pair(*items))


class Root(eqx.Module):
    parts: tuple
    table: dict
    act: Any
    nothing: None = None


def array(*shape):
    return jax.numpy.arange(np.prod(shape), dtype=np.float32).reshape(shape)


SHARED = Dense(array(4, 3), array(4))
TABLE = {
    "query_proj": Dense(array(3, 3), None, heads=5),
    "key_proj": [Scale(array(3)), None, Scale(array(3))],
    "dotted.name": Named(array(2), 7.0),
    "pair": Pair(array(1), Scale(array(2))),
    "identity": eqx.nn.Identity(),
    "empty": (),
}
ROOT = Root((SHARED, Scale(array(3)), SHARED), TABLE, jax.numpy.tanh)
PATHS = [
    "",
    "parts",
    "parts.0",
    "parts.0.weight",
    "parts.0.bias",
    "parts.1",
    "parts.1.weight",
    "parts.2",
    "parts.2.weight",
    "parts.2.bias",
    "table",
    "table.dotted.name",
    "table.dotted.name.left",
    "table.dotted.name.right",
    "table.empty",
    "table.identity",
    "table.key_proj",
    "table.key_proj.0",
    "table.key_proj.0.weight",
    "table.key_proj.2",
    "table.key_proj.2.weight",
    "table.pair",
    "table.pair.0",
    "table.pair.1",
    "table.pair.1.weight",
    "table.query_proj",
    "table.query_proj.weight",
    "act",
]


# ---- paths


def test_nodes_are_all_modules_containers_and_leaves_in_the_trees_order():
    assert [spell(path) for path, _ in nodes(ROOT)] == PATHS
    assert [spell(path) for path, _ in nodes(array(2))] == [""]
    assert list(nodes(None)) == []


def test_at_gives_the_node_of_every_path_and_keypath_of_its_path():
    for path, node in nodes(ROOT):
        assert at(ROOT, path) is node
        assert keypath_of(ROOT, spell(path)) == path
    leaves = dict(jax.tree_util.tree_leaves_with_path(ROOT))
    assert all(at(ROOT, path) is leaf for path, leaf in leaves.items())


def test_a_path_that_is_not_there_names_the_nearest():
    with pytest.raises(ValueError) as raised:
        keypath_of(ROOT, "table.query_prj.weight")
    assert str(raised.value) == (
        "There is no node at 'table.query_prj.weight' in this Root (None and static fields are none)."
        " The nearest paths: table.query_proj.weight, table.key_proj.2.weight, table.key_proj.0.weight."
    )
    path = keypath_of(ROOT, "table.key_proj.2.weight")
    with pytest.raises(ValueError, match=r"no node at 'table\.key_proj\.2\.weight' in this Root .* nearest paths: ta"):
        at(eqx.tree_at(lambda r: r.table["key_proj"], ROOT, [Scale(array(3))]), path)
    for none in ("nothing", "parts.0.heads", "table.key_proj.1"):
        with pytest.raises(ValueError, match=r"\(None and static fields are none\)"):
            keypath_of(ROOT, none)


def test_a_spelling_of_two_paths_is_refused():
    with pytest.raises(ValueError, match=r"'a\.b' is not one place .* spells \['a'\]\['b'\] and \['a\.b'\]"):
        keypath_of({"a": {"b": 1}, "a.b": 2}, "a.b")


# ---- what matches

MATCHES = {
    "": [""],
    "**": PATHS,
    "*": ["parts", "table", "act"],
    "parts.*": ["parts.0", "parts.1", "parts.2"],
    "parts.1.weight": ["parts.1.weight"],
    "**.weight": [path for path in PATHS if path.endswith("weight")],
    "weight.**": [],
    "**.parts.**.bias": ["parts.0.bias", "parts.2.bias"],
    "**.**.pair.**": ["table.pair", "table.pair.0", "table.pair.1", "table.pair.1.weight"],
    "*.*_proj": ["table.key_proj", "table.query_proj"],
    "table.*e*": ["table.dotted.name", "table.empty", "table.identity", "table.key_proj", "table.query_proj"],
    "table.{query,value}_proj": ["table.query_proj"],
    "{table,parts}.{pair,1,2}": ["parts.1", "parts.2", "table.pair"],
    "table.{,key_,query_}proj": ["table.key_proj", "table.query_proj"],
    "{a,p}{c,arts}{t,}": ["parts", "act"],
    "parts.[0:2]": ["parts.0", "parts.1"],
    "parts.[1:]": ["parts.1", "parts.2"],
    "parts.[:-1]": ["parts.0", "parts.1"],
    "parts.[-1]": ["parts.2"],
    "parts.[-2]": ["parts.1"],
    "parts.[0]": ["parts.0"],
    "parts.[-4]": [],
    "parts.[3]": [],
    "parts.[::2].weight": ["parts.0.weight", "parts.2.weight"],
    "parts.[::-1]": ["parts.0", "parts.1", "parts.2"],
    "parts.[9:0:-2]": ["parts.2"],
    "**.[1:]": ["parts.1", "parts.2", "table.key_proj.2", "table.pair.1"],
    "table.[0:9]": [],  # a dict is no sequence
    "table.key_proj.[1]": [],  # None is no node, but it counts
    "**.[-1].weight": ["parts.2.weight", "table.key_proj.2.weight", "table.pair.1.weight"],
    "table.dotted.name": [],  # one step, whose dot is the key's own
    "table.dotted*.left": ["table.dotted.name.left"],
    "Parts": [],
}


@pytest.mark.parametrize("pattern", MATCHES)
def test_a_pattern_selects_exactly_these_paths(pattern):
    if MATCHES[pattern]:
        assert select(under=pattern).paths(ROOT) == MATCHES[pattern]
    else:
        with pytest.raises(ValueError, match="nothing lies at"):
            select(under=pattern).paths(ROOT)


def test_a_star_is_any_step_whatever_its_name_is_made_of():
    odd = {"a\nb": 1, "[0]": 2, "**": 3, "": 4}
    assert select(under="*").get(odd) == [4, 3, 2, 1]  # a dict is flattened in the order of its keys
    assert select(under="a*").get(odd) == [1]
    numbered = {5: 6, 7: 8}
    assert select(under="5").get(numbered) == [6]
    with pytest.raises(ValueError, match=r"nothing lies at '\[0:9\]' in this dict"):  # which is no sequence
        select(under="[0:9]").get(numbered)


MALFORMED = {
    "parts..weight": (6, "there is no step before, between or behind these dots"),
    ".parts": (0, "there is no step before"),
    "parts.": (6, "there is no step before"),
    "parts.a**": (7, "** is a step of its own; within a name, * is any characters"),
    "***": (0, "** is a step of its own"),
    "table.{a,{b,c}}": (6, "alternatives are {a,b} within one step; braces close and do not nest"),
    "table.{a,b": (6, "alternatives are {a,b} within one step"),
    "table.{a.b,c}": (6, "alternatives are {a,b} within one step"),
    "table.x{a}y}": (11, "alternatives are {a,b} within one step"),
    "table.query,key": (11, "alternatives are {a,b} within one step"),
    "table.a{}": (7, "there are no alternatives between these braces"),
    "parts.[0:2": (6, "a step with brackets is [start:stop], [start:stop:step] or [index], of whole numbers"),
    "parts.x[0]": (6, "a step with brackets is"),
    "parts.[a:b]": (6, "a step with brackets is"),
    "parts.[]": (6, "a step with brackets is"),
    "parts.0]": (6, "a step with brackets is"),
    "parts.[0:4:0]": (6, "the step of a slice is not 0"),
}


@pytest.mark.parametrize("pattern", MALFORMED)
def test_a_malformed_pattern_is_pointed_at(pattern):
    place, said = MALFORMED[pattern]
    for use in (parse, lambda under: select(under=under), lambda under: select("Dense", under=under)):
        with pytest.raises(ValueError) as raised:
            use(pattern)
        first, second, third = str(raised.value).split("\n")
        assert first.startswith(f"This pattern of paths is malformed: {said}")
        assert (second, third) == (f"  {pattern}", f"  {' ' * place}^")
