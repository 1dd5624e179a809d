"""Expert parallelism: each rank holds some of the experts, and tokens are sent to the ranks of theirs."""
