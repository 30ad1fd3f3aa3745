"""Watching the decode loop: what every round drafted, what it left out and what it accepted."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynatree.accept import Accepted
from dynatree.clock import Timespan
from dynatree.decode import Decoder
from dynatree.pairs import Pair
from dynatree.provenance import provenance
from dynatree.runtime import Runtime
from dynatree.sources import source_digest
from dynatree.specs import TreesSpec
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree
from dynatree.tree_record import (
    Committed,
    Fate,
    Node,
    RecordedPrompt,
    RecordedRound,
    TreeRecord,
    occurring,
)
from dynatree.workloads import encode_prompts

Progress = Callable[[int, int], None]
"""Called after each prompt with the rounds that it took and the tokens that it gave."""


class Observer(Protocol):
    """What `Decoder.watch` takes. The tensors are the engine's own, and change after the call."""

    def offered(
        self,
        strategy: StrategyBase,
        read: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        kept: Tensor | None,
        stay: Tensor,
    ) -> None:
        """A level's candidates, before those that stay join the tree.

        Args:
            strategy: the rule that grows the tree.
            read: [w] int64, the expanded nodes of the tree that grows.
            tokens: [w * k] int64, k candidate children of each.
            log_probs: [w, k] float32, their cumulative draft log-probabilities.
            kept: [w, k] bool, what `strategy.keeps` says; None for all.
            stay: [m] int64, indices of the candidates that join the tree.
        """

    def grown(self, strategy: StrategyBase, tree: DraftTree, origins: Tensor) -> None:
        """A finished tree.

        Args:
            strategy: the rule that grew it.
            tree: all that was grown, before the budget selects.
            origins: [n] int64, the node of `tree` that each row of the tree to verify is.
        """

    def verified(self, tree: DraftTree, choices: Tensor, accepted: Accepted) -> None:
        """A verification: the target's `choices` [rows] after the first nodes of `tree`."""


class Recorder:
    """An observer that keeps the rounds of one sequence, greedily decoded.

    Attributes:
        rounds: for each, the strategy that drafted, None where none did, and the nodes.
    """

    def __init__(self) -> None:
        self.rounds: list[tuple[StrategyBase | None, list[Node]]] = []
        self._begin()

    def _begin(self) -> None:
        self._strategy: StrategyBase | None = None
        # Of the tree that is grown: tokens, parents and log-probabilities. Where there is none the
        # root alone is verified.
        self._grown: list[tuple[int, int, float]] = []
        self._origins = [0]
        # What the draft said of its nodes, by parent and token.
        self._draft: dict[tuple[int, int], float] = {}
        # Candidates that never joined it; their parents are nodes of it.
        self._dropped: list[tuple[int, int, float, Fate]] = []

    def offered(
        self,
        strategy: StrategyBase,
        read: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        kept: Tensor | None,
        stay: Tensor,
    ) -> None:
        """Notes what the draft says of each candidate, and why those that leave are dropped."""
        parents = read.repeat_interleave(log_probs.shape[-1]).tolist()
        wanted = [True] * len(parents) if kept is None else kept.flatten().tolist()
        candidates = zip(
            parents, tokens.tolist(), log_probs.flatten().tolist(), wanted, strict=True
        )
        staying = set(stay.tolist())
        for index, (parent, token, log_prob, want) in enumerate(candidates):
            if index in staying:
                self._draft[parent, token] = log_prob
                continue
            fate: Fate = "budget"
            if not want:
                fate = "breadth"
            elif log_prob < strategy.min_log_prob:
                fate = "threshold"
            self._dropped.append((parent, token, log_prob, fate))

    def grown(self, strategy: StrategyBase, tree: DraftTree, origins: Tensor) -> None:
        """Notes the tree."""
        size = tree.size
        self._strategy = strategy
        self._grown = list(
            zip(
                tree.parents[:size].tolist(),
                tree.tokens[:size].tolist(),
                tree.log_probs[:size].tolist(),
                strict=True,
            )
        )
        self._origins = origins.tolist()

    def verified(self, tree: DraftTree, choices: Tensor, accepted: Accepted) -> None:
        """Puts together what became of every candidate, and begins the next round."""
        path = accepted.path[: int(accepted.count)].tolist()
        grown = self._grown or [(0, int(tree.tokens[0]), 0.0)]
        choice = dict(zip(self._origins, choices.tolist(), strict=False))
        walked = {self._origins[row] for row in path}
        nodes = []
        for index, (parent, token, log_prob) in enumerate(grown):
            fate: Fate = "budget"
            if index in choice:
                fate = ("accepted" if index else "root") if index in walked else "refused"
            nodes.append(
                Node(
                    parent=parent,
                    token=token,
                    log_prob=log_prob,
                    draft=self._draft.get((parent, token)) if index else 0.0,
                    fate=fate,
                    choice=choice.get(index),
                )
            )
        # An n-gram may have given what the draft's own candidate had been dropped for.
        present = {(parent, token) for parent, token, _ in grown[1:]}
        nodes += [
            Node(parent=parent, token=token, log_prob=log_prob, draft=log_prob, fate=fate)
            for parent, token, log_prob, fate in self._dropped
            if (parent, token) not in present
        ]
        self.rounds.append((self._strategy, nodes))
        self._begin()


def record_trees(spec: TreesSpec, pair: Pair, progress: Progress = lambda *_: None) -> TreeRecord:
    """Decodes every prompt of `spec` and records its rounds.

    The loop is the one that is measured, run eagerly and with exact shapes: which trees are grown
    does not depend on how forwards run, but for the rounding of 16 bits.

    Args:
        spec: what to decode.
        pair: the loaded models of `spec.models`.
        progress: told after every prompt.

    Raises:
        DecodeError: a prompt that does not fit, or logits that hold a NaN.
    """
    span = Timespan()
    prompts = encode_prompts(spec, pair)
    longest = max(len(prompt) for prompt in prompts) + spec.max_new_tokens
    runtime = Runtime("eager", pair.target.device, static=False)
    decoder = Decoder(pair.target, pair.draft, spec.strategy, longest, runtime)
    recorded = []
    for prompt in prompts:
        recorded.append(_record(decoder, spec, pair.tokenizer, prompt))
        progress(len(recorded[-1].rounds), len(recorded[-1].committed))
    return TreeRecord(
        spec=spec,
        spec_digest=spec.digest,
        source_digest=source_digest(__file__),
        pair_digest=pair.digest,
        vocabulary={token: _text(pair.tokenizer, [token]) for token in sorted(occurring(recorded))},
        prompts=recorded,
        provenance={"models": pair.facts, **provenance(pair.target.device, seed=0)},
        started=span.started,
        finished=span.now,
    )


def _record(
    decoder: Decoder, spec: TreesSpec, tokenizer: PreTrainedTokenizerBase, prompt: Tensor
) -> RecordedPrompt:
    recorder = Recorder()
    decoder.watch(recorder)
    tokens: list[int] = prompt.tolist()
    chunks: list[list[Committed]] = []
    text = shown = _text(tokenizer, tokens)
    for chunk in decoder.stream(prompt, spec.max_new_tokens, tokenizer.eos_token_id):
        chunks.append([])
        for token in chunk:
            tokens.append(token)
            whole = _text(tokenizer, tokens).rstrip("\N{REPLACEMENT CHARACTER}")
            chunks[-1].append(Committed(token=token, text=whole[len(shown) :]))
            shown = whole if len(whole) > len(shown) else shown
    rules = spec.strategy.rules
    return RecordedPrompt(
        text=text,
        first=chunks[0][0],
        rounds=[
            RecordedRound(
                rule=None if strategy is None else rules.index(strategy),
                nodes=nodes,
                committed=committed,
            )
            for (strategy, nodes), committed in zip(recorder.rounds, chunks[1:], strict=True)
        ],
    )


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
