"""The `mt` command line."""
