"""Conversations: packing from the golden examples of docs/specs/data.md §5.7, prompt formats, and files."""

import json
from pathlib import Path

import pytest

from chat_tokenizers import write_chat_tokenizer
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.blending.build import Splits
from mt_data.config import SFTData
from mt_data.datasets.sft.dataset import ConversationFile, pack_conversations
from mt_data.datasets.sft.prompt import EncodedConversation, get_prompt_format, split_conversations

FIRST = EncodedConversation([10, 11, 12, 13, 14], [False, False, False, True, True])
SECOND = EncodedConversation([20, 21, 22, 23], [False, False, True, True])


def chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_conversations_are_packed_until_the_sample_is_full():
    sample = {name: array.tolist() for name, array in pack_conversations([FIRST, SECOND], seq_length=7, pad=0).items()}
    assert sample == {
        "tokens": [10, 11, 12, 13, 14, 20, 21],
        "labels": [-100, -100, 13, 14, -100, -100, 0],
        "loss_mask": [0, 0, 1, 1, 0, 0, 0],
        "position_ids": [0, 1, 2, 3, 4, 0, 1],
        "segment_ids": [0, 0, 0, 0, 0, 1, 1],
        "padding_mask": [1, 1, 1, 1, 1, 1, 1],
    }


def test_conversations_are_filled_up_for_context_parallelism():
    sample = pack_conversations([FIRST, SECOND], seq_length=12, pad=0, multiple=4)
    assert sample["tokens"].tolist() == [10, 11, 12, 13, 14, 0, 0, 0, 20, 21, 22, 23]
    assert sample["segment_ids"].tolist() == [0] * 8 + [1] * 4
    assert sample["padding_mask"].tolist() == [1] * 5 + [0] * 3 + [1] * 4
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]


def test_a_sample_that_is_not_full_is_filled_up_with_its_last_conversation():
    sample = pack_conversations([SECOND], seq_length=6, pad=0)
    assert sample["tokens"].tolist() == [20, 21, 22, 23, 0, 0]
    assert sample["labels"].tolist() == [-100, 22, 23, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0]
    assert sample["segment_ids"].tolist() == [0] * 6
    assert sample["padding_mask"].tolist() == [1, 1, 1, 1, 0, 0]


def test_a_system_message_begins_a_conversation():
    messages = chat(("System", "a"), ("user", "b"), ("assistant", "c"), ("system", ""), ("user", "d"))
    assert [[m["role"] for m in conversation] for conversation in split_conversations(messages, "x")] == [
        ["system", "user", "assistant"],
        ["system", "user"],
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat(("robot", "x")), "message 1 has role 'robot'; allowed: system, user, assistant, tool"),
        (chat(("user", "")), "message 1 has no content; a text"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 is an answer to nothing"),
        (chat(("assistant", "b")), "message 1 is an answer to nothing; an assistant after a user or tool"),
    ],
)
def test_wrong_messages(messages: list[dict[str, str]], message: str):
    with pytest.raises(MtError, match=message):
        split_conversations(messages, "chat.jsonl:1")


def test_a_tokenizer_without_the_formats_tokens():
    from mt_data.config import TokenizerConfig
    from mt_data.tokenizers import build_tokenizer

    with pytest.raises(
        MtError, match=r"data\.prompt_format: 'chatml' needs <\|im_start\|>, which the tokenizer has not"
    ):
        get_prompt_format("chatml", build_tokenizer(TokenizerConfig(type="bytes")))


@pytest.fixture
def chatml(tmp_path: Path) -> dict[str, str]:
    """A tokenizer.json of bytes with ChatML's special tokens."""
    return write_chat_tokenizer(tmp_path)


def write(path: Path, lines: list[object]) -> str:
    path.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def splits(tmp_path: Path, path: str, tokenizer: dict[str, str], samples: tuple[int | None, int, int]) -> Splits:
    values = {"paths": [path], "split": "2,1", "seq_length": 40, "tokenizer": tokenizer}
    build = component("dataset", "sft")
    return build(SFTData.model_validate(values), samples=samples, seed=1, cache_dir=tmp_path / "cache")


def test_lines_of_a_file_go_round_and_round(tmp_path: Path, chatml: dict[str, str]):
    lines: list[object] = [{"messages": chat(("user", "one"), ("assistant", word))} for word in ("one", "two", "one")]
    built = splits(tmp_path, write(tmp_path / "chat.jsonl", lines), chatml, (5, 1, 0))
    assert built.train is not None
    assert built.valid is not None
    assert (len(built.train), len(built.valid)) == (5, 1)
    first, second = built.train[0]["tokens"].tolist(), built.train[1]["tokens"].tolist()
    assert first != second
    assert [built.train[i]["tokens"].tolist() for i in range(5)] == [first, second, first, second, first]
    assert len(built.train[0]["segment_ids"]) == 40
    with pytest.raises(IndexError):
        built.train[5]


HUGE = "9" * 5_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"text": "x"}', "holds no list of messages"),
        ('{"messages": []}', "holds no list of messages"),
        ("3", "is a number, not an object"),
        (f'{{"unused": {HUGE}, "messages": []}}', "more than 4,300 digits"),
        ('{"messages": [{"role": "user", "content": "a \\ud800 b"}]}', r"holds half a surrogate pair in 'a \\ud800 b'"),
        ('{"messages": ' + "[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_line_that_is_no_conversation(tmp_path: Path, line: str, message: str):
    lines = ConversationFile(write(tmp_path / "chat.jsonl", [{"messages": chat(("user", "x"))}, line]))
    assert len(lines) == 2
    with pytest.raises(MtError, match=rf"chat\.jsonl, conversation line 2: .*{message}"):
        lines.read_messages(1)


def test_a_missing_file(tmp_path: Path, chatml: dict[str, str]):
    write(tmp_path / "chat.jsonl", [])
    with pytest.raises(MtError, match=r"data\.paths: no file .*chats\.jsonl; did you mean .*chat\.jsonl"):
        splits(tmp_path, str(tmp_path / "chats.jsonl"), chatml, (1, 0, 0))


def test_an_empty_file(tmp_path: Path, chatml: dict[str, str]):
    path = tmp_path / "chat.jsonl"
    path.touch()
    with pytest.raises(MtError, match=r"the train split of .*chat\.jsonl: is empty: 0 lines"):
        splits(tmp_path, str(path), chatml, (1, 0, 0))
