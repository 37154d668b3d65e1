"""From behaviours to films through a real server, as the documentation says: grc serve, then curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import grc
from tests.server.running import Running, needs_extra, running

needs_extra()

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "movielens"


def curl(server: Running, path: str, body: str) -> tuple[int, dict]:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    words = ["curl", "-s", "-w", "\n%{http_code}", "-d", body, f"{server.url}{path}"]
    text, _, status = subprocess.run(words, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(status), json.loads(text)


@pytest.fixture
def films(checkpoint: Path, tmp_path: Path) -> Path:
    output = tmp_path / "films.grc"
    grc.compile(str(EXAMPLE / "model.py"), None, grc.Options(output=output, engine="eager", batches=(4,), max_batch=64))
    return output


def test_behaviours_in_films_out(films: Path, tmp_path: Path) -> None:
    request = EXAMPLE / "request.json"
    own = grc.load(films).recommend(json.loads(request.read_text()))
    with running(tmp_path, f"films={films}") as server:
        status, answer = curl(server, "/v2/models/films/recommend", f"@{request}")
        assert status == 200
        assert [film["item"] for film in answer["films"]] == [film["item"] for film in own["films"]]
        assert [film["score"] for film in answer["films"]] == pytest.approx(
            [f["score"] for f in own["films"]], rel=1e-5
        )
        assert len(answer["films"]) == 10 and all(film["title"].startswith("Film ") for film in answer["films"])
        assert 0 < answer["engagement"] < 1
        seen = {behaviour["item"] for behaviour in json.loads(request.read_text())["behaviours"]}
        assert not seen & {film["item"] for film in answer["films"]}

        status, refused = curl(server, "/v2/models/films/recommend", '{"behaviours": [{"item": 1}]}')
        assert (status, refused) == (400, {"error": "preprocess: behaviours[0]: time is missing"})
        described = json.loads(server.ask("/openapi.json")[1])["paths"]["/v2/models/films/recommend"]["post"]
        assert described["description"].startswith("A request as JSON -> features [1, 10, 1024].")


def test_the_documentation_says_what_was_tested() -> None:
    text = (EXAMPLE.parents[1] / "docs" / "serving.md").read_text()
    assert "grc serve films=build/movielens.grc" in text
    assert "curl -d @examples/movielens/request.json localhost:8000/v2/models/films/recommend" in text
