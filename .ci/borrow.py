"""Let another virtual environment borrow the packages of the one that runs this script.

usage: LENDER/bin/python .ci/borrow.py BORROWER

What the borrower holds itself comes first: so an environment with another transformers or triton costs their size only.
"""

import site
import subprocess
import sys
from pathlib import Path

lender = site.getsitepackages()[0]
borrower = Path(sys.argv[1]).absolute() / "bin" / "python"
target = subprocess.run(
    [borrower, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
).stdout.strip()
# addsitedir, not the bare path: the lender's own .pth files (editable installs) must count too.
(Path(target) / "borrowed.pth").write_text(f"import site; site.addsitedir({lender!r})\n")
