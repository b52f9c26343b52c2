"""The table of docs/training.md: every option of the original systems has a row, and what it names here exists."""

import contextlib
import dataclasses
import importlib
import io
import re

import pytest

import eqx_transformers

from ..examples import ROOT

RECIPES = ("classify", "t5_vae", "language_model", "masked_lm", "embed")
# What the originals have, read off their programs: a line each.
ORIGINALS = {
    "T5-VAE in Flax: the config": """
        t5_model_name_or_path
        t5
        n_latent_tokens
        latent_token_size
        vae_encoder_model
        vae_decoder_model
        block_size
        decoder_start_token_id
        cache_dir
        tie_word_embeddings
        vocab_size
        d_model
        d_kv
        d_ff
        num_layers
        num_decoder_layers
        num_heads
        relative_attention_num_buckets
        dropout_rate
        layer_norm_epsilon
        initializer_factor
        feed_forward_proj
        is_encoder_decoder
        use_cache
        pad_token_id
        eos_token_id
        gradient_checkpointing
    """,
    "T5-VAE in torch: the command line": """
        --project_name
        --reg_schedule_k
        --reg_schedule_b
        --reg_constant_weight
        --use_recon_loss
        --model_path
        --t5_model_name
        --model_type
        --config_name
        --tokenizer_name
        --cache_dir
        --ae_latent_size
        --set_seq_size
        --train_data_file
        --overwrite_cache
        --output_dir
        --overwrite_output_dir
        --do_train
        --do_eval
        --do_predict
        --evaluate_during_training
        --per_device_train_batch_size
        --per_device_eval_batch_size
        --per_gpu_train_batch_size
        --per_gpu_eval_batch_size
        --gradient_accumulation_steps
        --learning_rate
        --weight_decay
        --adam_epsilon
        --max_grad_norm
        --num_train_epochs
        --max_steps
        --warmup_steps
        --logging_dir
        --logging_first_step
        --logging_steps
        --save_steps
        --save_total_limit
        --no_cuda
        --seed
        --fp16
        --fp16_opt_level
        --local_rank
        --tpu_num_cores
        --tpu_metrics_debug
        --debug
        --dataloader_drop_last
        --eval_steps
        --past_index
    """,
    "RoBERTa in Haiku: the config and its constants": """
        pretrained
        max_length
        embed_dropout_rate
        fully_connected_drop_rate
        attention_drop_rate
        hidden_size
        intermediate_size
        n_heads
        n_layers
        mask_id
        weight_stddev
        n_classes
        classifier_drop_rate
        learning_rate
        max_grad_norm
        l2
        n_epochs
        batch_size
        warm-up 10 %
        evaluation every 1000 steps
        evaluation batch 25
        100 examples an evaluation
        log every 100 steps
        shuffle buffer 10 batches
        shuffle seed 0
    """,
    "Haiku's tutorial: its names": """
        batch_size
        sequence_length
        vocab_size
        d_model
        num_heads
        num_layers
        dropout_rate
        key_size
        widening_factor
        grad_clip_value
        learning_rate
        b1
        b2
        MAX_STEPS
        rng seed 428
    """,
    "Haiku's example of March 2021: its flags": """
        --batch_size
        --sequence_length
        --d_model
        --num_heads
        --num_layers
        --dropout_rate
        --learning_rate
        --grad_clip_value
        --checkpoint_dir
        LOG_EVERY
        MAX_STEPS
        checkpoint every 10,000 steps
        shuffle buffer 10 batches
    """,
    "Haiku's example of today: its constants": """
        --dataset_path
        BATCH_SIZE
        SEQUENCE_LENGTH
        LEARNING_RATE
        GRAD_CLIP_VALUE
        LOG_EVERY
        MAX_STEPS
        SEED
        NUM_LAYERS
        NUM_HEADS
        MODEL_SIZE
        KEY_SIZE
        DROPOUT_RATE
        attn_size
        pad_token
        crops of SEQUENCE_LENGTH + 1
        shuffle buffer 10 batches
    """,
    "The functional transformer: its flags, its environment, its config": """
        -help
        -lr
        -beta1
        -beta2
        -seq-len
        -batch-size
        -epochs
        -batches
        -heads
        -dmodel
        -dk
        -dff
        -layers
        -save
        without -save
        -sgd
        -log-compiles
        -flip-pe
        -1bit
        -0grad
        -0grad-head
        JAX_PLATFORM_NAME
        JAX_LOG_COMPILES
        XLA_FLAGS --xla_dump_to
        LOGLEVEL
        d_model
        d_ff
        d_k
        heads
        lambda_e
        lambda_pe
        tau
        max_len
        sample every 25 epochs
        sample prompt Au
        sample of 20 + epoch characters
    """,
}


def rows():
    """{system: {its option: what is said of it}}, of the page."""
    page = (ROOT / "docs/training.md").read_text().partition("## Options of the original systems\n")[2]
    parts = re.split(r"^### ", page, flags=re.MULTILINE)[1:]
    row = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.MULTILINE)
    return {part.partition("\n")[0]: row.findall(part) for part in parts}


@pytest.mark.parametrize("system", ORIGINALS)
def test_every_option_of_the_originals_has_one_row(system):
    expected = [line.strip() for line in ORIGINALS[system].strip().splitlines()]
    assert [name for name, _ in rows()[system]] == expected
    assert len(expected) == len(set(expected))


def test_there_is_no_other_system_and_every_missing_option_has_its_reason():
    assert list(rows()) == list(ORIGINALS)
    for said in (said for system in rows().values() for _, said in system):
        assert not said.startswith("none") or len(said.partition(":")[2]) > 10 or "in Python" in said, said


def options_of(recipe):
    """All that `--help` lists."""
    module, said = importlib.import_module(f"eqx_transformers.training.recipes.{recipe}"), io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert not ended.value.code
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", said.getvalue(), re.MULTILINE))


def named():
    """(recipe, option) of all that the table names."""
    spans = [span for system in rows().values() for _, said in system for span in re.findall(r"`([^`]+)`", said)]
    found = [span.split()[:2] for span in spans if span.split()[0] in RECIPES and " " in span]
    return {(recipe, option) for recipe, option in found}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_table_names_is_an_option_of_the_recipe(recipe):
    wanted = {option for one, option in named() if one == recipe}
    assert wanted <= options_of(recipe)
    assert {"--out", "--learning-rate", "--mesh", "--no-progress"} <= options_of(recipe)
    assert wanted or recipe == "embed"  # which no original has


def test_what_the_table_names_is_a_fact_of_the_config():
    page = " ".join(said for system in rows().values() for _, said in system)
    facts = re.findall(r"`(\w+Config)\.(\w+)`", page)
    assert len(facts) > 15
    for config, fact in facts:
        known = {one.name for one in dataclasses.fields(getattr(eqx_transformers, config))}
        assert fact in known, f"{config}.{fact}"
