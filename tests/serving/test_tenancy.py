"""API keys: known ones are found, others refused, and lists of tenants that cannot be right are accepted at no time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import pytest
import yaml
from musicgen_serving import tenancy
from musicgen_serving.errors import UnauthenticatedError, report
from musicgen_serving.settings import AccessSettings, load_settings
from musicgen_serving.tenancy import LiveTenancy, Tenancy, hash_key, new_key

from musicgen.errors import InvalidRequestError


def tenant(name: str, *keys: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "key_sha256": [hash_key(key) for key in keys], **fields}


def access(*tenants: dict[str, Any], **fields: Any) -> AccessSettings:
    return AccessSettings.model_validate({"tenants": list(tenants), **fields})


def test_keys_are_long_and_different_and_hashed_with_sha256() -> None:
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50
    assert min(map(len, keys)) >= 43
    key = keys.pop()
    assert hash_key(key) == hashlib.sha256(key.encode()).hexdigest()


def test_each_key_finds_its_tenant() -> None:
    found = Tenancy(
        access(
            tenant("a", "key-1", "key-2", weight=2.0, priority=-1, tenant_class="paid", models=["demo"]),
            tenant("b", "key-3", max_duration_s=30.0),
        )
    )
    a = found.authenticate("key-1")
    assert (a.name, a.tenant_class, a.weight, a.priority, a.models) == ("a", "paid", 2.0, -1, frozenset({"demo"}))
    assert found.authenticate("key-2") == a
    b = found.authenticate("key-3")
    assert (b.name, b.models, b.max_duration_s) == ("b", None, 30.0)
    assert found.settings_of("b").max_duration_s == 30.0


@pytest.mark.parametrize("key", [None, "", "key-", "key-1 ", "KEY-1", "ключ", "\ud800", "x" * 10_000])
def test_other_keys_are_refused_without_being_named(key: str | None) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        Tenancy(access(tenant("a", "key-1"))).authenticate(key)
    assert report(caught.value).http_status == 401
    assert not key or key not in str(caught.value)


def test_the_hash_is_no_key() -> None:
    with pytest.raises(UnauthenticatedError):
        Tenancy(access(tenant("a", "key-1"))).authenticate(hash_key("key-1"))


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(known: str, given: str) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, given)

    keys = ["key-1", "key-2", "key-3"]
    found = Tenancy(access(tenant("a", *keys)))
    monkeypatch.setattr(tenancy, "hmac", type("Recorder", (), {"compare_digest": staticmethod(compare)}))
    found.authenticate("key-1")
    assert compared == [hash_key(key) for key in keys]


def test_open_mode_takes_anyone_and_checks_a_key_where_keys_exist() -> None:
    nobody = Tenancy(AccessSettings(open=True))
    assert nobody.authenticate(None).name == "anonymous"
    assert nobody.authenticate("whatever a client sends").name == "anonymous"
    both = Tenancy(access(tenant("a", "key-1"), open=True))
    assert both.authenticate(None).name == both.authenticate("").name == "anonymous"
    assert both.authenticate("key-1").name == "a"
    with pytest.raises(UnauthenticatedError):
        both.authenticate("key-2")


def test_tenants_of_a_file_join_those_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump([tenant("b", "key-2", requests_per_minute=3)]))
    found = Tenancy(access(tenant("a", "key-1"), tenants_file=file))
    assert found.authenticate("key-1").name == "a"
    assert found.authenticate("key-2").name == "b"
    assert found.settings_of("b").requests_per_minute == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "readable"),
        ("", "list"),
        ("name: a", "list"),
        ("- name: a\n  wieght: 2", "0.wieght"),
        ("- name: a\n  weight: 0", "0.weight"),
        ("- name: a\n  key_sha256: [secret-key]", "hash-key"),
        ("- name: a\n  key_sha256: ['" + "0" * 64 + "']\n- name: a", "more than once"),
        ("- name: b\n  key_sha256: ['" + hash_key("key-1") + "']", "twice"),
        ("- name: listed", "more than once"),
    ],
)
def test_a_wrong_file_is_refused_and_its_content_not_shown(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        Tenancy(access(tenant("listed", "key-1"), tenants_file=file))
    assert "secret-key" not in str(caught.value)
    assert caught.value.__cause__ is None or "secret-key" not in str(caught.value.__cause__)


def test_a_file_that_is_not_there_and_tenants_nobody_can_be() -> None:
    with pytest.raises(InvalidRequestError, match="tenants_file"):
        Tenancy(AccessSettings(tenants_file=Path("not-there.yaml")))
    with pytest.raises(InvalidRequestError, match="with a key"):
        Tenancy(access(tenant("a")))
    with pytest.raises(InvalidRequestError, match="more than once"):
        Tenancy(access(tenant("anonymous", "key-1"), open=True))
    with pytest.raises(InvalidRequestError, match="no keys"):
        Tenancy(access(anonymous=tenant("anonymous", "key-1"), open=True))


def test_the_environment_can_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump([tenant("b", "key-2")]))
    monkeypatch.setenv("MUSICGEN_ACCESS__TENANTS_FILE", str(file))
    monkeypatch.setenv("MUSICGEN_ACCESS__OPEN", "false")
    found = Tenancy(load_settings({}).access)
    assert found.authenticate("key-2").name == "b"
    with pytest.raises(UnauthenticatedError):
        found.authenticate(None)


def test_a_tenant_that_is_gone_is_not_known() -> None:
    with pytest.raises(UnauthenticatedError):
        Tenancy(AccessSettings(open=True)).settings_of("a")


def write(file: Path, *tenants: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(list(tenants)))


def settle(live: LiveTenancy) -> None:
    for _ in range(3):
        live.look()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.yaml"


def test_a_list_that_changes_is_in_force_from_a_look_on(file: Path) -> None:
    write(file, tenant("a", "key-1"), tenant("b", "key-2", weight=1.0))
    live = LiveTenancy(access(tenant("listed", "key-0"), tenants_file=file))
    write(file, tenant("b", "key-2", "key-3", weight=5.0, models=["demo"]), tenant("c", "key-4"))
    assert live.now.authenticate("key-1").name == "a", "nothing changes before a look"
    before = live.now
    settle(live)
    with pytest.raises(UnauthenticatedError):
        live.now.authenticate("key-1")
    with pytest.raises(UnauthenticatedError):
        live.now.settings_of("a")
    assert live.now.authenticate("key-0").name == "listed"
    assert live.now.authenticate("key-4").name == "c"
    b = live.now.authenticate("key-3")
    assert (b.name, b.weight, b.models) == ("b", 5.0, frozenset({"demo"}))
    assert live.now.settings_of("b").weight == 5.0
    assert before.settings_of("a").name == "a", "whoever asked the old list goes on with it"
    assert not live.is_stale


def test_the_file_of_a_swapped_folder_is_read(tmp_path: Path) -> None:
    for folder, key in (("old", "key-1"), ("new", "key-2")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "tenants.yaml", tenant("a", key))
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "tenants.yaml").symlink_to("..data/tenants.yaml")
    live = LiveTenancy(AccessSettings(tenants_file=tmp_path / "tenants.yaml"))
    (tmp_path / "..data_tmp").symlink_to("new")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    settle(live)
    assert live.now.authenticate("key-2").name == "a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("a: [", "readable"),
        ("[" * 1000, "readable"),
        ("- name: !!bool perhaps", "readable"),
        ("\xff", "readable"),
        ("- name: a\n  wieght: 2", "0.wieght"),
        ("- name: a\n  " + "f" * 64 + ": 2", "0...."),
        ("- name: a\n  key_sha256: [secret-key]", "hash-key"),
        (yaml.safe_dump([tenant("a", "key-1"), tenant("a", "key-2")]), "more than once"),
        (yaml.safe_dump([tenant("a", "key-1"), tenant("b", "key-1")]), "twice"),
        ("[]", "a tenant with a key"),
        ("- name: a", "a tenant with a key"),
    ],
)
def test_a_list_that_cannot_be_used_leaves_the_old_one_in_force(
    file: Path, text: str | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(file, tenant("a", "key-1"))
    live = LiveTenancy(AccessSettings(tenants_file=file))
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="latin-1")
    settle(live)
    assert live.is_stale
    assert live.now.authenticate("key-1").name == "a"
    settle(live)
    (line,) = caplog.messages
    assert "keeping the previous list" in line
    assert words in line
    assert not any(secret in caplog.text for secret in ("secret-key", hash_key("key-1"), "f" * 64))
    write(file, tenant("a", "key-1"))  # as it was
    settle(live)
    assert not live.is_stale
    write(file, tenant("a", "key-2"), tenant("b"))
    settle(live)
    assert live.now.authenticate("key-2").name == "a"
    assert [text.partition(": ")[2] for text in caplog.messages[1:]] == [
        "1 tenants, 0 of them new or changed; 0 removed",
        "2 tenants, 2 of them new or changed; 0 removed",
    ]
    assert hash_key("key-2") not in caplog.text


def test_without_a_file_nothing_changes() -> None:
    live = LiveTenancy(access(tenant("a", "key-1")))
    before = live.now
    settle(live)
    assert live.now is before
    assert not live.is_stale
