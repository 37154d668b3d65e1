"""The eager engine: aten operators one by one. The floor that is always there."""

from __future__ import annotations

import json
from pathlib import Path

from grc.errors import ArtifactError, LoweringError
from grc.lowering.engine import Built, Lowerable, Target
from grc.lowering.export import constants_of, plain_graph
from grc.runtime.graph_json import encode_graph


class Eager:
    name = "eager"

    def missing(self, target: Target) -> str | None:
        return None

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        graph = plain_graph(lowerable)
        try:
            nodes = encode_graph(graph.graph)
        except ArtifactError as error:
            raise LoweringError(error.message, error.hint) from error
        (folder / "eager.json").write_text(json.dumps(nodes))
        return Built(self.name, "eager.json", constants_of(graph))
