"""What this package adds to mt: names, and where they live. Every `mt` imports this file; it imports nothing heavy."""

from collections.abc import Iterable

from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components() -> Iterable[Component]:
    """A checkpoint loader and a command."""
    return [
        Component("ckpt-loader", "nanogpt", "mt_nanogpt.loader:NanoGPT", "nanoGPT's ckpt.pt"),
        Component("command", "count", "mt_nanogpt.command:count", "Count a checkpoint's parameters by part."),
    ]
