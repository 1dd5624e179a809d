"""How tensor parallelism cuts each model: the rules of its layers under the names they have in the model."""

from collections.abc import Iterable, Mapping

from mt_core.parallel.tensor.plan import Column, Plan, Replicate, Rule, Sequence, Vocab
from mt_models.config import BertConfig, GPTConfig, T5Config, TransformerConfig
from mt_models.config.lora import Lora
from mt_models.layers import attention, mla, mlp


def plan(config: TransformerConfig, tensor: int) -> Plan:
    """The rules for `tensor` ranks."""
    match config:
        case GPTConfig():
            return _gpt(config, tensor)
        case BertConfig():
            return _bert(config, tensor)
        case T5Config():
            return _t5(config, tensor)


def _gpt(config: GPTConfig, tensor: int) -> Plan:
    rules = _blocks("layers", _parts(config, tensor, config.lora), config.block_norms)
    rules |= {"norm": Sequence(), "embed_dropout": Sequence(), "embed": Vocab(), "loss": Vocab()}
    if config.position.kind == "learned":
        rules["position"] = Sequence()
    if not config.tied:
        rules["head"] = Vocab()
    return rules


def _bert(config: BertConfig, tensor: int) -> Plan:
    rules = _blocks("layers", _parts(config, tensor), ("attn_norm", "mlp_norm"))
    whole = ["position", "first_token", "embed_dropout", "embed_norm" if config.norm_place == "after" else "norm"]
    whole += ["token_type"] if config.token_types else []
    whole += ["lm_head.dense", "lm_head.norm"] if config.lm_head else []
    rules |= {name: Sequence() for name in whole} | {"embed": Vocab()}
    rules |= {name: Replicate() for name in ("pooler", "binary_head", "task_head") if getattr(config, name)}
    return rules | ({"head": Vocab(), "loss": Vocab()} if config.lm_head else {})


def _t5(config: T5Config, tensor: int) -> Plan:
    rules: dict[str, Rule] = {"embed": Vocab(), "loss": Vocab()}
    cross = attention.cross_plan(config.attention, config.attention.count_kv_replicas(tensor))
    for stack, more in (("encoder", {}), ("decoder", {"cross": cross})):
        rules |= _blocks(f"{stack}.layers", _parts(config, tensor) | more, config.block_norms(stack))
        rules |= {f"{stack}.norm": Sequence()} if config.final_norm else {}
        rules[f"{stack}.embed_dropout"] = Sequence()
        if config.position.kind == "relative":
            rules[f"{stack}.relative"] = Column(dim=1)
    if config.position.kind == "learned":
        rules["position"] = Sequence()
    if config.head_bias or not config.tied:
        rules["head"] = Vocab()
    return rules


def _parts(config: TransformerConfig, tensor: int, lora: Lora | None = None) -> dict[str, Plan]:
    """The rules of the parts of a block."""
    part = config.attention
    heads = mla.plan(part) if part.kind == "mla" else attention.plan(part, part.count_kv_replicas(tensor), lora)
    return {"attn": heads, "mlp": mlp.plan(config.mlp, lora)}


def _blocks(prefix: str, parts: Mapping[str, Plan], norms: Iterable[str]) -> dict[str, Rule]:
    rules = {f"{prefix}.*.{part}.{name}": rule for part, plan in parts.items() for name, rule in plan.items()}
    rules |= {f"{prefix}.*.{part}_dropout": Sequence() for part in parts}
    return rules | {f"{prefix}.*.{norm}": Sequence() for norm in norms}
