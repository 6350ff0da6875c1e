__all__ = [
    "Comparison",
    "SharedRun",
    "Statistics",
    "compare",
    "distance",
    "features",
    "longest_shared_runs",
    "plausibility",
]

from .distributions import Comparison, compare, distance, features
from .memorization import SharedRun, longest_shared_runs
from .statistics import Statistics, plausibility
