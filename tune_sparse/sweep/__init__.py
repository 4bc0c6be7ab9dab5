"""A sweep: its plan, its forecast, and Ray Tune running it."""
