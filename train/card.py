"""The model card of an exported run: the README.md that the Hugging Face Hub reads and shows."""

from __future__ import annotations

import json
import re
from typing import Any

from train.recipes import RECIPES
from train.trained import Run

TAGS = ("video", "self-supervised-learning", "motion-vectors", "compressed-video")
CARD = """---
license: mit
library_name: context-motion
pipeline_tag: video-classification
datasets: {datasets}
tags: {tags}
---

# {backbone}, {recipe}

The video network of a run of context-motion, which learns video representations from compressed video, after
*Self-supervised Video Representation Learning by Context and Motion Decoupling* (Huang et al., CVPR 2021).

## Use

With context-motion installed (`pip install '.[train,hub]'` in its folder):

```python
from train.export import load_backbone
network, about = load_backbone("{name}")
features = network(clips).mean((2, 3, 4))
```

`clips` are float32 (B, 3, {frames}, {size}, {size}): RGB in [0, 1], less `about["mean"]`, over `about["std"]`, {frames}
frames at a stride of {stride}. `load_backbone("{name}", layer="layer4")` gives the maps of the last layer alone.

## Training

| | |
|---|---|
{training}

## Results

{results}

## Licence

MIT, as the program's. The terms of the videos that it was trained on apply beside it.

## Citation

```bibtex
@inproceedings{{huang2021self,
  title={{Self-supervised Video Representation Learning by Context and Motion Decoupling}},
  author={{Huang, Lianghua and Liu, Yu and Wang, Bin and Pan, Pan and Xu, Yinghui and Jin, Rong}},
  booktitle={{Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year={{2021}}
}}
```
"""


def card(run: Run, made: dict[str, Any], name: str) -> str:
    """The card of a run whose run.json is `made`; `name` is what to load it by."""
    trained_on = [made["pretrained"].get("trained_on", ""), made["trained_on"]]
    datasets = dict.fromkeys(re.sub(r"_split\d+$", "", data) for data in trained_on if data)
    return CARD.format(
        datasets=json.dumps([*datasets]),
        tags=json.dumps(TAGS),
        backbone=run.config.networks.backbone,
        recipe=run.recipe,
        name=name,
        frames=run.config.sampling.frames,
        stride=run.config.sampling.stride,
        size=run.config.size,
        training="\n".join(f"| {what} | {value} |" for what, value in training(run, made).items()),
        results=results(run),
    )


def training(run: Run, made: dict[str, Any]) -> dict[str, str]:
    """What made the weights."""
    config, began = run.config, made["pretrained"]
    recipe = f"`{run.recipe}`"
    if run.recipe in RECIPES and (changed := config.differences(RECIPES[run.recipe].config)):
        recipe += ", but " + ", ".join(f"{field} {own} (not {usual})" for field, (own, usual) in changed.items())
    return {
        "recipe": recipe,
        "data": f"{made['trained_on']}, rows {made['subset']}, of {len(made['classes'])} classes",
        "task": f"{config.task}, with{'' if config.task == 'finetuning' else 'out'} labels",
        "began from": f"`{began['recipe']}` on {began['trained_on']}" if began else "random weights",
        "weights": f"{run.weights}, epoch {run.epoch:g} of {config.epochs}",
        "batch size": str(config.batch_size),
        "seed": str(config.seed),
        "parameters": f"{sum(p.numel() for p in run.model.video.parameters()) / 1e6:.2f} M",
        "program": ", ".join([made["commit"], *(f"{k} {v}" for k, v in made["versions"].items())]),
        "SHA-256 of settings, manifest, shards": ", ".join(
            f"`{made[key][:16]}`" for key in ("config_sha256", "manifest_sha256", "shards_sha256")
        ),
    }


def results(run: Run) -> str:
    """The rows that evaluations of these weights of the V-Network stored in the run's folder (eval/results.py)."""
    every = [json.loads(path.read_text()) for path in sorted((run.folder / "results").glob("*.json"))]
    weights = run.weights_sha256()
    own = [row for row in every if row.get("weights_sha256") == weights and row["network"] in ("video", "layer4")]
    newest = {(r["kind"], r["network"], r["dataset"]): r for r in sorted(own, key=lambda row: row["when"])}
    if not newest:
        return "None were stored with the run (`python -m eval retrieve RUN …` stores some)."
    lines = ["| measure | data | | percent | by chance |", "|---|---|---|---:|---:|"]
    for (kind, network, data), row in newest.items():
        title = kind if network == "video" else f"{kind}, {network}"
        for metric, value in row["metrics"].items():
            chance = row.get("chance", {}).get(metric)
            lines.append(f"| {title} | {data} | {metric} | {value:.1f} | {'' if chance is None else f'{chance:.1f}'} |")
    protocols = [f"- {kind}, {network}, {data}: {row['protocol']}" for (kind, network, data), row in newest.items()]
    return "\n".join([*lines, "", *protocols])
