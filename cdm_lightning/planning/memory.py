"""Peak memory of a training step, found by running it on tensors without data and adding up what is alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_lightning.network import UNetBlock
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what Lightning's precisions compute in


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at the peak of a training step.

    parameters, moments, average: float32; Adam's two moments, and the averaged copy of the weights. gradients: those
    that are there at the peak. buckets: DDP's copy of the gradients, on several devices. activations: what the forward
    pass leaves for backward. temporary: whatever else is alive at the peak. workspace: an estimate of what the
    libraries take on top: a copy of the operands of the convolution in progress, in another layout.
    """

    parameters: int
    gradients: int
    moments: int
    average: int
    buckets: int
    activations: int
    temporary: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Alive(TorchDispatchMode):
    """Adds up the storages that operations make, while they live; `peak` is the moment at which they were most.

    known: tensors of before, of which operations give views, or which they change: not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.gradients = 0
        self.peak = (0, 0, 0)  # bytes with the workspace, workspace, gradients among them
        self.storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        if operation is torch.ops.prim.device.default:  # most calls are, and make nothing
            return result
        made = result if isinstance(result, tuple | list) else (result,)
        for tensor in made:
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        workspace = 0
        if operation in CONVOLUTIONS:
            workspace = sum(t.untyped_storage().nbytes() for t in (*arguments, *made) if isinstance(t, torch.Tensor))
        self.peak = max(self.peak, (self.bytes + workspace, workspace, self.gradients))
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, gone)
        self.bytes += size


class SimulatedStep:
    """A stage's training step without data: FakeTensors have shapes, types and lives, and no memory.

    stage: on the meta device; its parameters are replaced. precision: Lightning's.
    """

    def __init__(self, stage: DiffusionStage, precision: str, average: bool = True):
        self.stage, self.precision, self.average = stage, precision, average
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        for module in stage.unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(self.fake(parameter.data)))
        stage.diffusion.table("abar")  # real, with the others: schedulers look into what they make
        self.size = sum(4 * parameter.numel() for parameter in stage.unet.parameters())

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return FakeTensor(self.mode, tensor.to("meta"), torch.device("cpu"))

    def memory(self, batch: int, accumulate: bool = False, devices: int = 1, checkpointing: bool = False) -> Memory:
        """At a micro-batch. accumulate: gradients of an earlier micro-batch are there from the start."""
        self.stage.unet.zero_grad()
        parameters = list(self.stage.unet.parameters())
        with self.mode, ExitStack() as stack:
            if accumulate:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
            alive = Alive([*parameters, *(p.grad for p in parameters if p.grad is not None)])
            gradients = self.size if accumulate else 0
            for parameter in parameters:
                stack.callback(parameter.register_post_accumulate_grad_hook(partial(self.arrived, alive)).remove)
            stack.enter_context(recomputing(self.stage, checkpointing))
            stack.enter_context(alive)
            loss = self.loss(batch)
            activations = alive.bytes
            loss.backward()
        peak, workspace, arrived = alive.peak
        own = 0 if accumulate else arrived  # gradients among what was counted
        saved = min(activations, peak - workspace - own)  # backward has freed some of it where that is the peak
        kept = {"parameters": self.size, "moments": 2 * self.size, "average": self.size * self.average}
        kept["buckets"] = self.size * (devices > 1)
        rest = peak - workspace - own - saved
        passes = Memory(**kept, gradients=gradients or own, activations=saved, temporary=rest, workspace=workspace)
        update = Memory(**kept, gradients=self.size, activations=0, temporary=self.in_update(), workspace=0)
        return max(passes, update, key=lambda memory: memory.total)

    def arrived(self, alive: Alive, parameter: torch.Tensor) -> None:
        alive.gradients += 4 * parameter.numel()

    def in_update(self) -> int:
        """What Adam's step takes beside its state: the fused one nothing, the other, beside a scaler, a copy of all."""
        return self.size if self.precision.startswith("16") else 0

    def loss(self, batch: int) -> torch.Tensor:
        """The stage's loss of its own images, drawn by nobody."""
        stage, size = self.stage, (self.stage.image_channels, self.stage.resolution, self.stage.resolution)
        image, noise, t, label = torch.empty(batch, *size), torch.empty(batch, *size), torch.empty(batch), None
        if stage.num_classes is not None:
            label = torch.empty(batch, dtype=torch.int64)
        dtype = AUTOCAST.get(self.precision)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if isinstance(stage, SuperResolutionStage):
                low_res = torch.empty(batch, size[0], stage.low_resolution, stage.low_resolution)
                predict = stage.conditioned_predictor(label, low_res, torch.empty(batch))  # type: ignore[arg-type]  # None: no class
            else:
                predict = stage.predictor(label)  # type: ignore[arg-type]  # as above
            return stage.diffusion.loss(predict, image, t, noise)["loss"].mean()


@contextmanager
def recomputing(stage: DiffusionStage, wanted: bool) -> Iterator[None]:
    """Whether every level of the network keeps its input alone and is computed again in backward."""
    levels = [module for module in stage.unet.modules() if isinstance(module, UNetBlock)]
    before = [level.checkpointing for level in levels]
    for level in levels:
        level.checkpointing = wanted
    try:
        yield
    finally:
        for level, was in zip(levels, before, strict=True):
            level.checkpointing = was
