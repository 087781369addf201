"""What this machine reaches, measured here and now: the denominators of every floor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# One kernel for each rate that no torch op reaches: exponentials at full issue rate, and reads that stay in L2.
_SOURCE = r"""
extern "C" __global__ void exponentials(float* out, int rounds) {
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = -1e-3f * (threadIdx.x + i);
  for (int r = 0; r < rounds; ++r) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
  }
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += x[i];
  if (sum == -1.0f) out[0] = sum;  // never: what is unused would be left out
}
extern "C" __global__ void cached_reads(const float4* in, float* out, int vectors, int rounds) {
  float sum = 0;
  int stride = gridDim.x * blockDim.x;
  for (int r = 0; r < rounds; ++r) {
    #pragma unroll 8
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += stride) {
      float4 v;
      asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(in + i));
      sum += v.x + v.y + v.z + v.w;
    }
  }
  if (sum == -1.0f) out[0] = sum;
}
"""


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s read, bytes/s copied (read + written), bytes/s read from the cache, FLOP/s, exponentials/s."""

    read: float
    copy: float
    cache_read: float
    matmul: float
    exp: float
    cache_bytes: float  # what stays in the cache between two passes

    def __str__(self) -> str:
        return (
            f"read {self.read / 1e12:.3f} TB/s, copy {self.copy / 1e12:.3f} TB/s, "
            f"from {self.cache_bytes / 2**20:.0f} MiB of cache {self.cache_read / 1e12:.3f} TB/s, "
            f"matmul {self.matmul / 1e12:.2f} TFLOP/s, exp {self.exp / 1e12:.3f} T/s"
        )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def cache_bytes(device: torch.device) -> float:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * 2 ** {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def _best(run: Callable[[], object], device: torch.device, inner: int) -> float:
    """The shortest of several timings: a ceiling is what the machine can do when nothing disturbs it."""
    run()
    sync(device)
    times = []
    for _ in range(9):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(500_000)
            start.record()
            for _ in range(inner):
                run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / inner)
        else:
            begin = time.perf_counter()
            for _ in range(inner):
                run()
            times.append((time.perf_counter() - begin) / inner)
    return min(times)


def _gpu_rates(device: torch.device, cache: float) -> tuple[float, float]:
    """Exponentials/s, and bytes/s read out of L2 from two thirds of what it holds."""
    out = torch.zeros(1, device=device)
    kernel = torch.cuda._compile_kernel(_SOURCE, "exponentials")
    units = torch.cuda.get_device_properties(device).multi_processor_count
    rounds, threads = 4096, 512
    grid = (4 * units, 1, 1)
    seconds = _best(lambda: kernel(grid, (threads, 1, 1), (out, rounds)), device, 1)
    exp = 8.0 * rounds * threads * grid[0] / seconds
    source = torch.zeros(int(cache) // 4, device=device)
    kernel = torch.cuda._compile_kernel(_SOURCE, "cached_reads")
    rounds, grid = 64, (2 * units, 1, 1)
    vectors = source.numel() // 4
    seconds = _best(lambda: kernel(grid, (1024, 1, 1), (source, out, vectors, rounds)), device, 1)
    return exp, 16.0 * vectors * rounds / seconds


def ceilings(device: torch.device) -> Ceilings:
    """A large copy, a large sum, a sum out of the cache, a large matrix product, many exponentials.

    The matrix product is bfloat16 on a GPU; on a CPU the better of bfloat16 and float32.
    """
    cuda = device.type == "cuda"
    size = 2**29 if cuda else 2**26
    x = torch.zeros(size, device=device).uniform_(-1, 1)
    y = torch.empty_like(x)
    copy = 8 * size / _best(lambda: y.copy_(x), device, 3 if cuda else 1)
    read = 4 * size / _best(lambda: torch.sum(x), device, 3 if cuda else 1)
    n = 8192 if cuda else 1024
    products = []
    for dtype in (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=device).to(dtype)
        products.append(2 * n**3 / _best(lambda a=a: a @ a, device, 5 if cuda else 1))
    # half of it: what one pass leaves behind and the next one finds, beside what else it reads and writes
    cache = cache_bytes(device) * (0.66 if cuda else 0.5)
    if cuda:
        exp, cache_read = _gpu_rates(device, cache)
    else:
        small = x[: 2**16]
        out = torch.empty_like(small)
        exp = small.numel() / _best(lambda: torch.exp2(small, out=out), device, 20)
        near = x[: int(cache) // 4]
        cache_read = 4 * near.numel() / _best(lambda: torch.sum(near), device, 10)
    return Ceilings(max(read, copy / 2), copy, max(cache_read, read), max(products), exp, cache)
