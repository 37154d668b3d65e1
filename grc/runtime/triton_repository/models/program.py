"""model.py of a program: the artifact beside this file answers the requests that Triton merged."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402

from grc.errors import InputError  # noqa: E402
from grc.runtime.program import load  # noqa: E402
from grc.runtime.triton_repository.merge import answer_all  # noqa: E402
from grc.runtime.triton_repository.requests import failed  # noqa: E402
from grc.runtime.triton_repository.tensors import interface  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        if args["model_instance_kind"] == "GPU":
            torch.cuda.set_device(int(args["model_instance_device_id"]))
        self.program = load(HERE / "artifact.grc")
        self.interface = interface(self.program.artifact.manifest)

    @torch.inference_mode()
    def execute(self, requests):
        # Tensors go through DLPack both ways: as_numpy() gives zeros where the server was built for numpy 1 and this is 2.
        given = [
            [torch.from_dlpack(triton.get_input_tensor_by_name(request, entry.name)) for entry in self.interface.inputs]
            for request in requests
        ]
        return [self.respond(answer) for answer in answer_all(self.program.run_flat, self.interface, given)]

    def respond(self, answer):
        if isinstance(answer, InputError):
            return failed(triton, answer)
        named = zip(self.interface.outputs, answer, strict=True)
        return triton.InferenceResponse([triton.Tensor.from_dlpack(entry.name, tensor) for entry, tensor in named])
