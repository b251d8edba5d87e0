"""What a run is: frozen dataclasses; every default is the paper's or, where it is silent, the authors' released one.

A recipe (train.recipes) is a function that returns a `Config`; the command line overrides single fields. Only what
changes the result is here; how fast it is reached (device, workers, precision) is `Runtime`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from preprocess.command import at_least
from train.draws import BEFORE, Cropping, Photometric, Sampling, one_of, positive, probability

MotionLoss = Literal["infonce", "mse", "cross_entropy"]
PeerName = Literal["order", "pace", "contrast"]


@dataclass(frozen=True)
class Networks:
    """Architecture (section 4.1)."""

    backbone: Literal["c3d", "r3d26", "r2plus1d26", "r3d10"] = "c3d"
    """The V-Network."""
    width: int = 64
    """Channels of the V-Network's first layer."""
    iframe_width: int = 64
    """Channels of the first layer of the I-Network, an R2D-10."""
    motion_width: int = 64
    """Channels of the first layer of the M-Network, an R3D-10."""
    predictor: Literal["transformer", "convgru"] = "transformer"
    """Encoder-decoder from clip features to motion features (table 1)."""
    predictor_width: int = 512
    """Width of the predictor's hidden layers."""
    queries: Literal["normal", "zeros"] = field(default="normal", metadata={BEFORE: "normal"})
    """How the Transformer's queries begin: normal as its positions do, or, as released, at zero and positions from
    U(0, 1). From zeros the motion task stays on its plateau, where it tells only positions apart: on the embedded
    scenes its accuracy after 60 epochs is 3, 4 and 0 %, and from normal ones 24, 13 and 9 % (seeds 0, 1, 2)."""
    upsampling: Literal["trilinear", "nearest"] = field(default="trilinear", metadata={BEFORE: "trilinear"})
    """How a residual V-Network's layer 4 is enlarged before layer 3 joins it; released: nearest."""
    head_hidden: int = 2048
    """Hidden width of the MLP heads."""
    head_out: int = 512
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        for name in ("width", "iframe_width", "motion_width", "predictor_width", "head_hidden", "head_out"):
            at_least(name, getattr(self, name), 1)
        one_of("queries", self.queries, ("normal", "zeros"))
        one_of("upsampling", self.upsampling, ("trilinear", "nearest"))


@dataclass(frozen=True)
class Objective:
    """Equations (1) to (3), and the losses of table 1."""

    alpha: float = 0.5
    """Weight of motion prediction against context matching; 0 trains context alone, 1 motion alone (table 4)."""
    motion_loss: MotionLoss = "infonce"
    """Equation (2) on features; or, on the vectors themselves, the mean squared error or a classification (table 1)."""
    motion_bins: int = 21
    """Classes each of dx and dy for cross_entropy, cut at quantiles of the motion that the run draws."""
    context_temperature: float = 0.1
    """τ of equation (1); the paper gives none, the authors' release 0.1."""
    motion_temperature: float = 0.1
    """τ of equation (2)."""
    loss_scale: float = 2.0
    """Factor on J: 2 makes it the released sum J_I + J_M at α = 0.5."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it weighs motion against context and lies within [0, 1]")
        one_of("motion_loss", self.motion_loss, ("infonce", "mse", "cross_entropy"))
        at_least("motion_bins", self.motion_bins, 2)
        for name in ("context_temperature", "motion_temperature", "loss_scale"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class Peer:
    """Another task that learns from video without labels (train/peers)."""

    name: PeerName = "order"
    """order: that of shuffled clips; pace: a clip's stride; contrast: two clips of a video against all others'."""
    clips: int = 3
    """Clips of a video whose order is asked for."""
    gap: int = 8
    """Frames between two of them."""
    paces: int = 4
    """Strides that pace tells apart, from 1 on."""
    temperature: float = 0.1
    """τ of contrast."""

    def __post_init__(self) -> None:
        one_of("peer", self.name, ("order", "pace", "contrast"))
        for name, least in (("clips", 2), ("gap", 0), ("paces", 2)):
            at_least(name, getattr(self, name), least)
        if self.clips > 5:
            raise ValueError(f"clips is {self.clips}, which have {math.factorial(self.clips)} orders; choose 2 to 5")
        positive("temperature", self.temperature)


@dataclass(frozen=True)
class Supervision:
    """Training with labels (section 4.1, 'finetuning settings'; table 6)."""

    start: Literal["pretrained", "scratch"] = "pretrained"
    """Begin from the V-Network of a pretraining run (--pretrained RUN), or from random weights."""
    dropout: float = 0.3
    """Share of the pooled features that is dropped before the classifier."""
    motion_weight: float = 0.0
    """Weight of equation (2) beside the cross-entropy, as regularisation; table 6 has 0.2."""
    motion_temperature: float = 0.1
    """τ of equation (2)."""

    def __post_init__(self) -> None:
        one_of("start", self.start, ("pretrained", "scratch"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; choose a share from 0 to below 1")
        at_least("motion_weight", self.motion_weight, 0)
        positive("motion_temperature", self.motion_temperature)


@dataclass(frozen=True)
class Optimiser:
    """Section 4.1; warm-up, Nesterov momentum and clipping are the authors' released settings."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr_per_sample: float = 0.0005
    """The learning rate is this times the global batch."""
    weight_decay: float = 0.005
    momentum: float = 0.9
    """Momentum of SGD, Nesterov's."""
    clip_norm: float = 15.0
    """Gradients longer than this are shortened to it."""
    warmup_epochs: float = 5.0
    """Epochs over which the rate rises linearly."""
    warmup_start: float = field(default=0.01, metadata={BEFORE: 0.01})
    """Share of its height that the rate rises from."""
    floor: float = field(default=0.0, metadata={BEFORE: 0.0})
    """Share of its height that the cosine falls to."""

    def __post_init__(self) -> None:
        one_of("name", self.name, ("sgd", "adamw"))
        for name in ("lr_per_sample", "clip_norm"):
            positive(name, getattr(self, name))
        for name in ("weight_decay", "momentum", "warmup_epochs"):
            at_least(name, getattr(self, name), 0)
        for name in ("warmup_start", "floor"):
            probability(name, getattr(self, name))


@dataclass(frozen=True)
class Config:
    """What every run has; `Pretraining` and `Finetuning` add what they optimise."""

    task: ClassVar[str]
    """Which of them it is, in JSON."""

    networks: Networks = field(default_factory=Networks)
    sampling: Sampling = field(default_factory=Sampling)
    cropping: Cropping = field(default_factory=Cropping)
    photometric: Photometric = field(default_factory=Photometric)
    optimiser: Optimiser = field(default_factory=Optimiser)
    size: int = 112
    """Height and width of clips and I-frames after the crop, pixels."""
    motion_size: int = 112
    """Height and width of motion maps, resampled from the same crop; their vectors count pixels of this size."""
    batch_size: int = 64
    """Videos a step, over all processes."""
    epochs: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("size", 16), ("motion_size", 16), ("batch_size", 1), ("epochs", 1)):
            at_least(name, getattr(self, name), least)
        at_least("seed", self.seed, 0)
        if (reach := self.photometric.blur_taps // 2) >= self.size:
            raise ValueError(
                f"the blur reaches {reach} pixels to each side, and clips have {self.size}: choose a smaller blur_sigma"
            )

    def to_json(self) -> str:
        return json.dumps({"task": self.task, **_written(self)}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Config:
        """Raises ValueError naming the keys that are unknown, missing or of another type."""
        values = json.loads(text)
        kind = TASKS.get(values.pop("task", None)) if isinstance(values, dict) else None
        if kind is None:
            raise ValueError(f"the configuration is of no known task; there are {', '.join(TASKS)}")
        return _build(kind, values, "config")

    def changed(self, changes: dict[str, Any]) -> Config:
        """A copy with other values of some fields, named as on the command line: {"objective.alpha": 0}."""
        values = self._values()
        for name, value in changes.items():
            *path, last = name.split(".")
            node = values
            for key in path:
                node = node[key]
            if last not in node:
                raise ValueError(f"no field is called {name}; here there are {', '.join(node)}")
            node[last] = value
        return self.from_json(json.dumps(values))

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def differences(self, other: Config) -> dict[str, tuple[Any, Any]]:
        """Fields in which `other` differs, named as on the command line: (mine, other's)."""
        return differences(self._values(), other._values())

    def _values(self) -> dict[str, Any]:
        return {"task": self.task, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Pretraining(Config):
    """One pretraining run: context matching and motion prediction, without labels."""

    task = "pretraining"

    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        super().__post_init__()
        loss, motion = self.objective.motion_loss, self.sampling.motion
        if loss != "infonce" and self.sampling.motion_channels != 2:
            raise ValueError(f"motion_loss is {loss}, of vectors, but motion is {motion}; choose infonce, or vectors")


@dataclass(frozen=True)
class Comparison(Config):
    """One pretraining run by another task, to compare with."""

    task = "comparison"

    peer: Peer = field(default_factory=Peer)


@dataclass(frozen=True)
class Finetuning(Config):
    """One run with labels, from a pretrained V-Network or from scratch."""

    task = "finetuning"

    photometric: Photometric = field(default_factory=lambda: Photometric(grey_p=0.0))
    """Section 4.1 names no grey among the augmentations of fine-tuning."""
    supervision: Supervision = field(default_factory=Supervision)


TASKS: dict[str, type[Config]] = {kind.task: kind for kind in (Pretraining, Comparison, Finetuning)}


@dataclass(frozen=True)
class Runtime:
    """How a run is carried out; nothing here changes what it computes, up to rounding."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:1."""
    loader_workers: int | None = None
    """Processes that decode samples, for each training process; 0 decodes in the training process itself; None: one a
    core at hand but the training process's own, 8 at most."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: mixed precision; auto: bfloat16 on GPUs that have it, float32 elsewhere."""
    compile: bool = False
    """Compile the networks and the augmentation (minutes at the start, faster steps on a GPU)."""
    recompute: bool = False
    """Keep less memory: compute the M-Network's stem again in the backward pass, a few per cent more operations. What a
    recipe takes with and without is in python -m train --list."""
    log_steps: int = 10
    """Steps a line of metrics."""
    checkpoint_minutes: float = 10.0
    """From one checkpoint to the next, at a line of metrics; one is also saved where an epoch's weights are kept, at
    the end, and at SIGTERM."""
    keep_epochs: tuple[int, ...] = ()
    """Epochs after which the weights are kept for good (table 7 needs 1 5 10 20 50)."""
    watch_epochs: int | None = None
    """Epochs from one look at held-out videos (the manifest's test rows) to the next, while a run pretrains; 0: never;
    None: at as many and as often as takes under 3 % of the time, and at the end."""
    watch: Literal["tensorboard", "wandb"] | None = None
    """Tracker of metrics and of pictures of augmented clips: TensorBoard (in OUT/tensorboard) or Weights & Biases; each
    is an extra of its name."""

    def __post_init__(self) -> None:
        for name, least in (("loader_workers", 0), ("log_steps", 1), ("checkpoint_minutes", 0), ("watch_epochs", 0)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with dotted keys; lists become tuples, so that values read from JSON compare equal."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of `mine`, nested, has another value in `theirs`: dotted name -> (mine, theirs or None)."""
    others = flatten(theirs)
    return {name: (v, others.get(name)) for name, v in flatten(mine).items() if others.get(name) != v}


def here_and_there(found: dict[str, tuple[Any, Any]]) -> str:
    """Differences for an error: 'name: theirs there, mine here; ...'."""
    return "; ".join(f"{name}: {theirs} there, {mine} here" for name, (mine, theirs) in found.items())


def _written(section: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: without the fields that have the value from `BEFORE` them."""
    values = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if value != f.metadata.get(BEFORE, dataclasses.MISSING):
            values[f.name] = _written(value) if dataclasses.is_dataclass(value) else value
    return values


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}, where the keys {', '.join(known)} are wanted")
    arguments = {name: f.metadata[BEFORE] for name, f in known.items() if BEFORE in f.metadata and name not in values}
    if odd := set(values) ^ (set(known) - set(arguments)):
        raise ValueError(f"{where}: {sorted(odd)} unknown or missing; the keys are {', '.join(known)}")
    for name, value in values.items():
        factory = known[name].default_factory
        if factory is not dataclasses.MISSING:
            arguments[name] = _build(type(factory()), value, f"{where}.{name}")
        else:
            value = tuple(value) if isinstance(value, list) else value
            kind = type(known[name].default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(
                    f"{where}.{name} is {value!r}, where a value such as {known[name].default!r} is wanted"
                )
            arguments[name] = value
    return cls(**arguments)
