"""The interactive page of draft trees: recorded rounds in one HTML file that needs no other.

Text from models reaches the page as JSON alone, in which nothing can end the element that holds
it, and the page's script makes text nodes of it. Its content security policy allows that one
script, by its digest, and no request.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from dynatree.errors import ResultError
from dynatree.tree_record import TreeRecord, threshold

_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render_page(records: Sequence[TreeRecord], template: Path) -> str:
    """The page that shows `records`, of one pair.

    Args:
        records: what to show, in this order.
        template: its style and its script lie beside it, under its name with `.css` and `.js`.

    Raises:
        ResultError: a file is missing, or the template is not valid.
    """
    name = template.name.split(".")[0]
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    try:
        style, script = (
            (template.parent / f"{name}.{kind}").read_text(encoding="utf-8")
            for kind in ("css", "js")
        )
        return environment.get_template(template.name).render(
            style=Markup(style),
            script=Markup(script),
            style_digest=_digest(style),
            script_digest=_digest(script),
            data=Markup(embedded(page_data(records))),
        )
    except OSError as error:
        raise ResultError(f"{template}: {error}; restore the template's files") from None
    except TemplateError as error:
        raise ResultError(
            f"{template}: {type(error).__name__}: {error}; fix the template"
        ) from None


def embedded(data: Any) -> str:
    """`data` as JSON for a script element: no character in it can end or change the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


def page_data(records: Sequence[TreeRecord]) -> dict[str, Any]:
    """What the page's script reads; `trees.js` says where it uses what."""
    first = records[0]
    device, git = (first.provenance.get(key) for key in ("device", "git"))
    vocabulary: dict[int, str] = {}
    for record in records:
        vocabulary |= record.vocabulary
    return {
        "facts": {
            "pair": first.spec.pair,
            "dtype": first.spec.models.dtype,
            "device": device.get("name") if isinstance(device, dict) else None,
            "commit": git.get("commit") if isinstance(git, dict) else None,
            "dirty": git.get("dirty") if isinstance(git, dict) else None,
            "recorded": max(record.finished for record in records).date().isoformat(),
        },
        "vocabulary": vocabulary,
        "configurations": [
            {
                "name": record.spec.name,
                "strategy": record.spec.strategy.describe(),
                "spec": record.spec_digest,
                "rules": [
                    {
                        "strategy": rule.describe(),
                        "threshold": threshold(rule.min_log_prob),
                        "budget": rule.max_nodes,
                    }
                    for rule in record.spec.strategy.rules
                ],
                "prompts": [decoded.model_dump(mode="json") for decoded in record.prompts],
            }
            for record in records
        ],
    }


def _digest(text: str) -> str:
    """SHA-256 as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
