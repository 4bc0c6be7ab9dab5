"""Merged models that leave the system, and their model cards."""
