"""Picture and sound of a layer side by side on a GPU: the sound's blocks on a CUDA stream of their own.

Up to the bidirectional attention the two do not depend on each other, and the sound has so few tokens that its kernels
leave most of a GPU idle. Whether it wins depends on the GPU and the size of the clip; it is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.model.dit import JavisDiT


class Streams(Protocol):
    """What this needs of ``torch.cuda``."""

    def Stream(self, device: Any) -> Any: ...
    def current_stream(self, device: Any) -> Any: ...
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...


class SideBySide:
    """Stands for `javis.model.dit.in_turn`: runs its second argument on a stream beside the current one.

    Memory is safe without ``record_stream``: at its beginning the side stream waits for the current one, which by then
    has read whatever the side stream's pool gets back; at its end the current stream waits for the side stream, before
    anything that it read can be freed. The same events fork and join a capture by CUDA graphs.

    Args:
        device: a CUDA device.
        cuda: ``torch.cuda``, or a stand-in.
    """

    def __init__(self, device: torch.device, cuda: Streams = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.side = cuda.Stream(device)

    def __call__(self, video: Callable[[], Tensor], audio: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        main = self.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with self.cuda.stream(self.side):
            a = audio()
        try:
            v = video()
        finally:
            main.wait_stream(self.side)
        return v, a


def overlap_streams(model: JavisDiT) -> None:
    """Let a model compute picture and sound of a layer side by side, in place; results stay the same.

    Raises:
        UsageError: it is not on a GPU.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise UsageError(f"overlapping picture and sound needs a CUDA device, the model is on {device}; leave it out")
    model.run_streams = SideBySide(device)


__all__ = ["SideBySide", "overlap_streams"]
