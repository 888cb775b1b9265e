"""Ordinary text, read once when rules are compiled: so the automaton has learned most of what it needs before the first answer."""

from __future__ import annotations

import re

PIECES = re.compile(r" ?[A-Za-z]+|[0-9]|[^\W0-9a-zA-Z]{1,2}|\s+(?=\s)| ?[^\w\s]+|\s", re.S)
"""A text is read in pieces as most tokenizers make: a word with the blank before it, a digit, one or two Chinese characters, signs."""

ENGLISH = """
The quick answer is yes: you can use it with any other model that we have made so far, but there are a few things which you should
know about before you start. First, make sure that the device has enough free memory. Then open the file, read the header, and check
what it says; if something is wrong, try again or ask for help. I don't think it's a problem, but we'll see. He said that his mother
would have liked to go there last year, when they were still young. "Why not?" she asked, looking at the old house by the river.
People often want to find out how much work these systems can really do, and how long they take. Because of this, every question
needs its own kind of answer.

Here is an example. Water, light and air are important for life on Earth. In general, plants use energy from the sun to make sugar;
this process is called photosynthesis. However, the world around us is changing quickly, and many different countries must learn to
live together. Those who understand history, science, music and language will probably be better prepared for the future than
others. Once upon a time, in a small village near the mountains, a little girl found a beautiful golden bird. "Please, let me go,"
it cried. Although she was only eight, she knew exactly what to do next. Perhaps nobody else could've done that!

## Steps to follow

1. **Install** the package: run `pip install numpy` or `sudo apt-get update` in your terminal.
2. Create a new folder, for instance `my_project/src`, and write down the following code:

```python
def main(items: list[str], count=10) -> None:
    for i, item in enumerate(items):
        if item == "x" and count > 0:
            print(f"{i + 1}: {item}")  # shows 3 of 25
            return self.value[0] * 2.5
```

- Note: between 1990 and 2024 the population grew by 12.5%, from 3,400 to about $7,250 per month (see page 48).
- You're welcome to visit https://www.example.com/docs/index.html?id=7 on Monday, March 15, at 10:30 a.m. (UTC+8).

| Name | Type | Value |
|---|---|---|
| size | integer | 64 MB |

However, it is worth keeping in mind that results may vary. Additionally, several factors, including temperature, weather, business,
government and education, affect performance. Overall, I hope this information helps. Let me know if you'd like to hear more. Best
regards, Kim
"""

CHINESE = """
当然可以。首先，我们需要了解这个问题的背景：人工智能是一种让机器能够像人一样学习、思考和解决问题的技术。它在医疗、教育、金融、交通等方面
都有很多应用，例如图像识别、语音助手和自动驾驶。其次，由于数据的质量会直接影响结果，所以应该先检查文件是否完整，然后再开始下一步操作。
如果你还有其他疑问，请随时告诉我，我会尽力帮助你！他说：“昨天下午三点，孩子们在公园里玩得非常高兴。”那时候天气很好，太阳照在大海上，
风轻轻地吹着，远处的山看起来特别美丽。虽然工作比较忙，但是她每天都坚持锻炼身体，早上跑步，晚上看书。中国有五千多年的历史，文化丰富多样；
许多年轻人喜欢喝茶、听音乐、做饭，也喜欢到不同的城市旅行。总之，为了实现目标，必须制定合理的计划，提高效率，并且不断总结经验。
以下是几点建议：（1）选择合适的方法；（2）使用最新版本的软件；（3）注意安全，保护个人隐私。第2章共有35页，价格为99.8元，比去年增长了6%。
希望这些内容对您有所帮助，谢谢！运行模型时内存不足怎么办？可以把参数改小，或者用4位量化。这样既能减少占用，又不会明显降低速度与精度。
"""

SECRETS = """
Call +44 20 7946 0958 or 13912345678, mail a.b@example.com, host 10.0.0.1 or fe80::1, 2024-05-11 10:32:11, version 1.2.3.
"""
