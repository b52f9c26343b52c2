"""The tree of a call, and how it is printed: as text, XML, JSON and a page."""

import gc
import json
import re
import sys
from math import prod
from xml.etree.ElementTree import fromstring

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_transformers import T5, CausalLM, MaskedLM
from eqx_transformers.expression import NoMatch, trace

from ..examples import ROOT, run_examples
from ..models.ours import make
from ..models.test_t5 import make as make_t5
from .small import KEY, MODEL, MODELS, Feed, expect_bits, ids

IDS = ids()
TOKENS = jnp.arange(3, 8)

SMALL = """\
Small (i32[5]) -> f32[5,11]
  embed : Embedding [vmap=1 num_embeddings=11 embedding_size=8] (i32[]) -> f32[8]
  blocks.0 : Block (f32[5,8]) -> f32[5,8]
    blocks.0.attention_norm : LayerNorm [vmap=1 shape=(8,) eps=1e-05 use_weight=True use_bias=True] (f32[8]) -> f32[8]
    blocks.0.attention : MultiheadAttention [num_heads=2 …] (f32[5,8], f32[5,8], f32[5,8], bool[5,5]) -> f32[5,8]
      blocks.0.attention.query_proj : Linear [vmap=1 in_features=8 out_features=8 use_bias=False] (f32[8]) -> f32[8]
      blocks.0.attention.key_proj : Linear [vmap=1 in_features=8 out_features=8 use_bias=False] (f32[8]) -> f32[8]
      blocks.0.attention.value_proj : Linear [vmap=1 in_features=8 out_features=8 use_bias=False] (f32[8]) -> f32[8]
      softmax [vmap=1 recognised axis=-1] (f32[2,5,5]) -> f32[2,5,5]
      blocks.0.attention.dropout : Dropout [vmap=1 p=0.0 inference=False] (f32[5,5]) -> f32[5,5]
      blocks.0.attention.output_proj : Linear [vmap=1 in_features=8 out_features=8 use_bias=False] (f32[8]) -> f32[8]
    blocks.0.feed_norm : LayerNorm [vmap=1 shape=(8,) eps=1e-05 use_weight=True use_bias=True] (f32[8]) -> f32[8]
    blocks.0.feed : Feed [vmap=1] (f32[8]) -> f32[8]
      blocks.0.feed.up : Linear [in_features=8 out_features=16 use_bias=True] (f32[8]) -> f32[16]
      gelu [recognised approximate=True] (f32[5,16]) -> f32[5,16]
      blocks.0.feed.down : Linear [in_features=16 out_features=8 use_bias=True] (f32[16]) -> f32[8]
  blocks.1 : as blocks.0
  norm : LayerNorm [vmap=1 shape=(8,) eps=1e-05 use_weight=True use_bias=True] (f32[8]) -> f32[8]
  head : Linear [vmap=1 in_features=8 out_features=11 use_bias=False] (f32[8]) -> f32[11]"""

# (path, class, what one example of the call is given and gives), by hand
BLOCK = [
    ("", "Block", "f32[5,8]", "f32[5,8]"),
    (".attention_norm", "LayerNorm", "f32[8]", "f32[8]"),
    (".attention", "MultiheadAttention", "f32[5,8], f32[5,8], f32[5,8], bool[5,5]", "f32[5,8]"),
    (".attention.query_proj", "Linear", "f32[8]", "f32[8]"),
    (".attention.key_proj", "Linear", "f32[8]", "f32[8]"),
    (".attention.value_proj", "Linear", "f32[8]", "f32[8]"),
    (".attention.dropout", "Dropout", "f32[5,5]", "f32[5,5]"),
    (".attention.output_proj", "Linear", "f32[8]", "f32[8]"),
    (".feed_norm", "LayerNorm", "f32[8]", "f32[8]"),
    (".feed", "Feed", "f32[8]", "f32[8]"),
    (".feed.up", "Linear", "f32[8]", "f32[16]"),
    (".feed.down", "Linear", "f32[16]", "f32[8]"),
]
MODULES = [
    ("", "Small", "i32[5]", "f32[5,11]"),
    ("embed", "Embedding", "i32[]", "f32[8]"),
    *[(f"blocks.{i}{path}", *rest) for i in (0, 1) for path, *rest in BLOCK],
    ("norm", "LayerNorm", "f32[8]", "f32[8]"),
    ("head", "Linear", "f32[8]", "f32[11]"),
]
EXPRESSION = trace(MODEL)(IDS)


def elements(expression, dialect=None):
    """All elements of its XML below the root."""
    return list(fromstring(expression.to_xml(dialect)).iter())[1:]


def test_s01_all_28_modules_are_nodes_with_their_paths_classes_and_shapes():
    keys = ("path", "type", "in", "out")
    found = [tuple(x.get(key) for key in keys) for x in elements(EXPRESSION) if x.get("kind") == "module"]
    assert found == MODULES and len(found) == 28
    functions = [x.tag for x in elements(EXPRESSION) if x.get("recognised") == "true"]
    assert functions == ["softmax", "gelu", "softmax", "gelu"]


def test_s01_printing_a_model_is_reading_it():
    assert str(EXPRESSION) == SMALL
    assert repr(EXPRESSION) == f"<Expression of {len(list(EXPRESSION.nodes()))} nodes; print it>"


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("head, family", [(MaskedLM, "roberta"), (CausalLM, "gpt2"), (CausalLM, "llama")])
def test_s01_a_model_of_two_layers_fits_a_screen(head, family, stacked):
    rows = str(trace(make(head, family, stacked))(TOKENS)).splitlines()
    assert len(rows) <= 40 and max(map(len, rows)) <= 120
    assert not any(word in row for row in rows for word in ("_where", "cumsum", "<lambda>", "custom_vmap"))
    assert sum("mlp : " in row for row in rows) == 1  # the second block is as the first


def test_s01_both_halves_of_a_t5_are_shown():
    text = str(trace(make_t5(T5, "t5"))(TOKENS, TOKENS))
    assert "encoder.stack.blocks.1 : as encoder.stack.blocks.0\n" in text
    assert "decoder.stack.blocks.1 … decoder.stack.blocks.2 : as decoder.stack.blocks.0\n" in text
    assert "decoder.stack.blocks.0.cross_attention.attend : attend" in text
    assert text.count("\n") < 65


@pytest.mark.parametrize("name", MODELS)
def test_s01_shapes_alone_give_the_same_tree_and_allocate_nothing(name):
    expression = trace(MODELS[name])(IDS)
    skeleton = eqx.filter_eval_shape(lambda model: model, MODELS[name])
    gc.collect()
    before = len(jax.live_arrays())
    other = trace(skeleton)(jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    assert len(jax.live_arrays()) == before
    assert other.to_xml() == expression.to_xml() and str(other) == str(expression)


# ---- what show can leave out, and bring in


def test_depth_ends_the_lines_of_what_is_left_out():
    assert EXPRESSION.show(depth=1) == "Small (i32[5]) -> f32[5,11] …"
    rows = EXPRESSION.show(depth=2).splitlines()
    assert rows[2:4] == ["  blocks.0 : Block (f32[5,8]) -> f32[5,8] …", "  blocks.1 : as blocks.0"] and len(rows) == 6
    assert EXPRESSION.show(depth=9) == SMALL


@pytest.mark.parametrize("width", [1, 20, 60, 80, 1000])
def test_no_line_is_wider_than_asked(width):
    rows = EXPRESSION.show(width=width, equations=True).splitlines()
    assert max(map(len, rows)) <= width and len(rows) > len(list(EXPRESSION.nodes())) / 2
    if width == 1000:
        assert not any("…" in row for row in rows)


def test_alike_blocks_unfold():
    rows = EXPRESSION.show(fold=False).splitlines()
    folded = SMALL.splitlines()
    assert rows[2:16] == folded[2:16] and len(rows) == 2 * 14 + 4
    assert rows[16:30] == [row.replace("blocks.0", "blocks.1") for row in folded[2:16]]


class Chain(eqx.Module):
    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(eqx.Module):
    inner: eqx.nn.Linear

    def __call__(self, x):
        return self.inner(self.inner(self.inner(x)))


def linear(size=8, out=8, **options):
    return eqx.nn.Linear(size, out, key=KEY, **options)


def test_only_what_does_not_differ_is_folded():
    model = Chain([linear(), linear(), linear(use_bias=False), linear(8, 4), linear(4, 8), linear(8, 8), linear()])
    rows = str(trace(model)(jnp.ones(8))).splitlines()
    assert [row.split(" [")[0].strip() for row in rows[1:]] == [
        "layers.0 : Linear",
        "layers.1 : as layers.0",
        "layers.2 : Linear",
        "layers.3 : Linear",
        "layers.4 : Linear",
        "layers.5 : Linear",
        "layers.6 : as layers.5",
    ]


def test_one_module_called_again_says_so():
    rows = str(trace(Twice(linear()))(jnp.ones(8))).splitlines()
    assert [row.split(" [")[0] for row in rows[1:]] == ["  inner : Linear", "  inner : 2 more"]


def test_under_a_path_or_a_query_is_shown_with_its_inside():
    block = EXPRESSION.show(under="blocks.1.feed").splitlines()
    assert [row.strip() for row in block] == [
        row.strip().replace("blocks.0", "blocks.1") for row in SMALL.splitlines()[12:16]
    ]
    assert EXPRESSION.show(under="//Feed", depth=1).splitlines() == [
        f"blocks.{i}.feed : Feed [vmap=1] (f32[8]) -> f32[8] …" for i in (0, 1)
    ]
    assert EXPRESSION.show(under=Feed) == EXPRESSION.show(under="//Feed")
    whole = trace(make(MaskedLM, "roberta"))(TOKENS).show(under="backbone.stack.blocks.0.attention.attend")
    assert whole.splitlines()[1].startswith("  <lambda> (")  # of a function too
    with pytest.raises(NoMatch, match=r"nearest paths: blocks\.0\.feed"):
        EXPRESSION.show(under="blocks.0.fed")


def test_equations_are_all_there_is():
    rows = EXPRESSION.show(equations=True, fold=False, width=1000).splitlines()
    assert len(rows) == len(list(EXPRESSION.nodes()))
    assert "        tanh (f32[5,16]) -> f32[5,16]" in rows


def test_helpers_of_jax_are_shown_when_asked_for():
    hidden, shown = (trace(make(MaskedLM, "roberta"))(TOKENS).show(functions=x) for x in (False, True))
    assert "    cumsum (" not in hidden and "    cumsum (" in shown
    assert set(hidden.splitlines()) < set(shown.splitlines())


@jax.jit
def swish(x):
    return x * jax.nn.sigmoid(x)


def test_functions_of_ones_own_and_of_jax_nn_are_shown_once_and_what_is_in_them_is_not():
    text = str(trace(lambda layer, x: swish(jax.nn.relu(jnp.clip(layer(x), 0, 1))))(linear(), jnp.ones(8)))
    assert [row.split(" ")[0] for row in text.splitlines()] == ["Linear", "relu", "swish"]


def test_a_loop_is_shown_around_the_calls_in_it_and_says_its_turns():
    rows = str(trace(MODELS["remat"])(IDS)).splitlines()
    place = rows.index("  scan [length=2]")
    assert rows[place + 2] == "      blocks : Block [stack=2] (f32[5,8]) -> f32[5,8]"
    assert rows[place + 1].strip() in ("remat2", "checkpoint")
    cell = eqx.nn.GRUCell(3, 4, key=KEY)
    run = lambda cell, xs: jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(4), xs)[0]
    text = str(trace(run)(cell, jnp.ones((13, 3))))
    assert text.splitlines()[0] == "scan [length=13]" and "  GRUCell [" in text and "stack" not in text


def test_what_a_derivative_adds_is_marked():
    text = str(trace(lambda feed, x: jax.grad(lambda x: feed(x).sum())(x))(MODEL.blocks[0].feed, jnp.ones(8)))
    assert text.splitlines()[0] == "Feed [jvp] (f32[8]) -> f32[8]"
    assert "  gelu [recognised jvp approximate=True] (f32[16]) -> f32[16]" in text
    assert "Feed [transpose] (f32[8]) -> f32[8]" in text


def test_a_call_without_modules_is_counted():
    assert str(trace(jnp.add)(jnp.ones(3), jnp.ones(3))) == "no call of a module; equations: 1"


# ---- XML and JSON


@pytest.mark.parametrize("dialect", [None, "yax"])
def test_the_xml_has_an_element_for_every_node(dialect):
    nodes = list(EXPRESSION.nodes())
    assert len(elements(EXPRESSION, dialect)) == len(nodes)
    first = elements(EXPRESSION, dialect)[0]
    assert first.tag == ("Small" if dialect is None else "module_call")
    assert first.get("class") == "tests.expression.small.Small" and first.get("method") == "__call__"


def test_what_a_node_was_told_is_its_attributes():
    by_path = {x.get("path"): x.attrib for x in elements(trace(MODELS["stacked"])(IDS)) if x.get("path")}
    assert by_path["blocks.feed.up"] == {
        "kind": "module",
        "path": "blocks.feed.up",
        "name": "up",
        "type": "Linear",
        "class": f"{eqx.nn.Linear.__module__}.Linear",
        "method": "__call__",
        "in": "f32[8]",
        "out": "f32[16]",
        "stack": "2",
        "in_features": "8",
        "out_features": "16",
        "use_bias": "true",
    }
    assert by_path["embed"]["vmap"] == "1" and by_path["norm"]["shape"] == "(8,)"


class Odd(eqx.Module):
    """Settings that XML has no characters, or other uses, for."""

    kind: str = eqx.field(static=True, default="<&\"'\x00\ud800\n>")
    path: str = eqx.field(static=True, default="there")
    limit: float = float("inf")
    sizes: tuple = eqx.field(static=True, default=(1, True, "a"))
    missing: None = None
    dtype: np.dtype = eqx.field(static=True, default=np.dtype("float16"))

    def __call__(self, x, **options):
        return jax.jit(lambda x: x + 1)(x)


def test_any_setting_can_be_written_as_xml_and_json():
    expression = trace(Odd())(jnp.ones(3), **{"a b": 1})
    first, *rest = elements(expression)
    assert first.get("kind") == "module" and first.get("path") == "" and first.get("config.path") == "there"
    assert first.get("config.kind") == "<&\"'\\u0000\\ud800\n>"
    assert first.get("limit") == "inf" and first.get("sizes") == "(1, True, 'a')" and first.get("dtype") == "float16"
    assert "missing" not in first.attrib
    assert rest[0].tag == "_lambda_" and rest[0].get("name") == "<lambda>"
    told = json.loads(expression.to_json())["children"][0]
    assert told["attributes"]["sizes"] == [1, True, "a"] and told["children"][0]["tag"] == "<lambda>"


def test_json_and_xml_are_one_tree():
    def same(described, element):
        assert (described["tag"], len(described.get("children", ()))) == (element.tag, len(element))
        text = {k: str(v).lower() if isinstance(v, bool) else v for k, v in described["attributes"].items()}
        text = {k: str(tuple(v)) if isinstance(v, list) else str(v) for k, v in text.items()}
        assert {k for k in text if "(" not in text[k]} <= {k for k, v in element.attrib.items() if v == text[k]}
        for child, inner in zip(described.get("children", ()), element, strict=True):
            same(child, inner)

    same(json.loads(EXPRESSION.to_json()), fromstring(EXPRESSION.to_xml()))
    assert json.loads(EXPRESSION.to_json(indent=2)) == json.loads(EXPRESSION.to_json())


# ---- the page


def words(page):
    """What a reader of the page sees, without what only its scripts know."""
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", "", page)


def test_the_page_stands_alone_and_has_every_call_and_its_parameters(tmp_path):
    page = EXPRESSION.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!DOCTYPE html>") and page.count("</html>") == 1
    assert not re.search(r"https?://|<link|@import|\bsrc=", page)
    text = words(page)
    for path, kind, *_ in MODULES[1:]:
        assert f"{path} : {kind}" in text
    count = lambda tree: sum(prod(x.shape) for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x))
    assert f"-&gt; f32[5,11] {count(MODEL):,} parameters" in text
    assert f"blocks.1.feed : Feed [vmap=1] (f32[8]) -&gt; f32[8] {count(MODEL.blocks[1].feed):,} parameters" in text
    assert "dot_general" not in text and "dot_general" in words(EXPRESSION.to_html(equations=True))


def test_the_page_of_stacked_blocks_counts_all_layers():
    text = words(trace(MODELS["stacked"])(IDS).to_html())
    size = sum(x.size for x in jax.tree.leaves(MODELS["stacked"].blocks) if eqx.is_array(x))
    assert f"blocks : Block [stack=2] (f32[5,8]) -&gt; f32[5,8] {size:,} parameters" in text


def test_names_are_escaped_in_the_page():
    page = trace(Odd())(jnp.ones(3)).to_html(equations=True)
    assert "&lt;lambda&gt;" in page and "<lambda>" not in page


def test_the_examples_of_the_docs_run_in_order(capsys):
    _, names = run_examples("docs/expression.md")
    rows = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs/expression.md").read_text()
    printed = re.search(r"```\n(MaskedLM.*?)```", page, re.DOTALL).group(1).splitlines()
    assert all(row in rows for row in printed if row.strip() != "…")
    expect_bits(names["logits"], names["model"](names["token_ids"]))
    assert names["found"].count == len(names["same"]) == 4 and names["attentions"] == names["same"]
    assert [node.path for node in names["wide"]] == ["", "head", "backbone.embedding.tokens"]


@pytest.mark.parametrize(
    "package, use", [("elementpath", lambda e: e.query("//Feed")), ("treescope", lambda e: e.to_html())]
)
def test_a_missing_extra_is_named(monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'eqx_transformers\[expression\]'"):
        use(EXPRESSION)
    assert str(EXPRESSION) == SMALL and EXPRESSION.to_xml()  # which need neither
