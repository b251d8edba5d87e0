"""The networks: video backbones, motion and I-frame backbones, predictors, heads. One file a family.

`build_video_network` and `build_predictor` choose by the names that settings use; the rest is built by class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from train.networks.c3d import C3D
from train.networks.predictor import ConvGRUPredictor, Grid, TransformerPredictor
from train.networks.resnet import ResNet, Upsampling, r2plus1d26, r3d10, r3d26

VideoNetwork = C3D | ResNet
Predictor = TransformerPredictor | ConvGRUPredictor

VIDEO_NETWORKS: dict[str, Callable[..., VideoNetwork]] = {
    "c3d": C3D,
    "r3d26": r3d26,
    "r2plus1d26": r2plus1d26,
    "r3d10": r3d10,
}
PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "transformer": TransformerPredictor,
    "convgru": ConvGRUPredictor,
}


def build_video_network(name: str, width: int = 64, upsampling: Upsampling = "trilinear") -> VideoNetwork:
    """The V-Network called `name`; ValueError lists the names there are. C3D has nothing to upsample."""
    if name not in VIDEO_NETWORKS:
        raise ValueError(f"no video network is called {name!r}; there are {', '.join(VIDEO_NETWORKS)}")
    network = VIDEO_NETWORKS[name](width=width)
    if isinstance(network, ResNet):
        network.upsampling = upsampling
    return network


def build_predictor(
    name: str,
    in_channels: int,
    out_channels: int,
    in_grid: Grid,
    out_grid: Grid,
    width: int = 512,
    queries: Literal["normal", "zeros"] = "normal",
) -> Predictor:
    """The predictor called `name`; ValueError lists the names there are. A ConvGRU has no queries."""
    if name not in PREDICTORS:
        raise ValueError(f"no predictor is called {name!r}; there are {', '.join(PREDICTORS)}")
    options = {"queries": queries} if name == "transformer" else {}
    return PREDICTORS[name](in_channels, out_channels, in_grid, out_grid, width=width, **options)
