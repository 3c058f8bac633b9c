"""Text generation."""

from __future__ import annotations


class Generation:
    """Placeholder."""
