"""Two processes shard a model with FSDP2 and gather it again: exit code 0 where the copy is the model, bit for bit."""

import sys

import torch
from test_fuzz import built
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lddyn.engine import models

init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
ids = torch.arange(5, 205).unsqueeze(0)
for architecture in sys.argv[1].split(","):
    for dtype in (torch.float32, torch.bfloat16):
        model = built(architecture)
        for weight in model.parameters():  # buffers stay as they are, as when a model is read in bfloat16
            weight.data = weight.data.to(dtype)
        model.config.dtype = dtype
        with torch.no_grad():
            logits = model(ids).logits
            assert torch.equal(models.whole(DistributedDataParallel(model))(ids).logits, logits), (architecture, dtype)
            fully_shard(model, mesh=mesh)
            assert torch.equal(models.whole(model)(ids).logits, logits), (architecture, dtype)
torch.distributed.destroy_process_group()
