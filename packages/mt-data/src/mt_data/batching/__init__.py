"""From a dataset to the micro-batches of a rank: sizes of the batches, orders of the samples, and reading ahead."""
