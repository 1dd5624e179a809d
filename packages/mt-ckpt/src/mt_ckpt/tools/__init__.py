"""Tools on whole checkpoints: what one holds, how two differ, and the mean of several."""
