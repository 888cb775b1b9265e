"""The configuration file: values, defaults, and mistakes with their line."""

import pytest

from edge_rt.daemon import config as configuration
from edge_rt.daemon.address import Address
from edge_rt.daemon.config import HttpConfig, RecordConfig
from edge_rt.errors import OptionError, RuleError

KEY, OTHER = "a" * 20, "b" * 20


def test_a_configuration(tmp_path):
    (tmp_path / "m.gguf").write_text("")
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "d.toml").write_text(
        'listen = ["/run/x.sock", "tcp:127.0.0.1:80"]\nusers = ["root", "1000"]\nkey_file = "key"\nrules = "r.toml"\ncredits = 8\n'
        'hung_after = 5\n[model]\nfile = "m.gguf"\ncontext = 512\npack = false\n[limits]\nconnections = 3\nhello_seconds = 0\n'
    )
    found = configuration.read_config(tmp_path / "d.toml")
    assert found.listen == (Address("unix", "/run/x.sock"), Address("tcp", "127.0.0.1", 80))
    assert (found.users, found.key, found.rules) == ({0, 1000}, "0123456789abcdef", str(tmp_path / "r.toml"))
    assert (found.model, found.model_options) == (str(tmp_path / "m.gguf"), {"context": 512, "pack": False})
    assert (found.credits, found.hung_after, found.limits.connections, found.limits.hello_seconds) == (8, 5.0, 3, 0.0)
    (tmp_path / "d.toml").write_text("")
    assert configuration.read_config(tmp_path / "d.toml") == configuration.default_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("credit = 3", r"d\.toml, line 1: the file has no rule credit; did you mean credits\?"),
        ("\ncredits = 0", r"line 2: credits is 0; give 1 to 4096"),
        ("[limits]\n\nconnections = '3'", "line 3: connections is a text; give a whole number"),
        ("listen = ['x', 'tcp:0.0.0.0:1']", "line 1: 'tcp:0.0.0.0:1' is no address"),
        ("users = ['nobody-at-all']", "line 1: there is no user nobody-at-all"),
        ("key_file = 'open'", "line 1: others may read the key"),
        ("key_file = 'short'", "line 1: the key has fewer than 16 characters"),
        ("listen = [", "line 1: it is not TOML"),
        ("\nmemory = 'lots'", "line 2: memory takes a size as 500M or 1.5G and not 'lots'"),
        ("[models.'a b']\nfile = 'x'", "line 1: 'a b' is no name for a model"),
        ("[models.a]\ncontext = 3", "models.a has no file; give a text"),
        ("[models.a]\nfile = 'x'\ncontex = 3", "line 3: models.a has no rule contex; did you mean context"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, text, message):
    (tmp_path / "open").write_text("0" * 16)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "short").write_text("0" * 15)
    (tmp_path / "short").chmod(0o600)
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(tmp_path / "d.toml")
    with pytest.raises(OptionError, match="cannot be read: no such file"):
        configuration.read_config(tmp_path / "none.toml")


def test_the_table_http(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n\n{OTHER}\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "c.toml").write_text('[http]\nkey_file = "keys"\norigins = ["https://a.example", "http://[::1]:3"]\nhosts = ["A"]\n')
    found = configuration.read_config(tmp_path / "c.toml").http
    assert found == HttpConfig((Address("tcp", "127.0.0.1", 8080),), (KEY, OTHER), False, ("https://a.example", "http://[::1]:3"), ("a",))
    (tmp_path / "c.toml").write_text('[http]\nlisten = ["/run/h.sock"]\nopen = true\n')
    assert configuration.read_config(tmp_path / "c.toml").http == HttpConfig((Address("unix", "/run/h.sock"),), open=True)
    (tmp_path / "c.toml").write_text("")
    assert configuration.read_config(tmp_path / "c.toml").http is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[http]\norigins = ['*']", r"line 2: '\*' is no origin"),
        ("[http]\norigins = ['http://a/']", "line 2: 'http://a/' is no origin"),
        ("[http]\nlisten = ['tcp:0.0.0.0:80']", "line 2: 'tcp:0.0.0.0:80' is no address"),
        ("[http]\nkeys = ['x']", "line 2: http has no rule keys"),
        ("[http]\nkey_file = 'short'", "line 2: the key has fewer than 16 characters"),
        ("key_file = 'keys'", "line 1: there are several keys"),
        ("[http]\nkey_file = 'empty'", "line 2: the key has fewer than 16 characters"),
    ],
)
def test_mistakes_in_the_table_http(tmp_path, text, message):
    for name, keys in (("keys", f"{KEY}\n{OTHER}"), ("short", f"{KEY}\nshort"), ("empty", "\n")):
        (tmp_path / name).write_text(keys)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(tmp_path / "c.toml")


def test_adapters(tmp_path):
    path = tmp_path / "daemon.toml"
    path.write_text(
        '[model]\nadapters = { law = "law.gguf" }\n[models.small]\nfile = "s.gguf"\n[models.small.adapters]\n"a.b" = "/a.gguf"\n'
    )
    found = configuration.read_config(path)
    assert found.model_options == {"adapters": {"law": str(tmp_path / "law.gguf")}}
    assert found.models["small"][1] == {"adapters": {"a.b": "/a.gguf"}}
    for text, line, said in (
        ('"a/b" = "x"', 2, "is no name"),
        ('law = ""', 2, "has no file"),
        ("law = 3", 2, "law is a whole number"),
    ):
        path.write_text(f"[model.adapters]\n{text}\n")
        with pytest.raises(RuleError, match=said) as caught:
            configuration.read_config(path)
        assert caught.value.line == line


def test_the_table_record(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[record]\nfile = "t.jsonl"\n')
    assert configuration.read_config(path).record == RecordConfig(tmp_path / "t.jsonl", 1.0, False, None, 64 << 20, 4)
    path.write_text('[record]\nfile = "/x/t"\nsample = 0.1\nanswers = true\nrules = "r.toml"\nmax_bytes = "1 MB"\nkeep = 2\n')
    assert configuration.read_config(path).record == RecordConfig(type(path)("/x/t"), 0.1, True, tmp_path / "r.toml", 1 << 20, 2)
    path.write_text("")
    assert configuration.read_config(path).record is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[record]\n", "record has no file; give a text"),
        ("[record]\nfile = ''\n", "line 2: record has no file"),
        ("[record]\nfile = 'x'\nsample = 1.5\n", "line 3: sample is 1.5; give 0.0 to 1.0"),
        ("[record]\nfile = 'x'\nmax_bytes = 9\n", "line 3: max_bytes is 9; give 65536 or more"),
        ("[record]\nfile = 'x'\nkeep = 0\n", "line 3: keep is 0; give 1 to 1000"),
        ("[record]\nfile = 'x'\nsampel = 1\n", "line 3: record has no rule sampel; did you mean sample"),
    ],
)
def test_mistakes_in_the_table_record(tmp_path, text, message):
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(tmp_path / "d.toml")
