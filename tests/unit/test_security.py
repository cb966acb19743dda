"""What strangers may have written, templates, configs, folders, gets no power over the machine."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from cs336_alignment.data import chat
from cs336_alignment.data.chat import ChatRenderer
from cs336_alignment.errors import ExitStatus, Place, UserError
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import TINY, Sft

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tokenizer_with(template: str) -> object:
    tokenizer = copy.deepcopy(load_tokenizer(resolve_model("builtin:arithmetic", None, False)))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}",
        "{{ range(10**9) | list }}", "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
    ],
)  # fmt: skip
def test_a_template_cannot_leave_its_sandbox(escape: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatRenderer(tokenizer_with(PLAIN + escape), "response").render(TURNS, None, Place("x", 1))  # type: ignore[arg-type]
    assert caught.value.status in (ExitStatus.BAD_DATA, ExitStatus.BAD_CONFIG)


def test_a_template_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        ChatRenderer(tokenizer_with(PLAIN + "{# " + "x" * chat.MOST_TEMPLATE + " #}"), "response")  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.status) == ("D409", ExitStatus.BAD_CONFIG)
    monkeypatch.setattr(chat, "MOST_RENDERED", 1000)
    with pytest.raises(UserError) as caught:
        ChatRenderer(tokenizer_with(PLAIN + "{{ 'a' * 2000 }}"), "response").render(  # type: ignore[arg-type]
            TURNS, None, Place("x", 1)
        )
    assert (caught.value.code, caught.value.status) == ("D411", ExitStatus.BAD_DATA)


@pytest.mark.parametrize(
    "override", ["+model._target_=os.system", "+_target_=os.system", "model={_target_: os.system}"]
)
def test_no_config_names_code(override: str, sft: Sft, rows: Path) -> None:
    done = sft("train", *TINY, f"data.train_path={rows}", "run_name=r", override)
    assert done.returncode == 78
    assert "error[C101]" in done.stderr and "Traceback" not in done.stderr


def test_code_from_a_hub_needs_a_pinned_commit(sft: Sft, rows: Path) -> None:
    for revision in ("null", "main", "v1.0", "a" * 39):
        done = sft("train", *TINY, f"data.train_path={rows}", "run_name=r",
                   "model.trust_remote_code=true", f"model.revision={revision}")  # fmt: skip
        assert done.returncode == 78 and "pinned commit" in done.stderr
