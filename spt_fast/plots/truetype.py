"""A figure whose PDF and PostScript files hold TrueType fonts, whatever the user's settings.

Imports matplotlib: to be imported when a figure is made, not before.
"""

from __future__ import annotations

from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure


class TrueTypeFigure(Figure):
    """matplotlib's `Figure`, apart from the fonts that it saves."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """`Figure.savefig`, with TrueType fonts (type 42) in PDF and PostScript.

        The fonts of a `PdfPages` are those of the user's settings, since it writes them when it is closed.
        """
        # Matplotlib's own choice is Type 3, which journals and conferences refuse.
        fonts: dict[Any, int] = {"pdf.fonttype": 42, "ps.fonttype": 42}
        with rc_context({} if isinstance(fname, PdfPages) else fonts):
            super().savefig(fname, **options)
