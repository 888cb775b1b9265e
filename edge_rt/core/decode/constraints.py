"""Grammars and JSON schemas that bind what a model writes.

A grammar is checked here first (grammar_check.py): what libllama would not survive never reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_rt.core.decode.grammar_check import check_grammar
from edge_rt.errors import ConstraintError, OptionError
from edge_rt.native.samplers import Grammar as Constraint

if TYPE_CHECKING:
    from edge_rt.native.llama import Vocab

__all__ = ["Constraint", "compile_constraint"]


def compile_constraint(vocab: Vocab, grammar: str | None, json_schema: Mapping[str, Any] | None) -> Constraint | None:
    """Compile a GBNF grammar (start: ``root``) or a JSON schema; None where neither is given.

    The result is at the start of its text. A Sampler copies it, so one can serve many requests.
    Raises ConstraintError, with line and column or the path in the schema, OptionError if both are given.
    """
    if grammar is not None and json_schema is not None:
        raise OptionError("a grammar and a JSON schema are given; give one of them")
    if json_schema is not None:
        from edge_rt.core.decode.json_schema import schema_to_grammar

        grammar = schema_to_grammar(json_schema)
        try:
            check_grammar(grammar, _no_tokens)
        except ConstraintError as error:
            raise ConstraintError(f"the JSON schema cannot be enforced: {error}") from None
    elif grammar is not None:
        check_grammar(grammar, lambda name: len(vocab.tokenize(name, special=True, bos=False)) == 1)
    return None if grammar is None else Constraint.parse(vocab, grammar)


def _no_tokens(name: str) -> bool:
    """Schemas make no use of token names."""
    return False
