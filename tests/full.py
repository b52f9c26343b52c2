"""Whether the long proofs run with their stated counts and all rows of their tables (`make test-full`), or with few."""

import os
import zlib
from collections import Counter

FULL = os.environ.get("EQX_TRANSFORMERS_FULL") == "1"

# Rows of one table say much the same: of a table of more than so many rows `make test` takes every n-th row, which
# leaves 2 or 3 of most, and `make test-full` all of them. Another table begins with another row.
ROWS = 3
# Of these tables, whose rows are dear, it takes every n-th row if that is fewer; of those with a 1, all. An odd n where
# every other row has the other layout, so that both are seen. Whole names of the tests, without the package.
EVERY = {
    "conversion.test_across_heads.test_the_encoder_is_read_and_only_a_strange_head_is_drawn": 20,
    "conversion.test_across_heads.test_what_is_drawn_is_verified_too": 2,
    "conversion.test_command_line.test_one_wrong_number_in_what_was_converted_is_found_where_it_is": 2,
    "conversion.test_config_audit.test_an_old_spelling_is_the_same_model": 11,
    "conversion.test_config_audit.test_what_is_irrelevant_changes_no_output_of_the_reference": 7,
    "conversion.test_decoder_stand_ins.test_any_head_stands_on_it": 2,
    "conversion.test_export.test_a_grown_vocabulary_is_saved_loaded_and_exported": 2,
    "conversion.test_facts.test_every_fact_perturbed_changes_it_alone_or_is_refused": 13,
    "conversion.test_flax.test_every_family_and_head": 7,
    "conversion.test_joblib_reader.test_arrays_larger_than_every_buffer": 2,
    "conversion.test_laws.test_a_model_made_from_scratch_is_exported_and_comes_back": 9,
    "conversion.test_laws.test_any_one_key_deleted_is_reported_exactly": 9,
    "conversion.test_laws.test_any_one_key_resized_is_reported_exactly": 9,
    "conversion.test_laws.test_bfloat16_is_as_near_as_the_references_own": 3,
    "conversion.test_laws.test_every_part_is_the_reference_and_every_tensor_the_file": 11,
    "conversion.test_laws.test_export_is_bitwise_the_file_and_the_reference_loads_it_clean": 9,
    "conversion.test_laws.test_forward_and_gradients_are_the_reference": 9,
    "conversion.test_peft.test_what_is_written_here_is_read_there_and_here_again": 3,
    "conversion.test_peft.test_what_peft_wrote_computes_the_same_here": 3,
    "conversion.test_round_trip.test_what_is_read_is_written": 2,
    "conversion.test_t5_stand_ins.test_it_is_the_reference_is_verified_and_goes_back_bit_for_bit": 7,
    "conversion.test_t5_stand_ins.test_what_a_part_does_not_use_is_dropped_with_its_reason": 2,
    "expression.test_capture.test_a_patched_activation_is_what_follows_goes_on_with": 2,
    "expression.test_capture.test_both_halves_of_t5": 2,
    "expression.test_capture.test_captures_go_through_jit_vmap_grad_and_remat": 2,
    "expression.test_capture.test_heads_that_are_ablated_give_nothing_to_the_output_projection": 2,
    "expression.test_capture.test_s15_what_is_captured_is_what_each_step_gives": 2,
    "expression.test_capture.test_what_was_captured_and_is_set_again_changes_nothing": 2,
    "expression.test_evaluate.test_s02_control_structures_derivatives_caches_and_keys": 3,
    "expression.test_evaluate.test_s02_s03_an_expression_gives_the_direct_calls_bits": 5,
    "expression.test_evaluate.test_s02_s03_it_is_the_same_under_jit_and_its_gradients_too": 4,
    "expression.test_evaluate.test_s02_s03_it_is_the_same_under_vmap_and_a_vmap_of_gradients": 3,
    "expression.test_evaluate.test_s15_what_was_recorded_dies_with_the_expression": 2,
    "expression.test_in_models.test_s08_rules_of_activations_hold_in_a_model_that_is_rewritten_around_them": 6,
    "expression.test_in_models.test_s11_a_replaced_value_is_what_the_residual_and_a_loss_read": 6,
    "expression.test_query.test_s04_queries_of_models_that_are_used": 4,
    "expression.test_recognise.test_s07_our_own_models_hold_their_activations_in_fields_with_paths": 2,
    "expression.test_rewrite.test_rewritten_is_trained_with_its_replacements_and_traced_once": 2,
    "expression.test_rewrite.test_rewritten_of_a_rewritten_has_all_modules_and_both_rules": 2,
    "expression.test_rewrite.test_s03_s06_all_gradients_are_those_of_a_model_written_with_silu": 3,
    "expression.test_rewrite.test_s06_gelu_is_silu_everywhere_at_other_lengths_mapped_and_compiled": 3,
    "expression.test_rewrite.test_s06_in_gpt2_and_t5": 2,
    "expression.test_rewrite.test_s06_in_roberta_it_is_what_tree_at_makes_outputs_gradients_and_program": 2,
    "expression.test_rewrite.test_s06_the_compiled_program_is_as_long_as_that_of_a_model_written_so": 3,
    "expression.test_rewrite.test_s09_a_rule_that_finds_nothing_is_an_error_unless_it_is_allowed_to": 3,
    "expression.test_rewrite.test_s12_one_call_of_three_is_replaced_and_tree_at_replaces_all": 2,
    "expression.test_show.test_s01_shapes_alone_give_the_same_tree_and_allocate_nothing": 3,
    "expression.test_uses.test_our_own_models_read_weights_where_they_are": 2,
    "expression.test_uses.test_the_first_node_that_differs_is_named": 2,
    "expression.test_yax.test_models": 6,
    "generation.test_beam.test_beam_search_is_transformers_token_for_token": 4,
    "generation.test_beam.test_other_families_and_no_end": 2,
    "generation.test_branches.test_every_branch_has_the_scores_of_its_own_text": 5,
    "generation.test_generate.test_a_row_is_what_it_is_alone_wherever_its_padding_stands": 2,
    "generation.test_generate.test_greedy_is_transformers_token_for_token": 3,
    "generation.test_generate.test_penalties_and_minimum_length_are_transformers": 2,
    "generation.test_generate.test_queries_keys_and_values_of_a_step_are_one_product": 3,
    "golden.test_functional_transformer.test_golden_functional_transformer_forward_and_loss": 2,
    "golden.test_haiku_lm.test_golden_haiku_lm_forward_and_loss": 2,
    "golden.test_roberta_haiku.test_golden_roberta_haiku_any_one_key_missing_or_added_is_reported_as_it_is_spelled": 2,
    "golden.test_roberta_haiku.test_golden_roberta_haiku_features": 2,
    "golden.test_roberta_haiku.test_golden_roberta_haiku_reference_positions_are_an_input": 2,
    "golden.test_t5_vae.test_golden_t5_vae_codes_states_and_logits": 2,
    "golden.test_t5_vae.test_golden_t5_vae_gradients": 2,
    "golden.test_t5_vae.test_golden_t5_vae_part_by_part": 2,
    "models.test_decoder.test_a_cache_changes_nothing_in_any_split_with_padding_on_the_left_too": 4,
    "models.test_decoder.test_a_key_switches_dropout_on_the_same_in_a_tuple_and_stacked": 2,
    "models.test_decoder.test_packed_texts_are_the_texts_apart": 2,
    "models.test_decoder_heads.test_a_decoder_is_saved_and_loaded_bit_for_bit": 3,
    "models.test_decoder_heads.test_a_head_from_a_config_and_one_put_on_a_decoder_are_what_the_config_builds": 2,
    "models.test_decoder_heads.test_a_vocabulary_grows": 3,
    "models.test_decoder_heads.test_scores_are_those_against_the_token_table_where_it_is_tied_and_of_an_output_else": 2,
    "models.test_encode.test_is_the_model_on_each_text_alone_in_the_order_of_the_texts": 3,
    "models.test_heads.test_a_head_from_a_config_is_what_its_config_builds": 5,
    "models.test_heads.test_a_key_switches_dropout_on_in_a_head_and_inference_mode_wins": 2,
    "models.test_original_lms.test_a_model_is_saved_and_loaded": 2,
    "models.test_original_lms.test_blocks_are_stacked_and_unstacked": 2,
    "models.test_original_lms.test_steps_with_a_cache_are_the_call": 2,
    "models.test_serialisation.test_save_then_load_is_the_identity_bit_for_bit": 7,
    "models.test_t5.test_a_cache_changes_nothing_in_any_split_with_masks_on_both_sides": 2,
    "models.test_t5.test_encode_then_decode_is_the_call_and_the_encoder_alone_its_half": 2,
    "models.test_t5.test_stacked_is_the_tuple_and_has_no_cache": 2,
    "models.test_t5_half.test_float16_is_finite_and_near_where_transformers_own_is_not_a_number": 2,
    "models.test_t5_half.test_nothing_is_cut_off_and_nothing_widened_but_in_float16": 2,
    "models.test_t5_half.test_steps_in_float16_are_the_call": 2,
    "models.test_t5_heads.test_factors_are_the_scores_and_the_chunked_loss_is_that_of_all_at_once": 2,
    "models.test_t5_heads.test_save_then_load_is_the_identity_bit_for_bit": 3,
    "models.test_t5_vae.test_a_call_is_its_parts": 3,
    "models.test_t5_vae.test_codes_are_drawn_from_their_normal": 2,
    "models.test_t5_vae.test_texts_are_read_and_said_again_as_their_codes_are": 6,
    "models.test_t5_vae.test_the_layouts_compute_the_same": 3,
    "nn.test_attention.test_steps_are_the_call_in_any_split": 2,
    "nn.test_kernels.test_attend_is_plain_for_every_mask": 3,
    "nn.test_kernels.test_attend_is_plain_with_every_option": 2,
    "nn.test_kernels.test_vmap_of_grad": 2,
    "surgery.test_adapters.test_adding_is_tree_at_of_a_selection": 2,
    "surgery.test_adapters.test_gradients_reach_what_the_mask_says_and_nothing_else": 3,
    "surgery.test_adapters.test_switching_is_other_numbers_of_the_same_program": 2,
    "surgery.test_adapters.test_what_is_kept_computes_the_same_and_comes_back": 3,
    "surgery.test_blocks.test_blocks_stand_where_they_should_in_both_layouts": 3,
    "surgery.test_families.test_a_head_is_swapped_by_one": 6,
    "surgery.test_families.test_a_vocabulary_grows_and_goes_out_and_back": 6,
    "surgery.test_families.test_adapters_differ_and_both_layouts_have_the_same_ones": 9,
    "surgery.test_families.test_an_activation_is_swapped_by_replace_fn": 9,
    "surgery.test_families.test_layers_are_swapped_by_each": 9,
    "surgery.test_families.test_quantized_layers_compute_what_their_rounded_weights_do": 17,
    "surgery.test_families.test_wrappers_change_nothing_at_first_and_merging_keeps_the_function": 41,
    "surgery.test_freeze.test_labels_drive_optax": 3,
    "surgery.test_lora.test_adding_changes_nothing": 3,
    "surgery.test_lora.test_merging_preserves_the_function": 3,
    "surgery.test_lora.test_merging_what_was_not_touched_is_the_identity": 3,
    "surgery.test_quantize.test_a_model_computes_what_that_of_the_rounded_weights_does": 2,
    "surgery.test_quantize.test_a_table_gives_rows_and_scores": 2,
    "surgery.test_quantize.test_stacked_layers_are_quantized_as_each_by_itself": 2,
    "surgery.test_replacements.test_stacked_blocks_get_what_the_tuple_gets": 2,
    "surgery.test_saved_edits.test_a_model_of_other_blocks_becomes_one_of_its_new_config": 2,
    "surgery.test_saved_edits.test_quantized_models_generate": 3,
    "surgery.test_scenarios.test_s13_lora_from_patterns_to_training_merging_and_files": 3,
    "surgery.test_scenarios.test_s13_training_is_saved_and_resumed_to_the_same_bits": 2,
    "surgery.test_scenarios.test_s14_an_adapter_on_the_owner_of_a_tied_table_keeps_the_tie": 2,
    "test_latents.test_gradients_are_finite_and_at_the_ends_those_of_the_ends": 3,
    "test_public.test_a_public_function_or_class_has_a_docstring": 1,
    "test_public.test_a_public_name_is_used_by_a_test": 1,
    "training.test_recipe_language_model.test_a_model_goes_on_with_its_tokenizer": 2,
    "training.test_recipe_language_model.test_every_size_of_every_model_can_be_made": 3,
    "training.test_recipe_language_model.test_rows_are_cut_as_is_said_and_every_held_out_token_is_predicted_once": 3,
    "training.test_text.test_bad_data_is_one_clear_error": 1,
    "training.test_losses.test_a_models_loss_is_that_of_its_logits_with_chunks_and_without": 2,
}


def in_turn(names: list[str]) -> list[bool]:
    """Which tests run, of all that there are, named `package.file.test[row]` in the order of their tables."""
    tables = [name.split("[")[0] for name in names]
    rows, seen, found = Counter(tables), Counter(), []
    for table in tables:
        seen[table] += 1
        found.append(FULL or (seen[table] + zlib.crc32(table.encode())) % step(table, rows[table]) == 0)
    return found


def step(table: str, rows: int) -> int:
    """Every how manieth row of so many runs: of few rows at least one does."""
    said = EVERY.get(table, 0)
    return 1 if said == 1 else min(max(said, 1 + (rows - 1) // ROWS), rows)
