"""API keys and salts: who gets in, and that no tenant's pages can be another's."""

import json
from collections.abc import Iterator

import pytest

from kvd.errors import SettingsError
from kvd.router.tenants import ANYBODY, Tenant, Tenants, Unsaltable, digest
from tests.router_harness import MockWorker, Router, post, until

SECRET = b"0123456789abcdef"
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob", "root": "key-of-root"}


def sections(**more: object) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {
        name: {"sha256": [digest(key.encode()).hex()]} for name, key in KEYS.items()
    }
    found["root"] |= {"admin": True, "shared": True}
    found["alice"] |= more
    return found


@pytest.fixture
def tenants() -> Tenants:
    return Tenants.read(sections(weight=2.0), SECRET)


def test_a_key_is_a_tenant(tenants: Tenants) -> None:
    assert tenants.who({b"authorization": b"Bearer key-of-alice"}) == Tenant("alice", 2.0)
    assert tenants.who({b"authorization": b"bearer key-of-alice"}) == Tenant("alice", 2.0)
    found = tenants.who({b"x-api-key": b"key-of-bob"})
    assert found is not None
    assert found.name == "bob"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Bearer key-of-alic"},
        {b"authorization": b"Basic key-of-alice"},
        {b"x-api-key": digest(b"key-of-alice").hex().encode()},
    ],
)
def test_anything_else_is_nobody(tenants: Tenants, headers: dict[bytes, bytes]) -> None:
    assert tenants.who(headers) is None


@pytest.mark.parametrize(
    "headers",
    [{}, {b"authorization": b"Bearer"}, {b"authorization": b"bearer \t "}, {b"x-api-key": b""}, {b"x-api-key": b" "}],
)
def test_who_has_no_key_is_nobody_whatever_digests_are_known(headers: dict[bytes, bytes]) -> None:
    assert Tenants([(digest(b""), Tenant("root", admin=True))], SECRET).who(headers) is None


def test_without_keys_everybody_is_anybody() -> None:
    assert Tenants([], b"").who({}) is ANYBODY


@pytest.mark.parametrize(
    ("file", "secret", "says"),
    [
        (sections(wait=1), SECRET, "wait"),
        (sections(admn=True), SECRET, "where wanted weight = 1.0, priority = 0"),
        (sections(priority="high"), SECRET, "where wanted weight = 1.0, priority = 0"),
        (sections(weight=0), SECRET, "weight"),
        (sections(sha256=["abc"]), SECRET, "alice"),
        (sections(sha256=[]), SECRET, "64 digits"),
        (sections(sha256=[digest(b"key-of-bob").hex()]), SECRET, "two tenants"),
        (sections(sha256=[digest(b"another").hex(), digest(b"").hex().upper()]), SECRET, "alice: a digest is that of"),
        (sections(), b"short", "tenants.secret_file holds 5 bytes"),
        (sections(), b"", "set tenants.secret_file"),
    ],
)
def test_a_wrong_file_of_keys_is_named(file: dict[str, object], secret: bytes, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Tenants.read(file, secret)
    assert says in str(caught.value)
    assert caught.value.hint


def salt_in(body: bytes) -> object:
    return json.loads(body)["cache_salt"]


def test_tenants_salts_differ_and_last(tenants: Tenants) -> None:
    alice, bob = Tenant("alice"), Tenant("bob")
    body = b'{"text": "a"}'
    assert salt_in(tenants.salted(alice, body)) == salt_in(tenants.salted(alice, body))
    assert salt_in(tenants.salted(alice, body)) != salt_in(tenants.salted(bob, body))
    assert salt_in(Tenants([], b"another secret!!").salted(alice, body)) != salt_in(tenants.salted(alice, body))


@pytest.mark.parametrize("spelling", ['"cache_salt"', '"cache\\u005fsalt"'])
def test_a_tenant_cannot_name_anothers_salt(tenants: Tenants, spelling: str) -> None:
    alice, bob = Tenant("alice"), Tenant("bob")
    stolen = salt_in(tenants.salted(bob, b'{"text":"a"}'))
    body = tenants.salted(alice, f'{{{spelling}: "{stolen}", "text": "a"}}'.encode())
    assert salt_in(body) != stolen
    assert body.count(b"salt") == 1
    own = tenants.salted(alice, f'{{"text": "a", {spelling}: "mine"}}'.encode())
    assert salt_in(own) not in ("mine", salt_in(tenants.salted(alice, b"{}")), salt_in(body))


def test_what_needs_no_change_is_not_changed(tenants: Tenants) -> None:
    """Numbers of any size, spaces, the order of names."""
    body = b'{"b": 1.00, "a": 123456789012345678901234567890 , "c": "}"} \n'
    salted = tenants.salted(Tenant("alice"), body)
    assert salted.startswith(b'{"b": 1.00, "a": 123456789012345678901234567890 , "c": "}",')
    assert json.loads(salted) == json.loads(body) | {"cache_salt": salt_in(salted)}
    assert json.loads(tenants.salted(Tenant("alice"), b"{}")).keys() == {"cache_salt"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b'"a"', b"{", b"[" * 5000, b'{"bootstrap_host": "a"}', '{"a": 1}'.encode("utf-16"),
        b'{"text": "caf\xe9"}', b'{"cache_salt": "mine", "text": "caf\xe9"}',
        *(b'{"cache_salt": "mine", "a": %b}' % (b"[" * deep + b"]" * deep) for deep in (985, 995)),
    ],
)  # fmt: skip
def test_what_cannot_be_salted_is_refused(tenants: Tenants, body: bytes) -> None:
    with pytest.raises(Unsaltable):
        tenants.salted(Tenant("alice"), body)


@pytest.fixture(scope="module")
def router(mock: MockWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    folder = tmp_path_factory.mktemp("router")
    lines = []
    for name, section in sections().items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in section.items()]
    (folder / "keys.toml").write_text("\n".join(lines))
    (folder / "secret").write_bytes(SECRET)
    files = {"tenants__keys_file": folder / "keys.toml", "tenants__secret_file": folder / "secret"}
    with Router(folder, mock.url, **files) as running:
        yield running


def status(router: Router, path: str, key: str, body: object = None) -> int:
    headers = [f"authorization: Bearer {key}"] if key else []
    reply = router.talk(post(path, body if body is not None else {"text": "a"}, "connection: close", *headers))
    return int(reply.split(b" ")[1])


def test_a_stranger_is_told_so_and_no_worker(router: Router, mock: MockWorker) -> None:
    mock.forget()
    assert status(router, "/generate", "") == 401
    assert status(router, "/generate", "wrong") == 401
    assert mock.requests == []


@pytest.mark.parametrize(
    "path", ["/flush_cache", "/flush%5Fcache", "//flush_cache", "/generate/../flush_cache", "/new"]
)
def test_what_is_for_administrators_is_for_them_alone(router: Router, mock: MockWorker, path: str) -> None:
    mock.forget()
    assert status(router, path, KEYS["alice"]) == 403
    assert mock.requests == []
    assert status(router, path, KEYS["root"]) == 200


def test_each_tenants_requests_carry_its_salt_and_no_key(router: Router, mock: MockWorker) -> None:
    mock.forget()
    for name in ("alice", "bob", "root"):
        assert status(router, "/generate", KEYS[name]) == 200
    alice, bob, root = mock.requests
    assert len({json.loads(seen["body"]).get("cache_salt") for seen in (alice, bob, root)}) == 3
    assert "cache_salt" not in json.loads(root["body"]), "shared"
    for seen in (alice, bob, root):
        assert not {"authorization", "x-api-key"} & dict(seen["headers"]).keys()


def test_what_is_no_text_is_refused_and_the_router_lives(router: Router, mock: MockWorker) -> None:
    mock.forget()
    bad = post("/generate", b'{"text": "caf\xe9"}', f"authorization: Bearer {KEYS['alice']}", "connection: close")
    assert router.talk(bad).startswith(b"HTTP/1.1 400 ")
    assert mock.requests == []
    assert status(router, "/generate", KEYS["alice"], {"text": "a"}) == 200


def test_each_request_on_a_connection_is_who_it_says(router: Router, mock: MockWorker) -> None:
    """Heads that are the same are from the same tenant; what is remembered of one is no other's."""
    mock.forget()
    with router.connect() as sock:
        for n, name in enumerate(("alice", "alice", "bob", "alice", "root")):
            sock.sendall(post("/generate", {"text": f"a{n}"}, f"authorization: Bearer {KEYS[name]}"))
            assert until(sock, b"}}").startswith(b"HTTP/1.1 200 ")
        sock.sendall(post("/generate", {"text": "b"}, "authorization: Bearer key-of-nobody"))
        assert until(sock, b"}}").startswith(b"HTTP/1.1 401 ")
    salts = [json.loads(seen["body"]).get("cache_salt") for seen in mock.requests]
    assert len(salts) == 5
    assert salts[0] == salts[1] == salts[3]
    assert len(set(salts)) == 3


def test_where_no_salt_can_be_carried_tenants_are_refused(router: Router) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert status(router, "/v1/messages", KEYS["alice"], body) == 403
    assert status(router, "/v1/messages", KEYS["root"], body) == 200
    assert status(router, "/generate", KEYS["alice"], b"[]") == 400
