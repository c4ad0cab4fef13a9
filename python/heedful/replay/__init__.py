"""Request traces through the real scheduler, with a simulated executor in the model's place.

`read_trace` reads a trace, `CostModel` says how long a step would take, `replay` runs one against the other. NumPy
alone is needed.
"""

from heedful.replay.cost import CostModel, Hardware
from heedful.replay.result import ReplayResult, Series
from heedful.replay.simulation import replay
from heedful.replay.trace import TraceRequest, read_trace

__all__ = ["CostModel", "Hardware", "ReplayResult", "Series", "TraceRequest", "read_trace", "replay"]
