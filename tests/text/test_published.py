"""What the published checkpoints R3-RAG-Qwen and R3-RAG-Llama were trained on, typed out, against ours byte for byte.

Their cold start wrapped each step in ChatML with the system turn "You are a helpful assistant.", or in Llama-3
headers without one. The models' own templates say something else there, so `model.chat_template` chooses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from r3rag_jax.components import Components
from r3rag_jax.config import Config, ModelConfig, RetrievalConfig, RolloutConfig
from r3rag_jax.errors import UserError
from r3rag_jax.text.chat_template import read_template
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Transcript, teacher_samples
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

# What the real tokenizer_config.json hold of conversations without tools, in the real wording.
QWEN_OWN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_OWN = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SPECIALS = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
SETTINGS = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": QWEN_OWN},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA_OWN},
}
TEMPLATE = {"qwen": "chatml", "llama": "llama3"}

# Words that begin or end in n, which the released strip("\\n") shortened, and marks that end a line.
QUESTION = "Was the naturalist Darwin, born in Britain, an American?"
STEPS = (
    Step(
        "naming Darwin: I need the nation in which Charles Darwin was born.",
        query="In which nation was Charles Darwin born? When?",
        passages=(
            Passage("a", '"Charles Darwin"\nCharles Darwin was an English naturalist, born in Shrewsbury.'),
            Passage("b", '"Darwin (surname)"\nDarwin is an English surname.'),
        ),
    ),
    Step(
        "Shrewsbury is a town. I need its nation.",
        query="Shrewsbury location",
        passages=(Passage("c", '"Shrewsbury"\nShrewsbury is a town in Shropshire, England.'),),
    ),
    Step("He was born in England,\nso he was no American.", answer="no American"),
)

# ------------------------------------------------------------------------------ typed out, whole

QWEN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?<|im_end|>\n"
    "<|im_start|>assistant\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?<|im_end|>",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?\n"
    'The retrieval documents: "Charles Darwin"\n'
    "Charles Darwin was an English naturalist, born in Shrewsbury.\n"
    '"Darwin (surname)"\n'
    "Darwin is an English surname.<|im_end|>\n"
    "<|im_start|>assistant\n"
    "Step 2:\n"
    "The problem analysis: Shrewsbury is a town. I need its nation.\n"
    "The retrieval query: Shrewsbury location<|im_end|>",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?\n"
    'The retrieval documents: "Charles Darwin"\n'
    "Charles Darwin was an English naturalist, born in Shrewsbury.\n"
    '"Darwin (surname)"\n'
    "Darwin is an English surname.\n"
    "Step 2:\n"
    "The problem analysis: Shrewsbury is a town. I need its nation.\n"
    "The retrieval query: Shrewsbury location\n"
    'The retrieval documents: "Shrewsbury"\n'
    "Shrewsbury is a town in Shropshire, England.<|im_end|>\n"
    "<|im_start|>assistant\n"
    "Step 3:\n"
    "The problem analysis: He was born in England,\nso he was no American.\n"
    "The final answer: no American<|im_end|>",
)
LLAMA = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?<|eot_id|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?\n"
    'The retrieval documents: "Charles Darwin"\n'
    "Charles Darwin was an English naturalist, born in Shrewsbury.\n"
    '"Darwin (surname)"\n'
    "Darwin is an English surname.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "Step 2:\n"
    "The problem analysis: Shrewsbury is a town. I need its nation.\n"
    "The retrieval query: Shrewsbury location<|eot_id|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    "The question: Was the naturalist Darwin, born in Britain, an American?\n"
    "Step 1:\n"
    "The problem analysis: naming Darwin: I need the nation in which Charles Darwin was born.\n"
    "The retrieval query: In which nation was Charles Darwin born? When?\n"
    'The retrieval documents: "Charles Darwin"\n'
    "Charles Darwin was an English naturalist, born in Shrewsbury.\n"
    '"Darwin (surname)"\n'
    "Darwin is an English surname.\n"
    "Step 2:\n"
    "The problem analysis: Shrewsbury is a town. I need its nation.\n"
    "The retrieval query: Shrewsbury location\n"
    'The retrieval documents: "Shrewsbury"\n'
    "Shrewsbury is a town in Shropshire, England.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    "Step 3:\n"
    "The problem analysis: He was born in England,\nso he was no American.\n"
    "The final answer: no American<|eot_id|>",
)
PUBLISHED = {"qwen": QWEN, "llama": LLAMA}


@pytest.fixture(scope="module", params=["qwen", "llama"])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes and the model's special tokens, with the chat template that its directory comes with."""
    path = tmp_path_factory.mktemp(model)
    tiny.tokenizer(path, SPECIALS[model])
    (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[model]))
    (path / "config.json").write_text(json.dumps(tiny.decoder_config(Tokenizer(path).vocab_size)))
    return path


def open_components(directory: Path, chat_template: str, run_dir: Path) -> Components:
    return Components(
        Config(
            model=ModelConfig(path=str(directory), chat_template=chat_template),
            retrieval=RetrievalConfig(passage_tokens=128),
            rollout=RolloutConfig(protocol="steps"),
        ),
        run_dir,
    )


def test_the_cold_start_trains_on_the_published_text(model: str, directory: Path, tmp_path: Path) -> None:
    codec = open_components(directory, TEMPLATE[model], tmp_path).codec
    trajectory = Trajectory(Question("q", QUESTION, ("no American",)), STEPS, Status.ANSWERED)
    samples = teacher_samples(codec, trajectory)
    assert [codec.tokenizer.decode(sample.ids) for sample in samples] == list(PUBLISHED[model])
    for number, (sample, text) in enumerate(zip(samples, PUBLISHED[model], strict=True), 1):
        learnt = codec.tokenizer.decode(sample.ids[sample.loss_mask])
        assert learnt == text[text.rindex(f"Step {number}:") :]
        assert sample.ids[-1] == codec.turn_end_id and sample.loss_mask[-1]


def test_a_rollout_reads_the_published_prompts_and_its_steps_back(model: str, directory: Path, tmp_path: Path) -> None:
    codec = open_components(directory, TEMPLATE[model], tmp_path).codec
    steps, transcript = make_protocol("steps"), Transcript(codec, QUESTION)
    for number, (step, text) in enumerate(zip(STEPS, PUBLISHED[model], strict=True), 1):
        prompt = codec.tokenizer.decode(transcript.context)
        written = text.removeprefix(prompt)
        assert prompt + written == text and written.startswith(f"Step {number}:\n")
        read = codec.parse_step(codec.tokenizer.encode(written), number)
        assert (read.analysis, read.query, read.answer) == (step.analysis, step.query, step.answer)
        assert steps.render_step(read, number) == steps.render_step(step, number)
        transcript.write(codec.tokenizer.encode(written))
        transcript.add_passages(step.passages)


OWN = {
    "qwen": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
BRIEF = {
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
}


def test_the_models_own_templates_say_something_else(model: str, directory: Path, tmp_path: Path) -> None:
    tokenizer = open_components(directory, "", tmp_path).policy.tokenizer
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == OWN[model]


def test_a_system_turn_that_is_given_stays(model: str, directory: Path, tmp_path: Path) -> None:
    tokenizer = open_components(directory, TEMPLATE[model], tmp_path).policy.tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == BRIEF[model]


def test_an_exported_policy_keeps_the_template_it_was_trained_under(
    model: str, directory: Path, tmp_path: Path
) -> None:
    chosen = open_components(directory, TEMPLATE[model], tmp_path).policy.tokenizer
    chosen.save(tmp_path / "out")
    messages = [{"role": "user", "content": QUESTION}]
    want = chosen.render_chat(messages)
    assert Tokenizer(tmp_path / "out").render_chat(messages) == want
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == want


def test_a_template_of_ones_own(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    own = open_components(directory, str(tmp_path / "own.jinja"), tmp_path).policy.tokenizer
    assert own.render_chat([{"role": "user", "content": "Hi"}]) == "[Hi]"
    with pytest.raises(UserError, match=r"model\.chat_template must be chatml, llama3 or a Jinja file; got chatlm$"):
        read_template("chatlm")
