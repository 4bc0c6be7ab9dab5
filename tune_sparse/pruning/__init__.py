"""Scores, allocations and masks, and whole models pruned by them."""
