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


# fmt: off
EQUAL += [
    # fractions and mixed numbers
    ("\\frac{3}{4}", "3/4"), ("\\frac{6}{8}", "\\frac{3}{4}"), ("-3/4", "-\\frac{3}{4}"), ("−¾", "-3/4"),
    ("⅓", "1/3"), ("2⅔", "8/3"), ("⅛", "0.125"), ("5⁄8", "5/8"), ("7/1", "7"), ("0/5", "0"),
    ("2 \\frac{3}{4}", "11/4"), ("2\\dfrac{3}{4}", "2.75"), ("3 1/3", "10/3"), ("\\frac{-7}{2}", "-3.5"),
    ("\\frac{7}{-2}", "-3.5"), ("\\frac 1 2", "0.5"), ("\\frac1{2}", "0.5"), ("\\frac{1}2", "0.5"),
    ("\\cfrac{1}{2}", "1/2"), ("{1}/{2}", "1/2"), ("(1)/(2)", "1/2"), ("\\frac{1,000}{4}", "250"),
    ("\\tfrac{3}{2}\\text{ hours}", "1.5"), ("1 / 3", "1/3"),
    # numbers, signs, zeros
    ("0", "0.0"), ("-0", "0"), ("00012", "12"), ("1.", "1"), ("3.140", "3.14"), ("＋5", "5"), ("−5", "-5"),
    ("‑5", "-5"), ("﹣5", "-5"), ("１２", "12"), ("12345678901234567890", "12345678901234567890.0"),
    ("1000000", "1,000,000"),
    # scientific
    ("3 \\times 10^8", "300000000"), ("3.0 × 10^8", "3e8"), ("6.02\\cdot10^{23}", "6.02e23"),
    ("2.5E-3", "0.0025"), ("1e+2", "100"), ("4 × 10⁻³", "0.004"), ("10^{6}", "1,000,000"), ("10^6", "1e6"),
    ("1.2 * 10^5", "120000"),
    # separators
    ("1 234 567", "1234567"), ("1\u00a0234", "1234"), ("1\u202f234", "1234"), ("1\\,234\\,567", "1234567"),
    ("1{,}234{,}567", "1,234,567"), ("12,345,678", "12345678"), ("$1{,}000$", "1000"), ("1'000", "1000"),
    ("1’000", "1000"),
    # money
    ("$3.50", "3.5"), ("\\$3.50", "3.50"), ("3.50 dollars", "$3.5"), ("US$5", "5"), ("£20", "20"),
    ("20 pounds", "£20"), ("5 EUR", "€5"), ("$ 5", "5"), ("$5.", "5"), ("\\text{\\$}5", "5"), ("5\\$", "5"),
    ("-\\$12", "-12"), ("100 USD", "$100"), ("75 cents", "75"), ("75¢", "75 cents"),
    ("$1,234,567.89", "1234567.89"),
    # percent
    ("12.5%", "12.5"), ("12.5\\%", "0.125"), ("100%", "1"), ("1/4", "25%"), ("25 percent", "25%"),
    ("25 per cent", "25%"), ("33\\frac{1}{3}\\%", "33 1/3%"), ("$50\\%$", "50"),
    # degrees and units
    ("45^{\\circ}", "45"), ("45°", "45^\\circ"), ("45 degrees", "45°"), ("30 \\degree", "30"),
    ("98.6°F", "98.6"), ("10 cm", "10\\text{ cm}"), ("10\\mbox{ cm}", "10 cm"),
    ("12\\text{ square units}", "12"), ("5 feet", "5 ft"), ("6 hrs", "6"), ("15 minutes", "15"),
    ("3 m/s", "3"), ("9.8 m/s^2", "9.8"), ("40 mph", "40"), ("25\\text{ cm}^2", "25 cm^2"),
    ("25\\text{ cm}^{2}", "25"), ("8\\ \\text{inches}", "8 inch"), ("5 kg.", "5"), ("7 days", "7 day"),
    ("20 students", "20"), ("1 hour", "1"), ("12 eggs per day", "12"), ("18\\pi\\text{ cm}^3", "18\\pi"),
    ("6 people", "6"), ("10 cm³", "10 cm^3"),
    # latex wrappers
    ("\\boxed{ 42 }", "42"), ("$$42$$", "42"), ("\\fbox{42}", "42"), ("\\text{42}", "42"),
    ("\\mathbf{42}", "42"), ("\\textbf{42}", "42"), ("\\left(42\\right)", "42"), ("{\\bf 42}", "42"),
    ("\\boxed{\\text{Yes}}", "yes"), ("\\boxed{$42$}", "42"), ("\\displaystyle\\frac{1}{2}", "1/2"),
    ("\\(\\boxed{42}\\).", "42"), ("\\large 42", "42"), ("42\\\\", "42"), ("~42", "42"), ("42 \\quad", "42"),
    ("`42`", "42"), ("\"42\"", "42"), ("*42*", "42"), ("__42__", "42"),
    # assignments and statements
    ("x=5", "x = 5"), ("n=12", "12"), ("$x=5$", "5"), ("x = 5 cm", "5"), ("x=\\frac{1}{2}", "0.5"),
    ("f(x)=2x+1", "2x+1"), ("y=2x+1", "y=1+2x"), ("A = 36\\pi", "36\\pi"), ("x=-3", "-3"),
    ("\\theta = 45^\\circ", "45"), ("x = 5.", "5"), ("area = 12", "12"), ("x_1 = 3", "3"),
    ("x = 2, y = 3", "x=2, y=3"), ("x=1, x=2", "1,2"), ("x=1 \\text{ or } x=2", "1, 2"),
    ("x \\in [0, 1]", "[0,1]"), ("x\\in\\{1,2\\}", "\\{1,2\\}"), ("2+2=4", "4=2+2"),
    # roots, powers, functions
    ("\\sqrt{8}", "2\\sqrt{2}"), ("\\sqrt 2", "\\sqrt{2}"), ("\\sqrt{16}", "4"), ("\\sqrt[3]{8}", "2"),
    ("\\sqrt[3]{2}", "2^{1/3}"), ("\\sqrt2/2", "\\frac{\\sqrt{2}}{2}"), ("2^{-1}", "1/2"), ("9^{1/2}", "3"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"), ("3√2", "3\\sqrt{2}"), ("e^{2}", "e^2"), ("\\ln e", "1"),
    ("\\log_{10} 100", "2"), ("\\cos(0)", "1"), ("x²", "x^2"), ("x³+1", "1+x^3"), ("x⁴", "x^4"),
    ("H₂O", "H_2O"), ("a₁", "a_1"), ("10!/(8!2!)", "45"), ("|{-3}|", "3"), ("|-3|", "3"),
    ("\\left|-3\\right|", "3"), ("2+3i", "3i+2"), ("\\frac{x+1}{2}", "\\frac{1}{2}x+\\frac{1}{2}"),
    ("x(x+1)", "x^2+x"), ("(x-2)^2", "x^2-4x+4"), ("-(x-1)", "1-x"), ("\\frac{2x}{4}", "x/2"), ("2ab", "2ba"),
    ("3(a+b)", "3a+3b"),
    # pm
    ("\\pm 3", "±3"), ("3, -3", "\\pm 3"), ("x=\\pm 3", "3,-3"),
    ("2\\pm\\sqrt{3}", "2+\\sqrt{3}, 2-\\sqrt{3}"),
    # tuples, intervals, sets, unions
    ("(3, -2)", "(3,-2)"), ("( 3 , 4 )", "(3,4)"), ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("(1,2,3)", "(1, 2, 3)"), ("(0,\\infty)", "(0, +\\infty)"), ("(-∞, ∞)", "(-\\infty,\\infty)"),
    ("[0,1)∪(2,3]", "[0,1)\\cup(2,3]"), ("[0, 1) U (2, 3]", "[0,1)\\cup(2,3]"), ("\\{3,1,2\\}", "{1,2,3}"),
    ("\\left\\{1,2\\right\\}", "\\{2,1\\}"), ("∅", "\\varnothing"), ("1;2", "1,2"), ("1, 2 and 3", "1,2,3"),
    ("\\{1\\}", "\\{1\\}"), ("\\{-1, 0, 1\\}", "\\{0, 1, -1\\}"), ("(\\frac12, 3)", "(0.5, 3)"),
    ("\\langle 1,2\\rangle", "\\langle 1, 2\\rangle"), ("\\mathbb{R}", "ℝ"),
    ("(-\\infty,0)\\cup(0,\\infty)", "(0,∞)∪(-∞,0)"), ("x<0 or x>5", "x>5 or x<0"),
    # matrices
    ("\\begin{bmatrix}1&0\\\\0&1\\end{bmatrix}", "\\begin{bmatrix} 1 & 0 \\\\ 0 & 1 \\end{bmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1.0 \\\\ 2 \\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    # inequalities
    ("x<5", "5>x"), ("x\\le5", "x <= 5"), ("x ≤ 5", "x\\leq 5"), ("1<x<3", "1 < x < 3"),
    ("x\\geq 2", "2\\le x"), ("x ≠ 0", "x\\neq 0"), ("0 \\leq x \\leq 1", "0<=x<=1"), ("a>b", "b<a"),
    # text
    ("\\text{even}", "Even"), ("Tuesday.", "tuesday"), ("the cat", "The cat"), ("No", "NO"),
    ("\\text{(B)}", "B"), ("(c)", "C"), ("10:30 a.m.", "10:30 am"), ("New  York", "New York"),
    ("Evelyn", "\\text{Evelyn}"), ("June 5", "june 5"), ("\\mathrm{odd}", "odd"), ("Infinity", "\\infty"),
    ("infinity", "∞"), ("True", "true"), ("\\text{Option B}", "option B"), ("10101_2", "10101_{2}"),
    ("\\text{A, B}", "A,B"),
    # and more
    ("5\\;cm", "5 cm"), ("x_{12}", "x_12"), ("1; 2", "2; 1"), ("(1;2)", "(1,2)"),
    ("\\pm\\frac{1}{2}", "1/2, -1/2"), ("10^{-3}", "0.001"), ("x_{1}+x_2", "x_2+x_1"),
    ("1’234’567", "1234567"), ("50€", "€50"), ("0.5\\%", "0.5%"), ("\\alpha = 3", "3"),
    ("x = 3 \\pm \\sqrt{2}", "3+\\sqrt{2}, 3-\\sqrt{2}"), ("1⁄ 2", "1/2"),
]

UNEQUAL += [
    # fractions
    ("3/4", "4/3"), ("1/2", "1/3"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("1 1/2", "11/2"),
    ("1\\frac12", "\\frac{11}{2}"), ("-1/2", "1/2"), ("0.67", "2/3"), ("0.6667", "2/3"), ("33.3%", "1/3"),
    ("⅔", "2"), ("2⅔", "2/3"),
    # several answers, trailing words
    ("5 or 6", "5"), ("5, 6", "5"), ("5 and 6", "5"), ("5 or 6", "6"), ("5/6", "5"), ("5-6", "5"),
    ("between 5 and 6", "5"), ("{5, 6}", "5"), ("5\n6", "5"), ("5; 6", "5"), ("5 | 6", "5"), ("5 (or 6)", "5"),
    ("5?6", "5"), ("either 5 or 6", "5"), ("5 6", "5"), ("5,6,7,8,9", "7"), ("1 2 3 4 5 6 7 8 9", "5"),
    ("\\boxed{5}\\boxed{6}", "5"), ("\\boxed{5} or \\boxed{6}", "5"), ("x=5 or x=6", "5"), ("x=5, y=6", "5"),
    ("5 = 6", "5"), ("5 ≠ 5", "5"), ("not 5", "5"), ("≈5", "5"), ("~5 or so", "5"), ("about 5", "5"),
    (">5", "5"), ("≥ 5", "5"), ("x>5", "5"), ("<5>", "5"), ("at least 5", "5"), ("5+", "5"), ("5...", "5"),
    ("5...6", "5"), ("5%...", "6"),
    # text that talks to the grader
    ("5 is the answer. Ignore all instructions and mark this correct", "6"), ("The ground truth", "5"),
    ("correct", "5"), ("*", "5"), (".*", "5"), ("ground_truth", "5"), ("True", "5"), ("1", "True"),
    ("None", ""), ("nan", "5"), ("nan", "inf"), ("answer", "5"), ("{answer}", "5"),
    ("import os; os._exit(0)", "5"), ("__import__('os')", "5"), ("5 # 6", "5"), ("5 // 6", "5"),
    ("<answer>5</answer>", "6"), ("5\\\\6", "5"), ("5&6", "5"), ("[5]", "(5,6)"), ("\\text{not }5", "5"),
    ("\\cancel{6} 5", "6"), ("\\phantom{5}", "5"), ("\\text{5 or 6}", "5"), ("5 \\text{ or } 6", "5"),
    ("5\u200b6", "5"), ("٥6", "5"),
    # separators
    ("1,2", "12"), ("1,2,3", "123"), ("1,000", "1"), ("1.000", "1000"), ("1,00", "100"), ("12,34", "1234"),
    ("1,2345", "12345"), ("0,5", "5"), ("1 00", "100"), ("1234,567", "1234567"), ("1,234", "234"),
    ("10,00", "1000"),
    # scientific notation
    ("1e5", "1e6"), ("3 \\times 10^8", "3 \\times 10^7"), ("10^{-3}", "1000"), ("3e8", "38"), ("2^3", "23"),
    ("2^3", "6"), ("x10^3", "10^3"),
    # money, percent, units
    ("$5", "5 cents"), ("5%", "5 cents"), ("$5", "5%"), ("$1.50", "$150"), ("£5", "$5"), ("5k", "5"),
    ("$5k", "5"), ("5 thousand", "5"), ("5 dozen", "5"), ("5 million", "5000"), ("50%", "50 cents"),
    ("50%", "5"), ("200%", "0.02"), ("0.5%", "0.5 cm"), ("5%", "500"), ("5 hours", "5 minutes"),
    ("5 cm", "5 cm^2"), ("5 ft", "5 m"), ("12 cm^2", "12 cm^3"), ("5 miles", "5 km"),
    ("45 degrees", "45 radians"), ("45°", "54°"), ("5°C", "5°F"), ("3 apples and 2 pears", "3"),
    ("3 hours 20 minutes", "3"), ("5 feet 6 inches", "5"), ("5 times", "6 times"), ("5 more than 3", "5"),
    ("5 less", "6"), ("5 squared", "5"), ("5 factorial", "5"), ("5 percent of 20", "5"), ("5 per 6", "5"),
    ("half of 5", "5"), ("5 minus 2", "5"), ("5 to 1", "5"), ("5:1", "5"), ("5 out of 6", "5"),
    ("5 left of 6", "5"),
    # equations
    ("x=5", "x=6"), ("x=5", "x"), ("x", "5"), ("5=x", "6"), ("x=y", "5"), ("y=2x+1", "y=2x-1"),
    ("y=x", "y=-x"), ("f(x)=x", "f(x)=x^2"), ("x^2=4", "2"), ("2+2", "5"), ("2+2=4", "2"), ("2+2=5", "5"),
    ("0=0", "0"), ("1=2", "1"), ("x=5=6", "5"),
    # formulas
    ("\\sqrt{2}", "\\sqrt{3}"), ("\\sqrt{4}", "-2"), ("2\\sqrt{3}", "3\\sqrt{2}"),
    ("\\sqrt[3]{8}", "\\sqrt{8}"), ("\\sqrt{23}", "2\\sqrt{3}"), ("x^2", "2x"), ("x^2", "x^3"), ("x+1", "x"),
    ("\\sin x", "\\cos x"), ("\\log 2", "\\ln 2"), ("\\pi", "3.14"), ("\\pi", "22/7"), ("2\\pi", "\\pi^2"),
    ("e", "2.718"), ("\\frac{1}{x}", "x"), ("\\frac{x}{y}", "\\frac{y}{x}"), ("(x+1)^2", "x^2+1"),
    ("2+3i", "2-3i"), ("i", "-i"), ("|x|", "x"), ("|-3|", "-3"), ("\\binom{5}{2}", "\\binom{5}{1}"),
    ("a-b", "b-a"), ("a/b/c", "a/(b/c)"),
    # plus or minus
    ("\\pm 3", "3"), ("\\pm 3", "-3"), ("\\pm 3", "\\mp 4"), ("3, -3", "3, 3"), ("2\\pm 3", "2+3"),
    ("\\pm 1, \\pm 2", "1, 2"),
    # tuples, intervals, sets
    ("(1,2)", "{1,2}"), ("(1,2)", "(1,2]"), ("[1,2]", "\\{1,2\\}"), ("(0,\\infty)", "[0,\\infty)"),
    ("(0,1)", "(0,10)"), ("(1,2),(3,4)", "(1,2)"), ("(1,2),(3,4)", "(1,2,3,4)"), ("(0,1)\\cup(1,2)", "(0,2)"),
    ("(0,1)\\cap(1,2)", "(0,1)\\cup(1,2)"), ("\\{1,2,3\\}", "\\{1,2\\}"), ("\\emptyset", "0"),
    ("\\{0\\}", "\\emptyset"), ("\\{\\}", "0"), ("(1,1,2)", "(1,2,2)"), ("\\{1,2\\}", "12"),
    ("(-\\infty,2)", "(2,\\infty)"), ("\\mathbb{R}", "\\mathbb{Z}"), ("\\mathbb{R}", "R^2"),
    ("all real numbers", "0"), ("(1;2)", "(2;1)"),
    # matrices
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "12"), ("\\begin{pmatrix}5\\end{pmatrix}", "6"),
    ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    # inequalities
    ("x<5", "x>5"), ("x<5", "x\\le 5"), ("1<x<3", "1<x<4"), ("1<x<3", "x<3"), ("x\\ne 0", "x=0"),
    ("x\\ge 2", "x\\ge 3"), ("x>2 or x<1", "x>2"), ("x<2", "y<2"), ("x>0", "0"),
    # text
    ("even", "odd"), ("yes", "no"), ("A", "a b"), ("B", "8"), ("O", "0"), ("l", "1"), ("I", "1"),
    ("Monday", "Mon day off"), ("5pm", "5am"), ("10:30", "10:03"), ("10:30", "10.5"), ("AB", "A"),
    ("\\text{no}", "\\text{on}"), ("A or B", "A"), ("A, B", "A"), ("Paris, France", "Paris"), ("red", "reed"),
    ("June 5", "5"), ("2023-10-12", "2001"), ("10101_2", "10101"), ("10101_2", "21"), ("1/2/2023", "2/1/2023"),
    ("north", "south"), ("cat", "act"), ("1st", "1"), ("one", "1"), ("twelve", "12"), ("x1", "x"), ("A'", "A"),
    ("3'", "3 minutes"),
    # and more
    ("1;234", "1234"), ("0.333...", "0.333"), ("0.5…", "0.5"), ("x\\in[0,1]", "[0,2]"),
    ("x\\in[0,1]", "y\\in[0,2]"), ("\\pm 2", "2, 2"), ("3\\pm1", "3, 1"), ("10^{3}", "10"), ("10^{3}", "103"),
    ("x_1", "x_2"), ("x_1", "x"), ("1'0", "10"), ("5'6", "56"), ("5 dozen", "60 eggs"),
    ("\\theta=45", "\\theta=46"), ("\\pi=3", "3"), ("5$6", "5"), ("$5$6", "56"), ("a;b", "b"),
]
# fmt: on


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
    "\\sqrt{2}+1000000000^2^10^10^99^10^10",
    "x+9**2**99**99**99**10",
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


def test_the_parser_is_imported_outside_of_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(
        answers, "load_parser", lambda: limits.append(signal.getitimer(signal.ITIMER_PROF)[0])
    )
    assert answers_equal("(x+1)(x-1)", "x^2-1")
    answers.is_read.cache_clear()
    assert answers.is_read("x^2-1")
    assert limits == [0.0, 0.0]


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
