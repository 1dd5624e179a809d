"""The native checkpoint format: whole canonical tensors in safetensors files, whatever the layout that wrote them.

`native` finds, reads and writes step directories; `async_writer` writes them behind the training's back; `protocol` is
how many ranks write one directory; `parts` and `tensor_files` are what is inside; `owners` says which rank writes what.
"""
