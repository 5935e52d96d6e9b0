"""Tasks: clean and counterfactual prompts with a metric, from a file of a user's or one that is shipped."""

from .prepare import Half, Prepared, prepare
from .screen import Score, screen
from .task import SHIPPED, Task, load_task

__all__ = ["SHIPPED", "Half", "Prepared", "Score", "Task", "load_task", "prepare", "screen"]
