"""Scoring of models on tasks, and validation of pruned models."""
