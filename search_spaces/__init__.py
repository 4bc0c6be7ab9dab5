"""Matrices to sweep and spaces to search: plain data and pure functions, standard library only."""
