"""Ways to break the engine, one at a time, each as an earlier prototype was broken.

A mutation takes pytest's `monkeypatch`. Losslessness is only worth as much as the mistakes that its
tests and its certificate catch.
"""

import torch

from dynatree.accept import Accepted
from dynatree.cache import SlotCache
from dynatree.runner import ModelRunner
from dynatree.tree import DraftTree


def breadth_first_positions(monkeypatch):
    forward = ModelRunner.forward

    def broken(self, tokens, positions, *args, **kwargs):
        return forward(self, tokens, positions[0] + torch.arange(len(positions)), *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "forward", broken)


def siblings_see_each_other(monkeypatch):
    attention_mask = DraftTree.attention_mask

    def broken(self, count, columns):
        mask = attention_mask(self, count, columns)
        nodes = self.parents[: self.size]
        siblings = nodes[:count, None] == nodes[None]
        siblings[:, 0] = False
        siblings[self.depths[:count] == 0] = False
        root = int((columns == 0).sum())
        mask[:, root : root + self.size] |= siblings
        return mask

    monkeypatch.setattr(DraftTree, "attention_mask", broken)


def accepted_path_not_gathered(monkeypatch):
    monkeypatch.setattr(SlotCache, "gather", lambda self, sources, destinations: None)


def parents_not_asked(monkeypatch):
    def broken(tree, choices, longest, static):
        size = len(choices)
        agreed = choices[tree.parents[:size]] == tree.tokens[:size]
        agreed[0] = True
        last = agreed.nonzero()[-1, 0]
        path = tree.ancestors[last, :size].nonzero().flatten()
        tokens = torch.cat((tree.tokens[path[1:]], choices[last : last + 1]))
        return Accepted(path, tokens, torch.tensor([len(tokens)]))

    monkeypatch.setattr("dynatree.decode.accept_greedy", broken)


def tokens_past_eos(monkeypatch):
    monkeypatch.setattr("dynatree.decode._as_set", lambda eos: frozenset())


def refused_nodes_stay(monkeypatch):
    """The cache crop of an engine with slots: what lies beyond the tree is seen as committed."""
    attention_mask = DraftTree.attention_mask

    def broken(self, count, columns):
        return attention_mask(self, count, columns % (self.capacity + 1))

    monkeypatch.setattr(DraftTree, "attention_mask", broken)


def written_one_slot_late(monkeypatch):
    place = SlotCache.place

    def broken(self, slots, visible):
        late = len(slots) > 1 and int(slots[0]) > 0
        place(self, (slots + late).clamp(max=visible - 1), visible)

    monkeypatch.setattr(SlotCache, "place", broken)


MUTATIONS = {
    "positions": breadth_first_positions,
    "mask": siblings_see_each_other,
    "gather": accepted_path_not_gathered,
    "crop": refused_nodes_stay,
    "slots": written_one_slot_late,
    "acceptance": parents_not_asked,
    "eos": tokens_past_eos,
}
