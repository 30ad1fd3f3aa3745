"""The one decode loop: prefill, then rounds of draft, verify, accept, gather."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynatree import gpu
from dynatree.accept import Accepted, accept_greedy, ranks_and_children
from dynatree.clock import PhaseClock, median_seconds
from dynatree.controller import Controller, CostModel, measured_once
from dynatree.drafting import Drafter
from dynatree.errors import DecodeError
from dynatree.report import Reading, Report, Round
from dynatree.runner import ModelRunner
from dynatree.runtime import Runtime
from dynatree.sampling import Sampler, Sampling, SamplingMode
from dynatree.schema import RuntimeMode
from dynatree.selection import largest
from dynatree.strategies import StrategyBase
from dynatree.tree import DraftTree

if TYPE_CHECKING:
    from dynatree.observe import Observer


@dataclass
class Stats:
    """Facts of one generation.

    Attributes:
        rounds: one entry per verification, in order.
        target_forwards: prefill and one per round; what was begun in advance and is of no use after
            an end-of-sequence token does not count.
        draft_forwards: prefill, one per drafted level, and one where a draft resumes after
            rounds without.
        seconds: by phase: `prefill` (both models), `draft`, `verify`, `other` (accepting and
            gathering).
        first_token_seconds: time to first token (TTFT), the prefill of both models included.
    """

    rounds: list[Round] = field(default_factory=list)
    target_forwards: int = 0
    draft_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    first_token_seconds: float = 0.0

    @property
    def drafted_nodes(self) -> int:
        """Draft nodes that the target verified."""
        return sum(entry.nodes for entry in self.rounds)

    @property
    def accepted(self) -> list[int]:
        """Draft tokens committed, per round."""
        return [entry.accepted for entry in self.rounds]


@dataclass
class Generation:
    """The new tokens only (the end-of-sequence token included if hit), and how they came."""

    tokens: list[int]
    stats: Stats


class Decoder:
    """Decodes prompts, one at a time, with one target, one draft and one strategy.

    Owns the KV caches of both models, so that they are allocated once. A round has three phases
    (grow, verify, commit) over preallocated tensors; see `Runtime` for how they run.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        strategy: StrategyBase,
        max_length: int,
        runtime: RuntimeMode | Runtime = "auto",
        sampling: Sampling | None = None,
    ) -> None:
        """Prepares to decode sequences of up to `max_length` tokens, prompt included.

        Tokens are chosen as `sampling` says; None, like a temperature of 0, is greedily.

        Raises:
            DecodeError: the strategy needs a draft and there is none; the vocabularies or the
                devices differ; a model cannot hold `max_length` tokens, or its attention takes no
                tree mask (see `ModelRunner`); the device has no such runtime.
        """
        device = target.device
        self.strategy = strategy
        # Graphs are captured, and kernels launched, on the current device.
        on_cuda = device.type == "cuda"
        self._current = torch.cuda.device(device) if on_cuda else nullcontext()
        self.max_length = max_length
        self.runtime = runtime if isinstance(runtime, Runtime) else Runtime(runtime, device)
        longest = strategy.max_depth + 1
        # Static shapes draft and verify past `max_length`, and past the last living node.
        slots = self.runtime.capacity(max_length + longest + 1 + strategy.max_drafted)
        self._target = ModelRunner(target, slots, self.runtime)
        self._sampler: Sampler | None = None
        if sampling is not None and sampling.temperature > 0.0:
            rows = 2 + strategy.max_drafted
            vocab_size, children = self._target.vocab_size, strategy.max_children
            self._sampler = Sampler(sampling, vocab_size, longest, rows, children, device)
        self._drafter: Drafter | None = None
        if strategy.max_depth > 0:
            if draft is None:
                raise DecodeError(
                    f"strategy {type(strategy).__name__} needs a draft model, got None; pass one, "
                    "or use Autoregressive()"
                )
            runner = ModelRunner(draft, slots, self.runtime)
            if runner.vocab_size != self._target.vocab_size:
                raise DecodeError(
                    f"the draft's vocabulary ({runner.vocab_size}) is not the target's "
                    f"({self._target.vocab_size}); take two models with one tokenizer"
                )
            if runner.device != device:
                raise DecodeError(
                    f"the draft is on {runner.device} and the target on {device}; "
                    "move both to one device"
                )
            self._drafter = Drafter(runner, strategy, self.runtime, self._sampler)
        self._models = (target, draft)
        # Made by `prepare`, where the strategy chooses among several rules.
        self._controller: Controller | None = None
        # Rounds since the draft last read what was committed.
        self._missed = 0
        for role, model in self._runners():
            if model.context is not None and max_length - 1 > model.context:
                raise DecodeError(
                    f"{max_length} tokens (prompt and new ones) need a context of "
                    f"{max_length - 1}, the {role} has {model.context}; shorten the prompt or "
                    "lower max_new_tokens"
                )
        # What the phases share. The tree to verify is the root alone until one is grown.
        self._longest = longest
        self._most_rows = 1 + min(strategy.max_drafted, strategy.max_nodes)
        self._root = DraftTree(1, device)
        self._tree = self._root
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        # All committed tokens by position; what lies beyond `position` means nothing.
        self._history = torch.zeros(slots, dtype=torch.long, device=device)
        self._choices = torch.zeros(self._most_rows, dtype=torch.long, device=device)
        self._chosen = self._choices
        self._counted = torch.arange(1, slots + 1, device=device)
        self._report = Report(longest, device, gathered=self.runtime.static)
        self._kernels = gpu.kernels(device) if self.runtime.static else None
        self._streams = 0
        self._prepared = False
        self._observer: Observer | None = None

    def _rows(self, nodes: int) -> int:
        """Rows of a verification of `nodes` draft nodes and the root."""
        return min(self.runtime.rows(1 + nodes), self._most_rows)

    def _runners(self) -> list[tuple[str, ModelRunner]]:
        runners = [("target", self._target)]
        if self._drafter is not None:
            runners.append(("draft", self._drafter.runner))
        return runners

    def watch(self, observer: "Observer") -> None:
        """Tells `observer` of every round that is decoded from now on.

        Raises:
            DecodeError: the runtime replays phases, or pads their shapes: a round then has no
                moment and no tensors that an observer could read.
        """
        if self.runtime.static or self.runtime.mode != "eager":
            shapes = "static" if self.runtime.static else "exact"
            raise DecodeError(
                f"rounds are watched eagerly and with exact shapes, got runtime "
                f"{self.runtime.mode!r} with {shapes} ones; pass "
                "runtime=Runtime('eager', device, static=False)"
            )
        self.prepare()
        self._observer = observer
        if self._drafter is not None:
            self._drafter.observer = observer

    def prepare(self) -> None:
        """Compiles and captures what decoding will run; see `Runtime.preparation`.

        The first sequence does so by itself; call it before, to keep it out of a measurement.
        """
        with self._current:
            if not self._prepared and self.runtime.mode != "eager":
                self._prepare_phases()
            self._prepared = True
            if self._controller is None and len(self.strategy.rules) > 1:
                self._controller = Controller(self._costs(), self.strategy.rules)

    def _costs(self) -> CostModel:
        """What the phases cost, measured once per process for these models and this runtime."""
        target, draft = self._models
        assert draft is not None
        key = (self.runtime.mode, self.runtime.static, self.strategy)
        return measured_once(target, draft, key, self._measure)

    def _measure(self) -> CostModel:
        """Times the phases in the middle of the longest sequence, on arbitrary text."""
        rules, device = self.strategy.rules, self._position.device
        middle = max(1, self.max_length // 2)
        text = torch.arange(middle, device=device) % self._target.vocab_size
        stats = Stats()
        taken = [0] * len(rules)

        def grow(rule: int) -> None:
            taken[rule] = self._grow(rule, middle, rules[rule].max_depth, stats)

        def verify(nodes: int) -> None:
            self._verify(nodes, middle)
            self._commit(nodes)

        drafting = [rule for rule, each in enumerate(rules) if each.max_depth > 0]
        most = self._most_rows
        rows = [*(1 << bit for bit in range((most - 1).bit_length())), most]
        # The trees that are verified are those that were grown last, padded.
        calls: list[Callable[[], None]] = [partial(verify, count - 1) for count in rows]
        calls += [partial(grow, rule) for rule in drafting]
        with torch.inference_mode():
            self._prefill(text)
            grow(drafting[-1])
            seconds = median_seconds(
                calls,
                lambda: self._position.fill_(middle - 1),
                partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None,
            )
        steps = [0.0] * len(rules)
        for rule, each in zip(drafting, seconds[len(rows) :], strict=True):
            steps[rule] = each / taken[rule]
        return CostModel.fitted(steps, rows, seconds[: len(rows)])

    def _prepare_phases(self) -> None:
        runtime, drafter = self.runtime, self._drafter
        device = self._position.device
        with torch.inference_mode():
            prompt = torch.zeros(1, dtype=torch.long, device=device)
            self._prefill(prompt)
            phases: dict[tuple[object, ...], Callable[[], None]] = {}
            # A graph is of one shape; what is compiled only has its shapes left open.
            shapes = range(1, self.max_length + self._longest)
            bounds = shapes if runtime.mode == "cudagraph" else shapes[-1:]
            if drafter is not None:
                for visible in sorted({runtime.visible(bound + drafter.span) for bound in bounds}):
                    for index, rule in enumerate(self.strategy.rules):
                        if rule.max_depth == 0:
                            phases["catch_up", visible] = partial(self._catch_up_phase, visible)
                        if rule.max_depth > 0 or runtime.static:
                            phases["grow", index, visible] = partial(
                                self._grow_phase, index, rule.max_depth, visible
                            )
            most = self._most_rows
            nodes: Iterable[int] = range(most) if runtime.static else {0, most - 1}
            if drafter is not None and not drafter.varies:
                nodes = {most - 1}
            for rows in sorted({self._rows(count) for count in nodes}):
                for visible in sorted({runtime.visible(bound + rows) for bound in bounds}):
                    phases["verify", rows, visible] = partial(self._verify_phase, rows, visible)
                phases["commit", rows] = partial(self._commit_phase, rows)
            runtime.prepare(phases, lambda: self._position.fill_(1))

    def decode(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Generates up to `max_new_tokens` tokens; arguments and errors as `stream`."""
        stats = Stats()
        tokens: list[int] = []
        for chunk in self.stream(input_ids, max_new_tokens, eos_token_id, stats, seed):
            tokens += chunk
        return Generation(tokens, stats)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        stats: Stats | None = None,
        seed: int | None = None,
    ) -> Iterator[list[int]]:
        """Yields the tokens of each round as they are committed, and fills in `stats`.

        Args:
            input_ids: int64 [L] or [1, L], the prompt.
            max_new_tokens: tokens to generate at most.
            eos_token_id: generation ends after any of these.
            seed: takes the place of the sampling's for this sequence.

        Raises:
            DecodeError: a prompt that is empty or not int64 of that shape, a token outside the
                vocabulary, no token or more tokens than `max_length` wanted, NaN logits, or another
                sequence that was begun meanwhile.
        """
        prompt = self._check(input_ids, max_new_tokens)
        self.prepare()
        stop = _as_set(eos_token_id)
        stats = Stats() if stats is None else stats
        rounds = self._rounds(prompt, max_new_tokens, stop, stats)
        self._streams += 1
        this = self._streams
        if self._sampler is not None:
            self._sampler.begin(seed)
        mode = torch.inference_mode()
        while True:
            if this != self._streams:
                raise DecodeError(
                    "this decoder has begun another sequence, and its KV cache holds only one; "
                    "finish a stream before the next, or make a second Decoder"
                )
            # Entered per round, so that a consumer's own code runs in its own grad mode.
            with mode, self._current:
                chunk = next(rounds, None)
            if chunk is None:
                return
            yield chunk

    def _check(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        input_ids = _as_prompt(input_ids)
        if max_new_tokens < 1:
            raise DecodeError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(input_ids) + max_new_tokens > self.max_length:
            raise DecodeError(
                f"{len(input_ids)} prompt and {max_new_tokens} new tokens exceed max_length "
                f"{self.max_length}; shorten the prompt or lower max_new_tokens"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self._target.vocab_size:
            raise DecodeError(
                f"token {low if low < 0 else high} is outside the vocabulary (0 .. "
                f"{self._target.vocab_size - 1}); use the target's own tokenizer"
            )
        return input_ids.to(self._target.device)

    def _rounds(
        self, prompt: Tensor, max_new_tokens: int, stop: frozenset[int], stats: Stats
    ) -> Generator[list[int], None, None]:
        """Prefill, then one round per iteration; yields the tokens that each commits."""
        clock = PhaseClock(prompt.device)
        # Static shapes: the next tree is grown before the host knows what was committed, so that
        # it waits for the device once per round. Without a draft nothing has to be known of a
        # round to begin the next, and the device does not wait for the host.
        ahead = self.runtime.static
        try:
            clock.start()
            self._report.reset()
            self._prefill(prompt)
            stats.target_forwards = 1
            stats.draft_forwards = int(self._drafter is not None)
            clock.mark("prefill")
            stats.first_token_seconds = clock.seconds()["prefill"]
            report = self._report.read()
            bound = len(prompt)
            chunk, ends = _until(stop, report.tokens)
            remaining = 0 if ends else max_new_tokens - 1
            grown = False
            self._missed = 0
            rule = steps = 0
            # Done while the device verifies: the next choice is the first to need it.
            learn: Callable[[], object] | None = None
            while remaining > 0:
                begun = grown
                if not begun:
                    yield chunk
                    clock.mark("consumer")
                if self._drafter is not None and not begun:
                    rule = self._choose_rule(learn)
                    steps = self._grow(rule, bound, remaining - 1, stats)
                    report = self._report.read()
                    clock.mark("draft")
                nodes, depth = report.nodes, report.depth
                # Of this round, also after the next one has begun.
                verified = rule, steps, nodes, remaining
                if not (begun and self._drafter is None):
                    self._verify_and_commit(nodes, bound, clock)
                # One token is left at least, so the round that was just begun is not the last
                # one as far as the host can know.
                grown = ahead and remaining > 1
                if grown and self._drafter is not None:
                    rule = self._choose_rule(learn)
                    steps = self._grow(rule, bound + self._longest, remaining, stats)
                    clock.mark("draft")
                elif grown:
                    self._report.send()
                    self._verify_and_commit(0, bound + 1, clock)
                if begun:
                    # The consumer has the last round's tokens while the device is at work.
                    yield chunk
                    clock.mark("consumer")
                report = self._report.read()
                if self._controller is not None:
                    learn = partial(self._teach, *verified, report)
                chunk, ends = _until(stop, report.tokens[:remaining])
                bound += len(report.tokens)
                done = Round(
                    nodes,
                    depth,
                    len(report.tokens) - 1,
                    report.ngram_nodes,
                    report.ngram_accepted,
                )
                stats.rounds.append(done.within(remaining).cut(len(chunk)))
                remaining = 0 if ends else remaining - len(chunk)
                stats.target_forwards += 1
                clock.mark("other")
            yield chunk
        finally:
            stats.seconds = clock.seconds()
            stats.seconds.pop("consumer", None)

    def _verify_and_commit(self, nodes: int, bound: int, clock: PhaseClock) -> None:
        self._verify(nodes, bound)
        clock.mark("verify")
        self._commit(nodes)
        clock.mark("other")

    def _prefill(self, prompt: Tensor) -> None:
        self._position.fill_(len(prompt) - 1)
        choices = self._choose(self._target.prefill(prompt), self._root)
        if self._drafter is not None:
            self._drafter.prefill(prompt)
        self._position += 1
        self._history[: len(prompt)] = prompt
        self._history[len(prompt)] = choices[0]
        self._tree = self._root
        self._report.committed(choices, 1)
        self._report.grown(self._root)

    def _choose(self, logits: Tensor, tree: DraftTree) -> Tensor:
        """The token after each of the first n rows of `tree`, as [n]; the report hears of a NaN.

        Args:
            logits: [n, vocabulary]; greedy decoding takes their argmax.
        """
        if self._sampler is None:
            best, choices = largest(logits)
        else:
            rows, drafter = len(logits), self._drafter
            drafted = drafter is not None and tree is not self._root
            origins = drafter.origins[:rows] if drafter is not None and drafted else None
            best, choices = self._sampler.choose(
                logits, self._position, tree.first(rows).depths, origins
            )
        self._report.chosen(best)
        return choices

    def _choose_rule(self, learn: Callable[[], object] | None) -> int:
        """The rule of the next tree, after `learn` told the controller of the last round."""
        if self._controller is None:
            return 0
        if learn is not None:
            learn()
        return self._controller.choose()

    def _teach(self, rule: int, steps: int, nodes: int, remaining: int, report: Reading) -> None:
        """Tells the controller how a round went that had to commit `remaining` tokens at most."""
        assert self._controller is not None
        self._controller.observe(
            rule,
            steps,
            self._rows(nodes),
            report.ranks,
            report.children,
            report.ngram_accepted,
            self.runtime.static or remaining > self.strategy.rules[rule].max_depth,
        )

    def _grow(self, rule: int, bound: int, depth: int, stats: Stats) -> int:
        """Phase 1: a tree from the last committed token, whose position is at most `bound`.

        Returns:
            Draft steps that it took.
        """
        drafter = self._drafter
        assert drafter is not None
        # With static shapes every tree has the strategy's depth, and surplus tokens are cut off.
        # Otherwise no deeper than can be committed: the bonus token takes the last place.
        most = self.strategy.rules[rule].max_depth
        depth = most if self.runtime.static else min(depth, most)
        visible = self.runtime.visible(bound + drafter.span)
        if depth == 0:
            self._missed += 1
        elif self._missed > 0:
            self.runtime.run(("catch_up", visible), lambda: self._catch_up_phase(visible))
            self._missed = 0
            stats.draft_forwards += 1
        if depth == 0 and not self.runtime.static:
            self._tree = self._root
            self._report.grown(self._root)
            return 0
        self.runtime.run(("grow", rule, visible), lambda: self._grow_phase(rule, depth, visible))
        # A replayed phase leaves the drafter's own count as it is, and takes all steps.
        steps = depth if self.runtime.static else drafter.forwards
        stats.draft_forwards += steps
        return steps

    def _catch_up_phase(self, visible: int) -> None:
        assert self._drafter is not None
        self._drafter.catch_up(self._history, self._position, visible, self._missed)

    def _grow_phase(self, rule: int, depth: int, visible: int) -> None:
        assert self._drafter is not None
        self._drafter.follow(rule)
        self._tree = self._drafter.grow(self._history, self._position, depth, visible)
        self._report.grown(self._tree)

    def _verify(self, nodes: int, bound: int) -> None:
        """Phase 2: the target's choice after the root and each of `nodes` draft nodes."""
        rows = self._rows(nodes)
        visible = self.runtime.visible(bound + rows)
        self.runtime.run(("verify", rows, visible), lambda: self._verify_phase(rows, visible))

    def _verify_phase(self, rows: int, visible: int) -> None:
        tree, position = self._tree, self._position
        if tree is self._root:
            tree.plant(self._history.index_select(0, position))
        if tree.shown is None:
            columns = tree.columns(self._counted[:visible], position)
        else:
            columns = tree.shown[:visible]
        nodes = tree.first(rows)
        logits = self._target.forward(
            nodes.tokens,
            nodes.depths + position,
            nodes.indices + position,
            tree.attention_mask(rows, columns),
        )
        self._chosen = self._choose(logits, tree)
        if self.runtime.static:
            # Where the phase that follows finds it, whichever verification was replayed.
            self._choices[:rows] = self._chosen

    def _commit(self, nodes: int) -> None:
        """Phase 3: the accepted path joins the committed tokens of both models."""
        rows = self._rows(nodes)
        self.runtime.run(("commit", rows), lambda: self._commit_phase(rows))

    def _commit_phase(self, rows: int) -> None:
        tree, static = self._tree, self.runtime.static
        choices = self._choices[:rows] if static else self._chosen
        accepted = accept_greedy(tree, choices, self._longest, static)
        path, drafter = accepted.path, self._drafter
        if self._observer is not None:
            self._observer.verified(tree, choices, accepted)
        # A chain that the draft gave is where it belongs already, and so is a path that is one.
        moves = self.strategy.max_children > 1 or self.strategy.ngram_tokens > 0
        if moves and not static and drafter is not None:
            moves = not drafter.is_chain(path)
        moves = moves and rows > 1
        entries = self._advance(accepted, tree, moves)
        if drafter is None:
            return
        if moves:
            sources, drafted, destinations = entries
            self._target.cache.gather(sources, destinations)
            drafter.runner.cache.gather(drafted, destinations)
        drafter.learn(accepted.count, tree)
        if len(self.strategy.rules) > 1:
            self._report.ranked(*ranks_and_children(tree, path, rows))
        if self.strategy.ngram_tokens > 0:
            self._report.grafted(*drafter.grafted(path, accepted.count, rows))

    def _advance(self, accepted: Accepted, tree: DraftTree, moves: bool) -> tuple[Tensor, ...]:
        """What is accepted joins the history, and the position moves on.

        Returns:
            If `moves`, int64 [m] each: the slots of the path's entries in the target's cache and in
            the draft's, and those that they belong in.
        """
        position, history, drafter = self._position, self._history, self._drafter
        path, tokens, count = accepted.path, accepted.tokens, accepted.count
        if self._kernels is not None:
            origins = tree.indices if drafter is None else drafter.origins
            noted = self._report.span("tokens"), self._report.span("count")
            found: tuple[Tensor, ...] = self._kernels.commit(
                path, tokens, count, origins, history, position, noted
            )
            return found
        length = path.shape[0]
        entries: tuple[Tensor, ...] = ()
        if moves and drafter is not None:
            destinations = tree.indices[:length] + position
            entries = path + position, drafter.origins_of(path) + position, destinations
        history.index_copy_(0, tree.indices[1 : length + 1] + position, tokens)
        position += count
        self._report.committed(tokens, count)
        return entries


def generate(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    input_ids: Tensor,
    strategy: StrategyBase,
    max_new_tokens: int = 500,
    eos_token_id: int | Sequence[int] | None = None,
    runtime: RuntimeMode = "auto",
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    sampling: SamplingMode = "coupled",
) -> Generation:
    """Decoding with speculative drafts: the target's own output, sooner.

    With a temperature of 0 that is the target's greedy output, token for token. Otherwise it is a
    sample of the target's distribution; see `dynatree.sampling`.

    Args:
        target: an unmodified `AutoModelForCausalLM`, in eval mode.
        draft: a smaller model with the same vocabulary; None for `Autoregressive`.
        input_ids: int64 [L] or [1, L], the prompt.
        strategy: what to draft each round.
        max_new_tokens: tokens to generate at most.
        eos_token_id: generation ends after any of these; None never ends early.
        runtime: how forwards run; see `Runtime`. Compiling and capturing pay over many
            generations: for those, make one `Decoder` and use it again.
        temperature, top_p, top_k, seed: see `Sampling`.
        sampling: the `mode` of `Sampling`: `coupled` equals autoregressive sampling of the same
            seed, token for token; `rejection` has its distribution.

    Returns:
        The new tokens and the statistics of the run.

    Raises:
        DecodeError: see `Decoder`, `Decoder.stream` and `Sampling.checked`.
    """
    how = Sampling.checked(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, mode=sampling
    )
    input_ids = _as_prompt(input_ids)
    decoder = Decoder(target, draft, strategy, len(input_ids) + max_new_tokens, runtime, how)
    return decoder.decode(input_ids, max_new_tokens, eos_token_id)


def _as_prompt(input_ids: Tensor) -> Tensor:
    """`input_ids` as [L]; raises DecodeError when it is not one sequence of tokens."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.long:
        given = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise DecodeError(f"input_ids must be an int64 tensor, got {given}; use torch.tensor(ids)")
    if input_ids.dim() == 2 and len(input_ids) == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise DecodeError(
            "input_ids must be one sequence, of shape [L] or [1, L], got shape "
            f"{tuple(input_ids.shape)}"
        )
    if len(input_ids) == 0:
        raise DecodeError("the prompt is empty; give at least one token (the BOS token, say)")
    return input_ids


def _until(stop: frozenset[int], tokens: list[int]) -> tuple[list[int], bool]:
    """`tokens` up to the first of `stop`, and whether there is one."""
    for index, token in enumerate(tokens):
        if token in stop:
            return tokens[: index + 1], True
    return tokens, False


def _as_set(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    if isinstance(eos_token_id, int):
        return frozenset((eos_token_id,))
    return frozenset(eos_token_id)
