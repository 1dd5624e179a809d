"""`mt plugins`: what is installed, and what could not be loaded."""

from typing import get_args

from mt_core.plugins import Kind, broken, components, manager, provided


def plugins() -> None:
    """List every component by kind with the plugin that provides it, and plugins that are disabled or broken.

    Example:
      mt plugins
    """
    kinds = get_args(Kind)
    listed = sorted(provided(), key=lambda row: (kinds.index(row[1].kind), row[1].name))
    rows = [(component.kind, component.name, plugin, component.summary) for plugin, component in listed]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    named = manager().list_name_plugin()
    print("plugins:", ", ".join(sorted(name for name, plugin in named if plugin and name not in broken)))
    if disabled := sorted(name for name, plugin in named if plugin is None):
        print("disabled by MT_DISABLE_PLUGINS:", ", ".join(disabled))
    for name, reason in broken.items():
        print(f"broken: {name}: {reason}")
    for kind in kinds:
        components(kind)  # a name that is provided twice is an error, told below the list that shows both
