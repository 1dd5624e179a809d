"""Megatron-Core's models of Transformer Engine's layers on one GPU, for configurations of ours, and runs of them.

TF32 is off: the engine multiplies fp32 matrices in it whatever torch is told, but for NVIDIA_TF32_OVERRIDE.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ckpt.megatron.test_encoders_oracle import READ_BS, TOKENS_BT, TYPES_BT
from mt_models.config import BertConfig, GPTConfig, T5Config

SHARED: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 32,
    "vocab_size": 64,
    "max_seq_len": 16,
    "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 16},
    "mlp": {"kind": "gated", "ffn_hidden_size": 48},
    "norm": {"kind": "rms", "eps": 1e-6},
    "position": {"kind": "rope", "theta": 500.0},
    "vocab_divisor": 8,
}
"""Sizes are multiples of 16, as FP8 wants them."""
BIASED: dict[str, Any] = {
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 16, "qkv_bias": True, "out_bias": True},
    "mlp": {"kind": "dense", "ffn_hidden_size": 48, "activation": "gelu_tanh", "bias": True},
    "norm": {"kind": "layer"},
}
LEARNED: dict[str, Any] = {"position": {"kind": "learned"}, "tied": True}
NORMED = {"attention": SHARED["attention"] | {"qk_norm": True}}
EXPERTS = {"mlp": {"kind": "moe", "ffn_hidden_size": 48, "experts": 4, "top_k": 2}}
ENCODER = {name: value for name, value in SHARED.items() if name != "position"}
RELATIVE: dict[str, Any] = {
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 16},
    "position": {"kind": "relative", "buckets": 8, "max_distance": 20},
    "tied": False,
}


@dataclass(frozen=True)
class Case:
    """A model, and whether a layer's experts are one grouped product or linear layers of their own."""

    config: Any
    grouped: bool = False


CASES = {
    "llama": Case(GPTConfig.model_validate(SHARED)),
    "gpt2": Case(GPTConfig.model_validate(SHARED | BIASED | LEARNED)),
    "q and k norms": Case(GPTConfig.model_validate(SHARED | NORMED)),
    "grouped experts": Case(GPTConfig.model_validate(SHARED | NORMED | EXPERTS), grouped=True),
    "sequential experts": Case(GPTConfig.model_validate(SHARED | EXPERTS)),
    "bert": Case(BertConfig.model_validate(ENCODER | BIASED | {"head_activation": "gelu"})),
    "t5": Case(T5Config.model_validate(ENCODER | BIASED | LEARNED | {"decoder_layers": 3, "head_bias": True})),
    "relative t5": Case(T5Config.model_validate(ENCODER | RELATIVE | {"decoder_layers": 3})),
}


def start() -> None:
    """Megatron's groups of this process alone, over NCCL, in place of those that it was started with."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    dist.destroy_process_group()
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{mkdtemp()}/meet", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def build(case: Case, **changes: Any) -> Any:
    """Their model; `changes` are to their configuration."""
    return {"gpt": _gpt, "bert": _bert, "t5": _t5}[case.config.kind](case, **changes).cuda()


def _their_config(config: Any, layers: int, **changes: Any) -> Any:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    part, mlp = config.attention, config.mlp
    settings: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": part.heads,
        "num_query_groups": part.num_kv_heads,
        "kv_channels": part.head_size,
        "ffn_hidden_size": mlp.ffn_hidden_size,
        "normalization": "RMSNorm" if config.norm.kind == "rms" else "LayerNorm",
        "layernorm_epsilon": config.norm.eps,
        "qk_layernorm": part.qk_norm,
        "add_bias_linear": part.out_bias,
        "gated_linear_unit": mlp.kind != "dense",
        "activation_func": F.gelu if mlp.kind == "dense" else F.silu,
        "bias_activation_fusion": mlp.kind == "dense",  # the tanh approximation
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_backend": AttnBackend.unfused,
    }
    if mlp.kind == "moe":
        settings |= {
            "num_moe_experts": mlp.experts,
            "moe_router_topk": mlp.top_k,
            "moe_router_pre_softmax": not mlp.normalized,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
        }
    return TransformerConfig(**settings | changes)


def _gpt(case: Case, **changes: Any) -> Any:
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    config = case.config
    experts: dict[str, Any] = {"num_experts": config.mlp.experts} if config.mlp.kind == "moe" else {}
    grouped: dict[str, Any] = {"moe_grouped_gemm": case.grouped}
    rope = config.position.kind == "rope"
    return GPTModel(
        _their_config(config, config.layers, **grouped, **changes),
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.attention.qk_norm, **experts, **grouped
        ),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=int(config.position.theta) if rope else 10_000,
        share_embeddings_and_output_weights=config.tied,
    )


def _bert(case: Case, **changes: Any) -> Any:
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.bert.bert_model import BertModel

    config = case.config
    return BertModel(
        _their_config(config, config.layers, **changes),
        num_tokentypes=config.token_types,
        transformer_layer_spec=bert_layer_specs.get_bert_layer_with_transformer_engine_spec(),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        share_embeddings_and_output_weights=True,
        add_binary_head=config.binary_head,
    )


def _t5(case: Case, **changes: Any) -> Any:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    config, relative = case.config, case.config.position.kind == "relative"
    encoder: Any = t5_spec.get_t5_encoder_with_transformer_engine_block_spec(config.layers)
    decoder: Any = t5_spec.get_t5_decoder_with_transformer_engine_block_spec(config.decoder_layers)
    more: dict[str, Any] = {} if not relative else {
        "relative_attention_num_buckets": config.position.buckets,
        "relative_attention_max_distance": config.position.max_distance,
    }  # fmt: skip
    return T5Model(
        _their_config(config, config.decoder_layers, **changes),
        _their_config(config, config.layers, **changes),
        encoder,
        decoder,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        share_embeddings_and_output_weights=config.tied,
        position_embedding_type="relative" if relative else "learned_absolute",
        **more,
    )


@torch.no_grad()
def compute_their_logits(model: Any, kind: str) -> list[Tensor]:
    """Logits of the language-model head, and of BERT's binary head."""
    tokens_BT, read_BS, types_BT = TOKENS_BT.cuda(), READ_BS.cuda(), TYPES_BT.cuda()
    if kind == "bert":
        outputs = model(tokens_BT, torch.ones_like(tokens_BT), tokentype_ids=types_BT)
    elif kind == "t5":
        seen = torch.zeros(len(read_BS), 1, 1, read_BS.shape[1], dtype=torch.bool, device="cuda")
        outputs = [model(read_BS, tokens_BT, seen, None, (seen, seen))]
    else:
        outputs = [model(tokens_BT, torch.arange(tokens_BT.shape[1]).cuda().expand_as(tokens_BT), None)]
    return [logits.cpu() for logits in outputs]


def train_steps(model: Any, steps: int) -> None:
    """Train a GPT by plain gradient descent, on 16 tokens: FP8 wants a multiple of that."""
    tokens_BT = TOKENS_BT[:, :8].cuda()
    positions_BT = torch.arange(tokens_BT.shape[1]).cuda().expand_as(tokens_BT)
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(tokens_BT, positions_BT, None, labels=tokens_BT.roll(-1, 1)).mean().backward()
        descent.step()
        descent.zero_grad()


@dataclass(frozen=True)
class Run:
    """A bf16 model and its distributed optimizer."""

    model: Any
    optimizer: Any

    def step(self, number: int) -> None:
        """A step on random gradients of that number."""
        random = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=random) / 8)
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """By their names."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.model.named_parameters()}

    def states(self, keys: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
        """Their name of each parameter → what the optimizer holds of it in memory."""
        (one,) = self.optimizer.chained_optimizers
        states: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            state = one._get_main_param_and_optimizer_states(parameter)
            states[name] = {key: state[key].detach().reshape(parameter.shape).to("cpu", copy=True) for key in keys}
        return states


def build_run(case: Case) -> Run:
    """A run of random weights, before its first step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build(case, bf16=True, params_dtype=torch.bfloat16).bfloat16()
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    values: dict[str, Any] = {"optimizer": "adam", "lr": 1e-2, "bf16": True, "params_dtype": torch.bfloat16}
    config = OptimizerConfig(use_distributed_optimizer=True, weight_decay=0.1, clip_grad=1.0, **values)
    return Run(model, get_megatron_optimizer(config, [DistributedDataParallel(model.config, settings, model)]))


def rank_directory(root: Path) -> Path:
    """The directory of the only rank of a checkpoint's only iteration."""
    (directory,) = root.glob("*/mp_rank_00")
    return directory
