"""Configuration: sections, loading from TOML with presets and overrides, and rules between fields."""
