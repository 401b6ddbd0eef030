"""The verification ladder: how far a written output is proved, and why not further."""

from __future__ import annotations

from ckptconv.verify.ladder import LEVELS, Evidence, Ladder, Rung, climb

__all__ = ["LEVELS", "Evidence", "Ladder", "Rung", "climb"]
