"""The schema of `results/trees/<pair>/<name>.json`: every draft tree of some decoded prompts.

It imports no models, so that a page can be made from a record without them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, Field, NonNegativeInt, NonPositiveFloat, model_validator

from dynatree.errors import ResultError
from dynatree.facts import Fact, read_facts, write_facts
from dynatree.specs import TreesSpec

Fate = Literal["root", "accepted", "refused", "threshold", "budget", "breadth"]
"""What became of a node: the last committed token; verified, and what the target chose or not;
never verified, because its probability is below the threshold, because more probable nodes fill the
budget, or because the strategy gives its parent fewer children."""

PRUNED: tuple[Fate, ...] = ("threshold", "budget", "breadth")


class Node(Fact):
    """One candidate of a round.

    Attributes:
        parent: index among the round's nodes; the root is its own parent.
        log_prob: cumulative log-probability of the path from the root, by which a budget ranks.
        draft: the same as the draft model has it, less where an n-gram raised it; None where an
            n-gram alone gave the node.
        choice: the token that the target chooses after it; None where the target did not read it.
    """

    parent: NonNegativeInt
    token: NonNegativeInt
    log_prob: NonPositiveFloat
    draft: NonPositiveFloat | None
    fate: Fate
    choice: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _is_never_lowered(self) -> Self:
        if self.draft is not None and self.draft > self.log_prob:
            raise ValueError(f"draft {self.draft} must be at most log_prob {self.log_prob}")
        return self


class Committed(Fact):
    """A committed token, and what it adds to the text.

    Bytes of one character may be split over tokens: the last of them adds the character.
    """

    token: NonNegativeInt
    text: str


class RecordedRound(Fact):
    """One round: its tree, what was left out of it, and what was committed.

    Attributes:
        rule: index among the rules of the strategy of the one that grew the tree; None where no
            draft was made.
        nodes: the root, then every candidate, each after its parent.
        committed: the accepted tokens and the target's own next one, unless the sequence ended
            with one of them.
    """

    rule: NonNegativeInt | None
    nodes: list[Node] = Field(min_length=1)
    committed: list[Committed] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_verified_tree(self) -> Self:
        root, *others = self.nodes
        if (root.fate, root.parent, root.log_prob) != ("root", 0, 0.0):
            raise ValueError("node 0 must be the root, its own parent, of probability 1")
        for index, node in enumerate(others, start=1):
            if node.parent >= index or node.fate == "root":
                raise ValueError(f"node {index} must follow its parent, and is no root")
            parent = self.nodes[node.parent]
            if (node.choice is None) != (node.fate in PRUNED):
                raise ValueError(f"node {index}: the target reads what was not pruned, and only it")
            if parent.fate in PRUNED and node.fate not in PRUNED:
                raise ValueError(f"node {index} is verified, and its parent is not")
            chosen = parent.fate in ("root", "accepted") and node.token == parent.choice
            if node.fate not in PRUNED and (node.fate == "accepted") != chosen:
                raise ValueError(f"node {index} is accepted iff the target chooses it")
        if root.choice is None:
            raise ValueError("node 0: the target must have read the root")
        path = self.path
        if len(path) != 1 + sum(node.fate == "accepted" for node in others):
            raise ValueError("the accepted nodes must form one path")
        tokens = [*(node.token for node in path[1:]), path[-1].choice]
        given = [entry.token for entry in self.committed]
        if given != tokens[: len(given)]:
            raise ValueError(f"committed {given} does not begin the accepted {tokens}")
        return self

    @property
    def path(self) -> list[Node]:
        """The root and the accepted nodes, from shallow to deep."""
        path, last = [self.nodes[0]], 0
        for index, node in enumerate(self.nodes):
            if node.fate == "accepted" and node.parent == last:
                path.append(node)
                last = index
        return path


class RecordedPrompt(Fact):
    """How one prompt, the `text`, was decoded: the prefill's token, then the rounds."""

    text: str
    first: Committed
    rounds: list[RecordedRound]

    @model_validator(mode="after")
    def _rounds_follow_each_other(self) -> Self:
        last = self.first.token
        for index, entry in enumerate(self.rounds):
            if entry.nodes[0].token != last:
                raise ValueError(f"round {index} must begin with the last committed token, {last}")
            last = entry.committed[-1].token
        return self

    @property
    def committed(self) -> list[Committed]:
        """All new tokens."""
        return [self.first, *(token for entry in self.rounds for token in entry.committed)]


class TreeRecord(Fact):
    """The draft trees of one configuration.

    Attributes:
        vocabulary: the text of every token that occurs, by itself.
        prompts: one for each prompt of the specification.
    """

    schema_version: Literal[1] = 1
    spec: TreesSpec
    spec_digest: str
    source_digest: str
    pair_digest: str
    vocabulary: dict[NonNegativeInt, str]
    prompts: list[RecordedPrompt]
    provenance: dict[str, object]
    started: AwareDatetime
    finished: AwareDatetime

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.spec_digest != self.spec.digest:
            raise ValueError("spec_digest is not the digest of spec: the file was edited")
        if len(self.prompts) != len(self.spec.prompts):
            raise ValueError(
                f"expected {len(self.spec.prompts)} decoded prompts, got {len(self.prompts)}"
            )
        missing = occurring(self.prompts) - self.vocabulary.keys()
        if missing:
            raise ValueError(f"vocabulary lacks the text of token {min(missing)}")
        rules = range(len(self.spec.strategy.rules))
        grown = {entry.rule for prompt in self.prompts for entry in prompt.rounds} - {None, *rules}
        if grown:
            raise ValueError(f"the strategy has {len(rules)} rules, a round names another")
        return self


def occurring(prompts: Sequence[RecordedPrompt]) -> set[int]:
    """Every token of the trees, of the target's choices and of the outputs."""
    nodes = [node for prompt in prompts for entry in prompt.rounds for node in entry.nodes]
    return {
        *(node.token for node in nodes),
        *(node.choice for node in nodes if node.choice is not None),
        *(entry.token for prompt in prompts for entry in prompt.committed),
    }


def threshold(min_log_prob: float) -> float | None:
    """The cumulative probability from which a node is kept; None if there is no threshold."""
    return math.exp(min_log_prob) if min_log_prob > -math.inf else None


def write_record(path: Path, record: TreeRecord) -> None:
    """Writes `record` to `path`, all or nothing."""
    write_facts(path, record)


def read_record(path: Path) -> TreeRecord:
    """Reads and validates a record; raises as `read_facts`."""
    return read_facts(path, TreeRecord, "record of trees")


def read_records(specs: Sequence[TreesSpec], folder: Path, source_digest: str) -> list[TreeRecord]:
    """The records of `specs` below `folder`, all of one pair of models.

    Raises:
        ResultError: there are none, or one is missing, damaged, or of another configuration, other
            code or other weights.
    """
    if not specs:
        raise ResultError(
            "no configuration to show trees of; name some under trees.configs in config.yaml"
        )
    records: list[TreeRecord] = []
    for spec in specs:
        path = folder / spec.pair / f"{spec.name}.json"
        record = read_record(path)
        for what, found, wanted in (
            ("with another configuration", record.spec_digest, spec.digest),
            ("by other code", record.source_digest, source_digest),
            ("with other weights", record.pair_digest, (records or [record])[0].pair_digest),
        ):
            if found != wanted:
                raise ResultError(f"{path}: recorded {what}; remove it and run: snakemake {path}")
        records.append(record)
    return records
