"""How long this rank computed in a step, without what it waited for others.

Where a step's forwards and backwards hold no collective, that is the wall time around them. Where they do (ZeRO 3
gathers weights before each module, sharded gradients are reduced within the backward), only the time inside the modules
that hold weights counts: DeepSpeed gathers before such a module's forward and lets go after it, and waits nowhere
within. What is given up there is the backward and the encoders; a rank's share of them is alike on all ranks, and only
ratios of speeds matter.
"""

import time

import torch
from torch import nn


class Clock:
    """`with clock: ...` around a step's work, `seconds()` afterwards. module: whose own modules alone are to count;
    None for the wall time. Made after the engine, so that its hooks lie within DeepSpeed's."""

    def __init__(self, device: torch.device, module: nn.Module | None = None):
        self.on_gpu = device.type == "cuda"
        self.inside: list[tuple] = []
        self.within_modules = module is not None
        self.running = False
        for part in module.modules() if module is not None else ():
            if any(True for _ in part.parameters(recurse=False)):
                part.register_forward_pre_hook(self.enter)
                part.register_forward_hook(self.leave, prepend=True)

    def __enter__(self):
        self.inside, self.running = [], True
        self.began = self.ended = time.perf_counter()

    def __exit__(self, *exception):
        self.ended, self.running = time.perf_counter(), False

    def enter(self, module, inputs):
        if self.running:
            self.inside.append((self.now(), None))

    def leave(self, module, inputs, output):
        if self.running and self.inside and self.inside[-1][1] is None:
            self.inside[-1] = (self.inside[-1][0], self.now())

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Once the device has done the work."""
        if not self.within_modules:
            return self.ended - self.began
        pairs = [(began, ended) for began, ended in self.inside if ended is not None]
        if not self.on_gpu:
            return sum(ended - began for began, ended in pairs)
        torch.cuda.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in pairs) / 1000
