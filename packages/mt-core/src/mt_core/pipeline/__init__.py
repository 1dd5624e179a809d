"""Pipeline schedules as data, their simulator, and which layers a stage has. Torch-free.

Start at `mt_core.pipeline.schedule_table.build_schedule` and `mt_core.pipeline.simulator.simulate`.
"""
