"""How a job is run within the memory allowed: its description, what it will take, and the placement to run it with.

Predictions are made before anything is allocated, from config and headers only: buffers are counted, and the workspace
of a layer is found by running the real layer on tensors that have sizes but no memory.
"""

from flap_stream.engine.placement.choice import place
from flap_stream.engine.placement.job import BATCHES_BEHIND, Job, Refit, landing_bytes, moment_bytes
from flap_stream.engine.placement.prediction import Placement, predict

__all__ = ["BATCHES_BEHIND", "Job", "Placement", "Refit", "landing_bytes", "moment_bytes", "place", "predict"]
