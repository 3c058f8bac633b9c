"""tune: search launch configs for one card and somebody's shapes, and write those that win into a table.

A model says which kernels it launches on which shapes. For each of them every candidate that its kernel proposes is
checked against the reference in fp64 by the 2x rule, with its gradients, and only then timed, interleaved with the
config that is used without the user's table. One wins that is faster beyond the spread, and by more than 2 %, and that
every other call can launch that the entry would be for. The table is written after every shape, so that a search can be
stopped at any time, and goes on where it was.
"""

from fastconv.tuning.asked import asked_for, model_of
from fastconv.tuning.search import Search, Searched
from fastconv.tuning.table import TuningError, check_writable

__all__ = ["Search", "Searched", "TuningError", "asked_for", "check_writable", "model_of"]
