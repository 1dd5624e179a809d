"""BERT, whose norms come after each sum, and Megatron-BERT, whose norms come before.

Which heads a file has is known from its tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.ignored_keys import ANY, IGNORED
from mt_ckpt.tensor_streams.names import Names
from mt_models.config import BertConfig

BLOCK = {
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.out",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
NORMS_AFTER = {"attention.output.LayerNorm": "attn_norm", "output.LayerNorm": "mlp_norm"}
NORMS_BEFORE = {"attention.ln": "attn_norm", "ln": "mlp_norm"}
HEADS = {
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.seq_relationship": "binary_head",
    "classifier": "task_head",
}
WEIGHTS = {
    **{
        f"bert.embeddings.{theirs}_embeddings.weight": f"{ours}.weight"
        for theirs, ours in (("word", "embed"), ("position", "position"), ("token_type", "token_type"))
    },
    "cls.predictions.bias": "head.bias",
    "cls.predictions.decoder.weight": "head.weight",  # a copy of the embedding in old files
}


def _names(norms: dict[str, str], norm: dict[str, str]) -> Names:
    modules = {
        **{f"bert.encoder.layer.{{n}}.{theirs}": f"layers.{{n}}.{ours}" for theirs, ours in (BLOCK | norms).items()},
        **norm,
        **HEADS,
    }

    def leaves(weight: str, bias: str) -> dict[str, str]:
        pairs = ((weight, "weight"), (bias, "bias"))
        return {f"{theirs}.{leaf}": f"{ours}.{part}" for theirs, ours in modules.items() for leaf, part in pairs}

    return Names(
        WEIGHTS | leaves("weight", "bias"),
        # names of norms in the first files; one tensor with predictions.bias, of which safetensors keep one
        also=leaves("gamma", "beta") | {"cls.predictions.decoder.bias": "head.bias"},
        ignore=(r"\.position_ids$",),  # a buffer
    )


KEYS = {
    "layers": Key("num_hidden_layers"),
    "hidden_size": Key("hidden_size"),
    "vocab_size": Key("vocab_size"),
    "max_seq_len": Key("max_position_embeddings"),
    "token_types": Key("type_vocab_size", 2),
    "attention.heads": Key("num_attention_heads"),
    "mlp.ffn_hidden_size": Key("intermediate_size"),
    "mlp.activation": Key(
        "hidden_act",
        "gelu",
        {"gelu_tanh": "gelu_new", "squared_relu": "relu2"},
        {"gelu_pytorch_tanh": "gelu_tanh"},
    ),
    "norm.eps": Key("layer_norm_eps", 1e-12),
    "init_std": Key("initializer_range", 0.02),
    "dropout.attention": Key("attention_probs_dropout_prob", 0.1),
    "dropout.embedding": Key("hidden_dropout_prob", 0.1),
    "dropout.hidden": Key("hidden_dropout_prob", 0.1),  # the last of a name is what is written
}
ALWAYS: dict[str, Any] = {
    "attention.kind": "gqa",
    "attention.num_kv_heads": lambda raw: raw["num_attention_heads"],
    "attention.head_size": lambda raw: raw["hidden_size"] // raw["num_attention_heads"],
    "attention.qkv_bias": True,
    "attention.out_bias": True,
    "mlp.kind": "dense",
    "mlp.bias": True,
    "norm.kind": "layer",
}
HEAD_TENSORS = {
    "lm_head": "cls.predictions.transform.dense.weight",
    "pooler": "bert.pooler.dense.weight",
    "binary_head": "cls.seq_relationship.weight",
}
CLASSES = {  # lm_head, pooler, binary_head
    (True, True, True): "ForPreTraining",
    (True, False, False): "ForMaskedLM",
    (False, True, True): "ForNextSentencePrediction",
    (False, True, False): "Model",
    (False, False, False): "Model",
}


TASK_CLASSES = {
    "classification": "ForSequenceClassification",
    "multiple_choice": "ForMultipleChoice",
    "regression": "ForSequenceClassification",
}
"""Our kind of a task's head to the class that has one layer for it, called classifier; with one label, for numbers."""
REGRESSION, CLASSIFICATION = "regression", "single_label_classification"
"""What files call the problem; without it, one label is a regression."""


def _heads(config: BertConfig) -> tuple[bool, bool, bool]:
    return config.lm_head, config.pooler, config.binary_head


def _get_architecture(raw: Mapping[str, Any]) -> str:
    """The class that wrote a file, if config.json names one."""
    classes = raw.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""


def _count_labels(raw: Mapping[str, Any]) -> Any:
    labels = raw.get("id2label")
    return len(labels) if isinstance(labels, Mapping) and labels else raw.get("num_labels", 2)


def _read_task_head(raw: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any] | None:
    """The head of a task, of which the class that wrote the file says what it is for."""
    architecture = _get_architecture(raw)
    kind = next((kind for kind, suffix in TASK_CLASSES.items() if architecture.endswith(suffix)), None)
    if kind is None or "classifier.weight" not in names:
        return None
    if kind == "classification" and _count_labels(raw) == 1:
        return {"kind": "regression"}
    return {"kind": kind} | ({"classes": _count_labels(raw)} if kind == "classification" else {})


def _task_complaints(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Tasks that are neither a choice among classes nor one number."""
    if not _get_architecture(raw).endswith(TASK_CLASSES["classification"]):
        return
    labels, problem = _count_labels(raw), raw.get("problem_type")
    if not isinstance(labels, int) or labels < 1:
        yield f"num_labels is {labels!r}", "1 or more"
    elif problem not in (None, wanted := REGRESSION if labels == 1 else CLASSIFICATION):
        yield f"problem_type is {problem!r}", f"with num_labels = {labels} only {wanted!r} is implemented"


def _write_task(stem: str, config: BertConfig) -> Iterator[tuple[str, Any]]:
    """The class of a model with these heads, and as many names of classes as it has."""
    head = config.task_head
    suffix = TASK_CLASSES[head.kind] if head else CLASSES.get(_heads(config), "ForPreTraining")
    yield "architectures", [stem + suffix]
    if head and head.kind == "regression":
        yield "problem_type", REGRESSION
    if head and head.kind != "multiple_choice":
        labels = [f"LABEL_{n}" for n in range(head.logits)]
        yield "id2label", {str(n): label for n, label in enumerate(labels)}
        yield "label2id", {label: n for n, label in enumerate(labels)}


def _has_head(path: str) -> Callable[[Mapping[str, Any], frozenset[str]], bool]:
    """A head is there if its tensor is, or if the class that wrote the file has it."""
    position = list(HEAD_TENSORS).index(path)

    def has_head(raw: Mapping[str, Any], names: frozenset[str]) -> bool:
        suffixes = [suffix for heads, suffix in CLASSES.items() if heads[position] and suffix != "Model"]
        written_by = _get_architecture(raw)
        return HEAD_TENSORS[path] in names or (path != "pooler" and written_by.endswith(tuple(suffixes)))

    return has_head


def _limits(config: BertConfig) -> Iterator[str]:
    if _heads(config) not in CLASSES:
        yield f"lm_head = {config.lm_head}, pooler = {config.pooler}, binary_head = {config.binary_head} together"
    if config.head_activation not in (None, config.mlp.activation):
        yield f"head_activation = {config.head_activation!r} with mlp.activation = {config.mlp.activation!r}"
    if not config.token_types:
        yield "token_types = 0"


def _family(model_type: str, stem: str, place: str, names: Names) -> Family:
    return Family(
        config=BertConfig,
        model_type=model_type,
        architecture=f"{stem}ForPreTraining",
        base=f"{stem}Model",
        prefix="bert.",
        names=names,
        keys=KEYS,
        always=ALWAYS | {"norm_place": place},
        token_ids={"pad_token_id": 0},
        from_tensor_names={path: _has_head(path) for path in HEAD_TENSORS} | {"task_head": _read_task_head},
        also_written=lambda config: _write_task(stem, config),
        complaints=_task_complaints,
        ignored=IGNORED | {"is_causal": ANY},  # it has no causal mask to leave out
        required={
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        limits=_limits,
    )


BERT = _family("bert", "Bert", "after", _names(NORMS_AFTER, {"bert.embeddings.LayerNorm": "embed_norm"}))
MEGATRON_BERT = _family("megatron-bert", "MegatronBert", "before", _names(NORMS_BEFORE, {"bert.encoder.ln": "norm"}))
