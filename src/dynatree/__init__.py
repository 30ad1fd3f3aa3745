"""DynaTree: lossless tree speculative decoding at batch size 1, and its measured ablations.

The names below are the public interface. They are resolved on first use, so that the parts of
the pipeline that never touch a model (configuration, tables) do not pay for importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynatree.config import Config, load_config
    from dynatree.decode import Decoder, Generation, Stats, generate
    from dynatree.pairs import Pair, load_pair
    from dynatree.sampling import Sampling
    from dynatree.strategies import Auto, Autoregressive, BestFirst, DynamicTree, Linear, Tree
    from dynatree.transformers_entry import custom_generate

_HOME = {
    "Auto": "dynatree.strategies",
    "Autoregressive": "dynatree.strategies",
    "BestFirst": "dynatree.strategies",
    "Config": "dynatree.config",
    "Decoder": "dynatree.decode",
    "DynamicTree": "dynatree.strategies",
    "Generation": "dynatree.decode",
    "Linear": "dynatree.strategies",
    "Pair": "dynatree.pairs",
    "Sampling": "dynatree.sampling",
    "Stats": "dynatree.decode",
    "Tree": "dynatree.strategies",
    "custom_generate": "dynatree.transformers_entry",
    "generate": "dynatree.decode",
    "load_config": "dynatree.config",
    "load_pair": "dynatree.pairs",
}

__all__ = [
    "Auto",
    "Autoregressive",
    "BestFirst",
    "Config",
    "Decoder",
    "DynamicTree",
    "Generation",
    "Linear",
    "Pair",
    "Sampling",
    "Stats",
    "Tree",
    "custom_generate",
    "generate",
    "load_config",
    "load_pair",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynatree' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
