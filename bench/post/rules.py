"""The rules that post-processors are measured with."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from bench.context.text import prose
from bench.post.names import NAMES

ALL = ("punctuation", "terminology", "redaction", "language_tags")
TERMS = 5000
REDACTION: Mapping[str, Any] = {"redaction": {"names": list(NAMES), "placeholder": "⟦{KIND}⟧", "cut_text": "⟦CUT⟧"}}
HASHING: Mapping[str, Any] = {"redaction": {**REDACTION["redaction"], "action": "hash", "key": "of no use to anybody"}}
PLACEHOLDER = re.compile(r"⟦([A-Z_]+)⟧|\[[A-Z_]+:[0-9a-f]{12}\]")
"""What takes the place of a secret by these rules, or of what may begin one where a text was cut off. No text has it by itself."""
GROUPS = ("identity", "phone", "card", "email", "ip", "address", "key", "name")
"""Kinds of secrets as they are compared."""
_GROUPS = {
    "id_18": "identity", "id_15": "identity", "mobile": "phone", "landline": "phone", "ipv4": "ip", "ipv6": "ip", "address_zh": "address",
    "address_en": "address", "password": "key", "token": "key", "id": "identity", "api_key": "key",
}  # fmt: skip
_CHARACTERS = "数据模型网络系统设备存储计算接口服务器用户权限日志缓存线程进程任务调度内核驱动芯片编译链接端口协议加密签名证书会话令牌"


def group_of(kind: str) -> str:
    """The kind of secret that a finer kind, or a placeholder's name, belongs to."""
    return _GROUPS.get(kind.lower(), kind.lower())


def terms(count: int = TERMS) -> dict[str, str]:
    """Term -> what is written instead: Chinese ones of two to five characters, and one or two words of English prose."""
    rng = random.Random("terms")
    words = sorted({word.lower() for paragraph in prose() for word in re.findall(r"[A-Za-z]{4,}", paragraph)})
    found: dict[str, str] = {}
    while len(found) < count:
        if len(found) % 2:
            term = "".join(rng.choices(_CHARACTERS, k=rng.randrange(2, 6)))
        else:
            term = f"{rng.choice(words)} {rng.choice(words)}" if rng.random() < 0.5 else rng.choice(words)
        found.setdefault(term, f"{term[:1]}{len(found)}")
    return found
