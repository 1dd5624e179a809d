"""What mt-ckpt provides: the `ckpt` command, and checkpoint formats by name."""

from collections.abc import Iterable

from mt_core.plugins import Component, hookimpl

REQUIRES = ("mt-ckpt",)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Components of mt-ckpt."""
    return [
        Component("command", "ckpt", "mt_ckpt.command:app", "Convert and inspect checkpoints", REQUIRES),
        Component("ckpt-loader", "native", "mt_ckpt.loaders.native:Native", "mt's own format", REQUIRES),
        Component(
            "ckpt-loader", "hf", "mt_ckpt.loaders.hf:HuggingFace", "Hugging Face: Llama, Mistral, GPT-2", REQUIRES
        ),
        Component(
            "ckpt-loader",
            "llama_mistral",
            "mt_ckpt.loaders.llama_mistral:llama_mistral",
            "Hugging Face: Llama and Mistral only, by Megatron's name",
            REQUIRES,
        ),
        Component("ckpt-saver", "native", "mt_ckpt.savers.native:save", "mt's own format", REQUIRES),
        Component("ckpt-saver", "hf", "mt_ckpt.savers.hf:save", "Hugging Face: Llama, Mistral or GPT-2", REQUIRES),
    ]
