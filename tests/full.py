"""Whether the long proofs run with their stated counts (`make test-full`), or with small ones."""

import os
import zlib

FULL = os.environ.get("EQX_TRANSFORMERS_FULL") == "1"

# Of these tables `make test` takes every n-th row, `make test-full` all: rows of one table say much the same, and
# another table begins with another row. Whole names of the tests, without the package.
EVERY = {
    "conversion.test_across_heads.test_the_encoder_is_read_and_only_a_strange_head_is_drawn": 3,
    "conversion.test_across_heads.test_what_is_drawn_is_verified_too": 2,
    "conversion.test_config_audit.test_an_old_spelling_is_the_same_model": 2,
    "conversion.test_config_audit.test_what_is_irrelevant_changes_no_output_of_the_reference": 2,
    "conversion.test_facts.test_every_fact_perturbed_changes_it_alone_or_is_refused": 2,
    "conversion.test_flax.test_every_family_and_head": 2,
    "conversion.test_laws.test_a_model_made_from_scratch_is_exported_and_comes_back": 2,
    "conversion.test_laws.test_any_one_key_deleted_is_reported_exactly": 2,
    "conversion.test_laws.test_any_one_key_resized_is_reported_exactly": 2,
    "conversion.test_laws.test_every_part_is_the_reference_and_every_tensor_the_file": 2,
    "conversion.test_laws.test_export_is_bitwise_the_file_and_the_reference_loads_it_clean": 2,
    "conversion.test_laws.test_forward_is_the_reference": 2,
    "conversion.test_round_trip.test_what_is_read_is_written": 2,
    "conversion.test_t5_stand_ins.test_it_is_the_reference_is_verified_and_goes_back_bit_for_bit": 2,
    "expression.test_capture.test_a_patched_activation_is_what_follows_goes_on_with": 2,
    "expression.test_capture.test_both_halves_of_t5": 2,
    "expression.test_capture.test_captures_go_through_jit_vmap_grad_and_remat": 2,
    "expression.test_capture.test_s15_what_is_captured_is_what_each_step_gives": 2,
    "expression.test_evaluate.test_s02_control_structures_derivatives_caches_and_keys": 2,
    "expression.test_evaluate.test_s02_s03_an_expression_gives_the_direct_calls_bits": 2,
    "expression.test_evaluate.test_s02_s03_it_is_the_same_under_jit_and_its_gradients_too": 2,
    "expression.test_evaluate.test_s02_s03_it_is_the_same_under_vmap_and_a_vmap_of_gradients": 3,
    "expression.test_query.test_s04_queries_of_models_that_are_used": 2,
    "expression.test_rewrite.test_rewritten_of_a_rewritten_has_all_modules_and_both_rules": 2,
    "expression.test_rewrite.test_s06_gelu_is_silu_everywhere_at_other_lengths_mapped_and_compiled": 3,
    "expression.test_rewrite.test_s06_in_gpt2_and_t5": 2,
    "expression.test_rewrite.test_s06_in_roberta_it_is_what_tree_at_makes_outputs_gradients_and_program": 2,
    "expression.test_rewrite.test_s09_a_rule_that_finds_nothing_is_an_error_unless_it_is_allowed_to": 3,
    "expression.test_uses.test_the_first_node_that_differs_is_named": 2,
    "expression.test_yax.test_models": 2,
    "generation.test_beam.test_beam_search_is_transformers_token_for_token": 2,
    "generation.test_beam.test_other_families_and_no_end": 2,
    "generation.test_branches.test_every_branch_has_the_scores_of_its_own_text": 2,
    "generation.test_generate.test_a_row_is_what_it_is_alone_wherever_its_padding_stands": 2,
    "generation.test_generate.test_greedy_is_transformers_token_for_token": 2,
    "generation.test_generate.test_queries_keys_and_values_of_a_step_are_one_product": 3,
    "models.test_decoder.test_a_cache_changes_nothing_in_any_split_with_padding_on_the_left_too": 2,
    "models.test_encode.test_is_the_model_on_each_text_alone_in_the_order_of_the_texts": 2,
    "models.test_t5.test_a_cache_changes_nothing_in_any_split_with_masks_on_both_sides": 2,
    "models.test_t5.test_stacked_is_the_tuple_and_has_no_cache": 2,
    "models.test_t5_heads.test_factors_are_the_scores_and_the_chunked_loss_is_that_of_all_at_once": 2,
    "models.test_t5_vae.test_a_call_is_its_parts": 3,
    "models.test_t5_vae.test_texts_are_read_and_said_again_as_their_codes_are": 2,
    "models.test_t5_vae.test_the_layouts_compute_the_same": 3,
}


def in_turn(names: list[str]) -> list[bool]:
    """Which tests run, of all that there are, named `package.file.test[row]` in the order of their tables."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        table = name.split("[")[0]
        row = seen[table] = seen.get(table, zlib.crc32(table.encode())) + 1
        found.append(FULL or row % EVERY.get(table, 1) == 0)
    return found
