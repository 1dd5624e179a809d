"""Names of components, and keys of the configuration, for the shell's completion."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mt_core.plugins import Kind, components

if TYPE_CHECKING:
    from mt_core.config.sections import Section

Completion = Callable[[str], list[tuple[str, str]]]
"""What was typed → the texts that it may become, each with a summary."""


def complete_names(kind: Kind) -> Completion:
    """Make a `typer.Option(autocompletion=…)`: installed names that begin with what was typed, and their summaries."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        installed = components(kind).values()
        return [(each.name, each.summary) for each in installed if each.name.startswith(incomplete)]

    return complete


def complete_settings(load_tree: Callable[[], "type[Section]"]) -> Completion:
    """Make a `typer.Option(autocompletion=…)` for `--set`: keys of a configuration as `section.field=`."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        from mt_core.config.fields import describe_setting, iterate_settings
        from mt_core.errors import MtError

        try:
            settings = dict(iterate_settings(load_tree()))
        except MtError:  # a package is missing; completion is no place to say so
            return []
        return [(f"{key}=", describe_setting(field)) for key, field in settings.items() if key.startswith(incomplete)]

    return complete


preset_names = complete_names("preset")
"""Presets that start with what was typed."""
