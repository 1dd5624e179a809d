"""Names of components for the shell's completion."""

from collections.abc import Callable

from mt_core.plugins import Kind, components


def names(kind: Kind) -> Callable[[str], list[tuple[str, str]]]:
    """For `typer.Option(autocompletion=…)`: installed names that start with what was typed, and their summaries."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        installed = components(kind).values()
        return [(component.name, component.summary) for component in installed if component.name.startswith(incomplete)]

    return complete


preset_names = names("preset")
"""Presets that start with what was typed."""
