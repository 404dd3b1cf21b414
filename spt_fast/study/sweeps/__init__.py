"""Sweeps: methods, values and seeds on many tasks, chosen by validation, each run done once."""
