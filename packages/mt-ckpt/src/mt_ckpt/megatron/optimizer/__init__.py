"""The ways Megatron stores an optimizer's state, each in a file under Megatron's own name for it."""
