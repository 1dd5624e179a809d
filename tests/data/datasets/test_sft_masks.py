"""Which tokens of a conversation are learnt: by hand for the usual templates, and as transformers masks them."""

import io
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from chat_tokenizers import CHATML, LLAMA2, LLAMA3, write_chat_tokenizer
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.config import SFTData
from mt_data.datasets.sft.dataset import SFTDataset
from mt_data.datasets.sft.prompt import EncodedConversation, encode_conversation, get_offset_encoder

Messages = list[dict[str, str]]
LLAMA2_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def chat(*contents: str, system: str | None = None) -> Messages:
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CONVERSATIONS = (
    chat("Two and two?", "four"),
    chat("Hi", "\nfür 你好 🙂", "and?", "  five \n", system="Be brief."),
    chat("Hi\n", "<|im_end|>", "a", "b", "unanswered"),
    chat("no answer"),
)


def make_dataset(tmp_path: Path, lines: list[Messages], tokenizer: dict[str, str], **options: object) -> SFTDataset:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in lines))
    values = {"train_paths": [str(path)], "tokenizer": tokenizer, "max_untrained": 1.0, "seq_length": 80, **options}
    build = component("dataset", "sft")
    dataset = build(SFTData.model_validate(values), samples=(None, 0, 0), seed=1, cache_dir=tmp_path / "cache").train
    assert isinstance(dataset, SFTDataset)
    return dataset


def encode(dataset: SFTDataset, messages: Messages) -> EncodedConversation:
    rendered = dataset.chat.renderer.render(messages, "here")
    return encode_conversation(rendered, get_offset_encoder(dataset.chat.tokenizer))


def read_learnt(dataset: SFTDataset, messages: Messages) -> list[str]:
    """The stretches of text that are learnt, in order."""
    encoded, stretches = encode(dataset, messages), [[]]
    for token, learnt in zip(encoded.tokens, encoded.learnt, strict=True):
        stretches = [*stretches[:-1], [*stretches[-1], token]] if learnt else [*stretches, []]
    return [dataset.chat.tokenizer.decode(ids) for ids in stretches if ids]


CHATML_ANSWERS = (
    ["four<|im_end|>\n"],
    ["\n\nfür 你好 🙂<|im_end|>\n", "  five \n<|im_end|>\n"],  # the first token is the header's line feed too
    ["<|im_end|><|im_end|>\n", "b<|im_end|>\n"],
    [],
)
LLAMA2_ANSWERS = ([" four </s>"], [" \nfür 你好 🙂 </s>", "   five \n </s>"], [" <|im_end|> </s>", " b </s>"], [])
LLAMA3_ANSWERS = (
    ["four<|eot_id|>"],
    ["für 你好 🙂<|eot_id|>", "five<|eot_id|>"],
    ["<|im_end|><|eot_id|>", "b<|eot_id|>"],
    [],
)


@pytest.mark.parametrize(
    ("template", "tokens", "answers"),
    [
        (None, {}, CHATML_ANSWERS),
        (CHATML, {}, CHATML_ANSWERS),
        (LLAMA2, LLAMA2_TOKENS, LLAMA2_ANSWERS),
        (LLAMA3, LLAMA3_TOKENS, LLAMA3_ANSWERS),
    ],
    ids=["built-in ChatML", "ChatML", "Llama 2", "Llama 3"],
)
def test_answers_are_learnt_and_headers_are_not(
    tmp_path: Path, template: str | None, tokens: dict[str, str], answers: tuple[list[str], ...]
):
    tokenizer = write_chat_tokenizer(tmp_path, template=template, **tokens)
    prompt_format = "template" if template else "chatml"
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, prompt_format=prompt_format)
    for conversation, expected in zip(CONVERSATIONS, answers, strict=True):
        assert read_learnt(dataset, conversation) == expected


def test_llama3_as_mt_writes_it(tmp_path: Path):
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], write_chat_tokenizer(tmp_path), prompt_format="llama3")
    assert read_learnt(dataset, CONVERSATIONS[0]) == ["four<|eot_id|>"]


GENERATION = {
    "ChatML": (
        CHATML.replace(
            "{{ message['content'] + '<|im_end|>' }}",
            "{% if message['role'] == 'assistant' %}{%- generation -%}  {{ message['content'] + '<|im_end|>' }}"
            "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}",
        ),
        {},
    ),
    "Llama 2": (
        LLAMA2.replace("{{ ' ' + message['content'] + ' ' + eos_token }}", "{{ ' ' }}{% generation %}\n"
                       "{{ message['content'] + ' ' + eos_token }}{% endgeneration %}"),
        LLAMA2_TOKENS,
    ),
    "Llama 3": (
        LLAMA3.replace("message['content'] | trim + '<|eot_id|>' }}",
                       "(message['content'] | trim if message['role'] != 'assistant' else '') }}"
                       "{% if message['role'] == 'assistant' %}"
                       "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
                       "{% endgeneration %}{% else %}{{ '<|eot_id|>' }}{% endif %}"),
        LLAMA3_TOKENS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATION)
def test_generation_blocks_are_masked_as_transformers_does(tmp_path: Path, name: str):
    from transformers import PreTrainedTokenizerFast

    template, tokens = GENERATION[name]
    assert "endgeneration" in template
    tokenizer = write_chat_tokenizer(tmp_path, template=template, **tokens)
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, prompt_format="template")
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    learnt = 0
    for conversation in CONVERSATIONS:
        expected = reference.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        encoded = encode(dataset, conversation)
        assert encoded.tokens == expected["input_ids"]
        assert list(map(int, encoded.learnt)) == expected["assistant_masks"]
        learnt += sum(encoded.learnt)
    assert learnt > 30


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_the_end_of_a_turn_is_learnt_though_it_is_the_padding(tmp_path: Path, pad: str):
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], write_chat_tokenizer(tmp_path, pad_token=pad))
    sample, decode = dataset[0], dataset.chat.tokenizer.decode
    learnt = sample["labels"][sample["loss_mask"] == 1]
    assert decode(learnt.tolist()) == "four<|im_end|>\n"
    rest = sample["labels"][sample["loss_mask"] == 0]
    assert set(rest.tolist()) == {-100, *dataset.chat.tokenizer.encode(pad)}
    assert f"four<|im_end|>\n{pad}{pad}" in decode(sample["tokens"].tolist())


def test_a_sample_that_is_sent_to_another_process_is_the_same(tmp_path: Path):
    import pickle

    tokenizer = write_chat_tokenizer(tmp_path, template=GENERATION["ChatML"][0])
    dataset = make_dataset(tmp_path, list(CONVERSATIONS), tokenizer, prompt_format="template")
    copy = pickle.loads(pickle.dumps(dataset))
    assert all((copy[1][key] == dataset[1][key]).all() for key in dataset[1])


def test_a_template_in_a_file(tmp_path: Path):
    (tmp_path / "mine.jinja").write_text(CHATML.replace("im_start", "s"))
    options = {"prompt_format": "template", "chat_template": str(tmp_path / "mine.jinja")}
    tokenizer = write_chat_tokenizer(tmp_path / "tokenizer", template=CHATML)
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, **options)
    assert dataset.chat.renderer.render(CONVERSATIONS[0], "").text.startswith("<|s|>user\nTwo")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHATML.replace("im_end", "e"))
    dataset = make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, prompt_format="template")
    assert "Two and two?<|e|>" in dataset.chat.renderer.render(CONVERSATIONS[0], "").text


REWRITING = CHATML.replace("message['content'] +", "('<think>' if loop.last else '') + message['content'] +")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            REWRITING,
            r"chat\.jsonl, conversation line 1: .* writes answer 1 otherwise once there is more; \{% generation",
        ),
        ("{{ raise_exception('roles must alternate') }}", "cannot write it: roles must alternate; a conversation of"),
        ("{{ strftime_now('%Y') }}", "cannot write it: 'strftime_now' is undefined"),
        ("{{ messages.append(1) }}", "cannot write it: .*is unsafe"),
        ("{% for %}", "tokenizer_config.json: is not a Jinja template: "),
        (None, 'data.prompt_format: is "template", but .* has neither chat_template.jinja nor a chat_template in'),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, template: str | None, message: str):
    with pytest.raises(MtError, match=message):
        make_dataset(
            tmp_path, [CONVERSATIONS[1]], write_chat_tokenizer(tmp_path, template=template), prompt_format="template"
        )


def test_a_template_file_that_is_not_read(tmp_path: Path):
    tokenizer = write_chat_tokenizer(tmp_path)
    with pytest.raises(
        MtError, match=r"data\.chat_template: is given, but data\.prompt_format = 'chatml' does not read"
    ):
        make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, chat_template="x.jinja")
    with pytest.raises(MtError, match=r"data\.chat_template: no file x\.jinja"):
        make_dataset(tmp_path, [CONVERSATIONS[0]], tokenizer, chat_template="x.jinja", prompt_format="template")


@pytest.mark.parametrize("type", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer"])
def test_sentence_pieces_are_learnt_where_the_assistant_speaks(tmp_path: Path, type: str):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    symbols = ["<|im_start|>", "<|im_end|>", "\n"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user assistant two and four be brief"] * 20),
        model_writer=model,
        model_type="char",
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        vocab_size=60,
        minloglevel=2,
    )
    (tmp_path / "chars.model").write_bytes(model.getvalue())
    messages = chat("two and two", "four", "and", " two\n", system="be brief")
    dataset = make_dataset(tmp_path, [messages], {"type": type, "model": str(tmp_path / "chars.model")})
    assert read_learnt(dataset, messages) == ["four<|im_end|>\n", " two\n<|im_end|>\n"]


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(tmp_path: Path):
    with pytest.raises(MtError, match=r"data\.tokenizer\.type: bytes does not say where its tokens stand in a text"):
        make_dataset(tmp_path, [CONVERSATIONS[0]], {"type": "bytes"})


def test_prompts_that_fill_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [chat("x" * 100, "never seen") if number in (3, 7) else CONVERSATIONS[0] for number in range(20)]
    tokenizer = write_chat_tokenizer(tmp_path)
    message = (
        "2 of 20 lines have no token to learn, conversation line 4 the first: no answer, or none within "
        "data.seq_length = 80; a longer data.seq_length, or shorter prompts"
    )
    make_dataset(tmp_path, lines, tokenizer, max_untrained=0.1)
    assert capsys.readouterr().err == f"warning: {tmp_path / 'chat.jsonl'}: {message}\n"
    with pytest.raises(MtError) as refused:
        make_dataset(tmp_path, lines, tokenizer, max_untrained=0.09)
    assert message in str(refused.value)
    assert "data.max_untrained = 0.09 is the share that is let pass" in str(refused.value)
    make_dataset(tmp_path, lines, tokenizer, seq_length=200, max_untrained=0.0)
    assert not capsys.readouterr().err


def get_arrays(dataset: SFTDataset, index: int) -> dict[str, np.ndarray]:
    return {key: np.asarray(values) for key, values in dataset[index].items()}


def test_lines_that_fit_share_a_sample_and_stay_apart(tmp_path: Path):
    lines = [*CONVERSATIONS, chat("x" * 100, "cut off"), chat("1", "2"), chat("3", "4")]
    tokenizer = write_chat_tokenizer(tmp_path)
    apart = make_dataset(tmp_path, lines, tokenizer, seq_length=60)
    together = make_dataset(tmp_path, lines, tokenizer, seq_length=60, pack_lines=True)
    sizes = [len(encode(apart, messages).tokens) for messages in lines]
    assert together.starts is not None
    groups = [range(*pair) for pair in pairwise(together.starts.tolist())]
    assert [number for group in groups for number in group] == list(range(len(lines)))
    assert all(sum(sizes[number] for number in group) <= 60 or len(group) == 1 for group in groups)
    assert all(
        sum(sizes[number] for number in (*group, after[0])) > 60 for group, after in pairwise(groups)
    )  # no line could have joined the one before
    assert max(map(len, groups)) > 1
    assert len(together) == len(groups)
    for sample, group in zip(map(partial(get_arrays, together), range(len(together))), groups, strict=True):
        place = 0
        for segment, number in enumerate(group):
            alone, size = get_arrays(apart, number), min(sizes[number], 60)
            segment_ids = sample["segment_ids"][place : place + size]
            assert len({*segment_ids.tolist()}) == 1
            assert (sample["segment_ids"] == segment_ids[0]).sum() == size or segment == len(group) - 1
            for key in ("tokens", "position_ids", "padding_mask"):
                assert (sample[key][place : place + size] == alone[key][:size]).all()
            learnt = sample["loss_mask"][place : place + size - 1] > 0
            assert (learnt == (alone["loss_mask"][: size - 1] > 0)).all()
            assert (sample["labels"][place : place + size - 1][learnt] == alone["labels"][: size - 1][learnt]).all()
            place += size
        assert not sample["padding_mask"][place:].any()
    again = make_dataset(tmp_path, lines, tokenizer, seq_length=60, pack_lines=True)  # from the stored starts
    assert again.starts is not None
    assert np.array_equal(again.starts, together.starts)
    other = make_dataset(tmp_path, lines[2:], tokenizer, seq_length=60, pack_lines=True)
    assert other.starts is not None
    assert other.starts[-1] == len(lines) - 2


def test_packed_lines_are_filled_up_to_a_multiple(tmp_path: Path):
    tokenizer = write_chat_tokenizer(tmp_path)
    lines = [chat("1", "2"), chat("3", "4")]
    (size,) = {len(encode(make_dataset(tmp_path, lines, tokenizer), messages).tokens) for messages in lines}
    assert size % 4
    for multiple, samples in ((1, 1), (4, 2)):
        options: dict[str, object] = {"seq_length": 2 * size, "conversation_multiple": multiple, "pack_lines": True}
        assert len(make_dataset(tmp_path, lines, tokenizer, **options)) == samples
