"""mt's own format as a loader and a saver; `mt_core.checkpoint` reads and writes it."""
