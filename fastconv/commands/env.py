"""`fastconv env`: versions, devices, what every op runs there and why, and the launch configs that count."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from typing import Any

_DESCRIPTION = (
    "Print versions and devices, which implementation every op takes on each device and why, the tables of launch "
    "configs that count, and where Triton keeps what it compiled."
)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser("env", help="print versions, devices and what ops run there", description=_DESCRIPTION)
    parser.set_defaults(run=_run)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _run(args: argparse.Namespace, command: str) -> int:
    from fastconv.parity import environment

    found = {"environment": environment.describe(), "devices": _devices(), **_triton()}
    print(json.dumps(found, indent=1) if args.json else "\n".join(_lines(found)))
    return 0


def _devices() -> list[dict[str, Any]]:
    from fastconv.parity import backends, environment

    return [
        {
            "device": str(device),
            "name": environment.device_name(device),
            "ops run by": backends.why(device),
            "ops": backends.choices(device),
        }
        for device in environment.devices()
    ]


def _triton() -> dict[str, Any]:
    """What there is where triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return {"TRITON_INTERPRET": None, "triton cache": None, "launch configs": []}
    from fastconv.kernels import _configs
    from fastconv.warmup import cache_folder

    tables = [
        {
            "table": str(table.path),
            "exists": table.exists,
            "entries": len(table.configs),
            "kept as they are": sum(config is None for config in table.configs.values()),
            "devices": sorted({device for _, device, _, _ in table.configs}),
            "ignored": list(table.ignored),
        }
        for table in _configs.tables()
    ]
    return {
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
        "triton cache": cache_folder(),
        "launch configs": tables,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [_line(name, value) for name, value in found["environment"].items()]
    lines += [_line(name, found[name]) for name in ("TRITON_INTERPRET", "triton cache")]
    for table in found["launch configs"]:
        lines.append(_line("launch configs", f"{table['table']}: {_told(table)}"))
        lines += [_line("", f"ignored: {why}") for why in table["ignored"]]
    # The user's is always there, exists or not.
    if len(found["launch configs"]) == 1:
        lines.append(_line("", "of this package: nothing is tuned, the rules in the code count"))
    for device in found["devices"]:
        lines += ["", f"{device['device']}: {device['name']}", f"  {device['ops run by']}"]
        for op, by_dtype in device["ops"].items():
            for text in dict.fromkeys(by_dtype.values()):
                dtypes = ", ".join(name for name, other in by_dtype.items() if other == text)
                lines.append(f"  {op:<20}{dtypes:<18}{text}")
    return lines


def _told(table: dict[str, Any]) -> str:
    if not table["exists"]:
        return "there is none; fastconv tune makes it"
    of = f" for {', '.join(table['devices'])}" if table["devices"] else ""
    return f"{table['entries']} entries{of}, {table['kept as they are']} of them without a better config"


def _line(name: str, value: object) -> str:
    return f"{name:<18}{'-' if value is None else value}"
