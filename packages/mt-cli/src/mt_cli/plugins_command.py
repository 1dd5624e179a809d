"""`mt plugins`: what is installed, and what could not be loaded."""

from typing import get_args

from mt_core.plugins import Kind, broken, components, manager


def plugins() -> None:
    """List every component by kind, the plugins that provide them, and plugins that are broken."""
    for kind in get_args(Kind):
        for component in components(kind).values():
            print(f"{kind:<12} {component.name:<24} {component.summary}")
    print("plugins:", ", ".join(sorted(str(name) for name, _ in manager().list_name_plugin())))
    for name, reason in broken.items():
        print(f"broken: {name}: {reason}")
