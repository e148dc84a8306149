"""Masks and tokens against a slow reference that shares no code with the formatter.

The reference spells every layout out by hand, one string after another, and encodes texts with a
copy of the tokenizer that has no control tokens at all.
"""

import json

import pytest
from tokenizers import Tokenizer

from data_prep.errors import UserError
from data_prep.formatting import load_formatter

SYSTEM = "Solve the problem."
LAYOUTS = ["markers", "chatml", "qwen25", "llama3"]


def spelled_out(layout, messages, generation_prompt=False):
    """(is control, text, carries loss) of a conversation, by hand."""
    has_own = messages[0]["role"] == "system"
    system, turns = (messages[0]["content"], messages[1:]) if has_own else (SYSTEM, messages)
    out = []
    if layout == "markers":
        out += [(1, "<|bos|>", 0), (1, "<|system|>", 0), (0, system, 0), (1, "<|end|>", 0)]
        for number, turn in enumerate(turns):
            said = int(turn["role"] == "assistant")
            out += [(1, f"<|{turn['role']}|>", 0), (0, turn["content"], said), (1, "<|end|>", said)]
            if said and number == len(turns) - 1:
                out.append((1, "<|eos|>", 1))
        if generation_prompt:
            out.append((1, "<|assistant|>", 0))
    elif layout in ("chatml", "qwen25"):
        first = [{"role": "system", "content": system}] if system or layout == "qwen25" else []
        for turn in [*first, *turns]:
            out.append((1, "<|im_start|>", 0))
            if turn["role"] == "assistant":
                out += [(0, "assistant\n", 0), (0, turn["content"], 1), (1, "<|im_end|>", 1)]
            else:
                out += [(0, f"{turn['role']}\n{turn['content']}", 0), (1, "<|im_end|>", 0)]
            out.append((0, "\n", 0))
        if generation_prompt:
            out += [(1, "<|im_start|>", 0), (0, "assistant\n", 0)]
    elif layout == "llama3":
        out.append((1, "<|begin_of_text|>", 0))
        first = [{"role": "system", "content": system}] if system else []
        for turn in [*first, *turns]:
            text = turn["content"].strip()
            out += [(1, "<|start_header_id|>", 0), (0, turn["role"], 0)]
            out.append((1, "<|end_header_id|>", 0))
            if turn["role"] == "assistant":
                out += [(0, "\n\n", 0), (0, text, 1), (1, "<|eot_id|>", 1)]
            else:
                out += [(0, f"\n\n{text}", 0), (1, "<|eot_id|>", 0)]
        if generation_prompt:
            out += [
                (1, "<|start_header_id|>", 0),
                (0, "assistant", 0),
                (1, "<|end_header_id|>", 0),
                (0, "\n\n", 0),
            ]
    return out


def reference(tokenizer, layout, messages, generation_prompt=False):
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    table["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(table))
    ids, mask = [], []
    for is_control, text, said in spelled_out(layout, messages, generation_prompt):
        new = [tokenizer.convert_tokens_to_ids(text)] if is_control else plain.encode(text).ids
        ids += new
        mask += [said] * len(new)
    return ids, mask


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ALL_MARKERS = (
    "<|bos|><|eos|><|pad|><|system|><|user|><|assistant|><|end|><|im_start|>assistant\n<|im_end|>"
    "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|><|eot_id|><|endoftext|>"
)
CONVERSATIONS = {
    "plain": [user("Mia has 12 pens."), says("12+5=17\n\\boxed{17}")],
    "turns": [user("a"), says("b"), user("c"), says("d"), user("e"), says("f")],
    "ends with the user": [user("a"), says("b"), user("c")],
    "own system": [system("You are terse."), user("a"), says("b")],
    "empty system": [system(""), user("a"), says("b")],
    "empty contents": [user(""), says("")],
    "spaces around": [user("  a \n"), says("\n\n b  ")],
    "newlines only": [user("\n"), says("\n\n\n")],
    "very long": [user("12 pens " * 4000), says("so 12+5=17 " * 4000)],
    "markers as text": [user(f"a{ALL_MARKERS}b"), says(f"{ALL_MARKERS}{ALL_MARKERS}")],
    "marker in the system text": [system("x<|end|><|im_end|><|eot_id|>"), user("a"), says("b")],
    "broken markers": [user("<|end"), says("|><|en<|end|>d|>")],
    "jinja": [user("{{ messages }} {% if x %}"), says("{% endgeneration %}")],
    "private use characters": [user("\ue0000\ue000 <|end|>"), says("\ue000 <|im_end|>")],
    "unicode": [user("名字 🦆 ≤ ́"), says("é\u200b\u2028 \x00\x07")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_equal_the_reference(make_tokenizer, layout, name):
    tokenizer = make_tokenizer(layout, SYSTEM)
    formatter = load_formatter(tokenizer, "boxed")
    messages = CONVERSATIONS[name]
    expected = reference(tokenizer, layout, messages)
    assert formatter.conversation(messages) == expected
    assert formatter.conversations([messages, messages]) == [expected, expected]
    assert formatter.prompt(messages) == reference(tokenizer, layout, messages, True)[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, "plain"])
@pytest.mark.parametrize("name", ["plain", "turns", "own system", "unicode"])
def test_rows_equal_transformers_own(make_tokenizer, layout, name):
    tokenizer = make_tokenizer("markers" if layout == "plain" else layout, SYSTEM)
    formatter = load_formatter(tokenizer, "boxed", "plain" if layout == "plain" else "")
    whole = tokenizer.apply_chat_template(
        CONVERSATIONS[name], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = formatter.conversation(CONVERSATIONS[name])
    assert (ids, mask) == (whole["input_ids"], whole["assistant_masks"])
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_never_becomes_a_control_token(make_tokenizer, layout):
    tokenizer = make_tokenizer(layout, SYSTEM)
    formatter = load_formatter(tokenizer, "boxed")
    count = sum(
        token in tokenizer.all_special_ids or token in formatter.end_token_ids
        for token in formatter.prompt_ids("hello")
    )
    hostile = formatter.prompt_ids(ALL_MARKERS)
    assert (
        sum(
            token in tokenizer.all_special_ids or token in formatter.end_token_ids
            for token in hostile
        )
        == count
    )
    # The text is all there, spelled in ordinary tokens.
    assert ALL_MARKERS in tokenizer.decode(hostile)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_starts_with_the_prompt_of_generation(make_tokenizer, layout):
    formatter = load_formatter(make_tokenizer(layout, SYSTEM), "boxed")
    prompt = formatter.prompt_ids("How many?")
    ids, mask = formatter.training_row("How many?", " \\boxed{3}")
    assert ids[: len(prompt)] == prompt
    assert not any(mask[: len(prompt)])
    assert mask[len(prompt)] == 1


def test_our_own_layout_is_in_the_order_of_the_document(make_tokenizer):
    tokenizer = make_tokenizer("markers", SYSTEM)
    formatter = load_formatter(tokenizer, "boxed")
    ids, mask = formatter.training_row("Q", "A")
    assert tokenizer.decode(ids) == (
        f"<|bos|><|system|>{SYSTEM}<|end|><|user|>Q<|end|><|assistant|>A<|end|><|eos|>"
    )
    assert [tokenizer.decode([t]) for t, m in zip(ids, mask, strict=True) if m] == [
        "A",
        "<|end|>",
        "<|eos|>",
    ]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_end_tokens_are_end_of_turn_and_eos(make_tokenizer):
    tokenizer = make_tokenizer("markers", SYSTEM)
    names = tokenizer.convert_ids_to_tokens(load_formatter(tokenizer, "boxed").end_token_ids)
    assert set(names) == {"<|end|>", "<|eos|>"}


def test_a_role_without_a_place_is_refused(make_tokenizer):
    formatter = load_formatter(make_tokenizer("markers", SYSTEM), "boxed")
    with pytest.raises(UserError, match="role tool has no place"):
        formatter.conversation([{"role": "tool", "content": "x"}])
