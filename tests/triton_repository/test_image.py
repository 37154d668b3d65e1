"""The image of an exported repository, built where a container engine works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grc.runtime.triton_repository.export import export
from tests.containers import image, output_of

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")


@pytest.mark.slow
def test_the_image_of_a_repository_is_built_and_has_its_torch(spoken: Path, tmp_path: Path) -> None:
    made = export(spoken, tmp_path / "repo")
    with image(made.path, "grc-triton-test") as built:
        words = ("-c", "import numpy, safetensors, torch; print(torch.__version__)")
        version = output_of(built, *words, entrypoint="python3").strip()
    assert version.partition("+")[0] == torch.__version__.partition("+")[0]
