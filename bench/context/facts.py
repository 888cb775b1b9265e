"""Facts that are stated and asked for. SmolLM2-135M answers short cues: the question is followed by the beginning of its answer.

A fact is stated twice, in the spirit of "The pass key is 12345. Remember it. 12345 is the pass key.": said once, the model often loses it
even with its whole cache, and then a task says nothing about what was evicted.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from bench.context.everyday import Language

CODE = "code"
"""Stands in ``Fact.values`` for a random number of five digits."""


class Fact(NamedTuple):
    """``statement`` has a place for the value, twice. ``opening`` is how the answer begins. ``values`` are split at bars."""

    statement: str
    question: str
    opening: str
    values: str

    def value(self, rng: random.Random) -> str:
        """A value of the fact."""
        return code(rng) if self.values == CODE else rng.choice(self.values.split("|"))


def code(rng: random.Random) -> str:
    """Five digits, the first of them no zero."""
    return str(rng.randrange(10_000, 100_000))


FACTS: dict[Language, tuple[Fact, ...]] = {
    "en": (
        Fact(
            "The code of the front door is {0}. Remember the code of the front door: {0}.",
            "What is the code of the front door?",
            "The code of the front door is",
            CODE,
        ),
        Fact(
            "The color of the new car is {0}. Remember, the new car is {0}.",
            "What is the color of the new car?",
            "The color of the new car is",
            "red|blue|green|yellow|purple|silver",
        ),
        Fact(
            "The name of the dog is {0}. Remember the name of the dog: {0}.",
            "What is the name of the dog?",
            "The name of the dog is",
            "Biscuit|Pepper|Shadow|Ginger|Rusty|Coco",
        ),
        Fact(
            "The summer holiday is in {0}. Remember, the summer holiday is in {0}.",
            "Where is the summer holiday?",
            "The summer holiday is in",
            "Lisbon|Oslo|Dublin|Prague|Vienna|Madrid",
        ),
        Fact(
            "The favorite fruit of the queen is the {0}. Remember, the favorite fruit of the queen is the {0}.",
            "What is the favorite fruit of the queen?",
            "The favorite fruit of the queen is the",
            "mango|papaya|cherry|melon|apricot|plum",
        ),
        Fact(
            "The manager of the hotel is {0}. Remember, the manager of the hotel is {0}.",
            "Who is the manager of the hotel?",
            "The manager of the hotel is",
            "Alice|Clara|Daniel|Elena|Felix|Greta",
        ),
        Fact(
            "The birthday party is on the {0} of May. Remember, the birthday party is on the {0} of May.",
            "When is the birthday party?",
            "The birthday party is on the",
            "11th|13th|17th|19th|21st|23rd",
        ),
        Fact(
            "The phone number of the dentist is {0}. Remember the phone number of the dentist: {0}.",
            "What is the phone number of the dentist?",
            "The phone number of the dentist is",
            CODE,
        ),
    ),
    "zh": (
        Fact("前门的密码是{0}。请记住，前门的密码是{0}。", "请告诉我前门的密码。", "前门的密码是", CODE),
        Fact("新车的颜色是{0}。请记住，新车的颜色是{0}。", "请告诉我新车的颜色。", "新车的颜色是", "红色|蓝色|绿色|黄色|紫色|银色"),
        Fact("小狗的名字是{0}。请记住，小狗的名字是{0}。", "请告诉我小狗的名字。", "小狗的名字是", "豆豆|小黑|毛毛|花花|乐乐|小白"),
        Fact("牙医的电话是{0}。请记住，牙医的电话是{0}。", "请告诉我牙医的电话。", "牙医的电话是", CODE),
        Fact("旅行的目的地是{0}。请记住，旅行的目的地是{0}。", "请告诉我旅行的目的地。", "旅行的目的地是", "北京|上海|广州|成都|西安|杭州"),
        Fact("酒店的经理是{0}。请记住，酒店的经理是{0}。", "请告诉我酒店的经理是谁。", "酒店的经理是", "王明|李华|张伟|刘洋|陈静|赵磊"),
        Fact(
            "生日聚会的日期是{0}。请记住，生日聚会的日期是{0}。",
            "请告诉我生日聚会的日期。",
            "生日聚会的日期是",
            "5月11日|5月17日|6月3日|6月19日|7月8日|7月23日",
        ),
        Fact("房租是每月{0}。请记住，房租是每月{0}。", "请告诉我每月的房租。", "房租是每月", "1850元|2300元|2750元|3200元|4600元|5400元"),
    ),
}
