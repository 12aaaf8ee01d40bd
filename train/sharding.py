"""A model whose weights, gradients and moments are spread over all processes, each block's weights brought together
while it computes: PyTorch's FSDP2, for models that leave a GPU little else."""

import sys
import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, distributed, nn

from videomae.blocks import Blocks
from videomae.classifier import Classifier

# torch.distributed's parts for this are imported where they are needed: they take a second, which a page of help or a
# run of one process shall not wait for
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# a block hands its input on as it is, and nothing is added to it in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def shard(model: nn.Module, device: torch.device) -> "FSDPModule":
    """Spread the model, in place; every process calls it with the same weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, Blocks):
            for block in module:
                fully_shard(block, mesh=mesh)
    found = fully_shard(model, mesh=mesh)
    if isinstance(model, Classifier):
        # what its objective calls in place of forward
        for name in ("embed", "classify"):
            register_fsdp_forward_method(model, name)
    return found


def is_spread(model: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether `shard` was here."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be spread; every process calls it."""
    if type(x) in (Tensor, nn.Parameter):
        return x
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_as(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of x, which all have whole, as like is spread."""
    if type(like) in (Tensor, nn.Parameter):
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def gather(model: nn.Module, into: nn.Module | None) -> None:
    """The weights of a spread model into a whole one; None in the processes that do not want them. Every process calls
    it."""
    targets = {} if into is None else dict(into.named_parameters())
    for name, parameter in model.named_parameters():
        value = whole(parameter)
        if name in targets:
            targets[name].copy_(value)
