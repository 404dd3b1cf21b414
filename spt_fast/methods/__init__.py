"""Methods: what takes a model of timm over and learns a part of it; one file each."""

from spt_fast.methods.registry import load_tuned, names, options, tune

__all__ = ["load_tuned", "names", "options", "tune"]
