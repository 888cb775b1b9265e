"""Texts with secrets in them, of which it is known what is secret and where. The same seed gives the same texts.

A text is a layout (prose, dialogue, table, JSON, log, list, ...) around frames of a language, and a frame stands around an item: a
secret, mostly with what it is called. Openings, frames, endings, layouts, and ways to name a secret combine to many thousands.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Literal

from bench.post import names, numbers
from bench.post.secret import Sample, Secret, Span, disguised

Language = Literal["zh", "en", "mixed"]
MAKERS: dict[str, Callable[[random.Random], Secret]] = {
    "id_18": numbers.identity_18, "id_15": numbers.identity_15, "mobile": numbers.mobile, "landline": numbers.landline,
    "phone": numbers.international, "card": numbers.card, "email": names.email, "ipv4": numbers.ipv4, "ipv6": numbers.ipv6,
    "address_zh": names.address_zh, "address_en": names.address_en, "key": names.key, "password": names.password, "name": names.name,
}  # fmt: skip
LABELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "id_18": (("身份证号", "身份证号码", "证件号", "公民身份号码"), ("ID number", "national ID", "identity card no.")),
    "id_15": (("旧身份证号", "身份证", "证件号码"), ("old ID number", "15-digit ID", "identity card")),
    "mobile": (("手机", "手机号", "联系电话", "电话", "微信同号"), ("mobile", "phone", "cell number", "mobile no.")),
    "landline": (("电话", "座机", "办公电话", "传真"), ("landline", "office phone", "Tel", "fax")),
    "phone": (("海外电话", "国际电话", "联系电话"), ("phone", "phone number", "Tel.", "call")),
    "card": (("银行卡号", "卡号", "信用卡", "收款账号"), ("card number", "credit card", "card no.", "Visa")),
    "email": (("邮箱", "电子邮件", "邮件地址", "E-mail"), ("email", "e-mail address", "mail")),
    "ipv4": (("IP", "服务器地址", "IP地址", "来源"), ("IP", "server", "client address", "host")),
    "ipv6": (("IPv6地址", "IP", "服务器"), ("IPv6", "IP address", "host")),
    "address_zh": (("地址", "家庭住址", "收货地址", "住址"), ("address", "ship to", "home address")),
    "address_en": (("地址", "收货地址", "寄送地址"), ("address", "ship to", "home address", "billing address")),
    "key": (("密钥", "令牌", "API Key", "token"), ("API key", "token", "key", "secret")),
    "password": ((), ()),
    "name": (("姓名", "联系人", "客户", "收件人"), ("name", "contact", "customer", "attendee")),
}
"""What a secret is called, in Chinese and in English. A password has its own lead and no other."""

_KINDS = tuple(MAKERS)
_WITHOUT_LEAD = tuple(kind for kind in MAKERS if kind != "password")
"""What may stand directly after another secret."""
_OPENINGS = {
    "zh": (
        "",
        "",
        "",
        "你好，",
        "好的，已经查到了。",
        "根据记录，",
        "以下是您要的信息：\n",
        "更新于2024年5月11日。",
        "共3条结果，第1条如下。",
        "😀 ",
    ),
    "en": (
        "",
        "",
        "",
        "Hi, ",
        "Sure, here it is. ",
        "According to our records, ",
        "Updated on 2024-05-11. ",
        "There were 3 results. ",
        "OK 👍 ",
        "FYI: ",
    ),
    "mixed": ("", "", "Hi，", "OK，收到。", "FYI，", "根据 CRM 记录，", "今天是 May 11, 2024，"),
}
_FRAMES = {
    "zh": (
        "{item}。",
        "请记一下{item}，谢谢。",
        "{item}，请在18:30之前联系。",
        "如果打不通，就用{item}。",
        "他说{item}，不过还没确认。",
        "我的{item}，订单金额是99.80元。",
        "系统显示{item}，状态正常。",
        "麻烦核对：{item}；共2份。",
        "“{item}”是客户留下的。",
        "（{item}）",
        "表格里写的是{item}吗？",
        "{item}这一项不能外传。",
        "本次登记：{item}，第12号窗口办理。",
        "退款会原路返回，{item}。",
        "先别发出去：{item}！",
        "2024-05-11 {item} 已处理",
        "备注【{item}】",
    ),
    "en": (
        "{item}.",
        "Please note {item} before Friday.",
        "If that fails, use {item} instead.",
        "He told me {item}, but I have not checked.",
        "The form says {item}; the total was $99.80.",
        "Is {item} still right?",
        "We have {item} on file (2 copies).",
        '"{item}" was left by the customer.',
        "Send it by 18:30 with {item}!",
        "As of 2024-05-11, {item} is valid.",
        "Do not share {item} with anyone.",
        "Line 12 reads {item} and nothing else.",
        "My {item}, thanks.",
        "Contact: {item}",
        "Ticket #4821: {item}, closed.",
    ),
    "mixed": (
        "{item}。",
        "请 check 一下 {item}，thanks。",
        "客户的{item}已经 update 了。",
        "{item}，please confirm。",
        "这个 case 的 {item} 不对，改一下 deadline 到 5/11。",
        "Meeting 前把{item}发给我。",
        "账号信息：{item} (verified)",
        "Server 端显示 {item}，status 200。",
        "老板说 {item} is wrong。",
    ),
}
_ENDINGS = {
    "zh": ("", "", "", "还有别的问题吗？", "感谢您的耐心等待。", "如有变动会另行通知。", "本短信免费。", "合计3件，共1280元。", "\n祝好！"),
    "en": (
        "",
        "",
        "",
        " Let me know if you need more.",
        " Thanks for waiting.",
        " It took 3.5 hours.",
        " Version 2.10.1 fixes it.",
        "\nBest regards",
    ),
    "mixed": ("", "", " Thanks！", "有问题 call 我。", " 明天 10:30 再 sync。", "\nBest"),
}
_JOINERS = {"zh": ("：", ":", "是", "为", "：", " "), "en": (": ", " is ", " ", "=", ": "), "mixed": ("：", ": ", " 是 ", " is ")}
_BETWEEN = {
    "zh": ("、", "，", " ", "/", "和", "；", "\n"),
    "en": (", ", " ", " / ", " and ", "; ", "\n"),
    "mixed": (" / ", "、", " and ", "，", " "),
}
_LAYOUTS = ("prose", "prose", "prose", "bare", "dialogue", "table", "json", "log", "list", "csv", "markdown", "code")
_MARK = re.compile("\x00([0-9]+)\x00")


def sample(seed: object) -> Sample:
    """A text with one secret or more, plain or disguised."""
    rng = random.Random(f"secrets {seed}")
    language: Language = rng.choice(("zh", "en", "mixed"))
    layout = rng.choice(_LAYOUTS)
    secrets: list[Secret] = []

    def item() -> str:
        kind = rng.choice(_KINDS)
        found = [MAKERS[kind](rng)]
        if rng.random() < 0.1 and kind != "password":
            found.append(MAKERS[kind if rng.random() < 0.5 else rng.choice(_WITHOUT_LEAD)](rng))
        written = []
        for secret in found:
            secret = disguised(rng, secret)
            written.append(f"{secret.lead}\x00{len(secrets)}\x00{secret.tail}")
            secrets.append(secret)
        return _named(rng, kind, language, layout, rng.choice(_BETWEEN[language]).join(written))

    marked = _ARRANGE[layout](rng, language, item)
    return _resolved(marked, secrets, language, layout)


def _named(rng: random.Random, kind: str, language: Language, layout: str, written: str) -> str:
    """A secret with what it is called, or not."""
    labels = LABELS[kind][0 if language == "zh" or (language == "mixed" and rng.random() < 0.5) else 1]
    if not labels or layout in ("bare", "table", "json", "csv") or rng.random() < 0.25:
        return written
    return rng.choice(labels) + rng.choice(_JOINERS[language]) + written


def sentence(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    """An opening, one or two frames and an ending."""
    frames = rng.choices(_FRAMES[language], k=rng.choice((1, 1, 2)))
    body = ("" if language == "zh" else " ").join(frame.replace("{item}", item()) for frame in frames)
    return rng.choice(_OPENINGS[language]) + body + rng.choice(_ENDINGS[language])


def _dialogue(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    ask, answer = {
        "zh": ("客服：请问您的信息是？\n", "客户："),
        "en": ("Agent: Could you confirm it?\n", "Customer: "),
        "mixed": ("User: 是多少?\n", "AI："),
    }[language]
    return f"{ask}{answer}{sentence(rng, language, item)}"


def _table(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    head = {"zh": "| 序号 | 内容 | 日期 |\n", "en": "| no. | value | date |\n", "mixed": "| ID | 内容 | date |\n"}[language]
    lines = [f"| {i} | {item()} | 2024-0{i}-11 |\n" for i in range(1, rng.choice((2, 3, 4)))]
    return head + "|---|---|---|\n" + "".join(lines)


def _json(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    field = {"zh": "内容", "en": "value", "mixed": "data"}[language]
    written = item()
    value = "{" + written + "}" if '"' in written else f'{{"{field}": "{written}", "id": {rng.randrange(1, 999)}}}'
    return rng.choice((value, f"```json\n{value}\n```"))


def _log(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    stamp = rng.choice(("2024-05-11 10:32:11 ", "[2024-05-11T10:32:11.482Z] ", "May 11 10:32:11 host app[4821]: ", "1715394731 "))
    level = rng.choice(("INFO ", "WARN ", "", "ERROR 500 "))
    event = {"zh": ("登录成功", "请求超时"), "en": ("login ok", "request failed"), "mixed": ("login 成功", "timeout 重试3次")}[language]
    return f"{stamp}{level}{item()} {rng.choice(event)} 12ms\n"


def _list(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    bullet = rng.choice(("- {}\n", "* {}\n", "{n}. {}\n", "（{n}）{}\n", "{n}、{}\n"))
    return "".join(bullet.replace("{n}", str(n)).replace("{}", item()) for n in range(1, rng.choice((2, 3, 4))))


def _csv(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    return "".join(f"{rng.randrange(1, 99)},{item()},{rng.randrange(1, 999)}.50\n" for _ in range(rng.choice((1, 2))))


def _markdown(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    return rng.choice(("## 2. Info\n\n**{}**\n", "> {}\n", "`{}`", "[{}](https://example.com/a?id=12)", "*{}* ")).replace("{}", item())


def _code(rng: random.Random, language: Language, item: Callable[[], str]) -> str:
    return rng.choice(("```\n{}\n```\n", "# {}\nx = 12\n", "curl -H '{}' https://example.com/v1\n", 'echo "{}" >> notes.txt\n')).replace(
        "{}", item()
    )


_ARRANGE: dict[str, Callable[[random.Random, Language, Callable[[], str]], str]] = {
    "prose": sentence, "bare": lambda rng, language, item: item(), "dialogue": _dialogue, "table": _table, "json": _json, "log": _log,
    "list": _list, "csv": _csv, "markdown": _markdown, "code": _code,
}  # fmt: skip


def _resolved(marked: str, secrets: Sequence[Secret], language: Language, layout: str) -> Sample:
    """The text with the secrets in their places."""
    text, spans = "", []
    for i, part in enumerate(_MARK.split(marked)):
        if i % 2:
            secret = secrets[int(part)]
            spans.append(Span(secret.kind, len(text), len(text) + len(secret.text), secret.enough, secret.numeric))
            part = secret.text
        text += part
    return Sample(text, tuple(spans), language, layout)
