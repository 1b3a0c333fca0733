"""Speed of a bare matrix product of a size that training has, per thread: `python run_gemm.py REQUEST_JSON`.

Of 30 products, or as many as take 2 seconds: where bfloat16 is emulated one takes that long.
"""

import json
import time

import measuring

asked = measuring.request()

import torch  # noqa: E402

M, K, N, ROUNDS, LIMIT_S = 2048, 576, 1536, 30, 2.0
speeds = {}
for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
    left, right = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    torch.mm(left, right)
    began, rounds = time.process_time(), 0
    while rounds < ROUNDS and time.process_time() - began < LIMIT_S:
        torch.mm(left, right)
        rounds += 1
    speeds[f"{name}_gflop_per_cpu_s"] = round(rounds * 2 * M * K * N / (time.process_time() - began) / 1e9, 1)
print(json.dumps(speeds))
