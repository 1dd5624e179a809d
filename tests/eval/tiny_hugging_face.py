"""Small models and tokenizers in Hugging Face's form: one whose texts begin with `<s>`, and one of bytes."""

import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "they",
]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def make_llama_tokenizer(*, template: bool = True) -> Tokenizer:
    """Words spelled as Llama 2's are: a space before the text, then `▁` for spaces; a BOS by the post-processor."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *(f"▁{word}" for word in WORDS),
        *(w for w in WORDS if len(w) > 1),
        *"abdehinostwy",
    ]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(len(piece) < 3)) for piece in dict.fromkeys(pieces)], unk_id=0)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return tokenizer


def make_byte_tokenizer() -> Tokenizer:
    """GPT-2's bytes, without merges; nothing is put before a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def save(directory, model, tokenizer, **named):
    """A Hugging Face directory whose model hardly ever draws a special token."""
    with torch.no_grad():
        model.get_output_embeddings().weight[: 3 if "bos_token" in named else 0] = 0
    model.eval().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def make_llama(tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=64,
        initializer_range=0.6,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def write_llama(directory):
    """A model whose tokenizer.json begins every text with `<s>`."""
    tokenizer = make_llama_tokenizer()
    return save(directory, make_llama(tokenizer), tokenizer, **NAMED)


def write_gpt2(directory):
    """A model whose tokenizer puts nothing before a text."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, eos_token_id=256
    )
    named = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return save(directory, GPT2LMHeadModel(config), make_byte_tokenizer(), **named)
