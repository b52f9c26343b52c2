"""golden/t5_vae_flax: the T5-VAE of 2021, from its own directories, and its ancestor in torch, number by number."""

import functools
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import converters
from converters.checkpoint import Checkpoint
from converters.convert import settled
from converters.filling import Form, filled
from converters.plan import Request
from eqx_transformers import T5VAE, generate
from eqx_transformers.latents import interpolate
from eqx_transformers.models.t5_parts import Memory
from eqx_transformers.nn import Mask
from eqx_transformers.tensor_file import NAMES, Spec
from eqx_transformers.training import cross_entropy
from eqx_transformers.training.regularisers import logistic_weight, mmd_to_prior, reconstruction_loss

from .folder import FORWARD, GRADIENT, SUMS, arrays, by_path, cases, close, config, folder, present, weights

HERE = folder("t5_vae_flax")
TORCH = HERE / "torch_t5_vae"
MARGIN = 1e-4  # between the two best tokens: closer ones may change places


@functools.cache
def model_of(name="checkpoint", **facts):
    return converters.load(HERE / name, override=facts or None)[0]


def of(case):
    """The model of a case, which may have another number of codes."""
    return model_of(latent_tokens=int(case["n_latent_tokens"])) if "n_latent_tokens" in case else model_of()


def masks(case):
    return {name: case[name] for name in ("attention_mask", "decoder_attention_mask") if name in case}


@eqx.filter_jit
def called(model, ids, decoder_ids, masks):
    return jax.vmap(lambda ids, decoder_ids, masks: model(ids, decoder_ids, **masks))(ids, decoder_ids, masks)


def given(case):
    return case["input_ids"], case["decoder_input_ids"], masks(case)


@pytest.mark.parametrize("path", cases(HERE, "logits", "latent_codes", "input_ids"))
def test_golden_t5_vae_codes_states_and_logits(path):
    """Padding attended where no mask is given, a decoder's mask, fewer tokens than codes, all of them, all but one."""
    case = arrays(path)
    found = called(of(case), *given(case))
    close(found.latents, case["latent_codes"], FORWARD)
    close(found.logits, case["logits"], FORWARD)
    if "remade_encoder_states" in case:
        close(found.reconstructed_states, case["remade_encoder_states"], FORWARD)
    if "encoder_last_hidden_state" in case:
        close(found.states, case["encoder_last_hidden_state"], FORWARD)
    if "recon_mse" in case:
        close(reconstruction_loss(found.states, found.reconstructed_states), case["recon_mse"], FORWARD)


def walked(half, x, mask, memory=None):
    """The embedding, every block's states but the last's, and those behind the norm, as the original counts them."""
    bias, found = half.bias(len(x), len(x)), [x]
    for block in half.stack.blocks:
        found.append(block(found[-1], mask, bias, memory))
    return jnp.stack([*found[:-1], half.norm(found[-1])])


def attention(module, x, looked_at, mask, bias=None):
    """The weights that a module gives to what it looks at."""
    split = lambda y: y.reshape(len(y), module.num_heads, -1)
    scores = jnp.einsum("shd,thd->hst", split(module.query_proj(x)), split(module.key_proj(looked_at)))
    scores = scores if bias is None else scores + bias
    allowed = mask.allowed(len(x), len(looked_at))
    return jax.nn.softmax(scores if allowed is None else jnp.where(allowed[None], scores, -jnp.inf), axis=-1)


@eqx.filter_jit
def parts(model, ids, decoder_ids, attention_mask, decoder_mask):
    """Every part of one text, on its own."""
    t5, seen = model.t5, Mask(keys=attention_mask == 1)
    x, y = t5.embedding(ids), t5.embedding(decoder_ids)
    states = walked(t5.encoder, x, seen)
    memory = model.remembered(model.encode(ids, attention_mask=attention_mask))
    so_far = Mask(causal=True, keys=decoder_mask == 1)
    decoded = walked(t5.decoder, y, so_far, memory)
    first, own = t5.encoder.stack.blocks[0], t5.decoder.stack.blocks[0]
    last = t5.decoder.stack.blocks[-1]
    before = decoded[-2]  # what the last block is given
    bias = t5.decoder.bias(len(y), len(y))
    inside = before + last.attention(last.attention_norm(before), so_far, bias=bias)
    normed, y0 = first.attention_norm(x), own.attention_norm(y)
    return {
        "encoder_hidden_states": states,
        "decoder_hidden_states": decoded,
        "decoder_last_hidden_state": decoded[-1],
        "encoder_attention_layer0": attention(first.attention, normed, normed, seen, t5.encoder.bias(len(x), len(x))),
        "decoder_self_attention_layer0": attention(own.attention, y0, y0, so_far, bias),
        "cross_attention_last": attention(
            last.cross_attention, last.cross_attention_norm(inside), memory.states, Mask()
        ),
    }


@pytest.mark.parametrize("path", cases(HERE, "encoder_hidden_states", "cross_attention_last"))
def test_golden_t5_vae_part_by_part(path):
    case, row_first = arrays(path), 1
    for row in range(len(case["input_ids"])):
        one = [case[name][row] for name in ("input_ids", "decoder_input_ids", *masks(case))]
        seen = one[2] == 1
        for name, x in parts(of(case), *one).items():
            wanted = case[name][:, row] if name.endswith("hidden_states") else case[name][row]
            if name == "decoder_self_attention_layer0":  # a query that sees nothing is another question
                wanted, x = wanted[:, row_first:], x[:, row_first:]
            if name == "encoder_attention_layer0":
                wanted, x = wanted[..., seen], x[..., seen]
            close(x, wanted, FORWARD)


def losses(model, case):
    """Every loss of a case, as its names say."""
    found = called(model, *given(case))
    labels, weight = case["labels"], case["reg_weight"]
    real = labels != model.config.padding_id
    total = cross_entropy(found.logits, labels, real) * real.sum()
    flat = mmd_to_prior(found.latents, noise=case["noise_flat"])
    tokens = mmd_to_prior(found.latents, noise=case["noise_tokens"], per_token=True)
    return {
        "ce_sum": total,
        "ce_mean_nonpad": total / real.sum(),
        "ce_mean_all_positions": total / real.size,
        "mmd_flat": flat,
        "mmd_tokens": tokens,
        "mmd_tokens_div_samples": tokens / len(case["noise_tokens"]),
        "total": total + weight * flat,
    }


@pytest.mark.parametrize("path", cases(HERE, "labels", "mmd_flat", "total"))
def test_golden_t5_vae_losses(path):
    case = arrays(path)
    for name, x in eqx.filter_jit(losses)(model_of(), case).items():
        close(x, case[name], SUMS if name in ("ce_sum", "total") else FORWARD)


def read(tensors):
    """The arrays of a dictionary by the original's names, where a model has its own."""
    named = {name: np.ascontiguousarray(x.T) if name.endswith("/kernel") else x for name, x in tensors.items()}
    specs = {name: Spec(x.shape, NAMES[x.dtype], 0, x.nbytes) for name, x in named.items()}
    held = Checkpoint(None, config(HERE / "checkpoint"), specs, arrays=named, container="flax")
    return filled(settled(held, Request()), held, Form(), None)


@pytest.mark.parametrize("path", present(HERE, sorted(HERE.glob("grads_*.npz"))))
def test_golden_t5_vae_gradients(path):
    case = jax.tree.map(jnp.asarray, arrays(HERE / "train_case.npz"))
    name = path.stem.removeprefix("grads_")
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model: losses(model, case)[name]))(model_of())
    ours, theirs = by_path(gradient), by_path(read(arrays(path)))
    assert theirs.keys() == ours.keys()
    for path, x in theirs.items():
        close(ours[path], x, GRADIENT * np.abs(x).max() + 1e-7)


def expect_tokens(found, wanted, margin):
    """Token for token, up to the first step whose two best tokens are too close to tell."""
    assert found.shape == wanted.shape
    for ours, theirs, apart in zip(found, wanted, margin, strict=True):
        close_call = np.append(apart < MARGIN, True).argmax()
        np.testing.assert_array_equal(ours[:close_call], theirs[:close_call])
    assert (margin >= MARGIN).mean() > 0.98


@pytest.mark.parametrize("path", cases(HERE, "greedy_tokens"))
def test_golden_t5_vae_generation(path):
    case, model = arrays(path), model_of()
    new = case["greedy_tokens"].shape[1] - 1
    found = generate(model, case["input_ids"], attention_mask=case["attention_mask"], max_new_tokens=new)
    expect_tokens(np.asarray(found), case["greedy_tokens"][:, 1:], case["greedy_margin"])
    decoded = jax.vmap(model.decode)(case["latent_codes"], case["greedy_tokens"][:, :-1])
    close(decoded, case["greedy_last_pass_logits"], FORWARD)


@pytest.mark.parametrize("path", cases(HERE, "interp_tokens", "prior_logits"))
def test_golden_t5_vae_interpolation_and_prior(path):
    case, model = arrays(path), model_of()
    first, second = jnp.asarray(case["latent_codes"][:2])
    between = interpolate(first, second, len(case["ratios"]))
    close(between, case["interp_latents"], 1e-6)
    new = case["interp_tokens"].shape[1] - 1
    found = generate(model, memory=between, max_new_tokens=new)
    expect_tokens(np.asarray(found), case["interp_tokens"][:, 1:], case["interp_margin"])
    decode = eqx.filter_jit(lambda model, latents, ids: jax.vmap(model.decode)(latents, ids))
    close(decode(model, between, case["interp_tokens"][:, :-1]), case["interp_last_pass_logits"], FORWARD)
    close(decode(model, case["prior_latents"], case["prior_decoder_input_ids"]), case["prior_logits"], FORWARD)


@pytest.mark.parametrize("path", present(HERE, sorted(HERE.glob("*/flax_model.msgpack"))))
def test_golden_t5_vae_loads_from_its_directory_strictly(path, tmp_path):
    for name in (path, HERE / "checkpoint" / "config.json"):  # the second one has none of its own
        shutil.copy(name, tmp_path)
    model, origin = converters.load(tmp_path)
    assert type(model) is T5VAE and converters.inspect(tmp_path).ok
    assert not (origin.ignored or origin.dropped)
    half = path.parent.name.endswith("bf16")
    assert {str(x.dtype) for x in by_path(model).values()} == {"bfloat16" if half else "float32"}
    whole = by_path(model_of())
    assert all(np.array_equal(x, np.asarray(whole[name].astype(x.dtype))) for name, x in by_path(model).items())


# ---- the ancestor


@functools.cache
def ancestor(file="weights"):
    place = TORCH
    given = weights(place, file) if file == "weights" else arrays(place / f"{file}.npz")
    return converters.from_arrays("t5-vae-torch", given, json.loads((place / "config.json").read_bytes()))[0]


def test_golden_torch_t5_vae_is_read_from_its_directory_as_from_its_arrays(tmp_path):
    """The directory as its trainer wrote it: the golden one has the same tensors in safetensors."""
    shutil.copy(TORCH / "config.json", tmp_path)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in weights(TORCH, "weights").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model, origin = converters.load(tmp_path)
    assert origin.family == "t5-vae-torch" and converters.inspect(tmp_path).ok
    assert eqx.tree_equal(model, ancestor())
    with pytest.raises(converters.ConversionError, match="no 't5_vae_torch'"):
        converters.export(model, tmp_path / "out", origin)


def torch_losses(model, case):
    found = called(model, case["input_ids"], case["decoder_input_ids"], {})
    real = case["labels"] != model.config.padding_id
    entropy = cross_entropy(found.logits, case["labels"], real) * real.sum()
    regular = mmd_to_prior(found.latents, noise=case["noise"])
    rebuilt = reconstruction_loss(found.states, found.reconstructed_states)
    without = entropy + case["reg_weight"] * regular
    said = {"reg_loss": regular, "recon_loss": rebuilt, "total_without_recon": without}
    return said | {"total_with_recon": without + rebuilt}, found


@pytest.mark.parametrize("path", present(TORCH, [TORCH / "case.npz"]))
def test_golden_torch_t5_vae(path):
    """Its padding is hidden without a mask; one flat code; a sub-layer of T5's on the way back."""
    case, model = arrays(path), ancestor()
    said, found = eqx.filter_jit(torch_losses)(model, case)
    close(found.latents[:, 0], case["latent"], FORWARD)
    close(found.states, case["encoder_last_hidden_state"], FORWARD)
    close(found.reconstructed_states, case["recon_encoding"], FORWARD)
    close(found.logits, case["logits"], FORWARD)
    for name, x in said.items():
        close(x, case[name], SUMS if name.startswith("total") else FORWARD)
    close(logistic_weight(jnp.asarray(case["schedule_steps"])), case["schedule_weights"], 1e-6)


@pytest.mark.parametrize("path", present(TORCH, [TORCH / "case.npz"]))
def test_golden_torch_t5_vae_greedy(path):
    case, model = arrays(path), ancestor()
    new = len(case["greedy_tokens_row0"])
    found = np.asarray(generate(model, memory=case["latent"][:1, None], max_new_tokens=new, end_ids=1))[0]
    ends = np.append(np.flatnonzero(found == 1), new - 1)[0]
    np.testing.assert_array_equal(found[: ends + 1], case["greedy_tokens_row0"][: ends + 1])
    ids = np.append(model.start_id, case["greedy_tokens_row0"][:-1])[None]
    close(jax.vmap(model.decode)(case["latent"][:1, None], ids), case["greedy_logits_row0"], FORWARD)


@pytest.mark.parametrize("path", present(TORCH, [TORCH / "grads_total_with_recon.npz"]))
def test_golden_torch_t5_vae_gradients(path):
    case = jax.tree.map(jnp.asarray, arrays(TORCH / "case.npz"))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda model: torch_losses(model, case)[0]["total_with_recon"]))
    ours, theirs = by_path(gradient(ancestor())), by_path(ancestor(path.stem))
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        close(ours[name], x, GRADIENT * np.abs(x).max() + 1e-7)


def test_a_memory_is_what_the_decoder_looks_at():
    """Of a T5-VAE, codes; of the T5 inside, states: the same tokens follow."""
    model = model_of()
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, model.config.latent_dim)).astype(np.float32))
    memory = jax.vmap(model.remembered)(latents)
    assert isinstance(memory, Memory)
    again = generate(model.t5, memory=memory, max_new_tokens=5)
    np.testing.assert_array_equal(generate(model, memory=latents, max_new_tokens=5), again)
