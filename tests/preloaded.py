"""What takes seconds to import, for the process that tests fork theirs from."""

from __future__ import annotations

import os
from importlib import import_module

for name in (
    *("torch._dynamo", "torch.utils.tensorboard", "nvidia.dali.fn"),
    *("fastflower.training.run", "fastflower.evaluation.evaluate", "tests.training.tiny_worker"),
):
    import_module(name)
threads = len(os.listdir("/proc/self/task"))
assert threads == 1, "a process that has threads must not be forked: a lock that one holds would stay closed"
