"""Names of components for the shell's completion."""

from mt_core.plugins import components


def preset_names(incomplete: str) -> list[str]:
    """Presets that start with what was typed."""
    return [name for name in components("preset") if name.startswith(incomplete)]
