"""Long JSON as one short word of a command line.

Linux refuses a single argument above 128 KiB, and Snakemake hands a whole command to the shell as
one: the specification of a thousand configurations does not fit. Compressed, ten times as many do.
"""

import base64
import binascii
import zlib

from dynatree.errors import ConfigError

LONGEST = 120_000
"""Bytes of a packed text; what remains of the 128 KiB is for the rest of the command."""


def pack(text: str) -> str:
    """`text` compressed, in letters, digits, `-`, `_` and `=`, which no shell changes.

    Raises:
        ConfigError: it would be longer than a command line may be.
    """
    packed = base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()
    if len(packed) > LONGEST:
        raise ConfigError(
            f"the study takes {len(packed)} bytes of a command line, more than {LONGEST}; split it "
            "into several configuration files, or shorten its prompts by naming a file"
        )
    return packed


def unpack(word: str) -> str:
    """The text that `pack` was given; text that is JSON already is returned as it is.

    Raises:
        ConfigError: `word` is neither.
    """
    if word.lstrip().startswith("{"):
        return word
    try:
        return zlib.decompress(base64.urlsafe_b64decode(word)).decode()
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ConfigError(
            f"{word[:20]}...: neither JSON nor packed JSON ({error}); give one of both"
        ) from None
