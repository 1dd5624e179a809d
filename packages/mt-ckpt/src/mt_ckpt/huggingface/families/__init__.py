"""Hugging Face model families that ours can be: tables each."""

from mt_ckpt.huggingface.families.bert import BERT, MEGATRON_BERT
from mt_ckpt.huggingface.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from mt_ckpt.huggingface.families.family import Family
from mt_ckpt.huggingface.families.gemma import GEMMA, GEMMA2
from mt_ckpt.huggingface.families.gpt2 import GPT2
from mt_ckpt.huggingface.families.llama import LLAMA, MISTRAL
from mt_ckpt.huggingface.families.moe import MIXTRAL, QWEN3_MOE
from mt_ckpt.huggingface.families.phi3 import PHI3
from mt_ckpt.huggingface.families.qwen import QWEN2, QWEN3
from mt_ckpt.huggingface.families.t5 import T5

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        GPT2,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GEMMA,
        GEMMA2,
        PHI3,
        BERT,
        MEGATRON_BERT,
        T5,
    )
}
"""By config.json's model_type, in the order in which the `hf` saver tries them."""
