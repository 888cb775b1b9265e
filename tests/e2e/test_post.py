"""Post-processing with the real program and the default model: in an answer, in a conversation, and wherever a text is cut off."""

import json
import re
import subprocess
import sys

import pytest

import edge_rt
from edge_rt.postprocess.rules import RuleFile
from edge_rt.types import Delta, Done

PROGRAM = [sys.executable, "-m", "edge_rt.cli.main"]
SECRETS = ("13800138000", "ada.byron@example.com", "11010519491231002X")
TEXT = f"Call 138 0013 8000 or {SECRETS[0]}, write to {SECRETS[1]}; 身份证{SECRETS[2]}，谢谢"
GRAMMAR = f"root ::= {json.dumps(TEXT, ensure_ascii=False)}"
SHOWN = "Call [PHONE] or [PHONE], write to [EMAIL]; 身份证[ID]，谢谢"


@pytest.fixture(scope="module")
def model(smollm2):
    with edge_rt.open(smollm2, context=512) as opened:
        yield opened


def run(*words, **options):
    return subprocess.run([*PROGRAM, *words], text=True, capture_output=True, timeout=240, check=False, **options)


def pieces_of(text):
    """Parts of secrets that would tell something: four letters or digits of one in a row."""
    shown, *secrets = (re.sub(r"\W", "", one) for one in (text, *SECRETS))
    return [secret[i : i + 4] for secret in secrets for i in range(len(secret) - 3) if secret[i : i + 4] in shown]


def test_an_answer():
    done = run("run", "--temp", "0", "--grammar", GRAMMAR, "--post", "redaction", "-v", "Say it.")
    assert (done.returncode, done.stdout) == (0, SHOWN + "\n"), done.stderr
    assert "redaction 2 phone, 1 email, 1 id" in done.stderr


def test_all_four_by_a_rule_file(tmp_path):
    (tmp_path / "terms.csv").write_text("谢谢,多谢\nCall,Ring\n", encoding="utf-8")
    (tmp_path / "rules.toml").write_text(
        'pipeline = ["terminology", "redaction", "punctuation", "language_tags"]\n'
        '[[terminology.glossary]]\ndomain = "house"\nfile = "terms.csv"\n'
        '[redaction]\naction = "mask"\n[language_tags]\nlanguages = ["en"]\n',
        encoding="utf-8",
    )
    done = run("run", "--temp", "0", "--grammar", GRAMMAR, "--rules", str(tmp_path / "rules.toml"), "--json", "Say it.")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    text = "".join(event["text"] for event in events if event["event"] == "delta")
    assert text.startswith("<en>Ring ")
    assert text.endswith("多谢。</zh>")
    assert pieces_of(text) == []
    assert [event["tokens"] for event in events if event["event"] == "delta" and event["tokens"]] == []
    last = events[-1]
    assert [one["name"] for one in last["post"]] == ["terminology", "redaction", "punctuation", "language_tags"]
    assert last["post"][1]["counts"] == {"phone": 2, "email": 1, "id": 1}
    assert (last["rules"] != "", pieces_of(last["answer"])) == (True, [])


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_wherever_the_answer_is_cut(model, every):
    """At tokens all over the answer: the limit, and at some a stop string made of what comes next."""
    tokens = model.tokenize(TEXT, bos=False)
    with model.session() as session:
        for n in range(5, len(tokens), every):
            for options in ({"max_tokens": n}, {"stop": [model.detokenize(tokens[n : n + 2])]})[: 2 if n % 4 == 0 else 1]:
                stream = session.generate("Say it: ", temperature=0, grammar=GRAMMAR, post=["redaction"], **options)
                events = list(stream)
                text = "".join(event.text for event in events if isinstance(event, Delta))
                assert pieces_of(text) == [], (n, options, text)
                assert isinstance(events[-1], Done)


def test_a_cancelled_answer(model):
    with model.session() as session:
        for n in range(4, 60, 14):
            text = ""
            for i, event in enumerate(session.generate("Say it: ", temperature=0, grammar=GRAMMAR, post=["redaction"])):
                text += event.text if isinstance(event, Delta) else ""
                if i == n:
                    session.cancel()
            assert pieces_of(text) == [], (n, text)


def test_a_conversation_goes_on_from_the_models_own_words(tmp_path):
    saved = tmp_path / "talk.json"
    rules = ("--rule", 'language_tags.languages=["en"]', "--post", "redaction,language_tags")
    done = run("chat", "--temp", "0", "--grammar", GRAMMAR, *rules, input=f"Say it.\n/save {saved}\n")
    assert done.returncode == 0, done.stderr
    assert "<en>Call [PHONE]" in done.stdout
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"][-1]["content"] == SHOWN


def test_a_saved_session_is_said_to_hold_what_was_concealed(tmp_path):
    words = ("run", "--temp", "0", "--grammar", GRAMMAR, "--post", "redaction", "--session", str(tmp_path / "s.bin"), "Say it.")
    assert "holds the answer as the model wrote it, with what was concealed; keep it safe" in run(*words).stderr


def test_rules_change_between_answers(model, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("[redaction]\n", encoding="utf-8")
    with RuleFile(path, model.registry, watch=False) as rules, model.session() as session:

        def answer():
            events = list(session.generate("Say it: ", temperature=0, grammar=GRAMMAR, rules=rules))
            return "".join(event.text for event in events if isinstance(event, Delta))

        assert answer() == SHOWN
        path.write_text('[redaction]\nplaceholder = "<{kind}>"\nwrong = 1\n', encoding="utf-8")
        assert [rules.check(), rules.check(), answer()] == [False, False, SHOWN]
        assert "line 3" in str(rules.error)
        path.write_text('[redaction]\nkinds = ["email"]\n', encoding="utf-8")
        assert [rules.check(), rules.check(), answer()] == [False, True, TEXT.replace(SECRETS[1], "[EMAIL]")]
