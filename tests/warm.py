"""Preloaded by the servers that children are forked from: what each would import and find out anew for itself.

Nothing here starts a thread, of which a fork would leave nothing but its locks.
"""

import sys
from pathlib import Path

import tokenizers.decoders  # noqa: F401 (imported late by transformers)
import torch

import flap_stream.stages.prune  # noqa: F401
from flap_stream.engine.placement import Job
from flap_stream.model.skeleton import Skeleton

sys.path.append(str(Path(__file__).parent))  # the server has only the caller's working directory on its path
from models import tiny_config

torch.set_num_threads(1)
skeleton = Skeleton(tiny_config(layers=1).to_dict(), "a tiny model")
# torch's fake tensors, which find out how much memory a layer takes, are slow the first time alone: of a process, and
# of every shape.
for batch_size in (1, 2, 3, 4, 8):
    Job(skeleton, layers=[{}], dtype=torch.float32, device="cpu", samples=8, tokens=16).workspace(batch_size)
