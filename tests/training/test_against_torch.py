"""Fine-tuning step for step beside torch: the same weights, texts, batches and AdamW, without dropout."""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers

import converters
from converters.demo import source
from eqx_transformers import SequenceClassifier, nn
from eqx_transformers.training.objectives import classification_loss
from eqx_transformers.training.optimizers import adamw
from eqx_transformers.training.schedules import warmup_linear
from eqx_transformers.training.updater import Updater, compiled

from ..full import FULL
from ..reference import make
from ..tiny import Row

TEXTS = Path(__file__).parents[1] / "data" / "movie_snippets" / "train.tsv"
STEPS = 50  # of the schedule; how many are made differs


def batches(rows, length):
    """Texts and labels in the order of the file, padded, by MiniLM's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    lines = [line.split("\t") for line in TEXTS.read_text(encoding="utf-8").splitlines()[1:]]
    for i in range(STEPS):
        taken = lines[i * rows : (i + 1) * rows]
        encoded = tokenizer.encode_batch([text for _, _, text in taken])
        yield {
            "token_ids": np.array([e.ids for e in encoded], np.int32),
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int32),
            "labels": np.array([int(label) for label, _, _ in taken], np.int32),
            "weights": np.ones(rows, np.float32),
        }


def torch_losses(model, given, rate):
    """With decay on all but biases and norms, as transformers' trainer has it."""
    free = lambda name: name.endswith("bias") or "LayerNorm" in name
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if free(name)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not free(name)], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    losses = []
    for batch in given:
        ids, mask, labels = (torch.from_numpy(batch[n]).long() for n in ("token_ids", "attention_mask", "labels"))
        loss = model(ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return np.array(losses)


def our_losses(model, given, rate):
    updater = Updater(classification_loss, adamw(warmup_linear(rate, STEPS), weight_decay=0.1), clip_norm=1.0)
    state, step, losses = updater.init(model, key=jax.random.key(0)), compiled(updater), []
    for batch in given:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def expect_close(ours, theirs):
    difference = np.abs(ours - theirs)
    assert difference[:10].max() <= 1e-5, difference[:10]
    assert difference.max() <= 1e-3, difference
    assert len({*np.round(theirs, 4)}) > len(theirs) // 2  # something is learned


def test_a_tiny_roberta_is_trained_as_torch_trains_it(tmp_path):
    """50 steps; its 61 tokens are the tokenizer's modulo 58."""
    row = Row("roberta", SequenceClassifier)
    reference = make(row)
    reference.save_pretrained(tmp_path)
    model = eqx.nn.inference_mode(converters.load(tmp_path)[0])
    given = list(batches(8, 27))
    for batch in given:
        real = batch["attention_mask"] == 1
        batch["token_ids"] = np.where(real, batch["token_ids"] % 58 + 3, 1).astype(np.int32)
    expect_close(our_losses(model, given, 1e-3), torch_losses(reference, given, 1e-3))


@pytest.fixture
def optimized():
    """As users compile: these matrices are large."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_minilm_is_trained_as_torch_trains_it(tmp_path, optimized):
    """Its real weights, and a fresh classifier."""
    torch.manual_seed(0)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(
        source(), num_labels=2, dtype=torch.float32
    ).eval()
    reference.save_pretrained(tmp_path)
    model = nn.stack(eqx.nn.inference_mode(converters.load(tmp_path)[0]))
    given = list(batches(8, 24))[: STEPS if FULL else 10]
    expect_close(our_losses(model, given, 5e-5), torch_losses(reference, given, 5e-5))
