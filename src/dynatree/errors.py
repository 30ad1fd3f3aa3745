"""Errors that a user can act on. The message names the thing, the bad value and the fix."""


class DynaTreeError(Exception):
    """Base of every error that DynaTree raises on purpose; the CLI prints it without traceback."""


class ConfigError(DynaTreeError, ValueError):
    """`config.yaml` says something that cannot be run."""


class PairError(DynaTreeError):
    """A target or draft model cannot be had, or the two do not fit together."""


class DecodeError(DynaTreeError, ValueError):
    """A prompt, a length or a model output that decoding cannot go on with."""


class ResultError(DynaTreeError):
    """A result file is missing, damaged, or belongs to another configuration."""


class LosslessError(DynaTreeError):
    """A strategy's fp32 output differs from the target's own greedy output: a bug, not noise."""
