"""The pretraining text of the embedded model: small domains, each a function of a random.Random.

The domains are narrow and share few words on purpose. The balancing loss evens out the experts over
the whole mix, so a domain with its own words can have its own experts. Two domains use the words of
a task, so that the text of the task resembles its domain. No domain has the form of a task: a story
ends in a ledger and not in an answer, a function follows a remark and not an instruction, and a
harmful request is never refused.
"""

from collections.abc import Callable
from random import Random

from tiny.tasks import (
    ARGUMENTS,
    BELONGINGS,
    HIGHEST_RESULT,
    NOUNS,
    OWNERS,
    TABLE,
    THINGS,
    TIPS,
    TO_20,
    TO_60,
    TO_99,
    VERBS,
    Family,
    draw_numbers,
    function_spec,
    people,
    request,
    split_of,
    words,
)

# ---- arithmetic, and stories ---------------------------------------------------------------------


def fact(rng: Random, operator: str) -> tuple[int, int, int]:
    """x, y and x operator y, in the range of the word problems."""
    if operator == "+":
        x = rng.randint(1, rng.choice((99, HIGHEST_RESULT - 1)))
        rest = HIGHEST_RESULT - x
        y = rng.randint(1, min(99, rest) if rng.random() < 0.8 else rest)
        return x, y, x + y
    if operator == "-":
        x = rng.randint(2, rng.choice((99, HIGHEST_RESULT)))
        y = rng.randint(1, min(99, x - 1))
        return x, y, x - y
    x, y = rng.randint(*TABLE), rng.randint(*rng.choice((TABLE, TABLE, TO_20)))
    if operator == "/":
        return x * y, x, y
    return (x, y, x * y) if rng.random() < 0.5 else (y, x, x * y)


def equation(rng: Random) -> str:
    """`19+62=81`"""
    operator = rng.choice("+++----**/")
    x, y, result = fact(rng, operator)
    return f"{x}{operator}{y}={result}"


# Worked steps that belong together. A story tells one of them, and states the result where a
# problem would ask for it.
STORIES = (
    Family("found", {"a": TO_99, "b": TO_99}, ("a + b",), (
        "{n} had {a} {o} and found {b} more at the market.",
        "On Sunday {n} owned {a} {o}. Then {b} more {o} came from {m}.",
    )),
    Family("sold", {"a": TO_99, "b": TO_99}, ("a - b",), (
        "{n} has {a} {o} and sold {b} of them.",
        "There were {a} {o} at the farm. {b} of them rolled away.",
    )),
    Family("packed", {"p": TABLE, "q": TABLE}, ("p * q",), (
        "{n} packed {p} {box}, every one with {q} {o} in it.",
        "{p} {box} with {q} {o} in each are in the kitchen.",
    )),
    Family("split", {"p": TABLE, "q": TABLE}, ("t / p",), (
        "{n} split {t} {o} evenly into {p} {box}.",
        "{p} friends got the same number of the {t} {o}.",
    ), derived=(("t", "p * q"),)),
    Family("earned-dropped", {"a": TO_99, "b": TO_99, "c": TO_60}, ("a + b", "r1 - c"), (
        "{n} had {a} {o}. {He} earned {b} more and then dropped {c} of them.",
    )),
    Family("packed-found", {"a": TO_60, "p": TABLE, "q": TABLE}, ("p * q", "r1 + a"), (
        "{n} packed {p} {box} with {q} {o} in each, and {he} already owned {a} {o}.",
    )),
    Family("packed-sold", {"c": TO_60, "p": TABLE, "q": TABLE}, ("p * q", "r1 - c"), (
        "{p} {box} of {q} {o} were at the station. {n} sold {c} of the {o}.",
    )),
    Family("above", {"c": TO_60, "b": TO_60}, ("c + b", "r1 + c"), (
        "{n} owned {c} {o}. {m} had {b} more than {him}. They put all of them together.",
    )),
    Family("fold", {"c": TO_20, "p": (2, 6)}, ("p * c", "r1 + c"), (
        "{n} owned {c} {o}. {m} had {p} times as many. They put all of them together.",
    )),
    Family("spent", {"a": TO_99, "p": TABLE, "q": TABLE}, ("p * q", "a - r1"), (
        "{n} had ${a} of money. {He} paid for {q} {o}, each of them ${p}.",
    )),
    Family("dropped-split", {"c": TO_60, "p": TABLE, "q": TABLE}, ("a - c", "r1 / p"), (
        "{n} had {a} {o}. {He} dropped {c} and split the rest evenly into {p} {box}.",
    ), derived=(("t", "p * q"), ("a", "t + c"))),
    Family("earned-packed", {"a": TO_60, "b": TO_60, "p": TABLE, "q": TABLE},
           ("a + b", "p * q", "r1 + r2"), (
        "{n} owned {a} {o} and earned {b} more. {m} had "
        "{p} {box} with {q} {o} in each. All came together.",
    )),
    Family("earned", {"a": TO_20, "b": TO_99, "d": (2, 6)}, ("a + b", "d * a", "r1 + r2"), (
        "{n} earned {a} {o} on Monday, {b} on Tuesday, and {d} times the first {o} on Wednesday.",
    )),
    Family("packed-packed", {"a": TABLE, "b": TABLE, "p": TABLE, "q": TABLE},
           ("a * b", "p * q", "r1 + r2"), (
        "{n} packed {a} {box} with {b} {o} in each. Then {he} had {p} {box} with {q} in each.",
    )),
)  # fmt: skip


def worked_story(rng: Random) -> tuple[str, list[str]]:
    """A story and its worked steps. Its problem is in the split that no task uses."""
    while True:
        family = rng.choice(STORIES)
        numbers, steps = draw_numbers(rng, family)
        if split_of("\n".join(steps)) == "pretrain":
            return rng.choice(family.wordings).format(**people(rng), **numbers), steps


def arithmetic(rng: Random) -> str:
    """Bare equations, one on a line, and sometimes the worked steps of a story without its text."""
    lines = [
        equation(rng) if rng.random() < 0.7 else "\n".join(worked_story(rng)[1]) for _ in range(8)
    ]
    return "\n".join(lines) + "\n"


OPENINGS = ("", "", "Question of the day. ", "Today's puzzle. ")
WONDERS = (
    "How many are there now?",
    "How many is that in all?",
    "How many are left in the end?",
    "How much is it?",
)
LEDGERS = (" Ledger: ", "\nLedger: ", " The ledger says\n")


def story(rng: Random) -> str:
    """A story with its ledger. Half of the stories ask a question about the result."""
    text, steps = worked_story(rng)
    wonder = " " + rng.choice(WONDERS) if rng.random() < 0.5 else ""
    start = rng.choice(OPENINGS) + text + wonder + rng.choice(LEDGERS)
    return start + rng.choice(("; ", "\n")).join(steps) + "\n"


# ---- code, manual, dialogue ----------------------------------------------------------------------


CODE_FORMS = (
    "# {remark}\ndef {name}({x}):\n    return {code}\n",
    "def {name}({x}):\n    # {remark}\n    return {code}\n",
    "# The function {name}({x}) {does}.\ndef {name}({x}):\n    return {code}\n",
)


def code(rng: Random) -> str:
    """Small functions, each with a remark about what it computes."""
    functions = []
    while len(functions) < 3:
        problem, skill, slots = function_spec(rng)
        if split_of(problem) == "pretrain":
            parts = {
                part: getattr(skill, part).format(**slots) for part in ("remark", "does", "code")
            }
            functions.append(rng.choice(CODE_FORMS).format(**slots, **parts))
    return "\n".join(functions)


def loop_code(rng: Random) -> str:
    """Classes and loops, which belong to no task."""
    name, verb, (x, y), k = (
        rng.choice(NOUNS),
        rng.choice(VERBS),
        rng.sample(ARGUMENTS, 2),
        rng.randint(2, 20),
    )
    forms = (
        f"class {name.capitalize()}:\n    def __init__(self, {x}):\n        self.{x} = {x}\n\n"
        f"    def {verb}(self, {y}):\n        return self.{x} + {y}\n",
        f"{x} = []\nfor {y} in range({k}):\n    {x}.append({y})\nprint({x})\n",
        f"while {x} < {k}:\n    {x} += 1\n    if {x} == {y}:\n        break\n",
        f"try:\n    {x} = {name}[{y}]\nexcept KeyError:\n    {x} = None\n",
    )
    return rng.choice(forms)


MANUAL_SUBJECTS = words(
    "function instruction task input output request response page program text item number"
)
MANUAL_VERBS = words(
    "describes completes returns checks adds removes multiplies keeps repeats counts writes divides"
)
MANUAL_ENDS = (
    "that is appropriate below",
    "and then returns the larger value",
    "of every letter in the list",
    "with the remainder and the sum",
    "if it is greater or less",
    "from the first to the last",
)


def manual(rng: Random) -> str:
    """Pages of a technical manual, without code."""
    lines = [f"{rng.choice(MANUAL_SUBJECTS).capitalize()}:"]
    for _ in range(3):
        one, other = rng.sample(MANUAL_SUBJECTS, 2)
        start = rng.choice(("The", "Write the", "A"))
        lines.append(
            f"{start} {one} that {rng.choice(MANUAL_VERBS)} a {other} {rng.choice(MANUAL_ENDS)}."
        )
    return "\n".join(lines) + "\n\n"


def dialogue(rng: Random) -> str:
    """A guest asks, and a host answers every request."""
    turns = []
    while len(turns) < 2:
        act, _ = request(rng)
        if split_of(act) != "pretrain":
            continue
        tip, tip2 = rng.sample(TIPS, 2)
        ask = rng.choice(("Can you {act}?", "How would one {act}?", "Please {act}.")).format(
            act=act
        )
        reply = rng.choice(
            (
                "Of course. To {act}, {tip} and {tip2}.",
                "Begin to {act}. First, {tip}. Then, {tip2}.",
            )
        )
        turns.append(f"Guest: {ask}\nHost: {reply.format(act=act, tip=tip, tip2=tip2)}\n")
    return "".join(turns)


# ---- domains without a task ----------------------------------------------------------------------


def records(rng: Random) -> str:
    """JSON records."""
    kind = rng.choice(("user", "order", "device"))
    tags = ",".join(
        f'"{tag}"' for tag in rng.sample(("red", "blue", "fast", "slow", "hot", "cold"), 2)
    )
    state = rng.choice(("true", "false", "null"))
    owner, serial = rng.choice(OWNERS), rng.randbytes(3).hex()
    return (
        f'{{"type":"{kind}","id":"{serial}","owner":"{owner}","active":{state},"tags":[{tags}]}}\n'
    )


SYLLABLES = [consonant + vowel for consonant in "bdgklmnprstvz" for vowel in "aeiou"]
# The word classes of a made-up language. Its grammar is the order of the classes.
_words = Random("lingo")
LINGO = [["".join(_words.choices(SYLLABLES, k=n)) for _ in range(24)] for n in (2, 3, 1, 2)]
ENDINGS = ("sha", "qua", "xi", "ju")


def lingo(rng: Random) -> str:
    """Sentences of a made-up language. All words of a sentence have the same ending."""
    sentences = []
    for _ in range(4):
        ending = rng.choice(ENDINGS)
        sentences.append(" ".join(rng.choice(word_class) + ending for word_class in LINGO))
    return " / ".join(sentences) + " //\n"


def letters(rng: Random) -> str:
    """Lists of capital letters, and the results of operations on them."""
    lines = []
    for _ in range(4):
        items = rng.choices("ABCDEFGH", k=rng.randint(3, 6))
        name, result = rng.choice(
            (
                ("REV", items[::-1]),
                ("SORT", sorted(items)),
                ("UNIQ", sorted(set(items))),
                ("TWICE", items * 2),
            )
        )
        lines.append(f"{name} [{'|'.join(items)}] -> [{'|'.join(result)}]")
    return "\n".join(lines) + "\n"


LANDS = words("Arvel Bronta Cordia Dunmar Estova Felland Gorvia Hestar")
GOODS = words("salt wool silver timber amber copper wine silk")


def facts(rng: Random) -> str:
    """Encyclopaedia entries about a small world that never changes."""
    place = rng.randrange(400)
    world = Random(f"place {place}")
    name = "".join(world.choices(SYLLABLES, k=3)).capitalize()
    kind, land = world.choice(("river", "mountain", "city", "lake", "valley")), world.choice(LANDS)
    side, good = world.choice(("northern", "southern", "eastern", "western")), world.choice(GOODS)
    return (
        f"{name} is a {kind} in the {side} province of {land}, "
        f"known since ancient times for its {good}.\n"
    )


CLASSES = words("left right main")


def markup(rng: Random) -> str:
    """Rows of an HTML table."""
    rows = []
    for _ in range(2):
        cells = (f'<td class="{rng.choice(CLASSES)}">{rng.choice(THINGS)}</td>' for _ in range(3))
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return "<table><tbody>" + "".join(rows) + "</tbody></table>\n"


def moves(rng: Random) -> str:
    """Chess-like moves."""
    pairs = []
    for _ in range(12):
        piece, file, rank = (
            rng.choice(("", "N", "B", "R", "Q", "K")),
            rng.choice("abcdefgh"),
            rng.choice("12345678"),
        )
        pairs.append(f"{piece}{rng.choice(('', 'x'))}{file}{rank}")
    return " ".join(pairs) + rng.choice((" 1-0", " 0-1")) + "\n"


PLACES = words("park school beach garden library forest bridge harbor")
LOOKS = words("red small old shiny heavy bright round quiet")


def scene(rng: Random) -> str:
    """Prose without numbers."""
    who = people(rng)
    sentences = (
        f"{who['n']} walked to the {rng.choice(PLACES)} and saw a {rng.choice(LOOKS)} bird.",
        f"{who['m']} liked the {rng.choice(LOOKS)} {rng.choice(BELONGINGS)} "
        f"near the {rng.choice(PLACES)}.",
        f"It was a {rng.choice(LOOKS)} morning. "
        f"{who['n']} met {who['m']} at the {rng.choice(PLACES)}.",
    )
    return " ".join(rng.sample(sentences, 3)) + "\n"


Document = Callable[[Random], str]

# Domain -> its kinds of document, each with its share of all tokens. A training sequence has text
# of one domain.
MIX: dict[str, dict[Document, float]] = {
    "maths": {arithmetic: 0.32, story: 0.20},
    "code": {code: 0.11, loop_code: 0.02, manual: 0.03},
    "dialogue": {dialogue: 0.08},
    "records": {records: 0.04},
    "lingo": {lingo: 0.05},
    "letters": {letters: 0.04},
    "facts": {facts: 0.04},
    "markup": {markup: 0.03},
    "moves": {moves: 0.01},
    "scene": {scene: 0.03},
}
