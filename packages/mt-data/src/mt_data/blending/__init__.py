"""Several corpora as one dataset: the order in which they are interleaved and the datasets of each split."""
