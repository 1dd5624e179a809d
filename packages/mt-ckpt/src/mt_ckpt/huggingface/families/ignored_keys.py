"""Keys of config.json that need not be read, since they change nothing in what our model computes.

A key that a family neither reads nor lists is refused by its name: releases to come may compute with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ANY = object()
"""Allowed value of a key that says nothing of the computation."""

BOOKKEEPING = (
    *("_name_or_path", "_model_name_or_path", "_commit_hash", "_num_labels", "architectures", "auto_map"),
    *(
        "transformers_version",
        "torch_dtype",
        "dtype",
        "tokenizer_class",
        "transformers.js_config",
        "model_max_length",
        "max_sequence_length",
    ),
    *("is_llama_config", "unsloth_fixed", "unsloth_version", "output_past", "model_input_names"),
)
"""Where a file comes from and which other files go with it; `dtype` is that of the tensors, which they have."""
KERNELS = (
    *("use_cache", "cache_implementation", "gradient_checkpointing", "pretraining_tp", "chunk_size_feed_forward"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal", "torchscript"),
    *("use_bfloat16", "use_flash_attn", "_flash_attn_2_enabled", "tf_legacy_loss"),
)
"""How to compute the model: rounding apart, nothing of what."""
TRAINING = (
    *("initializer_range", "initializer_factor"),
    *("layerdrop", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
)
"""What counts in training only."""
DROPOUT = (
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "dropout_rate"),
)
"""Rates that a family reads under its own names; under another family's they must be 0."""
TASKS = (
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("classifier_dropout", "summary_activation", "summary_first_dropout", "summary_last_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj", "directionality", "pooler_fc_size"),
    *("pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict", "use_return_dict"),
)
"""Heads that we do not read, whose tensors would be refused, and the form of results."""
GENERATION = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "prefix"),
    *("suppress_tokens", "begin_suppress_tokens", "max_length", "min_length", "max_new_tokens", "do_sample"),
    *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("num_return_sequences", "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty"),
)
"""Ids, which `token_ids` carries, and how old files say to continue texts."""
OFF: dict[str, Any] = dict.fromkeys(DROPOUT, 0.0) | {
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "no_rope_layers": None,
    "sliding_window": None,
    "layer_types": None,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_parallel_residual": False,
}
"""Switches of some families that are off in all others, and the value that says so; null is false and empty."""

UNUSED = ("max_window_layers",)
"""Says which layers have a window, where there is none."""

IGNORED: dict[str, Any] = dict.fromkeys((*BOOKKEEPING, *KERNELS, *TRAINING, *TASKS, *GENERATION, *UNUSED), ANY) | OFF
"""Keys that files of every family may have, to the only value that they may have."""


def list_unread(
    raw: Mapping[str, Any], read: Sequence[str], ignored: Mapping[str, Any], family: str
) -> Iterator[tuple[str, str]]:
    """What a config.json has besides the keys that a family reads, if it is not among those that may be ignored."""
    unknown: list[str] = []
    for name in sorted(raw.keys() - set(read)):
        value, allowed = raw[name], ignored.get(name)
        if name not in ignored:
            unknown.append(f"{name} = {_shorten(value)}")
        elif allowed is not ANY and value != allowed and (value is not None or allowed):
            yield f"{name} is {_shorten(value)}", f"only {allowed!r} is implemented for {family}"
    if unknown:
        allowed = f"not known for {family}: remove what does not change the model's results; else it cannot be read"
        yield f"has {', '.join(unknown)}", allowed


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} …"
