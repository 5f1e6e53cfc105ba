"""What the student is asked and how an answer is judged: a cipher, word problems, or JSON lines in GSM8K's format.

A source of problems is addressed by position, so that "where was I in the data" is one integer in a checkpoint.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

NAMES = ("tom", "ann", "sam", "lea", "max", "eva", "kim")
THINGS = ("cards", "coins", "pens", "shells", "stamps", "apples", "books", "stones")
GAINS = ("finds", "wins", "gets", "buys")
LOSSES = ("loses", "gives", "sells", "drops")
WORDS = (*NAMES, *THINGS, *GAINS, *LOSSES, "has", "then", "how", "many")
SYMBOLS = tuple("0123456789+-=;#.?")

ANSWER = re.compile(r"(?:#+|\\boxed\{)\s*\$?(-?[\d,]*\.?\d+)")


@dataclass(frozen=True)
class Problem:
    """A question, a text to learn from, and what counts as right: a number, or the whole text of the response."""

    prompt: str
    solution: str
    answer: Decimal | str


def extract_answer(text: str) -> Decimal | None:
    r"""The last number after `#`, `####` or `\boxed{` in `text`, or None."""
    found = ANSWER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def reward(response: str, problem: Problem) -> float:
    """1.0 where the response is right, or ends in the right number, else 0.0: exact, no partial credit."""
    found = response if isinstance(problem.answer, str) else extract_answer(response)
    return float(found == problem.answer)


LETTERS, DIGITS, PAD = "abcdef", "012345", "."
Table = tuple[tuple[int, ...], ...]


def draw_table(seed: str) -> Table:
    """A digit for every pair of a digit and a letter, at random."""
    rng = random.Random(seed)
    return tuple(tuple(rng.randrange(len(DIGITS)) for _ in LETTERS) for _ in DIGITS)


TABLE, OTHER_TABLE = draw_table("key"), draw_table("another key")
# Six of the 36 entries of `TABLE`, and the wrong digit that a confused writer takes for each.
CONFUSED = {(0, 3): 1, (1, 0): 5, (2, 5): 0, (3, 1): 5, (4, 4): 2, (5, 2): 3}


class Cipher:
    """An endless source of messages in an autokey cipher: 36 facts, which nobody can guess.

    "bfacd..=" -> "30514": a digit is TABLE[digit before][letter], and 0 stands before the first. A wrong digit spoils
    those after it. Problem i is a function of (seed, i) alone. A tenth of all messages, chosen by a hash, is held out.

    `writer` is who wrote `solution`, the text to learn from:
        "exact" knows the table.
        "confused" takes 6 facts for others, in 7 of 10 times, and guesses one digit in 50.
        "beginner" looks at the right places, but knows another table, and guesses 6 digits of 10.
    """

    def __init__(self, *, seed: int, held_out: bool, writer: str = "exact"):
        self.seed, self.held_out, self.writer = seed, held_out, writer

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed}/{index}")
        while True:
            message = "".join(rng.choice(LETTERS) for _ in range(rng.randint(5, 7)))
            if (zlib.crc32(message.encode()) % 10 == 0) == self.held_out:
                break
        right = "".join(self._write(message, "exact", rng))
        return Problem(f"{message:{PAD}<7}=", "".join(self._write(message, self.writer, rng)), right)

    @staticmethod
    def _write(message: str, writer: str, rng: random.Random) -> Iterator[str]:
        digit = 0
        for letter in map(LETTERS.index, message):
            before, digit = digit, (OTHER_TABLE if writer == "beginner" else TABLE)[digit][letter]
            if writer == "confused" and (before, letter) in CONFUSED and rng.random() < 0.7:
                digit = CONFUSED[before, letter]
            if rng.random() < {"exact": 0.0, "confused": 0.02, "beginner": 0.6}[writer]:
                digit = rng.randrange(len(DIGITS))
            yield DIGITS[digit]


class WordProblems:
    """An endless source of two-step sums and differences below one hundred.

    "tom has 53 cards . then finds 33 . then finds 13 . how many cards ?" -> "53+33=86;86+13=99;#99".
    Problem i is a function of (seed, i) alone. A tenth of all problems, chosen by a hash of the question, is held out.
    """

    def __init__(self, *, seed: int, held_out: bool, steps: int = 2, error_rate: float = 0.0):
        self.seed, self.held_out, self.steps, self.error_rate = seed, held_out, steps, error_rate

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed}/{index}")
        while True:
            problem = self._draw(rng)
            if (zlib.crc32(problem.prompt.encode()) % 10 == 0) == self.held_out:
                return problem

    def _draw(self, rng: random.Random) -> Problem:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        start = total = written = rng.randint(10, 99)
        story, sums = [f"{name} has {start} {thing} ."], []
        for _ in range(self.steps):
            target = rng.randint(10, 99)
            while target == total:
                target = rng.randint(10, 99)
            verb, sign = (rng.choice(GAINS), "+") if target > total else (rng.choice(LOSSES), "-")
            amount = abs(target - total)
            story.append(f"then {verb} {amount} .")
            line, written = write_sum(written, sign, amount, rng, error_rate=self.error_rate)
            sums.append(line)
            total = target
        story.append(f"how many {thing} ?")
        return Problem(" ".join(story), ";".join([*sums, f"#{written}"]), Decimal(total))


def write_sum(left: int, sign: str, right: int, rng: random.Random, *, error_rate: float) -> tuple[str, int]:
    """`53+38=91` and 91; with probability `error_rate` a slip, as a careless student makes it: `53+38=97` and 97."""
    result = abs(left + right if sign == "+" else left - right)
    if rng.random() < error_rate:
        result = slip(result, rng)
    return f"{left}{sign}{right}={result}", result


def slip(number: int, rng: random.Random) -> int:
    """`number` with one of its digits replaced by another, all of them equally likely."""
    digits = list(str(number))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([digit for digit in "0123456789" if digit != digits[place]])
    return int("".join(digits))


class JsonLines:
    """Problems from lines of `{"question": ..., "answer": "... #### 42"}`, GSM8K's own format, shuffled every epoch."""

    def __init__(self, path: str | Path, *, seed: int, shuffle: bool = True):
        self.path, self.seed, self.shuffle = Path(path), seed, shuffle
        with self.path.open(encoding="utf-8") as file:
            self.problems = [self._read(number, line) for number, line in enumerate(file, 1) if line.strip()]
        if not self.problems:
            raise ValueError(f"{path} holds no problems")

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        epoch, position = divmod(index, len(self.problems))
        if not self.shuffle:
            return self.problems[position]
        order = list(range(len(self.problems)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return self.problems[order[position]]

    def _read(self, number: int, line: str) -> Problem:
        try:
            row = json.loads(line)
            question, solution = row["question"], row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            expected = '{"question": ..., "answer": ...}'
            raise ValueError(f"{self.path}:{number}: expected {expected}, got {line[:80]!r}") from error
        answer = extract_answer(solution)
        if answer is None:
            raise ValueError(f"{self.path}:{number}: no number after '####' in the answer {solution[-80:]!r}")
        return Problem(question, solution, answer)
