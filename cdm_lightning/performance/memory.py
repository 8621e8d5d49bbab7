"""Peak memory of a training step, found by running it on tensors without data and adding up what is alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cdm_lightning.stages import DiffusionStage, SuperResolutionStage
from cdm_lightning.unet import Level

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
    """Adds up the storages that operations make, while they live; `peak` is the moment at which they were most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.gradients = 0
        self.peak = (0, 0, 0)  # bytes with the workspace, workspace, gradients among them
        self.storages: dict[int, Any] = {}

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


class LikeCUDA(TorchFunctionMode):
    """Autocast on a CPU keeps a group norm in 16 bits, on a GPU it makes it float32; this does as the GPU does."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is F.group_norm and torch.is_autocast_enabled("cpu"):
            arguments = (arguments[0].float(), *arguments[1:])
        return function(*arguments, **(options or {}))


class StepOnPaper:
    """A stage's training step without data: FakeTensors have shapes, types and lives, and no memory.

    stage: on the meta device; its parameters are replaced. precision: Lightning's. like: the kind of device whose rules
    of autocast and whose optimizer are followed.
    """

    def __init__(self, stage: DiffusionStage, precision: str, like: Literal["cuda", "cpu"], average: bool = True):
        self.stage, self.precision, self.like, self.average = stage, precision, like, average
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
        alive, gradients = Alive(), self.size if accumulate else 0
        with self.mode, ExitStack() as stack:
            for parameter in self.stage.unet.parameters():
                if accumulate:
                    parameter.grad = torch.empty_like(parameter)
                stack.callback(parameter.register_post_accumulate_grad_hook(partial(self.arrived, alive)).remove)
            rules = LikeCUDA if self.like == "cuda" else nullcontext
            if checkpointing:
                stack.enter_context(recomputing(self.stage, rules))  # backward takes no function mode along
            stack.enter_context(rules())
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
        """What Adam's step takes beside its state: on a GPU all parameters at once, on a CPU one after the other."""
        return self.size if self.like == "cuda" else max(4 * p.numel() for p in self.stage.unet.parameters())

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
                predict = stage.predictor(label, low_res, torch.empty(batch))  # type: ignore[arg-type]  # None: no class
            else:
                predict = lambda x, t: stage.unet(x, t, label)  # noqa: E731
            return stage.diffusion.loss(predict, image, t, noise)["loss"].mean()


@contextmanager
def recomputing(stage: DiffusionStage, rules: Callable[[], Any] = nullcontext) -> Iterator[None]:
    """Every level of the network keeps its input alone and is computed again in backward, there under `rules`."""
    levels = [module for module in stage.unet.modules() if isinstance(module, Level)]
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), rules())}
    for level in levels:
        level.forward = partial(checkpoint, level.forward, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for level in levels:
            del level.forward
