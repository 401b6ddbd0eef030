"""The verification ladder: how far a written output is proved, and why not further."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptconv.lazy import exports

if TYPE_CHECKING:
    from ckptconv.verify.ladder import Evidence, climb
    from ckptconv.verify.rungs import LEVELS, Ladder, Rung

__all__ = ["LEVELS", "Evidence", "Ladder", "Rung", "climb"]
__getattr__ = exports(__name__, {"Evidence": "ladder", "climb": "ladder", "LEVELS": "rungs", "Ladder": "rungs", "Rung": "rungs"})
