"""The rule file that a careful person would have written, from names and shapes alone, or the reason why there is none.

The story, one file each: names to modules (``units``, ``words``), what is one tensor here and several there (``joining``), which module is
which (``matching``, ``assigning``), what is left then (``changes``), whether that is a conversion at all (``verdict``), and the text
(``naming``, ``writing``). Nothing is given back that was not parsed, planned on the source and compared with the target.
"""

from __future__ import annotations

from ckptconv.suggest.suggestion import Suggestion, suggest
from ckptconv.suggest.verdict import Cause

__all__ = ["Cause", "Suggestion", "suggest"]
