"""Buckets: one captured CUDA graph per batch size, with all copies from and to pinned memory but large ones inside it.

A lane is a stream, a memory pool and the graphs that were captured on them; one request at a time goes through a lane,
because a replay may overwrite the answers of any other graph of its pool. A request takes the smallest bucket that holds
it, its rows repeated from the first one up to the bucket's size, and what is larger than the largest is answered in
pieces. Requests from the host are answered on the host, requests from the device on the device.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from grc.errors import ArtifactError, first_line
from grc.runtime.answers import Answers, hold_nan
from grc.runtime.bucket import Bucket, Recorded, narrowed
from grc.runtime.edges import faster, instantiate, launcher
from grc.runtime.mapped import BY_KERNEL, copy_by_kernel, find_strange, mapped, telling
from grc.runtime.plan import Plan, layout, views

Tensors = list[torch.Tensor]
Run = Callable[[Tensors], Sequence[torch.Tensor]]
Events = tuple[torch.cuda.Event, torch.cuda.Event]
WARM_UP = 3  # runs before a capture: cubins load lazily, and a load can't be captured
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process


class Buckets:
    """A part on the GPU, as a function from a list of tensors to a list of tensors; safe to call from many threads.

    `make` loads one runner for each lane, since a runner serves one thread; it is given the address where the runner's
    kernels count ids outside of their tables. With `counts` they do, and a request that has some raises IndexError. Raises
    ArtifactError when a graph can't be captured.
    """

    def __init__(self, make: Callable[[torch.Tensor], Run], plan: Plan, counts: bool):
        self.plan = plan
        self.free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for _ in range(plan.streams):
            self.free.put(Lane(make, plan, counts))

    def __call__(self, inputs: Tensors) -> Answers:
        lane = self.free.get()
        try:
            return self.answer(lane, inputs, None)
        finally:
            self.free.put(lane)

    def seconds(self, inputs: Tensors) -> float:
        """Answer a request, and return the time between two events around its copies and kernels."""
        lane = self.free.get()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            self.answer(lane, inputs, events)
        finally:
            self.free.put(lane)
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def replayer(self, batch: int) -> Callable[[object], None] | None:
        """Replays the bucket of this batch size on the current stream, without copies: to time the kernels alone."""
        if not self.plan.buckets or batch > self.plan.buckets[-1]:
            return None
        lane = self.free.get()
        try:
            graph = lane.recorded(lane.buckets[self.plan.bucket(batch)], False, False, False).graph
        finally:
            self.free.put(lane)
        return lambda _: graph.replay()

    def answer(self, lane: Lane, inputs: Tensors, events: Events | None) -> Answers:
        device = False
        for tensor in inputs:
            device = device or tensor.is_cuda
        if not self.plan.buckets:
            return lane.direct(inputs, device, events)
        batch = self.plan.batch(inputs)
        one = lane.from_device if device else lane.from_host
        if batch <= self.plan.buckets[-1]:
            return one(inputs, batch, events)
        answers = []
        for at, (start, length) in enumerate(self.plan.pieces(batch)):
            first = None if events is None else (events[0] if at == 0 else torch.cuda.Event(), events[1])
            answers.append(one(self.plan.cut(inputs, start, length), length, first))
        return Answers(self.plan.joined(answers), any(answer.nan for answer in answers))


class On:
    """Makes a stream the current one for a block: torch.cuda.stream without its look-ups of devices."""

    __slots__ = ("before", "device", "own")

    def __init__(self, stream: torch.cuda.Stream):
        self.device = stream.device_index
        self.own = (stream.stream_id, stream.device_index, stream.device_type)

    def __enter__(self) -> None:
        self.before = torch._C._cuda_getCurrentStream(self.device)
        set_stream(self.own)

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


def on(stream: torch.cuda.Stream) -> On:
    return On(stream)


def set_stream(stream: tuple[int, int, int]) -> None:
    torch._C._cuda_setStream(stream_id=stream[0], device_index=stream[1], device_type=stream[2])


def clear_workspaces() -> None:
    """Give back cuBLAS' workspaces; builds of torch without CUDA have none."""
    if torch.version.cuda is not None:
        torch._C._cuda_clearCublasWorkspaces()


class Lane:
    """One stream with its pool, its runner and its buckets. Only one thread at a time may use it."""

    def __init__(self, make: Callable[[torch.Tensor], Run], plan: Plan, counts: bool):
        self.plan, self.counts = plan, counts
        self.device = here()
        self.stream = torch.cuda.Stream()
        self.on_stream = on(self.stream)
        self.pool = torch.cuda.graph_pool_handle()
        # Kernels count bad ids in the host's own memory: where there are none, neither side does anything for it.
        counter = pinned(8).view(torch.int64)
        self.bad = counter.numpy()
        self.run = make(telling(counter).to(self.device))
        flag = pinned(4).view(torch.float32)
        self.strange, self.tell_strange, self.one = flag.numpy(), mapped(flag), torch.ones(1, device=self.device)
        self.buckets: dict[int, Bucket] = {}
        if plan.buckets:
            largest = plan.buckets[-1]
            taken, given = (layout(specs, largest)[1] for specs in (plan.inputs, plan.outputs))
            self.host_in, self.host_out = pinned(taken).zero_(), pinned(given)  # zeros are ids of every table
            self.device_in = torch.zeros(taken, dtype=torch.uint8, device=self.device)
            # The largest first: the smaller ones then fit into the memory that its capture left in the pool.
            for batch in reversed(plan.buckets):
                host, answers = views(self.host_in, plan.inputs, batch), views(self.host_out, plan.outputs, batch)
                bucket = Bucket(batch, host, views(self.device_in, plan.inputs, batch), answers)
                self.warm_up(bucket.device, batch)
                self.settle(bucket)
                self.buckets[batch] = bucket

    def settle(self, bucket: Bucket) -> None:
        """Record the graph that most requests need, with kernels that begin early where that is faster."""
        found = self.record(bucket, True, True, True)
        if found.early:
            bucket.early = False
            plain = self.record(bucket, True, True, True)
            with torch.cuda.stream(self.stream):
                bucket.early = faster(found.graph, plain.graph)
            found = found if bucket.early else plain
        bucket.graphs[True, True, True] = found

    def recorded(self, bucket: Bucket, taken: bool, given: bool, told: bool = True) -> Recorded:
        """The bucket's graph: whether it copies the request from pinned memory, small answers to it, and whether it tells of
        NaN. Captured when a request first needs it."""
        key = taken, given, told
        return bucket.graphs.get(key) or bucket.graphs.setdefault(key, self.record(bucket, *key))

    def record(self, bucket: Bucket, taken: bool, given: bool, told: bool) -> Recorded:
        """Capture a graph of a bucket.

        Requests are one copy, since they lie in one arena; a kernel makes it by reading the host's memory itself: between
        the copy engine and the multiprocessors a graph waits longer than that takes. The same goes for answers.
        """
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        used = layout(self.plan.inputs, bucket.batch)[1]
        tells = told and bucket.tells(given)
        with self.recording(graph, bucket.batch):
            if taken and used <= BY_KERNEL:
                copy_by_kernel([self.device_in[:used]], [mapped(self.host_in[:used])])
            elif taken:
                self.device_in[:used].copy_(self.host_in[:used], non_blocking=True)
            kept = self.run(list(bucket.device))
            if tells:
                find_strange([kept[i] for i in bucket.floating], self.tell_strange, self.one)
            if given:
                out = [i for i in range(len(kept)) if i not in bucket.apart]
                copy_by_kernel([mapped(bucket.answers[i]) for i in out], [kept[i] for i in out])
        early = instantiate(graph, bucket.early)
        return Recorded(graph, launcher(graph, self.stream), kept, tells, early)

    def warm_up(self, device: Tensors, batch: int) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # on which weights and buffers were made
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                found = self.run(list(device))
        self.stream.synchronize()
        want = [(entry.shape(batch), entry.dtype) for entry in self.plan.outputs]
        have = [(tuple(answer.shape), answer.dtype) for answer in found]
        if want != have:
            raise ArtifactError(f"at batch {batch} the part answers {have}, the manifest says {want}", "rebuild it")

    @contextlib.contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph, batch: int) -> Iterator[None]:
        """Capture what runs in this block. Other threads may allocate meanwhile: hence the mode of its own thread.

        cuBLAS keeps a workspace for each stream. One made before the capture may be freed by others in this process
        (torch.compile clears them all) while the graph still writes to it; one made within lies in the graph's own pool.
        """
        clear_workspaces()
        try:
            with (
                CAPTURING,
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                yield
        except ArtifactError:
            raise
        except Exception as error:  # CUDA refuses what waits for the device, torch what allocates outside of the pool
            raise ArtifactError(
                f"the graph of batch {batch} can't be captured: {first_line(error)}", "rebuild the artifact"
            ) from error
        finally:
            clear_workspaces()

    def from_host(self, inputs: Tensors, batch: int, events: Events | None) -> Answers:
        """Fill pinned memory, replay, wait, and copy the answers out before another replay can overwrite them.

        A large request in pinned memory goes to the device from where it is. Large answers come to pinned memory that
        is the caller's from then on, unless callers hold much of it already.
        """
        plan = self.plan
        bucket = self.buckets[plan.bucket(batch)]
        own = bucket.cut(plan, batch, True)
        in_place = bucket.large and all(tensor.is_pinned() for tensor in inputs)
        if not in_place:
            own.fill(inputs)
        found = self.recorded(bucket, not in_place, True)
        self.bad[0] = self.strange[0] = 0
        if events:
            events[0].record(self.stream)
        if in_place:
            with self.on_stream:
                bucket.cut(plan, batch, False).fill(inputs)
        found.launch()
        lent = self.copy_apart(bucket, found, own.answers, batch) if bucket.apart else {}
        if events:
            events[1].record(self.stream)
        self.stream.synchronize()
        self.refuse()
        answers = [lent[i] if i in lent else answer.clone() for i, answer in enumerate(own.answers)]
        return Answers(answers, self.nan(found, answers))

    def copy_apart(self, bucket: Bucket, found: Recorded, own: Tensors, batch: int) -> dict[int, torch.Tensor]:
        """Copy the large answers to memory for the caller, which is returned, or else to the bucket's own."""
        specs = [self.plan.outputs[i] for i in bucket.apart]
        lent = bucket.block(specs, batch, pinned)
        with self.on_stream:
            for host, i, entry in zip(lent or [own[i] for i in bucket.apart], bucket.apart, specs, strict=True):
                host.copy_(narrowed(found.answers[i], entry, batch), non_blocking=True)
        return dict(zip(bucket.apart, lent, strict=True)) if lent else {}

    def from_device(self, inputs: Tensors, batch: int, events: Events | None) -> Answers:
        """The same from device memory to device memory. The answers are allocated on the caller's stream.

        Where the graph checks anything it is waited for, so that no answer to a bad request is ever handed out.
        """
        plan, bucket = self.plan, self.buckets[self.plan.bucket(batch)]
        found = self.recorded(bucket, False, False)
        self.bad[0] = self.strange[0] = 0
        caller = torch.cuda.current_stream(self.device)
        answers = [torch.empty(entry.shape(batch), dtype=entry.dtype, device=self.device) for entry in plan.outputs]
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            bucket.cut(plan, batch, False).fill(inputs)
            if events:
                events[0].record()
            found.launch()
            if events:
                events[1].record()
            for answer, own, entry in zip(answers, found.answers, plan.outputs, strict=True):
                answer.copy_(narrowed(own, entry, batch))
        caller.wait_stream(self.stream)
        if self.counts or found.tells:
            self.stream.synchronize()
        self.refuse()
        return Answers(answers, self.nan(found, answers))

    def nan(self, found: Recorded, answers: Tensors) -> bool:
        """Whether answers hold NaN. The device tells of infinite numbers too, so what it tells of is looked through."""
        return bool(not found.tells or self.strange[0]) and hold_nan(answers)

    def direct(self, inputs: Tensors, device: bool, events: Events | None) -> Answers:
        """Launch by launch, for requests that have no bucket."""
        self.bad[0] = 0
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            if events:
                events[0].record()
            moved = [tensor.to(self.device, non_blocking=True) for tensor in inputs]
            found = list(self.run(moved))
            answers = found if device else [answer.cpu() for answer in found]
            if events:
                events[1].record()
        self.stream.synchronize()
        self.refuse()
        for answer in answers if device else ():
            answer.record_stream(caller)
        return Answers(answers, hold_nan(answers))

    def refuse(self) -> None:
        """Raise IndexError where the answers come from ids outside of their tables."""
        if self.counts and self.bad[0]:
            raise IndexError(f"{self.bad[0]} ids or positions, counted with padded rows, are outside of their tables")


def here() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def pinned(count: int) -> torch.Tensor:
    """Bytes of host memory that the device copies from and to by itself, as they are."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
