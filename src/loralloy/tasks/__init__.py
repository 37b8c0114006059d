"""Tasks: a YAML file each, read alike by retrieval, training and evaluation."""

from __future__ import annotations

from .task import Column, Example, Splits, Task, load_tasks

__all__ = ["Column", "Example", "Splits", "Task", "load_tasks"]
