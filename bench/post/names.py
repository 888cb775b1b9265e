"""Secrets of letters: e-mail, postal addresses, keys, passwords, names from a list."""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable

from bench.post.numbers import digits
from bench.post.secret import Secret, textual

NAMES = (
    "张伟", "王芳", "李娜", "刘洋", "陈晓明", "杨丽华", "赵建国", "黄美玲", "周杰", "吴秀英", "徐静怡", "孙志强", "欧阳修远", "司马晴",
    "Alice Johnson", "Robert Miller", "María García", "John O'Neill", "Emily Carter", "Wei Zhang", "Hans Müller", "Priya Sharma",
    "Jean-Luc Martin", "Olivia Brown", "Daniel Kim", "Sofia Rossi",
)  # fmt: skip
"""The list of names that the rules are given."""
_LOCAL = (
    "zhang.san",
    "li_si",
    "wangwu88",
    "alice",
    "bob.smith",
    "j.doe",
    "support",
    "finance-team",
    "x1",
    "m.chen",
    "hr",
    "lucy2019",
    "o.brien",
)
_DOMAINS = ("example.com", "example.org", "qq.com", "163.com", "foxmail.com", "gmail.com", "mail.example.co.uk", "corp.example.cn",
            "pku.edu.cn", "eu.mail.example.net", "sina.com.cn", "proton.me", "my-company.io", "a1b2.dev")  # fmt: skip
_PLACES = (
    ("北京市", "", ("朝阳区", "海淀区", "西城区")),
    ("上海市", "", ("浦东新区", "徐汇区", "静安区")),
    ("广东省", "深圳市", ("南山区", "福田区")),
    ("广东省", "广州市", ("天河区", "越秀区")),
    ("浙江省", "杭州市", ("西湖区", "余杭区")),
    ("江苏省", "南京市", ("鼓楼区", "玄武区")),
    ("四川省", "成都市", ("武侯区", "锦江区")),
    ("湖北省", "武汉市", ("洪山区", "江汉区")),
    ("陕西省", "西安市", ("雁塔区", "碑林区")),
)
_ROADS = ("中山北路", "人民路", "建国门外大街", "科技园南路", "文三路", "解放大道", "长江东路", "学院路", "和平街", "天府大道")
_ESTATES = ("", "", "阳光花园", "锦绣小区", "万科城", "龙湖天街")
_STREETS = ("Oak", "Maple", "Washington", "Park", "Main", "High", "Church", "Baker", "Elm Tree", "North Lincoln", "Victoria")
_TYPES = ("Street", "St", "Avenue", "Ave", "Road", "Rd", "Lane", "Drive", "Boulevard", "Court")
_US = (("Springfield", "IL", "627"), ("Austin", "TX", "787"), ("Portland", "OR", "972"), ("Boston", "MA", "021"), ("Denver", "CO", "802"))
_UK = (("London", "NW1 6XE"), ("Leeds", "LS1 4AP"), ("Manchester", "M1 1AE"), ("Bristol", "BS8 1TH"), ("Edinburgh", "EH1 1YZ"))
_ALNUM = string.ascii_letters + string.digits
_SYMBOLS = "!@#$%^&*_-+="
_PASSWORD_LEADS = (
    "password: ", "password=", "Password = ", "passwd: ", "pwd=", "密码：", "密码:", "密码是", "口令：", '"password": "', "PASSWORD='",
    "api_key=", "API_KEY: ", "secret_key = ", "access_token=", "client_secret: ", "DB_PASSWORD=", "--password=",
)  # fmt: skip


def email(rng: random.Random) -> Secret:
    """An address; ``user+tag`` at times, with dots, subdomains and a dash. From the @ on it is told."""
    local = rng.choice(_LOCAL) + (rng.choice(("", "", digits(rng, 2))))
    text = f"{local}{rng.choice(('', '', '+spam', '+news.2024'))}@{rng.choice(_DOMAINS)}"
    if rng.random() < 0.1:
        text = text.upper() if rng.random() < 0.3 else text.title()
    return textual("email", text, text.index("@") + 1)


def address_zh(rng: random.Random) -> Secret:
    """From the province or city down to the house or the door. It is told from the first digit of the house's number."""
    province, city, districts = rng.choice(_PLACES)
    before = (province if not city or rng.random() < 0.75 else "") + city + rng.choice(districts) + rng.choice(_ROADS)
    after = f"{rng.randrange(1, 400)}{rng.choice(('号', '号', '号', '弄'))}"
    if rng.random() < 0.7:
        block, unit = rng.choice(("栋", "号楼", "幢")), rng.choice(("", f"{rng.randrange(1, 6)}单元"))
        after += f"{rng.choice(_ESTATES)}{rng.randrange(1, 40)}{block}{unit}{rng.randrange(101, 2900)}室"
    return textual("address_zh", before + after, len(before) + 1)


def address_en(rng: random.Random) -> Secret:
    """House, street, town and post code of the United States or the United Kingdom. It is told from the end of the street's name."""
    house = f"{rng.randrange(1, 9999)}"
    street = f"{rng.choice(_STREETS)} {rng.choice(_TYPES)}"
    if rng.random() < 0.5:
        town, state, zip_code = rng.choice(_US)
        middle = rng.choice(
            ("", f", Apt {rng.randrange(1, 99)}{rng.choice('ABCD')}", f", Suite {rng.randrange(100, 999)}", f" #{rng.randrange(1, 99)}")
        )
        end = rng.choice(("", f"-{digits(rng, 4)}")) if rng.random() < 0.3 else ""
        return textual(
            "address_en", f"{house} {street}{middle}, {town}, {state} {zip_code}{digits(rng, 2)}{end}", len(house) + 1 + len(street)
        )
    town, code = rng.choice(_UK)
    before = rng.choice(("", "", f"Flat {rng.randrange(1, 60)}, "))
    house = rng.choice((str(rng.randrange(1, 300)), f"{rng.randrange(1, 300)}{rng.choice('AB')}"))
    return textual("address_en", f"{before}{house} {street}, {town} {code}", len(before) + len(house) + 1 + len(street))


def _drawn(rng: random.Random, alphabet: str, count: int) -> str:
    return "".join(rng.choices(alphabet, k=count))


def _jwt(rng: random.Random) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).decode().rstrip("=")

    claims = {"sub": digits(rng, 8), "name": rng.choice(_LOCAL), "iat": rng.randrange(1_600_000_000, 1_800_000_000)}
    return f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims)}.{_drawn(rng, _ALNUM + '-_', 42)}{_drawn(rng, _ALNUM, 1)}"


_KEYS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: "sk-" + _drawn(rng, _ALNUM, 48),
    lambda rng: "sk-proj-" + _drawn(rng, _ALNUM, 44),
    lambda rng: "sk-ant-api03-" + _drawn(rng, _ALNUM + "_", 60) + "AA",
    lambda rng: rng.choice(("ghp_", "gho_", "ghs_")) + _drawn(rng, _ALNUM, 36),
    lambda rng: "AKIA" + _drawn(rng, string.ascii_uppercase + "234567", 16),
    lambda rng: "AIza" + _drawn(rng, _ALNUM, 35),
    lambda rng: f"xoxb-{digits(rng, 12)}-{digits(rng, 12)}-{_drawn(rng, _ALNUM, 24)}",
    _jwt,
)


def key(rng: random.Random) -> Secret:
    """An API key or token of a known form."""
    return textual("key", rng.choice(_KEYS)(rng), lead=rng.choice(("", "", "", "Bearer ")))


def password(rng: random.Random) -> Secret:
    """What is told by what stands before it alone."""
    lead = rng.choice(_PASSWORD_LEADS)
    middle = _drawn(rng, _ALNUM + _SYMBOLS, rng.randrange(8, 24))
    text = rng.choice(string.ascii_letters) + middle + rng.choice(string.digits)
    return textual("password", text, lead=lead, tail=lead[-1] if lead[-1] in "\"'" else "")


def name(rng: random.Random) -> Secret:
    """A name of the list."""
    return textual("name", rng.choice(NAMES))
