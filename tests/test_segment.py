"""Sentences: tables of examples for each language, and what holds for any text of any language."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sentencex
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import LANGUAGES, PrepConfig, UserError, check_config
from data_prep import segment_library
from data_prep.segment import split_sentences, splitter

EXAMPLES: dict[str, list[list[str]]] = {
    "en": [
        ["Dr. Smith paid 3.50 dollars.", "(He was late.)", "Why?"],
        ["It works, e.g. In this case.", "See Fig. 3 for more."],
        ["J. R. Smith left.", "He came from the U.S.", "The end."],
        ["He lives near the U.S. Army base."],
        ['He said "No."', "Then he left."],
        ["1. Introduction to it.", "It begins."],
        ["Use version 1.2.", "`Next` is new…", "And so!", "“Quoted.”", "Done"],
        ["No. 5 is alive.", "She said no.", "He left at 5 p.m.", "The rest followed."],
        ["Apples, pears, etc. are fruit.", "Apples, pears, etc.", "These are fruit."],
        ["Smith et al. (2019) found it.", "In Jan. 2020 it rained."],
        ["What?!", "Really...", "Yes."],
        ["It was Éric.", "Élan is a word."],
        ['"Is it late?" he asked.', "“Run!” cried the boy.", "They ran."],
        ["He ran — no one saw him.", "— Who was he?", "-- A friend."],
        ["It rose by 2.5 per cent.[12]", "Nobody knew why.[3][4]", "See example.org for more."],
        ["*Really.*", "_He did._", "**It was so.**", "[A note.]", "End."],
        ["(See fig. 2.)", "The St. James Hotel and Mr. O. Brown vs. Mrs. Green."],
    ],
    "fr": [
        ["« Oui ! » dit-il.", "« Non ? »", "Il partit."],
        ["— Bonjour, dit-il.", "— Où va-t-on ? demanda M. Durand.", "— Là-bas."],
        ["Il cria : « Assez ! » et sortit.", "Mme Roy, elle, resta…", "Pourquoi ?"],
        ["César naquit en 100 av. J.-C. à Rome.", "Il mourut en 44 av. J.-C.", "Son neveu le vengea."],
        ["Voir p. 12, fig. 3 et chap. II, etc.", "Le prix est de 3.50 francs."],
        ["Ah ! que c'est beau !", "Élise sourit.", "À demain !"],
        ["«Viens.»", "«Jamais!»", "MM. Petit et Grand se turent."],
        ["Quoi ?!", "Tu l'as vu ?...", "Oui."],
    ],
    "de": [
        ["Am 3. Mai kam er.", "„Warum?“", "Niemand weiß es."],
        ["»Nein!«", "»Doch!«, rief sie.", "»Dann geh.«", "Er ging."],
        ["Im 19. Jahrhundert lebten dort z. B. Bauern, u. a. Karl Maier.", "Sie waren arm."],
        ["Das war 1945.", "Danach wurde es besser.", "Er wurde 18.", "Die Feier war groß."],
        ["Kaiser Wilhelm II. Sohn Friedrichs III. war da.", "Dr. Braun u.a. Ärzte bzw. Prof. Weiß kamen."],
        ["Er wohnt in der Kleinen Str. Nummer fünf.", "Vgl. Abb. 3 und Nr. 7.", "Es kostet 3,5 Mio. Euro."],
        ["500 v. Chr. Griechenland.", "Äpfel, Birnen usw.", "Das reicht."],
        ["‚Ja.‘", "«So ist es.»", "Über allem stand Öl."],
    ],
    "es": [
        ["El Sr. López y la Dra. Ruiz llegaron.", "¿Quién?", "¡Nadie!", "Él lo sabe."],
        ["Vive en EE. UU. desde enero.", "Nació en el s. XX en la Avda. Mayor."],
        ["—¿Vienes? —preguntó ella.", "—No.", "Se fue."],
    ],
    "it": [
        ["Il sig. Rossi e il dott. Bianchi, ecc.", "Poi partì.", "«Perché?» chiese.", "È tardi."],
        ["Vedi pag. 3, art. 5 e fig. 2.", "L'ha detto S. Pietro."],
    ],
    "pt": [
        ["O Sr. Silva e a Dra. Costa chegaram.", "Às dez saiu.", "— Não!", "— Por quê? — perguntou ela."],
        ["Custa 3.50, cf. pág. 7 e n.º 4.", "É caro."],
    ],
    "nl": [
        ["Dhr. Jansen en mevr. De Vries kwamen, o.a. Piet.", "Het regende.", "‘Waarom?’ vroeg hij."],
        ["Zie blz. 3 en art. 5.", "Appels, peren, enz.", "Dat is alles."],
    ],
    "sv": [["Han kom t.ex. Måndag den 3 maj.", "Är det sant?", "Det kostar 5 kr, dvs. Ingenting."]],
    "da": [["Se f.eks. Kapitel 3, s. 5.", "Det er rigtigt.", "Æbler m.m.", "Det var alt."]],
    "zh": [
        ["他走了。", "真的吗？", "真的！", "好"],
        ["他说：“你好。我走了。”", "然后他出了门。"],
        ["“你好。我走了。”他说。", "没有人回答。"],
        ["“你好。", "我走了。”"],
        ["她问：「你是谁？」", "「我是你的朋友。」"],
        ["《你好！李焕英》是一部电影（2021年上映。）。", "我看过。"],
        ["歌手「早安少女組。」的新歌很好聽。", "與前作不同。"],
        ["价格是3.5元；在example.com?id=3上买。", "Yahoo!奇摩也卖。"],
        ["他来自U.S.的公司.", "这是第一家."],
        ["我……我不知道……真的。……", "完了。"],
        ["（完。）", "【注：略。】下面是说明。"],
        ['他说:"好。"', "大家笑了。"],
        ["这座楼由“大师”设计。", "是本市最高的楼。", "之后又建了一座。"],
        ["会上提出的意见都很清楚，“我们应当在明年春天以前完成这一项工作。”", "王主席没有反对。"],
    ],
    "ja": [
        ["彼は来た。", "「行くよ。」と言った。", "本当？", "はい！"],
        ["「おはよう。元気？」", "「うん。」"],
        ["『けいおん！』は面白い。", "３．５倍になった．", "次へ．"],
    ],
    "hi": [["यह एक वाक्य है।", "यह दूसरा है।"]],
    "ar": [["هل هذا صحيح؟", "نعم.", "هذا صحيح."]],
    "ru": [["Он пришёл.", "Почему?", "Никто не знает."]],
    "ko": [
        ["안녕하세요.", "저는 학생입니다!", "3.5점?", "네."],
        ["그는 “날씨가 좋다.” 라고 말했다.", "그리고 갔다.", "그는 “좋다.”라고 말했다.", "끝."],
        ['그는 "첫째. 둘째." 라고 말했다.', "“정말?” 하고 그가 물었다.", "“가자!”라며 웃었다.", "네."],
        ["“쿵!” 하는 소리가 났다.", "‘안 돼.’라는 말이다.", "「정말?」이라고는 안 했다.", "네."],
        ["“그래.”", "그녀가 답했다.", "“가자. 어서.”", "하지만 그는 남았다.", '"가자."', '"어디로?"'],
        ["2020. 3. 15. 서울에서 열렸다.", "1. 서론이다.", "오전 10시였다."],
    ],
    "he": [
        ['ד"ר כהן הגיע.', "הוא הלך.", 'ד"ר לוי נשאר.', "סוף."],
        ['צה"ל פתח.', "הוא גדול.", 'חז"ל אמרו.', 'ארה"ב גדולה.', "היא רחוקה!", 'מפא"י ניצחה.'],
        ['הוא אמר: "אני הולך. שלום."', "והלך.", "ד״ר לוי נשאר."],
    ],
}
ONE_BY_ONE = [(language, sentences) for language, tables in EXAMPLES.items() for sentences in tables]


@pytest.mark.parametrize(("language", "sentences"), ONE_BY_ONE)
def test_sentences(language: str, sentences: list[str]) -> None:
    joint = "" if language in ("zh", "ja") else " "
    assert splitter(language)(joint.join(sentences)) == sentences
    assert splitter(language)("\n".join(sentences)) == [
        sentence for line in sentences for sentence in splitter(language)(line)
    ]


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_cleaning_may_leave_spaces_between_chinese_sentences(language: str) -> None:
    for sentences in EXAMPLES[language]:
        if not any("（" in sentence for sentence in sentences):
            assert "".join(splitter(language)(" ".join(sentences))).replace(" ", "") == "".join(
                sentences
            ).replace(" ", "")
    assert splitter(language)("他走了。 「好。」 完。") == ["他走了。", "「好。」", "完。"]


def test_lines_are_kept_as_sentences() -> None:
    assert splitter("lines")("One. Two.\n three \n\n4") == ["One. Two.", "three", "4"]


def test_english_is_what_the_old_name_gives() -> None:
    text = 'A title\nOne (two.) Three. "Four." five. Mr. X. 3.5 is Six! [Seven.] e.g. Eight\nEnd.'
    assert split_sentences(text) == splitter("en")(text) == splitter("en-GB")(text)


def test_a_region_or_script_changes_nothing() -> None:
    assert splitter("zh-TW")("好。走。") == splitter("ZH_hant")("好。走。") == ["好。", "走。"]


# ---------------------------------------------------------------------------------------- any text

MARKS = [
    *".!?…。！？．｡；：，、,;:\"'“”‘’«»„‚‹›()[]{}（）「」『』《》【】*`_—–-¿¡।؟ ",
    "\n", " ", "...", "……", "Dr.", "z. B.", "M.", "etc.", "3.", "1.5", "Mai", "II.", "。”", "！」", "：“",
]  # fmt: skip
WORDS = [
    "a",
    "The",
    "he",
    "Er",
    "Il",
    "dit-il",
    "你好",
    "说",
    "的",
    "はい",
    "と",
    "हाँ",
    "да",
    "Éa",
    "é",
    "x",
    "İ",
]
texts = st.lists(st.sampled_from(MARKS + WORDS) | st.characters(exclude_categories=["Cs"]), max_size=40).map(
    "".join
)
SAMPLED = [
    "en",
    "fr",
    "de",
    "es",
    "it",
    "pt",
    "nl",
    "sv",
    "da",
    "nn",
    "zh",
    "ja",
    "hi",
    "ar",
    "ru",
    "ko",
    "th",
    "he",
]


@pytest.mark.parametrize("language", [*SAMPLED, "am", "hy", "el", "my", "lines"])
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_no_character_but_spaces_is_lost(language: str, text: str) -> None:
    sentences = splitter(language)(text)
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert all(sentence == sentence.strip(" ") != "" and "\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize("language", SAMPLED)
@settings(max_examples=100, deadline=None)
@given(lines=st.lists(texts.map(lambda text: text.replace("\n", " ")), max_size=4))
def test_a_newline_always_ends_a_sentence(language: str, lines: list[str]) -> None:
    split = splitter(language)
    assert split("\n".join(lines)) == [sentence for line in lines for sentence in split(line)]


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_every_code_has_a_splitter(language: str) -> None:
    assert splitter(language)("One. Two.\nThree") in (["One.", "Two.", "Three"], ["One. Two.", "Three"])


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "word " * 400_000),
        ("en", "A. " * 100_000),
        ("en", "." * 1_000_000),
        ("en", "x" * 1_000_000 + ". Then"),
        ("de", "„ " * 300_000 + "Ja. Nein."),
        ("fr", "« " * 300_000 + "Oui. Non."),
        ("zh", "“好。" * 30_000),
        ("zh", "“" * 3_000 + "好。" * 3_000 + "”" * 3_000),
        ("zh", "《" + "好。" * 50_000),
        ("zh", "”。" * 100_000),
        ("en", ". " + "- " * 200_000 + "x"),
        ("zh", '"好。' * 100_000),
        ("zh", "..." * 200_000),
        ("ru", "好。" * 50_000),
        ("he", 'ד"ר. ' * 100_000),
        ("ko", "“좋다.”라고 " * 50_000),
    ],
)
def test_hostile_lines_end_soon(language: str, line: str) -> None:
    """Work grows with the length alone: what is quadratic here would take hours."""
    sentences = splitter(language)(line)
    assert "".join(sentences).replace(" ", "") == line.replace(" ", "")


@pytest.mark.parametrize("line", ["他走了很远的路。", "“Да. ", "Он пошёл. "])
def test_the_library_works_on_twice_the_text_twice_as_long(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is sentences times characters of a call, where no space stands between them."""
    work = 0

    def counted(code: str, text: str) -> list[str]:
        nonlocal work
        parts: list[str] = segment(code, text)
        work += len(parts) * len(text)
        return parts

    segment = sentencex.segment
    monkeypatch.setattr(sentencex, "segment", counted)
    done = []
    monkeypatch.setattr(segment_library, "WINDOW", 4000)
    for size in (20_000, 40_000):
        work, text = 0, (line * size)[:size]
        sentences = splitter("ru")(text)
        assert sentences == [part for s in segment("ru", text) if (part := s.strip(" "))]
        done.append(work)
    assert done[1] < 2.2 * done[0]


def test_a_sentence_longer_than_the_window_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_library, "WINDOW", 3000)
    long = "слово " * 3000 + "конец."
    assert splitter("ru")(f"Раз. {long} Два. {long}") == ["Раз.", long, "Два.", long]


# -------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("language", "near"),
    [("english", "en"), ("German", "de"), ("jp", "ja"), ("cn", "zh"), ("line", "lines"), ("franch", "fr")],
)
def test_an_unknown_language_is_refused_with_the_nearest_known(language: str, near: str) -> None:
    with pytest.raises(UserError, match=f"language: '{language}'.*nearest known codes: .*{near}"):
        splitter(language)
    with pytest.raises(UserError, match=f"language: '{language}'.*nearest known codes: .*{near}"):
        check_config(PrepConfig, {"input": ["x"], "output": "y", "language": language}, "c.yaml")


def test_a_language_without_neighbours_is_refused_too() -> None:
    with pytest.raises(UserError, match="language: 'qq' is neither an ISO 639-1 code"):
        splitter("qq")


def test_sentencex_is_imported_for_other_languages_alone() -> None:
    code = (
        "import sys; from data_prep.segment import splitter; splitter('zh')('好。'); splitter('en')('A. B.');"
        "assert 'sentencex' not in sys.modules; splitter('hi')('A. B.'); assert 'sentencex' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
