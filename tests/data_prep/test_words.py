import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_prep.words import word_encoder

TEXTS = [
    "Mia has 12 pens, it's 3.5%.\n\n  So x_1 = \\frac{1}{2}!",
    "'LL 've\tdon't  stop \r\n",
    "a",
] * 4
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"qwen2.5": WORDS, "llama3": WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}


def made(pattern=WORDS, normalizer=None, byte_level=None, extra=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            byte_level or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_tokens([AddedToken(text, special=False) for text in extra])
    tokenizer.encode_special_tokens = True
    return tokenizer


MADE = {name: made(pattern) for name, pattern in PATTERNS.items()}
ENCODERS = {name: word_encoder(tokenizer) for name, tokenizer in MADE.items()}
ASCII = st.text(st.characters(max_codepoint=127), max_size=60)
CLOSE = st.text(st.sampled_from("aZ s't'LlRe09 _-.\n\r\t\x0b\x1c\x00<|end|>"), max_size=40)


@settings(max_examples=600, deadline=None)
@given(text=ASCII | CLOSE)
@pytest.mark.parametrize("name", PATTERNS)
def test_it_gives_the_tokenizers_own_tokens(name, text):
    expected = MADE[name].encode(text, add_special_tokens=False).ids
    assert ENCODERS[name].encode(text) == expected
    assert ENCODERS[name].encode(text) == expected  # from the table now


def test_special_tokens_in_a_text_stay_text():
    ids = ENCODERS["qwen2.5"].encode("a<|end|>b")
    assert MADE["qwen2.5"].token_to_id("<|end|>") not in ids
    assert ids == MADE["qwen2.5"].encode("a<|end|>b", add_special_tokens=False).ids


def test_other_characters_are_left_to_the_tokenizer():
    assert ENCODERS["qwen2.5"].encode("naïve") is None


def test_added_tokens_that_are_not_special_are_left_to_the_tokenizer():
    encoder = word_encoder(made(extra=["<tool>"]))
    assert encoder.encode("a<tool>b") is None
    assert encoder.encode("ab") is not None


def test_composing_characters_changes_nothing_in_ascii():
    assert word_encoder(made(normalizer=normalizers.NFC())) is not None


@pytest.mark.parametrize(
    "other",
    [
        {"normalizer": normalizers.Lowercase()},
        {"byte_level": pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)},
        {"byte_level": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)},
        {"pattern": r"(\p{L}+)|."},
        {"pattern": r"\p{Lu}|\p{L}+|."},
    ],
)
def test_another_kind_of_tokenizer_has_none(other):
    assert word_encoder(made(**other)) is None
