"""Vision Transformers: what they are made of, the tokens inside them, and how they are opened."""
