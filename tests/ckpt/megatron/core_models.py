"""megatron-core's GPTs of its own layers on CPU ranks, for configurations of ours, with experts and latent attention.

Its attention core of its own layers cannot be built for latent attention (it takes no `k_channels`), so `PlainCore`
stands in for that: what Megatron tells it and asks it is all that Transformer Engine's gets.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mt_core.distributed.mesh import Axis


def without_cuda() -> None:
    """What megatron-core lacks on this machine. Its router and latent attention name parts of Transformer Engine that
    it has not imported; saving waits for CUDA, and for ever for a writer process, which has died for want of psutil."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    multi_latent_attention.TELinear = type("Absent", (), {})
    moe_utils.te_general_gemm = None
    torch.cuda.synchronize = lambda *_: None
    filesystem_async._process_memory = lambda: 0


def build_their_gpt(axis: Axis, config: Any) -> Any:
    """Their model; Megatron evaluates experts on tensor ranks, but trains them with sequence parallelism only."""
    from parallel.test_against_megatron_core import megatron_model

    if config.mlp.kind == "moe" or config.attention.kind == "mla":
        return with_experts(axis, config).eval()
    return megatron_model(axis, SimpleNamespace(model=config))


def with_experts(axis: Axis, config: Any) -> Any:
    """Their model of gated layers, or experts in all layers but the first ones, with attention of either kind."""
    from megatron.core import transformer
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    latent, experts = config.attention.kind == "mla", config.mlp.kind == "moe"
    kind = transformer.MLATransformerConfig if latent else transformer.TransformerConfig
    settings = _experts(config) if experts else {"ffn_hidden_size": config.mlp.ffn_hidden_size}
    their_config = kind(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm.eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=axis.size,
        **_latent_attention(config) if latent else _attention(config),
        **settings,
    )
    layer = {"qk_layernorm": latent or config.attention.qk_norm, "multi_latent_attention": latent}
    spec = (
        get_gpt_decoder_block_spec(their_config, use_transformer_engine=False, normalization="RMSNorm")
        if experts
        else get_gpt_layer_local_spec(normalization="RMSNorm", **layer)
    )
    for layer_spec in spec.layer_specs if experts else [spec]:
        if latent:
            layer_spec.submodules.self_attention.submodules.core_attention = PlainCore
    return GPTModel(
        their_config,
        spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        position_embedding_type="rope",
        rotary_base=config.position.theta,
        share_embeddings_and_output_weights=config.tied,
    )


def _attention(config: Any) -> dict[str, Any]:
    part = config.attention
    return {
        "num_attention_heads": part.heads,
        "num_query_groups": part.num_kv_heads,
        "kv_channels": part.head_size,
        "qk_layernorm": part.qk_norm,
    }


def _latent_attention(config: Any) -> dict[str, Any]:
    part, yarn = config.attention, config.position.scaling
    settings = {
        "num_attention_heads": part.heads,
        "q_lora_rank": part.q_lora_rank,
        "kv_lora_rank": part.kv_lora_rank,
        "qk_head_dim": part.nope_head_size,
        "qk_pos_emb_head_dim": part.rope_head_size,
        "v_head_dim": part.v_head_size,
        "qk_layernorm": True,
        "rotary_base": config.position.theta,
        "rope_type": "yarn" if yarn else "rope",
    }
    if yarn is not None:
        settings |= {
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "mscale": 1.0 if yarn.mscale is None else yarn.mscale,
            "mscale_all_dim": 0.0 if yarn.mscale_all_dim is None else yarn.mscale_all_dim,
        }
    return settings


def _experts(config: Any) -> dict[str, Any]:
    mlp, dense = config.mlp, config.mlp.dense_layers
    return {
        "ffn_hidden_size": mlp.dense_ffn_hidden_size or mlp.ffn_hidden_size,
        "moe_ffn_hidden_size": mlp.ffn_hidden_size,
        "moe_layer_freq": [0] * dense + [1] * (config.layers - dense) if dense else 1,
        "num_moe_experts": mlp.experts,
        "moe_router_topk": mlp.top_k,
        "moe_router_pre_softmax": mlp.score == "softmax" and not mlp.normalized,
        "moe_router_score_function": mlp.score,
        "moe_router_enable_expert_bias": mlp.expert_bias,
        "moe_router_topk_scaling_factor": mlp.scaling_factor if mlp.scaling_factor != 1 else None,
        "moe_router_num_groups": mlp.groups if mlp.top_groups else None,
        "moe_router_group_topk": mlp.top_groups,
        "moe_shared_expert_intermediate_size": mlp.shared_ffn_hidden_size,
        "moe_shared_expert_gate": mlp.shared_gate,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }


class PlainCore(nn.Module):
    """Attention written out, of keys and values of different widths."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int = 0,
        v_channels: int = 0,
        **more: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale, self.sizes = softmax_scale, (k_channels, v_channels)

    def forward(self, q_TBHK: Tensor, k_TBHK: Tensor, v_TBHV: Tensor, mask: Tensor, **more: Any) -> Tensor:
        """[T, B, H, K], the same and [T, B, H, V] to [T, B, H·V]; the mask is true where a token does not see one."""
        assert (q_TBHK.shape[-1], v_TBHV.shape[-1]) == self.sizes
        scores_BHTS = torch.einsum("tbhk,sbhk->bhts", q_TBHK, k_TBHK) * self.softmax_scale
        weights_BHTS = scores_BHTS.masked_fill(mask, -torch.inf).softmax(-1)
        return torch.einsum("bhts,sbhv->tbhv", weights_BHTS, v_TBHV).flatten(2)
