"""Where models come from: a hub, a local directory, or the folder of the embedded pair."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynatree.errors import PairError
from dynatree.files import weights_digest
from dynatree.specs import Models, ModelSource

if TYPE_CHECKING:
    from dynatree.config import Config

EMBEDDED = Path("results/pairs")
"""Pairs that a recipe trains live here, one folder each."""


@dataclass
class Pair:
    """A loaded target and draft with one tokenizer.

    Attributes:
        digest: identifies the weights of both models: content hash, or the hub's commit.
        facts: where each model came from, for the provenance of a result.
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    facts: dict[str, Any]


def resolve_device(name: str) -> torch.device:
    """The device for a configuration's `device`; `auto` is CUDA where there is one, else CPU.

    Raises:
        PairError: CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PairError(f"device: {name!r} asked for, torch finds no CUDA device; use auto or cpu")
    return torch.device(name)


def load_pair(config: "Config") -> Pair:
    """Loads the pair that the configuration uses.

    Raises:
        PairError: see `load_models`.
    """
    return load_models(config.pair, config.pair_spec)


def load_models(name: str, models: Models) -> Pair:
    """Loads target, draft and tokenizer of the pair `name`, in eval mode, on their device.

    Only safetensors are read and no code from a model repository is ever run.

    Raises:
        PairError: a model cannot be had or changed meanwhile, or the two do not share a
            vocabulary.
    """
    target_source, draft_source = sources(name, models)
    before = _stamps(target_source, draft_source)
    device = resolve_device(models.device)
    dtype = getattr(torch, models.dtype)
    target = _load_model(target_source, f"pairs.{name}.target", dtype).to(device)
    draft = _load_model(draft_source, f"pairs.{name}.draft", dtype).to(device)
    tokenizer = _load_tokenizer(target_source, f"pairs.{name}.target")
    _check_vocabularies(
        name, target, draft, tokenizer, _load_tokenizer(draft_source, f"pairs.{name}.draft")
    )
    identities = [_identity(target_source, target), _identity(draft_source, draft)]
    changed = sorted(file for file, _ in _stamps(target_source, draft_source) ^ before)
    if changed:
        raise PairError(
            f"pairs.{name}: {changed[0]} was written while it was loaded, so what was loaded has "
            "no digest; wait until the models are complete, then run the same command again"
        )
    return Pair(
        target=target.eval(),
        draft=draft.eval(),
        tokenizer=tokenizer,
        digest=":".join(identities),
        facts={
            role: {
                **source.model_dump(exclude_none=True),
                "identity": identity,
                "parameters": model.num_parameters(),
                "architecture": type(model).__name__,
            }
            for role, source, identity, model in zip(
                ("target", "draft"),
                (target_source, draft_source),
                identities,
                (target, draft),
                strict=True,
            )
        },
    )


def sources(name: str, models: Models) -> tuple[ModelSource, ModelSource]:
    """Where target and draft are; a recipe's models are where its rule saves them."""
    if models.target is not None and models.draft is not None:
        return models.target, models.draft
    folder = EMBEDDED / name
    if not (folder / "training.json").is_file():
        raise PairError(
            f"pairs.{name}: {folder} holds no trained pair; run: snakemake {folder}/training.json"
        )
    return ModelSource(path=str(folder / "target")), ModelSource(path=str(folder / "draft"))


def _load_model(source: ModelSource, key: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = _from_hub_format(
        AutoModelForCausalLM, source, key, dtype=dtype, use_safetensors=True
    )
    return model


def _load_tokenizer(source: ModelSource, key: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = _from_hub_format(AutoTokenizer, source, key)
    return tokenizer


def _from_hub_format(kind: Any, source: ModelSource, key: str, **options: Any) -> Any:
    if source.path is not None and not Path(source.path).is_dir():
        raise PairError(
            f"{key}.path: no directory {source.path!r}; give the folder that holds config.json"
        )
    if source.path is not None:
        _require_safetensors(Path(source.path), key)
    where: dict[str, Any] = (
        {"local_files_only": True} if source.path is not None else {"revision": source.revision}
    )
    try:
        return kind.from_pretrained(
            source.path or source.hub, trust_remote_code=False, **where, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = (
            "the folder needs config.json, model.safetensors and the tokenizer's files"
            if source.path is not None
            else "check the id, the revision and the network, or download it once elsewhere and "
            "give its folder as path"
        )
        raise PairError(
            f"{key}: {source.path or source.hub!r} cannot be loaded: {reason}; {fix}"
        ) from error
    except Exception as error:
        # safetensors and tokenizers raise their own exceptions for damaged files.
        raise PairError(
            f"{key}: {source.path or source.hub!r} is damaged: {error}; fetch it again"
        ) from error


def _require_safetensors(folder: Path, key: str) -> None:
    pickled = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)]
    if pickled and not any(folder.glob("*.safetensors")):
        raise PairError(
            f"{key}.path: {str(folder)!r} holds its weights as {sorted(pickled)[0]} only, a "
            "pickle, which can run any code when it is loaded and is never read here; get the "
            "model's safetensors, or, if you trust it, convert it elsewhere: "
            "from_pretrained(folder), then save_pretrained(folder)"
        )


def _stamps(*sources: ModelSource) -> set[tuple[str, tuple[int, int, int]]]:
    """The files of local models, each with what changes when it is written."""
    return {
        (str(path), (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        for source in sources
        if source.path is not None
        for kind in ("*.safetensors", "*.json")
        for path in Path(source.path).glob(kind)
        for stat in [path.stat()]
    }


def _check_vocabularies(
    name: str,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise PairError(
            f"pairs.{name}: the target's vocabulary has {sizes[0]} entries, the draft's "
            f"{sizes[1]}; take two models with one tokenizer"
        )
    ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if ours != theirs:
        token = min(
            {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}
        )
        raise PairError(
            f"pairs.{name}: the tokenizers differ, for instance at {token!r} (target "
            f"{ours.get(token)}, draft {theirs.get(token)}); take two models with one tokenizer"
        )


def _identity(source: ModelSource, model: PreTrainedModel) -> str:
    if source.path is None:
        commit = getattr(model.config, "_commit_hash", None)
        return f"{source.hub}@{commit or source.revision}"
    return weights_digest(Path(source.path))
