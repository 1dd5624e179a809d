"""Configuration of models as parts; torch-free, so `mt config` starts fast.

A family (GPT-2, Llama, Mistral, …) is a preset of these values, never a name in code.
"""

from mt_models.config.attention import GQA
from mt_models.config.bert import BertConfig
from mt_models.config.dropout import Dropout
from mt_models.config.gpt import GPTConfig
from mt_models.config.mla import MLA
from mt_models.config.mlp import Dense, Gated
from mt_models.config.moe import MoE
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.position import Learned, Linear, Llama3, NoPosition, Relative, Rope, YaRN
from mt_models.config.t5 import T5Config
from mt_models.config.task_head import HEAD_MODULES, HEADS, ClassificationHead, MultipleChoiceHead, RegressionHead
from mt_models.config.transformer import TransformerSection

TransformerConfig = GPTConfig | BertConfig | T5Config
"""Any model of mt-models."""

__all__ = [
    "GQA",
    "HEADS",
    "HEAD_MODULES",
    "MLA",
    "BertConfig",
    "ClassificationHead",
    "Dense",
    "Dropout",
    "GPTConfig",
    "Gated",
    "LayerNorm",
    "Learned",
    "Linear",
    "Llama3",
    "MoE",
    "MultipleChoiceHead",
    "NoPosition",
    "RMSNorm",
    "RegressionHead",
    "Relative",
    "Rope",
    "T5Config",
    "TransformerConfig",
    "TransformerSection",
    "YaRN",
]
