"""model.py of preprocess_py: a request as JSON text becomes the tensors that the program takes."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402

from grc.errors import InputError  # noqa: E402
from grc.runtime.triton_repository.requests import Preprocess, failed  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        self.preprocess = Preprocess(HERE / "artifact.grc")

    @torch.inference_mode()
    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        try:
            named = self.preprocess(torch.from_dlpack(triton.get_input_tensor_by_name(request, "request")))
        except InputError as error:
            return failed(triton, error)
        return triton.InferenceResponse([triton.Tensor.from_dlpack(name, tensor) for name, tensor in named])
