"""The embedded pair: a target and a draft trained from text that every CPython ships.

A recipe may have both widened afterwards, to another geometry and the same function.
"""
