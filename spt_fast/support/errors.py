"""Exceptions that spt_fast raises besides plain ValueError and TypeError; each is a ValueError."""

from __future__ import annotations


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for a result before it has seen any data.

    An AttributeError too, so that `hasattr(estimator, "cluster_centers_")` is False until then.
    """


class NonFiniteError(ValueError):
    """A token holds NaN or infinity.

    Attributes:
        row: flat index, over the leading dimensions of the tensor given, of the first such token.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def first_line(error: BaseException) -> str:
    """What an error says, shortened to its first line; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
