"""Chat templates: rendered as transformers would, in a child that a hostile one can't get out of or keep busy."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jinja2 import TemplateError

from mlx_ppo.data.prompts import load_prompts
from mlx_ppo.errors import DataError, ModelError
from mlx_ppo.exporting.modelfile import modelfile
from mlx_ppo.runtime.child import Child, DiedError
from mlx_ppo.tokenizers import chat_template
from mlx_ppo.tokenizers.chat_template import ChatTemplate, TemplateLimitError
from mlx_ppo.tokenizers.load import load_tokenizer

FOLDER = Path("some/model")
USER, ANSWER, AGAIN = (
    {"role": "user", "content": "  the film\n"},
    {"role": "assistant", "content": "it was good "},
    {"role": "user", "content": 'a "bad" <story> & é 🙂?'},
)
SYSTEM = {"role": "system", "content": "be brief"}
CHATS = ([USER], [USER, ANSWER, AGAIN], [SYSTEM, USER], [SYSTEM, USER, ANSWER, AGAIN, ANSWER], [USER, USER])
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% if loop.index0 % 2 != 0 %}{{ raise_exception('roles must\n  alternate, not ' ~ message.role) }}{% endif %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'assistant' %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "namespace, date, tools and loop controls": (
        "{%- set space = namespace(found=false, count=0, self='s') %}\n"
        "{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\n"
        "Today: {{ date_string }} {{ dict(a=1)['a'] }}{{ dict.fromkeys(['k'], 2) | tojson }}\n"
        "{%- if tools is not none %}\n{{ tools | tojson(indent=4) }}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- set space.count = space.count + 1 %}\n"
        "    {%- if space.count > 3 %}{% break %}{% endif %}\n"
        "{{ loop.index }}/{{ loop.length }} {{ message | tojson }} {{ message.content | tojson(ensure_ascii=true) }}\n"
        "{% generation %}{{ message.content | upper }}{% endgeneration %}\n"
        "{%- endfor %}\n{{ space.count }}{{ documents }}{{ nothing }}{{ space.self }}"
    ),
    "lines that trim_blocks and lstrip_blocks change": (
        "{% for message in messages %}\n"
        "    {% if message.role == 'user' %}\n"
        "  <u>{{ message.content }}</u>  \n"
        "    {% elif message.role == 'assistant' %}\n"
        "  <a>{{- message.content -}}  </a>\n"
        "    {% endif %}\n"
        "\t{# a note #}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}\n<a>\n{% endif %}\n"
    ),
    "macros, slices, filters and what a Llama 3 has": (
        "{% macro turn(role, text='') %}<|{{ role }}|>{{ text | replace('film', 'play') | trim }}<|end|>{% endmacro %}"
        "{{- bos_token }}{% for message in messages[-2:] %}{{ turn(message['role'], text=message.content) }}"
        "{% endfor %}{% if messages | selectattr('role', 'equalto', 'system') | list %}S{% endif %}"
        "{{ messages | map(attribute='role') | join(',') }}{{ messages[0].missing is defined }}"
        "{{ '%s-%d' % ('a', 7) }}{{ 'x'.center(5, '-') }}{{ messages[0].items() | list }}"
    ),
}  # fmt: skip
HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TODAY = "26 Jul 2024"


@pytest.fixture
def build() -> Iterator[Callable[..., ChatTemplate]]:
    made: list[ChatTemplate] = []

    def make(source: str, **names: str) -> ChatTemplate:
        made.append(ChatTemplate(FOLDER, source, names))
        return made[-1]

    yield make
    for template in made:
        template.close()


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """The tiny llama with a chat template."""

    def make(template: object) -> Path:
        target = tmp_path / "model"
        shutil.copytree(model_folder, target)
        settings = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        return target

    return make


def failure(template: ChatTemplate, kind: type[ModelError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        template.render([USER], add_generation_prompt=True)
    said = str(caught.value)
    assert type(caught.value) is kind and said.startswith("some/model: ") and said.isprintable() and len(said) < 500
    return said


def is_gone(pid: int, seconds: float = 3.0) -> bool:
    """A zombie counts as gone: where nothing adopts orphans, nothing collects them either."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(name: str, model_folder: Path, build: Callable[..., ChatTemplate]) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    template = build(TEMPLATES[name], **hf.special_tokens_map)
    rendered, refused = set(), 0
    for chat in CHATS:
        for ask in (True, False):
            options = {"chat_template": TEMPLATES[name], "tokenize": False, "add_generation_prompt": ask}
            try:
                wanted = hf.apply_chat_template(chat, date_string=TODAY, **options)
            except TemplateError as error:
                refused += 1
                words = " ".join(str(error).split())
                with pytest.raises(ModelError, match=f"^some/model: its chat template refuses.*: {words}$"):
                    template.render(chat, add_generation_prompt=ask)
            else:
                rendered.add(wanted)
                assert template.render(chat, add_generation_prompt=ask) == wanted
    assert len(rendered) >= 2 and (refused > 0) == ("raise_exception" in TEMPLATES[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_folders_tokens_are_those_of_transformers(name: str, folder: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    path = folder(TEMPLATES[name])
    hf = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    tokenizer = load_tokenizer(path, {"eos_token_id": 2})
    found = tokenizer.render_chat([USER, ANSWER, AGAIN], add_generation_prompt=True)
    chat = [USER, ANSWER, AGAIN]
    assert found == hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, date_string=TODAY)
    assert name not in ("llama 2", "mistral", "gemma") or found.count(1) == TEMPLATES[name].count("bos_token + ") + 1


def test_the_day_is_always_the_same(build: Callable[..., ChatTemplate]) -> None:
    """So that a run is the same tomorrow; it is the date that templates of Llama 3 have where they can't ask."""
    text = build("{{ strftime_now('%d %b %Y %H:%M') }}").render([USER], add_generation_prompt=False)
    assert text == "26 Jul 2024 00:00"


def test_keys_beyond_role_and_content_are_not_shown(build: Callable[..., ChatTemplate]) -> None:
    template = build("{{ messages[0] | tojson }}")
    text = template.render([{**USER, "name": "zq", "tool_calls": "x"}], add_generation_prompt=False)
    assert json.loads(text) == USER


def test_one_child_renders_everything_until_the_object_goes(build: Callable[..., ChatTemplate]) -> None:
    template = ChatTemplate(FOLDER, CHATML, {})
    assert template.pid is None
    texts = {template.render([{**USER, "content": f"\ud7ff {n}"}], add_generation_prompt=True) for n in range(300)}
    pid = template.pid
    assert pid is not None and len(texts) == 300
    long = {**USER, "content": "🙂" * 300_000}
    assert template.render([long], add_generation_prompt=False).count("🙂") == 300_000
    assert template.pid == pid
    del template
    assert is_gone(pid)


def test_a_text_may_be_longer_than_the_limit_if_its_messages_are(
    build: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CHARACTERS", 1000)
    text = build(CHATML).render([{**USER, "content": "a" * 5000}], add_generation_prompt=True)
    assert text.count("a" * 5000) == 1


@pytest.mark.parametrize(
    "source",
    [
        HANG,
        "{{ 3 ** (3 ** (3 ** 3)) }}",
        "{% set space = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% set space.n = a * b %}{% endfor %}{% endfor %}{{ space.n }}",
    ],
    ids=["loops", "one operation in C", "loops that compute"],
)
def test_a_template_that_takes_too_long_is_ended(
    source: str, build: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    template = build(source)
    assert "its chat template took longer than 0.5 s and was ended; it is broken or hostile" in failure(
        template, TemplateLimitError
    )
    assert template.pid is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system has no such limit")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ messages[0].content * 10**10 }}",
        "{% set space = namespace(a='aaaaaaaa') %}{% for i in range(60) %}{% set space.a = space.a ~ space.a %}"
        "{% endfor %}{{ space.a | length }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ [1] * 10**9 }}",
    ],
)
def test_a_template_that_wants_too_much_memory_is_ended(
    source: str, build: Callable[..., ChatTemplate], capfd: pytest.CaptureFixture[str]
) -> None:
    said = failure(build(source), TemplateLimitError)
    assert "its chat template needed more than 1024 MB of memory and was ended" in said
    assert capfd.readouterr().err == ""


def test_a_template_that_holds_too_much_is_ended_where_the_system_gives_no_limit(
    build: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on macOS, where a process is refused a limit of its memory: here the child never asks for one."""
    setting = "resource.setrlimit(kind, (size, size))"
    source = chat_template._WORKER.read_text("utf-8")
    assert setting in source
    worker = tmp_path / "worker.py"
    worker.write_text(source.replace(setting, 'raise OSError("refused")'), "utf-8")
    monkeypatch.setattr(chat_template, "_WORKER", worker)
    monkeypatch.setattr(chat_template, "MEMORY", 300 << 20)
    loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    template = build("{% set held = 'a' * 500000000 %}" + loops + "{{ held | length }}")
    said = failure(template, TemplateLimitError)
    assert "its chat template needed more than 300 MB of memory and was ended" in said
    assert template.pid is None


def test_a_template_that_writes_too_much_is_ended(build: Callable[..., ChatTemplate]) -> None:
    template = build("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}")
    said = failure(template, TemplateLimitError)
    assert "wrote more than 4000000 characters beyond the messages" in said
    assert template.pid is None


def test_after_a_limit_the_next_conversation_gets_a_new_child(
    build: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    template = build("{{ messages[0].content }}{% if messages[0].role == 'user' %}" + HANG + "{% endif %}")
    failure(template, TemplateLimitError)
    assert template.render([ANSWER], add_generation_prompt=False) == "it was good "


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no\n\x1b[31m way') }}", r"its chat template refuses this conversation: no \x1b[31m way"),
        ("{{ raise_exception('x' * 10000) }}", "refuses this conversation: xxx"),
        ("\n{% if %}", "its chat template is broken (line 2: TemplateSyntaxError: Expected an expression"),
        ("\n\n{{ messages[7].content }}", "can't render this conversation (line 3: UndefinedError: list object has no"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "its chat template is broken (RecursionError"),
        ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
        ("{{ '' }}", "writes nothing for this conversation"),
        ("{{ '\\ud800' }}", "wrote half a character"),
        ("{% include 'etc/passwd' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str'"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError: access to attribute '__init__'"),
        ("{{ raise_exception.__globals__.os }}", "SecurityError"),
        ("{{ strftime_now.__code__ }}{{ strftime_now.__globals__['os'] }}", "SecurityError"),
        ("{{ '{0.__class__}'.format(messages) }}", "writes nothing"),
        ("{{ (messages | map(attribute='__class__') | first).mro() }}", "SecurityError"),
        ("{{ messages.append(messages[0]) }}", "SecurityError: access to attribute 'append' of 'list'"),
        ("{{ messages[0].update(role='system') }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError: a namespace can't have the attribute '__class__'"),
        ("{% set s = namespace() %}{% set s._x = 1 %}", "SecurityError: a namespace can't have the attribute '_x'"),
        ("{{ dict.__call__.__globals__ }}", "SecurityError"),
    ],
)  # fmt: skip
def test_what_a_template_may_not_do_is_one_line(source: str, words: str, build: Callable[..., ChatTemplate]) -> None:
    assert words in failure(build(source))


def test_a_child_that_nobody_waits_for_ends_by_itself() -> None:
    child = Child(Path(chat_template.__file__).with_name("template_worker.py"), ["0.4", str(1 << 30), "1000"])
    try:
        assert child.exchange(b"", 30) == {"ready": True}
        request = {"template": "{{ 3 ** (3 ** (3 ** 3)) }}", "names": {}}
        with pytest.raises(DiedError, match="SIGPROF"):
            child.exchange(json.dumps(request).encode() + b"\n", 30)
    finally:
        child.end()


def test_a_child_that_is_silent_without_computing_is_ended(
    build: Callable[..., ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = build(CHATML)
    template.render([USER], add_generation_prompt=True)
    assert template.pid is not None
    os.kill(template.pid, signal.SIGSTOP)
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    assert "its chat template gave no answer within 0.6 s and was ended" in failure(template, TemplateLimitError)
    assert template.pid is None


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_no_child_outlives_the_process(how: str, tmp_path: Path) -> None:
    report = tmp_path / "pid"
    source = "{{ messages[0].content }}{% if add_generation_prompt %}" + HANG + "{% endif %}"
    code = f"""
import pathlib
from mlx_ppo.tokenizers.chat_template import ChatTemplate
template = ChatTemplate(pathlib.Path("m"), {source!r}, {{}})
template.render([{{"role": "user", "content": "x"}}], add_generation_prompt=False)
pathlib.Path({str(report)!r} + "~").write_text(str(template.pid))
pathlib.Path({str(report)!r} + "~").rename({str(report)!r})
if {how == "killed"}:
    template.render([{{"role": "user", "content": "x"}}], add_generation_prompt=True)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while not report.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = int(report.read_text())
        if how == "killed":
            time.sleep(0.1)
            assert not is_gone(pid, 0.1)
            parent.send_signal(signal.SIGKILL)
        assert parent.wait(30) == (-signal.SIGKILL if how == "killed" else 0)
    finally:
        parent.kill()
        parent.wait()
    assert is_gone(pid)


def test_a_child_that_was_killed_is_one_line_and_is_replaced(build: Callable[..., ChatTemplate]) -> None:
    template = build(CHATML)
    template.render([USER], add_generation_prompt=True)
    assert template.pid is not None
    os.kill(template.pid, signal.SIGKILL)
    assert "the process that rendered its chat template ended: killed by SIGKILL" in failure(template)
    assert template.render([USER], add_generation_prompt=True)


def test_prompts_name_the_line_that_was_not_rendered(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(TEMPLATES["gemma"] + "{% if 'slow' in messages[0].content %}" + HANG + "{% endif %}")
    tokenizer = load_tokenizer(path, {"eos_token_id": 2})
    rows = [{"prompt": [USER]}, {"messages": [SYSTEM, USER]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        load_prompts(file, tokenizer, max_tokens=400, overlong="drop")
    where = f"{file}:2: {path}: its chat template"
    assert str(caught.value) == f"{where} refuses this conversation: System role not supported"
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    slow = {**USER, "content": "slow"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": [USER]}, {"prompt": [slow]}]))
    with pytest.raises(DataError) as caught:
        load_prompts(file, tokenizer, max_tokens=400, overlong="drop")
    assert str(caught.value).startswith(f"{where} took longer than 0.5 s and was ended")


def test_a_modelfile_is_not_worth_a_hang(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "_PATIENCE", 200.0)  # the machine may be busy
    for source in (HANG, CHATML + "{% if messages | length > 3 %}" + HANG + "{% endif %}"):
        path = folder(source)
        with pytest.raises(TemplateLimitError, match=r"model: its chat template took longer than 0\.5 s"):
            modelfile("a.gguf", load_tokenizer(path, {"eos_token_id": 2}), temperature=1.0)
        shutil.rmtree(path)


def test_of_several_templates_the_default_counts(folder: Callable[..., Path]) -> None:
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    tokenizer = load_tokenizer(folder(both), {"eos_token_id": 2})
    assert (
        tokenizer.decode(tokenizer.render_chat([AGAIN | {"content": "the film"}], add_generation_prompt=True))
        == "the film"
    )


def test_templates_without_a_default_are_refused(folder: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"model: several chat templates \('rag', 'tool_use'\) and no 'default' one"):
        load_tokenizer(
            folder([{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]), {"eos_token_id": 2}
        )


def test_a_template_of_megabytes_is_refused() -> None:
    with pytest.raises(ModelError, match="its chat template has 2000000 characters, more than 1000000"):
        ChatTemplate(FOLDER, "ab" * 1_000_000, {})


def test_a_template_that_is_no_text_is_refused(folder: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"'chat_template' must be a text, not '5'"):
        load_tokenizer(folder(5), {"eos_token_id": 2})
