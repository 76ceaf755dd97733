"""The texts of a proof: prose that windows are cut from, and lines that tokenizers disagree about.

Both are the project's own words. The prose is plain (one script, composed letters, no special
tokens), so that a tokenizer's known gaps do not spoil the comparison of predictions; the lines are
the opposite, each with a name by which a difference is reported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

PROSE = """\
The river had been low since June, and by the end of August you could walk from the mill to the \
island without wetting your knees. Children collected the flat grey stones that the water had \
left behind, and old Mrs. Hallam, who had counted forty-one summers from the same window, said \
that she had seen it lower only once, in the year when the bridge was built. Nobody asked her \
which bridge. There were three of them now, and each was somebody's favourite.

In the laboratory upstream, two engineers measured the flow every morning at 6:30 and wrote the \
figures into a table: 4.7 cubic metres a second on Monday, 4.5 on Tuesday, 4.4 for the rest of \
the week. "If it falls below four," the younger one explained, "the turbine has to stop; it was \
made for five, and it shakes itself to pieces at three." The older one nodded without looking \
up. He had read the manual, which ran to 212 pages, and he had also read the contract.

Water is a compound of hydrogen and oxygen. It boils at 100 degrees Celsius under a pressure of \
one atmosphere, and at about 70 degrees on the highest mountain of the earth, which is why beans \
take so long to cook up there. Most of the water on the planet is salt; of what is not, more \
than two thirds is ice. A person needs some two litres a day, a cow sixty, and a field of maize \
in July so much that the numbers stop meaning anything to anybody who does not farm.

When the council met in September, the first question was who should pay. The second, asked by a \
tall woman at the back who gave her name as Ruth Okafor, was why nobody had opened the sluice in \
April, when there had been water to spare. A long silence followed. Then the chairman looked at \
the clerk, the clerk looked at his shoes, and somewhere behind the wall a tap dripped into a \
sink: once, twice, three times. "That," said Mrs. Okafor, "is what I mean."

They agreed on a plan with five points. First, the gate would be repaired before the winter. \
Second, the mill would be told in writing. Third, the table of the two engineers would hang in \
the library, where everybody could read it, and the school would draw the curve on squared \
paper. Fourth, if the flow fell below four again, the turbine would rest, whatever the contract \
said. Fifth, they would meet again in March. The rain began on the evening of the same day, at \
first so softly that people on the square held out their hands to be sure of it, and it did not \
stop for nine days.
"""

_LETTERS = "cafe\u0301 A\u030angstro\u0308m n\u0303 \u1112\u1161\u11ab \u0915\u093c"
# name -> text. A name says what a tokenizer has to get right there.
# A tokenizer that composes letters makes the same of the last two.
LINES: tuple[tuple[str, str], ...] = (
    ("English", "It's 9 o'clock; they'll say we've DONE it -- haven't they?  (I'd guess so.)"),
    ("numbers", "0 1 12 123 1234 12345 3.14159 1,000,000 -7 1e-9 0x1F 2026-11-29 ½ ² ⅷ"),
    ("spaces", "one  two   three    four\ttab\t\ttabs \n\n\nlines\n  indented \n \nend "),
    ("code", "def f(x: int) -> str:\n    return f\"{x!r}\\n\"  # a_b += c['d'][-1] ** 2; <div/>"),
    ("Latin", "Zażółć gęślą jaźń; çà et là, naïve façade, Straße, smörgåsbord, ¿qué?"),
    ("Cyrillic and Greek", "Съешь ещё этих мягких булок. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία."),
    ("Hebrew and Arabic", "שלום עולם, מה שלומך? مرحبا بالعالم، كيف حالك؟ ١٢٣"),
    ("Indic", "नमस्ते दुनिया, कैसे हैं आप? வணக்கம் உலகம் ১২৩ ನಮಸ್ಕಾರ"),
    ("Thai and Khmer", "สวัสดีชาวโลก คุณสบายดีไหม ជំរាបសួរ"),
    ("Chinese", "你好，世界！今天天气怎么样？「繁體」字與標點。３４"),
    ("Japanese and Korean", "こんにちは世界。カタカナとｶﾀｶﾅ、漢字。 안녕하세요 세계! 가나다"),
    ("emoji", "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ ☺ 🏳️‍🌈 1️⃣"),
    ("symbols", "∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−L|<ε … “quotes” ‘single’ «guillemets» – — € £ ¥ © ™ ·"),
    ("rare", "\u00ad\u200b\u200d\u2028\ufeff 𝕳𝖊𝖑𝖑𝖔 𐍈 \U0001f9ff ﷺ ﬁ"),
    ("composed", unicodedata.normalize("NFC", _LETTERS)),
    ("decomposed", _LETTERS),
)

MAX_SPECIALS = 48
ALL, COMPOSED, DECOMPOSED = "all scripts together", "composed", "decomposed"
AFTER_SPECIAL = "words after special tokens"


def lines(specials: Sequence[str]) -> list[tuple[str, str]]:
    """All named lines, with two that have the model's special tokens in them.

    The first joins all that every tokenizer is expected to agree on, so that one look tells whether
    a tokenizer is right. Decomposed letters and words after special tokens are not among these.

    Args:
        specials: the tokenizer's added and special tokens; the first 48 are taken.
    """
    named = list(LINES)
    after = []
    if specials:
        named.append(("special tokens", "before" + "".join(specials[:MAX_SPECIALS])))
        words = " and ".join(f"{s}word" for s in specials[:MAX_SPECIALS])
        after.append((AFTER_SPECIAL, f"before {words}\n{specials[0]} after"))
    joined = "\n\n".join(text for name, text in named if name != DECOMPOSED)
    return [(ALL, joined), *named, *after]
