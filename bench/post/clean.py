"""Texts without a secret that tempt: numbers, codes and signs that look like one. What is not replaced in them was told from secrets."""

from __future__ import annotations

import random
from collections.abc import Callable

from bench.context.text import prose, sentences
from bench.post.numbers import digits, identity_check, luhn_valid
from bench.post.secret import Sample
from bench.post.texts import Language, sentence


def _order(rng: random.Random) -> str:
    """A number that is no identity, bank card or telephone number."""
    while True:
        number = rng.choice("23456789") + digits(rng, rng.choice((5, 7, 9, 11, 13, 15, 17)))
        card = 13 <= len(number) <= 19 and luhn_valid(number)
        identity = len(number) == 18 and identity_check(number[:17]) == number[17]
        if not card and not identity:
            return number


def _isbn(rng: random.Random) -> str:
    while True:
        group = rng.choice(("978-7-", "978-0-", "979-8-"))
        first = (group + digits(rng, 8)).replace("-", "")
        check = (10 - sum(int(c) * (3 if i % 2 else 1) for i, c in enumerate(first))) % 10
        if not luhn_valid(f"{first}{check}"):
            return f"ISBN {group}{first[4:7]}-{first[7:]}-{check}"


def _date(rng: random.Random) -> str:
    year, month, day = rng.randrange(1900, 2030), rng.randrange(1, 13), rng.randrange(1, 29)
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{year}年{month}月{day}日",
            f"{month}/{day}/{year}",
            f"{year}{month:02d}{day:02d}",
            f"{year}-{year + 3}",
        )
    )


def _time(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.randrange(60)
    return rng.choice(
        (
            f"{hour:02d}:{minute:02d}",
            f"{hour:02d}:{minute:02d}:{minute:02d}.{digits(rng, 3)}",
            f"{hour}点{minute}分",
            f"2024-05-11T{hour:02d}:{minute:02d}:00+08:00",
        )
    )


def _price(rng: random.Random) -> str:
    return rng.choice(
        (
            f"¥{rng.randrange(1, 9999)}.{digits(rng, 2)}",
            f"${rng.randrange(1, 999)},{digits(rng, 3)}.00",
            f"{rng.randrange(1, 99999)}元",
            f"EUR {rng.randrange(1, 999)}.{digits(rng, 3)},50",
        )
    )


def _path(rng: random.Random) -> str:
    return rng.choice(
        (
            "/var/log/app/2024/05/11.log",
            "C:\\Users\\Public\\doc_v2.10.txt",
            "src/main/java/App.java:128",
            "../data/part-00012.csv",
            "https://example.com/item/48213?page=3",
        )
    )


def _part(rng: random.Random) -> str:
    return f"{rng.choice(('PN', 'SKU', 'Model', '型号'))} {rng.choice('ABX')}{digits(rng, 3)}-{digits(rng, 4)}-{digits(rng, 2)}"


def _citation(rng: random.Random) -> str:
    volume, number, page = rng.randrange(1, 90), rng.randrange(1, 12), rng.randrange(100, 400)
    return f"[{rng.randrange(1, 40)}] Vol. {volume}({number}), pp. {page}-{page + 12}, doi:10.{digits(rng, 4)}/{digits(rng, 6)}"


LOOK_ALIKES: dict[str, tuple[tuple[str, str], Callable[[random.Random], str]]] = {
    "order number": (("订单号", "order no."), _order),
    "date": (("日期", "date"), _date),
    "time": (("时间", "time"), _time),
    "price": (("金额", "total"), _price),
    "decimals": (("圆周率", "pi"), lambda rng: "3.14159265358979323846264338327950288"[: rng.randrange(6, 36)]),
    "version": (
        ("版本", "version"),
        lambda rng: f"v{rng.randrange(1, 9)}.{rng.randrange(40)}.{rng.randrange(200)}{rng.choice(('', '-rc1', 'b2'))}",
    ),
    "isbn": (("书号", "book"), _isbn),
    "coordinates": (("坐标", "location"), lambda rng: f"{rng.randrange(90)}.{digits(rng, 6)}, {rng.randrange(180)}.{digits(rng, 6)}"),
    "citation": (("出处", "see"), _citation),
    "part number": (("型号", "part"), _part),
    "colour": (
        ("颜色", "color"),
        lambda rng: rng.choice(
            (f"#{rng.randrange(1 << 24):06x}", f"rgb({rng.randrange(256)}, {rng.randrange(256)}, {rng.randrange(256)})")
        ),
    ),
    "path": (("文件", "file"), _path),
    "mention": (("请@", "ask"), lambda rng: rng.choice(("@alice", "user@", "@张三", "a @ b", "git@", "3@5元"))),
    "quantity": (
        ("数量", "quantity"),
        lambda rng: rng.choice(
            (
                f"{rng.randrange(1, 1 << 40):,}",
                f"{rng.randrange(1, 99)}×{rng.randrange(1, 99)}",
                f"{rng.randrange(1, 99)} kg",
                f"{rng.randrange(1, 9999)}/{rng.randrange(1, 9999)}",
                f"-{rng.random():.10f}",
                f"{rng.random() * 1e9:.3e}",
            )
        ),
    ),
    "street": (
        ("路线", "way"),
        lambda rng: rng.choice(("中山路", "走人民路再左转", "长江以北", "down the street", "Park Avenue", "12 Angry Men", "5 Main points")),
    ),
    "words": (
        ("内容", "about"),
        lambda rng: rng.choice(
            (
                "password policy",
                "密码学",
                "the API key rotation guide",
                "sk-learn",
                "token by token",
                "口令牌",
                "email marketing",
                "身份证明",
            )
        ),
    ),
    "commit": (("提交", "commit"), lambda rng: f"{rng.randrange(1 << 160):040x}"),
    "uuid": (("编号", "id"), lambda rng: "-".join(f"{rng.randrange(16**n):0{n}x}" for n in (8, 4, 4, 4, 12))),
}
"""Class -> what it is called in Chinese and in English, and how one is made."""
TOKEN_LIKE = ("commit", "uuid")
"""Random by nature as keys are; reported apart."""


def clean(seed: object) -> Sample:
    """A text without secrets; its ``layout`` is the class of what tempts in it, or ``prose``."""
    rng = random.Random(f"clean {seed}")
    language: Language = rng.choice(("zh", "en", "mixed"))
    if language == "en" and rng.random() < 0.3:
        return Sample(rng.choice(sentences(rng.choice(prose()))), (), "en", "prose")
    kind = rng.choice(list(LOOK_ALIKES))
    labels, make = LOOK_ALIKES[kind]

    def item() -> str:
        joiner = rng.choice(("：", "是", "")) if language == "zh" else " "
        return make(rng) if rng.random() < 0.2 else labels[0 if language == "zh" else 1] + joiner + make(rng)

    return Sample(sentence(rng, language, item), (), language, kind)
