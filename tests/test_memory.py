"""What a job needs is compared with what is free before anything is loaded, and later explained."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from micro_pair import micro  # noqa: F401 - a fixture

from dynatree import Autoregressive, Decoder, Tree
from dynatree.devices import DeviceError
from dynatree.memory import available, fitting, gib, needed
from dynatree.pairs import load_models
from dynatree.specs import Models

TREE = Tree(depth=3, branch_factor=2)
BOTH = (Autoregressive(), TREE)


@pytest.fixture(scope="module")
def models(micro):  # noqa: F811
    sources = {role: {"path": str(micro / role)} for role in ("target", "draft")}
    return Models.model_validate({**sources, "device": "cpu"})


def test_the_need_is_what_weights_and_caches_take_at_least(models):
    need = needed("micro", models, BOTH, 24)
    pair = load_models("micro", models)
    both = (pair.target, pair.draft)
    held = sum(part.numel() * part.element_size() for model in both for part in model.parameters())
    assert need.weights == held
    caches = 0
    for strategy in BOTH:
        decoder = Decoder(pair.target, pair.draft, strategy, 24)
        decoder.decode(torch.tensor([1, 2, 3]), 4)
        runners = [decoder._target] + ([decoder._drafter.runner] if decoder._drafter else [])
        for cache in (runner.cache for runner in runners):
            # The engine rounds the number of slots up.
            slots = 24 + strategy.max_depth + strategy.max_drafted
            assert slots <= cache.capacity
            caches += cache.storage.nbytes * slots // cache.capacity
    assert need.caches == caches
    half = needed("micro", models.model_copy(update={"dtype": "bfloat16"}), BOTH, 24)
    assert (2 * half.weights, 2 * half.caches) == (need.weights, need.caches)
    assert needed("micro", models, BOTH, 2400).caches > 10 * need.caches


@pytest.fixture
def memory(monkeypatch):
    """Sets how many bytes of the host's memory are free."""

    def free(available):
        facts = SimpleNamespace(available=available, total=2**34)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: facts)

    free(2**33)
    return free


def test_what_does_not_fit_is_refused_before_anything_is_loaded(models, memory):
    need = needed("micro", models, BOTH, 24)
    memory(need.weights + need.caches - 1)
    with (
        pytest.raises(DeviceError) as error,
        fitting("measure tree", "micro", models, BOTH, 24),
    ):
        raise AssertionError("loaded")
    total = gib(need.weights + need.caches)
    assert str(error.value).startswith(
        f"measure tree: out of memory on the host: pairs.micro needs at least {total} (weights "
        f"{gib(need.weights)}, caches {gib(need.caches)}), and {total} of 16.00 GiB were free; "
    )
    assert "lower max_new_tokens, node_budget" in str(error.value)
    memory(need.weights + need.caches)
    with fitting("measure tree", "micro", models, BOTH, 24):
        pass


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        MemoryError("no room"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_later_says_need_and_free_memory(models, memory, raised):
    with (
        pytest.raises(DeviceError) as error,
        fitting("measure tree", "micro", models, BOTH, 24),
    ):
        raise raised
    assert "measure tree: out of memory on the host: pairs.micro needs at least" in str(error.value)
    assert "8.00 GiB of 16.00 GiB were free" in str(error.value)
    assert str(error.value).endswith(f"({str(raised).splitlines()[0]})")


@pytest.mark.parametrize("text", ["a bug", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_stay_what_they_are(models, memory, text):
    with (
        pytest.raises(RuntimeError, match=rf"^{text}$"),
        fitting("measure tree", "micro", models, BOTH, 24),
    ):
        raise RuntimeError(text)


def test_a_model_that_cannot_be_read_is_left_to_the_loader(models, memory, tmp_path):
    broken = models.model_copy(
        update={"target": models.target.model_copy(update={"path": str(tmp_path)})}
    )
    assert needed("micro", broken, BOTH, 24) is None
    with (
        pytest.raises(DeviceError, match="needs an unknown amount, and 8"),
        fitting("measure tree", "micro", broken, BOTH, 24),
    ):
        raise MemoryError


def test_a_gpu_that_is_too_full_to_be_asked_is_named(monkeypatch):
    def fails(device):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    said = "CUDA error: out of memory"
    with pytest.raises(DeviceError, match=r"cuda:0 is full: .*out of memory"):
        available(torch.device("cuda", 0))
    said = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        available(torch.device("cuda", 0))
