"""Context parallelism: the sequence is shared over an axis; an exchange lets attention see across the shares."""
