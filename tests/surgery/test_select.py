"""What selections find, in models of several families and in a plain tree; as a `where` for `eqx.tree_at`; errors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5, CausalLM, Encoder, MaskedLM, Selection, nn, select
from eqx_transformers.surgery import at, keypath_of, leaves_by_path

from ..models.ours import make
from ..models.test_t5 import make as make_t5
from .test_patterns import PATHS, ROOT, SHARED, AbstractPart, Dense, Pair, array

pytestmark = pytest.mark.usefixtures("strict_promotion")


def model_of(name, stacked=False):
    kind, family = {
        "bert": (MaskedLM, "bert"),
        "roberta": (Encoder, "roberta"),
        "gpt2": (CausalLM, "gpt2"),
        "llama": (CausalLM, "llama"),
    }.get(name, (None, None))
    return make_t5(T5, "t5", stacked) if kind is None else make(kind, family, stacked)


def equal(a, b):
    return bool(eqx.tree_equal(a, b))


# ---- what is found

QUERIES_AND_VALUES = "**.attention.{query,value}_proj"
FOUND = {
    "roberta": [
        "stack.blocks.0.attention.query_proj",
        "stack.blocks.0.attention.value_proj",
        "stack.blocks.1.attention.query_proj",
        "stack.blocks.1.attention.value_proj",
    ],
    "bert": [f"backbone.stack.blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in ("query", "value")],
    "gpt2": [f"backbone.stack.blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in ("query", "value")],
    "llama": [f"backbone.stack.blocks.{i}.attention.{p}_proj" for i in (0, 1) for p in ("query", "value")],
    "t5": [
        "encoder.stack.blocks.0.attention.query_proj",
        "encoder.stack.blocks.0.attention.value_proj",
        "encoder.stack.blocks.1.attention.query_proj",
        "encoder.stack.blocks.1.attention.value_proj",
        "decoder.stack.blocks.0.attention.query_proj",
        "decoder.stack.blocks.0.attention.value_proj",
        "decoder.stack.blocks.1.attention.query_proj",
        "decoder.stack.blocks.1.attention.value_proj",
        "decoder.stack.blocks.2.attention.query_proj",
        "decoder.stack.blocks.2.attention.value_proj",
    ],
}
every = pytest.mark.parametrize("name", FOUND)


@every
def test_the_queries_and_values_of_every_family_are_found_tuple_and_stacked(name):
    chosen = select(type="Linear", under=QUERIES_AND_VALUES)
    assert isinstance(chosen, Selection)
    assert chosen.paths(model_of(name)) == FOUND[name]
    in_one = list(dict.fromkeys(re.sub(r"\.blocks\.\d", ".blocks", path) for path in FOUND[name]))
    assert chosen.paths(model_of(name, stacked=True)) == in_one
    assert chosen.count(model_of(name)) == len(FOUND[name]) == 4 + 6 * (name == "t5")
    assert all(type(node) is nn.Linear for node in chosen.get(model_of(name)))


# What is selected in the plain tree; a path of a pattern's match, or below it where there is a type.
DENSE = ["parts.0", "parts.2", "table.query_proj"]
SCALES = ["parts.1", "table.key_proj.0", "table.key_proj.2", "table.pair.1"]
PARTS = ["parts.0", "parts.1", "parts.2", "table.key_proj.0", "table.key_proj.2", "table.pair.1", "table.query_proj"]
ARRAYS = [path for path in PATHS if path.endswith(("weight", "bias", "left", "pair.0"))]
SELECTED = {
    "a class": (select(Dense), DENSE),
    "its name": (select("Dense"), DENSE),
    "a base": (select(AbstractPart), PARTS),
    "a base's name": (select("AbstractPart"), PARTS),
    "two": (select((Dense, "Scale")), PARTS),
    "a container": (select(type=Pair), ["table.pair"]),
    "a class without leaves": (select(eqx.nn.Identity), ["table.identity"]),
    "a kind of leaf": (select(type=jax.Array), ARRAYS),
    "at the match": (select("Scale", under="parts.[1:]"), ["parts.1"]),
    "below the match": (select("Scale", under="table.*"), SCALES[1:]),
    "at and below": (
        select(eqx.Module, under="table.{pair,identity,query_proj}"),
        ["table.identity", "table.pair.1", "table.query_proj"],
    ),
    "the matches alone": (select(under="table.{key,query}_proj"), ["table.key_proj", "table.query_proj"]),
    "leaves": (select(under="**.bias"), ["parts.0.bias", "parts.2.bias"]),
    "by path": (select(where=lambda path, node: path.startswith("parts.1")), ["parts.1", "parts.1.weight"]),
    "by a static field": (select("Dense", where=lambda path, node: node.heads == 5), ["table.query_proj"]),
    "by an array": (
        select(where=lambda path, node: eqx.is_array(node) and node.shape == (3,)),
        ["parts.1.weight", "table.key_proj.0.weight", "table.key_proj.2.weight"],
    ),
    "everything": (select(), PATHS),
    "|": (
        select("Scale", under="table") | select(under="act") | select("Dense"),
        [*DENSE[:2], *SCALES[1:], DENSE[2], "act"],
    ),
    "&": (select("AbstractPart") & select(under="parts.*"), ["parts.0", "parts.1", "parts.2"]),
    "-": (select("AbstractPart") - select("Scale"), DENSE),
    "of three": (select("AbstractPart") - (select("Scale") | select(under="parts.0")), DENSE[1:]),
    "outermost": (
        select(under="**.{parts,pair,1,weight}").outermost(),
        ["parts", "table.key_proj.0.weight", "table.key_proj.2.weight", "table.pair", "table.query_proj.weight"],
    ),
    "innermost": (
        select(under="{parts,table}.**").innermost(),
        [path for path in PATHS if path in ARRAYS or path.endswith(("right", "empty", "identity"))],
    ),
    "expected": (select("Dense").expect(3), DENSE),
}


@pytest.mark.parametrize("case", SELECTED)
def test_a_selection_finds_exactly_these_resolved_or_not(case):
    chosen, expected = SELECTED[case]
    assert chosen.paths(ROOT) == chosen.on(ROOT).paths(ROOT) == expected
    assert chosen.count(ROOT) == len(expected)
    for node, resolved, path in zip(chosen.get(ROOT), chosen.on(ROOT).get(ROOT), expected, strict=True):
        assert node is resolved is at(ROOT, keypath_of(ROOT, path))


def test_an_object_at_two_places_is_two_nodes():
    assert ROOT.parts[0] is ROOT.parts[2] is SHARED
    changed = select("Dense", under="parts.2").map(ROOT, lambda part: eqx.tree_at(lambda p: p.weight, part, array(1)))
    assert changed.parts[0].weight.shape == (4, 3) and changed.parts[2].weight.shape == (1,)


def test_selections_say_what_they_are():
    chosen = select((Dense, "Scale"), under="parts.*") - select(where=len)
    assert repr(chosen) == "(select(type=(Dense, 'Scale'), under='parts.*') - select(where=len))"
    assert repr(select("Dense").on(ROOT).expect(3).outermost()) == "select(type='Dense').on(…).expect(3).outermost()"
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = select("Dense") | "Scale"


# ---- a `where` for eqx.tree_at


@every
@pytest.mark.parametrize("resolve", [False, True], ids=["as it stands", "resolved"])
def test_tree_at_takes_a_selection_with_replace_and_with_replace_fn(name, resolve):
    model = model_of(name)
    chosen = select(type="Linear", under=QUERIES_AND_VALUES)
    chosen = chosen.on(model) if resolve else chosen
    numbered = eqx.tree_at(chosen, model, list(range(chosen.count(model))))
    assert [leaves_by_path(numbered)[path] for path in FOUND[name]] == list(range(len(FOUND[name])))
    doubled = eqx.tree_at(chosen, model, replace_fn=lambda linear: jax.tree.map(lambda x: 2 * x, linear))
    old, new = leaves_by_path(model), leaves_by_path(doubled)
    for path, leaf in old.items():
        inside = path.rsplit(".", 1)[0] in FOUND[name]
        assert np.array_equal(new[path], 2 * leaf) if inside else new[path] is leaf


def test_one_replaces_one_node_and_expects_one():
    model = model_of("roberta")
    where = select(type="Linear", under="stack.blocks.1.attention.query_proj").one()
    assert where(model) is model.stack.blocks[1].attention.query_proj
    for replacement in (eqx.nn.Identity(), [1, 2]):  # a list is one replacement, too
        changed = eqx.tree_at(where, model, replacement)
        assert equal(changed.stack.blocks[1].attention.query_proj, replacement)
        assert changed.stack.blocks[0].attention.query_proj.weight is model.stack.blocks[0].attention.query_proj.weight
    at_leaf = select(under="pooler.dense.weight").one()
    assert equal(eqx.tree_at(at_leaf, model, replace_fn=jnp.zeros_like).pooler.dense.weight, jnp.zeros((21, 21)))
    both = select(under="stack.blocks.*.attention.query_proj").one()
    with pytest.raises(ValueError, match=r"expected 1 nodes, found 2: stack\.blocks\.0\.attention\.query_proj, stack"):
        eqx.tree_at(both, model, eqx.nn.Identity())


def test_the_tree_itself_and_containers_and_empty_nodes_can_be_replaced():
    assert select(under="").set(ROOT, 3) == 3
    assert eqx.tree_at(select(type="Root").one(), ROOT, 3) == 3
    assert eqx.tree_at(select(under="table.{empty,identity,pair}"), ROOT, [1, 2, 3]).table["pair"] == 3
    assert select(under="parts").map(ROOT, lambda parts: parts[::-1]).parts == ROOT.parts[::-1]


def test_structure_paths_and_static_fields_need_no_model_even_under_jit():
    model = model_of("roberta")
    chosen = select(where=lambda path, node: isinstance(node, nn.Attention) and node.num_heads == 3 and "1" in path)

    @eqx.filter_jit
    def zeroed(model):
        silent = lambda node: jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, node)
        return eqx.tree_at(chosen, model, replace_fn=silent)

    got = zeroed(model)
    assert not got.stack.blocks[1].attention.query_proj.weight.any()
    assert got.stack.blocks[0].attention.query_proj.weight.any()


# What must see leaves, of which tree_at shows none.
LOOKS = {
    "a shape": (select(where=lambda path, node: "weight" in path and node.shape == (3,)), SCALES[:3], "where"),
    "of a module": (select("Scale", where=lambda path, node: node.weight.shape == (3,)), SCALES[:3], "where"),
    "a number": (select("Scale", where=lambda path, node: bool(node.weight.sum() > 2)), SCALES[:3], "where"),
    "a class": (select(where=lambda path, node: isinstance(node, jax.Array)), ARRAYS, "where"),
    "exactly a class": (select(where=lambda path, node: type(node) is float), ["table.dotted.name.right"], "where"),
    "an attribute": (select(where=lambda path, node: hasattr(node, "dtype")), ARRAYS, "where"),
    "its own errors": (
        select(where=lambda path, node: getattr(node, "ndim", None) == 2),
        ["parts.0.weight", "parts.2.weight", "table.query_proj.weight"],
        "where",
    ),
    "a type": (select(type=jax.Array), ARRAYS, "type"),
    "a name": (select(type="float"), ["table.dotted.name.right"], "type"),
}


@pytest.mark.parametrize("case", LOOKS)
def test_what_looks_at_leaves_must_be_resolved_and_says_so(case):
    chosen, expected, what = LOOKS[case]
    expected = [path if case != "a shape" else f"{path}.weight" for path in expected]
    assert chosen.paths(ROOT) == expected
    said = rf"its {what} looks at leaves, which eqx\.tree_at does not show.*selection\.on\(model\); eqx\.tree_at\(where"
    with pytest.raises(ValueError, match=said):
        eqx.tree_at(chosen, ROOT, replace_fn=lambda node: node)
    marked = eqx.tree_at(chosen.on(ROOT), ROOT, list(range(len(expected))))
    assert [leaves_by_path(marked)[path] for path in expected] == list(range(len(expected)))


def test_an_error_of_the_predicate_is_its_own():
    with pytest.raises(AttributeError, match="wieght"):
        eqx.tree_at(select("Scale", where=lambda path, node: node.wieght), ROOT, replace_fn=lambda node: node)


def test_a_resolved_selection_is_paths_on_any_tree():
    large = select("Scale", where=lambda path, node: node.weight.shape == (3,)).on(ROOT)
    halved = jax.tree.map(lambda x: x[:1] if eqx.is_array(x) else x, ROOT)
    assert large.paths(halved) == SCALES[:3]
    assert [type(node) for node in large.get(select(type="Scale").set(ROOT, 1.0))] == [float] * 3
    with pytest.raises(ValueError, match=r"no node at 'table\.key_proj\.0' in this Root"):
        large.paths(select(under="table.key_proj").set(ROOT, ()))


def test_what_is_resolved_is_counted_at_once():
    found = select("Dense").on(ROOT)
    assert found.expect(3).outermost().innermost().expect(3).paths(ROOT) == DENSE
    for late in (select("Dense").expect(4), select("Dense").outermost().expect(4)):
        with pytest.raises(ValueError, match=r"expected 4 nodes, found 3: parts\.0, parts\.2, table\.query_proj$"):
            late.on(ROOT)
    for early in (found, found.outermost(), found.innermost()):
        with pytest.raises(ValueError, match="expected 4 nodes, found 3"):
            early.expect(4)


def test_nodes_that_contain_each_other_are_told_apart_before_they_are_replaced():
    nested = select(under="parts") | select(under="parts.1")
    assert nested.paths(ROOT) == ["parts", "parts.1"]
    said = r"parts contains parts\.1: both are selected.*\.outermost\(\) or \.innermost\(\)"
    uses = [
        lambda: eqx.tree_at(nested, ROOT, replace_fn=lambda x: x),
        lambda: eqx.tree_at(nested.on(ROOT), ROOT, replace_fn=lambda x: x),
        lambda: nested.each(ROOT, lambda x: x),
        lambda: nested.map(ROOT, lambda x: x),
        lambda: nested.set(ROOT, 1),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=said):
            use()
    with pytest.raises(ValueError, match="the tree itself contains parts: both"):
        select().set(ROOT, 1)
    assert nested.outermost().set(ROOT, 1).parts == 1
    assert nested.innermost().set(ROOT, 1).parts[1] == 1


# ---- nothing, or not what was expected

ROBERTA, T5_MODEL = "roberta", "t5"
FAILS = {
    "a typo at the end": (
        ROBERTA,
        select(under="**.attention.{query,value}_prj"),
        "select(under='**.attention.{query,value}_prj'): nothing lies at '**.attention.{query,value}_prj' in this"
        " Encoder. The nearest paths: stack.blocks.0.attention.query_proj, stack.blocks.0.attention.value_proj,"
        " stack.blocks.0.attention.key_proj.",
    ),
    "a typo in the middle": (
        ROBERTA,
        select(type="Linear", under="stak.blocks.*.mlp"),
        "The nearest paths: stack, embedding, pooler.",
    ),
    "a typo behind any steps": (
        ROBERTA,
        select(under="**.atention.query_proj"),
        "The nearest paths: stack.blocks.0.attention, ",
    ),
    "too many layers": (
        ROBERTA,
        select(under="stack.blocks.[2:]"),
        "The nearest paths: stack.blocks.0, stack.blocks.1.",
    ),
    "no step there": (ROBERTA, select(under="pooler.dense.weight.T"), "nothing lies at 'pooler.dense.weight.T' in"),
    "a class": (
        ROBERTA,
        select(type="Liner", under="**.attention"),
        "select(type='Liner', under='**.attention'): of 34 nodes, none is a 'Liner'. The nearest classes: Linear.",
    ),
    "the other Linear": (
        ROBERTA,
        select(type=eqx.nn.Linear),
        "none is a Linear. The nearest classes: eqx_transformers.nn.linear.Linear.",
    ),
    "two classes": (ROBERTA, select(type=("RMSNrm", "LayrNorm")), "none is a 'RMSNrm' or 'LayrNorm'. The nearest"),
    "a predicate": (
        ROBERTA,
        select("Linear", where=lambda path, node: "gate" in path),
        "select(type='Linear', where=<lambda>): where was False of all 13 nodes that it was asked about.",
    ),
    "a part of a union": (ROBERTA, select("Linear") | select("Conv"), "select(type='Conv'): of "),
    "a part of a difference": (ROBERTA, select("Linear") - select(under="heads"), "nothing lies at 'heads'"),
    "nothing in common": (
        ROBERTA,
        select("Linear") & select(under="**.attention"),
        "(select(type='Linear') & select(under='**.attention')): they have no node in common. Selections combine by",
    ),
    "nothing to take away": (ROBERTA, select("Linear") - select(under="**.mlp"), "they have no node in common."),
    "nothing left": (
        ROBERTA,
        select("Linear", under="pooler") - select("Linear"),
        "nothing is left, for the second has every node of the first.",
    ),
    "not so many": (
        ROBERTA,
        select("Linear").expect(12),
        "select(type='Linear'): expected 12 nodes, found 13: stack.blocks.0.attention.query_proj, stack.blocks.0."
        "attention.key_proj, stack.blocks.0.attention.value_proj, stack.blocks.0.attention.output_proj, stack.blocks.0."
        "mlp.up_proj, stack.blocks.0.mlp.down_proj, …",
    ),
    "of two halves": (
        T5_MODEL,
        select(under="encoder.stack.blocks.*.cross_attention"),
        "The nearest paths: encoder.stack.blocks.0.attention, encoder.stack.blocks.0.attention_norm, ",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_nothing_found_is_an_error_that_names_what_is_near(case):
    name, chosen, said = FAILS[case]
    model = model_of(name)
    for use in (chosen.paths, chosen.count, chosen.get, chosen.on, chosen.mask, chosen, chosen.one()):
        with pytest.raises(ValueError) as raised:
            use(model)
        assert said in str(raised.value)
    with pytest.raises(ValueError, match=re.escape(said)):
        eqx.tree_at(chosen, model, replace_fn=lambda node: node)


@pytest.mark.parametrize("wrong", [3, (), ("Linear", 3), ["Linear"]], ids=str)
def test_a_type_that_is_none_is_refused(wrong, unchecked):
    with pytest.raises(TypeError, match=r"type must be a class, the name of a class, or a tuple of these; it is "):
        select(type=wrong)
