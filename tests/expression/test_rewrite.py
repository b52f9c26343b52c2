"""Parts of a call replaced: the numbers and the program are those of a model written so, or there is an error."""

import io
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Float

from eqx_transformers import CausalLM, MaskedLM, T5Model, nn, select, stack
from eqx_transformers.expression import ExpressionError, NoMatch, Rewritten, ShapeMismatch, rewrite, trace

from ..models import ours
from ..models.test_t5 import make as make_t5, tokens as t5_tokens
from .small import DIM, HIDDEN, KEY, MODELS, Block, Feed, expect_numbers, ids, states

NEAR = {"rtol": 1e-5, "atol": 1e-6}  # the same program compiled as two
small = pytest.mark.parametrize("name", MODELS)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
silu = jax.nn.silu
LIST = MODELS["list"]


def with_gelu(new, function, *args):
    """What `function` gives where its code says `new` in place of `jax.nn.gelu`."""
    old = jax.nn.gelu
    jax.nn.gelu = new
    try:
        return function(*args)
    finally:
        jax.nn.gelu = old


def same(found, wanted, **near):
    a, b = jax.tree.leaves(found), jax.tree.leaves(wanted)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, **near) if near else expect_numbers(x, y)


def gradients(function, model, *inputs):
    """Of the squares of what `function(model)(*inputs)` gives."""

    def loss(model):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(function(model)(*inputs)))

    return eqx.filter_jit(eqx.filter_grad(loss))(model)


# ---- scenario 6: an inline activation


@small
def test_s06_gelu_is_silu_everywhere_at_other_lengths_mapped_and_compiled(name):
    model = MODELS[name]
    new = rewrite(model, {"//gelu": silu})
    same(new(ids()), with_gelu(silu, model, ids()))
    assert np.abs(new(ids()) - model(ids())).max() > 1e-3
    same(new(ids(9)), with_gelu(silu, model, ids(9)))
    rows = np.stack([ids(seed=i) for i in range(3)])
    same(jax.jit(jax.vmap(new))(rows), with_gelu(silu, jax.vmap(model), rows))
    same(jax.vmap(jax.vmap(new))(rows[None]), with_gelu(silu, jax.vmap(model), rows)[None])


@small
def test_s03_s06_all_gradients_are_those_of_a_model_written_with_silu(name):
    found = gradients(lambda m: rewrite(m, {"//gelu": silu}), MODELS[name], ids())
    same(found, with_gelu(silu, gradients, lambda m: m, MODELS[name], ids()), rtol=1e-5, atol=1e-5)


def test_s06_in_one_block_alone():
    new = rewrite(LIST, {"//*[@path='blocks.1']//gelu": silu})
    x = LIST.blocks[0](jax.vmap(LIST.embed)(ids()))
    x = with_gelu(silu, LIST.blocks[1], x)
    same(new(ids()), jax.vmap(LIST.head)(jax.vmap(LIST.norm)(x)))


def test_s06_bfloat16():
    block = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, LIST.blocks[0])
    x = states().astype(jnp.bfloat16)
    new = rewrite(block, {jax.nn.gelu: silu})(x)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new, with_gelu(silu, block, x))


def instructions(function, *args):
    """How many the compiled program has."""
    text = jax.jit(function).lower(*args).compile().as_text()
    assert text is not None
    return sum(" = " in line for line in text.splitlines())


@small
def test_s06_the_compiled_program_is_as_long_as_that_of_a_model_written_so(name):
    arrays, rest = eqx.partition(MODELS[name], eqx.is_array)
    program = lambda change: lambda arrays, x: change(eqx.combine(arrays, rest))(x)
    written = with_gelu(silu, instructions, program(lambda m: m), arrays, ids())
    assert instructions(program(lambda m: rewrite(m, {"//gelu": silu})), arrays, ids()) == written
    assert instructions(program(lambda m: rewrite(m, {})), arrays, ids()) == instructions(
        program(lambda m: m), arrays, ids()
    )


def activations(model):
    """Where our RoBERTa keeps them."""
    blocks = model.backbone.stack.blocks
    blocks = blocks if isinstance(blocks, tuple) else (blocks,)
    return [*(block.mlp.activation for block in blocks), model.head.activation]


@layouts
def test_s06_in_roberta_it_is_what_tree_at_makes_outputs_gradients_and_program(stacked):
    model = ours.make(MaskedLM, "roberta", stacked)
    swapped = eqx.tree_at(activations, model, replace_fn=lambda _: silu)
    change = lambda m: rewrite(m, {"//gelu": silu})
    inputs = (ours.tokens(),)

    def program(change):
        def run(arrays, ids):
            def loss(arrays):
                y = change(eqx.combine(arrays, rest))(ids)
                return jnp.square(y).sum(), y

            return jax.value_and_grad(loss, has_aux=True)(arrays)

        return run

    counts, results = [], []
    for how, given in ((change, model), (lambda m: m, swapped)):
        arrays, rest = eqx.partition(given, eqx.is_array)
        compiled = jax.jit(program(how)).lower(arrays, *inputs).compile()
        counts.append(sum(" = " in line for line in compiled.as_text().splitlines()))
        results.append(compiled(arrays, *inputs))
    # Beside the largest gradient: some are zero but for what cancels, as those of biases of keys.
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(results[1]))
    same(results[0], results[1], rtol=1e-5, atol=1e-6 * largest)
    assert counts[0] == counts[1]
    paths = [node.path for node in trace(model)(*inputs).query("//gelu").nodes]
    assert paths[-1] == "head.activation" and all(path.endswith("activation") for path in paths)
    assert np.abs(results[0][0][1] - model(*inputs)).max() > 1e-3


@layouts
def test_s06_in_gpt2_and_t5(stacked):
    gpt2, t5 = ours.make(CausalLM, "gpt2", stacked), make_t5(T5Model, "t5", stacked)
    field = lambda block: block.mlp.activation
    for model, inputs, tag, stacks in (
        (gpt2, (ours.tokens(),), "gelu_tanh", lambda m: [m.backbone.stack]),
        (t5, (t5_tokens(), t5_tokens(1, 4)), "relu", lambda m: [m.encoder.stack, m.decoder.stack]),
    ):
        blocks = lambda m, stacks=stacks: [
            block for s in stacks(m) for block in (s.blocks if isinstance(s.blocks, tuple) else (s.blocks,))
        ]
        swapped = eqx.tree_at(lambda m, b=blocks: [field(x) for x in b(m)], model, replace_fn=lambda _: silu)
        call = eqx.filter_jit(lambda f, m, *x: f(m)(*x))
        rule = {f"//{tag}[@name='activation']": silu}
        same(call(lambda m, r=rule: rewrite(m, r), model, *inputs), call(lambda m: m, swapped, *inputs))


# ---- what a replacement is given


class Fed(eqx.Module):
    """A function in a field with keywords, and modules with them."""

    feed: Feed
    join: object

    def __call__(self, x, *, shift=1.0):
        y = self.feed(x)
        return self.join(x, y, weight=shift), {"last": self.join(y, x, weight=2.0)}


def join(x, y, *, weight):
    return x + weight * y


def test_a_function_in_a_field_and_a_module_get_their_arguments_and_keywords():
    model, x = Fed(Feed(key=KEY), join), states()[0]
    seen = []
    new = rewrite(model, {join: lambda x, y, *, weight: (seen.append(weight), x - weight * y)[1]})(x, shift=3.0)
    y = model.feed(x)
    same(new, (x - 3 * y, {"last": y - 2 * x}))
    assert sorted(set(seen)) == [2.0, 3.0]
    whole = rewrite(model, {"/*/Fed": lambda x, *, shift: (x * shift, {"last": x})})
    same(whole(x, shift=3.0), (x * 3, {"last": x}))
    same(rewrite(model, {Feed: lambda x: 2 * x})(x), (3 * x, {"last": 4 * x}))


def test_a_function_in_a_field_that_an_inner_vmap_maps_gets_one_example():
    class Mapped(eqx.Module):
        function: object

        def __call__(self, x):
            shared = x[0].sum(0)
            one = lambda row: self.function(row, shared)
            return jax.vmap(one)(x[0]), jax.vmap(jax.vmap(self.function))(x, x)

    def centred(x, y):
        return x - x.mean() + y

    model, x, shapes = Mapped(centred), states().reshape(1, 5, 8), []

    def scaled(x, y):
        shapes.append((x.shape, y.shape))
        return x / x.sum() - y

    same(rewrite(model, {centred: scaled})(x), eqx.tree_at(lambda m: m.function, model, scaled)(x))
    assert set(shapes) == {((8,), (8,))}


def test_rules_are_found_by_whatever_finds_nodes():
    model = ours.make(MaskedLM, "roberta")
    wanted = np.asarray(rewrite(model, {"//gelu": silu})(ours.tokens()))
    keys = (
        nn.activations.gelu,
        lambda node: node.tag == "gelu",
        select(under="**.activation"),
        trace(model)(ours.tokens()).query("//gelu"),
        ["//MLP//gelu", "//MaskedLMHead//gelu"],
    )
    for key in keys:
        rules = [(key, silu)]
        np.testing.assert_array_equal(rewrite(model, rules)(ours.tokens()), wanted)


# ---- scenario 8: derivative rules


@jax.custom_vjp
def odd(x):
    return 2 * x


odd.defvjp(lambda x: (2 * x, None), lambda _, g: (7 * g,))
ZERO = jnp.array([0.0, -1.0, 2.0])


def test_s08_derivative_rules_around_a_rewriting_hold():
    around = lambda x: jax.nn.relu(x) + odd(x) + 0 * jax.nn.gelu(x)
    new = rewrite(around, {"//gelu": jnp.sin})
    assert jax.grad(lambda x: new(x).sum())(ZERO).tolist() == [7, 7, 8]
    assert jax.grad(lambda x: rewrite(jax.nn.relu, {})(x).sum())(ZERO).tolist() == [0, 0, 1]


def test_s08_a_replacements_own_rule_is_used():
    new = rewrite(lambda x: jax.nn.gelu(x) * 3, {"//gelu": odd})
    assert new(ZERO).tolist() == (6 * ZERO).tolist()
    assert jax.grad(lambda x: new(x).sum())(ZERO).tolist() == [21] * 3


@jax.custom_vjp
def guarded(x):
    return jax.nn.gelu(x)


guarded.defvjp(lambda x: (jax.nn.gelu(x), x), lambda x, g: (g,))


def test_s08_what_is_inside_of_a_function_with_a_rule_is_refused_and_the_whole_is_not():
    with pytest.raises(ExpressionError, match=r"gelu is inside of guarded.*replace guarded as a whole"):
        rewrite(lambda x: guarded(x) + 1, {"//gelu": jnp.sin})(ZERO)
    with pytest.raises(ExpressionError, match=r"max is inside of relu.*replace relu as a whole"):
        rewrite(jax.nn.relu, {"//max": jnp.maximum})(ZERO)
    same(rewrite(lambda x: guarded(x) + 1, {guarded: jnp.sin})(ZERO), jnp.sin(ZERO) + 1)
    same(rewrite(lambda x: jax.nn.relu(x) + 1, {"//relu": jnp.sin})(ZERO), jnp.sin(ZERO) + 1)


def test_s08_a_part_of_a_derivative_that_the_model_takes_is_refused():
    inner = lambda x: jax.grad(lambda x: jax.nn.gelu(x).sum())(x)
    with pytest.raises(ExpressionError, match="part of a derivative"):
        rewrite(inner, {"//gelu": jnp.sin})(ZERO)
    whole = lambda x: jax.grad(lambda x: rewrite(lambda x: jax.nn.gelu(x).sum(), {"//gelu": jnp.sin})(x))(x)
    same(whole(ZERO), jnp.cos(ZERO))


# ---- scenario 9: nothing found

MODELS_AND_INPUTS = {
    "list": (LIST, (ids(),)),
    "stacked": (MODELS["stacked"], (ids(),)),
    "roberta": (ours.make(MaskedLM, "roberta"), (ours.tokens(),)),
    "gpt2 stacked": (ours.make(CausalLM, "gpt2", True), (ours.tokens(),)),
    "t5": (make_t5(T5Model, "t5"), (t5_tokens(), t5_tokens(1, 4))),
}
each = pytest.mark.parametrize("name", MODELS_AND_INPUTS)


def swish(x):
    return x * jax.nn.sigmoid(x)


@each
def test_s09_a_rule_that_finds_nothing_is_an_error_unless_it_is_allowed_to(name):
    model, inputs = MODELS_AND_INPUTS[name]
    for key, said in (("//gelus", "gelu"), (jax.nn.softplus, "softplus"), (swish, "swish"), (eqx.nn.GRUCell, "GRU")):
        with pytest.raises(NoMatch, match=said):
            jax.eval_shape(rewrite(model, {key: silu}), *inputs)
    allowed = {"//gelus": silu, swish: silu, eqx.nn.GRUCell: silu}
    shapes = jax.eval_shape(rewrite(model, allowed, allow_empty=True), *inputs)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(jax.eval_shape(model, *inputs))
    if name in MODELS:
        same(rewrite(model, allowed, allow_empty=True)(*inputs), model(*inputs), rtol=0, atol=0)


def test_s09_the_nearest_names_are_listed():
    with pytest.raises(NoMatch, match=r"//Feeds.*Feed"):
        rewrite(LIST, {"//Feeds": lambda x: x})(ids())


def test_rules_that_are_none_or_stand_in_each_others_way_are_refused(unchecked):
    with pytest.raises(TypeError, match="cannot be called"):
        rewrite(LIST, {"//gelu": 3.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="mapping, or pairs"):
        Rewritten(LIST, ["//gelu"])  # pyright: ignore[reportArgumentType]
    block = LIST.blocks[0]
    with pytest.raises(ExpressionError, match=r"gelu.*is inside of blocks.0 \(Block\).*leave one of them out"):
        rewrite(LIST, {"//gelu": silu, "(//Block)[1]": block})(ids())
    with pytest.raises(ExpressionError, match="replaced by two rules"):
        rewrite(LIST, {"//gelu": silu, jax.nn.gelu: silu})(ids())


# ---- scenario 10: another shape, dtype or structure

WRONG = {
    "shape": (lambda x: x[..., :1], r"f32\[5,1\].*f32\[5,16\]"),
    "dtype": (lambda x: x.astype(jnp.bfloat16), r"bf16\[5,16\].*f32\[5,16\]"),
    "more": (lambda x: (x, x), r"f32\[5,16\], f32\[5,16\].*f32\[5,16\]"),
    "none": (lambda x: None, r"gives .*f32\[5,16\]"),
    "text": (lambda x: "gelu", r"'gelu'.*f32\[5,16\]"),
}


@small
@pytest.mark.parametrize("what", WRONG)
def test_s10_a_replacement_that_gives_something_else_is_refused_at_trace_time(name, what):
    replacement, said = WRONG[what]
    leaves = jax.tree.leaves(MODELS[name])
    with pytest.raises(ShapeMismatch, match=f"gelu.*{said}"):
        jax.eval_shape(rewrite(MODELS[name], {"//gelu": replacement}), ids())
    assert all(a is b for a, b in zip(jax.tree.leaves(MODELS[name]), leaves, strict=True))


@each
def test_s10_a_modules_replacement_gives_the_same_structure_and_the_path_is_said(name):
    model, inputs = MODELS_AND_INPUTS[name]
    wrong = lambda *args, **kwargs: {"y": 1}
    own = name in MODELS
    key = "(//Block)[last()]" if own else "(//LayerNorm | //RMSNorm)[last()]"
    with pytest.raises(ShapeMismatch, match=rf"{'blocks' if own else 'norm'}.*\(.*\).*\{{'y': \*\}}"):
        jax.eval_shape(rewrite(model, {key: wrong}), *inputs)


def test_s10_the_width_within_a_module_may_change():
    wide = Block(3 * HIDDEN, key=jax.random.key(7))
    new = rewrite(LIST, {"(//Block)[2]": wide})
    same(new(ids()), eqx.tree_at(lambda m: m.blocks[1], LIST, wide)(ids()))


def test_s10_what_is_no_array_in_a_result_stays():
    class Said(eqx.Module):
        def __call__(self, x):
            return x, "said", None

    class Outer(eqx.Module):
        said: Said

        def __call__(self, x):
            return self.said(x)

    assert rewrite(Outer(Said()), {Said: lambda x: (2 * x, "said", None)})(ZERO)[1] == "said"
    with pytest.raises(ShapeMismatch, match=r"said \(Said\) gives 'other'.*'said'"):
        rewrite(Outer(Said()), {Said: lambda x: (2 * x, "other", None)})(ZERO)


def test_a_failure_within_a_replacement_says_where_it_was():
    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError) as caught:
        rewrite(LIST, {Block: broken})(ids())
    assert caught.value.__notes__ == ["This happened in the replacement of blocks.0 (Block)."]


# ---- scenario 11: values that are used elsewhere


def test_s11_a_replaced_value_is_seen_by_all_that_read_it():
    def function(x):
        y = jax.nn.gelu(x)
        return x + y, jnp.square(y).sum()

    x = jnp.linspace(-1, 1, 4)
    same(rewrite(function, {"//gelu": jnp.sin})(x), (x + jnp.sin(x), jnp.square(jnp.sin(x)).sum()))


def inside(x):
    h = jnp.sin(x)
    return h * x


def test_s11_a_value_from_inside_that_is_read_elsewhere_is_still_computed():
    def function(x):
        h = jnp.sin(x)
        return h * x + h

    x = jnp.linspace(-1, 1, 4)
    for wrap in (lambda f: f, jax.jit, jax.checkpoint, jax.vmap):
        new = rewrite(wrap(function), {inside: jnp.cos})
        same(new(x), jnp.cos(x) + jnp.sin(x))
        same(jax.grad(lambda x, new=new: new(x).sum())(x), jnp.cos(x) - jnp.sin(x))
    scanned = lambda x: jax.lax.scan(lambda c, x: (c + function(x), function(x)), 0.0, x)
    same(rewrite(scanned, {inside: jnp.cos})(x)[1], jnp.cos(x) + jnp.sin(x))


# ---- scenario 12: one call of several


class Thrice(eqx.Module):
    block: Block

    def __call__(self, x):
        return self.block(self.block(self.block(x)))


cached = eqx.filter_jit(lambda block, x: block(x))


class Cached(eqx.Module):
    block: Block

    def __call__(self, x):
        return cached(self.block, cached(self.block, cached(self.block, x)))


@pytest.mark.parametrize("kind", [Thrice, Cached])
def test_s12_one_call_of_three_is_replaced_and_tree_at_replaces_all(kind):
    old, new = Block(key=KEY), Block(24, key=jax.random.key(9))
    model, x = kind(old), states()
    model(x)  # what is jitted has been traced
    expression = trace(model)(x)
    found = expression.query("//Block")
    assert found.count == 3 and found.paths == ("block",)
    same(rewrite(model, {"(//Block)[2]": new})(x), old(new(old(x))))
    same(rewrite(model, {"(//Block)[3]//gelu": silu})(x), with_gelu(silu, old, old(old(x))))
    same(eqx.tree_at(found.where, model, [new])(x), new(new(new(x))))


def test_s12_one_call_of_a_jitted_function_whose_jaxpr_is_shared():
    inner = jax.jit(lambda x: jax.nn.gelu(x) + 1)
    x = jnp.linspace(-1, 1, 4)
    first, second = trace(lambda x: inner(inner(x)))(x).query("//gelu").nodes
    assert first.chain[-1] == second.chain[-1] and first.chain != second.chain
    same(rewrite(lambda x: inner(inner(x)), {"(//gelu)[2]": jnp.cos})(x), jnp.cos(jax.nn.gelu(x) + 1) + 1)


@small
def test_s12_a_call_under_an_inner_vmap_is_refused_with_the_way_to_tree_at(name):
    with pytest.raises(ExpressionError, match=r"blocks.*\(Feed\) runs under jax.vmap.*eqx.tree_at"):
        rewrite(MODELS[name], {"//Feed": lambda x: x})(ids())


@layouts
def test_s12_one_layer_norm_of_roberta(stacked):
    model = ours.make(MaskedLM, "roberta", stacked)
    scaled = lambda x: 2 * x
    at = "blocks" if stacked else "blocks.1"
    new = rewrite(model, {f"//*[@path='backbone.stack.{at}.mlp_norm']": scaled})(ours.tokens())
    where = lambda m: m.backbone.stack.blocks.mlp_norm if stacked else m.backbone.stack.blocks[1].mlp_norm
    same(new, eqx.tree_at(where, model, Doubled())(ours.tokens()))


class Doubled(eqx.Module):
    def __call__(self, x):
        return 2 * x


def test_a_named_function_that_a_vmap_maps_is_replaced_where_the_axis_does_not_matter():
    x = states()
    same(rewrite(jax.vmap(silu), {silu: jnp.sin})(x), jnp.sin(x))
    with pytest.raises(ExpressionError, match=r"log_softmax runs under jax.vmap.*which axis"):
        rewrite(jax.vmap(jax.nn.log_softmax), {jax.nn.log_softmax: jnp.sin})(x)

    class Inner(eqx.Module):
        def __call__(self, x):
            return jax.nn.log_softmax(silu(x))

    class Outer(eqx.Module):
        inner: Inner

        def __call__(self, x):
            return jax.vmap(self.inner)(x)

    same(rewrite(Outer(Inner()), {silu: jnp.sin})(x), jax.nn.log_softmax(jnp.sin(x)))
    with pytest.raises(ExpressionError, match=r"log_softmax runs under jax.vmap"):
        rewrite(Outer(Inner()), {jax.nn.log_softmax: jnp.sin})(x)


# ---- Rewritten


class Scaled(eqx.Module):
    """A replacement that is trained."""

    scale: Float[jax.Array, ""]

    def __call__(self, x: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        return self.scale * jnp.tanh(x)


@pytest.mark.parametrize("name", ["list", "remat"])
def test_rewritten_is_trained_with_its_replacements_and_traced_once(name):
    model = Rewritten(MODELS[name], {"//gelu": Scaled(jnp.asarray(0.7, jnp.float32))})
    same(model(ids()), with_gelu(lambda x: 0.7 * jnp.tanh(x), MODELS[name], ids()))
    optimiser = optax.adam(1e-2)
    traced = Counter()

    @eqx.filter_jit
    def step(model, state, x):
        traced["step"] += 1
        target = jax.nn.one_hot(jnp.roll(x, 1), 11)
        loss = lambda m: -(jax.nn.log_softmax(m(x)) * target).sum(-1).mean()
        value, grads = eqx.filter_value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state, losses, before = optimiser.init(eqx.filter(model, eqx.is_inexact_array)), [], model
    for _ in range(20):
        model, state, value = step(model, state, ids())
        losses.append(float(value))
    assert traced["step"] == 1 and losses[-1] < 0.6 * losses[0]
    assert float(model.replacements[0].scale) != pytest.approx(0.7)
    assert float(before.replacements[0].scale) == pytest.approx(0.7)


def test_rewritten_is_serialised_and_its_rules_are_static():
    model = Rewritten(LIST, {"//gelu": Scaled(jnp.asarray(0.7, jnp.float32)), jax.nn.softmax: jax.nn.softmax})
    blank = jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, model)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    np.testing.assert_array_equal(eqx.tree_deserialise_leaves(file, blank)(ids()), model(ids()))
    assert model.keys == ("//gelu", jax.nn.softmax)
    arrays = lambda tree: len(jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    assert arrays(model) == arrays(LIST) + 1
    with pytest.raises(NoMatch):
        Rewritten(LIST, {"//swish": silu})(ids())
    same(Rewritten(LIST, {"//swish": silu}, allow_empty=True)(ids()), LIST(ids()))


@pytest.mark.parametrize("name", ["list", "remat"])
def test_rewritten_of_a_rewritten_has_all_modules_and_both_rules(name):
    inner = Rewritten(MODELS[name], {"//gelu": silu})
    paths = [n.path for n in trace(inner)(ids()).nodes() if n.kind == "module"]
    plain = [n.path for n in trace(MODELS[name])(ids()).nodes() if n.kind == "module"]
    assert paths == ["", "model", *(f"model.{path}" for path in plain[1:])]
    outer = Rewritten(inner, {"//silu": jnp.tanh})
    same(outer(ids()), with_gelu(jnp.tanh, MODELS[name], ids()))
    same(jax.jit(lambda x: Rewritten(outer, {"//tanh": jnp.sin})(x))(ids()), with_gelu(jnp.sin, MODELS[name], ids()))


def test_a_rewritten_in_a_rewritten_is_asked_by_path():
    inner = Rewritten(LIST, {"//*[@path='blocks.0']//gelu": silu})
    wide = Block(24, key=jax.random.key(3))
    new = Rewritten(inner, {"//*[@path='model.blocks.1']": wide})
    written = eqx.tree_at(lambda m: m.blocks[1], LIST, wide)
    same(new(ids()), rewrite(written, {"//*[@path='blocks.0']//gelu": silu})(ids()))


def test_what_a_vmap_around_a_rewritten_maps_keeps_its_examples_first():
    class Outer(eqx.Module):
        inner: eqx.Module

        def __call__(self, x):
            return jax.vmap(self.inner, in_axes=1, out_axes=1)(x)

    model, x = Outer(Rewritten(Fed(Feed(key=KEY), join), {"//gelu": silu})), states().reshape(1, 5, 8)
    expression = trace(model)(x[0].T)
    (node,) = [n for n in expression.nodes() if n.tag == "Feed"]
    assert node.outputs[0].shape == (8,) and node.equation.outvars[-1].aval.shape == (5, 8)
    same(expression(model, x[0].T), model(x[0].T), rtol=0, atol=0)


def test_methods_and_functions_are_rewritten_too():
    class Two(eqx.Module):
        feed: Feed

        def encode(self, x):
            return jax.nn.gelu(self.feed(x))

    two, x = Two(Feed(key=KEY)), states()[0]
    same(rewrite(two.encode, {"//gelu": jnp.sin})(x), with_gelu(jnp.sin, two.encode, x))
    of_model = lambda model, x: jax.nn.gelu(model.feed(x))
    same(rewrite(of_model, {"//Feed//gelu": jnp.sin})(two, x), jax.nn.gelu(with_gelu(jnp.sin, two.feed, x)))


# ---- what YAX's `sub` is tested for


class Mlp(eqx.Module):
    """relu between two layers, and the identity behind them."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Identity

    def __init__(self, *, key):
        a, b = jax.random.split(key)
        self.first, self.second = eqx.nn.Linear(DIM, HIDDEN, key=a), eqx.nn.Linear(HIDDEN, DIM, key=b)
        self.last = eqx.nn.Identity()

    def __call__(self, x):
        return self.last(self.second(jax.nn.relu(self.first(x))))


MLP = Mlp(key=KEY)


def test_yax_relu_by_gelu_is_a_model_written_with_gelu():
    x = states()[0]
    wanted = MLP.second(jax.nn.gelu(MLP.first(x)))
    same(rewrite(MLP, {"//relu": jax.nn.gelu})(x), wanted)
    same(rewrite(MLP, {jax.nn.relu: jax.nn.gelu})(x), wanted)


def test_yax_an_equation_is_replaced_by_one():
    x = states()[0]
    same(rewrite(lambda x: jnp.sin(x) + x, {"//sin": jnp.cos})(x), jnp.cos(x) + x)
    seen = []

    def product(a, b):
        seen.append((a.shape, b.shape))
        return a @ b

    same(rewrite(MLP, {"//Linear//dot_general": product})(x), MLP(x))
    assert seen == [((HIDDEN, DIM), (DIM,)), ((DIM, HIDDEN), (HIDDEN,))]


def test_yax_an_identity_becomes_a_layer_with_parameters_of_its_own():
    x, dense = states()[0], eqx.nn.Linear(DIM, DIM, key=jax.random.key(5))
    model = Rewritten(MLP, {"//Identity": lambda x, *, key=None: x})
    same(model(x), MLP(x))
    grown = Rewritten(MLP, {eqx.nn.Identity: dense})
    same(grown(x), dense(MLP(x)))
    gradient = eqx.filter_grad(lambda m: jnp.square(m(x)).sum())(grown)
    assert np.abs(gradient.replacements[0].weight).max() > 0 and np.abs(gradient.model.first.weight).max() > 0


def test_yax_shapes_and_dtypes_are_checked_and_nothing_is_changed_in_place():
    x = states()[0]
    for wrong in (lambda x: x[:2], lambda x: x.astype(jnp.bfloat16), lambda x: (x, x)):
        with pytest.raises(ShapeMismatch):
            rewrite(MLP, {"//relu": wrong})(x)
    expression = trace(MLP)(x)
    before = str(expression)
    rewrite(MLP, {"//relu": jax.nn.gelu})(x)
    assert str(expression) == before and np.array_equal(expression(MLP, x), MLP(x))


def test_yax_one_replacement_serves_several_nodes_and_another_batch_size():
    model = lambda x: MLP(MLP(x))
    new = rewrite(model, {"//relu": jnp.sin})
    one = lambda x: MLP.second(jnp.sin(MLP.first(x)))
    same(new(states()[0]), one(one(states()[0])))
    same(jax.vmap(new)(states(7)), jax.vmap(lambda x: one(one(x)))(states(7)))


def test_yax_a_sibling_method_of_the_same_module_is_a_node_of_its_own():
    class Tied(eqx.Module):
        weight: Float[jax.Array, "vocab dim"]

        def __call__(self, i):
            return self.weight[i]

        def attend(self, x):
            return self.weight @ x

    class Outer(eqx.Module):
        tied: Tied

        def __call__(self, i):
            return self.tied.attend(self.tied(i))

    model = Outer(Tied(states(11)))
    new = rewrite(model, {"//Tied[@method='attend']": lambda x: jnp.resize(x, (11,))})(3)
    same(new, jnp.resize(model.tied.weight[3], (11,)))


def test_what_a_stacked_model_is_rewritten_to_is_the_stack_of_the_rewritten_blocks():
    model = ours.make(MaskedLM, "roberta")
    rules = {"//*[@name='attention_norm']": lambda x: x * 0.5}
    same(rewrite(stack(model), rules)(ours.tokens()), rewrite(model, rules)(ours.tokens()))
