"""`mt eval`: a group of the installed evaluation tasks; each is imported when it is run."""

from mt_core.cli.plugin_group import plugin_group

app = plugin_group("eval-task", "Evaluate a checkpoint on a task.")
