"""The cascade: trained stages sampled one after another, with truncated or non-truncated conditioning (CDM, Alg. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from tqdm.auto import tqdm

from cdm_lightning.cascade.bundle import read_bundle, write_bundle
from cdm_lightning.cascade.hub import download, own_card, upload
from cdm_lightning.cascade.metadata import bundle_file, origin
from cdm_lightning.diffusion import Sampler
from cdm_lightning.foundation.class_names import check_same_classes, class_number
from cdm_lightning.foundation.errors import InputError
from cdm_lightning.foundation.images import output_images, quantize, to_float, to_uint8
from cdm_lightning.foundation.randomness import KeyedStreams
from cdm_lightning.network import CompileMode
from cdm_lightning.stages import BaseStage, DiffusionStage, SuperResolutionStage
from cdm_lightning.stages.augmentation import GaussianAugmentation
from cdm_lightning.stages.base_and_super_resolution import Batch
from cdm_lightning.stages.loading import load_stage

KEPT = ("data", "license", "search")  # of bundle.json, when the cascade is stored again


class CascadeModule(L.LightningModule):
    """p(x_0|c) = integral of p(x_0|z_s, c) p(z_s|c) dz_s: a base stage and any number of super-resolution stages.

    Args:
        bundle: A folder written by `cdm bundle`.
        checkpoints: Instead of a bundle: one checkpoint per stage, from low to high resolution.
        levels: The level s of each super-resolution stage: a time step of the stage before it. null takes the bundle's
            choice, or 0. A stage without Gaussian augmentation accepts only 0.
        truncated: Stop the reverse process of a stage at s and pass z_s to the next stage, instead of running it to z_0
            and adding noise.
        sampler: ddpm, ddim or dpm++ for all stages; null keeps each stage's own.
        sampling_steps: Network calls of each stage; null keeps each stage's own.
        seed: Seeds every random draw, together with the index of the image.
    """

    def __init__(
        self,
        bundle: Path | None = None,
        checkpoints: list[Path] | None = None,
        levels: list[int] | None = None,
        truncated: bool | None = None,
        sampler: Sampler | None = None,
        sampling_steps: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (bundle is None) == (checkpoints is None):
            raise InputError("a cascade is built from a bundle or from checkpoints: give one of the two")
        stored: dict[str, Any] = {}  # bundle.json
        if bundle is not None:
            stages, stored = read_bundle(bundle)
        else:
            stages = [load_stage(path) for path in checkpoints or []]
        levels = stored.get("levels") if levels is None else levels
        self.assemble(stages, levels, stored.get("truncated", False) if truncated is None else truncated)
        if bundle is not None:
            self.take_origin(stored)  # bundle.json may hold class names that the stages lack
            self.about = {name: stored[name] for name in KEPT if name in stored}
            if isinstance(search := stored.get("search"), dict):  # at the levels of its time, which may be set anew
                at = {"levels": stored.get("levels"), "truncated": stored.get("truncated", False)}
                self.about["search"] = {**at, **search}
            self.card = own_card(bundle_file(bundle).parent)
        self.seed = whole_number("seed", seed)
        self.set_sampler(sampler, sampling_steps)

    stages: Any  # a ModuleList of DiffusionStage, base first
    batch_sizes: list[int] | None = None  # images per network call of each stage; None: the whole batch
    origin: dict[str, Any]  # classes, crop and filter of the training images; None is unknown
    about: dict[str, Any] = {}  # noqa: RUF012, replaced, never mutated: what else bundle.json tells
    card: bytes | None = None  # the bundle's README.md, if a person wrote it: it goes where the cascade is stored

    def assemble(self, stages: Sequence[DiffusionStage], levels: Sequence[int] | None, truncated: bool) -> None:
        """Take the stages and the choice of levels; refuses stages that do not follow one another."""
        check_stages(stages)
        self.stages = nn.ModuleList(stages)
        self.take_origin({"stages": [{"trained": s.trained, "arguments": dict(s.hparams)} for s in stages]})
        self.set_levels([stage.least_level for stage in self.stages[1:]] if levels is None else levels, truncated)
        self.eval()

    def take_origin(self, metadata: dict[str, Any]) -> None:
        """Take what bundle.json, or a table like it, knows of the training images; refuses a wrong number of names."""
        self.origin = origin(metadata)
        if (names := self.origin["classes"]) is not None and len(names) != self.num_classes:
            raise InputError(f"bundle.json names {len(names)} classes, and its stages have {self.num_classes}")

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None, **options: Any
    ) -> CascadeModule:
        """The cascade of a bundle: a folder, or a repository of the Hugging Face hub, such as "user/name".

        revision, cache_dir: of the hub. options: further arguments of the constructor. No code in the bundle is run.
        """
        folder = Path(source) if Path(source).exists() else download(str(source), revision, cache_dir)
        return cls(bundle=folder, **options)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write the cascade as a bundle, which is a repository of the hub too. half: float16, for half the size."""
        dtype = torch.float16 if half else torch.float32
        choice = {"levels": self.levels, "truncated": self.truncated, "classes": self.origin["classes"]}
        write_bundle(Path(folder), list(self.stages), {**self.about, **choice}, dtype, self.card)

    def push_to_hub(self, repo: str, private: bool = False, token: str | None = None, half: bool = False) -> str:
        """Upload the cascade to a repository of the hub, such as "user/name", which may be new; gives its address."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "bundle", half)
            return upload(Path(folder) / "bundle", repo, private, token)

    @classmethod
    def from_stages(cls, stages: Sequence[DiffusionStage], seed: int = 0) -> CascadeModule:
        """A cascade of stages that are already in memory, at the least level of each: 0, unless it has a min_level."""
        cascade = cls.__new__(cls)
        L.LightningModule.__init__(cascade)
        cascade.seed = seed
        cascade.assemble(stages, None, False)
        return cascade

    def set_levels(self, levels: Sequence[int], truncated: bool) -> None:
        """Set s of each super-resolution stage and the mode; refuses a level that a stage was not trained for."""
        upsamplers = list(self.stages)[1:]
        levels = whole_numbers("levels", levels)
        if len(levels) != len(upsamplers):
            raise InputError(
                f"levels {levels} has {len(levels)} entries for {len(upsamplers)} super-resolution stages"
                f": one for each, such as {[*levels, *[0] * len(upsamplers)][: len(upsamplers)]}"
            )
        for stage, level in zip(upsamplers, levels, strict=True):
            check_level(stage, level)
        self.levels, self.truncated = levels, truncated

    def set_sampler(self, sampler: Sampler | None, sampling_steps: Sequence[int] | None) -> None:
        """Override the sampler and the number of steps of the stages; None keeps them. Refuses steps without a grid."""
        sampling_steps = None if sampling_steps is None else whole_numbers("sampling_steps", sampling_steps)
        if sampling_steps is not None and len(sampling_steps) != len(self.stages):
            raise InputError(
                f"sampling_steps {sampling_steps} has {len(sampling_steps)} entries for {len(self.stages)} stages"
                f": one for each, such as {[*sampling_steps, *[10] * len(self.stages)][: len(self.stages)]}"
            )
        stops = self.stops()
        for number, stage in enumerate(self.stages):
            if sampler is not None:
                stage.diffusion.sampler = sampler
            if sampling_steps is not None:
                stage.diffusion.sampling_steps = sampling_steps[number]
            stage.diffusion.sampling_grid(stops[number])

    def set_batch_sizes(self, batch_sizes: Sequence[int] | None) -> None:
        """Set how many images each stage's network takes per call; None for the whole batch."""
        batch_sizes = None if batch_sizes is None else whole_numbers("batch_sizes", batch_sizes)
        if batch_sizes is not None and (len(batch_sizes) != len(self.stages) or min(batch_sizes) < 1):
            raise InputError(
                f"batch_sizes {batch_sizes} must have {len(self.stages)} entries, one a stage, of at least 1"
            )
        self.batch_sizes = batch_sizes

    def compile_networks(self, mode: CompileMode) -> None:
        """Compile every stage's network with torch.compile; the first call then takes minutes."""
        for stage in self.stages:
            stage.unet.compile(mode=mode)

    @property
    def resolution(self) -> int:
        """Resolution of the last stage."""
        return self.stages[-1].resolution

    @property
    def image_channels(self) -> int:
        """3 for colour, 1 for grey."""
        return self.stages[-1].image_channels

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for an unconditional cascade."""
        return next((s.num_classes for s in self.stages if s.num_classes is not None), None)

    @torch.no_grad()
    def forward(
        self,
        classes: Any = None,
        levels: Sequence[int] | None = None,
        seed: int | None = None,
        count: int | None = None,
        output_type: str = "pil",
        all_resolutions: bool = False,
        sampling_steps: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ) -> Any:
        """Images of given classes, the same as those of `cdm sample` with this seed and this block size.

        classes: numbers or names, one per image; None for `count` images of all classes in turn. levels: s of each
        super-resolution stage; None for the cascade's. seed: None for the cascade's. output_type: "pil" for a list of
        PIL images, "np" for float32 (B, H, W, C) and "pt" for (B, C, H, W), both in [0, 1]. all_resolutions: a list
        with the images of every stage. sampling_steps: network calls of each stage; None for the stages' own.
        batch_size: images per network call. Raises InputError for what the cascade cannot do.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        label = self.labels(classes, count).to(self.device)
        index = torch.arange(len(label), device=self.device)
        bar = partial(tqdm, disable=not progress, unit="call", leave=False)
        with (
            self.changed(levels, self.truncated, sampling_steps, seed),
            advancing(self.stages, bar, -(-len(label) // batch_size)),
        ):
            parts = [self.sample(label[i : i + batch_size], index[i : i + batch_size])
                     for i in range(0, len(label), batch_size)]  # fmt: skip
        images = [output_images(torch.cat(stage), output_type) for stage in zip(*parts, strict=True)]
        return images if all_resolutions else images[-1]

    def labels(self, classes: Any, count: int | None = None) -> torch.Tensor:
        """The class numbers of images, int64 (B,). classes: numbers or names; None for `count` of all in turn."""
        if (classes is None) == (count is None):
            raise InputError("give one of classes, a class for each image, and count")
        if classes is None:
            return torch.arange(whole_number("count", count, 1)) % (self.num_classes or 1)
        classes = plain(classes)
        words = [classes] if isinstance(classes, str) or not isinstance(classes, Sequence) else [*map(plain, classes)]
        if not words:
            raise InputError("classes [] names no class")
        label = torch.tensor([class_number(str(word), self.origin["classes"]) for word in words], dtype=torch.int64)
        self.check_labels(label)
        return label

    @contextmanager
    def changed(
        self,
        levels: Sequence[int] | None,
        truncated: bool,
        sampling_steps: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Iterator[None]:
        """Other settings for a while; None keeps them. Raises InputError as `set_levels` and `set_sampler` do."""
        before = self.levels, self.truncated, self.seed, [stage.diffusion.sampling_steps for stage in self.stages]
        try:
            self.set_levels(self.levels if levels is None else levels, truncated)
            self.set_sampler(None, sampling_steps)
            self.seed = self.seed if seed is None else whole_number("seed", seed)
            yield
        finally:
            self.levels, self.truncated, self.seed, steps = before
            for stage, number in zip(self.stages, steps, strict=True):
                stage.diffusion.sampling_steps = number

    @torch.no_grad()
    def sample(self, label: torch.Tensor, index: torch.Tensor, image: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Images of every resolution, float32 (B, C, R, R), from the base's to the last (CDM, Algorithm 2).

        label, index: int64 (B,). index: the number of each image, which seeds it. Image i depends on (seed, index[i],
        label[i]) and not on the rest of the batch, up to the float error of another batch size. image: clean images
        (real ones or stored samples) at the resolution of one of the stages; the stages above it continue from them. In
        truncated mode the intermediate entries are z_s.
        """
        self.check_labels(label)
        _, *upsamplers = self.stages
        stops = self.stops()  # where the reverse process of each stage ends: at s, or at 0
        images = []
        if image is None:
            image = self.draw(0, label, self.streams(index, 0), stops[0])  # z_s ~ p(z_s|c)
            images.append(image)
        for number, (stage, level, stop_at) in enumerate(zip(upsamplers, self.levels, stops[1:], strict=True), 1):
            if not images and stage.low_resolution != image.shape[-1]:
                continue  # this stage comes before the image that was given
            streams = self.streams(index, number)
            is_noisy = self.truncated and images and level > 0  # the previous stage stopped at z_s
            low_res = image if is_noisy else stage.augment(image, level, streams)  # z_s ~ q(z_s|z_0)
            image = self.draw(number, label, streams, stop_at, low_res, level)  # x ~ p(x|z_s, c)
            images.append(image)
        return images

    def stops(self) -> list[int]:
        """The time step at which each stage's reverse process ends: s of the next stage in truncated mode, else 0."""
        return [*self.levels, 0] if self.truncated else [0] * len(self.stages)

    def draw(
        self,
        number: int,
        label: torch.Tensor,
        streams: KeyedStreams,
        stop_at: int,
        low_res: torch.Tensor | None = None,
        level: int = 0,
    ) -> torch.Tensor:
        """Samples of stage `number`, float32 (B, C, R, R), drawn in batches of `batch_sizes[number]`.

        Finished images are rounded to 8-bit values, so that they are the same from memory as from a PNG. z_s is not
        rounded.
        """
        size = len(label) if self.batch_sizes is None else self.batch_sizes[number]
        drawn = []
        for part in (slice(first, first + size) for first in range(0, len(label), size)):
            conditioning = (label[part],) if low_res is None else (label[part], low_res[part], level)
            drawn.append(self.stages[number].sample(*conditioning, stop_at, streams[part]))
        image = torch.cat(drawn)
        return image if stop_at else quantize(image)

    def streams(self, index: torch.Tensor, number: int) -> KeyedStreams:
        """The streams of the images for the random draws of one stage, keyed by (seed, stage, index)."""
        return KeyedStreams(index, self.device, self.seed, "sample", number)

    def check_labels(self, label: torch.Tensor) -> None:
        """Refuse class numbers outside 0 ... num_classes - 1."""
        if self.num_classes is not None and len(label):
            lowest, highest = int(label.min()), int(label.max())
            if lowest < 0 or highest >= self.num_classes:
                wrong = lowest if lowest < 0 else highest
                raise InputError(
                    f"class {wrong} lies outside 0 ... {self.num_classes - 1}, the classes of this cascade"
                )

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """Samples uint8 (B, C, R, R), numbered as in `cdm sample`: image i has class i mod num_classes.

        Only the indices of the batch are used, so that classes are balanced for any set of validation images.
        """
        index = batch[2]
        label = index % (self.num_classes or 1)
        return {"generated": to_uint8(self.sample(label, index)[-1]), "index": index}

    def predict_step(self, batch: Batch | dict[str, torch.Tensor], batch_idx: int) -> list[torch.Tensor]:
        """uint8 images of every resolution for one block of `cdm sample` (a dict), or for the classes of a batch."""
        if not isinstance(batch, dict):
            return [to_uint8(image) for image in self.sample(batch[1], batch[2])]
        image = to_float(batch["image"]) if "image" in batch else None
        return [to_uint8(image) for image in self.sample(batch["label"], batch["index"], image)]


@contextmanager
def advancing(stages: Sequence[DiffusionStage], bar: Callable[..., Any], batches: int = 1) -> Iterator[None]:
    """A progress bar that advances by every network call of the stages. bar: makes one, such as tqdm.

    batches: how often each stage draws.
    """
    calls = batches * sum(len(stage.diffusion.sampling_grid()[1]) for stage in stages)
    with bar(total=calls) as advancing_bar:
        hooks = [stage.unet.register_forward_hook(lambda *_: advancing_bar.update() and None) for stage in stages]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def plain(value: Any) -> Any:
    """An array or a tensor, of numpy or torch, as Python's lists and numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An int, from one of Python, numpy or torch. Raises InputError for anything else, truth values too."""
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or (least is not None and number < least):
        raise InputError(f"{name} {number!r:.80} is no whole number" + ("" if least is None else f" from {least} on"))
    return number


def whole_numbers(name: str, values: Any) -> list[int]:
    """The ints of a sequence, an array or a tensor. Raises InputError for anything else."""
    numbers = plain(values)
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise InputError(f"{name} {numbers!r:.80} is no list of whole numbers")
    numbers = [*map(plain, numbers)]
    return [whole_number(f"{name} {numbers!r:.80}:", number) for number in numbers]


def check_level(stage: SuperResolutionStage, level: int) -> None:
    """Refuse a level s that the stage was not trained for."""
    if not isinstance(stage.augmentation, GaussianAugmentation):
        if level:
            raise InputError(
                f"level {level} given to stage {stage.name}, whose augmentation has no level: it takes only 0"
            )
        return
    lowest, timesteps = stage.least_level, stage.augmentation.diffusion.timesteps
    highest = min(stage.augmentation.max_level, timesteps - 1)
    if not lowest <= level <= highest:
        why = "it was not trained there" if level != timesteps else f"s stays below T = {timesteps}"
        raise InputError(f"level {level} of stage {stage.name} lies outside {lowest} <= s <= {highest}: {why}")


def check_stages(stages: Sequence[DiffusionStage]) -> None:
    """Refuse stages that do not fit together: kinds, resolutions, channels, classes, and the time steps of s."""
    if not stages or not isinstance(stages[0], BaseStage):
        first = f"{stages[0].name} is given first" if stages else "no stage is given"
        raise InputError(f"a cascade starts with a base stage, and {first}: put the base stage first, then upwards")
    classes = {s.name: s.num_classes for s in stages if s.num_classes is not None}
    if len(set(classes.values())) > 1:
        raise InputError(f"the stages disagree about the number of classes: {classes}")
    taught = {s.name: s.trained.get("classes") for s in stages if s.name in classes}
    known = [(name, names) for name, names in taught.items() if names is not None]
    for (name, names), (other, others) in pairwise(known):
        check_same_classes(names, others, f"stage {name}", f"stage {other}")
    for before, stage in pairwise(stages):
        if not isinstance(stage, SuperResolutionStage):
            raise InputError(f"stage {stage.name} after {before.name} is not a super-resolution stage")
        for name, expected, given in (
            ("resolution", stage.low_resolution, before.resolution),
            ("image_channels", stage.image_channels, before.image_channels),
        ):
            if expected != given:
                raise InputError(f"stage {stage.name} starts from {name} {expected}, and {before.name} makes {given}")
        if isinstance(stage.augmentation, GaussianAugmentation):
            low_res = stage.augmentation.diffusion
            if (low_res.timesteps, low_res.schedule) != (before.diffusion.timesteps, before.diffusion.schedule):
                raise InputError(
                    f"the clocks disagree: stage {stage.name} was trained with s on {low_res.timesteps} steps of the "
                    f"{low_res.schedule} schedule, and {before.name} runs {before.diffusion.timesteps} steps of the "
                    f"{before.diffusion.schedule} schedule"
                )
