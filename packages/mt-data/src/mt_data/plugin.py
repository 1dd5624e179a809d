"""What mt-data provides."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl

if TYPE_CHECKING:
    from mt_core.config.run_config import RunConfig
    from mt_core.contracts import ModelConfig
    from mt_data.config import DataConfig

NEEDS = ("mt-data",)

TOKENIZERS = {
    "GPT2BPETokenizer": ("gpt2_bpe:GPT2BPETokenizer", "GPT-2's byte-level BPE from vocab.json and merges.txt."),
    "HuggingFaceTokenizer": (
        "hugging_face:HuggingFaceTokenizer",
        "A tokenizer.json, or a model directory that holds one.",
    ),
    "bytes": ("file_free:BytesTokenizer", "256 bytes and an end of document; needs no files."),
    "BertWordPieceLowerCase": ("word_piece:BertWordPiece", "BERT's WordPiece from vocab.txt, in lower case."),
    "BertWordPieceCase": ("word_piece:BertWordPiece", "BERT's WordPiece from vocab.txt, case kept."),
    "SentencePieceTokenizer": (
        "sentence_piece:SentencePieceTokenizer",
        "A SentencePiece .model with special tokens and extra ids after its pieces, for BERT and T5.",
    ),
    "GPTSentencePieceTokenizer": ("sentence_piece:PlainSentencePiece", "A SentencePiece .model as it is."),
    "Llama2Tokenizer": (
        "sentence_piece:PlainSentencePiece",
        "A SentencePiece .model, with the beginning of sequence before each text.",
    ),
    "TikTokenizer": ("tik:TikTokenizer", "Byte-level BPE from the .json vocabulary of NVIDIA's models."),
    "NullTokenizer": ("file_free:NullTokenizer", "Texts that are token ids already, written as numbers."),
}
"""Where each tokenizer lives in `mt_data.tokenizers`, and what it is."""

DATASETS = {
    "gpt": ("gpt.dataset", "Samples of consecutive tokens, for GPT."),
    "bert": ("bert", "Two parts of a document with masked words."),
    "t5": ("t5", "Runs of words moved from the encoder's text to the decoder's."),
    "ict": ("ict", "A sentence and the block of sentences that it came from."),
    "sft": ("sft.dataset", "Packed conversations for fine-tuning."),
    "fim": ("fim", "GPT samples with the middle of documents moved to their end."),
    "mock": ("mock", "GPT samples out of no files, to try a run with."),
}

COMPONENTS = (
    Component("command", "data", "mt_data.command:app", "Prepare and inspect training data.", NEEDS),
    *(
        Component("tokenizer", name, f"mt_data.tokenizers.{target}", summary, NEEDS)
        for name, (target, summary) in TOKENIZERS.items()
    ),
    *(
        Component("dataset", name, f"mt_data.datasets.{module}:build_splits", summary, NEEDS)
        for name, (module, summary) in DATASETS.items()
    ),
)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-data."""
    return COMPONENTS


@hookimpl
def mt_config_rules(config: "RunConfig[ModelConfig, DataConfig]") -> list[Problem]:
    """What is wrong with the data section, and between it and the model's."""
    from mt_data.config.rules import data_problems

    problems = list(data_problems(config.data))
    length, positions = config.data.seq_length, config.model.max_seq_len
    if length > positions:
        problems.append(
            Problem(
                "data.seq_length",
                f"{length} is longer than the model's positions, model.max_seq_len = {positions}",
                f"at most {positions}",
            )
        )
    return problems
