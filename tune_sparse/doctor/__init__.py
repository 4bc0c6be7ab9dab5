"""Checks of a machine, a Ray cluster and a Cerebras environment."""
