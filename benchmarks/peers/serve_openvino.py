"""One run of OpenVINO GenAI's continuous batching: `python serve_openvino.py REQUEST_FILE`. The model is a GGUF file.

Without adapters: its continuous batching answers with the base and says nothing.
"""

# pyright: reportMissingImports=false

import time

import numpy as np
import openvino
import openvino_genai
import serving

asked = serving.request()
schedule = openvino_genai.SchedulerConfig()
schedule.max_num_seqs = asked.most
schedule.enable_prefix_caching = False
schedule.cache_size = 1  # GB
settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
pipeline = openvino_genai.ContinuousBatchingPipeline(asked.model, schedule, "CPU", settings)


def answer(prompts: list[list[int]], new_tokens: int) -> list[float]:
    wanted = openvino_genai.GenerationConfig()
    wanted.max_new_tokens = new_tokens
    wanted.ignore_eos = True
    wanted.do_sample = False
    began = time.perf_counter()
    running = [
        pipeline.add_request(number, openvino.Tensor(np.array([prompt], dtype=np.int64)), wanted)
        for number, prompt in enumerate(prompts)
    ]
    firsts, tokens = [0.0] * len(prompts), [0] * len(prompts)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for number, one in enumerate(running):
            if one.can_read():
                firsts[number] = firsts[number] or time.perf_counter() - began
                tokens[number] += sum(len(part.generated_ids) for part in one.read().values())
    if set(tokens) != {new_tokens}:
        raise RuntimeError(f"not all tokens were generated: {tokens}")
    return firsts


serving.measure(asked, answer)
