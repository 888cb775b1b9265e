"""Secrets that are numbers: identity cards, telephones, bank cards, addresses of the internet. Checksums and prefixes are right."""

from __future__ import annotations

import ipaddress
import random
from datetime import date, timedelta

from bench.post.secret import Secret, grouped, number, textual

AREAS = (
    "110101", "110105", "120104", "130102", "210102", "310104", "310115", "320106", "330106", "350203", "370202", "410105", "420106",
    "430104", "440106", "440305", "450103", "500112", "510104", "510107", "520103", "530102", "610113", "620102", "650104",
)  # fmt: skip
"""Districts whose codes begin identity numbers (GB/T 2260)."""
MOBILE_PREFIXES = (
    "133",
    "135",
    "136",
    "138",
    "139",
    "150",
    "151",
    "155",
    "158",
    "159",
    "166",
    "173",
    "176",
    "180",
    "186",
    "188",
    "189",
    "198",
    "199",
)
CITY_CODES = ("010", "020", "021", "022", "023", "024", "025", "027", "028", "029", "0311", "0512", "0531", "0571", "0755", "0769", "0898")
ISSUERS = (("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("34", 15), ("37", 15), ("6011", 16), ("3528", 16), ("622202", 19),
           ("621661", 19), ("622848", 19), ("621700", 19), ("622588", 16), ("625912", 16))  # fmt: skip
"""First digits and length: Visa, Mastercard, American Express, Discover, JCB, UnionPay (debit 19, credit 16)."""
COUNTRIES = (
    "+1 212 5## ####", "+1 (415) 5##-####", "+1-604-6##-####", "+44 20 79## ####", "+44 7911 1#####", "+49 30 2######", "+49 151 2#######",
    "+33 1 42 ## ## ##", "+33 6 12 ## ## ##", "+81 3-35##-####", "+81 90-12##-####", "+82 2-31##-####", "+82 10-24##-####",
    "+65 62## ####", "+65 8123 ####", "+852 23## ####", "+852 9123 ####", "+886 2 23## ####", "+886 912 ### ###", "+61 2 93## ####",
    "+61 412 ### ###", "+91 98765 #####", "+7 495 12#-##-##", "+55 11 9612#-####", "+39 06 698# ####", "+34 612 ## ## ##",
)  # fmt: skip
"""Numbers that are valid whatever digits take the places of #; checked against libphonenumber when they were chosen."""
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def digits(rng: random.Random, count: int) -> str:
    """Some random digits."""
    return f"{rng.randrange(10**count):0{count}d}"


def identity_check(first: str) -> str:
    """The last character of an identity number of 18 (GB 11643, ISO 7064 MOD 11-2)."""
    return "10X98765432"[sum(weight * int(c) for weight, c in zip(_WEIGHTS, first, strict=True)) % 11]


def luhn_valid(number_: str) -> bool:
    """Does the last digit check the others (ISO/IEC 7812)?"""
    doubled = "0246813579"
    return sum(int(doubled[int(c)] if i % 2 else c) for i, c in enumerate(reversed(number_))) % 10 == 0


def birthday(rng: random.Random) -> date:
    """Of somebody who may be alive."""
    return date(1945, 1, 1) + timedelta(days=rng.randrange(365 * 65))


def identity_18(rng: random.Random) -> Secret:
    """A mainland identity number; a check character X is written small at times."""
    first = rng.choice(AREAS) + f"{birthday(rng):%Y%m%d}" + digits(rng, 3)
    check = identity_check(first)
    return number("id_18", grouped(rng, first + (check.lower() if rng.random() < 0.2 else check), rng.choice(((6, 8, 4), (6, 4, 4, 4)))))


def identity_15(rng: random.Random) -> Secret:
    """An identity number as they were before 1999, without a check character."""
    return number("id_15", grouped(rng, rng.choice(AREAS) + f"{birthday(rng):%y%m%d}" + f"{rng.randrange(1, 1000):03d}", (6, 6, 3)))


def mobile(rng: random.Random) -> Secret:
    """A mainland mobile number, with or without the country's code."""
    text = grouped(rng, rng.choice(MOBILE_PREFIXES) + digits(rng, 8), (3, 4, 4))
    return number("mobile", rng.choice(("", "", "", "+86", "+86 ", "+86-", "0086", "0086 ", "86 ", "(+86)", "（+86）")) + text)


def landline(rng: random.Random) -> Secret:
    """A mainland landline number with its area code, or a service number. Written as digits alone, it is told by what stands before it."""
    if rng.random() < 0.15:
        return number("landline", f"400-{digits(rng, 3)}-{digits(rng, 4)}")
    code, rest = rng.choice(CITY_CODES), str(rng.choice((5, 6, 8))) + digits(rng, 7)
    if rng.random() < 0.2:
        return number("landline", f"+86 {code[1:]} {rest[:4]} {rest[4:]}")
    if rng.random() < 0.2:
        return number("landline", f"{code}{rest}")._replace(lead=rng.choice(("电话", "座机：", "Tel ", "phone: ")))
    return number("landline", rng.choice((f"{code}-{rest}", f"({code}) {rest}", f"（{code}）{rest}", f"{code} {rest[:4]} {rest[4:]}")))


def international(rng: random.Random) -> Secret:
    """A number of another country with its code after + or 00, as it is written there or without separators."""
    text = "".join(digits(rng, 1) if c == "#" else c for c in rng.choice(COUNTRIES))
    if rng.random() < 0.3:
        text = "+" + "".join(c for c in text if c.isdigit())
    return number("phone", "00" + text[1:] if rng.random() < 0.15 else text)


def card(rng: random.Random) -> Secret:
    """A bank card's number."""
    issuer, length = rng.choice(ISSUERS)
    first = issuer + digits(rng, length - len(issuer) - 1)
    whole = next(first + c for c in "0123456789" if luhn_valid(first + c))
    return number("card", grouped(rng, whole, {15: (4, 6, 5), 16: (4, 4, 4, 4), 19: rng.choice(((4, 4, 4, 4, 3), (6, 13)))}[length]))


def ipv4(rng: random.Random) -> Secret:
    """An address that could be a machine's; a port or a mask may follow, which is no secret."""
    text = ".".join(str(n) for n in (rng.randrange(1, 224), rng.randrange(256), rng.randrange(256), rng.randrange(1, 255)))
    return number("ipv4", text)._replace(tail=rng.choice(("", "", "", ":8080", ":443", "/24")))


def ipv6(rng: random.Random) -> Secret:
    """An address in full or shortened."""
    head = rng.choice((0x2001, 0x2408, 0x2409, 0x240E, 0x2A00, 0xFD12, 0xFE80))
    rest = [0 if rng.random() < 0.4 else rng.randrange(1, 1 << 16) for _ in range(6)] + [rng.randrange(1, 1 << 16)]
    text = ":".join(f"{n:x}" for n in (head, *rest))
    return textual("ipv6", rng.choice((text, text.upper(), str(ipaddress.IPv6Address(text)), ipaddress.IPv6Address(text).exploded)))
