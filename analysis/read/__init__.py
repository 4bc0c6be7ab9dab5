"""Readers of finished records."""
