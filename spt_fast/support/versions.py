"""Versions of installed packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


# Reading takes longer than a small build.
@cache
def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def version_facts(*distributions: str) -> dict[str, str]:
    """Metadata for files: "NAME_version" to its version, "unknown" where it runs from a source tree."""
    return {f"{name}_version": installed_version(name) or "unknown" for name in distributions}
