"""Chat templates: what transformers renders, and no more than a conversation may take."""

from __future__ import annotations

import importlib.util
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

import data_prep.template_budget
from data_prep.chat_template import ChatTemplate
from data_prep.template_budget import TemplateLimitError

# A folder of templates of many models, those with generation markers among them.
TRL = importlib.util.find_spec("trl")
FOLDER = Path(str(TRL.origin)).parent / "chat_templates" if TRL else Path("/none")
TEMPLATES = {path.name: path for path in sorted(FOLDER.glob("*.jinja"))}
# Their contents are lists of texts and pictures.
VISION = re.compile("vl|llava")
TURNS = [
    {"role": "user", "content": "What is 3 + 4?\n"},
    {"role": "assistant", "content": "<think>\nEasy: 7.\n</think>\n\n\\boxed{7} é <b>&"},
    {"role": "user", "content": "  And {{ 5 }} + 6?"},
    {"role": "assistant", "content": "11"},
]
CONVERSATIONS = {
    "one": TURNS[:2],
    "two": TURNS,
    "system": [{"role": "system", "content": "Be terse."}, *TURNS],
    "asks": TURNS[:3],
    "long": [*TURNS * 6],
}


def plain(template: str, messages: list[dict[str, str]], **variables: Any) -> Any:
    """Return what transformers renders, or the error."""
    try:
        rendered, spans = cast(Any, render_jinja_template)(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
    except Exception as error:
        return type(error), str(error)
    return rendered[0], spans[0]


@pytest.mark.parametrize("name", [n for n in TEMPLATES if not VISION.search(n)])
def test_templates_of_many_models_render_as_transformers_renders_them(name):
    template = TEMPLATES[name].read_text("utf-8")
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
    compiled, rendered = ChatTemplate(template), 0
    for prompt in (False, True):
        for messages in CONVERSATIONS.values():
            asked = {**variables, "add_generation_prompt": prompt}
            try:
                found: Any = compiled.render(messages, **asked)
            except Exception as error:
                found = (type(error), str(error))
            assert found == plain(template, messages, **asked)
            rendered += isinstance(found[0], str)
    assert rendered


def test_there_are_templates_to_compare():
    assert TRL is None or len(TEMPLATES) > 30


# One of each kind of thing that templates do, beyond what the others have.
MANY = """
{%- macro shown(text, n=2) -%}{% for c in text[:n] %}{{ c|upper }}{% else %}-{% endfor %}
{%- endmacro -%}
{%- set ns = namespace(last=-1, all=[], text='') -%}
{%- for m in messages[::-1] if m.role == 'user' and m['content'] is string -%}
    {%- set ns.last = loop.index0 -%}{%- set ns.all = ns.all + [m.content|trim] -%}
{%- endfor -%}
{{ ns.all|tojson }}{{ ns.all|join(' | ') }}{{ ns.last ~ '/' ~ messages|length ~ ns.all }}
{{- messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|length }}
{{- messages|map(attribute='role')|unique|join('+') }}{{ {'a': 1, 'b': [2, (3, 'x')]} }}
{{- shown('ab') ~ shown('') ~ '%s-%5d' % ('x', 7) ~ '{:>6}'.format(3) ~ 'abc'.replace('b', '') }}
{{- 'a,b'.split(',')[-1].center(5)|indent(2, true) }}{{ (7 // 2) ** 2 % 5 * 3 - 1 }}
{{- {'k': [1, 2]}|tojson(indent=2) }}{{ {'b': 1, 'a': 2}|dictsort }}{{ 'é<&'|tojson }}
{%- filter upper %}in a filter{% endfilter %}{% set block %}kept {{ 1 }}{% endset %}{{ block }}
{%- for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if m.role == 'assistant' %}{% continue %}{% endif %}
    {{- m.role ~ loop.cycle('a', 'b') ~ loop.last ~ (loop.previtem.role if not loop.first) }}
    {%- generation %}{{ m.content }}{{ shown(m.content, n=3) }}{% endgeneration %}
{%- endfor %}{{ missing }}{{ missing is defined }}{{ messages[9]|default('none') }}{{ 1 if 0 }}
{{ [1, 2, 3]|sum }}{{ range(2, 8, 3)|list }}
"""


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_everything_that_templates_do_is_as_in_transformers(name):
    found = ChatTemplate(MANY).render(CONVERSATIONS[name])
    assert found == plain(MANY, CONVERSATIONS[name])
    assert found[1]


def test_text_that_is_marked_as_safe_is_joined_as_plain():
    assert ChatTemplate("{{ ('<b>'|safe) ~ '<i>' }}").render([])[0] == "<b><i>"
    assert plain("{{ ('<b>'|safe) ~ '<i>' }}", []) == ("<b><i>", [])


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """Let a template that takes gigabytes fail here, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


LOOP = "{% for i in range(60) %}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
LARGE = "{% set b = 'x' * 1000000 %}"


# Each of them would take hours, or all of the memory.
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        NESTED.replace("range(99999) %}x", "range(99999) if false %}x"),
        "{% set r = range(90000)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% set r = range(90000)|list %}{% for i in r %}{{ r|length }}{% endfor %}",
        "{% set r = range(90000)|list %}{% for i in r %}{{ r|sort|last }}{% endfor %}",
        "{% set r = range(90000)|list %}{% for i in r %}{{ i in r }}{% endfor %}",
        "{% set r = range(90000)|list %}{% for i in r %}{% set y = r.count(5) %}{% endfor %}",
        "{% set r = range(90000)|list %}{{ r|map('replace', '1', 'x' * 99999)|join }}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in range(90000) %}" + "a" * 99_999 + "{% endfor %}",
        "{% set x %}{% for i in range(90000) %}{{ 'x' * 99999 }}{% endfor %}{% endset %}{{ x }}",
        "{{ 'x' * 10**10 }}",
        "{{ ['x'] * 10**10 }}",
        "{{ 10**9 * 'x' }}",
        "{{ 9**(9**9) }}",
        "{% set ns = namespace(x=2) %}" + LOOP + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}" + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}" + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=1) %}"
        + LOOP
        + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}"
        + LOOP
        + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}"
        + LOOP
        + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}"
        + LOOP
        + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}"
        + LOOP
        + "{% set ns.x = {'a': ns.x, 'b': ns.x}.values()|list %}{% endfor %}{{ ns.x }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x'.zfill(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%(a)10000000000d' % {'a': 1} }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%10000000000d'|format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, '10000000000') }}",
        "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
        "{{ 'x\nx'|indent(10000000000) }}",
        "{{ [1, [2]]|tojson(indent=10000000000) }}",
        "{{ 2|round(10000000000, 'ceil') }}",
        "{{ ([[1]] * 90000)|sum(start=[]) }}",
        LARGE + "{{ range(90000)|map('string')|join(b) }}",
        LARGE + "{{ b.join(range(90000)|map('string')) }}",
        LARGE + "{{ b.replace('x', b) }}",
        LARGE + "{{ b|replace('x', b) }}",
        LARGE + "{% for i in range(90000) %}{% if b[1:] == b[:-1] %}{% endif %}{% endfor %}",
        LARGE + "{% for i in range(90000) %}{% set y = b.split('x') %}{% endfor %}",
        "{{ [-10000000000]|map('boxed turn')|list }}" + NESTED,
        # A short format with many places, or a long value at each of them.
        "{{ ('%(a)9999d' * 400000) % {'a': 1} }}",
        LARGE + "{{ ('%(a)s' * 100000) % {'a': b} }}",
        LARGE + "{{ ('{0}' * 100000).format(b) }}",
        LARGE + "{{ ('{a}' * 100000).format_map({'a': b}) }}",
        # Formats that are not called so.
        "{{ '%5000000000d' is odd }}",
        "{{ '%5000000000d' is divisibleby(3) }}",
        "{{ ['%5000000000d']|format(1) }}",
        # Looking for wide places must not take for ever itself.
        "{{ ('%(' * 500000) % 1 }}",
        "{{ ('{' ~ ':' * 500000 ~ '{')|format }}",
        # Whole values are read behind what looks like a short question.
        "{% set r = range(90000)|list %}{% for i in r %}{% if r is upper %}{% endif %}{% endfor %}",
        "{% set r = range(90000) %}{% for i in r %}{% set y = r.count(0.5) %}{% endfor %}",
        LARGE + "{{ b.strip(b ~ 'y') }}{{ b.strip('y' * 999999 ~ 'x') }}",
        LARGE + "{{ b|trim('y' * 999999 ~ 'x') }}",
        LARGE + "{{ b.rfind('xy' ~ b[:500000]) }}",
        # Numbers with one hash.
        "{{ range(0, 300000 * (2**61 - 1), 2**61 - 1)|unique|list|length }}",
        # Each generator behind another hands on all that there is.
        "{% set ns = namespace(r=range(99999)) %}{% for i in range(300) %}"
        "{% set ns.r = ns.r|map(attribute='real') %}{% endfor %}{{ ns.r|list|length }}",
        # Depth and what stands between values multiply.
        "{% set ns = namespace(x=1) %}{% for i in range(900) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ [ns.x, ns.x, ns.x]|tojson(indent=1000) }}",
        LARGE + "{{ range(90000)|list|tojson(separators=(b, ':')) }}",
        "{{ strftime_now('%A' * 1000000) }}",
        "x" * 300_000,
    ],
)
def test_a_template_that_would_never_end_is_refused(template, monkeypatch):
    if template != NESTED:  # which has all that there is; a tenth shows the same
        monkeypatch.setattr(data_prep.template_budget, "OPERATIONS", 100_000)
    with pytest.raises(TemplateLimitError):
        ChatTemplate(template).render(TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ lipsum(n=1000000) }}",
        "{{ 'x'|center(1000000000) }}",
        "{{ messages|batch(1000000000, 'x')|list }}",
        "{{ 'x'|wordwrap(1, wrapstring='x' * 99999) }}",
        "{{ [1, 2]|random }}",
        "{{ 'x'.translate({120: 'y' * 99999}) }}",
        "{{ 'x'.expandtabs(1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ 'x'.encode() * 1000000000 }}",
        "{{ ('<!---->'|safe).striptags() }}",
    ],
)
def test_what_cannot_be_bounded_is_not_there(template):
    with pytest.raises(Exception, match=r"undefined|No filter|unsafe"):
        ChatTemplate(template).render(TURNS)


DEEPER = "{% set ns = namespace(x=[]) %}{% for i in range(1200) %}{% set ns.x = [ns.x] %}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
        "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
        "{{ " + "{1:" * 10_000 + "1" + "}" * 10_000 + " }}",
        "{{ " + "not " * 10_000 + "1 }}",
        "{{ " + "-" * 10_000 + "1 }}",
        "{{ " + " + ".join(["messages"] * 10_000) + " }}",
        "{{ " + " and ".join(["messages"] * 10_000) + " }}",
        "{{ " + "1 if messages else " * 10_000 + "1 }}",
        "{{ messages" + "|string" * 10_000 + " }}",
        "{{ messages" + "[0]" * 10_000 + " }}",
        "{{ messages" + ".a" * 10_000 + " }}",
        "{{ messages" + "()" * 10_000 + " }}",
        "{% if messages %}" * 5_000 + "{% endif %}" * 5_000,
        # What Jinja follows, and Python's parser or compiler does not.
        "{% if messages %}" * 120 + "{% endif %}" * 120,
        "{% for m in messages %}" * 30 + "{% endfor %}" * 30,
        "{% if messages %}" + "{% elif messages %}" * 10_000 + "{% endif %}",
        # What is deep only when it runs.
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        DEEPER + "{% endfor %}{{ ns.x }}",
        DEEPER + "{% endfor %}{{ ns.x|tojson }}",
        DEEPER + "{% endfor %}{{ ns.x == [ns.x] }}",
    ],
    ids=lambda template: template[:24],
)
def test_a_template_that_nests_too_deeply_is_refused(template):
    with pytest.raises(TemplateLimitError, match="nests deeper"):
        ChatTemplate(template).render(TURNS)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% break %}", "'break' outside loop"),
        ("{% if messages %}{% continue %}{% endif %}", "'continue' not properly in loop"),
        ("{{ messages|join(d='a', d='b') }}", "keyword argument repeated: d"),
        ("{% macro f(a, a) %}{% endmacro %}", "duplicate argument"),
    ],
)
def test_what_python_finds_wrong_is_said_in_its_words(template, words):
    with pytest.raises(TemplateError, match=words) as caught:
        ChatTemplate(template)
    assert not isinstance(caught.value, TemplateLimitError)


def test_a_long_chain_of_texts_is_joined_as_transformers_joins_it():
    """And compiled in a second: not in time that grows with the square of its length."""
    template = "{{ " + " ~ ".join(f"messages[{i % 4}].role" for i in range(3000)) + " }}"
    assert ChatTemplate(template).render(TURNS) == plain(template, TURNS)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("within", ["[%s]", "-(%s)", "(%s ~ 1)"], ids=["lists", "signs", "texts"])
def test_what_is_wide_and_deep_is_compiled_once(within):
    """Not once at each depth, which took minutes."""
    template = "messages" + ", 1" * 40_000
    for _ in range(60):
        template = within.replace("%s", template)
    ChatTemplate("{{ " + template + " }}")


def test_what_is_dearer_than_its_price_has_a_time(monkeypatch):
    """Keys with one hash, written down: each look at the table goes past all of them."""
    monkeypatch.setattr("data_prep.template_budget.SECONDS", 0.2)
    table = ",".join(f"{number * (2**61 - 1)}:0" for number in range(5000))
    looks = "{% for i in range(200000) %}{% set y = d[0 - 1] %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match=r"0\.2 s of processor time"):
        ChatTemplate(f"{{% set d = {{{table}}} %}}{looks}").render(TURNS)


def test_formats_with_texts_of_usual_length_are_written():
    messages = [{"role": "user", "content": "100000% of 2**5 {a: {b}} " * 4000}]
    template = (
        "{{ '%s: **%-9999s** 12345 {}%%' % (messages[0].role, messages[0].content) }}"
        "{{ '{0}|{a:>5.2}|{{}}'.format(messages[0].content, a='xyz') }}"
        "{{ '%(role)s %(content)s' % messages[0] }}{{ '%5.1f'|format(2.25) }}"
    )
    assert ChatTemplate(template).render(messages) == plain(template, messages)


def test_long_conversations_have_their_room():
    """Fifty turns back and forth of 20 000 characters, where each turn looks at all others."""
    look_back = (
        "{% for m in messages %}{% set ns = namespace(n=0) %}"
        "{% for o in messages %}{% if o.content == m.content %}{% set ns.n = ns.n + 1 %}"
        "{% endif %}{% endfor %}{{ m.content|trim + '|' ~ ns.n }}{% endfor %}"
    )
    messages = [{"role": "user", "content": f"{n} " * 10_000} for n in range(100)]
    text, _ = ChatTemplate(look_back).render(messages)
    assert text == "".join(f"{m['content'].strip()}|1" for m in messages)
