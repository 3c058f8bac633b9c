"""How plots look: colours of what runs and of what it runs on, markers, matplotlib's settings."""

from __future__ import annotations

from typing import Any

# Name -> on white, on black. Those of lines are Paul Tol's "muted" and Okabe and Ito's, which colour-blind people tell
# apart; markers and dashes say the same once more.
COLORS = {
    "ink": ("#1c2531", "#e7ebf0"),
    "faint": ("#5d6876", "#9aa5b1"),
    "line": ("#dde2e8", "#323b46"),
    "paper": ("#fffffe", "#14191f"),
    "bad": ("#b8321e", "#ff8a75"),
    "own": ("#0072b1", "#56b4e8"),
    "own-2": ("#44aa98", "#5cc9b6"),
    "own-3": ("#332287", "#a59df0"),
    "own-4": ("#88bfe8", "#2f7fb8"),
    "rival": ("#d55e01", "#f28e43"),
    "rival-2": ("#c98f00", "#e9bf4b"),
    "rival-3": ("#aa4498", "#dc8bcd"),
    "other": ("#7b8490", "#a3adb8"),
    "other-2": ("#117732", "#58bd7b"),
    "other-3": ("#882254", "#dd7fae"),
    "other-4": ("#8a8a2b", "#c5c55e"),
}
_LABELS = {  # what runs -> its colour in every plot
    "fastconv": "own",
    "fastconv remove": "own-2",
    "fastconv graphs": "own-3",
    "fastconv logits": "own-4",
    "fastconv compile": "own-3",
    "HF": "rival",
    "HF compile": "rival-2",
    "torch": "rival-3",
    "torch compile": "rival-2",
    "bmm": "rival-3",
    "SDPA": "rival-3",
    "SDPA flash": "other-2",
    "SDPA cuDNN": "other-4",
    "SDPA efficient": "other-3",
    "FlexAttention": "other-2",
    "SDPA of each": "other-4",
    "HF of each": "other-4",
    "reference": "other",
    "matmul": "faint",
}
_SPARE = ("other-2", "other-3", "other-4", "rival-3", "own-2", "rival-2", "own-3")  # of labels that are not in _LABELS
OF_SUBJECTS = ("own", "rival", "own-2", "rival-3", "rival-2", "own-3", "other-2", "other-3", "other-4", "other")
MARKERS = "osD^vPX*hp<>d"


def on_white(name: str) -> str:
    """One of COLORS, as pictures have it; an SVG's become the page's."""
    return COLORS[name][0]


def color_of(label: str) -> str:
    """The colour of what runs under a label: the same in every plot."""
    return on_white(_LABELS.get(label) or _SPARE[sum(label.encode()) % len(_SPARE)])


STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["faint"][0],
    "axes.labelcolor": COLORS["faint"][0],
    "axes.titlecolor": COLORS["ink"][0],
    "text.color": COLORS["ink"][0],
    "xtick.color": COLORS["faint"][0],
    "ytick.color": COLORS["faint"][0],
    "xtick.labelcolor": COLORS["ink"][0],
    "ytick.labelcolor": COLORS["ink"][0],
    "grid.color": COLORS["line"][0],
    "grid.linewidth": 0.7,
    "figure.facecolor": COLORS["paper"][0],
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text as text: small, and sharp on any screen
    "text.parse_math": False,  # names come from files
    "path.simplify": False,
}
