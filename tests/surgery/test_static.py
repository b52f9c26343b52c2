"""Static fields of modules inside a model: changed, checked again, and everything else as it was."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import nn, select, stack
from eqx_transformers.surgery import at, keypath_of, leaves_by_path
from eqx_transformers.surgery.static import set_static

from ..models.ours import tokens
from .test_select import equal, model_of

pytestmark = pytest.mark.usefixtures("strict_promotion")
PLACES = [
    ("roberta", "stack.blocks.1.attention_norm", "stack.blocks.attention_norm"),
    ("llama", "backbone.stack.blocks.0.mlp_norm", "backbone.stack.blocks.mlp_norm"),
    ("t5", "decoder.norm", "decoder.norm"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
def test_one_field_changes_and_nothing_else(place, stacked):
    name, path = place[0], place[1 + stacked]
    model = model_of(name, stacked)
    changed = set_static(model, path, eps=0.25)
    norm, was = (at(tree, keypath_of(tree, path)) for tree in (changed, model))
    assert (norm.eps, was.eps != 0.25, type(norm)) == (0.25, True, type(was))
    old, new = leaves_by_path(model), leaves_by_path(changed)
    assert old.keys() == new.keys() and all(new[one] is old[one] for one in old)
    assert not equal(changed, model) and equal(set_static(changed, path, eps=was.eps), model)


def test_the_change_is_what_runs():
    model, ids = model_of("roberta"), tokens()
    calm = select("LayerNorm").map(model, lambda norm: set_static(norm, "", eps=1e6))
    assert [norm.eps for norm in select("LayerNorm").get(calm)] == [1e6] * 5
    shift = model.stack.blocks[1].mlp_norm.bias
    assert np.allclose(calm(ids), jnp.broadcast_to(shift, (len(ids), 21)), atol=0.05)
    assert not np.allclose(model(ids), calm(ids), atol=0.5)
    deep = select("LayerNorm").map(stack(model), lambda norm: set_static(norm, "", eps=1e6))
    assert equal(deep, stack(calm))


def test_the_model_itself_is_a_module():
    model = model_of("roberta")
    causal = set_static(model, "", causal=True, config=None)
    assert causal.causal is True and causal.config is None and model.causal is False
    assert causal.stack is model.stack


class Base(eqx.Module):
    heads: int = eqx.field(static=True)
    seen: Any = eqx.field(static=True)

    def __check_init__(self):
        self.seen.append(("Base", self.heads))  # a list of a test's own, whose hash is its identity
        if self.heads < 1:
            raise ValueError("at least one head")


class Log(list):
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


class Part(Base):
    width: float = eqx.field(static=True, converter=float)
    weight: jax.Array
    later: int

    def __init__(self, seen):
        self.heads, self.width, self.seen, self.weight, self.later = 2, 3, seen, jnp.ones(2), 1

    def __check_init__(self):
        seen = [*self.seen]
        self.seen.append(("Part", self.width))
        if self.width < self.heads:
            raise ValueError(f"too narrow, after {len(seen)}")


def test_checks_of_the_class_and_its_bases_and_converters_run_again():
    log = Log()
    part = Part(log)
    made = list(log)
    log.clear()
    changed = set_static([part], "0", heads=3, width="7.5")[0]
    assert (changed.heads, changed.width, changed.weight) == (3, 7.5, part.weight)
    assert log == [("Part", 7.5), ("Base", 3)] and [kind for kind, _ in made] == ["Part", "Base"]
    for fields, said in (({"heads": 0}, "at least one head"), ({"width": 1}, "too narrow")):
        with pytest.raises(ValueError, match=said):
            set_static([part], "0", **fields)
    assert (part.heads, part.width) == (2, 3.0)
    assert set_static(part, "").weight is part.weight


def test_a_jitted_function_sees_the_new_structure():
    norm = nn.LayerNorm(3)
    run = eqx.filter_jit(lambda norm, x: norm(x))
    x = jnp.array([1.0, 2.0, 4.0])
    assert np.abs(np.asarray(run(norm, x) - run(set_static(norm, "", eps=5.0), x))).max() > 0.3


ERRORS = [
    (("stack.blocks.0.attention_norm", {"epsilon": 1}), ValueError, "at 'stack.blocks.0.attention_norm' has no field"),
    (("stack.blocks.0.attention_norm", {"epsilon": 1}), ValueError, "static fields: eps"),
    (("", {"padding": 1}), ValueError, "this Encoder has no field 'padding'"),
    (
        ("stack.blocks.0.attention_norm", {"weight": 1}),
        ValueError,
        "'weight' of the LayerNorm at 'stack.blocks.0.attention_norm' is not static: it is a part of the tree."
        " eqx.tree_at(lambda model: model.stack.blocks[0].attention_norm.weight, model, …)",
    ),
    (("", {"stack": 1}), ValueError, "eqx.tree_at(lambda model: model.stack, model, …)"),
    (("stack.blocks", {"eps": 1}), ValueError, "at 'stack.blocks' is a tuple, which is no module"),
    (("stack.blocks.0.attention_norm.weight", {"eps": 1}), ValueError, "which is no module"),
    (("stack.blocks.2", {"eps": 1}), ValueError, "There is no node at 'stack.blocks.2'"),
    (("stack.blocks.0.attention_norm", {"eps": jnp.ones(())}), TypeError, "eps is an array or holds one"),
    (("stack.blocks.0.attention_norm", {"eps": (1, np.ones(2))}), TypeError, "eps is an array or holds one"),
    (("stack.blocks.0.attention", {"num_heads": 5}), ValueError, "21 features of query_proj are not a"),
    (("stack.blocks.0.attention", {"num_kv_heads": 2}), ValueError, "of key_proj are not a multiple of num_kv"),
    (("stack.blocks.0.attention", {"num_heads": 7}), ValueError, "queries are 3 wide and its keys 7; both must be"),
    (("stack.blocks.0.attention_norm", {"eps": [1]}), TypeError, "eps = [1] has no hash"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_what_cannot_be_set_is_an_error_that_says_why(case):
    (path, fields), kind, said = ERRORS[case]
    with pytest.raises(kind, match=re.escape(said)):
        set_static(model_of("roberta"), path, **fields)
