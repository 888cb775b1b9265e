"""Fewer tokens: what is kept, texts that stay what they are, and a teacher that means the same with them."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import pytest
import torch
from edge_rt_distill.evaluate.measures import count, divergence
from edge_rt_distill.export import export
from edge_rt_distill.losses.token import TokenOptions, token_loss
from edge_rt_distill.model.alignment import align
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.load import Teacher, load, read_gguf
from edge_rt_distill.model.precision import Head
from edge_rt_distill.model.rows import TokenSequence, rows_of
from edge_rt_distill.model.vocabulary import Fewer, Merges, beginnings, choose, read_merges, with_fewer, write_fewer
from edge_rt_distill.run.running import from_stock
from edge_rt_distill.stages.material import Material
from edge_rt_distill.stages.teachers import LiveTeacher, ReadingTeacher
from edge_rt_distill.stages.terms import Scene, corpus_terms, errors
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hooks import ModelFileError, OptionError, UnsupportedModel
from edge_rt.testing.random_models import write_random_model

TEXT = "The cat and the dog are in the house, and there they are: the end of that. 你好! "


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Teacher:
    return load(tiny)


@pytest.fixture(scope="module")
def merges(tiny: Path) -> Merges:
    return read_merges(tiny)


def made(teacher: Teacher, merges: Merges, kept: list[int], folder: Path) -> Fewer:
    write_fewer(teacher.tokeniser.source, merges, kept, folder / "fewer.gguf")
    return with_fewer(teacher, merges, kept, folder / "fewer.gguf")


@pytest.fixture(scope="module")
def fewer(teacher: Teacher, merges: Merges, tmp_path_factory: pytest.TempPathFactory) -> Fewer:
    return made(teacher, merges, choose(merges, {}, 0.9), tmp_path_factory.mktemp("fewer"))


def sequence(fewer: Fewer, text: str = TEXT) -> TokenSequence:
    """A question that does not count and an answer that does."""
    tokeniser = fewer.teacher.tokeniser
    before = tokeniser.chat([{"role": "user", "content": "And then?"}], answer=True)
    tokens = [*before, *tokeniser.encode(text), tokeniser.end]
    return TokenSequence(tokens, [False] * len(before) + [True] * (len(tokens) - len(before)), "one")


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.88, 1), used=st.dictionaries(st.integers(0, 367), st.integers(1, 9), max_size=40))
def test_what_is_kept_can_be_merged_and_the_most_used_come_first(merges: Merges, share: float, used: dict[int, int]) -> None:
    kept = choose(merges, used, share)
    assert kept == sorted(set(kept))
    assert len(kept) <= share * len(merges.tokens)
    assert all(part in set(kept) for token in kept for part in merges.parts.get(token, ()))
    assert set(range(len(merges.tokens))) - set(merges.parts) <= set(kept), "bytes and control tokens"
    longest = max(merges.parts, key=lambda token: (len(merges.tokens[token]), token))
    assert longest in choose(merges, {**used, longest: 100}, 0.9)
    first = beginnings(merges, kept)
    assert all(first[token] == place for place, token in enumerate(kept))
    assert all(merges.tokens[token].startswith(merges.tokens[kept[first[token]]]) for token in range(len(first)))


def test_a_share_without_room_and_other_tokenisers_are_refused(merges: Merges, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"259 tokens cannot be left out, and 0\.5 of all are 128"):
        choose(merges, {}, 0.5)
    for name, kind, lines, error in (("a", "llama", ["a b"], UnsupportedModel), ("b", "gpt2", ["a b", "a z"], ModelFileError)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model(kind)
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(lines)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(error):
            read_merges(tmp_path / name)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_texts_stay_what_they_are(fewer: Fewer, text: str) -> None:
    text, ours = text.replace("\0", ""), fewer.teacher.tokeniser
    assert ours.decode(ours.encode(text)) == text
    assert ours.size == len(fewer.kept)


def test_control_tokens_and_the_template_are_the_teachers(teacher: Teacher, fewer: Fewer) -> None:
    ours, theirs = fewer.teacher.tokeniser, teacher.tokeniser
    assert fewer.kept[ours.end] == theirs.end
    messages = [{"role": "user", "content": "xyz"}]
    assert [fewer.kept[token] for token in ours.chat(messages, True)] == theirs.chat(messages, True)
    assert ours.piece(ours.end) == theirs.piece(theirs.end)


def test_the_teacher_says_the_same_of_tokens_that_it_and_its_student_have(teacher: Teacher, fewer: Fewer, merges: Merges) -> None:
    states = torch.randn(7, teacher.model.architecture.width, generator=torch.Generator().manual_seed(3))
    whole = teacher.model.logits(states).softmax(-1)
    wanted = torch.zeros(7, len(fewer.kept)).index_add_(1, torch.tensor(beginnings(merges, fewer.kept)), whole)
    said = Final(states, fewer.teacher.model.head_weight, fewer.rest)
    torch.testing.assert_close(said.log_probabilities(slice(None)).exp(), wanted, rtol=1e-5, atol=1e-9)
    labels = torch.arange(7)
    torch.testing.assert_close(said.of(labels), wanted[labels, labels].log(), rtol=1e-5, atol=1e-6)
    far = Head.of(fewer.teacher.model.head_weight * 100, fewer.rest).logits(states)
    assert bool(torch.isfinite(far).all()), "what is all but impossible has a logarithm"
    tokens = torch.tensor([fewer.kept[:20]])
    own = fewer.teacher.model(torch.arange(20)[None]).hidden
    assert own.equal(teacher.model(tokens).hidden), "its states are those of the same tokens"


@pytest.mark.parametrize("options", [TokenOptions(), TokenOptions("reverse"), TokenOptions(head=4, beta=0.0)], ids=str)
def test_a_student_learns_what_the_teacher_says_of_all_tokens(
    fewer: Fewer, merges: Merges, teacher: Teacher, options: TokenOptions
) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, theirs = (torch.randn(5, teacher.model.architecture.width, generator=draw) for _ in range(2))
    hidden.requires_grad_()
    weight = fewer.teacher.model.head_weight
    loss = token_loss(hidden, weight, Final(theirs, weight, fewer.rest), options=options).loss
    whole = teacher.model.logits(theirs).softmax(-1)
    p = torch.zeros(5, len(weight)).index_add_(1, torch.tensor(beginnings(merges, fewer.kept)), whole)
    q = (hidden @ weight.T).softmax(-1)
    if options.head:
        top = p.topk(4, -1).indices
        p, q = (torch.cat((one.gather(-1, top), 1 - one.gather(-1, top).sum(-1, keepdim=True)), -1) for one in (p, q))
    if options.kind == "reverse":
        p, q = q, p
    exact = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-6)
    ours, direct = (torch.autograd.grad(one, hidden, retain_graph=True)[0] for one in (loss, exact))
    torch.testing.assert_close(ours, direct, rtol=1e-3, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1, max_size=40), cut=st.integers(0, 6))
def test_tokens_of_one_text_are_laid_side_by_side(teacher: Teacher, fewer: Fewer, text: str, cut: int) -> None:
    """Also where a sequence begins or ends within a character."""
    whole = sequence(fewer, "的 the " + text.replace("\0", "") + " 好").tokens
    ours = whole[cut : len(whole) - cut]
    found = align(ours, teacher.tokeniser, fewer)

    def written(model: Teacher, tokens: list[int]) -> bytes:
        return b"".join(model.tokeniser.vocab.piece(token, True) for token in tokens)

    assert written(fewer.teacher, ours) == written(teacher, found.tokens)
    ends = {written(teacher, found.tokens[:read]) for read in range(1, len(found.tokens) + 1)}
    for at, read in enumerate(found.read, 1):
        before = written(fewer.teacher, ours[:at])
        assert before == written(teacher, found.tokens[:read]) if read else before not in ends
    for number, at in enumerate(found.origin):
        before = len(written(teacher, found.tokens[:number]))
        assert len(written(fewer.teacher, ours[:at])) <= before < len(written(fewer.teacher, ours[: at + 1]))


def reading(teacher: Teacher, fewer: Fewer) -> ReadingTeacher:
    return ReadingTeacher(LiveTeacher(teacher.model), teacher.tokeniser, fewer)


def test_a_student_with_all_tokens_of_its_teacher_is_no_nat_away(teacher: Teacher, merges: Merges, tmp_path: Path) -> None:
    fewer = made(teacher, merges, list(range(len(merges.tokens))), tmp_path)
    found = divergence(teacher.model, reading(teacher, fewer), [sequence(fewer)])
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1.0
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-5)


def test_a_student_with_fewer_is_compared_where_both_have_read_the_same(teacher: Teacher, fewer: Fewer, merges: Merges) -> None:
    one, ours = sequence(fewer), fewer.teacher.model
    text = align(one.tokens, teacher.tokeniser, fewer)
    assert len(one.tokens) > len(text.tokens), "some words of the text are not tokens any more"
    first = torch.tensor(beginnings(merges, fewer.kept))
    p = teacher.model.logits(teacher.model(torch.tensor([text.tokens])).hidden[0]).softmax(-1)
    folded = torch.zeros(len(p), len(fewer.kept)).index_add_(1, first, p)
    q = ours.logits(ours(torch.tensor([one.tokens])).hidden[0]).softmax(-1)
    pairs = [(at, read - 1) for at, read in enumerate(text.read[:-1]) if read and one.targets[at + 1]]
    each = [float((folded[j] * (folded[j] / q[i]).log()).sum()) for i, j in pairs]
    found = count(ours, reading(teacher, fewer), [one])
    assert found.number.tolist() == [len(pairs)]
    assert float(found.kl) == pytest.approx(sum(each), rel=1e-4)
    counted = [number for number, at in enumerate(text.origin) if one.targets[at]]
    assert float(found.student) == pytest.approx(-sum(float(q[t - 1, one.tokens[t]].log()) for t in range(len(q)) if one.targets[t]))
    assert float(found.teacher) == pytest.approx(-sum(float(p[t - 1, text.tokens[t]].log()) for t in counted))
    assert found.tokens.tolist() == [len(counted)]


def test_states_are_the_teachers_where_it_has_read_the_same_and_maps_are_of_the_students_tokens(teacher: Teacher, fewer: Fewer) -> None:
    view, some = reading(teacher, fewer), [sequence(fewer), sequence(fewer, "the end of the end"), sequence(fewer, "a")]
    rows = rows_of(some)
    known, hidden, found = view.knows(rows), view.hidden(rows), view.observe(rows, [1], [0])
    assert bool((known <= rows.real).all()), "it knows nothing of what fills a row up"
    assert not bool(known[rows.real].all()), "nor of the middle of a word"
    for row, one in enumerate(some):
        text = align(one.tokens, teacher.tokeniser, fewer)
        whole = teacher.model(torch.tensor([text.tokens]), states=[1])
        for at, read in enumerate(text.read):
            assert bool(known[row, at]) == (read > 0)
            if read:
                torch.testing.assert_close(hidden[row, at], whole.hidden[0, read - 1])
                torch.testing.assert_close(found.states[1][row, at], whole.states[1][0, read - 1])
    torch.testing.assert_close(found.hidden, hidden)
    assert found.attention[0].shape[-1] == rows.tokens.shape[1]
    each = [view.nats(rows_of([one]))[:, 0] for one in some]
    torch.testing.assert_close(view.nats(rows), torch.stack(each, 1))


def test_pieces_of_a_word_are_learnt_from_the_text(teacher: Teacher, fewer: Fewer) -> None:
    """And the rest from the teacher: each as often as it comes."""
    rows, student = rows_of([sequence(fewer)]), copy.deepcopy(fewer.teacher.model).requires_grad_(True)
    scene = Scene(student, reading(teacher, fewer), None, None)  # type: ignore[arg-type]
    scene = scene._replace(material=Material(epoch=lambda number, start: iter(()), held_out=[rows]))
    log_q = student.logits(student(rows.tokens).hidden).log_softmax(-1)
    spelt = (rows.mask > 0) & ~scene.teacher.knows(rows)
    told = (rows.mask > 0) & scene.teacher.knows(rows)
    log_p = scene.teacher.says(scene.teacher.hidden(rows)[told]).log_probabilities(slice(None))
    apart = (log_p.exp() * (log_p - log_q[told])).sum()
    spelling = -log_q[spelt].gather(-1, rows.labels[spelt][:, None]).sum()
    loss = corpus_terms(scene, rows, ["token"], TokenOptions())["token"]
    torch.testing.assert_close(loss, (apart + spelling) / rows.mask.sum(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert student.layers[0].attn_q.weight.grad is not None
    assert errors(scene, ["token"])["token"] == pytest.approx(float(apart.detach() / told.sum()), rel=1e-4), "gates look at the teacher"


def test_a_model_with_fewer_tokens_runs_in_both_runtimes(fewer: Fewer, tmp_path: Path) -> None:
    path = export(tmp_path / "student.gguf", fewer.teacher.model, fewer.teacher.tokeniser, matrices="F32", embedding="F32")
    assert from_stock(path, [sequence(fewer)]) < 1e-4
    assert read_gguf(path).architecture.vocabulary == len(fewer.kept)


def test_a_model_with_a_matrix_of_its_own_for_logits_loses_rows_of_both(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_head_kv": 1, "n_ff": 32}
    path = write_random_model(tmp_path / "untied.gguf", "llama", **sizes, type="F32", tied=False)
    teacher, merges = load(path), read_merges(path)
    fewer = made(teacher, merges, choose(merges, {}, 0.9), tmp_path)
    assert fewer.teacher.model.output is not None
    assert fewer.teacher.model.head_weight.equal(teacher.model.head_weight[fewer.kept])
    assert fewer.teacher.model.token_embd.weight.equal(teacher.model.token_embd.weight[fewer.kept])
    assert len(fewer.rest.weight) + len(fewer.kept) == len(merges.tokens)
