"""`mt plugins`: what is installed, and what could not be loaded."""

from typing import get_args

from mt_core.plugins import Kind, broken, components, manager, provided


def plugins() -> None:
    """List every component by kind with the plugin that provides it, and plugins that are disabled or broken."""
    kinds = get_args(Kind)
    for plugin, component in sorted(provided(), key=lambda row: (kinds.index(row[1].kind), row[1].name)):
        print(f"{component.kind:<12} {component.name:<22} {plugin:<12} {component.summary}")
    named = manager().list_name_plugin()
    print("plugins:", ", ".join(sorted(name for name, plugin in named if plugin and name not in broken)))
    if disabled := sorted(name for name, plugin in named if plugin is None):
        print("disabled by MT_DISABLE_PLUGINS:", ", ".join(disabled))
    for name, reason in broken.items():
        print(f"broken: {name}: {reason}")
    for kind in kinds:
        components(kind)  # a name that is provided twice is an error, told below the list that shows both
