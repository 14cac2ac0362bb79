"""Sentences in a model's own language, and the file by which anyone can check a server of the model.

`reference/reference.safetensors` lies in a folder of its own: some servers take every safetensors file
beside config.json for weights. It holds, N sentences of at most T tokens, right-padded:

| tensor            |           |                                                               |
| ----------------- | --------- | ------------------------------------------------------------- |
| input_ids         | [N, T]    | with [CLS] and [SEP], padding after them                      |
| attention_mask    | [N, T]    | 1 for tokens, 0 for padding                                   |
| last_hidden_state | [N, T, H] | float32, of the weights as they are stored; padding is 0      |
| mean, first       | [N, H]    | what the two ways of pooling make of it                       |

and in its metadata the sentences, as JSON, under `texts`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bertscale.config import ModelConfig
from bertscale.export.native import Output
from bertscale.tokenizer import Tokenizer
from bertscale.train.checkpoint import save_tensors

FOLDER, FILE = "reference", "reference.safetensors"
# The same three sentences each, so that the language is the one in which they have the fewest tokens.
SENTENCES = {
    "English": (
        "The book lies on the table.",
        "Yesterday we walked along the river until it became dark.",
        "How many people live in this city, and what do they eat in winter?",
    ),
    "German": (
        "Das Buch liegt auf dem Tisch.",
        "Gestern gingen wir am Fluss entlang, bis es dunkel wurde.",
        "Wie viele Menschen leben in dieser Stadt, und was essen sie im Winter?",
    ),
    "French": (
        "Le livre est sur la table.",
        "Hier, nous avons marché le long de la rivière jusqu'à la nuit.",
        "Combien de personnes vivent dans cette ville, et que mangent-elles en hiver ?",
    ),
    "Spanish": (
        "El libro está sobre la mesa.",
        "Ayer caminamos junto al río hasta que se hizo de noche.",
        "¿Cuántas personas viven en esta ciudad y qué comen en invierno?",
    ),
    "Italian": (
        "Il libro è sul tavolo.",
        "Ieri abbiamo camminato lungo il fiume finché non è diventato buio.",
        "Quante persone vivono in questa città e che cosa mangiano in inverno?",
    ),
    "Portuguese": (
        "O livro está sobre a mesa.",
        "Ontem caminhamos ao longo do rio até ficar escuro.",
        "Quantas pessoas vivem nesta cidade e o que comem no inverno?",
    ),
    "Dutch": (
        "Het boek ligt op de tafel.",
        "Gisteren liepen we langs de rivier tot het donker werd.",
        "Hoeveel mensen wonen er in deze stad, en wat eten ze in de winter?",
    ),
    "Swedish": (
        "Boken ligger på bordet.",
        "I går gick vi längs floden tills det blev mörkt.",
        "Hur många människor bor i den här staden, och vad äter de på vintern?",
    ),
    "Polish": (
        "Książka leży na stole.",
        "Wczoraj szliśmy wzdłuż rzeki, aż zrobiło się ciemno.",
        "Ilu ludzi mieszka w tym mieście i co jedzą zimą?",
    ),
    "Czech": (
        "Kniha leží na stole.",
        "Včera jsme šli podél řeky, dokud se nesetmělo.",
        "Kolik lidí žije v tomto městě a co jedí v zimě?",
    ),
    "Russian": (
        "Книга лежит на столе.",
        "Вчера мы шли вдоль реки, пока не стемнело.",
        "Сколько людей живёт в этом городе и что они едят зимой?",
    ),
    "Ukrainian": (
        "Книга лежить на столі.",
        "Учора ми йшли вздовж річки, доки не стемніло.",
        "Скільки людей живе в цьому місті і що вони їдять узимку?",
    ),
    "Greek": (
        "Το βιβλίο είναι πάνω στο τραπέζι.",
        "Χθες περπατήσαμε δίπλα στο ποτάμι μέχρι που σκοτείνιασε.",
        "Πόσοι άνθρωποι ζουν σε αυτή την πόλη και τι τρώνε τον χειμώνα;",
    ),
    "Turkish": (
        "Kitap masanın üzerinde duruyor.",
        "Dün hava kararana kadar nehir boyunca yürüdük.",
        "Bu şehirde kaç kişi yaşıyor ve kışın ne yiyorlar?",
    ),
    "Finnish": (
        "Kirja on pöydällä.",
        "Eilen kävelimme joen vartta, kunnes tuli pimeä.",
        "Kuinka monta ihmistä tässä kaupungissa asuu, ja mitä he syövät talvella?",
    ),
    "Hungarian": (
        "A könyv az asztalon van.",
        "Tegnap a folyó mentén sétáltunk, amíg be nem sötétedett.",
        "Hány ember él ebben a városban, és mit esznek télen?",
    ),
    "Vietnamese": (
        "Quyển sách nằm trên bàn.",
        "Hôm qua chúng tôi đi dọc bờ sông cho đến khi trời tối.",
        "Có bao nhiêu người sống ở thành phố này và họ ăn gì vào mùa đông?",
    ),
    "Indonesian": (
        "Buku itu ada di atas meja.",
        "Kemarin kami berjalan di sepanjang sungai sampai hari gelap.",
        "Berapa banyak orang yang tinggal di kota ini, dan apa yang mereka makan?",
    ),
    "Arabic": (
        "الكتاب على الطاولة.",
        "مشينا أمس على طول النهر حتى حل الظلام.",
        "كم عدد الناس الذين يعيشون في هذه المدينة وماذا يأكلون في الشتاء؟",
    ),
    "Hebrew": (
        "הספר מונח על השולחן.",
        "אתמול הלכנו לאורך הנהר עד שהחשיך.",
        "כמה אנשים גרים בעיר הזאת, ומה הם אוכלים בחורף?",
    ),
    "Persian": (
        "کتاب روی میز است.",
        "دیروز کنار رودخانه راه رفتیم تا هوا تاریک شد.",
        "چند نفر در این شهر زندگی می‌کنند و در زمستان چه می‌خورند؟",
    ),
    "Hindi": (
        "किताब मेज पर रखी है।",
        "कल हम अंधेरा होने तक नदी के किनारे चले।",
        "इस शहर में कितने लोग रहते हैं और वे सर्दियों में क्या खाते हैं?",
    ),
    "Bengali": (
        "বইটি টেবিলের উপর আছে।",
        "গতকাল আমরা অন্ধকার হওয়া পর্যন্ত নদীর ধারে হেঁটেছিলাম।",
        "এই শহরে কত মানুষ বাস করে এবং তারা শীতকালে কী খায়?",
    ),
    "Thai": (
        "หนังสืออยู่บนโต๊ะ",
        "เมื่อวานเราเดินไปตามแม่น้ำจนมืด",
        "มีคนอาศัยอยู่ในเมืองนี้กี่คน และพวกเขากินอะไรในฤดูหนาว",
    ),
    "Korean": (
        "책이 탁자 위에 있다.",
        "어제 우리는 어두워질 때까지 강을 따라 걸었다.",
        "이 도시에는 몇 명이 살고 있으며 겨울에는 무엇을 먹습니까?",
    ),
    "Japanese": (
        "本は机の上にあります。",
        "昨日、私たちは暗くなるまで川に沿って歩きました。",
        "この町には何人の人が住んでいて、冬には何を食べますか。",
    ),
    "Chinese": (
        "书在桌子上。",
        "昨天我们沿着河边走，一直走到天黑。",
        "这座城市有多少人居住，他们冬天吃什么？",
    ),
}
UNKNOWN = 4  # tokens that each character of an unknown piece counts as: the model cannot read it
SPELT = 2  # tokens that one byte of a character without a piece counts as
# Characters that are a word where no spaces are written, as the vocabularies of such languages have them.
UNSPACED = {"Thai": 4.0, "Japanese": 1.5, "Chinese": 1.25}


class Sample(NamedTuple):
    """A sequence to ask both sides for."""

    ids: Tensor  # int64 [T]
    types: Tensor  # int64 [T]


def language_of(tokenizer: Tokenizer) -> str:
    """The language, a key of `SENTENCES`, whose words have the fewest tokens in this vocabulary."""

    spelt = set(tokenizer.byte_ids)

    def tokens_a_word(language: str) -> float:
        texts = SENTENCES[language]
        count = sum(
            UNKNOWN * (end - begin) if number == tokenizer.unk_id else SPELT if number in spelt else 1
            for ids, spans in tokenizer.encode_with_offsets(texts)
            for number, (begin, end) in zip(ids, spans, strict=True)
        )
        each = UNSPACED.get(language)
        words = sum(len(text) / each if each else len(text.split()) for text in texts)
        return count / words

    return min(SENTENCES, key=tokens_a_word)


def sentences(tokenizer: Tokenizer) -> list[str]:
    """Three sentences in the language that the tokenizer was made for."""
    return list(SENTENCES[language_of(tokenizer)])


def samples_of(texts: list[str], tokenizer: Tokenizer, model: ModelConfig, vocab_size: int) -> list[Sample]:
    """The sentences, cut to what the model takes as transformers cuts them, and two samples of random ids."""
    longest = model.max_position_embeddings
    samples = []
    for ids in tokenizer.encode([tokenizer.normalize(text) for text in texts]):
        tokens = torch.tensor([tokenizer.cls_id, *ids[: max(0, longest - 2)], tokenizer.sep_id][:longest])
        samples.append(Sample(tokens, torch.zeros_like(tokens)))
    # Long enough that a local layer does not see the whole sample.
    long = max(64, 2 * (model.half_window or 0) + 7)
    generator = torch.Generator().manual_seed(0)
    for length in sorted({min(length, longest) for length in (7, long)}):
        tokens = torch.randint(vocab_size, (length,), generator=generator)
        samples.append(Sample(tokens, (torch.arange(length) > length // 2).long()))
    return samples


def write_reference(folder: Path, texts: list[str], samples: list[Sample], outputs: list[Output]) -> None:
    """Writes the file for the first samples, which are `texts`. Raises OSError."""
    count = len(texts)
    longest = max(len(sample.ids) for sample in samples[:count])

    def padded(values: list[Tensor]) -> Tensor:
        sizes = [[0, 0] * (value.dim() - 1) + [0, longest - len(value)] for value in values]
        return torch.stack([F.pad(value, size) for value, size in zip(values, sizes, strict=True)])

    hidden = [output.hidden for output in outputs[:count]]
    tensors = {
        "input_ids": padded([sample.ids for sample in samples[:count]]),
        "attention_mask": padded([torch.ones_like(sample.ids) for sample in samples[:count]]),
        "last_hidden_state": padded(hidden),
        "mean": torch.stack([states.mean(0) for states in hidden]),
        "first": torch.stack([states[0] for states in hidden]),
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    save_tensors(folder / FOLDER / FILE, tensors, {"texts": json.dumps(texts, ensure_ascii=False)})
