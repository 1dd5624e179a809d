"""Evaluation tasks: the arithmetic of each in its own file, their commands in `command.py`."""
