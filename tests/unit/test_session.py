"""A cloned session goes on from where the other was, and neither hears of the other again."""

import pytest

from edge_rt.errors import OptionError
from edge_rt.types import Delta


def answer(session, prompt, **options):
    *events, done = session.generate(prompt, temperature=0, max_tokens=20, ignore_eos=True, **options)
    return "".join(event.text for event in events if isinstance(event, Delta)), done


@pytest.fixture
def model(open_null):
    return open_null(context=256)


@pytest.mark.parametrize("prune", [None, "pruned"])
def test_a_clone_goes_on_by_itself(model, prune):
    from edge_rt.types import Pruning

    options = {} if prune is None else {"prune": Pruning(64)}
    with model.session() as first:
        answer(first, "a" * 100, **options)
        with first.clone() as second:
            assert second.history.tokens == first.history.tokens
            said = "a" * 100 + "b" * 20
            one, other = answer(first, said, **options), answer(second, said, **options)
            assert (one[0], one[1].usage) == (other[0], other[1].usage)
            assert one[1].usage.reused_tokens >= 50
            before = first.tokens
            answer(second, said + "more", **options)
            assert first.tokens == before


def test_a_clone_of_nothing_is_a_session(model):
    with model.session(context=64) as first, first.clone() as second:
        assert answer(second, "x")[1].context.allowed == 64
        assert first.tokens == ()


def test_a_session_is_not_cloned_while_it_answers(model):
    with model.session() as session:
        events = session.generate("a", max_tokens=5)
        next(events)
        with pytest.raises(OptionError, match="answering a request; clone it when that is done"):
            session.clone()
        events.close()
        session.clone().close()
