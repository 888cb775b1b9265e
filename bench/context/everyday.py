"""Everyday talk in English and Chinese from templates: what people say between a fact and the question about it."""

from __future__ import annotations

import random
from typing import Literal

Language = Literal["en", "zh"]

_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "who": "my sister|my neighbour|an old friend|my uncle|our teacher|a colleague|my cousin|the baker",
        "place": "the market|the library|the park|the station|the museum|the river|the bakery|the old bridge",
        "thing": "a wooden table|some fresh bread|a warm coat|a small lamp|a good book|a pair of shoes|a basket of apples|a bicycle",
        "weather": "cloudy|sunny|windy|cold|warm|rainy|foggy|pleasant",
        "when": "Yesterday|This morning|Last week|On Sunday|In the evening|After lunch|Before breakfast|Some days ago",
        "did": "cooked a soup|cleaned the kitchen|watched the birds|repaired the fence|listened to music|played chess|made tea",
        "felt": "tired but happy|quite relaxed|a little hungry|very pleased|rather surprised|full of energy|calm|curious",
    },
    "zh": {
        "who": "我妹妹|邻居|一位老朋友|我叔叔|我们的老师|一个同事|我表弟|面包师",
        "place": "市场|图书馆|公园|车站|博物馆|河边|面包店|老桥",
        "thing": "一张木桌|一些新鲜面包|一件厚外套|一盏小灯|一本好书|一双鞋|一篮苹果|一辆自行车",
        "weather": "多云|晴朗|刮风|很冷|暖和|下雨|有雾|舒服",
        "when": "昨天|今天早上|上个星期|星期天|傍晚|午饭以后|早饭之前|几天以前",
        "did": "煮了汤|打扫了厨房|看了小鸟|修了篱笆|听了音乐|下了象棋|泡了茶",
        "felt": "有点累但很高兴|很放松|有点饿|非常满意|相当惊讶|充满活力|很平静|很好奇",
    },
}
_SAID: dict[str, tuple[str, ...]] = {
    "en": (
        "{when} I went to {place} with {who}.",
        "The weather was {weather}, so we stayed near {place} for a while.",
        "{when} {who} bought {thing} and showed it to everybody.",
        "Later we {did} together and talked about the garden.",
        "I was {felt} when we came home.",
        "{when} {who} told me a long story about {place}.",
        "It was {weather} outside, and {who} {did}.",
        "We looked for {thing}, but there was none near {place}.",
    ),
    "zh": (
        "{when}我和{who}一起去了{place}。",
        "天气{weather}，所以我们在{place}待了一会儿。",
        "{when}{who}买了{thing}，还给大家看了看。",
        "后来我们一起{did}，聊了聊花园。",
        "回家的时候我{felt}。",
        "{when}{who}给我讲了一个关于{place}的长故事。",
        "外面{weather}，{who}{did}。",
        "我们想找{thing}，可是{place}附近没有。",
    ),
}
_ANSWERED: dict[str, tuple[str, ...]] = {
    "en": (
        "That sounds nice. Many people like to visit {place} when it is {weather}.",
        "Good to hear. Perhaps {who} would also enjoy {thing}.",
        "I see. It is pleasant to be {felt} after such a day.",
        "Thank you for telling me. {place} is worth another visit with {who}.",
    ),
    "zh": (
        "听起来不错。{weather}的时候很多人喜欢去{place}。",
        "真好。也许{who}也会喜欢{thing}。",
        "明白了。这样的一天之后{felt}是很自然的。",
        "谢谢你告诉我。可以和{who}再去一次{place}。",
    ),
}


def talk(rng: random.Random, language: Language, sentences: int) -> str:
    """A paragraph of what happened lately, no sentence twice running."""
    return _joined(language, [_filled(rng, language, form) for form in rng.sample(_SAID[language], sentences)])


def reply(rng: random.Random, language: Language) -> str:
    """A friendly answer to it."""
    return _joined(language, [_filled(rng, language, form) for form in rng.sample(_ANSWERED[language], 2)])


def _filled(rng: random.Random, language: Language, form: str) -> str:
    text = form.format_map({name: rng.choice(words.split("|")) for name, words in _WORDS[language].items()})
    return text[0].upper() + text[1:]


def _joined(language: Language, sentences: list[str]) -> str:
    return (" " if language == "en" else "").join(sentences)
