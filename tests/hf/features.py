"""What a stock model may do under a policy, and the test that each stands on; docs/stock-models.md shows them."""

FEATURES: dict[str, str] = {
    "prefill in any pieces, token by token": "test_attachment.py::test_split_equals_whole",
    "`generate`: greedy, beams, prompt in chunks": "test_attachment.py::test_generate_as_the_untouched_model",
    "assisted by the prompt": "test_assisted.py::test_looking_up_in_the_prompt_gives_what_greedy_decoding_gives",
    "assisted by another model": "test_assisted.py::test_a_stock_assistant",
    "rows padded on the left, right or anywhere": "test_padding.py::test_a_row_is_read_as_it_would_be_alone",
    "pipelines in batches": "test_padding.py::test_a_pipeline_reads_four_prompts_at_once",
    "texts packed into one row": "test_packing.py::test_texts_are_read_as_they_would_be_alone",
    "gradients": "test_attachment.py::test_gradients_flow_and_equal_the_untouched_models",
    "gradient checkpointing, both kinds": "test_training.py::test_checkpoints_of_either_kind_change_no_gradient",
    "`Trainer` in bfloat16": "test_training.py::test_trainer_in_bfloat16_learns_as_the_stock_model",
    "DDP and FSDP2, attached before sharding or after": (
        "../distributed/test_two_processes.py::test_a_stock_model_under_a_policy_is_that_of_one_process"
    ),
    "autocast": "test_attachment.py::test_autocast_is_as_the_untouched_models",
    "a policy per layer": "test_families.py::test_a_family_is_the_stock_model_under_full",
    "rows, a share of the prompt, bytes": "test_budgets.py::test_bytes_are_never_exceeded_and_made_use_of",
    "a prompt read in full": "test_budgets.py::test_a_share_is_of_each_prompt",
    "a text read again as it is read": "test_reading_again.py::test_split_equals_whole",
    "caches copied, saved and loaded": "test_attachment.py::test_a_copied_cache_goes_on_as_the_original_does",
    "lm-evaluation-harness' `HFLM`": "test_lm_eval.py::test_batches_say_what_rows_say_alone",
    "continuous batching: refused": "test_life.py::test_continuous_batching_is_refused_while_it_lasts",
}
