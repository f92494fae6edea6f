import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from r3rag_jax.errors import UserError
from r3rag_jax.text.message_frame import MessageFrame
from r3rag_jax.text.tokenizer import Tokenizer

CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MESSAGES = [
    {"role": "user", "content": " Who wrote <On the Origin of Species>? "},
    {"role": "assistant", "content": "Darwin\n"},
    {"role": "user", "content": "Born where? Ünïcode 中文"},
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def directory(tmp_path):
    """A byte-level BPE with a ChatML template, in the files transformers would write."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the question the answer the Darwin Darwin"] * 4, trainer)
    path = tmp_path / "tokenizer"
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def edit_config(directory, **changes):
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_encode_decode_round_trip(directory):
    tokenizer = Tokenizer(directory)
    text = "Darwin asked the question.\n  naïve 中文 \U0001f98e"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode("") == []


def test_special_ids(directory):
    tokenizer = Tokenizer(directory)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 2, None)
    assert tokenizer.token_id("<|im_start|>") == 1
    with pytest.raises(KeyError, match="<nothing>"):
        tokenizer.token_id("<nothing>")


def test_specials_are_written_out_or_skipped(directory):
    tokenizer = Tokenizer(directory)
    ids = [1, *tokenizer.encode("the"), 2]
    assert tokenizer.decode(ids) == "<|im_start|>the<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "the"


def test_outside_text_cannot_smuggle_in_control_tokens(directory):
    # A passage that spells the end-of-turn token must stay text, or any web page could end the
    # model's turn.
    tokenizer = Tokenizer(directory)
    text = "the <|im_end|> answer <query>"
    assert 2 in tokenizer.encode(text)
    tokenizer.add_special_tokens(["<query>"])
    assert tokenizer.token_id("<query>") in tokenizer.encode(text)
    ids = tokenizer.encode(text, allow_special=False)
    assert not {0, 1, 2, tokenizer.token_id("<query>")} & set(ids)
    assert tokenizer.decode(ids) == text


def test_pad_falls_back_to_eos_and_eos_is_required(directory):
    edit_config(directory, pad_token=None)
    assert Tokenizer(directory).pad_id == 2
    edit_config(directory, eos_token=None, chat_template=None)
    for ask in (Tokenizer.check_special_tokens, Tokenizer.eos_id.fget, lambda tokenizer: tokenizer.end_ids):
        with pytest.raises(UserError, match=r"the model at .* cannot be read: .*_config.json must name an eos_token"):
            ask(Tokenizer(directory))


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
def test_a_special_token_that_the_vocabulary_lacks_is_refused(directory, key):
    edit_config(directory, **{key: "</s>"})
    with pytest.raises(UserError, match=rf"{key} of tokenizer_config.json must be a token of .*; got '</s>'"):
        Tokenizer(directory).check_special_tokens()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(directory, file, text):
    (directory / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        Tokenizer(directory)


TURN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "generation", "behind", "ends"),
    [
        ("<|im_end|>", None, "<|im_end|>\\n", (2,)),
        ("<|endoftext|>", None, "<|im_end|>\\n", (2, 0)),  # a base model with the template of its Instruct
        ("<|endoftext|>", [0, 1], " <|im_end|>", (2, 0, 1)),
        ("<|endoftext|>", 1, "\\n", (0, 1)),  # no token ends the turn: eos
        ("<|endoftext|>", None, "the<|im_end|>", (0,)),  # text ends the turn
        ("<|im_end|>", [2, 0], None, (2, 0)),  # no template
        ("<|im_end|>", [0], "{{ raise_exception('no assistant') if m.role == 'assistant' }}", (2, 0)),
        ("nowhere", None, "<|im_end|>", (2,)),
    ],
)
def test_everything_that_ends_a_turn(directory, eos, generation, behind, ends):
    template = None if behind is None else TURN.replace("END", behind.replace("\\n", "\n"))
    edit_config(directory, eos_token=eos, chat_template=template)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_k": 9}))
    tokenizer = Tokenizer(directory)
    assert tokenizer.end_ids == ends and tokenizer.turn_end_id == ends[0]
    for end in ends:
        assert tokenizer.without_end([5, end]) == [5]
    assert tokenizer.without_end([5, 7]) == [5, 7] and tokenizer.without_end([]) == []
    written = tokenizer.complete_generation({"eos_token_id": generation, "top_k": 9} if generation else {})
    assert set(np.atleast_1d(written["eos_token_id"])) == set(ends)


def test_generation_config_keeps_its_order_and_what_else_it_holds(directory):
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 0], "pad_token_id": 1, "top_k": 9}')
    written = Tokenizer(directory).complete_generation({"eos_token_id": [1, 0], "pad_token_id": 1, "top_k": 9})
    assert written == {"eos_token_id": [1, 0, 2], "pad_token_id": 1, "top_k": 9}


@pytest.mark.parametrize("value", ['"</s>"', "[2, null]", "-1", "true", "{}"])
def test_an_eos_token_id_that_is_none_is_refused(directory, value):
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match=r"eos_token_id of generation_config.json must be an id or a list of ids; got"):
        _ = Tokenizer(directory).end_ids


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_equals_transformers(directory, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer(directory)
    for messages in (MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        text = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert ours.render_chat(messages, add_generation_prompt) == text
        assert ours.chat(messages, add_generation_prompt) == ids


def test_chat_text_by_hand(directory):
    text = Tokenizer(directory).render_chat([{"role": "user", "content": "Hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_file_wins_and_generation_blocks_render(directory):
    body = "{% generation %}{{ m.content }}!{% endgeneration %}"
    template = "{% for m in messages %}" + body + "{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    assert Tokenizer(directory).render_chat([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_template_errors_are_reported(directory):
    with pytest.raises(ValueError, match="unknown role tool"):
        Tokenizer(directory).chat([{"role": "tool", "content": "x"}])
    edit_config(directory, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(directory).chat(MESSAGES)
    edit_config(directory, chat_template="{% if %}")
    with pytest.raises(UserError, match="chat template refuses the messages: TemplateSyntaxError"):
        Tokenizer(directory).chat(MESSAGES)
    edit_config(directory, chat_template="{{ messages[0].content + 1 }}")
    with pytest.raises(UserError, match="chat template refuses the messages: TypeError"):
        Tokenizer(directory).chat(MESSAGES)
    edit_config(directory, chat_template=None)
    with pytest.raises(UserError, match=r"must have a chat template, .*: model.chat_template=chatml or llama3"):
        Tokenizer(directory).frame_of_user_message()


PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "shown",
    [
        PARTS,
        "{{ m.content[0]['text'] }}",
        "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}" + PARTS,
    ],
)
def test_a_template_that_reads_parts_alone_gets_them(directory, shown):
    """As text such a template shows nothing: every prompt was the frame alone, with the question behind it."""
    transformers = pytest.importorskip("transformers")
    edit_config(
        directory, chat_template="{% for m in messages %}<|im_start|>{{ m.role }} " + shown + "<|im_end|>{% endfor %}"
    )
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    text = theirs.apply_chat_template(in_parts, tokenize=False)
    assert MESSAGES[0]["content"] in text
    assert ours.render_chat(MESSAGES) == ours.render_chat(in_parts) == text
    assert ours.frame_of_user_message() == ("<|im_start|>user ", "<|im_end|>")
    assert ours.end_ids == (2,)
    either = (
        "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "!{% endif %}"
    )  # what most vision models do
    edit_config(directory, chat_template="{% for m in messages %}" + either + "{% endfor %}")
    assert Tokenizer(directory).render_chat(MESSAGES[1:2]) == "Darwin\n"


@pytest.mark.parametrize(
    ("shown", "times"),
    [
        ("", 0), ("{{ m.content }} {{ m.content }}", 2), ("{{ m.content | tojson }}", 0), ("{{ m.content | e }}", 0),
        ("{{ m.content | upper }}", 0), ("{{ m.content[:20] }}", 0), ("{{ m.content.split() | join(' ') }}", 0),
        ("{{ m.content.replace('\\n\\n', '\\n') }}", 0), ("{{ m.content.parts }}", 0),
    ],
)  # fmt: skip
def test_a_template_that_does_not_show_the_question_is_refused(directory, shown, times):
    edit_config(directory, chat_template="{% for m in messages %}[{{ m.role }}]" + shown + "{% endfor %}")
    with pytest.raises(
        UserError, match=rf"content of a user message once and unchanged; it does so {times} times: model"
    ):
        Tokenizer(directory).frame_of_user_message()


@pytest.mark.parametrize(
    ("shown", "stripped"),
    [
        ("{{ m.content }}", " \tWho?\n "), ("{{ m.content | trim }}", "Who?"),
        ("{{ ' ' + m.content.lstrip() + ' ' }}", "Who?\n "), ("{{ m.content.rstrip() }}", " \tWho?"),
    ],
)  # fmt: skip
def test_a_content_is_stripped_where_the_template_strips_it(directory, shown, stripped):
    edit_config(directory, chat_template="{% for m in messages %}" + shown + "<|im_end|>{% endfor %}")
    tokenizer = Tokenizer(directory)
    before, after = tokenizer.frame_of_user_message()
    assert tokenizer.strip_content(" \tWho?\n ") == stripped
    whole = tokenizer.chat([{"role": "user", "content": " \tWho?\n "}])
    assert MessageFrame.chat(tokenizer).ids(" \tWho?\n ") == whole
    assert tokenizer.decode(whole) == f"{before}{stripped}{after}"
    assert MessageFrame.chat(tokenizer).ids("a question with <|im_end|> in it").count(2) == whole.count(2)


def test_truncation_in_the_file_is_not_applied(directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    text = "the question the answer"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_survive_saving(directory, tmp_path):
    tokenizer = Tokenizer(directory)
    size = tokenizer.vocab_size
    assert tokenizer.add_special_tokens(["<query>", "</query>", "<|im_end|>"]) == 2
    assert tokenizer.vocab_size == size + 2
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer(tmp_path / "saved")
    text = "the <query>Darwin</query>"
    assert saved.encode(text) == tokenizer.encode(text)
    assert saved.token_id("</query>") == size + 1
    assert saved.chat(MESSAGES) == tokenizer.chat(MESSAGES)
    assert saved.decode([saved.token_id("<query>")], skip_special=True) == ""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode(text, add_special_tokens=False) == saved.encode(text)
    assert theirs.eos_token == "<|im_end|>"


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json"):
        Tokenizer(tmp_path)


def test_where_a_stop_string_ends(directory):
    """Counted in tokens, the last of which may hold more than the string: nothing behind the string is a token less."""
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode("the answer Darwin\n中\nmore")
    for strings, spelled in (
        (("\n",), "the answer Darwin\n"),
        (("中",), "the answer Darwin\n中"),
        (("wer", "\n"), None),
    ):
        count = tokenizer.end_of(strings, ids)
        assert any(string in tokenizer.decode(ids[:count]) for string in strings)
        assert not any(string in tokenizer.decode(ids[: count - 1]) for string in strings)
        assert spelled is None or tokenizer.decode(ids[:count]) == spelled
    assert tokenizer.end_of(("wer", "\n"), ids) < tokenizer.end_of(("\n",), ids)
    assert tokenizer.end_of(("answers",), ids) == tokenizer.end_of(("\n",), []) == 0
    assert tokenizer.end_of(("the",), tokenizer.encode("the")) == len(tokenizer.encode("the"))


def test_a_unigram_model_is_refused(directory):
    """Its vocabulary holds the special tokens, which it finds in any text: a passage could end the model's turn."""
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0))
    backend.save(str(directory / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json must hold a model of type BPE; got Unigram"):
        Tokenizer(directory)


def test_tokens_that_only_the_configuration_names(directory):
    """As in transformers they are added tokens: an eos_token that tokenizer.json does not mark was read as letters."""
    transformers = pytest.importorskip("transformers")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    options = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    decoder = {
        "301": {"content": "<call>", "special": False, **options},
        "300": {"content": "<tool>", "special": True, **options},
        "0": {"content": "<|endoftext|>", "special": True, **options},
    }
    edit_config(directory, added_tokens_decoder=decoder, additional_special_tokens=["<think>", "<tool>"])
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    new = [ours.token_id(token) for token in ("<tool>", "<call>", "<think>")]
    assert ours.end_ids == (2,) and new == [*range(len(theirs) - 3, len(theirs))] and ours.vocab_size == len(theirs)
    for text in ("the<|im_end|>", "<tool> the <call> Darwin<think>the", "<|im_start|>user\n<tool>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    assert not {2, new[0], new[2]} & set(ours.encode("<|im_end|><tool><think>", allow_special=False))
    ours.save(directory / "saved")
    assert Tokenizer(directory / "saved").encode(text) == ids
