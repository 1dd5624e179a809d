"""How tensor parallelism cuts a GPT: the rules of its layers under the names they have in the model."""

from fnmatch import fnmatchcase

from mt_core.parallel.plan import Plan, Rule, Sequence, Vocab
from mt_models.config import GPTConfig
from mt_models.layers import attention, mlp


def plan(config: GPTConfig, tensor: int) -> Plan:
    """The rules for `tensor` ranks."""
    parts = {"attn": attention.plan(config.attention, config.group_copies(tensor)), "mlp": mlp.plan(config.mlp)}
    rules: dict[str, Rule] = {
        f"layers.*.{part}.{name}": rule for part, rules in parts.items() for name, rule in rules.items()
    }
    rules |= {f"layers.*.{norm}": Sequence() for norm in config.block_norms if "." not in norm}
    rules["norm"] = Sequence()
    rules |= {"embed": Vocab(), "loss": Vocab()}
    if config.position.kind == "learned":
        rules["position"] = Sequence()
    if not config.tied:
        rules["head"] = Vocab()
    return rules


def rule_of(config: GPTConfig, module: str, tensor: int) -> Rule:
    """The rule for the module called `module`."""
    return next(rule for pattern, rule in plan(config, tensor).items() if fnmatchcase(module, pattern))
