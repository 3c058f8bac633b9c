"""Lets pytest find the modules beside this file, as python finds them for a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
