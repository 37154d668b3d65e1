"""The Triton kernels as the compilers see them: PTX for sm_90 and AOTInductor's trace, with or without a GPU."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from grc.kernels import ACTIVATION_UNIT, ATTENTION, CROSS  # noqa: E402
from grc.kernels import layer_chain as steps  # noqa: E402
from grc.kernels.activation_unit import triton as activation_unit  # noqa: E402
from grc.kernels.attention import triton as attention  # noqa: E402
from grc.kernels.bag_dot import triton as bag_dot  # noqa: E402
from grc.kernels.bag_fm import triton as bag_fm  # noqa: E402
from grc.kernels.cross import triton as cross  # noqa: E402
from grc.kernels.fusion import Case  # noqa: E402
from grc.kernels.layer_chain import triton as layer_chain  # noqa: E402
from grc.kernels.lookup import triton as lookup  # noqa: E402
from grc.kernels.scaled_linear import rows_in_8_bits, weight_in_8_bits  # noqa: E402
from grc.kernels.scaled_linear import triton as scaled_linear  # noqa: E402
from grc.kernels.score_topk import triton as score_topk  # noqa: E402
from grc.kernels.small_linear import attention_linear  # noqa: E402
from grc.kernels.small_linear import triton as small_linear  # noqa: E402
from grc.runtime import edges  # noqa: E402
from tests.kernels.bags import DEVICE, LOOKUPS, NO_PADDING, Bags, make, packed  # noqa: E402

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Driver:
    """A Hopper GPU for the compiler where there is none."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def ptx(module: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compile the kernels that `call` would launch, for sm_90."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: seen.append((self.kernel, args, kwargs))

    monkeypatch.setattr(module, "wrap_triton", Recorder)
    call()
    return "".join(compiled(*launch) for launch in seen)


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    names = {torch.float16: "*fp16", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*i1"}
    names |= {torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
    names[torch.float8_e4m3fn] = "*fp8e4nv"
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    values = {name: given[name] for name in kernel.arg_names}
    for at, (parameter, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[parameter] = names[value.dtype]
            attributes[(at,)] = [["tt.divisibility", 16]]
        elif parameter in kwargs or value == 1:
            signature[parameter], constants[(at,)] = "constexpr", value
        else:
            signature[parameter] = "i32"
            if value % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    check_that_it_waits(kernel.fn.__name__, text)
    return text


# They read weights, or where tables lie, before they wait for what other kernels write.
LINEAR = ("grc_small_linear", "grc_tile_linear", "grc_block_linear", "grc_attention_linear")
EARLY = (*LINEAR, "grc_bag_dot", "grc_byte_dot", "grc_bag_fm")


def check_that_it_waits(name: str, text: str) -> None:
    """The runtime lets kernels begin early by their names."""
    assert name.encode().startswith(edges.PREFIX)
    ahead, waits, _ = text.partition("griddepcontrol.wait")
    assert waits and "griddepcontrol.launch_dependents" in ahead
    assert not re.search(r"st\.global|atom\.global|red\.global", ahead)
    assert name in EARLY or not re.search(r"ld\.global|cp\.async", ahead)


def topk_case(items: int, k: int) -> tuple[Any, ...]:
    """One row of 64 numbers, scored against a catalogue whose memory is a single row's."""
    row = torch.zeros(1, 64, dtype=torch.float16, device=DEVICE)
    return row, row.expand(items, 64), None, k


TOPK = (
    Case("100 of 50,000", lambda seed: topk_case(50_000, 100)),
    Case("700 of 20,000", lambda seed: topk_case(20_000, 700)),
)
PRODUCTS = [
    (module, case, dtype)
    for module, cases, dtypes in (
        (cross, CROSS.cases, [torch.float16]),
        (attention, ATTENTION.cases, [torch.float16]),
        (activation_unit, ACTIVATION_UNIT.cases, [torch.float16, torch.float32]),
        (score_topk, TOPK, [torch.float16]),
    )
    for case in cases
    for dtype in dtypes
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("module", "case", "dtype"),
    PRODUCTS,
    ids=lambda part: getattr(part, "name", getattr(part, "__package__", str(part))),
)
def test_compiles(module: Any, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs what the compiler refuses: types that differ between branches, shapes of a broadcast."""
    halved = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.build(0)]
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in halved]
    if not module.able(*args):
        pytest.skip("the kernel leaves this case to plain torch")
    name = module.__package__.rpartition(".")[2]
    assert ".local" not in ptx(module, lambda: getattr(module, name)(*args), monkeypatch), "registers spill into memory"


TOLD = torch.zeros(16, dtype=torch.int64, device=DEVICE)
WIDE = {
    "fp16": ({}, torch.float16, True),
    "fp32": ({}, torch.float32, True),
    "bf16 width 96": ({"dims": (96,) * 3}, torch.bfloat16, True),
    "mixed": ({"dims": (16, 128, 64), "flat": True}, torch.float16, True),
    "pooled": ({"lengths": (4, 9, 3)}, torch.float16, True),
    "jagged": ({"lengths": None, "pooling": 1, "weighted": False}, torch.float16, True),
    "odd": ({"dims": (13,) * 3}, torch.float16, False),
}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", WIDE)
def test_rows_are_read_16_bytes_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, dtype, wide = WIDE[name]
    case = Bags(**{"dims": (128,) * 3, "batch": 64, **change})
    a = make(case, dtype)
    code = [ptx(lookup, lambda: lookup.lookup(*a.values(), told=TOLD), monkeypatch)]
    if not case.flat:
        dense = torch.zeros(64, case.dims[0], dtype=dtype, device=DEVICE)
        shared_part = (a["arena"], a["ids"], a["offsets"], a["weights"], dense, a["bases"], a["rows"], case.dims[0])
        rest = (a["lengths"], a["pooling"], a["padding"], False, False, True)
        code.append(ptx(bag_dot, lambda: bag_dot.bag_dot(*shared_part, *rest, told=TOLD), monkeypatch))
    if case.lengths == (1, 1, 1) and not case.flat:
        fm = (a["arena"], None, a["ids"], a["bases"], a["rows"], case.dims[0], a["padding"])
        code.append(ptx(bag_fm, lambda: bag_fm.bag_fm(*fm, told=TOLD), monkeypatch))
    for text in code:
        # Into registers, or past them into shared memory: cp.async.cg copies 16 bytes and nothing else.
        assert bool(re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.", text)) == wide
        assert ".local" not in text, "registers spill into memory"
        assert re.search(r"atom\.global\S*\.add\.u64", text), "bad ids are counted"
    assert bool(re.search(r"st\.global\S*\.v4\.b32", code[0])) == wide


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 6)], ids=str)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_packed_rows_are_unpacked_two_at_a_time(
    form: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = packed(make(Bags(dims=(128,) * 3, lengths=lengths), torch.float32), form)
    dense = torch.zeros(5, 128, dtype=torch.float16, device=DEVICE)
    head = (a["arena"], a["ids"], None, None, dense, a["bases"], a["rows"], 128, a["lengths"], 0, a["padding"])
    for module, call in (
        (lookup, lambda: lookup.lookup(*a.values())),
        (bag_dot, lambda: bag_dot.bag_dot(*head, False, False, True, a["packing"])),
    ):
        text = ptx(module, call, monkeypatch)
        assert "prmt.b32" in text and "cvt.rn.f16.u8" not in text
        assert not re.search(r"ld\.global\S*\.b8", text), "bytes are read one by one"


def packed_dot(form: str) -> tuple[Any, ...]:
    """The arguments of a `bag_dot` whose products are of integers."""
    case = Bags(dims=(128,) * 26, lengths=(1,) * 26, rows=(9,) * 26, padding=(NO_PADDING,) * 26)
    a, _, _ = packed(make(case, torch.float32), form)
    dense = torch.zeros(5, 128, dtype=torch.float16, device=DEVICE)
    head = (a["arena"], a["ids"], None, None, dense, a["bases"], a["rows"], 128, a["lengths"], 0, a["padding"])
    return (*head, False, False, True, a["packing"], None, TOLD)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("choice", bag_dot.INTEGER_CONFIGS, ids=str)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_packed_rows_are_multiplied_as_they_lie(
    form: str, choice: bag_dot.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ptx(bag_dot, lambda: bag_dot.bag_dot(*packed_dot(form), tiles=[0, *choice]), monkeypatch)
    assert re.search(r"mma\.sync\S*\.s32\.s8\.s8", text) and "s32.f16" not in text
    assert not re.search(r"ld\.global\S*\.b8|cvt\S*\.u8", text), "bytes are taken one by one"
    # Both factors come out of the shared memory that rows were copied into, without a detour through registers.
    assert re.search(r"cp\.async\.ca\.shared\.global \[[^]]*\], \[[^]]*\], 0x4", text)
    assert "ldmatrix" in text and not re.search(r"ldmatrix\S*\.trans", text)
    assert ".local" not in text, "registers spill into memory"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("form", "product"), [("int8", "s32.s8.s8"), ("fp8", "f32.e4m3.e4m3")])
def test_scaled_linear_takes_the_tensor_cores(form: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 512, device=DEVICE), torch.randn(64, 512, device=DEVICE)
    given = (*rows_in_8_bits(x, form), *weight_in_8_bits(weight, form), None)
    text = ptx(scaled_linear, lambda: scaled_linear.scaled_linear(*given), monkeypatch)
    assert re.search(rf"wgmma\.mma_async\S*\.{product}", text)
    assert ".local" not in text, "registers spill into memory"
    if form == "fp8":
        assert re.search(r"add\S*\.f32", text), "all is summed in the tensor cores, in fewer bits than float32"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("depth", "dtype"), [(512, torch.float16), (2048, torch.float32), (4096, torch.bfloat16)], ids=str
)
def test_small_linear_reads_whole_vectors_all_at_once(
    depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(1, depth, device=DEVICE, dtype=dtype), torch.randn(64, depth, device=DEVICE, dtype=dtype)
    bias = torch.randn(64, device=DEVICE, dtype=dtype)
    text = ptx(small_linear, lambda: small_linear.small_linear(x, weight, bias, None, None, 2), monkeypatch)
    vectors = (small_linear.COLUMNS + 1) * depth * dtype.itemsize // 16  # of the columns and the row
    threads = 32 if depth <= small_linear.ONE_WARP else 128
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", text)) == vectors // threads, "a loop would wait for every block"
    assert ".local" not in text, "registers spill into memory"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("depth", "eps"), [(512, None), (1024, None), (2048, None), (512, 1e-5), (1024, 1e-5)], ids=str
)
def test_small_linear_holds_the_steps_of_a_user(depth: int, eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, vector = (torch.randn(*shape, depth, device=DEVICE).half() for shape in ((1, 10), (64,), ()))
    norm = (vector, vector, eps) if eps else ()
    text = ptx(small_linear, lambda: small_linear.small_linear(x, weight, None, None, None, 2, *norm), monkeypatch)
    assert ("mma.sync" in text) == (eps is not None or depth > 1024)
    assert "ld.global.v4.b32" in text and ".local" not in text, "registers spill into memory"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("depth", "columns", "eps"),
    [(512, 512, None), (512, 1536, 1e-5), (500, 512, 1e-5), (1024, 512, 1e-5), (2048, 512, 1e-5), (2048, 512, None)],
    ids=str,
)
def test_small_linear_holds_a_block_of_rows(
    depth: int, columns: int, eps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, vector = (torch.randn(*shape, depth, device=DEVICE).half() for shape in ((8, 10), (columns,), ()))
    norm = (vector, vector, eps) if eps else ()
    text = ptx(small_linear, lambda: small_linear.small_linear(x, weight, None, None, None, 2, *norm), monkeypatch)
    assert "mma.sync" in text and ".local" not in text, "registers spill into memory"
    assert ("cp.async" in text) == (eps is None and depth > small_linear.SHALLOW), "deep rows come bit by bit"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("heads", "width"), [(8, 64), (4, 128), (3, 20)])
def test_attention_linear_stays_in_registers(heads: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(1, 10, 3, heads, width, device=DEVICE).half().unbind(2)
    weight = torch.randn(64, heads * width, device=DEVICE).half()
    given = q, k, v, 0.125, 1.0, 0, False, weight, weight[:, 0], None, 2
    text = ptx(attention_linear, lambda: attention_linear.attention_linear(*given), monkeypatch)
    assert "mma.sync" in text and ".local" not in text, "registers spill into memory"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["plain", "mean", "jagged weights"])
def test_traces_with_an_unknown_batch_and_copies_nothing(name: str) -> None:
    """AOTInductor's view: one kernel, its lists as a constant, and only the output counted as written."""
    from torch._functorch.aot_autograd import aot_export_module

    a = make(LOOKUPS[name], torch.float32)
    args = list(a.values())[4:]
    tiles = None if name == "jagged weights" else [8, 64, 2, 4096, 512, 8]  # timed: one for few bags, one for more
    lookup.register(), bag_dot.register()

    class Model(torch.nn.Module):
        def forward(self, arena, ids, dense, offsets, weights):  # type: ignore[no-untyped-def]
            rows = torch.ops.grc_cuda.lookup(arena, ids, offsets, weights, *args, tiles=tiles)
            bases, sizes, dims, lengths, pooling, padding = args
            rest = (bases, sizes, dims[0], lengths, pooling, padding, False, False, True)
            dot = torch.ops.grc_cuda.bag_dot(arena, ids, offsets, weights, dense, *rest)
            return rows, dot

    dense = torch.randn(5, a["dims"][0], device=DEVICE)
    inputs = (a["arena"], a["ids"], dense, a["offsets"], a["weights"])
    batch = torch.export.Dim("batch", min=1, max=4096)
    dynamic = None if name == "jagged weights" else ({}, {0: batch}, {0: batch}, None, None)
    program = torch.export.export(Model(), inputs, dynamic_shapes=dynamic, strict=False)
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = [target.__name__ for target in nodes if getattr(target, "namespace", "") == "grc_cuda"]
    assert names == ["lookup.default", "bag_dot.default"]
    traced, _ = aot_export_module(program.module(), inputs, trace_joint=False)
    calls = [node for node in traced.graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    assert [call.kwargs["tensors_to_clone"] for call in calls] == [["out"]] * (3 if tiles else 2)
    assert all(call.kwargs["kwargs"]["tables"].op == "get_attr" for call in calls)
    assert not [node for node in traced.graph.nodes if "copy" in str(node.target)]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("steps_of_a_user", [(), (10,)])
def test_layers_of_few_rows_trace_with_an_unknown_batch(steps_of_a_user: tuple[int, ...]) -> None:
    from torch._functorch.aot_autograd import aot_export_module

    small_linear.register(), attention_linear.register()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64, 64, dtype=torch.float16, device=DEVICE))

        def forward(self, x):  # type: ignore[no-untyped-def]
            vector = self.weight[0]
            norm = vector, vector, 1e-5
            y = torch.ops.grc_cuda.small_linear(x, self.weight, vector, None, None, 2, *norm)
            if x.dim() == 3:
                qkv, given = [y.unflatten(2, (4, 16))] * 3, (0.25, 1.0, 0, False)
                y = torch.ops.grc_cuda.attention_linear(*qkv, *given, self.weight, vector, None, 0)
            return (torch.ops.grc_cuda.small_linear(y, self.weight, vector, None, x, 0),)

    inputs = (torch.randn(5, *steps_of_a_user, 64, dtype=torch.float16, device=DEVICE),)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(Model(), inputs, dynamic_shapes=shapes, strict=False)
    traced, _ = aot_export_module(program.module(), inputs, trace_joint=False)
    calls = [node for node in traced.graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    ways = 2 + (1 + 1 + 2) + 2 if steps_of_a_user else 3 + 3  # of each layer, the second with an attention before it
    assert [call.kwargs["tensors_to_clone"] for call in calls] == [["out"]] * ways
    assert not [node for node in traced.graph.nodes if "copy" in str(node.target) or "clone" in str(node.target)]


@pytest.mark.usefixtures("hopper")
def test_products_of_packed_rows_trace_with_an_unknown_batch() -> None:
    from torch._functorch.aot_autograd import aot_export_module

    arena, ids, _, _, dense, *rest = packed_dot("int8")
    bag_dot.register()

    class Model(torch.nn.Module):
        def forward(self, arena, ids, dense):  # type: ignore[no-untyped-def]
            return (torch.ops.grc_cuda.bag_dot(arena, ids, None, None, dense, *rest),)

    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = (None, {0: batch}, {0: batch})
    program = torch.export.export(Model(), (arena, ids, dense), dynamic_shapes=shapes, strict=False)
    traced, _ = aot_export_module(program.module(), (arena, ids, dense), trace_joint=False)
    calls = [node for node in traced.graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    assert [call.kwargs["tensors_to_clone"] for call in calls] == [["out"]]
    assert all(call.kwargs["kwargs"]["tables"].op == "get_attr" for call in calls)


CHAIN = steps.encode(
    [
        (steps.INPUT, 0, 64, 64),
        (steps.LINEAR, 0, 0, 64, 64, 64, 0),
        (steps.INPUT, 1, 64, 64),
        (steps.ADD, 1, 2),
        (steps.NORM, 3, 64, 64, 1e-8, 64, 128),
        (steps.LINEAR, 4, 4096, 64, 100, 128, -1),
        (steps.ACTIVATION, 5, 2),
        (steps.LINEAR, 6, 12288, 128, 64, 64, 256),
        (steps.UNEQUAL, 7, 2, 0),
        (steps.OUTPUT, 8, 0, 64, 1),
        (steps.WIDE, 8, 20480, 64, 500, 512, 320, 4, 1, 0),
    ]
)


def chain_inputs(rows: int) -> tuple[torch.Tensor, ...]:
    x = torch.zeros(rows, 64, dtype=torch.float16, device=DEVICE)
    return x, x.clone(), torch.zeros(rows, 1, dtype=torch.int64, device=DEVICE)


def chain_parameters() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(53248, dtype=torch.float16, device=DEVICE), torch.zeros(832, device=DEVICE)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [50, 6400])
def test_a_chain_of_layers_takes_the_tensor_cores(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (list(chain_inputs(rows)), *chain_parameters(), CHAIN)
    text = ptx(layer_chain, lambda: layer_chain.layer_chain(*given), monkeypatch)
    assert re.search(r"(mma\.sync|wgmma\.mma_async)\S*\.f32\.f16\.f16", text)
    assert ".local" not in text, "registers spill into memory"


@pytest.mark.usefixtures("hopper")
def test_a_chain_of_layers_is_launched_for_few_some_or_many_rows() -> None:
    """AOTInductor's view of an unknown batch: three launches, of which two have no programs, and nothing is copied for them."""
    from torch._functorch.aot_autograd import aot_export_module

    layer_chain.register()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in zip(("weights", "vectors"), chain_parameters(), strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x, y, mask):  # type: ignore[no-untyped-def]
            return tuple(torch.ops.grc_cuda.layer_chain([x, y, mask], self.weights, self.vectors, CHAIN))

    inputs, batch = chain_inputs(5), torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(Model(), inputs, dynamic_shapes=({0: batch},) * 3, strict=False)
    traced, _ = aot_export_module(program.module(), inputs, trace_joint=False)
    launches = [node for node in traced.graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in launches] == [["y0", "y1"]] * 3
    assert not [node for node in traced.graph.nodes if "copy" in str(node.target) or "clone" in str(node.target)]


FEW, SOME = layer_chain.FEW, layer_chain.SOME


@pytest.mark.parametrize("rows", [0, 1, FEW, FEW + 1, SOME, SOME + 1, 10**6])
@pytest.mark.parametrize("known", [True, False])
def test_one_launch_is_asked_for(rows: int, known: bool) -> None:
    """Of as many as there are for an unknown number of rows."""
    count = rows if known else np.int64(rows)  # as a size that torch does not know, it is no int
    wide = [(steps.WIDE, 0, 0, 64, 500, 512, -1, 4, 1, 0)]
    chosen = [config for config, asked in layer_chain.configs(wide, count) if asked]
    assert chosen == [(16, 4) if rows <= FEW else (64, 4) if rows <= SOME else (64, 1)]


@pytest.mark.parametrize("steps_of_a_user", [10, 50, 200, 1000])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("heads", [1, 8, 10, 11, 78, 79, 10**5])
def test_attention_is_launched_once(heads: int, masks: bool, steps_of_a_user: int) -> None:
    programs = heads * -(-steps_of_a_user // 16)
    for known in (heads, np.int64(heads)):
        ways = attention.configs(steps_of_a_user, steps_of_a_user, known, 32, masks)
        chosen = [config for config, asked in ways if asked]
        assert len(chosen) == 1 and chosen[0].queries <= max(16, 2 * steps_of_a_user)
        many = attention.MANY_WITH_MASKS if masks else attention.MANY
        alone = attention.MOST_ALONE_WITH_MASKS if masks else attention.MOST_ALONE
        if steps_of_a_user == 200 and programs <= alone:
            assert chosen[0] == attention.ALONE
        elif steps_of_a_user == 1000 or (steps_of_a_user == 200 and masks):
            assert chosen[0] == (attention.FEW if programs <= attention.MOST_OF_FEW else many)
        elif steps_of_a_user == 200:
            assert chosen[0] == many


def test_a_wide_head_has_fewer_keys_on_their_way_at_once() -> None:
    assert [attention.configs(200, 200, 1, width, False)[0][0].keys for width in (32, 64, 100)] == [256, 256, 128]
