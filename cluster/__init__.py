"""How machines are obtained: the pinned environment (constraints.txt)."""
