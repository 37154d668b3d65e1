"""model.py of postprocess_py: the program's outputs and the request become the answer as JSON text."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402

from grc.errors import GrcError  # noqa: E402
from grc.runtime.triton_repository.requests import Postprocess, failed  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        self.postprocess = Postprocess(HERE / "artifact.grc")

    @torch.inference_mode()
    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        def tensor(name):
            return torch.from_dlpack(triton.get_input_tensor_by_name(request, name))

        try:
            answer = self.postprocess(tensor("request"), [tensor(entry.name) for entry in self.postprocess.outputs])
        except GrcError as error:
            return failed(triton, error)
        return triton.InferenceResponse([triton.Tensor.from_dlpack("answer", answer)])
