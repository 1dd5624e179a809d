"""Model families composed of parts, their layers and presets."""
