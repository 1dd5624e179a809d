"""Messages between the ranks of a pipeline: the features of a micro-batch on the way forward, its gradients back.

There is a group of two ranks for each direction and each kind of message, so a channel carries messages one way only,
beside arithmetic. When which message is sent and asked for is the business of `mt_core.pipeline.transfers`. Nothing is
sent about shapes, which both sides know from the micro-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mt_core.contracts import EdgeTensor
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.transfers import Message, Route, find_route, list_routes

Shapes = Callable[[int, int], Mapping[str, EdgeTensor]]
"""What a stage passes on of a micro-batch: the tensors of a message with features, and of one with their gradients."""


class Channels:
    """This rank's channels."""

    def __init__(self, mesh: Mesh, placement: Placement, device: torch.device) -> None:
        """Connect all ranks, and open every channel for tensors on a device: NCCL's first message waits for both
        sides, so all ranks open theirs in one order."""
        self.placement, self.rank, self.device = placement, mesh.pipeline.rank, device
        self.axes: dict[Route, Axis] = {}
        for route in list_routes(placement):
            axis = mesh.connect_stages("channel", sorted((route.source, route.target)))
            if axis.size > 1:
                self.axes[route] = axis
        for route, axis in self.axes.items():
            begin = _begin_sending if route.source == self.rank else _begin_receiving
            for work in begin([torch.zeros(1, device=device)], axis):
                work.wait()
        self.arriving: dict[Message, tuple[dict[str, Tensor], list[dist.Work]]] = {}
        self.sent: list[tuple[list[Tensor], list[dist.Work]]] = []

    def begin(self, shapes: Shapes) -> None:
        """Begin a step whose messages have these tensors."""
        self.shapes = shapes

    def is_local(self, message: Message) -> bool:
        """Whether both stages of a message are on this rank."""
        return find_route(message, self.placement) is None

    def ask(self, message: Message) -> None:
        """Begin to receive a message from another rank."""
        axis = self._get_axis(message)
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            for name, tensor in self.shapes(message.edge, message.microbatch).items()
        }
        self.arriving[message] = tensors, _begin_receiving([*tensors.values()], axis)

    def receive(self, message: Message) -> dict[str, Tensor]:
        """The tensors of a message that was asked for, once they are there."""
        tensors, works = self.arriving.pop(message)
        for work in works:
            work.wait()
        return tensors

    def send(self, message: Message, tensors: Mapping[str, Tensor]) -> None:
        """Begin to send tensors, in the order of the shapes, to the rank of the message's target."""
        leaving: list[Tensor] = []
        for name, expected in self.shapes(message.edge, message.microbatch).items():
            tensor = tensors[name].detach().contiguous()
            assert (tensor.shape, tensor.dtype) == expected[:2], f"{name}: {tensor.shape} is not {expected.shape}"
            leaving.append(tensor)
        self.sent.append((leaving, _begin_sending(leaving, self._get_axis(message))))
        self.sent = [(some, works) for some, works in self.sent if not all(work.is_completed() for work in works)]

    def finish(self) -> None:
        """Wait until everything that was sent has left, and check that nothing is still expected."""
        for _, works in self.sent:
            for work in works:
                work.wait()
        self.sent.clear()
        assert not self.arriving, f"{[*self.arriving]} are expected"

    def _get_axis(self, message: Message) -> Axis:
        route = find_route(message, self.placement)
        assert route is not None, f"{message} stays on its rank"
        return self.axes[route]


def _begin_sending(tensors: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """Begin to send the other rank of a channel the tensors of a message, all at once."""
    return _exchange(dist.isend, tensors, axis)


def _begin_receiving(tensors: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """Begin to receive the tensors of a message from the other rank of a channel, in place."""
    return _exchange(dist.irecv, tensors, axis)


def _exchange(operation: Callable[..., Any], tensors: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    return dist.batch_isend_irecv(
        [dist.P2POp(operation, tensor, group=axis.group, group_peer=1 - axis.rank) for tensor in tensors]
    )
