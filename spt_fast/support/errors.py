"""Exceptions that spt_fast raises besides plain ValueError and TypeError; each is a ValueError."""

from __future__ import annotations


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for a result before it has seen any data.

    An AttributeError too, so that `hasattr(estimator, "cluster_centers_")` is False until then.
    """


class NonFiniteError(ValueError):
    """A pixel, a token, a prompt or what was computed from them is NaN or infinite.

    Each attribute tells where the first one is, counted from 0, or is None where that means nothing.

    Attributes:
        row: of the tensor given, its leading dimensions taken as one.
        image: of the batch or the loader given.
        layer: 0 for block 1, whose prompts or input it is in; L, the number of blocks, for the last output.
        step: of training.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        image: int | None = None,
        layer: int | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(message)
        self.row = row
        self.image = image
        self.layer = layer
        self.step = step


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line; the name of its class where the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
