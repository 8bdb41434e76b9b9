#!/usr/bin/env python3
"""Makes tests/golden/tokenizer: small tokenizer.json files of different settings, and the ids that the tokenizers library
gives for tricky strings with those and with GPT-NeoX's tokenizer.

    python scripts/make_golden_tokenizer.py [--data DIR]      (PyPI: tokenizers)

DIR holds text/gpt-neox-20b-tokenizer.json and the text files; default: ../shared/data beside the repository.
"""

import argparse
import json
import pathlib
import random
import struct

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "golden" / "tokenizer"

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Text that the small tokenizers learn their merges from.
CORPUS = [
    "The snake waits on the stone and the stone is warm. It waits, it's still, and then it isn't.",
    "She'll say they've seen 1234 snakes in 2024; he'd say it was 12. We're not sure. I'm sure they'll tell.",
    "if (state == 0) {\n        return state + 1;\n    }\n",
    "Le café est fermé, déjà vu, où êtes-vous?  Ångström, naïve, coöperate.",
    "русский текст о змее, 日本語のテキスト、中文文本。 한국어 텍스트",
    "The state of the scan is the sum of all that the scan has seen.\r\nThe end.\r\n",
] * 4

STRINGS = [
    "", " ", "  ", "a", " a", "a ", "\n", "\r\n", "\t", "Hello world", "Hello, world!", "The stone is warm.",
    "it's IT'S we're WE'RE they'll I'm he'd 've 'S 'ſ ' s ''s don’t",
    "The 2024 snakes: 1, 12, 123, 1234, 12345, 1234567.89 and ½ ² Ⅷ ④ ٣٤ १२",
    "a  b   c    d     e      f       g                        h                                i",
    "    indented\n        more\n\n\n\tand tabs\t\tx\n", "line\r\nline\r\n\r\nline\rline\n\rline",
    "trailing spaces   ", "   leading spaces", " \n \n ", "\u00a0no\u00a0break\u00a0\u00a0x", "a\u3000b\u2003c\u2009d",
    "x\u180ey \u180e z\u180e\u180e", "x\u0085y\u0085\u0085z", "\u200bzero\u200bwidth\u200c\u200d\ufeffbom",
    "a\u2028b\u2029c", "NUL\u0000inside\u0000\u0000", "control \u0001\u0002\u001b[31mred\u001b[0m\u007f",
    "caf\u00e9 cafe\u0301 CAFE\u0301 e\u0301\u0301 \u0301alone \u0301", "A\u030a \u212b \u00c5 \u1e9b\u0323 \u017f\u0307\u0323",
    "q\u0307\u0323 q\u0323\u0307 d\u0307\u0323 a\u0315\u0300\u05ae\u0062 \u0344 \u0958 \u2126 \u0340",
    "\uac00 \u1100\u1161 \u1100\u1161\u11a8 \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165",
    "\ufb01 \ufb03 \uff21\uff22\uff11\uff12 \u2460 \u00bd \u33a5 \u3392 \u2122 x\u00b2 \uff76\uff9e \ufdfa",
    "日本語のテキスト 中文文本,123、四五六。々〆ヶ", "русский текст ЁЖИК ёжик й и\u0306", "עִבְרִית العَرَبِيَّة ١٢٣", "हिन्दी में नमस्ते क्षत्रिय", "ไทย ภาษาไทย ลาว",
    "👍 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 1️⃣ #️⃣ ☃", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐍈 𠀀𠀁 \U0010fffd \ue000", "ⓐⓑ _under_score __init__ a_b x‿y",
    "http://example.com/a?b=c&d=%20#e", "<div class=\"x\">&amp;</div>", "a+b-c*d/e==f!=g<=h>=i&&j||k", "....!!!???,,,;;;:::---___***",
    "x" * 70, " " * 100, "ab" * 60, "1" * 50, "!" * 50, "\n" * 50, "the the the the the", "thethethethe", "aaaaaaa aaaaaa aaaaa",
    "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ", "<|endoftext|><|endoftext|>", "<|endoftext|", "<|padding|>x",
    "one <mask> two<mask>three  <mask>  four \n<mask>\n", "word wordy sword word. word", "xwordx word_ _word word\u0301 word\u200d 1word word2 (word)",
    "a [L] b  [L]c[L][L] d", "a [R] b[R]  c[R][R] d", "e\u0301<cafe\u0301> <caf\u00e9> x\ufb01n fin <\ufb01n> <fin>", "<long> <long><longer> <longest>",
    "\u00e9<|endoftext|>e\u0301", "\u0301<|endoftext|>\u0301", "  <s>x</s>  <s> y </s>",
]

POOLS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ", "0123456789", "    ", " \t\n\r", ".,;:!?'\"()[]{}<>|-_/\\@#$%^&*+=~`",
    "éèüßøåñçſÅ", "\u0301\u0308\u0323\u0327\u0300\u0345", "бвгджёй", "αβγώΩ", "日本語中文字々ー", "あいうカキクが", "한국어\u1100\u1161\u11a8",
    "שלוםבּ", "مرحبا٣٤", "नमस्ते", "½²Ⅷ④", "\u00a0\u2003\u3000\u0085\u180e\u200b\u200d\ufeff", "👍🏽❤\ufe0f🇩🇪", "\u0000\u0001\u007f",
    "ﬁＡ１㎥ｶﾞ",
]
WORDS = ["the", " the", "it's", "'ll", "'S", "<|endoftext|>", "<mask>", "word", "[L]", "[R]", "  ", "\r\n", "snake", "<long>", "1234", "café"]


def random_strings(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 14)):
            if rng.random() < 0.35:
                parts.append(rng.choice(WORDS))
            else:
                pool = rng.choice(POOLS)
                parts.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 5))))
        yield "".join(parts)


def train(pre_tokenizer, normalizer=None, vocabulary=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def prefix_space():
    t = train(pre_tokenizers.ByteLevel(add_prefix_space=True))
    t.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<mask>", lstrip=True)])
    t.add_tokens([
        AddedToken("word", single_word=True, normalized=False), AddedToken("[L]", lstrip=True, normalized=False),
        AddedToken("[R]", rstrip=True, normalized=True), AddedToken("<long>"), AddedToken("<longer>"), AddedToken("<long><longest>"),
    ])
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    return t


def llama3():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t = train(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level]), vocabulary=320)
    t.model.ignore_merges = True
    t.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", rstrip=True), AddedToken("<|endoftext|>")])
    start, end = t.token_to_id("<s>"), t.token_to_id("</s>")
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B:1", special_tokens=[("<s>", start), ("</s>", end)])
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return t


def nfkc_digits():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t = train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), normalizers.NFKC())
    t.add_special_tokens([AddedToken("<|endoftext|>")])
    t.add_tokens([AddedToken("<caf\u00e9>", normalized=True), AddedToken("<\ufb01n>", normalized=False), AddedToken("fin", normalized=True)])
    return t


def nfd_splits():
    parts = [
        pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.Split(Regex(r"\p{Han}+|\p{Hiragana}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[.,;!?]"), "merged_with_previous"), pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    t = train(pre_tokenizers.Sequence(parts), normalizers.Sequence([normalizers.NFC(), normalizers.NFD()]))
    t.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    return t


def removed_contiguous():
    parts = [
        pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+"), "removed", invert=True), pre_tokenizers.Split(Regex(r"\p{Lu}"), "contiguous"),
        pre_tokenizers.Split(Regex(r"e|x*"), "merged_with_previous", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
    ]
    return train(pre_tokenizers.Sequence(parts), normalizers.NFKD(), vocabulary=280)


def as_text(tokenizer, text):
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    return ids


def golden(tokenizer, strings):
    """One case per string: ids, with special tokens read as text and without the template (if different), decoded (if not the
    string itself), decoded without specials (if different). The library decodes an added token as if it were written in
    the byte alphabet and so loses characters of "<café>"; such a case is left out."""
    cases = []
    for s in strings:
        case = {"ids": tokenizer.encode(s).ids}
        text_ids = as_text(tokenizer, s)
        if text_ids != case["ids"]:
            case["as_text"] = text_ids
        decoded = tokenizer.decode(case["ids"], skip_special_tokens=False)
        skipped = tokenizer.decode(case["ids"], skip_special_tokens=True)
        if "\ufffd" in decoded:
            case["decoded"] = case["skipped"] = None
        else:
            if decoded != s:
                case["decoded"] = decoded
            if skipped != decoded:
                case["skipped"] = skipped
        cases.append(case)
    return {"size": max(tokenizer.get_vocab().values()) + 1, "cases": cases}


def fnv1a(ids):
    h = 0xCBF29CE484222325
    for byte in b"".join(struct.pack("<i", i) for i in ids):
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def write(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (OUT / name).write_text(text.replace('},{"ids"', '},\n{"ids"') + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT.parent / "shared" / "data")
    data = parser.parse_args().data / "text"
    OUT.mkdir(parents=True, exist_ok=True)

    strings = STRINGS + list(random_strings(40, seed=1))
    cases = {"strings": strings, "tokenizers": {}}
    for make in (prefix_space, llama3, nfkc_digits, nfd_splits, removed_contiguous):
        tokenizer = make()
        write(f"{make.__name__}.json", json.loads(tokenizer.to_str()))
        cases["tokenizers"][make.__name__] = golden(tokenizer, strings)
    write("cases.json", cases)

    neox = Tokenizer.from_file(str(data / "gpt-neox-20b-tokenizer.json"))
    files = {}
    for name in ("tinyshakespeare.txt", "wikitext2-test.txt", "wikitext2-valid.txt"):
        ids = neox.encode((data / name).read_bytes().decode()).ids
        files[name] = {"count": len(ids), "fnv1a": fnv1a(ids)}
    write("neox.json", {"strings": strings, "golden": golden(neox, strings), "files": files})


if __name__ == "__main__":
    main()
