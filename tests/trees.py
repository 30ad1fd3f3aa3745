"""A record of trees that was made up: one prompt, hostile tokens, every fate."""

from datetime import UTC, datetime

from dynatree.specs import TreesSpec
from dynatree.tree_record import TreeRecord

SCRIPT = "</script><script>alert(1)</script>"
VOCABULARY = {
    0: " the",
    1: SCRIPT,
    2: "\n",
    3: "<img src=x onerror=alert(2)>&amp;",
    4: "\u2028\u202e\u200b",
    5: "'\"`${alert(3)}]]>-->",
    6: "\N{CJK UNIFIED IDEOGRAPH-65E5}\ufffd",
}
PROMPT = f"{SCRIPT} once\nupon"


def node(parent, token, log_prob, fate, choice=None, **changes):
    return {
        "parent": parent,
        "token": token,
        "log_prob": log_prob,
        "draft": log_prob,
        "fate": fate,
        "choice": choice,
        **changes,
    }


def rounds():
    """Two rounds; of the second the accepted path is followed by a pruned node that was right."""
    return [
        {
            "rule": 0,
            "nodes": [
                node(0, 0, 0.0, "root", 1),
                node(0, 1, -0.5, "accepted", 2),
                node(0, 3, -1.5, "refused", 4),
                node(1, 2, -0.9, "accepted", 3),
                node(3, 3, -3.5, "threshold"),
                node(1, 4, -1.25, "budget"),
                node(2, 5, -1.75, "breadth"),
                node(2, 4, -1.6, "refused", 0, draft=None),
            ],
            "committed": [
                {"token": 1, "text": VOCABULARY[1]},
                {"token": 2, "text": "\n"},
                {"token": 3, "text": VOCABULARY[3]},
            ],
        },
        {
            "rule": None,
            "nodes": [node(0, 3, 0.0, "root", 5)],
            "committed": [{"token": 5, "text": VOCABULARY[5]}],
        },
    ]


def spec(name="hostile"):
    return TreesSpec.model_validate(
        {
            "name": name,
            "pair": "micro",
            "models": {"target": {"path": "t"}, "draft": {"path": "d"}, "device": "cpu"},
            "prompts": [PROMPT, "second"],
            "strategy": {"strategy": "tree", "depth": 3, "branch_factor": 2, "node_budget": 4},
            "max_new_tokens": 5,
        }
    )


def record(name="hostile", **changes) -> TreeRecord:
    """The record; `changes` replace fields of it."""
    first = {"token": 0, "text": VOCABULARY[0]}
    described = spec(name)
    return TreeRecord.model_validate(
        {
            "spec": described,
            "spec_digest": described.digest,
            "source_digest": "5" * 64,
            "pair_digest": "a" * 64,
            "vocabulary": VOCABULARY,
            "prompts": [
                {"text": PROMPT, "first": first, "rounds": rounds()},
                {"text": "second", "first": first, "rounds": []},
            ],
            "provenance": {
                "device": {"name": "Test </script> CPU"},
                "git": {"commit": "c" * 40, "dirty": False},
            },
            "started": datetime(2026, 1, 1, tzinfo=UTC),
            "finished": datetime(2026, 1, 2, tzinfo=UTC),
            **changes,
        }
    )
