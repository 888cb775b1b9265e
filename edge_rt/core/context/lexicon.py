"""Words and phrases that say something about a segment: English in lower case, Chinese simplified and traditional.

Strings of words with spaces between them, which are easy to read and to add to; features.py makes tables and patterns of them.
"""

from __future__ import annotations

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
