"""`spt-fast demo`: SPT-Deep, VPT-Deep (tuned, and frozen) and a linear probe on a few shipped digits.

How task, budget and learning rates were chosen, and what to expect, is in docs/demo.md. All numbers are
measured by the run that prints them.
"""
