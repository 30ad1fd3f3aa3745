"""A tiny trained pair in hub format, made once per test session; import the fixture `micro`."""

import pytest
import torch

from dynatree.embedded.train import train_pair
from dynatree.recipes import Recipe

RECIPE = {
    "corpus_characters": 4000,
    "vocab_size": 300,
    "context": 64,
    "target": {"layers": 2, "width": 32, "heads": 2},
    "draft": {"layers": 1, "width": 16, "heads": 2},
    "sequence": 16,
    "batch": 4,
    "target_steps": 10,
    "rollouts": 16,
    "rollout_prompt": 4,
    "rollout_tokens": 12,
    "draft_steps": 10,
    "draft_batch": 4,
}


def train(folder, **changes):
    """Trains the micro pair in `folder` and returns the facts that training reports."""
    return train_pair(
        Recipe.model_validate({**RECIPE, **changes}), folder, torch.device("cpu"), lambda _: None
    )


def study(folder, prompts, configs, **measure):
    """What `config.yaml` says of a study with the micro pair in `folder`."""
    return {
        "pair": "micro",
        "pairs": {
            "micro": {
                "target": {"path": str(folder / "target")},
                "draft": {"path": str(folder / "draft")},
                "device": "cpu",
            }
        },
        "workloads": {"w": {"prompts": prompts}},
        "measure": {"workload": "w", "max_new_tokens": 8, **measure},
        "configs": configs,
        "tables": {"forward": list(configs)},
    }


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    train(folder)
    return folder
