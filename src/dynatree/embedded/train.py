"""Training of the embedded pair: a target on the corpus, then a draft distilled from it.

The draft learns from the target's own greedy continuations (sequence-level distillation: Kim and
Rush, 2016, arXiv:1606.07947; on-policy data for drafts: Zhou et al., 2024, arXiv:2310.08461),
because those are what it will be asked to predict.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dynatree.embedded.corpus import corpus_digest, python_docs
from dynatree.embedded.muon import Muon
from dynatree.embedded.widen import widen
from dynatree.files import write_text
from dynatree.recipes import CALIBRATION, Recipe, Transformer
from dynatree.schema import canonical

END_OF_TEXT = "<|endoftext|>"
Report = Callable[[str], None]
Steps = Callable[[str, int, int, float], None]
"""Called after each training step with: role of the model, steps done, steps planned, loss."""


def train_pair(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    report: Report = print,
    progress: Steps = lambda *_: None,
) -> dict[str, Any]:
    """Trains target and draft and saves both in hub format below `folder`.

    A recipe that widens saves the two widened, in bfloat16: float32 would double the 5.6 GB of a
    target as large as Pythia-2.8B, and widening is exact from there on, whatever dtype they are
    loaded in. The reported losses and agreement are those of the trained models in float32.

    The outcome depends on the recipe, the corpus (hence the Python version), the device and the
    number of threads; with these equal it is the same bit for bit.

    Returns:
        The facts that `folder`/training.json holds: corpus digest, losses, agreement, seconds.
    """
    started = time.perf_counter()
    facts: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "seconds": {}}

    def lap(phase: str) -> None:
        facts["seconds"][phase] = round(time.perf_counter() - started, 1)

    torch.manual_seed(recipe.seed)
    documents = python_docs(recipe.corpus_characters)
    tokenizer = train_tokenizer(documents, recipe)
    ids = _encode(documents, tokenizer)
    facts["corpus"] = {"digest": corpus_digest(documents), "tokens": len(ids)}
    report(f"corpus: {len(ids)} tokens, vocabulary {recipe.vocab_size}")
    lap("tokenizer")

    generator = torch.Generator().manual_seed(recipe.seed)
    target = _new_model(recipe.target, recipe).to(device)
    facts["target_loss"] = _fit(
        target,
        _windows(ids, recipe, generator, device),
        recipe.target_steps,
        recipe.target_learning_rate,
        "target",
        progress,
    )
    lap("target")

    sequences, teacher = rollouts(target, ids, recipe, generator)
    report(f"rollouts: {len(sequences)} of {sequences.shape[1]} tokens")
    lap("rollouts")

    draft = _new_model(recipe.draft, recipe).to(device)
    # The last rollouts are kept aside, to report an agreement that was not trained on.
    held = max(1, len(sequences) // 16)
    facts["draft_loss"] = _fit(
        draft,
        _distillation(sequences[:-held], teacher[:-held], recipe, generator),
        recipe.draft_steps,
        recipe.draft_learning_rate,
        "draft",
        progress,
    )
    facts["draft_temperature"] = calibrate(draft, sequences[-held:], teacher[-held:])
    facts["agreement"] = agreement(draft, sequences[-held:], teacher[-held:])
    report(f"agreement on held-out rollouts: {facts['agreement']}")
    lap("draft")

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=(recipe.widen or recipe).context,
    )
    for role, model in (("target", target), ("draft", draft)):
        if recipe.widen is not None:
            model = widen(
                model.to(torch.bfloat16),
                getattr(recipe.widen, role),
                recipe.widen.vocab_size,
                recipe.widen.context,
            )
            report(f"{role}: widened to {model.num_parameters():,} parameters")
        model.save_pretrained(folder / role)
        fast.save_pretrained(folder / role)
    if recipe.widen is not None:
        lap("widen")
    write_text(folder / "training.json", canonical(facts) + "\n")
    return facts


def train_tokenizer(documents: list[str], recipe: Recipe) -> Tokenizer:
    """Byte-level BPE, so that any Unicode prompt has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def rollouts(
    target: PreTrainedModel, ids: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Greedy continuations of random corpus windows, with the target's logits.

    Returns:
        Tokens [rollouts, T] and logits [rollouts, T, vocabulary] (16-bit) after each of them,
        T = rollout_prompt + rollout_tokens - 1.
    """
    starts = torch.randint(
        len(ids) - recipe.rollout_prompt, (recipe.rollouts, 1), generator=generator
    )
    prompts = ids[starts + torch.arange(recipe.rollout_prompt)].to(target.device)
    with torch.inference_mode():
        sequences = target.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=recipe.rollout_tokens,
            # A rollout goes on after the end of a document, so all have one length.
            eos_token_id=None,
            pad_token_id=0,
        )[:, :-1]
        # One parallel pass over the finished rollouts costs less than keeping each step's logits.
        logits = torch.cat(
            [target(chunk, use_cache=False).logits.half() for chunk in sequences.split(32)]
        )
    return sequences.clone(), logits.clone()


def agreement(draft: PreTrainedModel, sequences: Tensor, teacher: Tensor) -> dict[str, float]:
    """How often the target's choice is the draft's first choice, and among its first two."""
    with torch.inference_mode():
        best = draft(sequences, use_cache=False).logits.topk(2, dim=-1).indices
    hits = best == teacher.argmax(dim=-1, keepdim=True)
    return {
        "top1": round(hits[..., 0].float().mean().item(), 4),
        "top2": round(hits.any(dim=-1).float().mean().item(), 4),
    }


def calibrate(draft: PreTrainedModel, sequences: Tensor, teacher: Tensor) -> float:
    """Makes the draft's probabilities those of what pruning takes them for: that verification
    accepts a token, which is that the target chooses it.

    Temperature scaling (Guo et al., 2017, arXiv:1706.04599): the logits are divided by the one
    number that makes the target's choices most likely, which no order of tokens depends on. It is
    folded into the weight of the output layer, and named in the draft's configuration: a sample
    is drawn from what the draft learnt.

    Args:
        sequences: [n, T], rollouts that the draft was not trained on.
        teacher: [n, T, vocabulary], the target's logits.

    Returns:
        The temperature, between a quarter and 4.
    """
    with torch.no_grad():
        logits = draft(sequences, use_cache=False).logits.flatten(0, 1)
    choices = teacher.argmax(dim=-1).flatten()
    scale = torch.zeros((), device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * scale.exp(), choices)
        value.backward()
        return value

    optimizer.step(loss)
    temperature = min(4.0, max(0.25, round(math.exp(-scale.item()), 3)))
    with torch.no_grad():
        draft.get_output_embeddings().weight.div_(temperature)
    setattr(draft.config, CALIBRATION, temperature)
    return temperature


Loss = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Loss]
"""Input tokens [b, T], and the loss of the model's logits [b, T, vocabulary] on them."""


def _windows(
    ids: Tensor, recipe: Recipe, generator: torch.Generator, device: torch.device
) -> Iterator[Batch]:
    offsets = torch.arange(recipe.sequence + 1)
    while True:
        starts = torch.randint(len(ids) - recipe.sequence, (recipe.batch, 1), generator=generator)
        window = ids[starts + offsets].to(device)
        yield window[:, :-1], partial(_cross_entropy, wanted=window[:, 1:])


def _distillation(
    sequences: Tensor, teacher: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[Batch]:
    while True:
        chosen = torch.randint(len(sequences), (recipe.draft_batch,), generator=generator)
        chosen = chosen.to(sequences.device)
        yield sequences[chosen], partial(_distance, teacher=teacher[chosen])


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _distance(logits: Tensor, teacher: Tensor) -> Tensor:
    logits, teacher = logits.flatten(0, 1), teacher.flatten(0, 1).float()
    # What the target holds for likely besides, and the one token that greedy verification accepts.
    divergence = F.kl_div(
        F.log_softmax(logits, dim=-1),
        F.log_softmax(teacher, dim=-1),
        log_target=True,
        reduction="batchmean",
    )
    return divergence + F.cross_entropy(logits, teacher.argmax(dim=-1))


def _fit(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    role: str,
    progress: Steps,
) -> float:
    """Trains with Muon on the layers' matrices and AdamW on the rest (Jordan et al., 2024).

    Returns:
        The mean loss of the last tenth of the steps.
    """
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and ".layers." in name
    ]
    chosen = set(matrices)
    rest = [weight for weight in model.parameters() if weight not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=5 * learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    bases = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    losses: list[float] = []
    model.train()
    for step in range(steps):
        # Linear warm-up over a twentieth of the steps, then linear decay to zero.
        factor = min(1.0, 20 * (step + 1) / steps) * (1 - step / steps)
        for optimizer, base in zip(optimizers, bases, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
        tokens, loss_of = next(batches)
        with _autocast(model.device):
            logits = model(tokens, use_cache=False).logits
        loss = loss_of(logits.float())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        progress(role, step + 1, steps, losses[-1])
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return round(sum(tail) / len(tail), 4)


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products where the hardware has them; elsewhere they would be slower."""
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16) if fast else nullcontext()


def _encode(documents: list[str], tokenizer: Tokenizer) -> Tensor:
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for item in tokenizer.encode_batch(documents) for token in [*item.ids, end]]
    return torch.tensor(ids, dtype=torch.long)


def _new_model(geometry: Transformer, recipe: Recipe) -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=geometry.width,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        intermediate_size=4 * geometry.width,
        max_position_embeddings=recipe.context,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
