"""The GPT dataset: fixed-length samples cut from shuffled, concatenated documents, in Megatron's order."""
