"""Checkpoints of Megatron's old model classes, of 2019 to 2025: the `torch` format only, checkpoint versions 0 to 3.

They are read and written as Megatron-Core's files are, under other names (`names`), with other orders of rows
(`ranks`) and with args that may be scant or absent (`arguments`). Specification:
docs/specs/checkpoints.md §1.2, §3.1, §3.9.
"""
