"""What can be wrong with the data section, found without numpy and without reading a corpus."""

from collections.abc import Iterator
from pathlib import Path

from mt_core.errors import MtError, Problem, suggest_file
from mt_core.plugins import components, did_you_mean
from mt_data.config import BUILTIN_SECTIONS, Corpora, DataConfig, GPTData, ICTData, SFTData, TokenizerConfig
from mt_data.config.paths import find_missing_files, resolve_split_paths
from mt_data.config.split import split_problem

TIKTOKEN = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")
TOKENIZER_FIELDS = {
    "GPT2BPETokenizer": (),
    "HuggingFaceTokenizer": (),
    "bytes": (),
    "BertWordPieceLowerCase": ("vocab_extra_ids",),
    "BertWordPieceCase": ("vocab_extra_ids",),
    "SentencePieceTokenizer": ("vocab_extra_ids",),
    "GPTSentencePieceTokenizer": (),
    "Llama2Tokenizer": (),
    "TikTokenizer": ("vocab_size", *TIKTOKEN),
    "NullTokenizer": ("vocab_size",),
}
"""Options, files apart, that change what a tokenizer does. One of another package may read them all."""


def data_problems(config: DataConfig) -> Iterator[Problem]:
    """Bad path grammar, missing files, a bad split, missing tokenizer files, an unknown or missing tokenizer."""
    if isinstance(config, Corpora):
        try:
            yield from resolve_split_paths(config).problems(config.files)
        except MtError as err:
            yield from err.problems
    if isinstance(config, ICTData):
        yield from _ict_problems(config)
    if isinstance(config, SFTData) and config.chat_template is not None:
        yield from _template_problems(config, Path(config.chat_template))
    if isinstance(config, Corpora) and (problem := split_problem(config.split)):
        yield problem
    if config.tokenizer:
        yield from tokenizer_problems(config.tokenizer, "data.tokenizer")
    else:
        yield from _missing_tokenizer(config)


def _missing_tokenizer(config: DataConfig) -> Iterator[Problem]:
    """What a section without a tokenizer asks of one."""
    options = [
        name for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask") if getattr(config, name, 0)
    ]
    for name in options:
        yield Problem(f"data.{name}", "is on, but there is no data.tokenizer to say which id ends a document")
    if isinstance(config, BUILTIN_SECTIONS) and not isinstance(
        config, GPTData
    ):  # other packages' kinds decide for themselves
        kind = type(config).model_fields["kind"].default
        yield Problem("data.tokenizer", "is not given", f"{kind} data needs one, the one that made the corpora")


def _ict_problems(config: ICTData) -> Iterator[Problem]:
    if len(config.paths) != 1:
        yield Problem("data.paths", f"{len(config.paths)} paths", "ict data has one, without a weight")
    for prefix, where in (*((path, "data.paths") for path in config.paths), (config.titles, "data.titles")):
        if prefix is not None:
            yield from find_missing_files(prefix, where)


def _template_problems(config: SFTData, path: Path) -> Iterator[Problem]:
    where = "data.chat_template"
    if config.prompt_format != "template":
        actual = f"is given, but data.prompt_format = {config.prompt_format!r} does not read it"
        yield Problem(where, actual, 'data.prompt_format = "template", or leave it out')
    elif not path.is_file():
        yield Problem(where, f"no file {path}", suggest_file(path))


def tokenizer_problems(config: TokenizerConfig, where: str) -> Iterator[Problem]:
    """An unknown type, and every file that is named but missing, with the nearest name in its folder."""
    known = components("tokenizer")
    if config.type not in known:
        yield Problem(f"{where}.type", f"unknown name {config.type!r}", did_you_mean(config.type, known))
    for field in ("vocab_file", "merge_file", "model"):
        value = getattr(config, field)
        if value is not None and not Path(value).exists():
            yield Problem(f"{where}.{field}", f"no file {value}", suggest_file(Path(value)))
    yield from find_unused_options(config, where)


def find_unused_options(config: TokenizerConfig, where: str) -> Iterator[Problem]:
    """Options that would change nothing, as the tokenizer does not read them."""
    if config.type not in TOKENIZER_FIELDS:
        return
    for field in ("vocab_size", "vocab_extra_ids", *TIKTOKEN):
        default = TokenizerConfig.model_fields[field].default
        if getattr(config, field) != default and field not in TOKENIZER_FIELDS[config.type]:
            readers = ", ".join(name for name, fields in TOKENIZER_FIELDS.items() if field in fields)
            yield Problem(f"{where}.{field}", f"{config.type} has no such option", f"leave it out; it is for {readers}")
