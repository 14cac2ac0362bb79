"""What a node does in the start-up check: it measures itself, then exchanges data with one other at a time.

srun python -m launcher.nodes.measure        # started by launcher.nodes.check, which it connects to

With GPUs one process for each of them computes, and forms an NCCL group with those of the other node. Without
them two nodes exchange over plain TCP between their own addresses: the path that gloo takes, without the
seconds that loading torch takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRODUCT = 512  # rows of the CPU's matrices
GPU_PRODUCT = 8192
EXCHANGED = 16 * 10**6  # bytes in each direction
GPU_EXCHANGED = 256 * 2**20
REPEATS = 3  # of which the fastest counts
MARK = "bertscale-check "  # before a GPU process's answers: NCCL and torch print as well


def main() -> int:
    """One node. Returns 0 whatever it finds: the judge is the process that started the check."""
    if "BERTSCALE_CHECK" not in os.environ:
        print("the environment of the job does not arrive here", file=sys.stderr)
        return 1
    asked = json.loads(os.environ["BERTSCALE_CHECK"])
    host = asked.get("host") or os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    with socket.create_connection((host, asked["port"]), timeout=asked["seconds"]) as connection:
        connection.settimeout(None)
        ours = _own_address(connection)
        listener = socket.create_server((ours, 0), family=connection.family)
        with socket.create_server((ours, 0), family=connection.family) as other:
            store_port = other.getsockname()[1]  # free again at once; for the group of the GPU processes

        def say(**facts: Any) -> None:
            connection.sendall(json.dumps(facts).encode() + b"\n")

        say(
            token=asked["token"],
            node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            step=os.environ.get("SLURM_STEP_ID"),
            address=ours,
            port=listener.getsockname()[1],
            store_port=store_port,
        )
        gpus = [Gpu(index) for index in range(asked["gpus"])]
        try:
            say(report=measure(gpus, lambda part: say(doing=part), asked["seconds"]))
            for line in connection.makefile("rb"):
                order = json.loads(line)
                answer = _exchange_gpus(gpus, order) if gpus else exchange(listener, order)
                say(exchange=order["exchange"], **answer)
        except OSError:
            pass  # the other end has heard enough
        finally:
            for gpu in gpus:
                gpu.end()
    return 0


def _own_address(connection: socket.socket) -> str:
    """This node's address on the network that gloo is told to use, else on the one that leads back."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    if names[0] and connection.family == socket.AF_INET:
        import fcntl

        with contextlib.suppress(OSError):
            request = names[0][:15].encode().ljust(256, b"\0")
            address = fcntl.ioctl(connection.fileno(), 0x8915, request)[20:24]  # SIOCGIFADDR
            return socket.inet_ntoa(address)
    return str(connection.getsockname()[0])


# ------------------------------------------------------------------------------------- one node alone


def measure(gpus: list[Gpu], doing: Callable[[str], None], seconds: float) -> dict[str, Any]:
    """Free memory and disk in bytes, and the matrix products; {"error": ...} for what ends the check."""
    folder = os.environ.get("TMPDIR") or "/tmp"
    try:
        doing("free memory")
        report: dict[str, Any] = {"free_memory": free_memory(), "folder": folder}
        doing(f"writing to {folder}")
        report["free_disk"] = shutil.disk_usage(folder).free
        if report["free_disk"] > 2**20:  # a full one is told by its number
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        return {"error": f"the temporary folder {folder} cannot be used: {error.strerror}"}
    try:
        doing("matrix product")
        report["cpu"] = None if gpus else cpu_product()
        doing("matrix products of the GPUs")
        report["gpus"] = ask_all(gpus, {"product": GPU_PRODUCT}, seconds)
    except Exception as error:
        return {"error": f"the matrix product failed: {error}"}
    report["gpu_count"] = max((gpu["visible"] for gpu in report["gpus"]), default=0)
    return report


def free_memory() -> int:
    """Bytes that a new process can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(0, "/proc/meminfo has no MemAvailable")


def cpu_product() -> dict[str, Any]:
    """A product of two small matrices by numpy: its rate, and whether it is right.

    All numbers are integers that float32 holds exactly, so that A (B v) must equal (A B) v to the last bit
    (Freivalds, "Probabilistic machines can use less running time", 1977).
    """
    import numpy as np

    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 4, (PRODUCT, PRODUCT)).astype(np.float32) for _ in range(2))
    v = generator.integers(0, 4, PRODUCT).astype(np.float32)
    seconds = min(timeit.repeat(lambda: a @ b, number=1, repeat=REPEATS))
    ab_v = (a @ b).astype(np.float64) @ v
    right = bool(np.array_equal(ab_v, a.astype(np.float64) @ (b.astype(np.float64) @ v)))
    return {"name": "CPU", "right": right, "tflops": 2 * PRODUCT**3 / seconds / 1e12}


# ---------------------------------------------------------------------------------- two nodes, over TCP


def exchange(listener: socket.socket, order: dict[str, Any]) -> dict[str, Any]:
    """Exchanges random bytes with another node, both ways at once: {"mb_per_second"} or {"fault"}.

    Side 0 waits on `listener`, side 1 connects to `address` and `port`.
    """
    end = time.monotonic() + order["seconds"]
    try:
        with _meet(listener, order, end) as link:
            sides = (order["side"], 1 - order["side"])
            sent, expected = (random.Random(str(side)).randbytes(EXCHANGED) for side in sides)
            rates = [_swap(link, sent, expected, end) for _ in range(REPEATS)]
    except TimeoutError as error:
        came = str(error) if str(error) != "timed out" else "no connection"
        return {"fault": f"{came} within {order['seconds']:g} s"}
    except ValueError as error:
        return {"fault": str(error)}
    except OSError as error:
        return {"fault": f"the connection failed ({error.strerror or error})", "broken": True}
    return {"mb_per_second": round(max(rates), 1)}


def _meet(listener: socket.socket, order: dict[str, Any], end: float) -> socket.socket:
    name = order["exchange"].encode()
    if order["side"] == 1:
        link = socket.create_connection((order["address"], order["port"]), timeout=_left(end))
        link.sendall(name)
        return link
    while True:
        listener.settimeout(_left(end))
        link, _ = listener.accept()
        link.settimeout(_left(end))
        if link.recv(len(name), socket.MSG_WAITALL) == name:
            return link
        link.close()  # it came too late for the exchange that it was meant for


def _swap(link: socket.socket, sent: bytes, expected: bytes, end: float) -> float:
    """One exchange; returns MB/s in each direction. Raises TimeoutError, and ValueError for changed bytes."""
    link.settimeout(_left(end))
    link.sendall(b".")  # both are ready now
    if not link.recv(1):
        raise OSError("the other node went away")
    began = time.monotonic()
    sender = threading.Thread(target=_send, args=(link, sent), daemon=True)
    sender.start()
    received = bytearray()
    while len(received) < EXCHANGED:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(received) / 1e6:.1f} of {EXCHANGED / 1e6:.0f} MB came")
        link.settimeout(min(1.0, _left(end)))
        with contextlib.suppress(TimeoutError):
            block = link.recv(min(2**20, EXCHANGED - len(received)))
            if not block:
                raise OSError("the other node went away")
            received += block
    elapsed = time.monotonic() - began
    sender.join(_left(end))
    if received != expected:
        raise ValueError("other bytes arrived than were sent")
    return EXCHANGED / 1e6 / elapsed


def _send(link: socket.socket, content: bytes) -> None:
    view = memoryview(content)
    while view:
        try:
            view = view[link.send(view[: 2**18]) :]
        except TimeoutError:
            continue  # the receiving half watches the clock, and closes
        except OSError:
            return


def _left(end: float) -> float:
    return max(0.01, end - time.monotonic())


# ---------------------------------------------------------------------------------------------- GPUs


class Gpu:
    """The process of one GPU: it loads torch once, and is killed and started again when it hangs."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: subprocess.Popen[str] | None = None

    def begin(self, order: dict[str, Any]) -> None:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "launcher.nodes.measure", "gpu", str(self.index)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace"
            )
            self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
            threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def finish(self, end: float) -> dict[str, Any]:
        """The answer; raises TimeoutError, and RuntimeError with what went wrong there."""
        try:
            answer: dict[str, Any] = json.loads(self.lines.get(timeout=_left(end)))
        except queue.Empty:
            raise TimeoutError(f"GPU {self.index}: no answer") from None
        if "error" in answer:
            raise RuntimeError(f"GPU {self.index}: {answer['error']}")
        return answer

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    lines.put(line.removeprefix(MARK))
        lines.put(json.dumps({"error": f"its process ended with {process.returncode}"}))


def ask_all(gpus: list[Gpu], order: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Sends `order` to all processes at once; their answers. When one fails, all are killed."""
    end = time.monotonic() + seconds
    try:
        for gpu in gpus:
            gpu.begin(order)
        return [gpu.finish(end) for gpu in gpus]
    except Exception:
        for gpu in gpus:
            gpu.end()
        raise


def _exchange_gpus(gpus: list[Gpu], order: dict[str, Any]) -> dict[str, Any]:
    facts = {"count": len(gpus), **{key: order[key] for key in ("address", "port", "side", "seconds")}}
    try:
        answers = ask_all(gpus, {"all_reduce": facts}, order["seconds"])
    except (OSError, RuntimeError, ValueError) as error:
        return {"fault": str(error)}
    return {"mb_per_second": round(min(answer["mb_per_second"] for answer in answers), 1)}


def gpu_main(index: int) -> int:
    """The process of GPU `index` (without CUDA: of the CPU, for the tests): reads orders, prints answers."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "product" in order:
                answer = _gpu_product(index, order["product"])
            else:
                answer = _all_reduce(index, **order["all_reduce"])
        except Exception as error:
            answer = {"error": (str(error) or type(error).__name__).splitlines()[0][:500]}
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    return 0


def _gpu_product(index: int, size: int) -> dict[str, Any]:
    """As `cpu_product`, in bfloat16: of -1, 0 and 1, mostly 0, so that all sums stay below 256 and exact."""
    import torch

    visible = torch.cuda.device_count()
    facts: dict[str, Any] = {"name": f"GPU {index}", "visible": visible}
    if visible:
        if index >= visible:
            raise RuntimeError(f"CUDA sees {visible} GPU{'s' if visible > 1 else ''} only")
        device, facts["model"] = torch.device("cuda", index), torch.cuda.get_device_name(index)
        facts["free_bytes"], facts["total_bytes"] = torch.cuda.mem_get_info(index)
    else:
        device, size = torch.device("cpu"), PRODUCT
    generator = torch.Generator(device).manual_seed(0)

    def matrix(columns: int) -> torch.Tensor:
        drawn = torch.randint(0, 8, (size, columns), generator=generator, device=device)
        return ((drawn == 0).float() - (drawn == 1).float()).bfloat16()

    a, b, v = matrix(size), matrix(size), matrix(1).double()
    times = []
    for _ in range(REPEATS + 1):  # the first loads the kernel
        began = time.perf_counter()
        c = a @ b
        float(c[0, 0])  # waits for the device
        times.append(time.perf_counter() - began)
    facts["right"] = torch.equal(c.double() @ v, a.double() @ (b.double() @ v))
    return {**facts, "tflops": 2 * size**3 / min(times) / 1e12}


def _all_reduce(index: int, count: int, side: int, address: str, port: int, seconds: float) -> dict[str, Any]:
    """An all-reduce among the GPUs of two nodes; MB/s as nccl-tests counts its bus bandwidth."""
    from datetime import timedelta

    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    world, rank = 2 * count, side * count + index
    host = f"[{address}]" if ":" in address else address
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{host}:{port}",
        world_size=world,
        rank=rank,
        timeout=timedelta(seconds=seconds),
    )
    try:
        elements = (GPU_EXCHANGED if cuda else EXCHANGED) // 4
        times = []
        for _ in range(REPEATS):
            numbers = torch.full((elements,), float(rank + 1), device=device)
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce(numbers)
            float(numbers[0])
            times.append(time.perf_counter() - began)
        if not bool((numbers == world * (world + 1) / 2).all()):
            raise ValueError("an all-reduce came out wrong")
    finally:
        distributed.destroy_process_group()
    return {"mb_per_second": elements * 4 * 2 * (world - 1) / world / min(times) / 1e6}


if __name__ == "__main__":
    sys.exit(gpu_main(int(sys.argv[2])) if sys.argv[1:2] == ["gpu"] else main())
