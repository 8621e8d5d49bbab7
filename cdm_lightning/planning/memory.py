"""Peak memory of a training step: the step runs on tensors without data, and the live tensors are added up."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_lightning.network import UNetBlock
from cdm_lightning.network.layers import FUSED_MIN_SIZE, ModulatedNorm, forms_of_a_gpu
from cdm_lightning.stages import DiffusionStage, SuperResolutionStage

CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # the dtype of Lightning's precisions


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at the peak of a training step.

    parameters, moments, average: the weights, Adam's two moments, and the EMA of the weights, all float32.
    gradients: those that exist at the peak. buckets: DDP's copy of the gradients, with several devices.
    activations: what the forward pass stores for the backward pass. temporary: everything else alive at the peak.
    workspace: an estimate for the convolution library: a copy of the convolution's operands in another layout.
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


class MemoryTracker(TorchDispatchMode):
    """Adds up the bytes of all live storages that operations create, after each operation.

    steps: a row for each operation: bytes alive, bytes of its workspace, bytes of gradients among those alive.
    convolutions: operations that have a workspace, as large as their operands.
    known: tensors that exist already and are not counted; operations may return views of them or change them.
    """

    def __init__(self, convolutions: Sequence[Any], known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.bytes = self.gradients = 0
        self.steps: list[tuple[int, int, int]] = []
        self.storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        if operation is torch.ops.prim.device.default:  # most calls are of this kind; they create nothing
            return result
        outputs = result if isinstance(result, tuple | list) else (result,)
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        workspace = 0
        if operation in self.convolutions:
            workspace = sum(t.untyped_storage().nbytes() for t in (*arguments, *outputs) if isinstance(t, torch.Tensor))
        self.steps.append((self.bytes, workspace, self.gradients))
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def freed(_: Any) -> None:
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)
        self.bytes += size


class SimulatedStep:
    """A stage's training step without data: FakeTensors have shapes, types and lifetimes, but no memory.

    stage: on the meta device; its parameters are replaced. precision: a name that Lightning takes. average: whether an
    EMA of the weights is kept. gpu: whether the step is that of a GPU, whose layers have other forms and whose library
    of convolutions takes hardly any workspace. finished_step: called after each simulated step.
    """

    def __init__(
        self,
        stage: DiffusionStage,
        precision: str,
        average: bool = True,
        gpu: bool = False,
        finished_step: Callable[[], object] = lambda: None,
    ):
        self.stage, self.precision, self.average, self.gpu = stage, precision, average, gpu
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        for module in stage.unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(self.fake(parameter.data)))
        stage.diffusion.table("abar")  # computed here with real tensors: schedulers read the values
        self.size = sum(4 * parameter.numel() for parameter in stage.unet.parameters())
        norms = [module.num_channels for module in stage.unet.modules() if isinstance(module, ModulatedNorm)]
        smallest = min(norms) * (stage.resolution >> len(stage.hparams["channel_mult"]) - 1) ** 2
        self.steady = max(2, math.ceil(FUSED_MIN_SIZE / smallest))  # images from which every norm has its fused form
        self.known: dict[tuple[int, bool, bool], np.ndarray] = {}
        self.finished_step = finished_step

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and type, without data."""
        return FakeTensor(self.mode, tensor.to("meta"), torch.device("cpu"))

    def memory(self, batch: int, accumulate: bool = False, devices: int = 1, checkpointing: bool = False) -> Memory:
        """The peak memory at a micro-batch. accumulate: gradients of an earlier micro-batch exist from the start.

        From `steady` images on, the same operations run at every batch, and a tensor's size is a constant plus a
        multiple of the batch: two simulated steps tell the memory of all batches.
        """
        if batch >= self.steady:
            few, more = (self.simulated(size, accumulate, checkpointing) for size in (self.steady, self.steady + 1))
            steps = few + (more - few) * (batch - self.steady)
        else:
            steps = self.simulated(batch, accumulate, checkpointing)
        activations = int(steps[0, 0])
        alive, workspace, new_gradients = map(int, steps[1 + steps[1:, :2].sum(1).argmax()])
        counted = 0 if accumulate else new_gradients  # gradients in the tracked bytes
        saved = min(activations, alive - counted)  # at the peak, backward may have freed some
        kept = {"parameters": self.size, "moments": 2 * self.size, "average": self.size * self.average}
        kept["buckets"] = self.size * (devices > 1)
        gradients, rest = self.size if accumulate else counted, alive - counted - saved
        passes = Memory(**kept, gradients=gradients, activations=saved, temporary=rest, workspace=workspace)
        update = Memory(**kept, gradients=self.size, activations=0, temporary=self.update_temporary(), workspace=0)
        return max(passes, update, key=lambda memory: memory.total)

    def simulated(self, batch: int, accumulate: bool, checkpointing: bool) -> np.ndarray:
        """The tracker's rows of a step, after one with the bytes that the forward pass leaves. Runs it once."""
        if (batch, accumulate, checkpointing) not in self.known:
            self.known[batch, accumulate, checkpointing] = self.simulate(batch, accumulate, checkpointing)
            self.finished_step()
        return self.known[batch, accumulate, checkpointing]

    def simulate(self, batch: int, accumulate: bool, checkpointing: bool) -> np.ndarray:
        """The rows of `simulated`, by a training step on tensors without data."""
        self.stage.unet.zero_grad()
        parameters = list(self.stage.unet.parameters())
        with self.mode, ExitStack() as stack:
            if accumulate:
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
            tracker = MemoryTracker(
                () if self.gpu else CONVOLUTIONS, [*parameters, *(p.grad for p in parameters if p.grad is not None)]
            )
            for parameter in parameters:
                stack.callback(
                    parameter.register_post_accumulate_grad_hook(partial(self.count_gradient, tracker)).remove
                )
            stack.enter_context(checkpointing_set_to(self.stage, checkpointing))
            if self.gpu:
                stack.enter_context(forms_of_a_gpu())
            stack.enter_context(tracker)
            loss = self.loss(batch)
            activations = tracker.bytes
            loss.backward()
        return np.array([(activations, 0, 0), *tracker.steps])

    def count_gradient(self, tracker: MemoryTracker, parameter: torch.Tensor) -> None:
        tracker.gradients += 4 * parameter.numel()

    def update_temporary(self) -> int:
        """Temporary bytes of Adam's step: none if fused, else (with a gradient scaler) a copy of the parameters."""
        return self.size if self.precision.startswith("16") else 0

    def loss(self, batch: int) -> torch.Tensor:
        """The stage's loss on tensors without data."""
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
def checkpointing_set_to(stage: DiffusionStage, wanted: bool) -> Iterator[None]:
    """Within this context, activations of the network are recomputed in the backward pass, or not."""
    levels = [module for module in stage.unet.modules() if isinstance(module, UNetBlock)]
    before = [level.checkpointing for level in levels]
    for level in levels:
        level.checkpointing = wanted
    try:
        yield
    finally:
        for level, was in zip(levels, before, strict=True):
            level.checkpointing = was
