"""Random micro models of four families, and Transformers' own greedy decoding as the oracle."""

import copy
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import dynatree
from dynatree import kernel
from dynatree.packing import packed

torch.set_num_threads(1)

KERNEL_MARKS = (
    pytest.mark.compiler,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in kernel.FLAGS, reason="needs AVX2"
    ),
)
"""Of tests that need the C++ operators."""


def needs_kernel(test):
    """Marks a test that calls the C++ operators itself, and loads them for it."""
    for mark in (*KERNEL_MARKS, pytest.mark.usefixtures("compiled_kernel")):
        test = mark(test)
    return test


VOCAB = 40
CONTEXT = 128

_COMMON = {"vocab_size": VOCAB, "initializer_range": 0.5}
_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
FAMILIES = {
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "llama": _LLAMA,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": CONTEXT},
    "qwen2": {**_LLAMA, "use_sliding_window": False},
}

STRATEGIES = {
    "ar": dynatree.Autoregressive(),
    "linear": dynatree.Linear(num_draft_tokens=6),
    "unpruned": dynatree.Tree(depth=7, branch_factor=2, prune_threshold=0.0, node_budget=256),
    "default": dynatree.Tree(),
    "single_path": dynatree.Tree(branch_factor=1),
    "depth1": dynatree.Tree(depth=1),
    "small_budget": dynatree.Tree(depth=4, branch_factor=3, prune_threshold=0.0, node_budget=5),
    "dynamic": dynatree.DynamicTree(),
    "dynamic_breadth": dynatree.DynamicTree(
        d_base=4, d_max=4, rho_stop=0.0, prune_threshold=0.0, node_budget=30, history=False
    ),
    "dynamic_depth": dynatree.DynamicTree(
        d_base=2, d_max=6, b_min=2, b_max=2, prune_threshold=0.0, node_budget=20, history=False
    ),
    "history": dynatree.DynamicTree(
        d_base=3, b_max=2, tau_low=0.1, tau_high=0.3, history_rounds=2, depth_gain=8.0, tau_gain=1.0
    ),
    "dynamic_chain": dynatree.DynamicTree(b_min=1, b_mid=1, b_max=1, node_budget=6),
    "best_first": dynatree.BestFirst(),
    "best_first_small": dynatree.BestFirst(
        max_depth=5, node_budget=6, width=2, branch=3, prune_threshold=0.0, step_cost=0.4
    ),
    "ngram": dynatree.BestFirst(ngram=True),
    "ngram_small": dynatree.BestFirst(
        max_depth=5, node_budget=4, width=2, branch=2, step_cost=0.0, ngram=True
    ),
    "auto": dynatree.Auto(),
    "ngram_chain": dynatree.BestFirst(max_depth=3, branch=1, prune_threshold=0.0, ngram=True),
}

DRAFTS = ("random", "equal", "noisy")


def build(family, layers=1, seed=1, attention="sdpa", **overrides):
    """A fresh random model in eval mode; `overrides` go into its configuration."""
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    settings = {**_COMMON, **_TOKENS, **FAMILIES[family], depth: layers, **overrides}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings),
        attn_implementation=attention,
        dtype=torch.float32,
    )
    return model.eval()


@cache
def target_of(family):
    return build(family, layers=2, seed=5)


@cache
def draft_of(family, kind):
    """A draft: of random weights, the target itself, or a copy that agrees with it only partly."""
    if kind == "random":
        return build(family)
    if kind == "equal":
        return target_of(family)
    model = copy.deepcopy(target_of(family))
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def prompt(length, seed=0):
    """[length] int64 random tokens."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def oracle(model, ids, max_new_tokens, eos=None):
    """The new tokens of the model's own greedy `generate`; `eos` None never ends early."""
    ids = ids[None]
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=0,
    )
    tokens = output[0, ids.shape[1] :].tolist()
    assert eos is not None or len(tokens) == max_new_tokens
    return tokens


@cache
def expected(family, length, max_new_tokens, seed=0):
    """The oracle's tokens for `prompt(length, seed)`, computed once for all strategies."""
    return oracle(target_of(family), prompt(length, seed), max_new_tokens)


class Calls:
    """Counts the forwards of a model and the tokens that each reads, while it is entered."""

    def __init__(self, model):
        self.model = model
        self.sizes = []

    def __enter__(self):
        # What the engine calls in the model's place, on a CPU.
        self._hook = packed(self.model).register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def _record(self, module, args, kwargs):
        self.sizes.append(kwargs["input_ids"].shape[1])

    def __exit__(self, *exception):
        self._hook.remove()
