"""An offloader that counts what the layers of a model keep for their backward."""

from contextlib import contextmanager

import torch

from fastft.memory.offload import Offloader


class Counting(Offloader):
    """Moves everything that a layer keeps, and notes the bytes of each call."""

    def __init__(self):
        super().__init__(torch.device("cpu"), least_bytes=1)
        self.by_call = []

    @contextmanager
    def layer(self, stays):
        before = self.moved_bytes
        with super().layer(stays):
            yield
        self.by_call.append(self.moved_bytes - before)
