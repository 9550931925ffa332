"""A published folder speaks in its own chat template, and nobody's words become its control tokens."""

import json
import pickle
import subprocess
import sys

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import CHATML, KINDS, byte_level, folder_of

from lladax.data import template, tokenizer
from lladax.mistake import Mistake

THINKS = (  # what was thought before earlier replies is left out
  "{%- for m in messages %}{%- set text = m.content %}{%- if m.role == 'assistant' and '</think>' in text %}"
  "{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
  "{{- '<|im_start|>' + m.role + '\\n' }}"
  "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
  "{{- text + '<|im_end|>\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
  "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
  "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
  "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
  "{% if messages[0].role == 'system' %}{{ raise_exception('System role is\nnot supported') }}{% endif %}"
  "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
  "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
  "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LING = (
  "{% set names = {'user': 'HUMAN', 'system': 'SYSTEM', 'assistant': 'ASSISTANT', 'tool': 'OBSERVATION'} %}"
  "{% for m in messages %}<role>{{ names[m.role] }}</role>{{ m.content }}<|role_end|>{% endfor %}"
  "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
PHI = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SHAPES = {
  "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
  "thinks": (THINKS, ["<|im_start|>", "<|im_end|>", "+<think>", "+</think>"], "<|im_end|>"),
  "llama-3": ("{# ours? #}dated 2024{{ '\n' }}" + LLAMA3, ["<|x|>"], "<|eot_id|>"),
  "llama-2": (LLAMA2, [], "</s>"),
  "ling": (LING, ["+<role>", "+</role>", "+<|role_end|>"], "<|role_end|>"),
  "phi": (PHI, ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"], "<|end|>"),
}


def read(path, ends=()):
  config = tokenizer.TokenizerConfig("huggingface", str(path / "tokenizer.json"), eos="</s>", mask="<|mdm_mask|>")
  return tokenizer.published(config, ends)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """folders(kind, shape) -> its folder."""
  root = tmp_path_factory.mktemp("published")

  def make(kind, shape):
    return folder_of(root / kind / shape, kind, *SHAPES[shape][:2])

  return make


def said(source, messages, ask):
  """The rendering, by Jinja alone."""

  def raise_exception(message):
    raise AssertionError(message)

  environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = raise_exception
  render = environment.from_string(source).render
  return render(messages=messages, add_generation_prompt=ask, bos_token="<s>", eos_token="</s>")


def talk(*texts):
  return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TALKS = [
  talk("The king"), talk("  is \n", "Paris.\n", "\n\nThe"), talk("<a> > b <", "秦川 😀", "<"), talk("", "x", ""),
  talk("a", "<think>\nb\n</think>\n\nc", "d"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_the_template_in_one_go(folders, kind, shape):
  """What Hugging Face makes of a conversation."""
  path = folders(kind, shape)
  text, raw = read(path), tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
  for messages in TALKS:
    for ask in (True, False):
      wanted = raw.encode(said(SHAPES[shape][0], messages, ask), add_special_tokens=False).ids
      assert text.chat(messages, ask) == wanted, messages
  assert text.template is not None and text.vocab_size == raw.get_vocab_size()  # nothing was appended
  assert text.eot_id == raw.token_to_id(SHAPES[shape][2])
  assert text.ends == tuple(dict.fromkeys([text.eos_id, text.eot_id]))


@pytest.mark.parametrize("kind", ["prepend", "bytes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_message_cannot_spell_a_control_token(folders, kind, shape):
  text = read(folders(kind, shape))
  source, names, end = SHAPES[shape]
  names = [name.lstrip("+") for name in names if "think" not in name] + ["</s>", "<s>", "<|mdm_mask|>", "<|eot_id|>"]
  control = {text._vocabulary.find(name) for name in names}

  def structure(messages):
    return [id for id in text.chat(messages) if id in control]

  plain = structure(talk("a", "b", "c"))
  for name in names:
    half = len(name) // 2
    for words in (
      [name, "b", "c"], ["a", f"x{name * 2}", "c"], ["a", "b", f" {name[0]}{name}\n"], [name[:half], name[half:], "c"],
      [name[:half], "b", name[half:]],
    ):  # fmt: skip
      assert structure(talk(*words)) == plain, words
    spelled = text.decode(text.chat(talk(f"x{name}y", "b", "c")), skip_special=False)
    assert f"x{name}y" in spelled.replace(" ", "")
    prompt, reply = text.turn(talk("a", f"x{name}y"))
    assert [id for id in reply if id in control] == [text.eot_id] and f"x{name}y" in text.decode(reply, behind=prompt)


ADJACENT = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(words=st.lists(st.text(st.sampled_from("<|im_end>sx/ \n>"), max_size=12), min_size=1, max_size=4))
def test_no_messages_together_spell_one_either(tmp_path_factory, words):
  path = tmp_path_factory.getbasetemp() / "adjacent"
  text = read(path if path.exists() else folder_of(path, "bytes", ADJACENT, ["<|im_end|>"]))
  messages = [{"role": "user", "content": word} for word in words]
  ids = text.chat(messages)
  assert [id for id in ids if id in text._special] == [text.eot_id]
  assert text.decode(ids) == "".join(words)


def test_what_a_normalizer_makes_a_control_token_is_text(tmp_path):
  """In an uncased vocabulary <|IM_END|> is <|im_end|>."""
  text = read(folder_of(tmp_path, "bytes", CHATML, ["<|im_start|>", "<|im_end|>"], lowercase=True))
  raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  end = raw.token_to_id("<|im_end|>")
  assert end in raw.encode("a<|IM_END|>").ids
  for words in ("<|IM_END|>", "a <|Im_End|><|IM_END|>b", "<|im_END|>"):
    ids = text.chat(talk(words))
    assert ids.count(end) == 1 and text.decode(ids) == f"user\n{words.lower()}\nassistant\n"


def test_thinking_is_left_out_as_the_template_says(folders):
  text = read(folders("bytes", "thinks"))
  whole = text.decode(text.chat(talk("a", "<think>\nhm <|im_end|>\n</think>\n\nb", "c")))
  assert whole == "user\na\nassistant\nb\nuser\nc\nassistant\n"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_reply_is_learnt_as_it_is_asked_for(folders, kind, shape):
  """The prompt is `chat`'s, the reply ends with the token that ends one, and the two are what the template says."""
  text = read(folders(kind, shape))
  for messages in (talk("The king", "Paris."), talk("a", "b", " c", "d\n\ne 😀")):
    prompt, reply = text.turn(messages)
    assert prompt == text.chat(messages[:-1])
    assert reply[-1] == text.eot_id and text.eot_id not in reply[:-1]
    whole, spelled = text.decode(text.chat(messages, ask=False)), text.decode(prompt + reply)
    assert whole.rstrip() == spelled.rstrip() and text.decode(reply, behind=prompt).strip().endswith(
      messages[-1]["content"]
    )


def test_a_template_that_asks_otherwise_than_it_writes(tmp_path):
  source = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
  text = read(folder_of(tmp_path, "bytes", source, ["<|im_start|>", "<|im_end|>"]))
  prompt, reply = text.turn(talk("a", " b<|im_end|> "))
  assert text.decode(prompt).endswith("<think>\n") and text.decode(reply) == "b<|im_end|>"
  assert reply[-1] == text.eot_id and reply.count(text.eot_id) == 1


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_where_a_template_may_lie(tmp_path, where):
  text = read(folder_of(tmp_path, "bytes", CHATML, ["<|im_start|>", "<|im_end|>"], where))
  assert text.template is not None and text.template.source == CHATML


def test_of_several_the_default_is_taken(tmp_path):
  several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
  assert read(folder_of(tmp_path, "bytes", several, ["<|im_start|>", "<|im_end|>"])).template.source == CHATML
  text = read(folder_of(tmp_path, "bytes", several[:1], []))
  with pytest.raises(Mistake, match="tokenizer_config.json has templates for tool_use, and no 'default'$"):
    text.chat(talk("a"))


@pytest.mark.parametrize("source", [LLAMA3, LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}"), None])
def test_lladas_own_template_is_llada(tmp_path, source):
  """A template that says the same, or LLaDA's chat tokens and no template: the tokenizer is what it always was."""
  text = read(folder_of(tmp_path, "bytes", source, []))
  config = tokenizer.TokenizerConfig("huggingface", str(tmp_path), eos="</s>", mask="<|mdm_mask|>")
  ours = tokenizer.create(config)
  assert text.template is None and text.fingerprint == ours.fingerprint
  assert text.chat(talk("a", "b", " c ")) == ours.chat(talk("a", "b", " c "))
  assert text.ends == ours.ends == (text.eos_id, text.eot_id)
  with pytest.raises(Mistake, match="role 'tool': use system, user, assistant"):
    text.chat([{"role": "tool", "content": ""}])


def test_without_a_template_there_is_no_chat(tmp_path):
  model = tokenizers.Tokenizer.from_str(byte_level(False)[1].decode())
  raw = json.loads(model.to_str())
  raw["added_tokens"] = [x for x in raw["added_tokens"] if "header" not in x["content"] and "eot" not in x["content"]]
  (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
  text = read(tmp_path, ends=[3])
  with pytest.raises(Mistake, match=r"^a conversation: this model has no chat template, nor LLaDA's chat tokens"):
    text.chat(talk("a"))
  assert text.eot_id is None and text.ends == (text.eos_id, 3)
  assert text.vocab_size == 1 + max(x["id"] for x in raw["added_tokens"])


BROKEN = {
  "{% for m in messages %}": "Unexpected end of template",
  "{{ raise_exception('no\n  system') }}": "on these 1 messages: no system",
  "{{ messages[0].content + 1 }}": "can only concatenate str",
  "{{ messages.append(1) }}": "append",  # the sandbox: nothing that was given may be changed
  "{{ ''.__class__.__mro__ }}": "unsafe",
  "{{ cycler.__init__.__globals__ }}": "unsafe",
  "{{ messages[0].nothing.at_all }}": "has no attribute",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_template_that_fails_is_one_line(tmp_path, source):
  text = read(folder_of(tmp_path, "bytes", source, []))  # the model can be loaded: it may be used without
  with pytest.raises(Mistake, match="^the model's chat template fails on these 1 messages: ") as error:
    text.chat(talk("a"))
  assert BROKEN[source] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("message", [{"content": "a"}, {"role": "user<|im_end|>", "content": ""}, {"role": 3}, "a"])
def test_a_role_is_a_word(folders, message):
  with pytest.raises(Mistake, match="^a message of role .*: a role is one word$"):
    read(folders("bytes", "chatml")).chat([message])


def test_roles_are_the_templates_matter(folders):
  text = read(folders("bytes", "ling"))
  assert "OBSERVATION" in text.decode(text.chat([{"role": "tool", "content": "x", "name": "f"}]))
  with pytest.raises(Mistake, match="lone surrogate"):
    text.chat(talk("a\ud800"))


def test_what_templates_are_given(tmp_path):
  source = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    "{{ tools is none }}{{ bos_token }}"
  )
  text = read(folder_of(tmp_path, "bytes", source, []))
  message = {"role": "user", "content": "<&é</s>", "parts": [{"type": "text", "text": "</s>"}]}
  ids = text.chat([{"role": "tool"}, message])
  assert text.decode(ids, skip_special=False) == json.dumps(message, ensure_ascii=False) + "4True<s>"
  assert ids.count(text.eos_id) == 0


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("tokenizer_config.json", "{", "tokenizer_config.json is no JSON"),
    ("tokenizer_config.json", '{"a":' * 10**5 + "1" + "}" * 10**5, "is no JSON that can be read: its .* too deep"),
    ("tokenizer_config.json", "[1]", "tokenizer_config.json is no JSON object but list"),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is no text but int"),
  ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
  (folder_of(tmp_path, "bytes", CHATML, []) / name).write_text(content)
  with pytest.raises(Mistake, match=said) as error:
    read(tmp_path)
  assert "\n" not in str(error.value)


def test_the_template_is_saved_and_fingerprinted(folders, tmp_path):
  text = read(folders("prepend", "chatml"), ends=[7])
  text.save(tmp_path)
  for again in (tokenizer.load(tmp_path), pickle.loads(pickle.dumps(text))):
    assert again.fingerprint == text.fingerprint and again.ends == text.ends == (text.eos_id, text.eot_id, 7)
    assert again.chat(TALKS[1]) == text.chat(TALKS[1]) and again.turn(TALKS[1][:2]) == text.turn(TALKS[1][:2])
  other = read(folder_of(tmp_path / "other", "prepend", CHATML + " ", SHAPES["chatml"][1]))
  assert other.fingerprint != text.fingerprint


def test_jinja_is_read_by_those_who_need_it():
  code = "import sys; from lladax.data import tokenizer, template; print('jinja2' in sys.modules, template.SEAM)"
  assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.startswith(b"False")


def test_noncharacters_do_not_cut(folders):
  text = read(folders("bytes", "chatml"))
  assert "a\ufffdb" in text.decode(text.chat(talk(f"a{template.SEAM}b")))


@pytest.mark.parametrize(
  "source",
  [
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    pytest.param(
      "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
      marks=pytest.mark.slow,
    ),
    "{{ 'a' * 10 ** 10 }}", "{{ ('a' * 99999) * 99999 }}", "{{ 9 ** 9 ** 9 }}", "{{ 'a'.center(10 ** 5 * 9999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ range(10 ** 5)|list * 99999 }}",
  ],
)  # fmt: skip
def test_a_template_has_an_end(source):
  with pytest.raises(Mistake, match="the model's chat template fails on these 1 messages"):
    template.Template(source, {}).render([{"role": "user", "content": "x"}], True, ())
