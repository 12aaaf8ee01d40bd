"""In place of CUDA graphs: PyTorch's operations recorded, and repeated on the tensors where they were recorded."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Every operation, with the very tensors it read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.operations.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for op, args, kwargs, out in self.operations:
                again = None if op.is_view else op(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=False):
                    if isinstance(new, torch.Tensor) and old is not new:  # else written in place
                        old.copy_(new)


class Recorder:
    """A graph's capture runs nothing: here it does, and the first replay is left out in turn."""

    def __init__(self):
        self.warmed = self.captured = 0

    def warm_up(self, function):
        self.warmed += 1
        function()

    def capture(self, function):
        self.captured += 1
        recording, first = Recording(), [True]
        with recording:
            function()

        def replay():
            if not first:
                recording.replay()
            first.clear()

        return replay
