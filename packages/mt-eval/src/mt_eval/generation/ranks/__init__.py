"""One model on several ranks: rank 0 runs the engine, and tells the others what to compute with their parts."""
