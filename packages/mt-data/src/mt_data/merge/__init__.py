"""`mt data merge`: several `.bin`/`.idx` pairs to one, as Megatron's `add_index` joins them.

Source: docs/specs/data.md §1.7.
"""
