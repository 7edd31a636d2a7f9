"""`python -m lddyn` with FSDP2 on a CPU: accelerate shards on accelerators only, so it is told that gloo is one.

With STOP_AT in the environment training breaks off after that many steps. Exit code 3 when nothing was sharded.
"""

import os
import sys

import torch.distributed.fsdp
from accelerate import DistributedType, PartialState

from lddyn import __main__
from lddyn.engine.callback import ProbeCallback

init, shard, on_step_end = PartialState.__init__, torch.distributed.fsdp.fully_shard, ProbeCallback.on_step_end
sharded = []


def as_an_accelerator(self, *args, **options):
    init(self, *args, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def counted(module, **options):
    sharded.append(module)
    return shard(module, **options)


def broken_off(self, args, state, control, **options):
    if state.global_step == int(os.environ.get("STOP_AT", "-1")):
        os._exit(9)
    on_step_end(self, args, state, control, **options)


PartialState.__init__, torch.distributed.fsdp.fully_shard = as_an_accelerator, counted
ProbeCallback.on_step_end = broken_off
sys.exit(__main__.main() or (0 if sharded else 3))
