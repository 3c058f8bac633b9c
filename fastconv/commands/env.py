"""`fastconv env`: versions and devices."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser("env", help="print versions and devices", description="Print versions and devices.")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, command: str) -> int:
    from fastconv.parity import environment

    for name, value in environment.describe().items():
        print(f"{name:<16}{'-' if value is None else value}")
    return 0
