"""Loaders and savers of a third party that misbehave, registered by tests as `ckpt.faulty_plugins:NAME`."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from mt_ckpt.huggingface import saver as hf
from mt_ckpt.native.loader import Native
from mt_models.config import GPTConfig


class WrongTensors(Native):
    """Gives one tensor twice, one in another shape, one too many and one not at all."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().tensors():
            if name == "layers.0.attn.q.weight":
                yield name, tensor[:-1]
            elif name != "layers.1.mlp.up.weight":
                yield name, tensor
        yield "embed.weight", torch.zeros(61, 32)
        yield "layers.0.attn.sink", torch.zeros(4)


class Interrupted(Native):
    """Ctrl-C after the third tensor."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(super().tensors()):
            if number == 3:
                raise KeyboardInterrupt
            yield pair


class Killed(Native):
    """SIGKILL when tensor number KILLED_AT is asked for, counted over all passes through the tensors."""

    asked: ClassVar[int] = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for pair in super().tensors():
            if Killed.asked == int(os.environ["KILLED_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)
            Killed.asked += 1
            yield pair


def takes_three(path: Path, config: GPTConfig, tensors: Any, tokenizer_files: Any = ()) -> None:
    """A saver that stops too early."""
    path.mkdir()
    (path / "names.txt").write_text("\n".join(name for _, (name, _) in zip(range(3), tensors, strict=False)))


def swaps_gate_and_up(path: Path, config: GPTConfig, tensors: Any, tokenizer_files: Any = ()) -> None:
    """A saver with the classic mistake: every name and shape is right, the meaning is not."""
    swap = {"gate": "up", "up": "gate"}
    names = ((".".join(swap.get(part, part) for part in name.split(".")), tensor) for name, tensor in tensors)
    hf.save(path, config, names, tokenizer_files)


def writes_text(path: Path, config: GPTConfig, tensors: Any, tokenizer_files: Any = ()) -> None:
    """A format that no loader reads."""
    path.mkdir()
    (path / "names.txt").write_text("\n".join(name for name, _ in tensors))


class Repeats(Native):
    """A loader with options of its own, and one that it shares with `writes_options`."""

    def __init__(
        self,
        path: Path,
        *,
        times: Annotated[PositiveInt, "How often."],
        notes: Annotated[Path | None, "A file."] = None,
        tidy: bool = True,
    ) -> None:
        super().__init__(path)
        self.times = times


def writes_options(
    path: Path,
    config: GPTConfig,
    tensors: Any,
    tokenizer_files: Any = (),
    *,
    times: int = 1,
    order: Annotated[Literal["up", "down"], "Which way."] = "up",
    loud: bool = False,
    plain=None,
) -> None:
    """A saver that says what its options were."""
    path.mkdir()
    counted = sum(1 for _ in tensors)
    options = {"times": times, "order": order, "loud": loud, "plain": plain}
    (path / "options.json").write_text(json.dumps({**options, "tensors": counted}))


class RecognisesText(Native):
    """A loader that says of itself what it reads."""

    @staticmethod
    def recognises(path: Path) -> bool:
        return (path / "names.txt").is_file()


class FailsToLook(Native):
    """A loader whose look at a directory fails."""

    @staticmethod
    def recognises(path: Path) -> bool:
        return 1 / 0 > 0
