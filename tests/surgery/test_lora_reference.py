"""One adapted layer beside PEFT's: outputs and gradients of every number, within 1e-6 of the largest."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from eqx_transformers import nn
from eqx_transformers.surgery._lowrank import LowRank
from eqx_transformers.surgery.ia3 import IA3
from eqx_transformers.surgery.lora import LoRA
from eqx_transformers.surgery.merging import merge

from .test_lora import close

KEPT = np.random.default_rng(2).random((3, 7)) < 0.7
RATE = 0.3


class Kept(torch.nn.Module):
    """Dropout that keeps what ours does."""

    def forward(self, x):
        return x * torch.tensor(KEPT, dtype=x.dtype) / (1 - RATE)


class KeptHere(eqx.Module):
    """The same, in the place of `eqx.nn.Dropout`."""

    p: float = RATE
    inference: bool = False

    def __call__(self, x, *, key, inference=None):
        return jnp.where(KEPT, x, 0) / (1 - RATE)


def reference(base, **options):
    """The layer as PEFT adapts it, every number of the adapter by chance."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layer": base})
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], init_lora_weights=False, **options)
    layer = peft.inject_adapter_in_model(config, model)["layer"]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(True)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return layer.train()


def ours(layer, base, scale):
    """The same numbers."""
    own = {name: jnp.array(x.detach().numpy().copy()) for name, x in layer.named_parameters()}
    take = lambda part: next((x for name, x in own.items() if part in name and not name.startswith("base")), None)
    a, b = (take("lora_A"), take("lora_B.default.weight")) if take("lora_A") is not None else (None, None)
    a, b = (take("lora_embedding_A"), take("lora_embedding_B")) if a is None else (a, b)
    adapter = LowRank(a, b, scale, b_bias=take("lora_B.default.bias"), magnitude=take("magnitude"))
    return LoRA(eqx.tree_at(lambda n: n.weight, base, own["base_layer.weight"]), [adapter])


def gradients(layer):
    """Of PEFT's parameters, in the order of ours."""
    order = ["base_layer.weight", "base_layer.bias", "_A", "lora_B.default.weight", "embedding_B", "B.default.bias"]
    named = dict(layer.named_parameters())
    return [named[n].grad.numpy() for part in [*order, "magnitude"] for n in named if part in n]


def compared(node, x, layer, given, key=None):
    """Both outputs, and gradients of both in one order, of sum(sin(y))."""
    learned = lambda n: (n.base, n.adapters[0].a, n.adapters[0].b, n.adapters[0].b_bias, n.adapters[0].magnitude)
    loss = lambda parts: jnp.sin(call(eqx.tree_at(learned, node, parts, is_leaf=lambda x: x is None), x, key)).sum()
    theirs = layer(given)
    torch.sin(theirs).sum().backward()
    assert close(call(node, x, key), theirs.detach().numpy(), 1e-6)
    found = jax.tree.leaves(jax.grad(loss)(learned(node)))
    wanted = gradients(layer)
    assert len(found) == len(wanted)
    assert all(close(f, w, 1e-6) for f, w in zip(found, wanted, strict=True))


def call(node, x, key):
    return node(x) if key is None else node(x, key=key)


OPTIONS = {
    "lora": ({}, 5 / 3),
    "rslora": ({"use_rslora": True}, 5 / 3**0.5),
    "dora": ({"use_dora": True}, 5 / 3),
    "dora-rslora": ({"use_dora": True, "use_rslora": True}, 5 / 3**0.5),
}


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("name", [*OPTIONS, "bias"])
def test_a_linear_layer(name, dropout):
    options, scale = OPTIONS.get(name, ({"lora_bias": True}, 5 / 3))
    layer = reference(torch.nn.Linear(7, 5), **options, lora_dropout=RATE if dropout else 0.0)
    node = ours(layer, nn.Linear(7, 5, key=jax.random.key(0)), scale)
    node = eqx.tree_at(lambda n: n.base.bias, node, jnp.array(layer.base_layer.bias.detach().numpy().copy()))
    if dropout:
        layer.lora_dropout["default"] = Kept()
        node = eqx.tree_at(lambda n: n.adapters[0].dropout, node, KeptHere())
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    compared(node, jnp.asarray(x), layer, torch.tensor(x), jax.random.key(0) if dropout else None)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding(name, padding):
    options, scale = OPTIONS[name]
    layer = reference(torch.nn.Embedding(11, 7, padding_idx=padding), **options)
    node = ours(layer, nn.Embedding(11, 7, padding_id=padding, key=jax.random.key(0)), scale)
    ids = np.array([[3, 10, 2], [3, 0, 2]])
    compared(node, jnp.asarray(ids, jnp.int32), layer, torch.tensor(ids))


@pytest.mark.parametrize("name", [*OPTIONS, "bias"])
def test_what_is_merged(name):
    options, scale = OPTIONS.get(name, ({"lora_bias": True}, 5 / 3))
    layer = reference(torch.nn.Linear(7, 5), **options)
    node = ours(layer, nn.Linear(7, 5, key=jax.random.key(0)), scale)
    node = eqx.tree_at(lambda n: n.base.bias, node, jnp.array(layer.base_layer.bias.detach().numpy().copy()))
    layer.merge()
    assert close(merge(node).weight, layer.base_layer.weight.detach().numpy(), 1e-6)
    assert close(merge(node).bias, layer.base_layer.bias.detach().numpy(), 1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_taken_out_of_the_weight(init):
    base = torch.nn.Linear(7, 5)
    plain = eqx.tree_at(
        lambda n: n.weight, nn.Linear(7, 5, key=jax.random.key(0)), jnp.array(base.weight.detach().numpy().copy())
    )
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], init_lora_weights=init)
    layer = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": base}))["layer"]
    node = LoRA.adapter(3, 5.0, init=init)(plain, key=jax.random.key(0))
    assert np.allclose(node.base.weight, layer.base_layer.weight.detach().numpy(), atol=1e-6)
    for name, factor in (("lora_A", node.adapters[0].a), ("lora_B", node.adapters[0].b)):
        theirs = getattr(layer, name)["default"].weight.detach().numpy()
        assert np.allclose(np.abs(factor), np.abs(theirs), atol=1e-5)  # a pair of vectors has either sign


@pytest.mark.parametrize("on", ["output", "input"])
def test_ia3(on):
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if on == "input" else [], init_ia3_weights=False
    )
    torch.manual_seed(0)
    layer = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": torch.nn.Linear(7, 5)}))["layer"]
    base = nn.Linear(7, 5, key=jax.random.key(0))
    numbers = lambda x: jnp.array(x.detach().numpy().copy())
    base = eqx.tree_at(lambda n: (n.weight, n.bias), base, tuple(map(numbers, (layer.weight, layer.bias))))
    node = IA3(base, numbers(layer.ia3_l["default"].flatten()), on)
    x = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)
    theirs = layer(torch.tensor(x))
    torch.sin(theirs).sum().backward()
    assert close(node(jnp.asarray(x)), theirs.detach().numpy(), 1e-6)
    gradient = jax.grad(lambda s: jnp.sin(eqx.tree_at(lambda n: n.scale, node, s)(jnp.asarray(x))).sum())(node.scale)
    assert close(gradient, layer.ia3_l["default"].grad.numpy().reshape(-1), 1e-6)
    layer.merge()
    assert close(merge(node).weight, layer.base_layer.weight.detach().numpy(), 1e-6)
    assert close(merge(node).bias, layer.base_layer.bias.detach().numpy(), 1e-6)
