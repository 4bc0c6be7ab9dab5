"""The search for sub-adapters: Optuna through Ray Tune."""
