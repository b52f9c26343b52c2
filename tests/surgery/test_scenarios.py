"""Scenarios 13 and 14 of module expressions: LoRA from patterns to files, and weights that two places share."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import converters
from converters import peft
from eqx_transformers import CausalLM, MaskedLM, load, reconfigure, save, select
from eqx_transformers.expression import direct_uses, trace
from eqx_transformers.surgery import LoRA, adapter_mask, add_adapter, merge, shared_leaves, unmerge

from ..models.ours import make, tokens

KEY = jax.random.key(13)
IDS = jnp.asarray(tokens())
WHERE = select("Linear", under="**.attention.{query,value}_proj") | select("Linear", under="**.mlp.up_proj")
OPTIONS = {"rank": 3, "alpha": 5, "rank_pattern": {"**.mlp": 2}, "alpha_pattern": {"**.query_proj": 7}}
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
call = eqx.filter_jit(lambda model, ids, key=None: model(ids, key=key))


def near(a, b, of_largest=2e-5):
    return float(jnp.abs(a - b).max()) <= of_largest * max(1.0, float(jnp.abs(b).max()))


def train(adapted, steps, state=None, first=0):
    """AdamW on what the mask says, with dropout; and the optimizer's state."""
    trained, frozen = eqx.partition(adapted, adapter_mask(adapted))
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(trained) if state is None else state

    @eqx.filter_jit
    def step(trained, frozen, state, key):
        loss = lambda trained: jnp.square(eqx.combine(trained, frozen)(IDS, key=key)).mean()
        updates, state = optimizer.update(eqx.filter_grad(loss)(trained), state, trained)
        return eqx.apply_updates(trained, updates), state

    for i in range(first, first + steps):
        trained, state = step(trained, frozen, state, jax.random.fold_in(KEY, i))
    return eqx.combine(trained, frozen), state


VARIANTS = {"plain": {}, "rslora": {"rslora": True, "dropout": 0.4}, "dora": {"dora": True}}


@layouts
@pytest.mark.parametrize("variant", VARIANTS)
def test_s13_lora_from_patterns_to_training_merging_and_files(variant, stacked, tmp_path):
    model = make(MaskedLM, "roberta", stacked)
    adapted = add_adapter(model, WHERE, **OPTIONS, **VARIANTS[variant], key=KEY)
    assert near(call(adapted, IDS), call(model, IDS), 2e-6 if variant == "dora" else 0)  # nothing changes at first
    found = dict(zip(select(LoRA).paths(adapted), select(LoRA).get(adapted), strict=True))
    ranks = {path.split(".")[-1]: node.adapters[0].rank for path, node in found.items()}
    assert ranks == {"query_proj": 3, "value_proj": 3, "up_proj": 2}
    mask = adapter_mask(adapted)
    learned, frozen = eqx.partition(adapted, mask)
    assert len(jax.tree.leaves(learned)) == (3 if variant == "dora" else 2) * len(found)
    trained, _ = train(adapted, 2)
    assert eqx.tree_equal(eqx.partition(trained, mask)[1], frozen)
    assert not near(call(trained, IDS), call(model, IDS), 1e-3)
    assert near(call(merge(trained), IDS), call(trained, IDS))
    assert eqx.tree_equal(unmerge(merge(trained, keep=True)), trained)
    peft.save(trained, tmp_path / "adapter")
    again = peft.load(make(MaskedLM, "roberta", not stacked), tmp_path / "adapter")
    assert near(call(again, IDS), call(trained, IDS))


@layouts
def test_s13_training_is_saved_and_resumed_to_the_same_bits(stacked, tmp_path):
    model = make(CausalLM, "llama", stacked)
    adapt = functools.partial(add_adapter, selection=WHERE, **OPTIONS, dropout=0.2, key=KEY)
    whole, _ = train(adapt(model), 4)
    half, state = train(adapt(model), 2)
    save(half, tmp_path / "half", edited=True)
    eqx.tree_serialise_leaves(tmp_path / "state", state)
    again, _ = load(tmp_path / "half", skeleton=adapt)
    like = optax.adamw(1e-2).init(eqx.partition(again, adapter_mask(again))[0])
    resumed, _ = train(again, 2, eqx.tree_deserialise_leaves(tmp_path / "state", like), first=2)
    assert eqx.tree_equal(resumed, whole) and not eqx.tree_equal(half, whole)


@layouts
@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_s14_an_adapter_on_the_owner_of_a_tied_table_keeps_the_tie(name, stacked, tmp_path):
    model = make(MaskedLM if name == "roberta" else CausalLM, name, stacked)
    table = select("Embedding", under="**.embedding.tokens")
    adapted = add_adapter(model, table, rank=2, init="random", key=KEY)
    merged = merge(adapted)
    assert near(call(merged, IDS), call(adapted, IDS)) and not near(call(adapted, IDS), call(model, IDS), 1e-2)
    assert merged.head.decoder is None
    converters.export(merged, tmp_path / "hf")
    assert near(call(converters.load(tmp_path / "hf")[0], IDS), call(adapted, IDS))
    with pytest.raises(ValueError, match=r"(?s)tied.*embedding\.tokens"):
        add_adapter(model, select(under="head.decoder"), rank=2, key=KEY)
    assert direct_uses(trace(model)(IDS)) == {}  # the other end is the table's own `attend`


class AttributeTied(eqx.Module):
    """A head that reads the table itself: what an adapter on the table would not reach."""

    table: eqx.nn.Embedding

    def __call__(self, ids):
        return jax.vmap(self.table)(ids) @ self.table.weight.T


def test_s14_a_weight_that_is_read_where_it_is_is_reported_with_the_place():
    model = AttributeTied(eqx.nn.Embedding(7, 3, key=KEY))
    ((path, uses),) = direct_uses(trace(model)(jnp.arange(4))).items()
    assert path == "table.weight" and [use.within for use in uses] == [""]
    both = {"a": model.table, "b": model.table}
    assert shared_leaves(both) == (("a.weight", "b.weight"),) and shared_leaves(model) == ()


def test_s14_a_model_that_is_untied_and_merged_says_so_in_its_file(tmp_path):
    model = make(MaskedLM, "roberta")
    weight = model.backbone.embedding.tokens.weight
    untied = reconfigure(model, lambda path, old, new: weight if path == "head.decoder.weight" else None, tied=False)
    adapted = add_adapter(untied, select("Linear", under="head.decoder"), rank=2, init="random", key=KEY)
    converters.export(merge(adapted), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    again, _ = converters.load(tmp_path / "hf")
    assert near(call(again, IDS), call(adapted, IDS))
    assert np.array_equal(again.backbone.embedding.tokens.weight, weight)
