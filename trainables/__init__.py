"""What Ray runs: the modes, the backends, and the trainable that keeps them warm."""
