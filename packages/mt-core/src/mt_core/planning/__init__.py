"""What a run would need and take on GPUs that are not there: legality of a layout, memory, communication, step time.

Torch-free. Start at `mt_core.planning.plan.plan`.
"""
