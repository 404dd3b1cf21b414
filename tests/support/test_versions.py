"""Versions of installed packages."""

from __future__ import annotations

import torch

from spt_fast.support.versions import installed_version, version_facts


def test_versions_are_those_of_the_packages() -> None:
    assert installed_version("torch") == torch.__version__.partition("+")[0]


def test_what_is_not_installed_has_none() -> None:
    assert installed_version("no-such-package") is None
    assert version_facts("no-such-package") == {"no-such-package_version": "unknown"}
