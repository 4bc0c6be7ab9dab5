"""LoRA with masks: layers, adapter files, and slices of a super-adapter."""
