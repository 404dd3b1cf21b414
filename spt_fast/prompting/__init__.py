"""A frozen Vision Transformer with learnable prompts (Sec. 3.1, 3.3)."""
