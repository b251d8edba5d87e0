"""The program with two tiny recipes in place of all others, for tests that kill it:

python tests/tiny_program.py train scenes ...
python tests/tiny_program.py eval tables --run ...
"""

from __future__ import annotations

import sys

from conftest import tiny_config

from eval import __main__ as evaluation
from eval.publish import missing
from train import __main__ as training
from train.config import Finetuning
from train.recipes import RECIPES, Recipe


def main(package: str, arguments: list[str]) -> int:
    config = tiny_config(batch_size=4, epochs=2)
    same = {name: getattr(config, name) for name in ("networks", "sampling", "size", "motion_size", "batch_size")}
    RECIPES.clear()
    RECIPES["scenes"] = Recipe(config, "Tiny.")
    RECIPES["scenes-finetune"] = Recipe(Finetuning(epochs=1, **same), "Tiny.")
    missing.PYTHON = (sys.executable, __file__)
    every = missing.cells
    missing.cells = lambda tables: [cell for cell in every(tables) if cell.network == "video"]
    if package == "train":
        return training.main(arguments)
    sys.argv = [__file__, *arguments]
    return evaluation.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
