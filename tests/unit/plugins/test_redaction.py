"""What redaction conceals and what it leaves alone, by kind; what stands for it; and which rules cannot be."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from edge_rt.errors import PluginError, RuleError
from edge_rt.hooks import PostProcessorFactory, Rules
from edge_rt.plugin_host.registry import Registry
from edge_rt.plugins import redaction
from edge_rt.plugins.redaction.detectors import issued, luhn, mainland_id
from edge_rt.postprocess.pipeline import Pipeline, Stage
from edge_rt.postprocess.rules import RuleFile, Ruleset
from edge_rt.testing.conformance import PostProcessorConformance

NAMES = ["张三丰", "李娜", "John Smith", "José García"]


def make(**rules: Any) -> Any:
    read = Rules(rules, ("redaction",))
    made = redaction.compile_rules(read)
    read.finish()
    return made


_DEFAULT = make(names=NAMES)


def redact(text: str, made: Any = None) -> str:
    processor = (made or _DEFAULT)()
    result: str = processor.feed(text) + processor.flush()
    return result


# Secrets by kind. Each is tried as it is and among Chinese and English, and numbers in many ways of writing them.
SECRETS = {
    "id": ["11010519491231002X", "110105194912310 02X", "110105491231002", "110105 19491231 002x"],
    "card": ["4111111111111111", "6222021234567890128", "378282246310005", "5555 5555 5555 4444", "6222-0212-3456-7890-128"],
    "phone": ["13812345678", "+8613812345678", "0086 138 1234 5678", "138-1234-5678", "(010) 8888 8888", "0571-88888888", "400-123-4567",
              "+1 415 555 2671", "(415) 555-2671", "+44 20 7946 0958", "020 7946 0958", "138.1234.5678", "+33 6 12 34 56 78"],
    "iban": ["GB82WEST12345698765432", "DE89 3704 0044 0532 0130 00"],
    "email": ["zhang.san@example.com", "o'brien+x@mail.example.co.uk", "josé@correo.es", "john @ gmail . com", "a_b@b-c.cn",
              "jane[at]example[dot]org", "ｂｏｂ＠ｅｘａｍｐｌｅ．ｃｏｍ", "li@qq。com"],
    "ip": ["192.168.10.25", "2001:db8:85a3::8a2e:370:7334", "fe80::1ff:fe23:4567:890a"],
    "mac": ["00:1a:2b:3c:4d:5e", "00-1A-2B-3C-4D-5E"],
    "api_key": ["sk-proj-abcdefghijklmnop1234", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "github_pat_11ABCDEFG0abcdefghijkl_mnopqrst",
                "AKIAIOSFODNN7EXAMPLE",
                "AIzaSyA1234567890abcdefghijklmnopqrstu", "xoxb-123456789012-abcdefGHIJKL",
                "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "sk_live_abcdefghij0123456789"],
    "token": ["q7Zx9Lk2Vb8Nw4Tr6Yp1Mc3D", "d41d8cd98f00b204e9800998ecf8427e", "mF9/x2Qe+Zr7Lw0Tb5Yk3Vn8Hd1Gs6Pc=="],
    "address": ["浙江省杭州市西湖区文三路478号3号楼501室", "北京市朝阳区建国路甲88号", "上海浦东新区世纪大道100号",
                "深圳市南山区科技园路5号龙湖花园3栋2单元501室",
                "12 Main Street, Springfield, IL 62704", "221B Baker Street, London NW1 6XE",
                "350 Fifth Avenue", "P.O. Box 1234"],
    "name": ["张三丰", "张 三 丰", "李娜", "John Smith", "JOHN SMITH", "john\nsmith", "jose garcia", "Jose\u0301 Garci\u0301a"],
}  # fmt: skip
AROUND = [("", ""), ("我的是", "，谢谢。"), ("请看：", "。"), ("It is ", " and so on"), ("(", ")"), ("x\n", "\n"), ("在2024年，", "的")]


@pytest.mark.parametrize(("kind", "secret"), [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets])
def test_a_secret_is_concealed(kind: str, secret: str) -> None:
    for before, after in AROUND:
        assert redact(before + secret + after) == f"{before}[{kind.upper()}]{after}"


@pytest.mark.parametrize("kind", ["id", "card", "phone"])
def test_a_number_is_found_however_it_is_written(kind: str) -> None:
    for secret in SECRETS[kind]:
        digits = "".join(char for char in secret if char.isalnum())
        wide = "".join(chr(ord(char) + 0xFEE0) for char in digits)
        for written in (digits, wide):
            for between in ("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", " ", "-", "\u00a0", "–", "—", "－", "·", "\u3000", " - "):
                if not secret.startswith(("4", "(", "0", "+")) or kind == "card":  # others count by their groups
                    assert redact(f"号{between.join(written)}。") == f"号[{kind.upper()}]。", (secret, between)


def test_what_is_passed_over_hides_nothing() -> None:
    for kind in ("email", "api_key", "token", "ip"):
        for secret in SECRETS[kind]:
            for between in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u0336":
                assert redact(f"a: {between.join(secret)} ok") == f"a: [{kind.upper()}] ok", secret


@pytest.mark.parametrize(("text", "expected"), [
    ("password: hunter2 ok", "password: [PASSWORD] ok"),
    ("密码：abc123，谢谢", "密码：[PASSWORD]，谢谢"),
    ('{"api_key": "AbC-123_xyz"}', '{"api_key": "[PASSWORD]"}'),
    ("DB_PASSWORD=correcthorse\n", "DB_PASSWORD=[PASSWORD]\n"),
    ("**密码**：`s3cr3t!`", "**密码**：`[PASSWORD]`"),
    ("验证码是 482913。", "验证码是 [PASSWORD]。"),
    ("the password is Tr0ub4dor&3.", "the password is [PASSWORD]."),
    ("token=abcd1234efgh", "token=[PASSWORD]"),
    ("postgres://bob:hunter2@db/x", "postgres://bob:[PASSWORD]@db/x"),
    ("Bearer abcdefghijklmnop.qrst ok", "Bearer [API_KEY] ok"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc+/=\n-----END RSA PRIVATE KEY-----\n",
     "[API_KEY]-----END RSA PRIVATE KEY-----\n"),
    ("电话：88886666 phone number: 5551234; Tel. 88886666", "电话：[PHONE] phone number: [PHONE]; Tel. [PHONE]"),
    ("mail a@b.com,c@d.org;", "mail [EMAIL],[EMAIL];"),
    ("13812345678 13912345678", "[PHONE] [PHONE]"),
    ("'a@b.com' 'c@d.com'", "'[EMAIL]' '[EMAIL]'"),
    ("1.13812345678", "1.[PHONE]"),
    ("2. 147.247.12.251\n（3）10.1.2.3:80", "2. [IP]\n（3）[IP]:80"), ("1. 240e:9a41:1e7d::d32d:924a", "1. [IP]"),
    ("1. fe80:0:4324:0:0:118c:0:573d", "1. [IP]"), ("server 43.141.133.111/24", "server [IP]/24"),
    ("1. 130102　640105　222\n", "1. [ID]\n"), ("INFO 440106 900709 746 timeout", "INFO [ID] timeout"),
    ("2024-05-11 510104 500728 692 310115710421524", "2024-05-11 [ID] [ID]"), ("1715394731 410105 - 910516 - 658 x", "1715394731 [ID] x"),
    ("1. 1　1　0　1　0　5　0　8　0　1　0　4　4　1　4\n", "1. [ID]\n"), ("（1）5 1 0 1 0 7 5 6 1 1 1 3 5 5 5", "（1）[ID]"),
    ("旧 110101000229311", "旧 [ID]"),
    ("（1）0086 16695947898", "（1）[PHONE]"), ("x 0755 6693 9804 0086176 3348 7001", "x [PHONE] [PHONE]"),
    ("（1）86 1-6-6-8-1-5-3-8-9-3-7", "（1）[PHONE]"),
    ("| 1 | 5 5 6 0 4 9 0 8 3 8 6 0 5 6 7 7 4071 6698 920 |", "| 1 | [CARD] 4071 6698 920 |"),
    ("1 3 8 1 2 3 4 5 6 7 8 12 x", "[PHONE] 12 x"), ("ERROR 500 4 7 6 7 0 1 5 9 4 1 0 1 9 8 1 5 ti", "ERROR 500 [CARD] ti"),
    ("+861-9-8-5-3-5-0-5-7-0-7 5 1 9 0 5 9 9 2 9 5 2 6 7 9 4 2 x", "[CARD] x"),
    ("IPv6 2a00:7883:c059:0:66bb:ae9:14d5:364d\n4111111111111111\n(025) 53037654", "IPv6 [IP]\n[CARD]\n[PHONE]"),
    ("密码：abc123def，status 200", "密码：[PASSWORD]，status 200"), ("[pwd=aeshWqqo!W](https://example.com)", "[pwd=[PASSWORD]](https://example.com)"),
    ("ｐｗｄ＝ａ，ｂ１２３", "ｐｗｄ＝[PASSWORD]"),
    ("sk-" + "aB3" * 400 + " ok", "[API_KEY] ok"),
    ("password=" + "aB3$" * 400 + " ok", "password=[PASSWORD] ok"),
])  # fmt: skip
def test_secrets_in_context(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize("text", [
    "3.14159265358979 and 0.4111111111111111", "2024-11-24 12:30:45", "version 1.2.3.4 and v10.0.0.1", "1.2.3.4567", "1.2.3.4.5",
    "#ff8800 #12345678", "ISBN 978-7-111-12345-6", "11010519491231002Y 11010519491331002X", "4111111111111112", "1234567890123456",
    "订单号 2024112412345678901", "12345678 电话簿",
    "Contact: ISBN 978-0-509-32108-0", "pi 3.14159265358", "😀 3.14159265358", "Contact: -0.9870322103",
    "If that fails, use git@ instead. It took",
    "ask @alice. It took", "a @ b. It took", "a @ b. it took", "联系。他说日期是1979-1982，", "tel 是日期是2018-2021",
    "As of 2024-05-11 Park Avenue", "As of 2024-05-11, Park Avenue", "at 10:32:11 Park Avenue", "Contact: SKU X149-6854-63",
    "A694-6354-26）2024-05-11", "order no. 864100875954", "ver 1.2.3.4 and Ver. 1.2.3.4", "1 1 1 0 1 0 5 0 8 0 1 0 4 4 1 4",
    "the string 1234567", "call 1000000 times", "hotel 8812345", "tel 20241124",
    "100,000,000 people", "12 34 56 78 90 12 34 56", "1 2 3 4 5 6 7 8 9 10 11 12",
    "std::vector<int> a::b", "550e8400-e29b-41d4-a716-446655440000", "the password is required", "password: str = None", "token: length",
    "密码是什么", "api_key=os.environ['KEY']", "sk-learn-like-estimators-are-nice", "foo@bar", "x @ y.T", "@decorator.name",
    "com/python/cpython/blob/main/Lib/platform", "NSURLSessionConfigurationDelegate", "北京是中国的首都，上海有2座机场。", "北京地铁10号线",
    "广州市人民政府令第5号", "In 1999 The President", "page 12 Street art", "张三 likes Johnny Smithson", "year 2023 2024 2025 2026",
    "10:20:30:40", "GB82 WEST 1234 5698 7654 33", "12345678901", "a1b2c3", "https://example.com/a/b?c=d&e=f", "👩‍👩‍👧 e\u0301 🇨🇳 1️⃣",
])  # fmt: skip
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text
    assert redact(f"请看{text}。") == f"请看{text}。"


def test_check_digits() -> None:
    assert mainland_id("11010519491231002X")
    assert [digit for digit in "0123456789X" if mainland_id(f"11010519491231002{digit}")] == ["X"]
    assert not mainland_id("110105490231002")
    assert luhn("79927398713")
    assert not luhn("79927398710")
    assert issued("4111111111111111")
    assert not issued("9111111111111111")


def test_tokens_are_told_from_words() -> None:
    drawn = random.Random(1)
    tokens = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=40)) for _ in range(500)]
    assert sum(redact(f"is {token} ok") != "is [TOKEN] ok" for token in tokens) <= 2
    for words in (
        "getHTTPResponseCode2FromURLConnection", "PolyForm-Small-Business-1", "numpy/random/src/mt19937/LICENSE", "x86_64-pc-linux-gnu",
        "test_redaction_streams_py311", "AbstractSingletonProxyFactoryBean", "manylinux2014_x86_64manylinux_2_17", "a" * 60,
    ):  # fmt: skip
        assert redact(words) == words


# ---- what stands for a secret ----------------------------------------------------------------------------------------


def test_mask() -> None:
    made = make(action="mask", keep_first=3, keep_last=4)
    assert redact("+86 138 1234 5678, 13812345678", made) == "+86*******5678, 138****5678"
    assert redact("密码：abc123", made) == "密码：******"  # all of it would be shown
    assert redact("sk-" + "aB3" * 100, made).count("*") == 32


def test_hash() -> None:
    key = "0123456789abcdef"
    made = make(action="hash", key=key)
    digest = hmac.new(key.encode(), b"13812345678", hashlib.sha256).hexdigest()[:12]
    assert redact("13812345678 138-1234-5678，１３８１２３４５６７８", made) == f"[PHONE:{digest}] [PHONE:{digest}]，[PHONE:{digest}]"
    long = "sk-" + "aB3" * 400
    assert redact(long, made) != redact(long + "x", made)


def test_each_kind_has_its_own_action_and_text() -> None:
    made = make(phone={"action": "mask", "keep_last": 4}, email={"placeholder": "<{kind}>"}, placeholder="[**]")
    assert redact("13812345678 a@b.com 192.168.1.1", made) == "*******5678 <email> [**]"


def test_kinds_that_are_not_wanted_are_left_alone() -> None:
    made = make(kinds=["email"], names=["John Smith"])
    text = "13812345678 192.168.1.1 00:1a:2b:3c:4d:5e sk-proj-abcdefghijklmnop1234 John Smith"
    assert redact(f"{text} a@b.com", made) == f"{text} [EMAIL]"


def test_addresses_anywhere() -> None:
    made = make(addresses="anywhere")
    for text in ("我家在文三路478号，", "西湖区文三路478号3号楼501室。", "寄到浙江省杭州市文三路9号"):
        assert redact(text, made) == {"我": "我家在[ADDRESS]，", "西": "[ADDRESS]。", "寄": "寄到[ADDRESS]"}[text[0]]
    for text in ("中山路上人很多", "地铁2号线", "第3号文件"):
        assert redact(text, made) == text


def test_names_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("王小明\n\n Ann  Lee \n", encoding="utf-8")
    rules = Rules({"names_file": "names.txt"}, ("redaction",), tmp_path)
    made = redaction.compile_rules(rules)
    rules.finish()
    assert redact("王小明和ANN LEE; Anne Lee", made) == "[NAME]和[NAME]; Anne Lee"


def test_custom_patterns() -> None:
    made = make(pattern=[
        {"name": "employee", "regex": r"EMP-\d{6}"},
        {"name": "case_number", "regex": r"case (?:no\. )?(?P<secret>[A-Z]{2}\d+)", "ignore_case": True, "action": "mask", "keep_last": 2},
    ])  # fmt: skip
    assert redact("emp-1 EMP-123456 ＥＭＰ－１２３４５６ Case no. ab12345", made) == "emp-1 [EMPLOYEE] [EMPLOYEE] Case no. *****45"


def test_counts_tell_no_secret() -> None:
    processor = _DEFAULT()
    processor.feed("13812345678 a@b.com 13912345678 and zhangsan")
    processor.cut("")
    assert dict(processor.counts) == {"phone": 2, "email": 1, "cut": 1}


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rules", "reason"), [
    ({"action": "hash"}, "a hash needs a key"),
    ({"action": "hash", "key": "short"}, "the key has 5 characters"),
    ({"action": "erase"}, "choose from placeholder, mask, hash"),
    ({"phone": {"action": "hash"}}, "a hash needs a key"),
    ({"phone": {"keep_last": 17}}, "give 0 to 16"),
    ({"kinds": ["phones"]}, "choose from id, card"),
    ({"names": ["x"]}, "too short"),
    ({"names_file": "none.txt"}, "cannot be read"),
    ({"cut": "hide"}, "choose from conceal, keep"),
    ({"telephone": {}}, "has no rule telephone"),
    ({"pattern": [{"regex": "a"}]}, "has no name"),
    ({"pattern": [{"name": "phone", "regex": "a"}]}, "no name of another kind"),
    ({"pattern": [{"name": "x", "regex": "("}]}, "not a regular expression"),
    ({"pattern": [{"name": "x", "regex": "a*"}]}, "matches the empty text"),
    ({"pattern": [{"name": "x", "regex": r"(a)\1"}]}, "write the alternatives out"),
    ({"pattern": [{"name": "x", "regex": "a.*?b"}]}, "write [^x]* instead"),
    ({"pattern": [{"name": "x", "regex": "^a"}]}, r"only \b and \B"),
    ({"pattern": [{"name": "x", "regex": "a(?=bc)"}]}, "at one character only"),
    ({"pattern": [{"name": "x", "regex": "(a(?P<secret>b))"}]}, "let it stand alone"),
    ({"pattern": [{"name": "x", "regex": "(?:a+b+)+"}]}, "too large"),
    ({"pattern": [{"name": "x", "regex": "a{400}"}]}, "let it match 320 at most"),
    ({"pattern": [{"name": "x", "regex": "a\u200bb"}]}, "passed over"),
])  # fmt: skip
def test_rules_that_cannot_be(rules: dict[str, Any], reason: str) -> None:
    with pytest.raises(RuleError, match=re.escape(reason)):
        make(**rules)


def test_a_mistake_is_placed() -> None:
    with pytest.raises(RuleError) as raised:
        make(pattern=[{"name": "a", "regex": "b"}, {"name": "x", "regex": "^a"}])
    assert raised.value.place == ("redaction", "pattern", 1, "regex")


# ---- in the pipeline -------------------------------------------------------------------------------------------------


def test_it_is_built_in_and_fails_closed() -> None:
    rules = Ruleset({"redaction": {"names": ["李娜"]}}, Registry.load(entry_points=False))
    pipeline = rules.pipeline()
    assert pipeline.conceals
    assert pipeline.feed("李娜: 138") + pipeline.feed("12345678。") == "[NAME]: [PHONE]。"
    assert json.dumps([dict(use.counts) for use in pipeline.use()]) == '[{"name": 1, "phone": 1}]'


def test_a_failure_says_nothing_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = _DEFAULT()
    pipeline = Pipeline([Stage("redaction", processor, fails_closed=True)])
    pipeline.feed("call 138123456")

    def fail(*_: object) -> None:
        raise ValueError("13812345678")

    monkeypatch.setattr(type(processor), "_judge", fail)
    with pytest.raises(PluginError) as raised:
        pipeline.feed("78 now")
    assert "138" not in str(raised.value)
    assert pipeline.feed("more") + pipeline.flush() == ""


def test_starting_up_loads_nothing_of_it() -> None:
    code = "import sys, edge_rt.plugins.redaction as r; r.edge_rt_post_processors(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name.startswith(("edge_rt.plugins.redaction.", "phonenumbers", "hmac"))] == []


# ---- the contract ----------------------------------------------------------------------------------------------------

EXAMPLES = MappingProxyType({
    "我的手机是138-1234-5678，谢谢。": "我的手机是[PHONE]，谢谢。",
    "card 4111 1111 1111 1111 and １１０１０５１９４９１２３１００２Ｘ": "card [CARD] and [ID]",
    "write to zhang.san@example.com. Key sk-proj-abcdefghijklmnop1234!": "write to [EMAIL]. Key [API_KEY]!",
    "住在浙江省杭州市西湖区文三路478号501室。": "住在[ADDRESS]。",
    "John Smith, 12 Main Street; password: hunter2": "[NAME], [ADDRESS]; password: [PASSWORD]",
    "192.168.1.1 q7Zx9Lk2Vb8Nw4Tr6Yp1Mc3D": "[IP] [TOKEN]",
})  # fmt: skip


class TestPlaceholders(PostProcessorConformance):
    examples = EXAMPLES
    rules = MappingProxyType({"names": NAMES})
    max_held = 384

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        return next(iter(redaction.edge_rt_post_processors()))


class TestMasksAndPatterns(TestPlaceholders):
    examples = MappingProxyType({
        "我的手机是138-1234-5678，aab": "我的手机是138****5678，***",
        "EMP-12345678 x EMP-12": "EMP****5678 x EMP-12",
    })  # fmt: skip
    rules = MappingProxyType({
        "action": "mask", "keep_first": 3, "keep_last": 4,
        "pattern": [{"name": "a", "regex": "a+b"}, {"name": "emp", "regex": r"EMP-\d{4,8}"}],
    })  # fmt: skip


class TestHashes(TestPlaceholders):
    examples = MappingProxyType({"138-1234-5678 or 13812345678.": "[PHONE:9a6a05aaf6e1] or [PHONE:9a6a05aaf6e1]."})
    rules = MappingProxyType({"action": "hash", "key": "0123456789abcdef", "cut": "keep"})


# ---- the documentation -----------------------------------------------------------------------------------------------


def test_the_documented_example_is_what_comes_out(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "post" / "redaction.md").read_text(encoding="utf-8")
    rules, text, expected = re.findall(r"```(?:toml|text)\n(.*?)```", page, re.S)[:3]
    (tmp_path / "rules.toml").write_text(rules, encoding="utf-8")
    with RuleFile(tmp_path / "rules.toml", Registry.load(entry_points=False), watch=False) as file:
        pipeline = file.current.pipeline()
        assert pipeline.feed(text) + pipeline.flush() == expected
    keys = set(re.findall(r"^\| `([a-z_]+)`", page, re.M))
    assert keys >= {"action", "placeholder", "keep_first", "keep_last", "key", "key_file", "kinds", "addresses", "cut", "cut_text", "names"}
