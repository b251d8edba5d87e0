"""What is chosen for a device, and how batches get there; a GPU's streams are stood in for, and tried where one is."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from train.device import ToDevice, choose_device, choose_precision, make_fast

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_device_is_there_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for has, chosen in ((False, CPU), (True, GPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has: has)
        assert choose_device("auto") == chosen and choose_device("cpu") == CPU
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device is 'cuda:2', and 2 GPUs are visible, counted from 0"):
        choose_device("cuda:2")
    for name in ("gpu", "meta", "mps"):
        with pytest.raises(ValueError, match=f"no device {name!r}: choose auto, cpu, cuda or cuda:1"):
            choose_device(name)


def test_bfloat16_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_precision(name, CPU) for name in ("auto", "float32")] == ["float32", "float32"]
    with pytest.raises(ValueError, match=r"bfloat16 is for GPUs: on CPUs torch 2\.13 makes wrong gradients"):
        choose_precision("bfloat16", CPU)
    for has, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_precision("auto", GPU) == chosen
        assert choose_precision("bfloat16", GPU) == "bfloat16" and choose_precision("float32", GPU) == "float32"


def test_tf32_is_for_gpus() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        make_fast(CPU)
        assert torch.get_float32_matmul_precision() == before == "highest"
        make_fast(GPU)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


FAULTS = """
import resource
import torch
from train.device import make_fast

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
as_it_is = faults()
make_fast(torch.device("cpu"))
for _ in range(5):
    faults()
print(as_it_is, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is another's")
def test_memory_of_large_maps_is_not_taken_anew_from_the_system() -> None:
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    as_it_is, kept = map(int, said.split())
    assert as_it_is >= 5 * 24  # pages, of 2 MB at most
    assert kept < as_it_is / 10


class Stream:
    """Stands for a CUDA stream: what is queued, in the order in which the host asks for it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self, event: Stream) -> Stream:
        self.said.append("mark")
        return event

    def synchronize(self) -> None:
        self.said.append("host waits for the mark")


def test_batches_are_copied_beside_the_steps_and_two_at_most_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    steps, copies = Stream("steps", said), Stream("copies", said)

    @contextmanager
    def inside(stream: Stream):
        said.append(f"on {stream.name}:")
        yield

    def to(x: Tensor, *_: object, **options: bool) -> Tensor:
        assert options == {"non_blocking": True}
        said.append(f"copy {int(x)}")
        return x

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: steps)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: steps)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: said.append(f"{stream.name} uses {int(x)}"))
    to_device = ToDevice(GPU)
    for number in (1, 2):
        assert to_device({"clip": torch.tensor(number)}) == {"clip": torch.tensor(number)}
        said.append(f"step {number}")
    first = ["mark", "on copies:", "copy 1", "steps waits for copies", "steps uses 1", "step 1"]
    second = ["on copies:", "copy 2", "steps waits for copies", "steps uses 2", "step 2"]
    assert said == [*first, "host waits for the mark", "mark", *second]


def test_on_a_cpu_a_batch_is_where_it_is() -> None:
    batch = {"clip": torch.zeros(2)}
    assert ToDevice(CPU)(batch) is batch


@pytest.mark.cuda
def test_what_arrives_on_a_gpu_is_what_was_sent() -> None:
    to_device, sums = ToDevice(GPU), []
    for number in range(8):
        there = to_device({"x": torch.full((1 << 20,), float(number)).pin_memory()})["x"]
        sums.append((there @ there).sqrt() / 1024)
    assert torch.stack(sums).tolist() == pytest.approx(range(8), rel=1e-3)
