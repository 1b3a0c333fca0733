"""Fixed probe prompts: what the proof of effect compares a tuned model and its base on, stored with the model."""

from tunewright.rendering.conversation import Conversation, Message
from tunewright.rendering.renderer import Renderer

_QUESTIONS = (
    "Who are you? Answer in one sentence.",
    "你好，请用一句话介绍你自己。",
    "What is the capital of China? 请用中文回答。",
)


def canaries(renderer: Renderer) -> list[list[int]]:
    """Token ids of three short prompts, in English, in Chinese and mixed."""
    return [renderer.prompt(Conversation(messages=(Message(role="user", content=text),))) for text in _QUESTIONS]
