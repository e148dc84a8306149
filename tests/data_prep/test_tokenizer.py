import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.errors import UserError
from data_prep.tokenizer import equip, load_tokenizer, train_tokenizer
from prompts import load_layout, load_profile


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_round_trips(make_tokenizer, text):
    tokenizer = make_tokenizer("markers")
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_every_digit_is_a_token(make_tokenizer):
    tokenizer = make_tokenizer("markers")
    ids = tokenizer("12+5=17, 3.14")["input_ids"]
    for token in tokenizer.convert_ids_to_tokens(ids):
        assert len(token) == 1 or not any(char.isdigit() for char in token)
    # Also after many repetitions of one number had every chance to be merged.
    layout = load_layout("markers")
    often = train_tokenizer(["2024 2024"] * 500, 400, layout, "s")
    assert len(often("2024")["input_ids"]) == 4


def test_the_same_texts_give_the_same_tokenizer():
    layout = load_layout("markers")
    texts = [f"Mia has {i} pens and {i * 7} books, {i}%." for i in range(400)]
    one, two = (train_tokenizer(iter(texts), 400, layout, "s") for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_it_is_saved_whole(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer("markers")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    text = "Mia <|end|> 12"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no-tokenizer"):
        load_tokenizer(str(tmp_path / "no-tokenizer"))


def test_a_given_tokenizer_gets_the_layout_that_fits(make_tokenizer):
    qwen = make_tokenizer("chatml")
    qwen.chat_template = "{{ messages }}"
    assert equip(qwen, load_profile("boxed")) == "qwen25"
    assert "MyLLM" in qwen.chat_template
    with pytest.raises(UserError, match=r"needs <\|end_of_text\|>"):
        equip(qwen, load_profile("boxed"), "llama3")


def test_a_bare_tokenizer_gets_plain_words():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    end = "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    assert equip(tokenizer, load_profile("boxed")) == "plain"
    assert tokenizer.pad_token == end
