"""Where the answer stands, by policy."""

import pytest

from verifiers import Outcome, verify
from verifiers.extract import check_policy, extract


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then \boxed{2}. Done with 3.", "2"),
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> <think>\boxed{3}</think> 5", "5"),
        (r"\fbox{4}", "4"),
        (r"\boxed 7 is it", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\\boxed{5}", "5"),
        (r"<|begin_of_box|>B<|end_of_box|>", "B"),
        ("<answer> 42 </answer>", "42"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("work\n#### 1,234", "1,234"),
        ("The answer is 7.", "7"),
        ("The answer is $x+1$. It was easy, 5 minutes.", "x+1"),
        ("Final Answer: 12", "12"),
        ("所以答案是 12。", "12"),
        ("答案：12", "12"),
        ("The answer to the second question is 9.", "9"),
        ("So it costs 5 dollars, that is **8** in all", "8"),
        ("first 3, then $4$", "4"),
        (r"\boxed{7}<|im_end|><|im_start|>user \boxed{8}", "7"),
    ],
)
def test_found(text: str, answer: str) -> None:
    found = [c for c in extract(text).candidates if c.text == answer]
    assert found, extract(text)
    assert text[found[0].start : found[0].end].strip() == answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"It is \boxed{7}, no: \boxed{}", "empty_box"),
        (r"It is \boxed{7}, no: \boxed{ }", "empty_box"),
        (r"It is \boxed{7}, no: \boxed{8", "unterminated_box"),
        (r"It is 7. \boxed", "unterminated_box"),
        (r"It is \boxed{7}, no: \boxed", "unterminated_box"),
        (r"It is \fbox{7}, no: \framebox", "unterminated_box"),
        ("$\\boxed{7$", "unterminated_box"),
        (r"\[\boxed{7\]", "unterminated_box"),
        (r"\boxed{\boxed{}}", "empty_box"),
        ("<answer>7</answer> <answer>8", "unterminated_answer_tag"),
        ("<answer></answer> 8", "empty_answer_tag"),
        (r"<think>perhaps \boxed{7}", "unclosed_think"),
        ("", "empty_text"),
        ("The answer is", "empty_phrase"),
    ],
)
def test_no_answer_never_falls_back(text: str, reason: str) -> None:
    verdict = verify("7", text)
    assert verdict.outcome is Outcome.NO_ANSWER
    assert verdict.rule == reason


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{7} or \boxed{8}", r"\boxed{7}, \boxed{8}", r"\boxed{7} \text{and} \boxed{8}",
        "The answer is 7 or 8.", "The answer is either 6 or 7", r"\boxed{7} and maybe \boxed{8}",
    ],
)  # fmt: skip
def test_hedging_does_not_pay(text: str) -> None:
    assert verify("7", text).outcome is Outcome.INCORRECT
    assert verify("8", text).outcome is Outcome.INCORRECT


def test_boxes_of_one_enumeration_are_one_answer() -> None:
    assert verify("1,2", r"\boxed{1} and \boxed{2}").is_correct
    assert verify("(1,2),(3,4)", r"\[\boxed{(1,2)}, \quad \boxed{(3,4)}\]").is_correct
    assert verify("2", r"First \boxed{1}. Then \boxed{2}.").is_correct


def test_a_box_in_a_box_is_a_part_of_the_answer() -> None:
    assert verify("8", r"\boxed{\boxed{8}}").is_correct
    assert verify("8", r"\boxed{x = \boxed{8}}").is_correct
    assert verify("7,8", r"\boxed{\boxed{7}, \boxed{8}}").is_correct
    assert verify("8", r"\boxed{7 \text{ or } \boxed{8}}").outcome is Outcome.INCORRECT
    assert verify("8", r"\boxed{\text{not } \boxed{8}}").outcome is Outcome.INCORRECT


def test_text_after_the_box_does_not_count() -> None:
    assert verify("7", r"\boxed{7}. Or is the answer 8?").is_correct
    assert not verify("8", r"\boxed{7}. The answer is 8.").is_correct


def test_boxed_only_takes_nothing_else() -> None:
    assert verify("7", "The answer is 7", policy="boxed_only").outcome is Outcome.NO_ANSWER


@pytest.mark.parametrize(
    ("policy", "text", "answer"),
    [
        # the first mark counts, whatever follows
        ("gsm8k_strict", "so #### 12\n#### 13", "12"),
        ("gsm8k_strict", "#### 1,234 apples", "1,234"),
        ("gsm8k_strict", "the answer is 12", None),
        # the last thing that looks like a number, with its dollar sign
        ("gsm8k_flexible", "12 apples and $13.50 then", "$13.50"),
        ("gsm8k_flexible", "7", "7"),
        ("gsm8k_flexible", "none", None),
        ("minerva", "Final Answer: The final answer is $x=5$. I hope it is correct.", "5"),
        ("minerva", "Final Answer: The final answer is 12. ", "12"),
        ("minerva", "The final answer is 12.", None),
        # reads an unterminated box to the end, and falls back to the last number
        ("qwen25_math", r"so \boxed{\frac{1}{2}} done 7", r"\frac{1}{2}"),
        ("qwen25_math", r"so \boxed{12", "12"),
        ("qwen25_math", "The answer is: 12.", "12"),
        ("qwen25_math", "答案是 12\n\n好", "12"),
        ("qwen25_math", "it costs 5 and 1,200 in all", "1,200"),
        # the last box that is complete; the program's output before the last number
        ("deepseek_math", r"\boxed{1} \boxed{2} \boxed{3", "2"),
        ("deepseek_math", "5\n```output\n12\n```\nso 13", "12"),
        ("deepseek_math", "The answer is 12.\nThank you", "12"),
        ("deepseek_math_zh", "答案是：共12个苹果。\n3", "12"),
    ],
)
def test_published_extraction(policy: str, text: str, answer: str | None) -> None:
    found = extract(text, check_policy(policy)).candidates
    assert (found[0].text.strip() if found else None) == answer


def test_an_unknown_policy_is_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'boxed'.*gsm8k_strict"):
        check_policy("boxe")
    with pytest.raises(ValueError, match="no policy 'nope'"):
        verify("1", "1", policy="nope")


def test_positions_are_those_of_the_text() -> None:
    text = r"<think>x</think> Then $\boxed{ \frac{1}{2} }$ is it."
    verdict = verify("1/2", text)
    assert verdict.span is not None
    assert text[slice(*verdict.span)] == verdict.extracted
