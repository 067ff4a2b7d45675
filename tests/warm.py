"""Preloaded by the servers that children are forked from: what each would import and find out anew for itself.

Nothing here starts a thread, of which a fork would leave nothing but its locks.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import tokenizers.decoders  # noqa: F401 (imported late by transformers)
import torch

import flap_stream.stages.prune  # noqa: F401
from flap_stream.engine.placement.workspace import layer_workspace

sys.path.append(str(Path(__file__).parent))  # the server has only the caller's working directory on its path
from models import save, tiny_config, tiny_model

torch.set_num_threads(1)
os.fsync = lambda fd: None  # as in conftest.py
# How much memory a layer takes, found out on torch's fake tensors, is most of the work of a tiny job.
with tempfile.TemporaryDirectory() as folder:
    for layers in (2, 3, 4):
        place = save(tiny_model(tiny_config(layers=layers)), Path(folder, str(layers)))
        config = json.loads((place / "config.json").read_bytes())
        for batch_size in (1, 2, 3, 4, 8):
            layer_workspace(config, (batch_size, 16), torch.float32, "cpu", "forward")
# What is imported lives as long as a child does: collections need not look at it, nor make pages of it the child's own.
gc.collect()
gc.freeze()
