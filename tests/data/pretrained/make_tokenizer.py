"""`tokenizer.json`: a small byte-pair encoding trained here, texts, and transformers' ids of them.

The vocabulary has the layout of CLIP's: 256 bytes, 256 bytes that end a word, the merges, and the
two special tokens last.
"""

# ruff: noqa: RUF001

import collections
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np

SENTENCES = """
a photograph of an astronaut riding a horse, highly detailed, 4k, trending on artstation
a painting of the sea in the style of claude monet, soft light, impressionism
portrait of a young woman with flowers in her hair, oil on canvas, 19th century
the starry night over the city, by vincent van gogh; the moon, the stars and the river
a small dog isn't sleeping: it's barking at the cat they'll never catch, we've seen that
cinematic shot of a lighthouse in a storm, dramatic lighting, 35mm, f/1.8, bokeh
an isometric render of a tiny house on an island, octane render, unreal engine
le café est très agréable, naïve façade, crème brûlée, señor, über, straße
living in the light with ann graham lotz; bloodborne video game, sony playstation 4
""".strip().splitlines()

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  a  photo \t of\na\r\ncat  ",
    "A PHOTO OF A CAT!!! (masterpiece:1.2), [best quality], <lora:x:0.8>",
    "it's we're you've I'm they'll he'd don't 'tis 's 'S 'Re rock'n'roll ''s",
    "x'd'll've'",
    "1234567890 3.14 1,000,000 2nd 4k 1/2 ½ ¾ ⅓ Ⅷ ⅻ ² ³ ① ⑳ ㊿ ٣٤ ४५ 二十 𝟙𝟚 ௰",
    "😀 👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 👍🏽 ❤️ ☺︎ a😀b 4😀",
    "e\u0301 é a\u0308\u0323 a\u0323\u0308 ñ n\u0303 \u0301 \u0301\u0301 ก\u0e33 क\u094d\u0937",
    "Z\u0351\u036b\u0343A\u0321L\u0334G\u0352O\u0336",
    "宇航员骑马 宇宙飛行士が馬に乗っている 우주비행사 각 カ\u3099 ｶﾞ ﷺ",
    "رائد فضاء يركب حصاناً ١٢٣ אסטרונאוט רוכב על סוס नमस्ते दुनिया สวัสดี",
    "ΑΣΤΡΟΝΑΥΤΗΣ ΟΔΟΣ Σ σς İstanbul IĞDIR ǅ ẞ Å K Ω ﬁ ǆ Ŀ ŉ",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x80\x85\x9f\xa0\xad a\x1cb a\x85b a\u200bb a\u200db a\ufeffb",
    "\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000x\u180ey",
    "\ufffd\ufffe\uffff \ue000 \U000f0000 \U0010ffff",
    "<|startoftext|>a<|endoftext|>b <|STARTOFTEXT|> <|EndOfText|>!! <|startoftext|><|",
    "<|startoftext <|endoftext| > |><|> <<|endoftext|>>",
    "!!<|STARTOFTEXT|>?? !a! a!b",
    "_under_score_ a_b __init__ snake_case kebab-case CamelCase http://example.org/a?b=c&d#e",
    "“quoted” ‘single’ «guillemets» – — … ‰ € £ ¥ § © ® ™ ° µ × ÷ ≠ ≤ ∞ √ ∑ → ♥ ♪ █",
    "supercalifragilisticexpialidocious" * 3,
    "a " * 100,
    "the starry night " * 30 + "end",
    "!" * 90,
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ＦＵＬＬＷＩＤＴＨ ⓐⓑⓒ 𐐀𐐨 𓀀 𒀀 ﬀ",
    "ªº ˈfəˌnɛtɪks ʰʷ ꙮ ᏣᎳᎩ ꭰ Ⴀ ⴀ Ა ა",
]


def special(content, normalized=True):
    options = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, **options}


BEGIN, END = special("<|startoftext|>"), special("<|endoftext|>")
MAP = {"bos_token": BEGIN, "eos_token": END, "unk_token": END}
CONFIG = {name: {"__type": "AddedToken", **value} for name, value in MAP.items()}
CONFIG |= {"pad_token": "<|endoftext|>", "model_max_length": 77, "do_lower_case": True}


def styles(size):
    """The files beside vocabulary and merges, as published pipelines have them, by name."""
    decoder = {0: "!", size - 2: "<|startoftext|>", size - 1: "<|endoftext|>"}
    newer = {str(i): special(token, False) | {"special": True} for i, token in decoder.items()}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    newer = {"added_tokens_decoder": newer, **names, "unk_token": "<|endoftext|>"}
    return {
        "plain": {},
        "sd1": {
            "tokenizer_config.json": CONFIG,
            "special_tokens_map.json": MAP | {"pad_token": "<|endoftext|>"},
        },
        "sd2": {
            "tokenizer_config.json": CONFIG,
            "special_tokens_map.json": MAP | {"pad_token": "!"},
        },
        "xl2": {"tokenizer_config.json": newer | {"model_max_length": 77}},
        "inversion": {
            "tokenizer_config.json": CONFIG,
            "added_tokens.json": {"<cat-toy>": size, "astro": size + 1, "astronaut": size + 2},
        },
    }


def trained(spell, num_merges):
    """Merges by counting: the most frequent pair of neighbours first, ties by the pair itself."""
    counts = collections.Counter(
        word for text in TEXTS[: len(SENTENCES)] for word in text.lower().split()
    )
    spelled = {word: [*spell(word)[:-1], spell(word)[-1] + "</w>"] for word in counts}
    merges = []
    while len(merges) < num_merges:
        pairs = collections.Counter()
        for word, letters in spelled.items():
            for pair in itertools.pairwise(letters):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for letters in spelled.values():
            place = 0
            while place < len(letters) - 1:
                if (letters[place], letters[place + 1]) == best:
                    letters[place : place + 2] = ["".join(best)]
                place += 1
    return merges


def byte_names():
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    names = {byte: chr(byte) for byte in kept}
    return names | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def vocabulary(merges):
    letters = list(byte_names().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def write(folder, merges, files):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in {"vocab.json": vocabulary(merges), **files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def many_texts(number):
    """Texts of all kinds, drawn from a fixed seed; characters that Python's table knows."""
    import unicodedata

    rng = np.random.default_rng(0)
    letters = "abcdefghilmnorstuvw 's't.,!?<|>_-\t\n0123½ÀéΣİ的\u0301"
    parts = [
        *"!.'é \u0327",
        "<|startoftext|>",
        "<|ENDOFTEXT|>",
        "<|endoftext|>",
        "'s",
        "'RE",
        "cat",
    ]
    parts += ["<cat-toy>", "<CAT-TOY>", "astro", "Astronaut ", "the ", "Ⅷ", "👩‍🚀"]
    texts = []
    while len(texts) < number:
        size = int(rng.integers(60))
        kind = len(texts) % 4
        if kind == 0:
            text = "".join(rng.choice(list(letters), size))
        elif kind == 1:
            text = "".join(rng.choice(parts, size // 3))
        else:
            codes = rng.integers(0x3000 if kind == 2 else 0x110000, size=size)
            text = "".join(map(chr, codes))
        texts.append("".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs")))
    return texts


def make(folder):
    from transformers import CLIPTokenizer

    names = byte_names()
    merges = trained(lambda word: [names[byte] for byte in word.encode()], 250)
    ids = {}
    for style, files in styles(len(vocabulary(merges))).items():
        with tempfile.TemporaryDirectory() as temporary:
            write(temporary, merges, files)
            theirs = CLIPTokenizer.from_pretrained(temporary)
            ids[style] = [
                theirs(text, max_length=77, truncation=True)["input_ids"] for text in TEXTS
            ]
    fixture = {"merges": [" ".join(pair) for pair in merges], "texts": TEXTS, "ids": ids}
    (folder / "tokenizer.json").write_text(json.dumps(fixture) + "\n")
