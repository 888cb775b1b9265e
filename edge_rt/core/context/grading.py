"""A grade for a segment: how much would be lost with it, from features of its text and weights from grading.ini."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_rt.core.context.history import Segment
from edge_rt.errors import OptionError
from edge_rt.postprocess.text_search import HALF_WIDTH

# Words and phrases that say something about a segment: English in lower case, Chinese simplified and traditional.
#
# Strings of words with spaces between them, which are easy to read and to add to; features.py makes tables and patterns of them.

ENGLISH = {
    "clauses": (
        "that which who whom whose where when whenever while whether what how why until till before after as although than whereby "
        "wherein besides except including excluding without instead"
    ),
    "causes": "because since therefore thus hence consequently due owing so cause causes caused",
    "contrasts": "but however although though whereas despite nevertheless nonetheless yet unlike instead otherwise contrary still",
    "conditions": "if unless provided providing otherwise assuming suppose supposing except condition",
    "conclusions": "therefore accordingly overall finally conclusion summary ultimately means implies",
    "sequences": "first firstly second secondly third thirdly then next afterwards finally meanwhile subsequently lastly previously later",
    "times": (
        "monday tuesday wednesday thursday friday saturday sunday january february march april june july august september october "
        "november december jan feb mar apr jun jul aug sep sept oct nov dec today tomorrow tonight yesterday noon midnight quarter "
        "deadline christmas easter daily weekly monthly yearly annually weekday weekdays"
    ),
    "amounts": (
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
        "thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen percent half twice"
    ),
    "decisions": (
        "decide decided decision agree agreed agreement approve approved confirm confirmed must shall required requires forbidden "
        "prohibited deadline due assigned responsible resolved rejected cancelled canceled scheduled allergic prefer prefers refund "
        "password limit limited always never"
    ),
    "courtesies": (
        "thanks thank thx hi hello hey bye goodbye cheers ok okay great nice cool awesome wonderful lovely perfect wow haha lol yay aww "
        "hmm yeah yep sure alright welcome please sorry glad happy hope enjoy appreciate luck congrats congratulations sounds oh really "
        "anyway whatever sweet amazing love funny"
    ),
}
"""Feature -> single words. One that several features have counts for the last of them."""

ENGLISH_PHRASES = {
    "causes": "as a result, in order to, so that",
    "contrasts": "on the other hand, in spite of, rather than",
    "conditions": "as long as, in case, on condition",
    "conclusions": "in conclusion, in summary, that is why",
    "sequences": "after that, for example, such as",
    "decisions": "may not, must not",
    "courtesies": (
        "do not hesitate, let me know, sounds good, no problem, no worries, looking forward, good morning, good night, good luck, "
        "good idea, good question, of course, take care, you know, i see, i guess, got it, help you, how are you, feel free"
    ),
}
"""Feature -> phrases of several words, with commas between them."""

UNITS = (
    "kg g mg lb lbs oz km m cm mm mi mile miles metre metres meter meters foot feet inch inches litre litres liter liters l ml gb mb kb "
    "tb percent dollar dollars euro euros pound pounds yuan yen cent cents degree degrees celsius fahrenheit volt volts watt watts bar "
    "psi hz khz mhz ghz bytes bits tokens times pieces units people persons copies requests nights items"
)
"""Units that stand alone after a number: no names, however they are written (GB)."""

TIME_UNITS = (
    "second seconds minute minutes hour hours day days week weeks month months year years am pm o'clock january february march april may "
    "june july august september october november december jan feb mar apr jun jul aug sep oct nov dec"
)
"""Words that make a number before them a time."""

ORGANISATIONS = (
    "inc ltd llc gmbh corp corporation company co plc ag sa university college institute bank hospital school ministry department agency "
    "committee council group foundation association society labs laboratory court airlines club museum library"
)
"""Words that make a capitalised name of several words that of an organisation."""

PLACE_KINDS = (
    "street st road rd avenue ave lane square boulevard drive city county state province district island river lake mount mountain park "
    "airport station bay beach valley north south east west"
)
"""Words that make a capitalised name of several words that of a place."""

PLACES = (
    "africa america asia europe australia antarctica london paris berlin madrid rome vienna dublin oslo stockholm tokyo osaka kyoto "
    "beijing shanghai shenzhen guangzhou hangzhou taipei singapore seoul delhi mumbai moscow istanbul cairo sydney toronto york "
    "washington boston chicago francisco angeles seattle texas california china japan korea india germany france italy spain england "
    "britain ireland scotland russia canada mexico brazil usa uk"
)
"""Places by name, in one word."""

TITLES = "Mr Mrs Ms Dr Prof Sir St"
"""What stands before a person's name, with or without a full stop."""

NO_NAMES = (
    "i i'm i’m i'll i’ll i've i’ve i'd i’d the a an in on at by for from to of and or we you he she it they this these those there here "
    "my your our his her their its is are was were be do does did not no as with use set let see yes none null true false"
)
"""Words that are written with a capital and are no names, besides those above."""

CHINESE = {
    "clauses": (
        "的时候 的時候 当 當 之前 之后 之後 以前 以后 以後 直到 并且 並且 而且 以及 或者 还是 還是 是否 如何 为什么 為什麼 关于 關於 对于 "
        "對於 其中 包括 包含 涵盖 涵蓋 即 把 将 將 被 使得 让 讓 由 所 通过 通過 根据 根據 按照 即使 不仅 不僅 不但"
    ),
    "causes": "因为 因為 由于 由於 因此 因而 所以 既然 导致 導致 原因 从而 從而 以便 为了 為了 于是 於是",
    "contrasts": "但是 但 然而 不过 不過 可是 虽然 雖然 尽管 儘管 却 卻 而不是 反而 否则 否則 相反 只是 除了",
    "conditions": "如果 假如 假设 假設 要是 只要 只有 除非 一旦 条件 條件 倘若 若 无论 無論 不管 的话 的話",
    "conclusions": "总之 總之 综上 綜上 可见 可見 结论 結論 意味着 意味著 由此 最终 最終 总结 總結",
    "sequences": "首先 其次 再次 然后 然後 接着 接著 最后 最後 随后 隨後 第一 第二 第三 例如 比如 同时 同時 之后 之後 超过之后",
    "times": (
        "今天 明天 昨天 后天 後天 前天 今晚 明早 上午 下午 早上 晚上 凌晨 中午 傍晚 周末 週末 上周 下周 本周 上週 下週 本週 上个月 下个月 "
        "上個月 下個月 本月 去年 今年 明年 月底 年底 季度 春节 春節 国庆 國慶 中秋 元旦 每天 每日 每周 每週 每月 每年 生日"
    ),
    "decisions": (
        "决定 決定 确认 確認 批准 同意 必须 必須 不得 禁止 应当 應當 截止 负责 負責 通过了 否决 否決 取消 规定 規定 安排 过敏 過敏 密码 "
        "密碼 不能 只能 不要 务必 務必 到期 退款 保持 限制"
    ),
    "courtesies": (
        "好的 好吧 谢谢 謝謝 感谢 感謝 多谢 你好 您好 嗯嗯 嗯 哈哈 哦 呵呵 再见 再見 不客气 不客氣 没关系 沒關係 没问题 沒問題 辛苦了 "
        "加油 太好了 太棒了 明白了 知道了 当然 當然 抱歉 对不起 對不起 祝 欢迎 歡迎 请问 請問 早上好 晚上好 晚安 开心 開心 喜欢你 呀 啦 "
        "吧 呢 哇 耶 哎呀 么么哒 慢慢来 慢慢來 没办法 随便 竭诚 竭誠 满意 滿意 好好好 真不错 期待 小心 愉快 顺利 順利 保重 恭喜 厉害 厲害 "
        "拜拜 帮您 幫您 随时 隨時 真的"
    ),
}
"""Feature -> words and phrases; the longest at a place counts. One that several features have counts for the last of them."""

CHINESE_PLACES = (
    "中国 中國 美国 美國 英国 英國 法国 法國 德国 德國 日本 韩国 韓國 俄罗斯 俄羅斯 印度 加拿大 澳大利亚 北京 上海 天津 重庆 重慶 广州 "
    "廣州 深圳 杭州 南京 武汉 武漢 成都 西安 苏州 蘇州 青岛 青島 大连 大連 厦门 廈門 长沙 長沙 郑州 鄭州 沈阳 瀋陽 哈尔滨 济南 濟南 合肥 "
    "福州 昆明 贵阳 南宁 南昌 太原 香港 澳门 澳門 台湾 台灣 臺灣 台北 臺北 高雄 东京 東京 大阪 京都 首尔 首爾 新加坡 伦敦 倫敦 巴黎 纽约 "
    "紐約 柏林 莫斯科"
)
"""Places by name."""

CHINESE_ORGANISATIONS = (
    "公司 集团 集團 银行 銀行 大学 大學 学院 學院 医院 醫院 学校 學校 中学 中學 小学 小學 研究所 研究院 委员会 委員會 法院 检察院 公安局 "
    "政府 协会 協會 基金会 基金會 出版社 报社 電視台 电视台 航空 通讯 通訊 科技 酒店 饭店 部门 董事会 董事會 有限公司 事务所"
)
"""What organisations' names end in."""

CHINESE_TITLES = "先生 女士 小姐 老师 老師 经理 經理 总监 總監 医生 醫生 博士 教授 同学 同學 主任 局长 局長 院长 院長 律师 律師 师傅 師傅"
"""What stands after a person's name."""

COMPOUND_SURNAMES = "欧阳 歐陽 司马 司馬 上官 诸葛 諸葛 东方 皇甫 尉迟 公孙 慕容 令狐 长孙 宇文 司徒"
"""Surnames of two characters."""

SURNAMES = (
    "王李张張刘劉陈陳杨楊赵趙黄黃周吴吳徐孙孫胡朱高林何郭马馬罗羅梁宋郑鄭谢謝韩韓唐冯馮于董萧蕭程曹袁邓鄧许許傅沈曾彭吕呂苏蘇卢盧蒋蔣蔡贾"
    "賈丁魏薛叶葉阎閻余潘杜戴夏钟鐘汪田任姜范方石姚谭譚廖邹鄒熊金陆陸郝孔白崔康毛邱秦江史顾顧侯邵孟龙龍万萬段雷钱錢汤湯尹黎易常武乔喬贺賀"
    "赖賴龚龔文"
)
"""The commonest surnames of one character, without spaces."""

GIVEN = (
    "伟偉芳娜秀英敏静靜丽麗强強磊军軍洋勇艳艷杰娟涛濤明超兰蘭霞平刚剛桂华華建国國志玲红紅梅飞飛鹏鵬辉輝玉萍鑫波斌宇浩凯凱健俊帆雪琳婷丹云"
    "雲龙龍海峰春晓曉东東文子轩軒欣怡佳晨悦悅瑞雨涵思梦夢博德生福贵祥成永庆慶新立义義信仁中振家豪嘉诚誠宏倩颖穎莉燕珍琴素莲蓮凤鳳洁潔璐"
)
"""Characters that are common in given names, without spaces."""


# What a text is made of, counted in one pass for Latin words and one for Chinese: the features that a grade is made of.
#
# Rules and word lists (lexicon.py), no model: a segment of 500 words takes a fraction of a millisecond. Every quantifier that could go
# back over what it has read is bounded, so time is linear in the text, whatever it is. Nothing depends on the locale.
#
# Latin words are looked at one by one, because a look-up in a table costs less than one more alternative in a regular expression.
# Chinese has no spaces, so its patterns search the text; those for times and amounts take out what they count, lest their digits count
# again as numbers.


class Features(NamedTuple):
    """Counts in one segment.

    ``words``: Latin words and numbers, plus ``CHARACTER`` for each Chinese character. The others are occurrences:
    ``clauses``: markers of subordinate and coordinate clauses. ``punctuation``: commas, colons, semicolons, brackets, list items.
    ``names``: of persons, and capitalised names of anything else. ``places``, ``organisations``: names that say so.
    ``times``: dates and times. ``amounts``: numbers, with or without unit or currency, and numerals.
    ``identifiers``: codes, order and phone numbers, URLs, e-mail addresses, paths, hashes, versions. ``quotes``: quoted strings.
    ``causes``, ``contrasts``, ``conditions``, ``conclusions``, ``sequences``: logical connectives.
    ``decisions``: words of decision, duty, prohibition and preference. ``courtesies``: words of politeness and small talk.
    """

    words: float = 0.0
    clauses: int = 0
    punctuation: int = 0
    names: int = 0
    places: int = 0
    organisations: int = 0
    times: int = 0
    amounts: int = 0
    identifiers: int = 0
    quotes: int = 0
    causes: int = 0
    contrasts: int = 0
    conditions: int = 0
    conclusions: int = 0
    sequences: int = 0
    decisions: int = 0
    courtesies: int = 0


CHARACTER = 0.6
"""Words that a Chinese character counts for: a Chinese word has one or two."""

_Counts = dict[str, int]


def features(text: str) -> Features:
    """Count what a text is made of. Full-width letters and digits count as the ordinary ones."""
    counts = dict.fromkeys(Features._fields[1:], 0)
    if not text.isascii() and _FULL_WIDTH.search(text):
        text = text.translate(HALF_WIDTH)
    counts["punctuation"] = len(_all(_PUNCTUATION, text))
    counts["quotes"] = len(_all(_QUOTED, text))
    text, urls = _blanked(_URL, text)
    counts["identifiers"] = urls
    characters = 0
    if not text.isascii():
        characters = len(_all(_HAN, text))
        if characters:
            text = _count_chinese(text, counts)
    return Features(_count_latin(text, counts) + CHARACTER * characters, **counts)


_LONG = 1 << 15
"""Characters of a text (code, a table) from which it is searched match by match: all at once would hold up other threads for 0.1 seconds
a MB, since Python's lock is not free meanwhile."""


def _all(pattern: re.Pattern[str], text: str) -> list[str]:
    """``findall`` for a pattern without groups."""
    return pattern.findall(text) if len(text) < _LONG else [found[0] for found in pattern.finditer(text)]


def _blanked(pattern: re.Pattern[str], text: str) -> tuple[str, int]:
    """The text with a space in the place of each match, and the number of these."""
    return pattern.subn(" " if len(text) < _LONG else lambda _: " ", text)


_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")
_PUNCTUATION = re.compile(r"[,;:()，；：（）、]|\n[ \t]{0,8}(?:[-*•]|\d{1,3}[.)])[ \t]")
_QUOTED = re.compile(r'"[^"\n]{1,80}"|“[^“”\n]{1,80}”|「[^「」\n]{1,80}」|『[^『』\n]{1,80}』|《[^《》\n]{1,80}》|`[^`\n]{1,80}`')
_URL = re.compile(r"://[!-~]{1,400}")  # from here on, so that a search need not try every letter; the word before it tells nothing
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")


# ---- Latin script ----------------------------------------------------------------------------------------------------

_W = "0-9A-Za-z_À-ɏ"
_TOKEN = re.compile(
    rf"[$€£¥￥₩₹]?\d{{1,3}}(?:,\d{{3}}){{1,6}}(?:\.\d{{1,9}})?%?|[$€£¥￥₩₹#@/~]?[{_W}](?:[{_W}'’./\\:@&+#=-]{{0,120}}[{_W}])?[%％]?"
)
_MONTH = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_TIME = re.compile(
    r"\d{1,2}:\d\d(?::\d\d)?(?:[ap]m)?|\d{1,2}[ap]m|\d{4}[-/.]\d{1,2}(?:[-/.]\d{1,2})?(?:t[\d:.+z-]+)?|\d{1,2}[-/.]\d{1,2}[-/.](?:\d\d){1,2}"
    rf"|(?:19|20)\d\d(?:s|'s)?|\d{{1,2}}[-/.](?:{_MONTH})(?:[-/.]\d{{2,4}})?"
)
_AMOUNT = re.compile(
    r"[$€£¥￥₩₹]\d[\d,.]*(?:k|m|bn|b)?|\d[\d.,]*[%％]|\d{1,4}(?:\.\d+)?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:st|nd|rd|th)"
    r"|\d+(?:\.\d+)?(?:kg|g|mg|km|cm|mm|m|l|ml|gb|mb|kb|tb|ms|s|h|hz|khz|mhz|ghz|w|kw|v|x|k|c|f)"
)
_CODE = re.compile(r"_|.@.|\\|.:[0-9A-Za-z]|/.*/|[0-9A-Za-z]{2}\.[a-z]{1,5}$|^[/~#@].")
_DIGIT = re.compile("[0-9]")


def _count_latin(text: str, counts: _Counts) -> int:
    """Count in text in Latin script and return the number of its words and numbers."""
    tokens = _all(_TOKEN, text)
    number = False  # was the last token a number?
    for token in tokens:
        word = token.lower()
        feature = _WORDS.get(word)
        if number and word in _TIME_UNITS:
            counts["amounts"] -= 1
            counts["times"] += 1
        elif feature:
            counts[feature] += 1
        number = False
        if not token.isalpha():
            shape = _shape(word)
            if shape:
                counts[shape] += 1
                number = shape == "amounts"
        elif word != token and token[0].islower():
            counts["identifiers"] += 1  # camelCase
    lowered = text.lower()
    for phrase, feature in _PHRASES.items():
        counts[feature] += lowered.count(phrase)
    _count_names(text, counts)
    return len(tokens)


def _shape(word: str) -> str | None:
    """The feature of a word in lower case that is not letters alone."""
    if not _DIGIT.search(word):
        return "identifiers" if _CODE.search(word) else None
    if _TIME.fullmatch(word):
        return "times"
    return "amounts" if _AMOUNT.fullmatch(word) else "identifiers"


_TITLED = "|".join(rf"(?<=\b{title}\. )" for title in TITLES.split())
_NAME = re.compile(
    rf"[A-Z](?<![{_W}'’./@-].)[{_W}'’&-]*(?:(?: (?:of|the|de|van|von|for|&)){{0,2}} [A-Z][{_W}'’&-]*|\. (?:{_TITLED})[A-Z][{_W}'’-]*)*"
)
_SENTENCE_ENDS = frozenset('.!?:;\n"“”*>-#|。！？：')


def _count_names(text: str, counts: _Counts) -> None:
    """Count capitalised names: sequences that are no sentence's beginning, or go on after it."""
    for found in _NAME.finditer(text):
        start = found.start()
        words = found[0].replace(".", "").split()
        before = text[max(0, start - 2) : start].rstrip(" ")
        lowered = [word.lower().removesuffix("'s").removesuffix("’s") for word in words]
        kept = [word for word in lowered if word not in _NO_NAMES and not _DIGIT.search(word)]
        several = len(kept) > 1
        if several and not _ORGANISATIONS.isdisjoint(kept):
            counts["organisations"] += 1
        elif not _PLACES.isdisjoint(kept) or (several and not _PLACE_KINDS.isdisjoint(kept)):
            counts["places"] += 1
        elif several or (kept and ((before and before[-1] not in _SENTENCE_ENDS) or lowered[0] in _TITLES)):
            counts["names"] += 1


_WORDS = {word: feature for feature, words in ENGLISH.items() for word in words.split()}
_PHRASES = {phrase: feature for feature, phrases in ENGLISH_PHRASES.items() for phrase in phrases.split(", ")}
_TIME_UNITS, _ORGANISATIONS, _PLACES, _PLACE_KINDS, _TITLES = (
    frozenset(words.lower().split()) for words in (TIME_UNITS, ORGANISATIONS, PLACES, PLACE_KINDS, TITLES)
)
_NO_NAMES = _TIME_UNITS.union(_WORDS, UNITS.split(), NO_NAMES.split())


# ---- Chinese ---------------------------------------------------------------------------------------------------------


def _any(words: Iterable[str]) -> str:
    """A pattern for any of some words, the longest at a place first."""
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


_N = "[0-9零〇一二三四五六七八九十百千两兩]"
_ZH_TIME = re.compile(
    rf"(?:{_N}{{1,4}}(?:年代?|月份?|日(?!本)|号(?![码线楼])|號(?![碼線樓])|点(?!儿)|點|时|時|小时|小時|分钟|分鐘|分(?!之)|秒|周|週|天|个月|個月)半?)+"
    r"|(?:周|週|星期|礼拜|禮拜)[一二三四五六日天]"
)
_ZH_AMOUNT = re.compile(
    r"(?:百分之)?(?!一[个個次位份条條只种種直起些下点點样樣般定])(?:\d{1,12}(?:[,.]\d{1,9}){0,3}|[零〇一二三四五六七八九十百千万萬亿億两兩]{1,12})\s?"
    r"(?:[%％万萬亿億]?(?:元|块|塊|美元|欧元|歐元|人民币|人民幣|兆帕|公里|千米|毫米|厘米|米|公斤|千克|毫克|克|吨|噸|毫升|升|平方米|度|"
    r"个|個|人|名|位|件|台|臺|次|套|份|页|頁|条|條|只|隻|倍|岁|歲|层|層|楼|樓|晚|瓶|把|本|张|張|种|種|字段|GB|MB|KB|[%％])|[万萬亿億])"
    r"|百分之[零一二三四五六七八九十百点]{1,8}"
)
_SURNAME = f"(?:{_any(COMPOUND_SURNAMES.split())}|[{SURNAMES}])"
_ZH_PERSON = re.compile(
    f"{_SURNAME}(?:"
    f"[\u4e00-\u9fff]{{0,2}}(?:{_any(CHINESE_TITLES.split())})"
    "|[总總工](?![作程结結体體业業厂廠具人资資会會共是])"
    # without a title: characters of given names, and then the end of a phrase or a word that often follows a name
    f"|[{GIVEN}]{{1,2}}(?=[^\u4e00-\u9fff]|$|[的是在和与與说說于於负負将將已会會要不去来來喜住向把给給也很就因今明昨])"
    ")"
    f"|(?:我叫|名叫|姓名|联系人|聯繫人|收件人|被告|原告|患者|客户|客戶)[：: ]?{_SURNAME}[\u4e00-\u9fff]{{1,2}}"
)
_ZH_ORGANISATION = re.compile(_any(CHINESE_ORGANISATIONS.split()))
# What places' names end in: the characters before it and after it that make another word of it.
_PLACE_ENDS = {
    "省": ("节節反全各外", "钱錢略事心电電"),
    "市": ("城都超股上门門本全黑夜", "场場民面价價值政"),
    "[县縣镇鎮]": ("", ""),
    "[区區]": ("地社小园園景市", "别別分域間间块塊"),
    "路": ("道公马馬铁鐵网網电電思走一上半后後高绕繞", "上过過由线線径徑程费費口灯燈人"),
    "街": ("上大", ""),
    "村": ("农農", ""),
    "高速": ("", "度"),
    "(?:机|機)(?:场|場)": ("", ""),
    "(?:车|車)站": ("", ""),
}
_ZH_PLACE = re.compile(
    f"(?:{_any(CHINESE_PLACES.split())})[省市县縣]?|(?:"
    + "|".join(
        end + (f"(?<![{before}].)" if before else "") + (f"(?![{after}])" if after else "") for end, (before, after) in _PLACE_ENDS.items()
    )
    + ")(?<=[\u4e00-\u9fff]{3})"
)
_ZH_WORDS = {word: feature for feature, words in CHINESE.items() for word in words.split()}
_ZH_WORD = re.compile(_any(_ZH_WORDS))


def _count_chinese(text: str, counts: _Counts) -> str:
    """Count in Chinese text and return it without what would count again in the pass for Latin script."""
    for word in _all(_ZH_WORD, text):
        counts[_ZH_WORDS[word]] += 1
    counts["names"] += len(_all(_ZH_PERSON, text))
    counts["places"] += len(_all(_ZH_PLACE, text))
    counts["organisations"] += len(_all(_ZH_ORGANISATION, text))
    text, times = _blanked(_ZH_TIME, text)
    text, amounts = _blanked(_ZH_AMOUNT, text)
    counts["times"] += times
    counts["amounts"] += amounts
    return text


# A grade for a segment: how much would be lost with it, from what it is made of (features.py) and weights from a file.
#
# A feature adds ``weight * x / (x + half)`` points, where x is its density: more of the same tells less and less. The score is
# ``1 - exp(-points)``, so that many features can add up without ever reaching a limit, where all would be equal.

DEFAULT_WEIGHTS = Path(__file__).with_name("grading.ini")
SMOOTHING = 20
"""Words added to a segment's own before densities are taken, or one name would make a two-word message the densest of all."""


class Weight(NamedTuple):
    """``points``: what a feature adds at most (less than 0: takes away). ``half``: the density at which it adds half of that."""

    points: float
    half: float


class Contribution(NamedTuple):
    """A feature's part in a grade. ``value``: occurrences, or for ``words`` their number. ``points``: what it adds to the sum."""

    feature: str
    value: float
    points: float


class Grade(NamedTuple):
    """``score`` from 0 (first to go) to 1, and what makes it, the weightiest first."""

    score: float
    contributions: tuple[Contribution, ...] = ()


def grade(segment: Segment, weights: Mapping[str, Weight]) -> Grade:
    """The grade of a segment, by the weights of ``load_weights``."""
    counts = features(segment.text)
    found = [
        Contribution(name, value, _points(name, value, counts.words, weights[name])) for name, value in counts._asdict().items() if value
    ]
    found.sort(key=lambda contribution: -abs(contribution.points))  # stable: of equals, in the order of Features
    return Grade(max(0.0, -math.expm1(-sum(contribution.points for contribution in found))), tuple(found))


def _points(name: str, value: float, words: float, weight: Weight) -> float:
    density = value if name == "words" else 100 * value / (words + SMOOTHING)
    return weight.points * density / (density + weight.half)


def content_grader(weights: Path | None = None) -> Callable[[Segment], Grade]:
    """``grade`` with the weights of a file, or the default ones. Raises OptionError."""
    table = load_weights(weights)
    return lambda segment: grade(segment, table)


def load_weights(path: Path | None = None) -> dict[str, Weight]:
    """Every feature's weight: the default ones, changed by what a file (grading.ini shows its form) says. Raises OptionError."""
    table = _read(DEFAULT_WEIGHTS)
    if path is not None:
        for section, values in _read(path).items():
            table[section].update(values)
    return {name: Weight(table["weight"][name], table["half"][name]) for name in Features._fields}


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Section -> feature -> number."""
    import configparser  # only where weights are read

    parser = configparser.ConfigParser(interpolation=None, default_section="", inline_comment_prefixes=("#",))
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read weights from {path}: {(error.strerror or str(error)).lower()}") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).replace("'<string>'", "the file")
        raise OptionError(f"{path} is no file of weights ({reason}); write lines such as `names = 0.5` under [weight] or [half]") from error
    table: dict[str, dict[str, float]] = {"weight": {}, "half": {}}
    for section in parser.sections():
        if section not in table:
            raise OptionError(f"{path} has a section [{section}]; weights have [weight] and [half]")
        for name, text in parser.items(section):
            table[section][name] = _number(path, section, name, text)
    return table


def _number(path: Path, section: str, name: str, text: str) -> float:
    if name not in Features._fields:
        raise OptionError(f"{path} has a weight for {name}, which is no feature; features are {', '.join(Features._fields)}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (section == "half" and number <= 0):
        wanted = "a number above 0" if section == "half" else "a number"
        raise OptionError(f"{path} has {name} = {text} in [{section}]; give {wanted}")
    return number
