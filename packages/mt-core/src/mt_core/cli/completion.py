"""Names of components for the shell's completion."""

from collections.abc import Callable

from mt_core.plugins import Kind, components


def complete_names(kind: Kind) -> Callable[[str], list[tuple[str, str]]]:
    """Make a `typer.Option(autocompletion=…)`: installed names that begin with what was typed, and their summaries."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        installed = components(kind).values()
        return [(each.name, each.summary) for each in installed if each.name.startswith(incomplete)]

    return complete


preset_names = complete_names("preset")
"""Presets that start with what was typed."""
