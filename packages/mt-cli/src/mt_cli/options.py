"""Where a configuration comes from: the argument and options that `mt train`, `config`, `plan` and `verify` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mt_core.cli.completion import complete_settings, preset_names

if TYPE_CHECKING:
    from mt_core.config.sections import Section

CONFIGURATION = "Configuration"
"""Title of these options in help."""


def _load_tree() -> "type[Section]":
    from mt_cli.run_config import run_config_type

    return run_config_type()


Files = Annotated[
    list[Path] | None, typer.Argument(help="TOML files; later ones override earlier ones.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one value: section.field=value.",
        autocompletion=complete_settings(_load_tree),
        rich_help_panel=CONFIGURATION,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Start from this preset.", autocompletion=preset_names, rich_help_panel=CONFIGURATION),
]
