"""What mt-data provides."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl

NEEDS = ("mt-data",)

COMPONENTS = (
    Component("command", "data", "mt_data.command:app", "Prepare and inspect training data.", NEEDS),
    Component(
        "tokenizer",
        "GPT2BPETokenizer",
        "mt_data.tokenizers.gpt2_bpe:GPT2BPETokenizer",
        "GPT-2's byte-level BPE from vocab.json and merges.txt.",
        NEEDS,
    ),
    Component(
        "tokenizer",
        "HuggingFaceTokenizer",
        "mt_data.tokenizers.hugging_face:HuggingFaceTokenizer",
        "A tokenizer.json, or a model directory that holds one.",
        NEEDS,
    ),
    Component(
        "tokenizer",
        "bytes",
        "mt_data.tokenizers.bytes_tokenizer:BytesTokenizer",
        "256 bytes and an end of document; needs no files.",
        NEEDS,
    ),
    Component("dataset", "gpt", "mt_data.splits:build_splits", "Samples of consecutive tokens, for GPT.", NEEDS),
)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-data."""
    return COMPONENTS


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """What is wrong with the data section, and between it and the model's."""
    from mt_data.rules import data_problems

    problems = list(data_problems(config.data))
    length, positions = config.data.seq_length, config.model.max_positions
    if length > positions:
        problems.append(
            Problem(
                "data.seq_length",
                f"{length} is longer than the model's positions, model.max_positions = {positions}",
                f"at most {positions}",
            )
        )
    return problems
