"""A value and any rewriting of it are equal; any change of its value is not."""

from fractions import Fraction

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from verifiers import group_answers, verify
from verifiers.rewrite import rewritings

settings.register_profile("verifiers", max_examples=120, deadline=None, derandomize=True)
settings.load_profile("verifiers")

wholes = st.integers(-(10**6), 10**6)
small = st.integers(-30, 30)
fractions = st.fractions(-1000, 1000, max_denominator=200)


def _same(a: str, b: str) -> bool:
    there = verify(a, f"\\boxed{{{b}}}").is_correct
    back = verify(b, f"\\boxed{{{a}}}").is_correct
    assert there == back, (a, b)
    return there


def _tex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@given(fractions, st.integers(1, 50))
def test_fractions_reduced_or_not(value: Fraction, factor: int) -> None:
    top, bottom = value.numerator * factor, value.denominator * factor
    for text in (
        f"\\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
    ):
        assert _same(_tex(value), text)
    assert not _same(_tex(value), f"\\frac{{{top + 1}}}{{{bottom}}}")


@given(fractions)
def test_mixed_numbers(value: Fraction) -> None:
    assume(abs(value) > 1 and value.denominator > 1)
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    mixed = f"{sign}{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    assert _same(_tex(value), mixed)
    assert not _same(
        _tex(value), f"{sign}{whole + 1}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    )


@given(wholes, st.integers(0, 6))
def test_decimals_are_exact(value: int, places: int) -> None:
    exact = Fraction(value, 10**places)
    digits = str(abs(value)).rjust(places + 1, "0")
    text = ("-" if value < 0 else "") + (
        f"{digits[:-places]}.{digits[-places:]}" if places else digits
    )
    assert _same(_tex(exact), text)
    assert _same(text, f"{text}0" if places else f"{text}.0")
    changed = Fraction(value + 1, 10**places)
    assert not _same(_tex(exact), _tex(changed))


@given(wholes)
def test_integers_in_other_notations(value: int) -> None:
    for text in rewritings(str(value)).values():
        assert _same(str(value), text), text
    assert not _same(str(value), str(value + 1))
    assert not _same(str(value), str(-value)) or value == 0


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 60))
def test_radicals(factor: int, inner: int, other: int) -> None:
    assert _same(f"{factor}\\sqrt{{{inner}}}", f"\\sqrt{{{factor * factor * inner}}}")
    assert _same(
        f"\\frac{{{factor}}}{{\\sqrt{{{other}}}}}",
        f"\\frac{{{factor}\\sqrt{{{other}}}}}{{{other}}}",
    )
    assert not _same(f"{factor}\\sqrt{{{inner}}}", f"\\sqrt{{{factor * factor * inner + 1}}}")


@given(small, small, small, small)
def test_products_expanded(a: int, b: int, c: int, d: int) -> None:
    factored = f"({a}x+{b})({c}x+{d})".replace("+-", "-")
    expanded = f"{a * c}x^2+{a * d + b * c}x+{b * d}".replace("+-", "-")
    turned = f"{b * d}+{a * d + b * c}x+{a * c}x^2".replace("+-", "-")
    assert _same(factored, expanded)
    assert _same(expanded, turned)
    assert not _same(factored, f"{expanded}+1")


@given(small, small, small, st.integers(-9, 9).filter(bool))
def test_lines_rescaled(a: int, b: int, c: int, factor: int) -> None:
    assume(a and b)
    line = f"{a}x+{b}y={c}".replace("+-", "-")
    scaled = f"{a * factor}x+{b * factor}y={c * factor}".replace("+-", "-")
    moved = f"{a * factor}x+{b * factor}y-{c * factor}=0".replace("+-", "-").replace("--", "+")
    assert _same(line, scaled)
    assert _same(line, moved)
    assert not _same(line, f"{a}x+{b}y={c + 1}".replace("+-", "-"))


@given(st.lists(small, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_sets_have_no_order_and_tuples_do(values: list[int], rng) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)
    as_set = "\\{" + ",".join(map(str, values)) + "\\}"
    assert _same(as_set, "\\{" + ", ".join(map(str, shuffled)) + "\\}")
    assert not _same(as_set, "\\{" + ",".join(map(str, [*values[:-1], values[-1] + 100])) + "\\}")
    first, second = f"({','.join(map(str, values))})", f"({','.join(map(str, shuffled))})"
    assert _same(first, second) == (values == shuffled)


@given(small, st.integers(1, 20), st.booleans(), st.booleans())
def test_intervals_as_inequalities(low: int, width: int, left: bool, right: bool) -> None:
    high = low + width
    text = f"{'[' if left else '('}{low},{high}{']' if right else ')'}"
    below = {True: "\\le", False: "<"}
    above = {True: "\\ge", False: ">"}
    chain = f"{low} {below[left]} x {below[right]} {high}"
    flipped = f"{high} {above[right]} x {above[left]} {low}"
    assert _same(text, chain)
    assert _same(text, flipped)
    assert not _same(text, f"{'(' if left else '['}{low},{high}{']' if right else ')'}")
    assert not _same(chain, f"{low} < x < {high + 1}")


@given(
    st.integers(1, 10**5),
    st.sampled_from(
        [("m", "cm", 100), ("km", "m", 1000), ("kg", "g", 1000), ("hours", "minutes", 60)]
    ),
)
def test_units_rescaled(value: int, units: tuple[str, str, int]) -> None:
    large, fine, factor = units
    assert _same(f"{value} \\text{{ {large}}}", f"{value * factor} \\text{{ {fine}}}")
    assert not _same(f"{value} \\text{{ {large}}}", f"{value} \\text{{ {fine}}}")


@given(st.integers(0, 10**6), st.integers(2, 16))
def test_number_bases(value: int, base: int) -> None:
    digits, rest = "", value
    while rest or not digits:
        digits, rest = "0123456789abcdef"[rest % base] + digits, rest // base
    assume(digits.isdigit())
    assert _same(f"{digits}_{{{base}}}", str(value)) or base == 10
    assert not _same(f"{digits}_{{{base}}}", str(value + 1))


@given(
    st.lists(
        st.sampled_from(["1/2", "0.5", "\\frac{2}{4}", "x+1", "1+x", "7", "7.0", None]), max_size=12
    )
)
def test_grouping_is_a_partition(answers: list[str | None]) -> None:
    groups = group_answers(answers)
    assert [g is None for g in groups] == [a is None for a in answers]
    meaning = {"1/2": 0, "0.5": 0, "\\frac{2}{4}": 0, "x+1": 1, "1+x": 1, "7": 2, "7.0": 2}
    for i, a in enumerate(answers):
        for j, b in enumerate(answers):
            if a is not None and b is not None:
                assert (groups[i] == groups[j]) == (meaning[a] == meaning[b])
    seen = [g for g in groups if g is not None]
    assert sorted(set(seen)) == list(range(len(set(seen))))
    strings = group_answers(answers, symbolic=False)
    assert len({g for g in strings if g is not None}) == len({a for a in answers if a is not None})
