"""Data files with every fault of the catalogue of bad training data, and what the check must say of each.

A case: its number in the catalogue (with a letter where one number has several inputs), the bytes, the code, the severity
(`error`, `warning`, or `none` for input that must pass without that code), and where: the line and the JSON pointer.
"""

import base64
import gzip
import io
import json
import zipfile
from typing import Any, NamedTuple


class Case(NamedTuple):
    id: str
    data: bytes
    code: str
    severity: str = "error"
    line: int | None = None
    pointer: str | None = None
    purpose: str = "fine-tune"


USER = {"role": "user", "content": "What is the capital of France?"}
ASSISTANT = {"role": "assistant", "content": "Paris."}
SYSTEM = {"role": "system", "content": "Answer in one word."}
GOOD = {"messages": [USER, ASSISTANT]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f"
        "00010501012718e3660000000049454e44ae426082"
    )
).decode()


def line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def file(*rows: object) -> bytes:
    """JSONL of the rows."""
    return b"".join(line(row) for row in rows)


def chat(*messages: object) -> bytes:
    """One good row, then a row of these messages: what is wrong is on line 2."""
    return file(GOOD, {"messages": list(messages)})


def call(arguments: object = '{"city": "Paris"}', *, name: str = "get_weather", id: object = "c1") -> dict[str, Any]:
    calls = [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls}


def reply(id: object = "c1") -> dict[str, Any]:
    return {"role": "tool", "content": "sunny", "tool_call_id": id}


def function(*messages: object, tools: object = None) -> bytes:
    return file(GOOD, {"messages": list(messages), "tools": [TOOL] if tools is None else tools})


def tool(**changes: object) -> bytes:
    """A good exchange with one odd tool."""
    return function(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "f", **changes}}])


def image(url: object, role: str = "user") -> bytes:
    part = {"type": "image_url", "image_url": {"url": url}}
    if role == "assistant":
        return file({"messages": [USER, {"role": "assistant", "content": [part]}]})
    return file({"messages": [USER, {"role": "user", "content": [part]}, ASSISTANT]})


_IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}


def _answers(*parts: object) -> bytes:
    """A row whose answer is made of these parts."""
    return file({"messages": [USER, {"role": "assistant", "content": list(parts)}]})


def preference(**changes: object) -> bytes:
    row: dict[str, object] = {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [{"role": "assistant", "content": "London."}],
    }
    row |= changes
    return file({key: value for key, value in row.items() if value is not ...})


def _zip(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x")
    return stream.getvalue()


_GBK = '{"messages": [{"role": "user", "content": "你好，世界"}]}\n'.encode("gbk")
_PRETTY = json.dumps(GOOD, indent=2).encode()
_TEXT = "/messages/1/content"

CASES = [
    Case("J01", b"", "file_empty"),
    Case("J02 blank lines", b"\n \r\n\t\n", "file_empty"),
    Case("J02 BOM alone", b"\xef\xbb\xbf", "file_empty"),
    Case("J02 BOM and blank lines", b"\xef\xbb\xbf\n\n", "file_empty"),
    Case("J02 2 MB of blank lines", b" " * 2**21 + b"\n" * 1000, "file_empty"),
    Case("J05", b"\xef\xbb\xbf" + line(GOOD), "byte_order_mark", "warning"),
    Case("J06 little end first", json.dumps(GOOD).encode("utf-16"), "invalid_encoding"),
    Case("J06 big end first", b"\xfe\xff" + json.dumps(GOOD).encode("utf-16-be"), "invalid_encoding"),
    Case("J06 without a mark", json.dumps(GOOD).encode("utf-16-le"), "invalid_encoding"),
    Case("J07", line(GOOD) + _GBK, "invalid_encoding", line=2),
    Case("J08", line(GOOD) * 3000 + b'{"a": "\xff"}\n', "invalid_encoding", line=3001),
    Case("J09", line(GOOD) + rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "invalid_unicode", line=2),
    Case("J10", line(GOOD) + rb'{"messages": [{"role": "user", "content": "a\u0000"}]}', "invalid_unicode", line=2),
    Case("J11 CR LF", file(GOOD, GOOD).replace(b"\n", b"\r\n"), "crlf", "warning", 1),
    Case("J11 mixed", line(GOOD) + line(GOOD).replace(b"\n", b"\r\n"), "crlf", "warning", 2),
    Case("J11 lone CR", file(GOOD, GOOD).replace(b"\n", b"\r"), "not_jsonl"),
    Case("J12", chat({"role": "user", "content": "a\u2028b\u2029c\x85d\x1ce"}, ASSISTANT), "invalid_json", "none"),
    Case("J13", line(GOOD) + line(GOOD).rstrip(b"\n"), "invalid_json", "none"),
    Case("J14", line(GOOD) + b"\n" + line(GOOD), "blank_line", "warning", 2),
    Case("J15 on one line", line([GOOD, GOOD]), "not_jsonl"),
    Case("J15 on many lines", b"[\n" + json.dumps(GOOD).encode() + b",\n" + json.dumps(GOOD).encode() + b"\n]", "not_jsonl"),
    Case("J15 of 2 MB", b"[" + b",".join([json.dumps(GOOD).encode()] * 20_000) + b"]", "not_jsonl"),
    Case("J16 one object", _PRETTY, "not_jsonl"),
    Case("J16 many objects", _PRETTY + b"\n" + _PRETTY, "not_jsonl"),
    Case("J16 with faults", b'{\n  "messages": [\n    {"role": "user",},\n  ]\n}\n', "not_jsonl"),
    Case("J17 CSV", b"prompt,completion\nhello,world\n", "unsupported_format"),
    Case("J17 CSV with quotes", b'"prompt","completion"\n"hello","world"\n', "unsupported_format"),
    Case("J17 TSV", b"prompt\tcompletion\nhello\tworld\n", "unsupported_format"),
    Case("J17 XLSX", _zip("xl/workbook.xml"), "unsupported_format"),
    Case("J17 ZIP", _zip("train.jsonl"), "unsupported_format"),
    Case("J17 GZIP", gzip.compress(line(GOOD)), "unsupported_format"),
    Case("J17 Parquet", b"PAR1\x15\x04\x15", "unsupported_format"),
    Case("J17 HTML", b"<!DOCTYPE html><html></html>", "unsupported_format"),
    Case("J18 text", line(GOOD) + b'"hello"\n', "line_not_object", line=2),
    Case("J18 number", line(GOOD) + b"1\n", "line_not_object", line=2),
    Case("J18 null", line(GOOD) + b"null\n", "line_not_object", line=2),
    Case("J18 array", line(GOOD) + b"[1]\n", "line_not_object", line=2),
    Case("J18 arrays only", b"[1]\n[2]\n", "line_not_object", line=1),
    Case("J19 trailing comma", line(GOOD) + b'{"messages": [],}\n', "invalid_json", line=2),
    Case("J19 single quotes", line(GOOD) + b"{'messages': []}\n", "invalid_json", line=2),
    Case("J19 comment", line(GOOD) + b'{"messages": []} // x\n', "invalid_json", line=2),
    Case("J19 None", line(GOOD) + b'{"messages": None}\n', "invalid_json", line=2),
    Case("J20", line(GOOD) + line(GOOD)[:40], "invalid_json", line=2),
    Case("J21", line(GOOD) + json.dumps(GOOD).encode() + line(GOOD), "invalid_json", line=2),
    Case("J22 NaN", line(GOOD) + b'{"messages": NaN}', "invalid_number", line=2),
    Case("J22 Infinity", line(GOOD) + b'{"messages": Infinity}', "invalid_number", line=2),
    Case("J22 minus Infinity", line(GOOD) + b'{"messages": -Infinity}', "invalid_number", line=2),
    Case("J22 1e999", line(GOOD) + b'{"messages": 1e999}', "invalid_number", line=2),
    Case("J23", line(GOOD) + b'{"messages": ' + b"9" * 5000 + b"}", "invalid_number", line=2),
    Case("J24 100,000", line(GOOD) + b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nesting_too_deep", line=2),
    Case("J24 33", line(GOOD) + b'{"x":' * 33 + b"1" + b"}" * 33, "nesting_too_deep", line=2),
    Case("J25", line(GOOD) + b'{"messages": [], "messages": []}', "duplicate_key", line=2),
    Case("J26", file({**GOOD, "__proto__": {"x": 1}}), "unknown_field", "warning", 1, "/__proto__"),
    Case("J26 $ref", file({**GOOD, "$ref": "#/x", "__class__": "x"}), "unknown_field", "warning", 1),
    Case("J27", line(GOOD) + b'{"messages": "a\tb"}', "invalid_json", line=2),
    Case("J29", file(GOOD, {"model": "x"}), "missing_field", line=2, pointer="/messages"),
    Case("J30 empty", file(GOOD, {"messages": []}), "messages_empty", line=2, pointer="/messages"),
    Case("J30 object", file(GOOD, {"messages": {}}), "invalid_type", line=2, pointer="/messages"),
    Case("J30 text", file(GOOD, {"messages": "x"}), "invalid_type", line=2, pointer="/messages"),
    Case("J30 null", file(GOOD, {"messages": None}), "invalid_type", line=2, pointer="/messages"),
    Case("J31", chat("x", ASSISTANT), "invalid_type", line=2, pointer="/messages/0"),
    Case("J32", chat({"content": "x"}, ASSISTANT), "missing_field", line=2, pointer="/messages/0/role"),
    Case("J33 human", chat({**USER, "role": "human"}, ASSISTANT), "invalid_role", line=2, pointer="/messages/0/role"),
    Case("J33 User", chat({**USER, "role": "User"}, ASSISTANT), "invalid_role", line=2),
    Case("J33 space", chat({**USER, "role": " user"}, ASSISTANT), "invalid_role", line=2),
    Case("J33 3", chat({**USER, "role": 3}, ASSISTANT), "invalid_role", line=2),
    Case("J33 list", chat({**USER, "role": ["user"]}, ASSISTANT), "invalid_role", line=2),
    Case("J33 function", chat(USER, {**USER, "role": "function"}, ASSISTANT), "invalid_role", line=2),
    Case("J34", chat(USER, {"role": "assistant"}), "missing_field", line=2, pointer=_TEXT),
    Case("J35 null", chat(USER, {**ASSISTANT, "content": None}), "invalid_type", line=2, pointer=_TEXT),
    Case("J35 number", chat(USER, {**ASSISTANT, "content": 5}), "invalid_type", line=2, pointer=_TEXT),
    Case("J35 object", chat(USER, {**ASSISTANT, "content": {}}), "invalid_type", line=2, pointer=_TEXT),
    Case("J35 empty", chat(USER, {**ASSISTANT, "content": ""}), "content_empty", line=2, pointer=_TEXT),
    Case("J35 no parts", chat(USER, {**ASSISTANT, "content": []}), "content_empty", line=2, pointer=_TEXT),
    Case("J35 spaces", chat(USER, {**ASSISTANT, "content": " \n"}), "content_empty", line=2, pointer=_TEXT),
    Case("J35 spaces of a user", chat({**USER, "content": "  "}, ASSISTANT), "content_empty", "warning", 2),
    Case("J36", chat(SYSTEM, USER), "no_assistant_message", line=2, pointer="/messages"),
    Case("J37", chat(USER, ASSISTANT, USER), "last_message_not_assistant", line=2, pointer="/messages/2/role"),
    Case("J37 function", function(USER, call(), reply(), ASSISTANT, USER), "trailing_messages_ignored", "warning", 2),
    Case("J38 middle", chat(USER, SYSTEM, ASSISTANT), "system_not_first", line=2, pointer="/messages/1/role"),
    Case("J38 two", chat(SYSTEM, SYSTEM, USER, ASSISTANT), "system_not_first", line=2),
    Case("J39 users", chat(USER, USER, ASSISTANT), "roles_not_alternating", "warning", 2, "/messages/1/role"),
    Case("J39 assistants", chat(USER, ASSISTANT, ASSISTANT), "roles_not_alternating", "warning", 2),
    Case("J39 question and image", image(f"data:image/png;base64,{PIXEL}"), "roles_not_alternating", "none"),
    Case("J40", chat(ASSISTANT, USER, ASSISTANT), "first_message_invalid", line=2, pointer="/messages/0/role"),
    Case("J40 after system", chat(SYSTEM, ASSISTANT), "first_message_invalid", line=2, pointer="/messages/1/role"),
    Case("J41 all 0", chat(USER, {**ASSISTANT, "weight": 0}), "nothing_to_train", line=2, pointer="/messages"),
    Case("J41 2", chat(USER, {**ASSISTANT, "weight": 2}), "invalid_weight", line=2, pointer="/messages/1/weight"),
    Case("J41 text", chat(USER, {**ASSISTANT, "weight": "1"}), "invalid_weight", line=2),
    Case("J41 true", chat(USER, {**ASSISTANT, "weight": True}), "invalid_weight", line=2),
    Case("J41 false", chat(USER, {**ASSISTANT, "weight": False}), "invalid_weight", line=2),
    Case("J41 1.0", chat(USER, {**ASSISTANT, "weight": 1.0}), "invalid_weight", line=2),
    Case("J41 some 0", chat(USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT), "nothing_to_train", "none"),
    Case("J42", chat({**USER, "mood": "gay/~"}, ASSISTANT), "unknown_field", "warning", 2, "/messages/0/mood"),
    Case("J42 pointer", chat({**USER, "a/b~c": 1}, ASSISTANT), "unknown_field", "warning", 2, "/messages/0/a~1b~0c"),
    Case("J43", file(GOOD, {"prompt": "x", "completion": "y"}), "wrong_format", line=2),
    Case("J43 Alpaca", file({"instruction": "x", "input": "", "output": "y"}), "wrong_format", line=1),
    Case("J43 ShareGPT", file({"conversations": [{"from": "human", "value": "x"}]}), "wrong_format", line=1),
    Case("J43 mixed kinds", file(GOOD) + preference(), "wrong_format", line=2),
    Case("J44 no preferred", preference(preferred_output=...), "missing_field", pointer="/preferred_output"),
    Case("J44 no other", preference(non_preferred_output=...), "missing_field", pointer="/non_preferred_output"),
    Case("J44 no input", preference(input=...), "missing_field", pointer="/messages"),
    Case("J44 equal", preference(non_preferred_output=[ASSISTANT]), "preference_identical", line=1),
    Case("J44 two answers", preference(preferred_output=[ASSISTANT, ASSISTANT]), "invalid_preference", line=1),
    Case("J44 answer of a user", preference(preferred_output=[USER]), "invalid_preference", line=1),
    Case("J45 not JSON", function(USER, call("{city: Paris}"), reply()), "invalid_tool_call", line=2),
    Case(
        "J45 list", function(USER, call("[1]")), "invalid_tool_call", line=2,
        pointer="/messages/1/tool_calls/0/function/arguments",
    ),
    Case("J45 object", function(USER, call({"city": "Paris"})), "invalid_tool_call", line=2),
    Case("J45 duplicate key", function(USER, call('{"city": 1, "city": 2}')), "invalid_tool_call", line=2),
    Case("J45 other id", function(USER, call(), reply("c2"), ASSISTANT), "invalid_tool_call", line=2),
    Case("J45 no id", function(USER, call(), {"role": "tool", "content": "x"}, ASSISTANT), "invalid_tool_call", line=2),
    Case("J45 no call", function(USER, reply(), ASSISTANT), "invalid_tool_call", line=2),
    Case("J45 id of a number", function(USER, call(id=5)), "invalid_tool_call", line=2),
    Case("J45 calls as object", function(USER, {"role": "assistant", "tool_calls": {}, "content": "x"}), "invalid_type"),
    Case("J45 old form", chat(USER, {**ASSISTANT, "function_call": {"name": "f"}}), "invalid_tool_call", line=2),
    Case("J45 not offered", function(USER, call(name="other"), reply(), ASSISTANT), "tool_not_offered", "warning", 2),
    Case("J45 argument missing", function(USER, call("{}"), reply(), ASSISTANT), "missing_argument", "warning", 2),
    Case("J45 unanswered", function(USER, call(), USER, ASSISTANT), "tool_call_unanswered", "warning", 2),
    Case("J45 good", function(USER, call(), reply(), ASSISTANT), "invalid_tool_call", "none"),
    Case("J46 name", tool(name="a b"), "invalid_tool", line=2, pointer="/tools/0/function/name"),
    Case("J46 no name", tool(name=None), "invalid_tool", line=2),
    Case("J46 200 tools", function(USER, ASSISTANT, tools=[TOOL] * 200), "invalid_tool", line=2, pointer="/tools"),
    Case("J46 twice", function(USER, ASSISTANT, tools=[TOOL, TOOL]), "invalid_tool", line=2),
    Case("J46 $ref to itself", tool(parameters={"properties": {"x": {"$ref": "#"}}}), "invalid_tool", line=2),
    Case(
        "J46 $ref in a circle",
        tool(parameters={"$ref": "#/$defs/a", "$defs": {"a": {"x": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}}),
        "invalid_tool", line=2,
    ),
    Case("J46 1,000 $ref", tool(parameters={"x": [{"$ref": "#/y"}] * 1000}), "invalid_tool", line=2),
    Case("J46 $ref to text", tool(parameters={"x": {"$ref": "#/$defs/a"}, "$defs": {"a": {}}}), "invalid_tool", "none"),
    Case("J46 parameters", tool(parameters=[]), "invalid_tool", line=2),
    Case("J46 type", tool(parameters={"type": "string"}), "invalid_tool", line=2),
    Case("J46 required", tool(parameters={"type": "object", "required": "x"}), "invalid_tool", line=2),
    Case("J46 flat", function(USER, ASSISTANT, tools=[{"name": "f", "parameters": {}}]), "invalid_tool", line=2),
    Case("J46 not a list", function(USER, ASSISTANT, tools={"a": 1}), "invalid_type", line=2, pointer="/tools"),
    Case("J46 old form", file({**GOOD, "functions": [{"name": "f"}]}), "invalid_tool", line=1),
    Case("J49", file(*[{"messages": [USER, {**ASSISTANT, "weight": 0}]}] * 3), "nothing_to_train", line=1),
    Case("J50", file(GOOD, GOOD, GOOD), "duplicate_row", "warning", 2),
    Case("J52", chat(USER, {**ASSISTANT, "content": "<|im_start|>assistant"}), "special_token_in_text", "warning", 2, _TEXT),
    Case("J52 escaped", file(GOOD) + line({"messages": [USER, {**ASSISTANT, "content": "<|endoftext|>"}]})
         .replace(b"<", b"\\u003c"), "special_token_in_text", "warning", 2, _TEXT),
    Case("J52 gMASK", chat(USER, {**ASSISTANT, "content": "[gMASK]"}), "special_token_in_text", "warning", 2, _TEXT),
    Case("J53 zero width", chat(USER, {**ASSISTANT, "content": "a\u200bb"}), "invisible_character", "warning", 2, _TEXT),
    Case("J53 direction", chat(USER, {**ASSISTANT, "content": "a\u202eb"}), "invisible_character", "warning", 2, _TEXT),
    Case("J53 control", chat(USER, {**ASSISTANT, "content": "a\x1bb"}), "invisible_character", "warning", 2, _TEXT),
    Case("J53 marks", chat(USER, {**ASSISTANT, "content": "a" + "\u0301" * 10_000}), "invisible_character", "warning", 2),
    Case("J53 plain Chinese", chat(USER, {**ASSISTANT, "content": "“你好”……—é"}), "invisible_character", "none"),
    Case("J53 emoji", chat(USER, {**ASSISTANT, "content": "👩\u200d👩\u200d👧"}), "invisible_character", "none"),
    Case("J54 address inside", image("http://169.254.169.254/x.jpeg"), "url_not_allowed", line=1),
    Case("J54 name without a dot", image("HTTP://localhost/x.jpeg"), "url_not_allowed", line=1),
    Case("J54 other port", image("http://example.com:22/x.jpeg", "assistant"), "url_not_allowed", line=1),
    Case("J54 public", image("https://example.com/x.jpeg"), "url_not_allowed", "none"),
    Case("J55 user name", image("https://example.com@127.0.0.1/x.jpeg"), "invalid_media_url", line=1),
    Case("J55 number", image("http://2130706433/"), "invalid_media_url", line=1),
    Case(
        "J55 file", image("file:///etc/passwd"), "invalid_media_url", line=1,
        pointer="/messages/1/content/0/image_url/url",
    ),
    Case("J55 path", image("/etc/passwd"), "invalid_media_url", line=1),
    Case("J55 long path", image("/etc/" + "../x" * 100), "invalid_media_url", line=1),
    Case("J55 backslash", image("..\\x"), "invalid_media_url", line=1),
    Case("J55 ftp", image("ftp://example.com/x"), "invalid_media_url", line=1),
    Case("J56 base64", image("data:image/png;base64,!!!"), "invalid_image", line=1),
    Case("J56 empty", image("data:image/png;base64,"), "invalid_image", line=1),
    Case("J56 type", image("data:text/html;base64,PGI+"), "invalid_image", line=1),
    Case("J56 SVG", image("data:image/svg+xml;base64,PHN2Zz4="), "invalid_image", line=1),
    Case("J56 GIF", image("data:image/gif;base64,R0lGODlhAQABAAAAACw="), "invalid_image", line=1),
    Case("J56 bare GIF", image("R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="), "invalid_image", line=1),
    Case("J56 not an image", image("data:image/png;base64," + "QUJD" * 20), "invalid_image", line=1),
    Case("J56 bare and not an image", image("QUJD" * 20), "invalid_image", line=1),
    Case("J56 no base64", image("data:image/png,abc"), "invalid_image", line=1),
    Case("J56 good", image(f"data:image/png;base64,{PIXEL}"), "invalid_image", "none"),
    Case("J56 good and bare", image(PIXEL), "invalid_image", "none"),
    Case("J56 no url", image(None), "invalid_type", line=1),
    Case(
        "J58",
        file({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}] * 1000}, ASSISTANT]}),
        "too_many_images", line=1,
    ),
    Case("J59", chat(USER, {**ASSISTANT, "content": "sk-" + "a1" * 12}), "possible_secret", "warning", 2, _TEXT),
    Case("J59 private key", chat({**USER, "content": "-----BEGIN PRIVATE KEY-----"}, ASSISTANT), "possible_secret", "warning"),
    Case("J59 of this kind", chat(USER, {**ASSISTANT, "content": "0af9" * 8 + "." + "a1B2" * 8}), "possible_secret", "warning"),
    Case("J59 plain words", chat(USER, {**ASSISTANT, "content": "task-oriented risk-free xoxo"}), "possible_secret", "none"),
    Case("J60", chat({**USER, "content": "<script>alert(1)</script>"}, ASSISTANT), "special_token_in_text", "none"),
    Case("J61", chat({**USER, "content": '=HYPERLINK("http://x")'}, ASSISTANT), "possible_secret", "none"),
    Case(
        "J65 no caption",
        file({"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]}),
        "missing_field", line=1,
    ),
    Case("two images to generate", _answers(_IMAGE, _IMAGE), "too_many_images", line=1, pointer="/messages/1/content/1"),
    Case("an image between texts to generate", _answers(_IMAGE, {"type": "text", "text": "A dot."}), "too_many_images", "none"),
    Case("an image shown and one answered", file({"messages": [
        {"role": "user", "content": [_IMAGE]}, {"role": "assistant", "content": [_IMAGE]}]}),
        "invalid_content_part", line=1, pointer="/messages/1/content/0/type"),
    Case("an image asked after one is generated", file({"messages": [
        USER, {"role": "assistant", "content": [_IMAGE]}, {"role": "user", "content": [_IMAGE]}, ASSISTANT]}),
        "invalid_content_part", line=1, pointer="/messages/2/content/0/type"),
    Case("part of an unknown type", chat({"role": "user", "content": [{"type": "video"}]}, ASSISTANT), "invalid_content_part"),
    Case("part without text", chat({"role": "user", "content": [{"type": "text"}]}, ASSISTANT), "missing_field", line=2),
    Case("image from a tool", function(USER, call(), {**reply(), "content": [{"type": "image_url"}]}, ASSISTANT),
         "invalid_content_part", line=2),
    Case("explicit nulls", chat({**USER, "name": None, "weight": None}, {**ASSISTANT, "tool_calls": None, "weight": None}),
         "unknown_field", "none"),
    Case("batch line", b'{"custom_id": "1", "body": {}}\n[]\n', "line_not_object", line=2, purpose="batch"),
    Case("batch needs no messages", b'{"custom_id": "1"}\n', "missing_field", "none", purpose="batch"),
    Case("functions announced, and none", file(GOOD), "purpose_mismatch", "warning", purpose="fine-tune-function-calling"),
    Case("functions announced, and some", function(USER, call(), reply(), ASSISTANT) + file(GOOD), "purpose_mismatch", "none",
         purpose="fine-tune-function-calling"),
    Case("an answer before both answers", preference(input={"messages": [USER, ASSISTANT]}), "roles_not_alternating", "warning",
         1, "/input/messages"),
    Case("purpose of another kind", file(GOOD), "purpose_mismatch", "warning", purpose="fine-tune-vision-cogvlm"),
]  # fmt: skip
