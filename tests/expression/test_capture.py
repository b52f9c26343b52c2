"""What is brought out of a call, set in it, or taken out of it: against the same done by hand, step by step."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import GPT2, T5, Encoder, select, stack
from eqx_transformers.expression import ExpressionError, NoMatch, ShapeMismatch, ablate, capture, patch
from eqx_transformers.nn import Attention, Mask, kernels

from ..full import FULL
from ..models import test_t5 as t5
from ..models.ours import LENGTH, call, make, tokens

NEAR = {"rtol": 0, "atol": 2e-5}
run = lambda f, *args: eqx.filter_jit(f)(*args)  # compiled, which takes a tenth of the time
IDS = jnp.asarray(tokens())
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])


@functools.cache
def encoder(stacked=False):
    return make(Encoder, "roberta", stacked)


@functools.cache
def decoder(stacked=False):
    return make(GPT2, "gpt2", stacked)


def by_hand(model):
    """The embeddings, and the output of each block; of RoBERTa and GPT-2."""
    return _by_hand(isinstance(model, Encoder))


@functools.cache
def _by_hand(is_encoder):
    def steps(model):
        x = model.embedding(IDS) if is_encoder else model.embedding(IDS, jnp.arange(LENGTH))
        out = [x]
        for block in model.stack.blocks:
            out.append(block(out[-1], Mask() if is_encoder else Mask(causal=True)))
        return out

    return run(steps, encoder() if is_encoder else decoder())


def activations(acts, name):
    """Of all blocks, with a leading axis, whatever the layout."""
    if f"stack.blocks.{name}".rstrip(".") in acts:
        return acts[f"stack.blocks.{name}".rstrip(".")]
    return jnp.stack([acts[f"stack.blocks.{i}.{name}".rstrip(".")] for i in range(2)])


MODELS = {"roberta": encoder, "gpt2": decoder}
every = pytest.mark.parametrize("name", MODELS)
# Both models in both layouts; one layout of each says nearly as much.
TURNS = [("roberta", True), ("gpt2", False)] + ([("roberta", False), ("gpt2", True)] if FULL else [])
in_turn = pytest.mark.parametrize(("name", "stacked"), TURNS)


@layouts
@every
def test_s15_what_is_captured_is_what_each_step_gives(name, stacked):
    model = MODELS[name](stacked)
    cls = type(encoder().stack.blocks[0] if name == "roberta" else decoder().stack.blocks[0])
    out, acts = run(lambda m: capture(m, cls)(IDS), model)
    np.testing.assert_allclose(out, call(model, IDS), **NEAR)
    np.testing.assert_allclose(activations(acts, ""), np.stack(by_hand(model)[1:]), **NEAR)
    assert set(acts) == ({"stack.blocks"} if stacked else {"stack.blocks.0", "stack.blocks.1"})
    assert len(run(lambda m: capture(m, f"//{cls.__name__}")(IDS), model)[1]) == (1 if stacked else 2)


@layouts
def test_a_selection_and_an_xpath_choose_modules_and_functions_in_fields(stacked):
    model = encoder(stacked)
    where = "stack.blocks.mlp.activation" if stacked else "stack.blocks.*.mlp.activation"
    _, ours = run(lambda m: capture(m, select(under=where))(IDS), model)
    _, theirs = run(lambda m: capture(m, "//MLP/gelu")(IDS), model)
    assert ours.keys() == theirs.keys() and len(ours) == (1 if stacked else 2)
    found, flat = activations(ours, "mlp.activation"), encoder()

    def inside(block, x):
        return block.mlp.activation(block.mlp.up_proj(block.attention_norm(x + block.attention(x))))

    expected = [run(inside, block, x) for x, block in zip(by_hand(model)[:-1], flat.stack.blocks, strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), **NEAR)


@layouts
def test_captures_go_through_jit_vmap_grad_and_remat(stacked):
    model = encoder(stacked)
    batch = jnp.stack([IDS, tokens(1), tokens(2)])
    one = lambda m, ids: capture(m, "//MLP")(ids)
    alone = [run(one, model, ids) for ids in batch]
    out, acts = eqx.filter_jit(lambda m, ids: jax.vmap(lambda ids: one(m, ids))(ids))(model, batch)
    for path, x in acts.items():
        np.testing.assert_allclose(x, np.stack([a[path] for _, a in alone]), **NEAR)
    np.testing.assert_allclose(out, np.stack([y for y, _ in alone]), **NEAR)
    remat = eqx.tree_at(lambda m: m.stack.remat, model, True)
    for path, x in run(one, remat, IDS)[1].items():
        np.testing.assert_allclose(x, alone[0][1][path], **NEAR)

    def cost(m, ids):
        return sum(jnp.sin(x).sum() for x in one(m, ids)[1].values())

    def literal(m, ids):
        found = 0.0
        x = m.embedding(ids)
        for block in m.stack.blocks:
            inside = block.attention_norm(x + block.attention(x))
            found, x = found + jnp.sin(block.mlp(inside)).sum(), block(x, Mask())
        return found

    ours = run(eqx.filter_grad(cost), remat, IDS)
    theirs = run(eqx.filter_grad(literal), encoder(), IDS)
    theirs = stack(theirs) if stacked else theirs
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_vmap_inside_of_the_model_gives_an_axis_in_front():
    model = encoder()
    batch = jnp.stack([IDS, tokens(1)])
    out, acts = run(capture(lambda m, ids: jax.vmap(m)(ids), "//EncoderBlock"), model, batch)
    assert out.shape[0] == 2
    for path, x in acts.items():
        alone = run(lambda m: capture(m, "//EncoderBlock")(batch[1]), model)[1]
        np.testing.assert_allclose(x[1], alone[path], **NEAR)


def test_a_module_that_is_called_again_has_numbers_behind_its_path():
    norm = encoder().embedding.norm
    x = jnp.ones((3, norm.weight.shape[0])) * jnp.arange(3.0)[:, None]
    _, acts = capture(lambda m, x: m(m(2 * x) + 1), "//LayerNorm")(norm, x)
    assert list(acts) == ["", "@1"]
    np.testing.assert_array_equal(acts["@1"], norm(norm(2 * x) + 1))


@layouts
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_both_halves_of_t5(name, stacked):
    model, ids, target = t5.make(T5, name, stacked), t5.tokens(), t5.tokens(1, t5.TARGET)
    out, acts = run(lambda m: capture(m, "//T5Half")(ids, target), model)
    np.testing.assert_allclose(out, t5.call(model, ids, target), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(acts["encoder"], run(lambda m: m.encode(ids).states, model), **NEAR)
    np.testing.assert_allclose(model.scores(acts["decoder"]), out, rtol=1e-5, atol=1e-4)


# ---- attention


@in_turn
def test_probabilities_are_the_softmax_of_the_scores(name, stacked):
    model, flat = MODELS[name](stacked), MODELS[name]()
    out, acts = run(lambda m: capture(m, Attention, probabilities=True)(IDS), model)
    np.testing.assert_allclose(out, call(model, IDS), **NEAR)
    found = activations(acts, "attention.attend")
    assert found.shape == (2, 3, LENGTH, LENGTH)
    for weights, x, block in zip(found, by_hand(model)[:-1], flat.stack.blocks, strict=True):
        m = block.attention
        x = x if name == "roberta" else block.attention_norm(x)
        q, k = (getattr(m, f"{part}_proj")(x).reshape(LENGTH, 3, -1) for part in ("query", "key"))
        scores = np.einsum("shd,thd->hst", np.float64(q), np.float64(k)) * q.shape[-1] ** -0.5
        scores = scores if name == "roberta" else np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
        expected = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(weights, expected / expected.sum(-1, keepdims=True), **NEAR)
    mask = Mask(keys=jnp.arange(LENGTH) < 5)
    q = jax.random.normal(jax.random.key(0), (2, LENGTH, 3, 4))
    both = kernels.probabilities(q, q, mask, scale=0.5)
    np.testing.assert_allclose(both[1], kernels.probabilities(q[1], q[1], mask, scale=0.5), rtol=1e-6)
    assert both.shape == (2, 3, LENGTH, LENGTH) and not both[..., 5:].any()


@in_turn
@pytest.mark.parametrize("mean", [False, True], ids=["zero", "mean"])
def test_heads_that_are_ablated_give_nothing_to_the_output_projection(name, stacked, mean):
    model, flat = MODELS[name](stacked), MODELS[name]()
    found = run(lambda m: ablate(m, {"stack.blocks.1.attention": [0, 2]}, mean=mean)(IDS), model)

    def attend(*args, **kwargs):
        out = kernels.attend(*args, **kwargs)
        for head in (0, 2):
            out = out.at[:, head].set(out[:, head].mean(0) if mean else 0.0)
        return out

    edited = eqx.tree_at(lambda m: m.stack.blocks[1].attention.attend, flat, attend)
    np.testing.assert_allclose(found, call(edited, IDS), **NEAR)
    assert np.abs(found - call(model, IDS)).max() > 1e-2
    everywhere = run(lambda m: ablate(m, {"//Attention": 1}, mean=mean)(IDS), model)
    assert np.abs(everywhere - found).max() > 1e-2


# ---- patches


@in_turn
def test_a_patched_activation_is_what_follows_goes_on_with(name, stacked):
    model, flat, other = MODELS[name](stacked), MODELS[name](), tokens(5)
    path = "stack.blocks.0.mlp"
    _, acts = run(lambda m: capture(m, "//MLP")(other), model)
    given = activations(acts, "mlp")[0]
    edited = eqx.tree_at(lambda m: m.stack.blocks[0].mlp, flat, Given(given))
    found = run(lambda m, given: patch(m, {path: given})(IDS), model, given)
    np.testing.assert_allclose(found, call(edited, IDS), **NEAR)
    assert np.abs(found - call(model, IDS)).max() > 1e-2
    own = flat.stack.blocks[0].mlp
    doubled = eqx.tree_at(lambda m: m.stack.blocks[0].mlp, flat, lambda x, *, key=None: 2 * own(x))
    found = run(lambda m: patch(m, {path: lambda y: 2 * y})(IDS), model)
    np.testing.assert_allclose(found, call(doubled, IDS), **NEAR)
    slopes = run(jax.grad(lambda value, m: jnp.sin(patch(m, {path: value})(IDS)).sum()), given, model)
    put = lambda value: eqx.tree_at(lambda m: m.stack.blocks[0].mlp.value, edited, value)
    wanted = run(jax.grad(lambda value: jnp.sin(put(value)(IDS)).sum()), given)
    np.testing.assert_allclose(slopes, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted).max() > 1e-3


class Given(eqx.Module):
    """Gives what it was given."""

    value: jax.Array

    def __call__(self, x, *, key=None):
        return self.value


@in_turn
def test_what_was_captured_and_is_set_again_changes_nothing(name, stacked):
    model = MODELS[name](stacked)
    expected, acts = run(lambda m: capture(m, "//MLP")(IDS), model)
    put = lambda acts: run(lambda m, acts: patch(m, acts)(IDS), model, acts)
    np.testing.assert_allclose(put(acts), expected, **NEAR)
    nothing = put({path: jnp.zeros_like(x) for path, x in acts.items()})
    np.testing.assert_allclose(nothing, run(lambda m: patch(m, {"//MLP": jnp.zeros_like})(IDS), model), **NEAR)
    assert np.abs(nothing - expected).max() > 1e-2


# ---- what cannot be


def looped(m, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, m(s[1])), (0, x))[1]


NORM = encoder().embedding.norm
X = jnp.ones((2, NORM.weight.shape[0]))
WRONG = {
    "nothing": (lambda: capture(encoder(), "//MPL")(IDS), NoMatch, "MLP"),
    "no path": (lambda: patch(encoder(), {"stack.blocks.7.mlp": 0})(IDS), NoMatch, "stack.blocks"),
    "no layer": (lambda: patch(encoder(True), {"stack.blocks.7.mlp": 0})(IDS), NoMatch, "layer 7, but 2 are stacked"),
    "in a loop": (lambda: capture(looped, "//LayerNorm")(NORM, X), ExpressionError, "lies within a while"),
    "a shape": (
        lambda: patch(encoder(), {"stack.blocks.0.mlp": jnp.ones(3)})(IDS),
        ShapeMismatch,
        r"stack.blocks.0.mlp gives f32\[13,21\], but was set to f32\[3\]",
    ),
    "a structure": (
        lambda: patch(encoder(), {"stack.blocks.0.mlp": lambda y: (y, y)})(IDS),
        ShapeMismatch,
        "stack.blocks.0.mlp gives .* but was set to",
    ),
    "twice": (
        lambda: patch(encoder(), {"stack.blocks.0.mlp": lambda y: y, "//MLP": lambda y: y})(IDS),
        ExpressionError,
        "stack.blocks.0.mlp is set twice",
    ),
    "no heads": (lambda: ablate(encoder(), {"stack.blocks.0.mlp": 0})(IDS), ExpressionError, "heads are those"),
    "no such head": (
        lambda: ablate(encoder(), {"stack.blocks.0.attention": 3})(IDS),
        ValueError,
        "has 3 heads, from 0 on: there is no head 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_clear_error(case):
    wrong, kind, said = WRONG[case]
    with pytest.raises(kind, match=said):
        run(wrong)
