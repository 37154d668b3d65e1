"""Caches: bounded, never stale, counted; and features of users under interleaved updates."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import torch

from grc.runtime.server.cache import ENTRY, Cache
from grc.runtime.server.features import Features, User
from tests.server.running import Running, running, until


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_least_recently_used_makes_room() -> None:
    cache = Cache(3 * (ENTRY + 10), 60)
    for key in "abc":
        cache.put(key, key.upper(), 10)
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert (cache.bytes, cache.evicted, cache.hits, cache.misses) == (3 * (ENTRY + 10), 1, 4, 1)


def test_memory_stays_bounded_whatever_is_put() -> None:
    make, cache = random.Random(0), Cache(10_000, 60)
    for _ in range(2000):
        cache.put(make.randrange(50), "x", make.randrange(4000))
        if make.random() < 0.2:
            cache.discard(make.randrange(50))
        assert cache.bytes == sum(size for _, size, _ in cache.entries.values()) <= 10_000
    cache.put("huge", "x", 10_000)
    assert cache.get("huge") is None


def test_nothing_is_given_out_after_its_time() -> None:
    clock = Clock()
    cache = Cache(10_000, 5, clock)
    cache.put("a", 1, 10)
    clock.now = 4.9
    assert cache.get("a") == 1
    clock.now = 5.0
    assert cache.get("a") is None and cache.bytes == 0


def user(name: str, version: int, body: bytes = b"") -> User:
    return User(name, version, body)


def features(value: int) -> list[torch.Tensor]:
    return [torch.full((1, 3), value)]


def held(store: Features, name: str, version: int) -> int | None:
    found = store.get("m", "1", user(name, version))
    return None if found is None else int(found[0][0, 0])


def test_features_are_those_of_the_version_that_is_asked_for() -> None:
    store = Features(Cache(10_000, 60))
    store.end(store.begin("m", "1", user("u", 7)), features(7))
    assert held(store, "u", 7) == 7
    assert held(store, "u", 8) is None and held(store, "u", 6) is None and held(store, "v", 7) is None
    assert store.get("m", "2", user("u", 7)) is None, "another version of the model has other features"
    assert (store.cache.hits, store.cache.misses) == (1, 4)


def test_features_of_another_body_are_not_given_and_are_replaced() -> None:
    """Also where the client has said by its version that nothing changed."""
    store = Features(Cache(10_000, 60))
    for value, body in ((1, b"one"), (2, b"two"), (3, b"three")):
        assert store.get("m", "1", user("u", 7, body)) is None
        store.end(store.begin("m", "1", user("u", 7, body)), features(value))
    assert store.get("m", "1", user("u", 7, b"two")) is None
    found = store.get("m", "1", user("u", 7, b"three"))
    assert found is not None and int(found[0][0, 0]) == 3
    assert (store.cache.hits, store.cache.misses, store.cache.changed) == (1, 1, 3)


def test_what_was_begun_for_an_older_version_is_not_kept() -> None:
    store = Features(Cache(10_000, 60))
    old = store.begin("m", "1", user("u", 1))
    new = store.begin("m", "1", user("u", 2))
    store.end(new, features(2))
    store.end(old, features(1))
    assert held(store, "u", 2) == 2 and not store.making
    late = store.begin("m", "1", user("u", 1))
    store.end(late, features(1))
    assert held(store, "u", 2) == 2, "an old version does not push out the newest"


def test_what_was_begun_before_a_user_was_forgotten_is_not_kept() -> None:
    store = Features(Cache(10_000, 60))
    store.end(store.begin("m", "1", user("u", 1)), features(1))
    making = store.begin("m", "1", user("u", 2))
    store.forget("m", "u")
    assert held(store, "u", 1) is None
    store.end(making, features(2))
    assert held(store, "u", 2) is None
    store.end(store.begin("m", "1", user("u", 2)), features(2))
    assert held(store, "u", 2) == 2


def test_failures_are_not_kept() -> None:
    store = Features(Cache(10_000, 60))
    store.end(store.begin("m", "1", user("u", 1)), None)
    assert held(store, "u", 1) is None and not store.making


def test_kept_features_hold_no_more_memory_than_they_count() -> None:
    store = Features(Cache(10_000, 60))
    wide = torch.zeros(1000, 3)
    store.end(store.begin("m", "1", user("u", 1)), [wide[:1]])
    found = store.get("m", "1", user("u", 1))
    assert found is not None and found[0].untyped_storage().nbytes() == 12


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_updates_never_give_old_features(seed: int) -> None:
    """Users move on while features are computed, in random order: a hit is always of the version that was asked for,
    and never older than the last that was forgotten."""
    make, clock = random.Random(seed), Clock()
    store = Features(Cache(4000, 30, clock))
    current = dict.fromkeys("abc", 0)
    epoch = dict.fromkeys("abc", 0)
    running_: list[tuple[Any, str, int, int]] = []
    hits = 0
    for _ in range(4000):
        clock.now += make.random()
        name = make.choice("abc")
        action = make.random()
        if action < 0.15:
            current[name] += 1
        elif action < 0.2:
            epoch[name] += 1
            store.forget("m", name)
        elif action < 0.6:
            version = max(0, current[name] - make.choice((0, 0, 0, 1)))
            found = store.get("m", "1", user(name, version))
            if found is not None:
                hits += 1
                assert found[0].tolist() == [[version, epoch[name]]]
            else:
                running_.append((store.begin("m", "1", user(name, version)), name, version, epoch[name]))
        elif running_:
            making, _, version, then = running_.pop(make.randrange(len(running_)))
            store.end(making, [torch.tensor([[version, then]])])
    assert hits > 100


ROW = {"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}
PATH = "/v2/models/served/recommend"


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Any:
    folder = tmp_path_factory.mktemp("caching")
    caches = ("--feature-cache", 1, "--feature-ttl", 600, "--answer-cache", 1)
    with running(folder, tiny, *caches, "--max-depth", 400) as server:
        yield server


def lookups(server: Running, cache: str, *results: str) -> tuple[float, ...]:
    series = 'grc_cache_lookups_total{{cache="{}",result="{}"}}'
    return tuple(server.metric(series.format(cache, result)) for result in results or ("hit", "miss"))


def recommend(server: Running, **headers: str) -> float:
    status, text, _ = server.ask(PATH, json.dumps(headers.pop("body", ROW)).encode(), **headers)  # type: ignore[call-overload]
    assert status == 200, text
    return json.loads(text)["click"]


def test_features_are_used_until_the_users_version_changes(caching: Running) -> None:
    counted = ("hit", "miss", "changed")
    before = lookups(caching, "features", *counted)
    own = recommend(caching, x_user_id="ann", x_features_version="1")
    assert recommend(caching, x_user_id="ann", x_features_version="1") == own
    changed: Any = {**ROW, "dense": [9.0, 9.0, 9.0]}
    fresh = recommend(caching, body=changed, x_user_id="ann", x_features_version="2")
    assert fresh != own
    assert recommend(caching, body=changed) == fresh, "without a user nothing is kept"
    assert recommend(caching, x_user_id="ann", x_features_version="2") == own, "another body has other features"
    assert caching.ask("/v2/models/served/users/ann/features", method="DELETE")[0] == 204
    assert recommend(caching, x_user_id="ann", x_features_version="2") == own
    after = lookups(caching, "features", *counted)
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 3, 1]
    assert caching.metric('grc_cache_bytes{cache="features"}') > 0


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("user", ["zoë", "a/b", "a%2Fb"])
def test_a_user_of_any_name_is_forgotten(caching: Running, user: str, encoding: str) -> None:
    header = user.encode(encoding).decode("latin-1")
    hits, misses = lookups(caching, "features")
    path = f"/v2/models/served/users/{urllib.parse.quote(user.encode(encoding), safe='')}/features"
    for _ in range(2):
        for _ in range(2):
            recommend(caching, x_user_id=header, x_features_version="1")
        assert caching.ask(path, method="DELETE")[0] == 204
    assert lookups(caching, "features") == (hits + 2, misses + 2)


def test_a_user_that_moves_on_while_features_are_made(caching: Running) -> None:
    slow: Any = {**ROW, "dense": [5.0, 5.0, 5.0], "sleep": 0.5}
    found: list[float] = []
    late = threading.Thread(
        target=lambda: found.append(recommend(caching, body=slow, x_user_id="bo", x_features_version="1"))
    )
    late.start()
    time.sleep(0.15)
    newest = recommend(caching, x_user_id="bo", x_features_version="2")
    late.join()
    assert found[0] != newest, "the slow request got the answer to its own features"
    (hits,) = lookups(caching, "features", "hit")
    assert recommend(caching, x_user_id="bo", x_features_version="2") == newest
    assert lookups(caching, "features", "hit") == (hits + 1,), "whose features were not kept"


def test_identical_requests_are_answered_once(caching: Running) -> None:
    body = {
        "inputs": [
            {"name": "dense", "datatype": "FP32", "shape": [1, 3], "data": [4.0, 5.0, 6.0]},
            {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [3, 7]},
        ]
    }
    hits, misses = lookups(caching, "answers")
    batches = 'nv_inference_exec_count_total{model="served",version="1"}'
    infer = "/v2/models/served/infer"
    first = caching.ask(infer, json.dumps(body).encode())[1]
    computed = caching.metric(batches)
    assert caching.ask(infer, json.dumps(body).encode())[1] == first
    body["inputs"][1]["data"] = [3, 8]
    assert caching.ask(infer, json.dumps(body).encode())[1] != first
    assert lookups(caching, "answers") == (hits + 1, misses + 2)
    assert caching.metric(batches) <= computed + 3  # one for the other ids, perhaps two of a canary
    assert recommend(caching) == recommend(caching)
    assert lookups(caching, "answers") == (hits + 2, misses + 3)


def test_an_answer_that_is_no_json_is_not_kept_and_told_as_postprocess_s(caching: Running) -> None:
    refusals = 'grc_refusals_total{model="served",reason="postprocess"}'
    before = caching.metric(refusals)
    for _ in range(2):
        told = caching.error(PATH, json.dumps({**ROW, "set": True}).encode())
        assert told == (500, "postprocess returns a set, which is no JSON")
    assert caching.metric(refusals) == before + 2


def test_a_request_that_nests_deep_has_its_place_in_the_cache(caching: Running) -> None:
    deep = (json.dumps(ROW)[:-1] + ', "deep": ' + "[" * 300 + "]" * 300 + "}").encode()
    (hits,) = lookups(caching, "answers", "hit")
    assert [caching.ask(PATH, deep)[0] for _ in range(2)] == [200, 200]
    assert lookups(caching, "answers", "hit") == (hits + 1,)


def test_caches_are_off_unless_asked_for(server: Running) -> None:
    for _ in range(2):
        status, _, _ = server.ask(
            "/v2/models/tiny/recommend", json.dumps(ROW).encode(), x_user_id="ann", x_features_version="1"
        )
        assert status == 200
    assert lookups(server, "features") == lookups(server, "answers") == (0, 0)


def test_answers_grow_old(tmp_path: Path, tiny: Path) -> None:
    with running(tmp_path, tiny, "--answer-cache", 1, "--answer-ttl", 0.2) as server:
        for _ in until("a hit"):
            recommend(server)
            recommend(server)
            if lookups(server, "answers")[0] > 0:
                break
        time.sleep(0.3)
        misses = lookups(server, "answers")[1]
        recommend(server)
        assert lookups(server, "answers")[1] == misses + 1
