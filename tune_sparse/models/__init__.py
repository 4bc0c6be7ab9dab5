"""Checkpoints on disk, model classes, and toy models."""
