"""The parallel core of mt. Importing it imports no torch; `mt_core.training` and `mt_core.checkpoint` need it."""
