"""Tasks, their examples and prompts, and batches of token ids."""
