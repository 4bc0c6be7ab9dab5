"""Ray runs these: the pipeline of a cell, its backends and modes, and the trainable that keeps them warm."""
