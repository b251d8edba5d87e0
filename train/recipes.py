"""Recipes: a run is a function that returns a Config; its docstring names the table, the cell and the number there.

python -m train --list            # all of them
python -m train NAME --shards SHARDS --manifest data_manifests/ucf101_split1.csv --out RUN
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from train.config import Config, Networks, Objective, Optimiser
from train.draws import Cropping, Photometric, Sampling


def pretrain_ucf101_c3d() -> Config:
    """Tables 2, 8 and 9, C3D pretrained on UCF101: R@1 41.7 on UCF101, 16.8 on HMDB51; fine-tuned 78.6 and 46.9."""
    return Config()


def pretrain_ucf101_r2plus1d26() -> Config:
    """Tables 2, 8 and 9, R(2+1)D-26 pretrained on UCF101: R@1 38.4 on UCF101, 14.3 on HMDB51; fine-tuned 79.7, 48.6."""
    return Config(networks=Networks(backbone="r2plus1d26"))


def pretrain_ucf101_r3d26() -> Config:
    """Tables 2, 8 and 9, R3D-26 pretrained on UCF101: R@1 38.9 on UCF101, 15.2 on HMDB51; fine-tuned 76.6 and 47.2."""
    return Config(networks=Networks(backbone="r3d26"))


def pretrain_k400_c3d() -> Config:
    """Tables 2 and 8, C3D pretrained on Kinetics-400: fine-tuned 83.4 on UCF101, 52.9 on HMDB51."""
    return replace(pretrain_ucf101_c3d(), batch_size=512)


def pretrain_k400_r2plus1d26() -> Config:
    """Tables 2 and 8, R(2+1)D-26 pretrained on Kinetics-400: fine-tuned 85.7 on UCF101, 54.0 on HMDB51."""
    return replace(pretrain_ucf101_r2plus1d26(), batch_size=512)


def pretrain_k400_r3d26() -> Config:
    """Tables 2 and 8, R3D-26 pretrained on Kinetics-400: fine-tuned 83.7 on UCF101, 55.2 on HMDB51."""
    return replace(pretrain_ucf101_r3d26(), batch_size=512)


def pretrain_ucf101_c3d_released() -> Config:
    """Table 9, C3D, with the weight decay of the authors' released script, 0.001, in place of the paper's 0.005."""
    return Config(optimiser=Optimiser(weight_decay=0.001))


def pretrain_ucf101_c3d_context() -> Config:
    """Table 4, I-frames: context matching alone. R@1 33.8 on UCF101, 11.5 on HMDB51."""
    return Config(objective=Objective(alpha=0.0))


def pretrain_ucf101_c3d_motion() -> Config:
    """Table 4, motion vectors: motion prediction alone. R@1 30.4 on UCF101, 14.0 on HMDB51."""
    return Config(objective=Objective(alpha=1.0))


def small() -> Config:
    """Beside the paper: a narrow R3D-10 on 8 frames of 64x64, to try things out on a CPU."""
    return Config(
        networks=Networks("r3d10", 16, 16, 16, predictor_width=128, head_hidden=256, head_out=128),
        sampling=Sampling(frames=8, stride=4),
        optimiser=Optimiser("adamw", lr_per_sample=3e-5, weight_decay=0.05, warmup_epochs=3),
        size=64,
        motion_size=32,
        batch_size=32,
        epochs=60,
    )


def scenes() -> Config:
    """Beside the paper: the embedded scenes of `make demo`, which cross context with motion.

    Stride 1 keeps the sprites' step below half a wavelength of their texture. The scenes move steadily, so further
    windows of a video look much like the right one, and one of them is enough. The context task is learned first; alpha
    0.9 leaves room for the motion task, which lags as in table 7.
    """
    return replace(
        small(),
        sampling=Sampling(frames=8, stride=1, negatives=1),
        cropping=Cropping(area=(0.4, 1.0)),
        photometric=Photometric(blur_p=0.0, grey_p=0.0, hue=0.0),
        objective=Objective(alpha=0.9),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        pretrain_ucf101_c3d,
        pretrain_ucf101_r2plus1d26,
        pretrain_ucf101_r3d26,
        pretrain_k400_c3d,
        pretrain_k400_r2plus1d26,
        pretrain_k400_r3d26,
        pretrain_ucf101_c3d_released,
        pretrain_ucf101_c3d_context,
        pretrain_ucf101_c3d_motion,
        small,
        scenes,
    )
}
