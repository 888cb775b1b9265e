"""Addresses of common form: of the mainland, from the largest part to the smallest, and of streets in English.

A Chinese address is found by what it begins with: a province, a city, or a word that calls for one (地址, 家住, 寄到 ...).
To find it by any district or road means to hold back several characters of every sentence, and is asked for by a rule.
"""

from __future__ import annotations

import re
from itertools import pairwise

from edge_rt.plugins.redaction.characters import SKIP
from edge_rt.plugins.redaction.checks import Verdict

_PROVINCES = (
    "北京 天津 上海 重庆 河北 山西 辽宁 吉林 黑龙江 江苏 浙江 安徽 福建 江西 山东 河南 湖北 湖南 广东 海南 四川 贵州 云南 陕西 "
    "甘肃 青海 台湾 内蒙古 广西 西藏 宁夏 新疆 香港 澳门"
)
_CITIES = (
    "石家庄 唐山 秦皇岛 邯郸 邢台 保定 张家口 承德 沧州 廊坊 衡水 太原 大同 阳泉 长治 晋城 朔州 晋中 运城 忻州 临汾 吕梁 呼和浩特 "
    "包头 乌海 赤峰 通辽 鄂尔多斯 呼伦贝尔 巴彦淖尔 乌兰察布 沈阳 大连 鞍山 抚顺 本溪 丹东 锦州 营口 阜新 辽阳 盘锦 铁岭 朝阳 "
    "葫芦岛 长春 四平 辽源 通化 白山 松原 白城 延边 哈尔滨 齐齐哈尔 鸡西 鹤岗 双鸭山 大庆 伊春 佳木斯 七台河 牡丹江 黑河 绥化 "
    "南京 无锡 徐州 常州 苏州 南通 连云港 淮安 盐城 扬州 镇江 泰州 宿迁 杭州 宁波 温州 嘉兴 湖州 绍兴 金华 衢州 舟山 台州 丽水 "
    "合肥 芜湖 蚌埠 淮南 马鞍山 淮北 铜陵 安庆 黄山 滁州 阜阳 宿州 六安 亳州 池州 宣城 福州 厦门 莆田 三明 泉州 漳州 南平 龙岩 "
    "宁德 南昌 景德镇 萍乡 九江 新余 鹰潭 赣州 吉安 宜春 抚州 上饶 济南 青岛 淄博 枣庄 东营 烟台 潍坊 济宁 泰安 威海 日照 临沂 "
    "德州 聊城 滨州 菏泽 郑州 开封 洛阳 平顶山 安阳 鹤壁 新乡 焦作 濮阳 许昌 漯河 三门峡 南阳 商丘 信阳 周口 驻马店 济源 武汉 "
    "黄石 十堰 宜昌 襄阳 鄂州 荆门 孝感 荆州 黄冈 咸宁 随州 恩施 仙桃 潜江 天门 长沙 株洲 湘潭 衡阳 邵阳 岳阳 常德 张家界 益阳 "
    "郴州 永州 怀化 娄底 湘西 广州 韶关 深圳 珠海 汕头 佛山 江门 湛江 茂名 肇庆 惠州 梅州 汕尾 河源 阳江 清远 东莞 中山 潮州 揭阳 "
    "云浮 南宁 柳州 桂林 梧州 北海 防城港 钦州 贵港 玉林 百色 贺州 河池 来宾 崇左 海口 三亚 三沙 儋州 成都 自贡 攀枝花 泸州 德阳 "
    "绵阳 广元 遂宁 内江 乐山 南充 眉山 宜宾 广安 达州 雅安 巴中 资阳 阿坝 甘孜 凉山 贵阳 六盘水 遵义 安顺 毕节 铜仁 黔西南 "
    "黔东南 黔南 昆明 曲靖 玉溪 保山 昭通 丽江 普洱 临沧 楚雄 红河 文山 西双版纳 大理 德宏 怒江 迪庆 拉萨 日喀则 昌都 林芝 山南 "
    "那曲 西安 铜川 宝鸡 咸阳 渭南 延安 汉中 榆林 安康 商洛 兰州 嘉峪关 金昌 白银 天水 武威 张掖 平凉 酒泉 庆阳 定西 陇南 临夏 "
    "甘南 西宁 海东 银川 石嘴山 吴忠 固原 中卫 乌鲁木齐 克拉玛依 吐鲁番 哈密 昌吉 博尔塔拉 巴音郭楞 阿克苏 喀什 和田 伊犁 塔城 "
    "阿勒泰 石河子 台北 高雄 昆山 义乌 浦东 海淀 朝阳区 西湖区 天河区 南山区 福田区"
)
_NAMES_OF_CITIES = "|".join(sorted({*_PROVINCES.split(), *_CITIES.split()}))
_CALLS = "地址|住址|住所|家住|住在|居住于|居住在|户籍|籍贯|邮寄到|寄到|寄往|寄给|送到|送货到|配送到|快递到|位于|坐落于|我家在"

_MARKS = "省市区區县縣旗镇鎮乡鄉村街路道巷弄里园苑庄城场厦寓屯段期湾府院组"  # what the name of a part of an address ends with


def _han_but(others: str) -> str:
    """A set of Chinese characters without some."""
    left = sorted(others)
    gaps = pairwise([0x33FF, *map(ord, left), 0xA000])
    return "[" + "".join(f"{chr(a + 1)}-{chr(b - 1)}" for a, b in gaps if b - a > 1) + "]"


_NAME, _SHORT_NAME = _han_but(_MARKS) + "{0,8}", _han_but(_MARKS + "第") + "{0,4}"
_NUMBER = "[0-9A-Za-z一二三四五六七八九十百零〇\\-]{1,6}"
_HOUSE = "(?:[0-9A-Za-z一二三四五六七八九十百零〇\\-]{1,6} ?(?:号楼|号院|[号號](?![线線令馆机文公])|弄))"
_UNIT = "(?:号楼|号院|号|號|单元|單元|[弄栋棟幢座室层樓楼房户])"
_PARTS = f"(?:(?:{_NAME}[{_MARKS}]|{_NUMBER}(?:号院|段|期|区)) ?)+"
# A house number after a road, with at most a few characters between; or the number of a building right after an estate.
_END = (
    f"(?:{_SHORT_NAME}{_HOUSE}|{_NUMBER}(?:[栋棟幢座]|单元|單元)(?![山桥大高新])) ?"
    f"(?:(?:{_NAME}[{_MARKS}] ?)?{_SHORT_NAME}{_NUMBER} ?{_UNIT} ?)*"
    "(?:[0-9]{1,5}(?![0-9A-Za-z]))?"
)
_MAINLAND = f"(?:{_NAMES_OF_CITIES}) ?{_PARTS}{_END}"
_CALLED = f"(?:{_CALLS})[是为在]?[:： ]{{0,2}}(?P<secret>{_PARTS}{_END})"

_CAPITAL = "[A-Z][A-Za-z'’.]*"
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|Parkway|Pkwy|Close|Crescent|"
    "Gardens|Highway|Hwy|Row|Walk|Mews|Circle|Cir|Trail|Alley"
)
_FLAT = r"(?:(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Room|Rm)\.? ?#?|# ?)[0-9A-Za-z\-]{1,6}"
_TOWN = f"{_CAPITAL}(?: {_CAPITAL}){{0,2}}"
_CODE = r"(?:[A-Z]{2} [0-9]{5}(?:-[0-9]{4})?|[A-Z]{1,2}[0-9][0-9A-Z]? [0-9][A-Z]{2})"
_STREET = (
    rf"(?<![0-9A-Za-z])(?:{_FLAT},? )?[0-9]{{1,5}}[A-Za-z]?,? (?:[NSEW]\.? )?(?:(?:{_CAPITAL}|[0-9]{{1,3}}(?:st|nd|rd|th)) ){{1,3}}"
    rf"(?:{_STREETS})(?![A-Za-z])\.?(?:,? (?:{_FLAT}|[NSEW]{{1,2}})(?![0-9A-Za-z\-]))?(?:,? {_TOWN})?(?:,? {_CODE}(?![0-9A-Za-z]))?"
)
_BOX = r"(?<![A-Za-z])(?:P\.? ?O\.? ?Box|Post Office Box) [0-9]{1,6}(?![0-9])"


ADDRESSES = (_MAINLAND, _CALLED, _STREET, _BOX)
ANYWHERE = f"{_han_but(_MARKS)}{{1,6}}[{_MARKS}] ?(?:{_PARTS})?{_END}"
"""Any road or district and house number: at the price of holding back seven characters of every Chinese sentence."""
_FUNCTION_WORDS = re.compile("[在到于於是住去往从從的了位给給和与與、至]")


def from_the_name(found: str, before: str) -> Verdict:
    """The address without what led to it: words like 在 and 到 do not begin the name of a road."""
    mark = next(at for at, char in enumerate(found) if char in _MARKS)
    first = max((match.end() for match in _FUNCTION_WORDS.finditer(found, 0, max(0, mark - 1))), default=0)
    return ("address", first, len(found.rstrip(" " + SKIP)))
