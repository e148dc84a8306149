import pytest

from data_prep.errors import UserError
from data_prep.formatting import Formatter
from data_prep.preflight import preflight
from prompts import load_layout, load_profile

MESSAGES = [{"role": "user", "content": "Q one"}, {"role": "assistant", "content": "A two"}]
GOOD = load_layout("markers").render_template("Solve the problem.")


def checked(tokenizer, template=GOOD, messages=MESSAGES):
    tokenizer.chat_template = template
    formatter = Formatter(tokenizer, load_profile("boxed"), "tried")
    preflight(formatter, [messages], [formatter.conversation(messages)])


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("markers")


def test_the_shipped_templates_pass(make_tokenizer):
    for layout in ("markers", "chatml", "qwen25", "llama3"):
        template = load_layout(layout).render_template("Solve the problem.")
        for messages in (
            MESSAGES,
            MESSAGES * 3,
            [{"role": "system", "content": "Be brief."}, *MESSAGES],
        ):
            checked(make_tokenizer(layout), template, messages)


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


BROKEN = {
    "no loss at all": (
        changed("{{- message['content'] + '<|end|>' -}}", "").replace(
            "{%- if loop.last -%}{{- '<|eos|>' -}}{%- endif -%}", ""
        ),
        "no token carries loss",
    ),
    "the end outside the markers": (
        changed("{{- message['content'] + '<|end|>' -}}", "{{- message['content'] -}}")
        .replace("{%- if loop.last -%}{{- '<|eos|>' -}}{%- endif -%}", "")
        .replace("{%- endgeneration -%}", "{%- endgeneration -%}{{- '<|end|>' -}}"),
        "does not cover the end of a turn",
    ),
    "bos twice": (changed("'<|bos|><|system|>'", "'<|bos|><|bos|><|system|>'"), "2 bos tokens"),
    "no bos": (changed("'<|bos|><|system|>'", "'<|system|>'"), "0 bos tokens"),
    "another generation prompt": (
        changed(
            "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}",
            "{%- if add_generation_prompt -%}{{- '<|assistant|><|user|>' -}}",
        ),
        "does not start with the tokens that generation is prompted with",
    ),
    "the header inside the markers": (
        changed(
            "{{- '<|assistant|>' -}}\n        {%- generation -%}",
            "{%- generation -%}{{- '<|assistant|>' -}}",
        ),
        "a token of the prompt carries loss",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_trains_the_wrong_thing_is_refused(tokenizer, name):
    template, message = BROKEN[name]
    with pytest.raises(UserError, match=message) as caught:
        checked(tokenizer, template)
    assert "preflight, row 0" in str(caught.value)
    assert "what to do" in str(caught.value)


def test_an_end_that_is_masked_like_padding_is_refused(tokenizer):
    # A mask made by comparing with the padding id loses the end where the two share an id.
    tokenizer.pad_token = "<|eos|>"  # noqa: S105 - a token of a vocabulary
    tokenizer.chat_template = GOOD
    formatter = Formatter(tokenizer, load_profile("boxed"), "tried")
    ids, mask = formatter.conversation(MESSAGES)
    assert mask[-1] == 1
    preflight(formatter, [MESSAGES], [(ids, mask)])
    by_id = [bit * (token != tokenizer.pad_token_id) for token, bit in zip(ids, mask, strict=True)]
    with pytest.raises(UserError, match="masked like padding"):
        preflight(formatter, [MESSAGES], [(ids, by_id)])


def test_a_mask_that_is_off_by_one_is_refused(tokenizer):
    tokenizer.chat_template = GOOD
    formatter = Formatter(tokenizer, load_profile("boxed"), "tried")
    ids, mask = formatter.conversation(MESSAGES)
    late = mask[:]
    late[late.index(1)] = 0
    with pytest.raises(UserError, match="differs from the template's own"):
        preflight(formatter, [MESSAGES], [(ids, late)])


def test_tokens_joined_across_a_border_are_refused(make_tokenizer):
    # A header without a line break after it: an answer that starts with a letter joins it.
    tokenizer = make_tokenizer("chatml")
    template = load_layout("chatml").render_template("s").replace("assistant\\n", "assist")
    with pytest.raises(UserError, match="differ from those of the whole"):
        checked(tokenizer, template, [MESSAGES[0], {"role": "assistant", "content": "ant sys"}])
