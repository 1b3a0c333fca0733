"""Speed of a bare matrix product of a size that training has, per thread: `python run_gemm.py REQUEST_JSON`."""

import json
import time

import measuring

asked = measuring.request()

import torch  # noqa: E402

M, K, N, ROUNDS = 2048, 576, 1536, 30
speeds = {}
for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
    left, right = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    for _ in range(3):
        torch.mm(left, right)
    began = time.process_time()
    for _ in range(ROUNDS):
        torch.mm(left, right)
    speeds[f"{name}_gflop_per_cpu_s"] = round(ROUNDS * 2 * M * K * N / (time.process_time() - began) / 1e9, 1)
print(json.dumps(speeds))
