"""`fastconv verify` as a library: one model by every path on the same text; errors, speed and memory.

`job` says what is done; the rest is what it needs: `text`, `subjects` (which model), `batches`, `paths` (the ways to
run it), `measure`, and what becomes of the `results`: `table`, `plot`.
"""

from fastconv.parity.job import Progress, prepare, verify

__all__ = ["Progress", "prepare", "verify"]
