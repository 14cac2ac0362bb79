"""Sentences of languages in Latin script: where one may end, and the words after which it does not.

split(line, GERMAN)

One regular expression finds the places where a sentence may end: a full stop, question or exclamation mark
or ellipsis, closing quotes or brackets, a space, and a word that does not begin in lower case, with its
opening quotes, brackets or dash. Only after a single full stop is the word before it looked at:
abbreviations, initials, list numbers and ordinals do not end a sentence. Quotes need no table of countries:
a mark that touches the stop closes („Ja.“, «Sí.», »Nein.«, « Oui. »), one after the space opens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

# Last, the character after the space: a digit, or a letter that is not a lower-case one of ASCII.
_candidate = re.compile(
    r"""
    ([.!?…](?<![.!?…]{2})[.!?…]*+)  # all of a run or none, so that a long one is read once
    (?:["'”’“‘»«›‹)\]}*`_]|\ [»›]|\[\d{1,3}\])*
    \ (?=(?:["'“‘„‚»›(\[{*`_¿¡]|[«‹—–-]\ ?)*([^\Wa-z_]|`))
    """,
    re.VERBOSE,
)
_opening = re.compile(r".*[(\[{\"'“‘„«»/]")  # of the word before the stop
_special = re.compile(r"\d+\Z|[IVX]+\Z|.*\.")
_word_after = re.compile(r"\w+")
_letters_with_stops = re.compile(r"(?:[^\W\d_]\.-?)+[^\W\d_]\Z")  # U.S, e.g, a.m, J.-C
_ordinal = re.compile(r"(?:\d{1,2}|[IVX]{2,})\Z")


@dataclass(frozen=True)
class Rules:
    """The words of one language, without their full stop; all but `starters` in lower case."""

    never: frozenset[str]  # never the last word of a sentence
    before_numbers: frozenset[str]  # abbreviations only when a number follows
    either: frozenset[str]  # end a sentence if the next word is one of `starters`
    starters: frozenset[str]  # words that often begin a sentence, as they are written there
    ordinals: bool = False  # whether "3." is a number of a row, as in "am 3. Mai"

    @cached_property
    def listed(self) -> frozenset[str]:
        """All that may precede a full stop that ends no sentence."""
        return self.never | self.before_numbers | self.either


def split(line: str, rules: Rules) -> list[str]:
    """The sentences of `line`, which holds no newline; no character but spaces is lost."""
    sentences = []
    start = 0
    for match in _candidate.finditer(line):
        if match[2].islower() or (
            match[1] == "." and not ends(line, start, match.start(), match.end(), rules)
        ):
            continue
        sentences.append(line[start : match.end()].strip(" "))
        start = match.end()
    if rest := line[start:].strip(" "):
        sentences.append(rest)
    return sentences


def ends(line: str, start: int, stop: int, after: int, rules: Rules) -> bool:
    """Whether the full stop at `stop` ends the sentence that began at `start`; text continues at `after`."""
    first = line.rfind(" ", start, stop) + 1 or start
    word = line[first:stop]
    if not word.isalnum() and (opening := _opening.match(word)):
        first += opening.end()
        word = word[opening.end() :]
    lower = word.lower()
    if not (lower in rules.listed or len(word) < 2 or _special.match(word)):
        return True  # nearly always
    if not word:
        return True
    if lower in rules.never:
        return False
    if first == start and (word.isdigit() or len(word) == 1):
        return False  # "1. Introduction", "B. Methods"
    following = _word_after.search(line, after)
    if following is None:
        return True
    if lower in rules.before_numbers and following[0][0].isdigit():
        return False
    if (
        lower in rules.either
        or (len(word) == 1 and word.isupper())
        or _letters_with_stops.match(word)
        or (rules.ordinals and _ordinal.match(word))
    ):
        return following[0] in rules.starters
    return True


def _rules(*, ordinals: bool = False, **words: str) -> Rules:
    """The Rules of these words, each kind of them in one text."""
    return Rules(ordinals=ordinals, **{kind: frozenset(text.split()) for kind, text in words.items()})


# In every language: titles, references and Latin words.
_NEVER = "dr prof mr mrs ms st cf vs fig vol pp resp incl ca phil jur"
_NUMBERED = "no nr p s v art max min"
_EITHER = "etc inc ltd co corp al jr sr ed eds ph.d"

ENGLISH = _rules(
    never="""mr mrs ms dr prof st mt gen sen rep gov capt lt col sgt maj cmdr rev hon pres messrs mme mlle vs
        cf viz eg ie e.g i.e fig figs eq eqs eqn sec sect ch chap vol pp ref refs tab thm lem prop def approx
        resp incl excl esp ca wrt w.r.t nr""",
    before_numbers="no nos p b d c art jan feb mar apr jun jul aug sep sept oct nov dec v ver r max min",
    either="etc inc ltd co corp bros jr sr al ed eds dept univ assn est ave blvd rd ph.d",
    starters="""A After All Also Although An And Any As At Because Before But By Each For From He Her Here His
        How However I If In It Its Many More Most My No Not Note On One Or Other Our Returns See She Since So
        Some Such That The Their Then There Therefore These They This Those Thus To Use Used Using We What
        When Where Which While Who Why With You Your""",
)

FRENCH = _rules(
    never=f"""{_NEVER} m mm mme mmes mlle mlles mgr me mes pr ste sts stes gal cdt cap lieut chap figs tab av
        apr env éd boul bd fg hab p.ex par.ex c.-à-d id ibid""",
    before_numbers=f"{_NUMBERED} n° art ch t liv tél janv févr avr juil sept oct nov déc § pl",
    either=f"{_EITHER} j.-c suiv cie n° s t p l v c f h b n d x q r",
    starters="""À A Afin Ainsi Alors Après Au Aucun Aujourd Aussi Aux Avant Avec C Ce Cela Celle Celui Ces Cet
        Cette Chaque Comme Comment D Dans De Depuis Dès Des Deux Donc Du Elle Elles En Enfin Est Et Il Ils J
        Je Jusqu L La Le Les Leur Leurs Lorsque Lui Mais Malgré Mon Même N Ni Non Nos Notre Nous On Or Ou Où
        Oui Par Parce Pendant Peu Plus Plusieurs Pour Pourquoi Puis Qu Quand Que Quel Quelle Quelques Qui Quoi
        S Sa Sans Selon Ses Si Son Sous Sur Tandis Tous Tout Toute Très Tu Un Une Vers Voici Voilà Vos Votre
        Vous Y""",
)

GERMAN = _rules(
    never=f"""{_NEVER} hr hrn fr frl nr bd bde abb tab kap mag dipl ing med bzw bspw evtl ggf inkl exkl vgl
        sog zzt ugs geb gest verh verw gen dgl insb zit ebd einschl z.b d.h u.a o.ä i.d.r""",
    before_numbers="""abs art s p vers jan jän feb febr mär apr jun jul aug sep sept okt nov dez tel § seit
        max min""",
    either=f"""{_EITHER} usw usf mio mrd tsd jh jhd jhdt str chr anm aufl bes hl hrsg allg dt engl frz lat ev
        kath u a d h z o v n i e ff sel sen jun dtsch""",
    starters="""Aber Ab Siehe Vgl Alle Alles Allerdings Als Also Am An Anschließend Auch Auf Aus Außerdem Bei
        Beim Bereits Bis Da Dabei Dadurch Dafür Daher Damals Damit Danach Dann Daraufhin Darum Das Dass Davon
        Dazu Dem Den Denn Der Des Deshalb Die Dies Diese Diesem Diesen Dieser Dieses Doch Dort Du Durch Ein
        Eine Einem Einen Einer Eines Er Erst Es Etwa Für Ganz Gegen Hier Ich Ihr Ihre Ihren Ihrer Im Immer In
        Insgesamt Ist Jede Jeder Jedoch Jetzt Kein Keine Man Mehr Mein Meine Mit Nach Nachdem Neben Nicht Noch
        Nun Nur Ob Obwohl Oder Ohne Schon Sehr Sein Seine Seit Sich Sie Sind So Sobald Solche Sondern Später
        Trotz Trotzdem Über Um Und Uns Unser Unter Viele Vom Von Vor Während War Was Weil Weitere Welche Wenn
        Wer Wie Wieder Wir Wird Wo Zu Zudem Zuerst Zum Zunächst Zur Zwar Zwei Zwischen""",
    ordinals=True,
)

SPANISH = _rules(
    never=f"""{_NEVER} sra sras srta srtas sres dra dres profa d dña ud uds vd vds gral cnel cap lic ing arq
        fr sto sta excmo excma ilmo ilma mons rvdo pág págs núm núms p.ej ej aprox tel avda""",
    before_numbers=f"{_NUMBERED} n.º art arts cap ed ene feb mar abr jun jul ago sept oct nov dic",
    either=f"{_EITHER} sr ee uu ss mm cía hnos av izq dcha p n s c t v d.c a.c",
    starters="""A Actualmente Además Ahora Al Algunos Allí Ante Antes Aquel Aquella Aquí Así Aún Aunque Cada
        Como Con Cuando De Debido Del Desde Después Donde Durante El Él Ella Ellos En Entonces Entre Era Es
        Esa Ese Eso Esta Está Estas Este Esto Estos Fue Hay Hasta La Las Le Lo Los Luego Más Me Mi Mientras
        Muchos Muy Nadie Ni No Nos Nosotros Nunca O Otra Otro Para Pero Por Porque Posteriormente Pues Que Qué
        Quien Se Según Ser Si Sí Sin Sobre Son Su Sus También Tampoco Tan Tras Tu Tú Un Una Unos Y Ya Yo""",
)

ITALIAN = _rules(
    never=f"""{_NEVER} sig sigg sig.ra sig.na dott dott.ssa avv ing arch geom rag on sen gen col cap mons don
        ss pag pagg es ecc.mo egr gent spett cit tel n.b p.es""",
    before_numbers=f"{_NUMBERED} n art artt cap sez gen feb mar apr mag giu lug ago set sett ott nov dic",
    either=f"{_EITHER} ecc c s n p d a.c d.c v f m r",
    starters="""A Ad Al Alcuni Alla Alle Allora Anche Ancora Appena C Che Chi Ci Come Con Contro Così Cosa Da
        Dal Dalla Degli Dei Del Della Delle Di Dopo Dove Dunque Durante E È Ed Egli Ella Era Essa Esso Essi
        Forse Fra Fu Gli Grazie Ha Ho I Il Immediatamente In Infine Inoltre Invece Io L La Le Lei Lo Loro Lui
        Ma Mentre Mi Mia Mio Nel Nella Nelle Negli Nessuno No Noi Non Nonostante O Ogni Oggi Oltre Oppure Per
        Perché Però Più Poi Prima Qual Qualche Quando Quanto Quella Quelli Quello Questa Queste Questi Questo
        Qui Quindi Sono Se Secondo Senza Si Sì Solo Sono Su Sua Successivamente Sul Sulla Suo Tra Tu Tutti
        Tutto Un Una Uno Vi Voi""",
)

PORTUGUESE = _rules(
    never=f"""{_NEVER} sra srs sras srta dra drs profa d exmo exma ilmo ilma eng arq gen cel cap ten sgt pe fr
        sto sta pág págs núm ex p.ex aprox tel av""",
    before_numbers=f"{_NUMBERED} n.º art arts cap ed jan fev mar abr mai jun jul ago set out nov dez",
    either=f"{_EITHER} sr exa cia ltda p n s c v séc a.c d.c v.exa",
    starters="""A À Agora Além Ainda Algumas Alguns Ao Aos Apenas Apesar Após Aquele Aquela Aqui As Às Assim
        Até Atualmente Cada Com Como Contudo Da Das De Depois Desde Dessa Desse Desta Deste Do Dos Durante E É
        Ela Elas Ele Eles Em Então Entre Entretanto Era Essa Esse Esta Este Está Eu Foi Há Isso Isto Já Lá
        Mais Mas Mesmo Meu Minha Muitos Na Nas Nem Nessa Nesse Nesta Neste Ninguém No Nos Nós Não Nunca O Onde
        Os Ou Outra Outro Para Pela Pelo Pois Por Porém Porque Posteriormente Quando Que Quem Se Segundo Sem
        Sempre Seu Seus Só Sob Sobre Sua Suas Também Tem Todos Tudo Um Uma Você Vocês""",
)

DUTCH = _rules(
    never=f"""{_NEVER} dhr mevr mw mej drs ir ing mr ds bijv bv blz pag hfdst afb nr nl zgn evt incl excl o.a
        d.w.z b.v m.b.t i.v.m t.a.v z.g min.pres gebr burg kol kapt sgt""",
    before_numbers="art lid p s tel jan feb mrt apr jun jul aug sep sept okt nov dec max min",
    either=f"{_EITHER} enz e.d e.a m.a.w jl a.s chr v n b d z o i.p.v str",
    starters="""Aan Al Alle Alleen Als Alles Bij Binnen Bovendien Daar Daarna Daarom Daarnaast Dan Dat De Deze
        Die Dit Doch Door Dus Echter Een Eén Eerst En Enkele Er Geen Haar Het Hier Hij Hoe Hun Iedereen Ik In
        Is Je Jij Later Maar Men Met Mijn Na Naar Naast Niet Niemand Nog Nu Of Om Omdat Onder Ondanks Ons Onze
        Ook Op Over Sinds Te Tegen Tijdens Toch Toen Tot Tussen Uit Van Vanaf Veel Volgens Voor Waar Wanneer
        Want Wat We Wel Werd Wie Wij Ze Zij Zijn Zo Zoals Zonder""",
)

SWEDISH = _rules(
    never=f"{_NEVER} bl.a t.ex d.v.s dvs s.k resp f.d kap sid tel ung forts m.a.o fr.o.m t.o.m st kungl",
    before_numbers="nr s sid kl jan febr mars apr aug sept okt nov dec max min",
    either=f"{_EITHER} m.m m.fl osv f.kr e.kr d v s o k",
    starters="""Alla Allt Att Av Både Bland De Den Denna Dess Dessa Det Detta Du Där Därefter Därför Då Efter
        Eftersom Ej En Enligt Ett Från För Genom Han Hans Har Hela Hennes Hon Hur Här I Ingen Innan Inte Jag
        Kan Man Med Medan Men Min Nu När Och Också Om På Sedan Senare Sin Som Så Så Till Trots Under Utan Vad
        Var Vem Vi Vid Vilken Än Är Även Över""",
)

DANISH_NORWEGIAN = _rules(
    never=f"{_NEVER} bl.a f.eks dvs d.v.s hr fru kap s.k såk såkalt tlf mht pga ifm jf jfr kgl hhv hhv",
    before_numbers="nr s kl jan feb mar apr jun jul aug sep sept okt nov dec des art max min",
    either=f"{_EITHER} m.m m.fl m.v mv osv o.l o.a f.kr e.kr d v s o f",
    starters="""Alle Alt At Av Af Blant Blandt Både Da De Dem Den Denne Der Deres Derefter Derfor Dersom
        Desuden Det Dette Dessuten Disse Du En Er Et Etter Efter Før For Fordi Fra Han Hans Har Hendes Hennes
        Her Hun Hvad Hva Hvem Hver Hvis Hvor Hvordan I Ifølge Ikke Ingen Jeg Kan Man Med Mange Men Mens Min Nå
        Nu Når Og Også Om Under På Senere Selv Siden Som Så Til Uten Uden Ved Vi""",
)
