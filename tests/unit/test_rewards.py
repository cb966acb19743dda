"""The reward's table of cases, each decided by hand, and what it must survive."""

import logging
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.evaluation import answers
from cs336_alignment.evaluation.answers import MAX_CHARS, MAX_SECONDS, answers_equal
from cs336_alignment.evaluation.rewards import REWARDS, extract_answer, r1_zero_reward

BOUND_SECONDS = 4.0  # what one call may take here: MAX_SECONDS on a machine that is doing more

# (answer, ground truth)
EQUAL = [
    # integers
    ("72", "72"),
    (" 72\n", "72"),
    ("72.", "72"),
    ("072", "72"),
    ("+72", "72"),
    ("-3", "−3"),
    ("(72)", "72"),
    ("**72**", "72"),
    ("$72$", "72"),
    ("\\(72\\)", "72"),
    ("\\[72\\]", "72"),
    ("\\boxed{72}", "72"),
    ("$\\boxed{72}$.", "72"),
    ("\\boxed{\\boxed{72}}", "72"),
    ("72", "\\boxed{72}"),
    ("{72}", "72"),
    # decimals and scientific notation
    ("72.0", "72"),
    ("72.50", "72.5"),
    (".5", "0.5"),
    ("1.5e3", "1500"),
    ("1.5 \\times 10^3", "1500"),
    ("1.5*10^{-3}", "0.0015"),
    ("0.1", "1/10"),
    # thousands separators
    ("1,200", "1200"),
    ("1,234,567.80", "1234567.8"),
    ("10{,}000", "10000"),
    ("10,\\!000", "10000"),
    ("10\\,000", "10000"),
    ("10 000", "10000"),
    # currency
    ("$72", "72"),
    ("\\$72", "72"),
    ("$72.00", "72"),
    ("72 dollars", "72"),
    ("72 dollars", "$72"),
    ("USD 72", "$72"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("$1,200", "1200"),
    ("€5", "5 euros"),
    # units: they count only if both sides have one
    ("72 clips", "72"),
    ("72", "72 clips"),
    ("72 clips", "72 clip"),
    ("5km", "5"),
    ("5 m", "5"),
    ("5\\text{ cm}", "5"),
    ("5\\,\\mathrm{cm}", "5 cm"),
    ("12 cm^2", "12"),
    ("12 cm²", "12\\text{ cm}^2"),
    ("60 miles per hour", "60"),
    ("60 miles/hour", "60"),
    ("90^\\circ", "90"),
    ("90°", "90 degrees"),
    ("$72$ clips", "72"),
    ("2\\sqrt{3} cm", "2\\sqrt{3}"),
    ("36\\pi square inches", "36\\pi"),
    ("1/2 cup", "0.5"),
    ("5 more", "5"),
    # percent: beside a bare number either the same figure or the proportion
    ("72%", "72"),
    ("72", "72%"),
    ("72\\%", "72 percent"),
    ("0.72", "72%"),
    ("50%", "1/2"),
    # fractions
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    ("1 / 2", "\\frac{1}{2}"),
    ("\\frac12", "1/2"),
    ("\\dfrac{1}{2}", "\\tfrac{1}{2}"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("1 1/2", "3/2"),
    ("1\\frac{1}{2}", "1.5"),
    ("-1\\frac{1}{2}", "-1.5"),
    ("½", "1/2"),
    ("3½", "3.5"),
    # formulas
    ("4x+10", "10+4x"),
    ("4*x + 10", "4x+10"),
    ("(x+1)(x-1)", "x^2-1"),
    ("(x+y)^3", "x^3+3x^2y+3xy^2+y^3"),
    ("2(x+5)", "2x+10"),
    ("x**2", "x^2"),
    ("2*sqrt(3)", "2\\sqrt{3}"),
    ("√12", "2\\sqrt{3}"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
    ("2pi", "2\\pi"),
    ("2π", "\\pi \\cdot 2"),
    ("0.5x", "\\frac{x}{2}"),
    ("2^{10}", "1024"),
    ("3+4", "7"),
    ("5!", "120"),
    ("x^10", "x^{10}"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("y = 2x + 1", "2x+1"),
    ("y=2x", "2x-y=0"),
    ("x > 2", "2 < x"),
    ("x <= 3", "x \\leq 3"),
    ("\\sin(x)", "sin(x)"),
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "\\begin{pmatrix}1&2\\\\3&\\frac{8}{2}\\end{pmatrix}",
    ),
    ("\\infty", "∞"),
    # tuples and intervals keep their order, lists and sets do not
    ("(1,2)", "(1, 2)"),
    ("\\left(\\frac{1}{2}, 2\\right)", "(0.5,2)"),
    ("(0, 1]", "(0,1.0]"),
    ("(-\\infty, 2)", "(-∞,2)"),
    ("[1,2) \\cup (3,4]", "(3,4]∪[1,2)"),
    ("{2, 1}", "\\{1,2\\}"),
    ("1, 2", "2,1"),
    ("12 or 15", "15 or 12"),
    ("12 and 15", "12, 15"),
    ("$1$ and $2$", "1,2"),
    ("1, 2, and 3", "3,2,1"),
    ("x=2 or x=3", "2, 3"),
    ("3 \\pm \\sqrt{2}", "3 ± √2"),
    ("1,234, 5", "5, 1234"),
    ("\\{5\\}", "\\{5.0\\}"),
    ("\\{\\}", "\\emptyset"),
    # text
    ("Monday", "monday"),
    ("\\text{Monday}", "Monday"),
    ("Monday.", "Monday"),
    ("(A)", "A"),
    ("\\textbf{B}", "b"),
    ("3:30 pm", "3:30 PM"),
    ("Yes", "yes"),
]

UNEQUAL = [
    ("", "72"),
    ("", ""),
    ("   ", "72"),
    ("$$", "$$$"),
    ("73", "72"),
    ("-72", "72"),
    ("7 2", "72"),
    ("172", "72"),
    ("5 5", "10"),  # math-verify adds neighbours
    ("72 or 73", "72"),
    ("12 or 15", "12"),
    ("12", "12 or 15"),
    ("about 72", "72"),
    ("not 72", "72"),
    ("72 is wrong", "72"),
    ("seventy-two", "72"),  # numbers in words are not read
    # decimals are exact
    ("0.333", "1/3"),
    ("0.3333333333333333", "1/3"),
    ("1.4142135", "\\sqrt{2}"),
    ("3.14159265", "\\pi"),
    ("72.0000001", "72"),
    ("1,234", "1.234"),
    ("1,23", "123"),
    ("(1,234)", "1234"),
    ("1e3", "100"),
    # units and money
    ("5 apples", "6 apples"),
    ("5 apples", "5 oranges"),
    ("5 km", "5 m"),
    ("$5", "€5"),
    ("50 cents", "$50"),
    ("$5 and $6", "5"),
    ("$5 million", "5"),
    ("5 and a half", "5"),
    ("5 halves", "5"),
    ("5 to 7", "5"),
    ("5 or more", "5"),
    ("5 of 7", "5"),
    ("3/4 of 8", "3/4"),
    ("2 1/2", "21/2"),
    ("73%", "72"),
    ("7.2", "72%"),
    ("72", "0.72"),
    # variables are not units
    ("4x+10", "4"),
    ("4", "4x+10"),
    ("4x", "4"),
    ("5m", "5"),
    ("5 x", "5"),
    ("2xy", "2"),
    ("2\\pi h", "2\\pi"),
    ("2\\pi r", "2\\pi"),
    ("5i", "5"),
    # formulas
    ("4x+10", "4x-10"),
    ("x-1", "1-x"),
    ("x^10", "0"),
    ("x^2", "x2"),
    ("2+3=6", "6"),
    ("2+3=5", "6"),
    ("x=5", "y=5"),
    ("x = 5", "6"),
    ("\\sqrt{a}-77!", "\\sqrt{a}-77!+3"),
    ("x > 2", "x < 2"),
    ("x > 2", "x \\ge 2"),
    ("x > 2", "2"),
    ("5!", "5"),
    ("1/0", "2/0"),
    ("1/0", "\\infty"),
    ("-\\infty", "\\infty"),
    ("\\sqrt{2}", "2"),
    ("\\Delta", "\\delta"),
    # tuples, intervals, sets
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(0,1]", "(0,1)"),
    ("(1,2)", "1,2"),
    ("(1,2)", "(1,2,3)"),
    ("(1,2)", "1"),
    ("1,2", "1"),
    ("1,1,2", "1,2,2"),
    ("1,2", "1,3"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("(1,2)\\cup(3,4)", "(1,2)"),
    ("(12,15)", "1215"),
    # text: an anagram is the same product of letters to a formula parser
    ("Monday", "Tuesday"),
    ("listen", "silent"),
    ("no", "on"),
    ("A", "B"),
    ("x", "y"),
    ("AB", "BA"),
    ("12/10/2023", "10/12/2023"),
    ("3:30", "3:3"),
    ("\\text{Monday}", "Tuesday"),
]


@pytest.mark.parametrize(("answer", "truth"), EQUAL)
def test_equal(answer: str, truth: str) -> None:
    assert answers_equal(answer, truth)
    assert answers_equal(truth, answer)


@pytest.mark.parametrize(("answer", "truth"), UNEQUAL)
def test_unequal(answer: str, truth: str) -> None:
    assert not answers_equal(answer, truth)
    assert not answers_equal(truth, answer)


GOOD = "3 + 4 is 7. </think> <answer> 7 </answer>"

# (response, extracted answer, format, answer reward for the ground truth "7")
FORMATS = [
    (GOOD, "7", 1, 1),
    ("</think> <answer>7</answer>", "7", 1, 1),
    ("<think> a </think> <answer>$7.00</answer> and more text", "$7.00", 1, 1),
    ("</think> <answer>\n7\n</answer>", "7", 1, 1),
    ("</think> <answer>8</answer>", "8", 1, 0),
    ("</think> <answer></answer>", "", 1, 0),
    ("</think> <answer>x = 6 + 1 = 8</answer>", "x = 6 + 1 = 8", 1, 0),
    # the tags exactly: one space, in this order, this spelling
    ("</think><answer>7</answer>", None, 0, 0),
    ("</think>  <answer>7</answer>", None, 0, 0),
    ("</think>\n<answer>7</answer>", None, 0, 0),
    ("</think> <Answer>7</Answer>", None, 0, 0),
    ("</think> <answer>7", None, 0, 0),
    ("<answer>7</answer>", None, 0, 0),
    ("7", None, 0, 0),
    ("", None, 0, 0),
    ("<answer>7</answer> so I thought </think>", None, 0, 0),
    ("<answer>7</answer> </think> <answer>", None, 0, 0),
    ("</answer> </think> <answer>7", None, 0, 0),
    # an answer within the thinking does not count
    ("maybe <answer>7</answer> no </think> <answer>8</answer>", "8", 1, 0),
    ("maybe <answer>8</answer> no </think> <answer>7</answer>", "7", 1, 1),
    # twice: the last counts, and an unclosed last one is no answer
    ("</think> <answer>7</answer> <answer>8</answer>", "8", 1, 0),
    ("</think> <answer>8</answer> </think> <answer>7</answer>", "7", 1, 1),
    ("</think> <answer>7</answer> <answer>8", None, 1, 0),
    # nested: the innermost, up to the first closing tag
    ("</think> <answer><answer>7</answer></answer>", "7", 1, 1),
    ("</think> <answer>8 <answer>7</answer> 9</answer>", "7", 1, 1),
    ("</think> <answer>7</answer> or 8</answer>", "7", 1, 1),
    ("</think> <answer>7 or 8</answer>", "7 or 8", 1, 0),
]


@pytest.mark.parametrize(("response", "answer", "format_reward", "answer_reward"), FORMATS)
def test_format(response: str, answer: str | None, format_reward: int, answer_reward: int) -> None:
    assert extract_answer(response) == answer
    rewards = r1_zero_reward(response, "7")
    assert rewards == {
        "reward": answer_reward,
        "format_reward": format_reward,
        "answer_reward": answer_reward,
    }
    assert all(type(value) is float for value in rewards.values())


def test_registry_has_r1_zero() -> None:
    assert REWARDS["r1_zero"](GOOD, "7")["reward"] == 1.0


HANGS = [
    "9**9**9**9",
    "10^10^10",
    "10^{10^{10}}",
    "9^{9^9}",
    "(9^{99})^{9999}",
    "((9^{99})^{99})^{99}",
    "10^{999999999}",
    "2^{99*99*99*99}",
    "1e999999999",
    "1.0e999",
    "99999999!",
    "(9!)!",
    "9!!!!",
    "(x+y+z)^{9999}",
    "(x+y+z+1)^{99}",
    "((x+1)^{20}+(y+1)^{20})^{20}",
    "\\sum_{i=1}^{99999999} i^2",
    "\\int_0^1 x^x dx",
    "\\binom{99999999999}{5555555555}",
    "\\log_{2}(99999999999999999989)",
    "\\sin(x)^{8}+\\cos(x)^{8}+\\tan(x)^{8}-\\sin(3x)",
    "+".join(f"\\sqrt{{{n}}}" for n in range(2, 30)),
    "x^5 - x + 1 = y^7",
    "(a+b+c+d)(e+f+g+h)(k+l+m+n)(p+q+r+s)(t+u+v+w)(x+y+z+1)(a+e+k+1)(b+f+l+1)",
    "(" * 100 + "1" + ")" * 100,
    "{" * 140 + "1" + "}" * 140,
    "\\frac{1}{" * 12 + "2" + "}" * 12,
    "\\sqrt" * 50 + "2",
    "-" * 250 + "1",
    "1," * 140,
    "1 " * 140,
    "a b " * 70,
    "5 " + "km " * 90,
    "$" * 300,
    "\\" * 300,
    "9" * 299,
    "9" * 100_000,
    "(" * 100_000,
    "1," * 50_000,
    "\\boxed{" * 20_000,
    "x" * 100_000,
]


def _slowest(answers: list[str]) -> tuple[float, str]:
    slowest = (0.0, "")
    for answer in answers:
        for pair in (
            (answer, "7"),
            ("x+7", answer),
            (answer, answer + "+1"),
            (answer, "\\sqrt{7}"),
        ):
            started = time.process_time()
            answers_equal(*pair)
            slowest = max(slowest, (time.process_time() - started, answer[:60]))
    return slowest


def test_nothing_hangs() -> None:
    """In another process: a hang in C code would not let the test's own timeout through."""
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import test_rewards
        from cs336_alignment.evaluation.answers import answers_equal
        answers_equal("x+1", "1+x")  # the import of sympy is not what is timed
        print(*test_rewards._slowest(test_rewards.HANGS), sep="\\t")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, __file__.rsplit("/", 1)[0]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seconds, answer = done.stdout.rstrip("\n").split("\t", 1)
    assert float(seconds) < BOUND_SECONDS, answer


def test_other_threads_are_guarded_too() -> None:
    """Signals work in the main thread only, so there the patterns alone must hold."""
    results: list[tuple[float, str]] = []
    equal: list[bool] = []

    def work() -> None:
        equal.append(answers_equal("(x+1)(x-1)", "x^2-1"))
        results.append(_slowest(HANGS))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert results, "hangs in a thread"
    assert equal == [True]
    assert results[0][0] < BOUND_SECONDS, results[0][1]


def test_time_limit_stops_a_slow_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(answer: str, truth: str) -> bool:
        while True:
            try:
                sum(range(1000))
            except Exception:  # as sympy does
                continue

    monkeypatch.setattr(answers, "_equal", slow)
    monkeypatch.setattr(answers, "MAX_SECONDS", 0.2)
    started = time.process_time()
    assert not answers_equal("7", "8")
    assert time.process_time() - started < 2


def test_an_alarm_set_by_others_still_rings() -> None:
    rang: list[int] = []
    old_handler = signal.signal(signal.SIGALRM, lambda signum, frame: rang.append(signum))
    old_timer = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        assert answers_equal("(x+1)(x-1)", "x^2-1")
        deadline = time.monotonic() + 5
        while not rang and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        signal.signal(signal.SIGALRM, old_handler)
        signal.setitimer(signal.ITIMER_REAL, *old_timer)
    assert rang == [signal.SIGALRM]


def test_long_answers_are_compared_as_text() -> None:
    long = "7" * (MAX_CHARS + 1)
    assert answers_equal(long + " ", long)
    assert not answers_equal(long + ".0", long)
    assert MAX_SECONDS <= 2


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answers_equal("2x+2", "2(x+1)")
        answers_equal("9**9**9**9", "2(x+1)")
    assert not caplog.records


def test_import_is_light() -> None:
    code = (
        "import sys; import cs336_alignment.evaluation.rewards as r; "
        "assert r.answers_equal('$72.00', '72') and not r.answers_equal('5 apples', '6'); "
        "assert not {'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


MATH_TOKENS = [
    *"0123456789xyabn+-*/^=<>!(){}[],.$%_&| ",
    *("\\frac", "\\sqrt", "\\pi", "\\boxed{", "\\{", "\\}", "\\text{", "\\cup", "\\infty"),
    *("\\left(", "\\right)", "\\\\", "\\pm ", "\\%", "\\sin ", "\\le ", "\\frac{1}{2}", "^{2}"),
    *(" or ", " and ", " cm", "1/2", "1,000"),
]
MATHS = st.lists(st.sampled_from(MATH_TOKENS), max_size=14).map("".join)


@settings(max_examples=150, deadline=None, database=None)
@given(st.one_of(MATHS, st.text(max_size=60)), st.one_of(MATHS, st.text(max_size=20)))
def test_any_text_is_survived(answer: str, truth: str) -> None:
    started = time.process_time()
    assert isinstance(answers_equal(answer, truth), bool)
    assert answers_equal(answer, answer) is bool(answer.strip())
    assert answers_equal(f" {answer}\n", answer) is bool(answer.strip())
    assert time.process_time() - started < 2 * BOUND_SECONDS


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.sampled_from(["</think>", " ", "<answer>", "</answer>", "7", "\n"]), max_size=12)
)
def test_any_tags_are_survived(tokens: list[str]) -> None:
    response = "".join(tokens)
    rewards = r1_zero_reward(response, "7")
    assert rewards["reward"] == rewards["answer_reward"] <= rewards["format_reward"]
    assert rewards["format_reward"] == float(
        "</answer>" in response.partition("</think> <answer>")[2]
    )


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_compared_exactly(a: int, b: int) -> None:
    for spelled in (f"{a}", f"{a:,}", f"{a}.0", f"${a:,}.00", f"\\boxed{{{a}}}", f"{a} apples"):
        assert answers_equal(spelled, str(a))
        assert answers_equal(spelled, str(b)) is (a == b)
