"""Plans with a pipeline: what each of its ranks needs, all schedules compared, a picture of one."""
