"""Holds the task: a problem depends only on its number, answers are judged exactly, GSM8K lines are read likewise."""

import json
from decimal import Decimal
from random import Random

import pytest
from opd.task import (
    CONFUSED,
    OTHER_TABLE,
    TABLE,
    Cipher,
    JsonLines,
    WordProblems,
    extract_answer,
    reward,
    slip,
    write_sum,
)

GSM8K = [
    {"question": "Two dozen eggs, half of them break?", "answer": "2*12 = <<2*12=24>>24.\nHalf is 12.\n#### 12"},
    {"question": "A house costs 1,250,000 dollars ...?", "answer": "It is given.\n#### 1,250,000"},
    {"question": "Below zero?", "answer": "3 - 10 = -7\n#### -7"},
    {"question": "Half a dollar?", "answer": "#### $0.50"},
]


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, GSM8K)) + "\n\n")
    return path


def test_solutions_are_right_and_steps_follow_from_the_question():
    problems = WordProblems(seed=3, held_out=False)
    for i in range(500):
        problem = problems[i]
        assert reward(problem.solution, problem) == 1.0
        total = 0
        for line in problem.solution.split(";")[:-1]:
            sum_, result = line.split("=")
            total = eval(sum_)  # digits and one sign, written by the code under test
            assert total == int(result)
        assert total == problem.answer


def test_a_problem_is_a_function_of_seed_and_number():
    one, same, other = (WordProblems(seed=s, held_out=False) for s in (1, 1, 2))
    assert [one[i] for i in (5, 0, 9)] == [same[i] for i in (5, 0, 9)]
    assert one[0] != other[0]


@pytest.mark.parametrize("source", [WordProblems, Cipher])
def test_held_out_questions_are_never_trained_on(source):
    train = {source(seed=1, held_out=False)[i].prompt for i in range(3000)}
    held_out = {source(seed=1, held_out=True)[i].prompt for i in range(3000)}
    assert not train & held_out


def test_a_message_is_read_through_the_table_digit_by_digit():
    messages = Cipher(seed=3, held_out=False)
    for problem in (messages[i] for i in range(200)):
        assert len(problem.prompt) == 8
        letters, digit = problem.prompt.rstrip(".="), 0
        for letter, found in zip(letters, problem.answer, strict=True):
            digit = TABLE[digit]["abcdef".index(letter)]
            assert str(digit) == found
        assert problem.solution == problem.answer
        assert reward(problem.answer, problem) == 1.0
        assert reward(problem.answer[:-1], problem) == reward(problem.answer + "0", problem) == 0.0


def facts(writer: str) -> dict[tuple[int, int], list[int]]:
    """The digits that a writer gave for each pair of the digit before and the letter."""
    found: dict[tuple[int, int], list[int]] = {}
    messages = Cipher(seed=4, held_out=False, writer=writer)
    for problem in (messages[i] for i in range(2000)):
        before = 0
        for letter, digit in zip(problem.prompt, map(int, problem.solution), strict=False):
            found.setdefault((before, "abcdef".index(letter)), []).append(digit)
            before = digit
    return found


def test_a_confused_writer_is_wrong_about_six_facts_and_a_beginner_knows_another_table():
    assert all(TABLE[digit][letter] != wrong for (digit, letter), wrong in CONFUSED.items())
    confused = {fact: max(set(digits), key=digits.count) for fact, digits in facts("confused").items()}
    assert confused == {(d, x): CONFUSED.get((d, x), TABLE[d][x]) for d in range(6) for x in range(6)}
    beginner = {fact: max(set(digits), key=digits.count) for fact, digits in facts("beginner").items()}
    assert beginner == {(d, x): OTHER_TABLE[d][x] for d in range(6) for x in range(6)}
    assert sum(TABLE[d][x] != OTHER_TABLE[d][x] for d in range(6) for x in range(6)) > 24


def test_a_slip_replaces_one_digit_and_reaches_every_other():
    rng = Random(0)
    assert {slip(53, rng) for _ in range(500)} == {n for n in range(100) if (n // 10 == 5) != (n % 10 == 3)}
    assert {slip(7, rng) for _ in range(200)} == set(range(10)) - {7}
    assert write_sum(53, "+", 38, rng, error_rate=0.0) == ("53+38=91", 91)
    line, wrong = write_sum(53, "-", 38, rng, error_rate=1.0)
    assert line == f"53-38={wrong}" != "53-38=15"


def test_a_careless_solution_carries_its_slips_on():
    careless = WordProblems(seed=3, held_out=False, error_rate=0.5)
    wrong = 0
    for problem in (careless[i] for i in range(200)):
        first, second, last = problem.solution.split(";")
        assert second.startswith(first.split("=")[1])
        assert last == "#" + second.split("=")[1]
        wrong += sum(abs(eval(sum_)) != int(result) for sum_, result in (x.split("=") for x in (first, second)))
    assert 160 <= wrong <= 240  # 400 sums, half of them slips: mean 200, standard deviation 10


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("53+33=86;86+13=99;#99", "99"),
        ("so it is 4.\n#### 4", "4"),
        ("#### 1,250,000 dollars", "1250000"),
        ("#### $18.00", "18"),
        ("#### -7", "-7"),
        (r"thus \boxed{42}.", "42"),
        ("#### 3, no: #### 5", "5"),
    ],
)
def test_answers_that_are_read(text, answer):
    assert extract_answer(text) == Decimal(answer)


@pytest.mark.parametrize("text", ["", "99", "#", "#### none", "####", "#-", "# ,"])
def test_texts_without_an_answer(text):
    assert extract_answer(text) is None


def test_gsm8k_lines_are_read_and_judged_like_the_word_problems(gsm8k):
    problems = JsonLines(gsm8k, seed=0, shuffle=False)
    assert len(problems) == 4
    assert [problems[i].answer for i in range(4)] == [Decimal(x) for x in ("12", "1250000", "-7", "0.50")]
    assert all(reward(problems[i].solution, problems[i]) == 1.0 for i in range(4))
    assert reward("#### 12.0", problems[0]) == 1.0
    assert reward("#### 13", problems[0]) == 0.0


def test_every_epoch_is_a_permutation_and_positions_are_stable(gsm8k):
    problems = JsonLines(gsm8k, seed=0)
    epochs = [[problems[4 * epoch + i].prompt for i in range(4)] for epoch in range(20)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert problems[37] == JsonLines(gsm8k, seed=0)[37]


@pytest.mark.parametrize("line", ["{", "[]", '{"question": "q"}', '{"question": "q", "answer": "no number"}'])
def test_a_bad_line_is_named(gsm8k, line):
    gsm8k.write_text(json.dumps(GSM8K[0]) + "\n" + line)
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl:2: "):
        JsonLines(gsm8k, seed=0)
