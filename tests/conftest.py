"""Environment and tool markers of all tests. Imports no torch: many tests need none."""

import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

TEX_PACKAGES = "latexmk texlive-latex-base texlive-latex-recommended"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if item.get_closest_marker("tex") is not None and shutil.which("latexmk") is None:
        reason = f"latexmk is missing; install the Debian packages {TEX_PACKAGES}"
        if os.environ.get("DYNATREE_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
