"""The embedded pair: a target and a draft trained from text that every CPython ships."""
