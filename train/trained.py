"""A run that has been trained, at one state of its weights: what evaluations, exports and fine-tuning begin with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train import checkpoint, runs
from train.config import Config, Finetuning, here_and_there
from train.model import Model, build_model
from train.recipes import departures


@dataclass(frozen=True)
class Run:
    """One run at one state of its weights."""

    folder: Path
    config: Config
    recipe: str
    weights: str
    """'initial' (untrained), 'last', or the name of a kept checkpoint such as 'epoch-0005'."""
    epoch: float
    model: Model

    def weights_sha256(self) -> str:
        return checkpoint.sha256(self.model.state_dict())

    def video_sha256(self) -> str:
        return checkpoint.sha256(self.model.video.state_dict())

    def about(self) -> dict[str, Any]:
        """For the run.json of a run that begins from this one. A recipe that was changed, or not carried through, is
        called so: results of what begins there are not those of the recipe."""
        made = runs.read(self.folder)
        return {
            "recipe": ", ".join([self.recipe, *self.departures()]),
            "trained_on": made["trained_on"],
            "training_settings_sha256": runs.training_settings(made),
            "weights": self.weights,
            "epoch": self.epoch,
        }

    def departures(self) -> list[str]:
        """In what it is not its recipe with some seed, trained to the end."""
        stopped = [f"epoch {self.epoch:g}"] if self.epoch != self.config.epochs else []
        return departures(self.recipe, self.config) + stopped


def load_run(folder: Path, weights: str = "last") -> Run:
    """A run's networks with its 'initial' weights (untrained, from its seed), its 'last', or those of a kept epoch."""
    about = runs.read(folder)
    config = Config.from_json(json.dumps(about["config"]))
    if weights == "initial" and about["pretrained"]:
        raise ValueError(f"{folder} began from the weights of another run, {about['pretrained']['recipe']}: look there")
    torch.manual_seed(config.seed)  # as the training loop does before it builds the networks
    model = build_model(config, len(about["classes"]))
    epoch = 0.0
    if weights != "initial":
        saved = checkpoint.weights_path(folder, weights)
        state = checkpoint.load(saved)
        if differing := config.differences(Config.from_json(state["config"])):
            raise ValueError(
                f"{saved} is not of the run that {folder / 'run.json'} describes ({here_and_there(differing)}): one "
                "of the two was put there from elsewhere"
            )
        checkpoint.load_weights(model, state["model"], saved)
        epoch = float(state["epoch"])
    return Run(folder, config, about["recipe"], weights, epoch, model)


def load_pretrained(folder: Path, weights: str = "last") -> Run:
    """A run to begin from: `load_run`, but never its untrained weights."""
    if weights == "initial":
        raise ValueError("--pretrained-weights initial are not pretrained: begin from last, or from a kept epoch")
    return load_run(folder, weights)


def begin_from(pretrained: Run | None, config: Config, model: Model) -> None:
    """Give the V-Network the weights of a pretraining run, where the configuration wants them."""
    wanted = isinstance(config, Finetuning) and config.supervision.start == "pretrained"
    if pretrained is None:
        if wanted:
            raise ValueError(
                "this recipe begins from a pretrained network: name its run with --pretrained RUN, or take the recipe "
                "that begins from scratch"
            )
        return
    if not wanted:
        raise ValueError("--pretrained was given, but this recipe begins from scratch; take a finetune recipe")
    mine, theirs = config.networks, pretrained.config.networks
    if (mine.backbone, mine.width) != (theirs.backbone, theirs.width):
        raise ValueError(
            f"{pretrained.folder} holds a {theirs.backbone} of width {theirs.width}, this recipe a {mine.backbone} of "
            f"width {mine.width}; take the recipe of that backbone"
        )
    model.video.load_state_dict(pretrained.model.video.state_dict())
