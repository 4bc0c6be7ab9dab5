"""Runs, their records, and the results folder that holds them."""
