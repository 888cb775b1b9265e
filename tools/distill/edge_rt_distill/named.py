"""What a setting names as MODULE:ATTRIBUTE: code of the user's own."""

from __future__ import annotations

import importlib
from typing import Any

from edge_rt.hooks import OptionError


def find(name: str, what: str, form: str) -> Any:
    """The attribute. ``what`` it is to be and the ``form`` of a name are for messages. Raises OptionError if there is none."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise OptionError(f"{name!r} names no {what}; write {form}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise OptionError(f"the {what} {name}: {error}; is its folder in PYTHONPATH?") from error
    except AttributeError:
        raise OptionError(f"the {what} {name}: {module} has no {attribute}; check the spelling") from None
