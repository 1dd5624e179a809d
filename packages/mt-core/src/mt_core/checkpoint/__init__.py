"""The native checkpoint format: whole canonical tensors in safetensors files, whatever the layout that wrote them.

`native` finds, reads and prunes step directories; `step_writer` writes one, `async_save` behind the training's back;
`commit_protocol` is how many ranks write one directory; `shard_files`, `safetensors_io` and `streaming` are what is
inside; `gather` collects whole tensors on the rank that writes them; `page_cache` gives memory back.
"""
