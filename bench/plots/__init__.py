"""The plots of one device's results: tokens a second, roofline, speed-up by batch x length, latency, memory.

One module for each kind says what it shows of the records and draws it; `picture` makes pictures of them, with
matplotlib.
"""

from fastconv.bench.plots.every import plots
from fastconv.bench.plots.look import COLORS
from fastconv.bench.plots.picture import check_installed, png, svg
from fastconv.bench.plots.plot import Plot

__all__ = ["COLORS", "Plot", "check_installed", "plots", "png", "svg"]
