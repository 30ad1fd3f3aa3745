"""Environment and tool markers of all tests. Imports no torch: many tests need none."""

import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are shared out already.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TOOLS = {
    "tex": ("latexmk", "latexmk texlive-latex-base texlive-latex-recommended"),
    "compiler": ("g++", "g++"),
    "browser": ("chromium", "chromium"),
    "node": ("node", "nodejs"),
    "slurm": ("sbatch", "slurm-wlm munge"),
    "rsync": ("rsync", "rsync"),
}
"""What a marker needs: the command, and the packages that have it."""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    for marker, (tool, packages) in TOOLS.items():
        if item.get_closest_marker(marker) is not None and shutil.which(tool) is None:
            reason = f"{tool} is missing; install the Debian packages {packages}"
            if os.environ.get("DYNATREE_REQUIRE_TOOLS") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
